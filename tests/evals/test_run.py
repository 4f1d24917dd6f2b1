"""A result is whole, says what it is of, and is not computed twice."""

import dataclasses
import json
from dataclasses import dataclass
from importlib import metadata
from typing import ClassVar

import numpy as np
import pytest
import torch
from made_images import MeanColour, dataset, images, pixels
from processes import finish, start
from safetensors.torch import load_file

from aimv2.evals.extraction import extract
from aimv2.evals.results import Outcome, classification_metrics, classification_samples
from aimv2.evals.run import evaluate, shortened
from aimv2.evals.session import Session, launched_session


@dataclass(kw_only=True)
class Redness:
    """Classes by the mean of red, which says them."""

    name: ClassVar[str] = "redness"
    calls: ClassVar[list[int]] = []
    wrong: bool = False

    def run(self, encoder, data, session):
        Redness.calls.append(session.rank)
        extract(encoder, data.train, MeanColour(), session)
        found = extract(encoder, data.test, MeanColour(), session)
        red = (found.arrays["colour"][:, 0] + 1) * 127.5 / 10
        scores = -np.abs(red[:, None] - np.arange(len(data.classes)))
        scores[~found.readable] = np.nan
        if self.wrong:
            raise RuntimeError("on the way")
        return Outcome(
            metrics=classification_metrics(scores, data.test.labels),
            samples=classification_samples(scores, data.test.labels, data.test.keys),
            details={"notes": ["by hand"]},
            tensors={"weight": torch.eye(2).T},
        )


@pytest.fixture(autouse=True)
def no_calls():
    Redness.calls.clear()


def test_a_result_says_everything(tmp_path):
    data = dataset(bad=(3,))
    path = evaluate(Redness(), pixels(), data, tmp_path, Session(quiet=True))
    result = json.loads(path.read_text())
    assert path.name.startswith("redness-made-pixels_8-")
    assert path.stem.endswith(result["hash"][:8])
    assert result["protocol"] == {"name": "redness", "wrong": False}
    assert result["encoder"]["spec"] == "pixels:8"
    assert result["data"]["train"] == {
        "n": 20,
        "identity": data.train.identity,
        "unreadable": 1,
        "unreadable_keys": ["0003.png"],
        "duplicates": 0,
    }
    assert (result["data"]["classes"], result["data"]["across_duplicates"]) == (2, 0)
    top1 = result["metrics"]["top1"]
    assert (top1["value"], top1["n"], top1["chance"]) == (10 / 11, 11, 0.5)
    assert result["environment"]["torch"] == metadata.version("torch")
    samples = [json.loads(line) for line in path.with_suffix(".samples.jsonl").read_text().splitlines()]
    assert len(samples) == 11
    assert samples[3] == {"sample": "0003.png", "label": 1, "prediction": None, "correct": False}
    assert torch.equal(load_file(path.with_suffix(".safetensors"))["weight"], torch.eye(2))


def test_the_same_is_not_done_again_and_another_setting_is(tmp_path):
    first = evaluate(Redness(), pixels(), dataset(), tmp_path, Session(quiet=True))
    assert evaluate(Redness(), pixels(), dataset(), tmp_path, Session(quiet=True)) == first
    assert len(Redness.calls) == 1
    other = evaluate(Redness(), pixels(), dataset(train=18), tmp_path, Session(quiet=True))
    assert other != first
    assert len(Redness.calls) == 2


def test_nothing_is_written_of_a_failure(tmp_path):
    with pytest.raises(RuntimeError):
        evaluate(Redness(wrong=True), pixels(), dataset(), tmp_path, Session(quiet=True))
    assert not list(tmp_path.iterdir())


