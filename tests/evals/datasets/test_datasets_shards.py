import json
import pickle
import re

import numpy as np
import pytest
from made_tars import picture, write_samples, write_tar

from aimv2.data.images import BadImage
from aimv2.data.shapes import COLOURS, SHAPES, ShapesRecipe, parse_caption, scene, world, write_shards
from aimv2.data.shard_index import select_rows
from aimv2.data.shard_scan import build_index
from aimv2.data.shards import ShardError
from aimv2.evals.datasets import open_dataset


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    write_shards(ShapesRecipe(difficulty="full", folder=str(folder), train=45, validation=25, samples_per_shard=20))
    return folder


def attributes(split, index):
    """The world itself, which needs no files."""
    return scene(0, split, index, "full").objects


@pytest.mark.parametrize("label", ["shape", "shape_colour", "count"])
def test_shapes_are_labelled_as_their_world_says(folder, label):
    data = open_dataset(f"shapes:{folder}@{label}")
    assert (len(data.train), len(data.test), data.test.split) == (45, 25, "validation")
    for images in (data.train, data.test):
        for i, number in enumerate(images.labels.tolist()):
            objects = attributes(images.split, i)
            first = objects[0]
            right = {
                "shape": first.shape,
                "shape_colour": f"{first.colour} {first.shape}",
                "count": str(len(objects)),
            }
            assert data.classes[number] == right[label]
            assert images.keys[i] == f"{images.split}-{i // 20:06d}.tar/{i:09d}"
    assert len(data.classes) == {"shape": 6, "shape_colour": 36, "count": 3}[label]


@pytest.mark.parametrize("label", ["shape", "shape_colour"])
@pytest.mark.parametrize(("taken", "sizes"), [("single", {"big", "small"}), ("small", {"small"})])
def test_images_of_one_object_are_taken(folder, label, taken, sizes):
    everything, some = open_dataset(f"shapes:{folder}@{label}"), open_dataset(f"shapes:{folder}@{taken}_{label}")
    for split in ("train", "test"):
        of_all, of_some = getattr(everything, split), getattr(some, split)
        scenes = [attributes(of_all.split, row) for row in range(len(of_all))]
        rows = [row for row, objects in enumerate(scenes) if len(objects) == 1 and objects[0].size in sizes]
        assert 0 < len(rows) < len(of_all)
        assert list(of_some.keys) == [of_all.keys[row] for row in rows]
        assert of_some.labels.tolist() == of_all.labels[rows].tolist()
    assert (some.classes, some.name) == (everything.classes, f"shapes {taken}_{label}")


def test_boxes_are_those_of_the_world(folder):
    for label in ("shape", "shape_colour"):
        data = open_dataset(f"shapes:{folder}@{label}")
        for i in range(25):
            objects = attributes("validation", i)
            found = data.test.boxes(i)
            words = [o.shape if label == "shape" else f"{o.colour} {o.shape}" for o in objects]
            assert [data.classes[number] for number, _ in found] == words
            boxes = np.array([box for _, box in found]) * 72  # pixels, of a 3 x 3 grid of cells of 24
            np.testing.assert_allclose(boxes, [o.box for o in objects], atol=1e-9)  # float64 there and back
    assert not open_dataset(f"shapes:{folder}@count").test.has_boxes


def test_boxes_are_shares_of_sides_that_differ(tmp_path):
    """Oracle: the scene itself, which knows its canvas."""
    write_shards(ShapesRecipe(difficulty="mixed", folder=str(tmp_path), train=3, validation=12))
    data = open_dataset(f"shapes:{tmp_path}@shape")
    for i in range(12):
        drawn = scene(0, "validation", i, "mixed")
        assert data.test.image(i).size == drawn.canvas
        boxes = np.array([box for _, box in data.test.boxes(i)]) * (2 * drawn.canvas)
        np.testing.assert_allclose(boxes, [o.box for o in drawn.objects], atol=1e-9)  # float64 there and back
    places = len(world("mixed").places)
    assert len(data.templates) == 3 * 6 * 2 * places == len(set(data.templates))


def test_templates_are_the_captions_of_one_object(folder):
    """All that the grammar has: the parser of captions takes each, and they are as many as it can tell apart."""
    board = world("full")
    for label, words in (("shape", SHAPES), ("shape_colour", [f"{c} {s}" for s in SHAPES for c in COLOURS])):
        data = open_dataset(f"shapes:{folder}@{label}")
        parsed = [parse_caption(template.format(word)) for word in words for template in data.templates]
        assert all(found is not None and len(found) == 1 for found in parsed)
        assert len(set(data.templates)) * len(words) == 3 * len(set(parsed)) == 3 * 6 * 6 * 2 * len(board.places)
        assert tuple(words) == data.classes
    assert open_dataset(f"shapes:{folder}@count").templates is None


