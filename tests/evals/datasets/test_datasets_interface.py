import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from aimv2.data.images import BadImage
from aimv2.evals.datasets import Dataset, ImageSet, held_out
from aimv2.evals.datasets.interface import Texts

LABELS = st.lists(st.integers(-3, 12), min_size=2, max_size=120)


def image_set(count=6, **columns):
    pixels = np.arange(count, dtype=np.uint8)[:, None, None] * np.ones((1, 5, 4), np.uint8)
    keys = [f"k{i}" for i in range(count)]
    columns = {"labels": np.arange(count) % 3, "digest": "d"} | columns
    return ImageSet(name="made", split="train", images=pixels, keys=keys, **columns)


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=8)))
def test_texts_are_a_list_of_texts(texts):
    packed = Texts(texts)
    assert list(packed) == texts and len(packed) == len(texts)
    assert [packed[-1 - i] for i in range(len(texts))] == texts[::-1]
    with pytest.raises(IndexError):
        packed[len(texts)]


def test_texts_keep_names_that_are_not_unicode_and_where_they_end():
    name = b"caf\xe9.jpg".decode("utf-8", "surrogateescape")
    assert Texts([name])[0] == name
    with pytest.raises(ValueError, match=r"'a\\ud800.jpg': no file can have this name"):
        Texts(["a\ud800.jpg"])
    assert Texts(["ab", "c"]).digest != Texts(["a", "bc"]).digest


def test_a_million_keys_take_their_bytes_and_a_number_each():
    texts = Texts(f"train/n01440764/n01440764_{i:05d}.JPEG" for i in range(100_000))
    # 36 bytes of text, 4 for where it ends, and the object itself; as `str` in a list they are 93 bytes each.
    assert len(pickle.dumps(texts)) < 40 * len(texts) + 1000


@given(st.lists(st.integers(0, 5), max_size=6), st.data())
def test_a_subset_is_its_rows(rows, data):
    images = image_set(captions=[[f"c{i}"] for i in range(6)], boxes=[[(i, (0, 0, 1, 1))] for i in range(6)])
    part = images.subset(rows)
    again = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=4)) if rows else []
    for subset, numbers in ((part, rows), (part.subset(again), [rows[i] for i in again])):
        assert len(subset) == len(numbers)
        assert list(subset.keys) == [f"k{i}" for i in numbers]
        assert subset.labels.tolist() == [i % 3 for i in numbers] and subset.labels.dtype == np.int64
        assert list(subset.captions) == [[f"c{i}"] for i in numbers]
        assert [subset.boxes(i)[0][0] for i in range(len(subset))] == numbers
        assert [subset.image(i).getpixel((0, 0)) for i in range(len(subset))] == [(n, n, n) for n in numbers]
    assert part.subset(again).identity == images.subset([rows[i] for i in again]).identity


def test_identity_says_what_is_the_same():
    images = image_set()
    same = [image_set(), images.subset(range(6)), images.subset([1, 0, 2, 3, 4, 5]).subset([1, 0, 2, 3, 4, 5])]
    assert {each.identity for each in same} == {images.identity}
    assert pickle.loads(pickle.dumps(images)).identity == images.identity
    others = [
        images.subset(range(5)),
        images.subset([1, 0, 2, 3, 4, 5]),
        image_set(labels=np.zeros(6)),
        image_set(labels=None),
        image_set(digest="e"),
    ]
    assert len({each.identity for each in (images, *others)}) == 6


def test_what_is_not_there_is_said():
    images = image_set(labels=None)
    assert images.labels is None and images.captions is None and not images.has_boxes and not images.has_masks
    for ask in (images.boxes, images.mask):
        with pytest.raises(ValueError, match="made train has no"):
            ask(0)
    for row in (6, -7):
        with pytest.raises(IndexError):
            images.image(row)
    for rows in ([6], [-1]):
        with pytest.raises(IndexError, match="of 6"):
            images.subset(rows)
    for rows in ([True, False] * 3, [1.0], ["1"]):
        with pytest.raises(ValueError, match=r"rows of type .*, expected the numbers of rows"):
            images.subset(rows)
    assert len(images.subset([])) == 0
    with pytest.raises(ValueError, match="5 labels for 6 keys"):
        image_set(labels=np.zeros(5))