def test_duplicates_within_and_across_splits_are_counted(tmp_path):
    data = dataset()
    pictures = images(20, seed=1)  # those of train
    twice = pictures._whole["images"]
    twice[4], pictures.identity = list.__getitem__(twice, 2), "with one of them twice"
    data = dataclasses.replace(data, test=pictures)
    result = json.loads(evaluate(Redness(), pixels(), data, tmp_path, Session(quiet=True)).read_text())
    assert result["data"]["test"]["duplicates"] == 1
    assert result["data"]["train"]["duplicates"] == 0
    assert result["data"]["across_duplicates"] == 20


def test_a_shortened_dataset_is_drawn_from_all_of_it():
    short = shortened(dataset(train=1000, test=11, classes=10), 100, None)
    again = shortened(dataset(train=1000, test=11, classes=10), 100, 50)
    assert (len(short.train), len(short.test)) == (100, 11)
    assert short.train.identity == again.train.identity
    assert len(set(short.train.labels)) == 10
    assert list(short.train.keys) == sorted(short.train.keys)


def on_ranks(out) -> None:
    with launched_session("cpu", quiet=True) as session:
        for _ in range(2):
            evaluate(Redness(), pixels(), dataset(test=7), out, session)
        assert len(Redness.calls) == 1


def test_ranks_write_one_result(tmp_path):
    codes = finish(start(on_ranks, tmp_path / "out", ranks=2, log=tmp_path / "log"))
    assert codes == [0, 0], (tmp_path / "log").read_text()
    (path,) = (tmp_path / "out").glob("*.json")
    result = json.loads(path.read_text())
    assert (result["metrics"]["top1"]["value"], result["environment"]["ranks"]) == (1.0, 2)


@dataclass(kw_only=True)
class FromFile(Redness):
    """A protocol with a file among its settings."""

    words: str = "none"


def test_what_is_in_a_file_decides_and_not_its_name(tmp_path):
    words = tmp_path / "words.txt"
    found = set()
    for text in ("one", "two", "one"):
        words.write_text(text)
        found.add(evaluate(FromFile(words=str(words)), pixels(), dataset(), tmp_path / "out", Session(quiet=True)))
    assert len(found) == len(Redness.calls) == 2


def test_the_names_of_classes_decide(tmp_path):
    one = dataset()
    other = dataclasses.replace(one, classes=("background", "class 1"))
    paths = {evaluate(Redness(), pixels(), data, tmp_path, Session(quiet=True)) for data in (one, other)}
    assert len(paths) == 2


@dataclass(kw_only=True)
class Untrained(Redness):
    trains: ClassVar[bool] = False


def test_a_training_set_that_is_not_looked_at_does_not_decide(tmp_path):
    data, session = dataset(), Session(quiet=True)
    without = dataclasses.replace(data, train=data.train.subset(range(5)))
    path = evaluate(Untrained(), pixels(), data, tmp_path, session)
    assert evaluate(Untrained(), pixels(), without, tmp_path, session) == path
    assert len(Redness.calls) == 1
    assert "train" not in json.loads(path.read_text())["data"]


def test_what_another_evaluation_saw_is_not_told_again(tmp_path):
    """The second protocol looks at none of the training images."""
    session = Session(quiet=True)
    evaluate(Redness(), pixels(), dataset(), tmp_path, session)

    @dataclass(kw_only=True)
    class Blind(Redness):
        name: ClassVar[str] = "blind"

        def run(self, encoder, data, session):
            return Redness().run(encoder, dataclasses.replace(data, train=data.test), session)

    result = json.loads(evaluate(Blind(), pixels(), dataset(), tmp_path, session).read_text())
    assert "duplicates" not in result["data"]["train"]


@pytest.mark.parametrize("count", [0, -5])
def test_fewer_images_than_one_are_refused(count):
    with pytest.raises(ValueError, match=f"{count} images: expected 1 or more"):
        shortened(dataset(), None, count)


@pytest.mark.parametrize("device", ["foo", "cuda:7", "meta:x"])
def test_a_device_that_is_not_there_is_refused(device):
    with pytest.raises(ValueError, match=device), launched_session(device):
        pass