def test_images_captions_and_rows_of_several_shards(folder):
    data = open_dataset(f"shapes:{folder}")
    assert data.name == "shapes shape" and data.report["classes_without_test_images"] == []
    rows = [44, 0, 20, 19]
    part = pickle.loads(pickle.dumps(data.train.subset(rows)))
    for i, row in enumerate(rows):
        objects = {o.attributes for o in attributes("train", row)}
        assert all(parse_caption(caption) == objects for caption in part.captions[i])
        assert len(part.captions[i]) == 3
        assert np.array_equal(np.asarray(part.image(i)), np.asarray(data.train.image(row)))
        assert part.image(i).size == (72, 72)
    assert not (set(data.train.keys) & set(data.test.keys))
    same = open_dataset(f"shards:{folder}/train-*.tar,{folder}/validation-*.tar@json.labels.shape")
    assert same.train.labels.tolist() == data.train.labels.tolist() and same.classes == tuple("012345")
    assert same.train.identity == data.train.identity
    assert open_dataset(f"shapes:{folder}@count").train.identity != data.train.identity


def test_shapes_that_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="label 'size', expected one of shape, shape_colour, count"):
        open_dataset(f"shapes:{folder}@size")
    with pytest.raises(ShardError, match=r"train-\*.tar: no .tar file matches"):
        open_dataset(f"shapes:{tmp_path}")
    for split in ("train", "validation"):
        write_samples(tmp_path / f"{split}-0.tar", [sample("a")])
    with pytest.raises(ValueError, match=r"validation-0.tar: sample 000000: difficulty is None, expected one of"):
        open_dataset(f"shapes:{tmp_path}")


def sample(label, seed=0, **members):
    record = {"answer": {"class": label}, "captions": [f"a {label}", "a thing"]}
    return {"jpg": picture(seed), "json": json.dumps(record).encode(), **members}


def test_labels_are_where_the_json_says(tmp_path):
    samples = [sample("cat"), sample("ant"), sample("cat"), {"jpg": picture(3)} | sample("bee")]
    write_samples(tmp_path / "a" / "train-0.tar", samples[:2])
    write_samples(tmp_path / "b" / "train-0.tar", samples[2:])
    damaged = sample("ant") | {"jpg": b"\xff\xd8 cut"}
    none = {name: data for name, data in sample("bee").items() if name == "json"}
    write_samples(tmp_path / "test.tar", [sample("bee"), damaged, none])
    data = open_dataset(f"shards:{tmp_path}/*/train-*.tar,{tmp_path}/test.tar@json.answer.class")
    assert data.classes == ("ant", "bee", "cat") and data.name == "shards"
    assert data.train.labels.tolist() == [2, 0, 2, 1] and data.test.labels.tolist() == [1, 0, 1]
    assert list(data.train.keys) == [f"{folder}/train-0.tar/00000{i}" for folder in "ab" for i in range(2)]
    assert data.test.captions[1] == ["a ant", "a thing"]
    for row, reason in ((1, "not a JPEG|undecodable"), (2, "no image")):
        with pytest.raises(BadImage, match=reason):
            data.test.image(row)


def test_integers_are_classes_in_their_order(tmp_path):
    write_samples(tmp_path / "0.tar", [sample(n) for n in (10, 9, 10, 2)])
    data = open_dataset(f"shards:{tmp_path}/0.tar@json.answer.class")
    assert data.classes == ("2", "9", "10") and data.test.labels.tolist() == [2, 1, 2, 0] and data.train is None


def test_labels_of_cls_members(tmp_path):
    """They are in no index, and the index may keep some rows only."""
    jpg = picture(0)
    files = [("a/x.jpg", jpg), ("a/x.cls", b"7\n"), ("y.cls", b"12"), ("y.jpg", jpg), ("z.jpg", jpg), ("z.cls", b"7")]
    write_tar(tmp_path / "train.tar", files)
    write_tar(tmp_path / "test.tar", [("o.jpg", jpg), ("p.jpg", jpg), ("p.CLS", b"12")])
    build_index(tmp_path / "test.tar")
    select_rows(tmp_path / "test.tar", [1])
    data = open_dataset(f"shards:{tmp_path}/train.tar,{tmp_path}/test.tar@cls")
    assert data.classes == ("7", "12") and data.train.labels.tolist() == [0, 1, 0] and data.test.labels.tolist() == [1]
    assert list(data.train.keys) == ["train.tar/a/x", "train.tar/y", "train.tar/z"]
    select_rows(tmp_path / "test.tar", None)
    with pytest.raises(ValueError, match=r"test.tar: sample o: no cls member that holds a label"):
        open_dataset(f"shards:{tmp_path}/train.tar,{tmp_path}/test.tar@cls")


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (("10", "9", "-1", "0"), ("-1", "0", "9", "10")),
        (("007", "7"), ("007", "7")),
        (("7", "²"), ("7", "²")),
        (("10", "9", "cat"), ("10", "9", "cat")),
    ],
)
def test_cls_are_integers_if_all_are_written_as_such(tmp_path, labels, classes):
    """Of both splits: what is tested may be numbers only."""
    files = [
        (f"{i}.{part}", picture(i) if part == "jpg" else label.encode())
        for i, label in enumerate(labels)
        for part in ("jpg", "cls")
    ]
    write_tar(tmp_path / "train.tar", files)
    write_tar(tmp_path / "test.tar", files[:4])
    data = open_dataset(f"shards:{tmp_path}/train.tar,{tmp_path}/test.tar@cls")
    assert data.classes == classes
    for images in (data.train, data.test):
        assert [data.classes[number] for number in images.labels] == list(labels[: len(images)])