@pytest.mark.parametrize(
    "source", [b"", b"no image", Image.new("F", (4, 4)), np.zeros((4, 4)) + 2, np.zeros((1, 900), np.uint8)]
)
def test_whatever_cannot_be_read_is_a_bad_image(source):
    images = ImageSet(name="made", split="test", images=[source], keys=["a"], digest="")
    with pytest.raises(BadImage):
        images.image(0)


@given(LABELS, st.floats(0.01, 0.99), st.integers(0, 99))
def test_held_out(labels, share, seed):
    labels = np.array(labels)
    train, out = held_out(labels, share, seed)
    assert sorted([*train, *out]) == list(range(len(labels)))  # disjoint, complete
    assert (np.diff(train) > 0).all() and (np.diff(out) > 0).all() and len(out) >= 1 and len(train) >= 1
    assert all(map(np.array_equal, held_out(labels, share, seed), (train, out)))
    classes, counts = np.unique(labels, return_counts=True)
    if 2 * np.sum(counts == 1) > len(labels):  # these are one class
        labels = np.where(np.isin(labels, classes[counts == 1]), 99, labels)
        classes, counts = np.unique(labels, return_counts=True)
    several = counts > 1
    taken = np.array([(labels[out] == each).sum() for each in classes])
    assert (taken[~several] == 0).all() and (taken < counts)[several].all()
    # Rounded up or down, but for the one row that is always held out.
    assert (taken >= np.minimum(np.floor(share * counts), counts - 1))[several].all()
    assert (taken <= np.maximum(np.ceil(share * counts), 1)).all()
    wanted = round(share * counts[several].sum())
    assert len(out) == max(1, wanted) or (taken == counts - 1)[several & (np.ceil(share * counts) >= counts)].all()


def test_held_out_by_hand():
    labels = np.repeat([7, 3, 5, 9], [40, 20, 10, 1])
    train, out = held_out(labels, 0.1)
    assert len(train) == 64
    assert sorted(labels[out].tolist()) == [3, 3, 5, 7, 7, 7, 7]
    assert not np.array_equal(out, held_out(labels, 0.1, seed=1)[1])
    drawn = np.concatenate([held_out(np.zeros(10), 0.1, seed)[1] for seed in range(300)])
    counts = np.bincount(drawn, minlength=10)
    assert np.sum((counts - 30) ** 2 / 30) < 27.9  # chi squared, 9 degrees of freedom, p = 0.001


def test_held_out_where_most_classes_have_one_row():
    """One class of two among a thousand: without the others a single row would be held out."""
    labels = np.r_[np.arange(1000), 0]
    train, out = held_out(labels)
    assert len(out) == 100 and len(train) == 901 and len(set(labels[out])) == 100
    labels = np.r_[np.arange(500), np.repeat(np.arange(500, 600), 5)]  # half of the rows: by class as ever
    assert len(held_out(labels)[1]) == 50 and (labels[held_out(labels)[1]] >= 500).all()


def test_held_out_of_a_million_rows():
    train, out = held_out(np.arange(1_000_000) % 22_000)
    assert len(out) == 100_000 and len(train) == 900_000


@pytest.mark.parametrize(("labels", "share"), [([1], 0.1), ([], 0.1), ([1, 1], 0.0), ([1, 1], 1.0), ([[1, 1]], 0.5)])
def test_nothing_to_hold_out(labels, share):
    with pytest.raises(ValueError, match="expected 2 rows or more"):
        held_out(labels, share)


def test_a_dataset_notices_empty_classes_and_refuses_other_labels():
    def dataset(classes, **splits):
        return Dataset(spec="made", name="made", classes=classes, **splits)

    images = image_set()
    data = dataset(("a", "b", "c", "d"), train=images.subset([0, 3, 2]), test=images)
    assert data.report == {"classes_without_training_images": ["b", "d"], "classes_without_test_images": ["d"]}
    assert dataset((), train=None, test=image_set(labels=None)).report == {}
    with pytest.raises(ValueError, match="made: k2 has label 2, expected 0 to 1"):
        dataset(("a", "b"), train=None, test=images)
    with pytest.raises(ValueError, match="made: no training images"):
        dataset(("a", "b", "c"), train=images.subset([]), test=images)
