"""Features of a split: the right rows, once each, whatever stops it and however many ranks share it."""

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from made_images import MeanColour, colours, images, pixels
from PIL import Image
from processes import finish, start
from torch import Tensor, distributed

from aimv2.evals import extraction
from aimv2.evals.datasets import ImageSet
from aimv2.evals.encoders import Encoder, open_encoder
from aimv2.evals.extraction import extract, keyed_randomness, online
from aimv2.evals.feature_store import FileStore
from aimv2.evals.session import Session, launched_session

CLOSE = {"rtol": 0, "atol": 1e-6}  # means of 64 numbers in [-1, 1], in another order


@dataclass
class Counting:
    """A view that counts its images and can be stopped."""

    key: str = "counting"
    seen: int = 0
    stop_after: int = 10**9

    def __call__(self, encoder: Encoder, images: Tensor) -> dict[str, Tensor]:
        if images.abs().sum():  # not the blank one that tells the shapes
            self.seen += len(images)
            if self.seen > self.stop_after:
                raise KeyboardInterrupt
        return MeanColour()(encoder, images)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(extraction, "CHUNK", 4)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kept", [False, True])
def test_every_row_has_its_own_features(tmp_path, kept, workers):
    split = images(23)
    session = Session(folder=tmp_path if kept else None, batch_size=3, workers=workers, quiet=True)
    found = extract(pixels(), split, MeanColour(), session)
    torch.testing.assert_close(torch.tensor(found.arrays["colour"]), colours(split, list(range(23))), **CLOSE)
    assert found.readable.all()
    assert len(np.unique(found.digests)) == 23


def test_what_can_not_be_read_is_marked_and_nothing_else_is_lost(tmp_path):
    split, session = images(9, bad=(2, 8)), Session(folder=tmp_path, quiet=True)
    found = extract(pixels(), split, MeanColour(), session)
    assert np.flatnonzero(~found.readable).tolist() == [2, 8]
    assert not found.arrays["colour"][[2, 8]].any()
    torch.testing.assert_close(torch.tensor(found.arrays["colour"][[1, 7]]), colours(split, [1, 7]), **CLOSE)
    readable, digests = session.seen[split.identity]
    assert readable.sum() == 7
    assert digests.shape == (9,)


def test_a_stopped_extraction_goes_on(tmp_path):
    split, session = images(23), Session(folder=tmp_path, batch_size=2, quiet=True)
    with pytest.raises(KeyboardInterrupt):
        extract(pixels(), split, Counting(stop_after=10), session)
    again = Counting()
    found = extract(pixels(), split, again, session)
    assert again.seen == 23 - 8  # two chunks of four were whole
    torch.testing.assert_close(torch.tensor(found.arrays["colour"]), colours(split, list(range(23))), **CLOSE)
    idle = Counting()
    extract(pixels(), split, idle, session)
    assert idle.seen == 0


def test_another_split_encoder_or_view_has_files_of_its_own(tmp_path):
    session = Session(folder=tmp_path, quiet=True)
    extract(pixels(), images(5), MeanColour(), session)
    extract(pixels(), images(5, seed=9), MeanColour(), session)
    extract(pixels(), images(5), MeanColour("other"), session)
    extract(open_encoder("pixels:16"), images(5), MeanColour(), session)
    assert len(list((tmp_path / "features").iterdir())) == 4


def test_arrays_that_were_deleted_are_made_again(tmp_path):
    split, session = images(10), Session(folder=tmp_path, quiet=True)
    extract(pixels(), split, MeanColour(), session)
    (array,) = tmp_path.glob("features/*/colour.*.npy")
    array.unlink()
    again = Counting(key=MeanColour().key)
    found = extract(pixels(), split, again, session)
    assert again.seen == 10
    torch.testing.assert_close(torch.tensor(found.arrays["colour"]), colours(split, list(range(10))), **CLOSE)


def test_two_processes_that_begin_at_once_share_one_array(tmp_path, monkeypatch):
    """The second looks before the first has created anything, and creates after it."""
    split, session = images(10), Session(folder=tmp_path, quiet=True)
    description, shapes = {"of": "both"}, {"colour": (3,)}
    first = FileStore(tmp_path / "features", description, shapes, 10, session)
    looks = iter([None])
    created = FileStore._created
    monkeypatch.setattr(FileStore, "_created", lambda self: next(looks, created(self)))
    second = FileStore(tmp_path / "features", description, shapes, 10, session)
    assert second.creation == first.creation
    rows = {"colour": colours(split, list(range(10))).numpy()}
    first.put(range(0, 6), {"colour": rows["colour"][:6]}, [True] * 6, [1] * 6)
    second.put(range(6, 10), {"colour": rows["colour"][6:]}, [True] * 4, [2] * 4)
    found = second.finish([range(0, 6), range(6, 10)])
    assert np.array_equal(found.arrays["colour"], rows["colour"])
    assert len(list((tmp_path / "features").glob("*.npy"))) == 1


def test_a_split_without_any_readable_image_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"made test: none of 3 images can be read, as 0000\.png"):
        extract(pixels(), images(3, bad=(0, 1, 2)), MeanColour(), Session(folder=tmp_path, quiet=True))