def test_what_is_left_out_is_counted(tmp_path):
    jpg = picture(0)
    write_tar(tmp_path / "0.tar", [("x.image", jpg), ("x.cls", b"1"), ("y.jpg", jpg), ("y.cls", b"7"), ("y.npy", b"")])
    assert open_dataset(f"shards:{tmp_path}/0.tar@cls").report["left_out"] == {
        "test": {"members by their extension: .image": 1, "members by their extension: .npy": 1}
    }
    write_samples(tmp_path / "1.tar", [sample("a"), sample("b"), sample("a")])
    build_index(tmp_path / "1.tar")
    select_rows(tmp_path / "1.tar", [1])
    spec = f"shards:{tmp_path}/1.tar,{tmp_path}/1.tar@json.answer.class"
    assert open_dataset(spec).report["left_out"] == {split: {"rows not selected": 2} for split in ("train", "test")}


def test_captions_without_labels_are_for_retrieval(tmp_path):
    texts = [{"txt": b"one\n"}, {"json": b'{"caption": "two"}', "txt": b"other"}, {"json": b"{}", "txt": b"three"}]
    write_samples(tmp_path / "0.tar", [{"jpg": picture(0)} | members for members in texts])
    data = open_dataset(f"shards:{tmp_path}/0.tar")
    assert list(data.test.captions) == [["one"], ["two"], ["three"]]
    assert data.test.labels is None and data.classes == () and data.train is None


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (sample(None), "json.answer.class is None, expected a text or an integer"),
        (sample(True), "json.answer.class is True, expected"),
        (sample([1]), r"json.answer.class is \[1\], expected"),
        ({"json": b"[]"}, "no json member that holds an object"),
        ({"json": b"{"}, "no json member that holds an object"),
        ({"txt": b"cat"}, "no json member that holds an object"),
    ],
)
def test_a_sample_without_a_label_is_named(tmp_path, members, message):
    write_samples(tmp_path / "0.tar", [sample("cat"), {"jpg": picture(0)} | members])
    with pytest.raises(ValueError, match="0.tar: sample 000001: " + message):
        open_dataset(f"shards:{tmp_path}/0.tar@json.answer.class")


def test_shards_that_are_refused(tmp_path):
    write_samples(tmp_path / "0.tar", [sample("cat")])
    write_samples(tmp_path / "1.tar", [sample("dog"), {"jpg": picture(1)}])
    write_samples(tmp_path / "2.tar", [sample(1)])
    with pytest.raises(ValueError, match="class 'dog' is to be tested, but the training split has no such class"):
        write_samples(tmp_path / "3.tar", [sample("dog")])
        open_dataset(f"shards:{tmp_path}/0.tar,{tmp_path}/3.tar@json.answer.class")
    with pytest.raises(ValueError, match="labels are int and str, expected one of them"):
        open_dataset(f"shards:{tmp_path}/0.tar,{tmp_path}/2.tar@json.answer.class")
    with pytest.raises(ValueError, match="3 patterns, expected TRAIN,TEST or TEST"):
        open_dataset("shards:a,b,c")
    with pytest.raises(
        ShardError, match="no such file; the comma comes between TRAIN and TEST, and can't be part of a path"
    ):
        open_dataset(f"shards:{tmp_path}/a,b/0.tar")
    with pytest.raises(ShardError, match=re.escape(f"{tmp_path}/9.tar: no such file")):
        open_dataset(f"shards:{tmp_path}/9.tar")
    with pytest.raises(ValueError, match="sample 000001: no captions: expected a txt, or in the json one of captions"):
        list(open_dataset(f"shards:{tmp_path}/1.tar").test.captions)