def test_other_labels_for_the_same_pictures_have_the_same_features(tmp_path):
    session, two, five = Session(folder=tmp_path, quiet=True), images(10), images(10)
    five = ImageSet(name="made", split="test", digest=two._digest, labels=np.arange(10) % 5, **five._whole)
    extract(pixels(), two, MeanColour(), session)
    idle = Counting(key=MeanColour().key)
    extract(pixels(), five, idle, session)
    assert two.identity != five.identity
    assert idle.seen == 0


def test_features_that_are_not_finite_are_refused_by_name():
    def view(encoder, images):
        return {"x": torch.full((len(images), 1), torch.nan)}

    view.key = "nan"
    with pytest.raises(ValueError, match=r"features of 0000\.png are not finite"):
        extract(pixels(), images(3), view, Session(quiet=True))


def red_noise(image: Image.Image) -> Tensor:
    """A transform that draws from all three generators."""
    drawn = [random.random(), np.random.rand(), torch.rand(()).item()]
    return torch.tensor(drawn)[:, None, None].expand(3, 8, 8) + image.size[0] * 0


def draw(epoch: int, session: Session, batches: list[np.ndarray]) -> dict[int, Tensor]:
    found = {}
    keyed = [(epoch, batch) for batch in batches]
    for rows, features in online(pixels(), images(10), MeanColour(), session, keyed, red_noise, 5):
        found |= dict(zip(rows.tolist(), features["colour"], strict=True))
    return found


def test_augmentation_depends_on_seed_epoch_and_row_alone():
    order, other = [np.arange(5), np.arange(5, 10)], [np.array([9, 3, 1]), np.array([0, 2, 4, 5, 6, 7, 8])]
    torch.manual_seed(3)
    before = torch.get_rng_state(), random.getstate()
    first = draw(0, Session(quiet=True), order)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    for same in (draw(0, Session(quiet=True, batch_size=2), other), draw(0, Session(quiet=True, workers=1), order)):
        assert all(torch.equal(first[row], same[row]) for row in range(10))
    assert not any(torch.equal(first[row], drawn) for row, drawn in draw(1, Session(quiet=True), order).items())
    assert len({tuple(colour.tolist()) for colour in first.values()}) == 10


def test_online_batches_leave_out_what_can_not_be_read():
    split = images(4, bad=(1, 2, 3))
    batches = [(0, np.array([0, 1])), (0, np.array([2, 3]))]
    found = list(online(pixels(), split, MeanColour(), Session(quiet=True), batches, red_noise, 0))
    assert [rows.tolist() for rows, _ in found] == [[0], []]
    assert [features["colour"].shape for _, features in found] == [(1, 3), (0, 3)]


@pytest.mark.parametrize("workers", [0, 2])
def test_online_loads_a_pass_at_a_time_and_starts_once(monkeypatch, workers):
    """For all epochs; a batch of 7 comes as 3, 3 and 1 images, an empty one as none."""
    loaders, parts, make = [], [], extraction._loader

    def spied(images, batches, collate, session):
        def noted():
            for part in batches:
                parts.append(len(part))
                yield part

        loaders.append(make(images, noted(), collate, session))
        return loaders[-1]

    monkeypatch.setattr(extraction, "_loader", spied)
    batches = [(0, np.arange(7)), (0, np.arange(0)), (1, np.array([2, 9])), (5, np.arange(3, 10))]
    session = Session(quiet=True, batch_size=3, workers=workers)
    found = list(online(pixels(), images(10, bad=(9,)), MeanColour(), session, iter(batches), red_noise, 5))
    assert [rows.tolist() for rows, _ in found] == [[*range(7)], [], [2], [*range(3, 9)]]
    assert len(loaders) == 1 and parts == [3, 3, 1, 0, 2, 3, 3, 1]
    for (epoch, _), (rows, features) in zip(batches, found, strict=True):
        alone = draw(epoch, Session(quiet=True), [rows])
        assert all(torch.equal(alone[row], colour) for row, colour in zip(rows, features["colour"], strict=True))


def test_randomness_is_put_back_after_an_error():
    before = random.getstate()
    with pytest.raises(RuntimeError), keyed_randomness(1, 2):
        random.random()
        raise RuntimeError
    assert random.getstate() == before


def extract_on_ranks(folder: Path | None, out: Path) -> None:
    extraction.CHUNK = 4
    with launched_session("cpu", folder=folder, batch_size=3, quiet=True) as session:
        split = images(23, bad=(6,))
        found = extract(pixels(), split, MeanColour(), session)
        rows = [rows for rows, _ in online(pixels(), split, MeanColour(), session, [(0, np.arange(5))], red_noise, 0)]
        total = session.sum(torch.tensor([len(rows[0])]))
        torch.save([torch.tensor(found.arrays["colour"]), torch.tensor(found.readable), total], out / f"{session.rank}")
        assert distributed.is_initialized()


@pytest.mark.parametrize("kept", [False, True])
def test_two_ranks_find_what_one_does(tmp_path, kept):
    codes = finish(start(extract_on_ranks, tmp_path if kept else None, tmp_path, ranks=2, log=tmp_path / "log"))
    assert codes == [0, 0], (tmp_path / "log").read_text()
    alone = extract(pixels(), images(23, bad=(6,)), MeanColour(), Session(quiet=True))
    for rank in "01":
        colour, readable, total = torch.load(tmp_path / rank)
        torch.testing.assert_close(colour, torch.tensor(alone.arrays["colour"]), **CLOSE)
        assert readable.tolist() == alone.readable.tolist()
        assert total.item() == 5
