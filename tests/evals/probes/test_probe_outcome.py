"""Probes tell the truth: what is known in advance comes out, and nothing is found where there is nothing."""

import dataclasses

import numpy as np
import pytest
import torch
from made_images import Pictures, dataset, images
from made_probes import Told

from aimv2.evals.datasets import Dataset, held_out
from aimv2.evals.probes.attentive_probe import AttentiveProbe, PatchStreams
from aimv2.evals.probes.features import CachedFeatures
from aimv2.evals.probes.linear_probe import LinearProbe
from aimv2.evals.probes.outcome import Choice
from aimv2.evals.session import Session

PROTOCOLS = [
    AttentiveProbe(lrs=(1e-3, 1e-2), weight_decays=(0.05,), epochs=20, warmup_epochs=1, batch_size=32),
    LinearProbe(lrs=(0.01, 1.0), steps=100, batch_size=32),
]
SHORT = {"attentive_probe": {"epochs": 3}, "linear_probe": {"steps": 3}}  # where only what is said of it matters
both = pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda protocol: protocol.name)


def run(protocol, encoder, data: Dataset):
    return protocol.run(encoder, data, Session(quiet=True))


def shuffled(data: Dataset) -> Dataset:
    """Images whose labels have nothing to do with them."""

    def of(split, seed: int):
        labels = np.random.default_rng(seed).permutation(split.labels)
        pictures = Pictures([np.asarray(split.image(row)) for row in range(len(split))])
        changed = type(split)(
            name="made", split=split.split, images=pictures, keys=list(split.keys), digest="shuffled", labels=labels
        )
        return changed

    return dataclasses.replace(data, train=of(data.train, 1), test=of(data.test, 2))


def within_4_sigma(metric, chance: float) -> bool:
    return abs(metric.value - chance) <= 4 * np.sqrt(chance * (1 - chance) / metric.n)


@both
def test_an_oracle_is_right_everywhere(protocol):
    outcome = run(protocol, Told("oracle"), dataset(120, 60, classes=6))
    assert outcome.metrics["top1"].value == 1.0
    assert outcome.metrics["mean_per_class"].value == outcome.metrics["top5"].value == 1.0
    assert all(sample["correct"] for sample in outcome.samples) and len(outcome.samples) == 60
    assert set(outcome.details["per_class"]) == {f"class {number}" for number in range(6)}


@both
@pytest.mark.parametrize("select_on", ["held_out", "test"])
def test_noise_is_at_chance(protocol, select_on):
    """Choosing the best of two heads on the test set lifts it by less than 1 sigma; of four streams not much more."""
    protocol = dataclasses.replace(protocol, select_on=select_on)
    outcome = run(protocol, Told("random"), dataset(120, 200, classes=4))
    assert within_4_sigma(outcome.metrics["top1"], 0.25)
    assert all(within_4_sigma(metric, 0.25) for name, metric in outcome.metrics.items() if name.startswith("top1"))


@both
def test_shuffled_labels_are_at_chance(protocol):
    """Of features that would tell the true class."""
    outcome = run(protocol, Told("oracle"), shuffled(dataset(120, 200, classes=4)))
    assert within_4_sigma(outcome.metrics["top1"], 0.25)


@both
def test_constant_features_give_one_class(protocol):
    """12 of 60 images are of each of 5 classes, whichever is always said."""
    outcome = run(protocol, Told("constant"), dataset(60, 60, classes=5))
    assert outcome.metrics["top1"].value == pytest.approx(0.2)
    assert len({sample["prediction"] for sample in outcome.samples}) == 1


@both
@pytest.mark.parametrize("mode", ["cached", "online"])
def test_images_that_can_not_be_read(protocol, mode):
    """In the test set they are wrong; in the training set, or among what is held out, they are left out and told of."""
    _, held = held_out(np.arange(60) % 3)
    bad = (0, 1, 2, 3, 4, 5, *held[:2].tolist())
    data = dataclasses.replace(dataset(60, 24, 3, bad=tuple(range(6))), train=images(60, 3, bad=bad, split="train"))
    if mode == "online":
        protocol = dataclasses.replace(protocol, batch_size=1024, **SHORT[protocol.name])
    outcome = run(dataclasses.replace(protocol, mode=mode), Told("oracle"), data)
    if mode == "cached":  # colours are augmented online, so that the oracle errs there
        wrong = [sample["sample"] for sample in outcome.samples if not sample["correct"]]
        assert wrong == [f"{row:04d}.png" for row in range(6)]
        assert outcome.metrics["top1"].value == pytest.approx(18 / 24)
        assert outcome.details["selection"]["held_out"] == 1.0
    assert [sample["prediction"] for sample in outcome.samples[:6]] == [None] * 6
    assert outcome.details["unreadable_keys"] == [f"{row:04d}.png" for row in sorted(set(bad))]
    assert outcome.details["unreadable"] == len(set(bad))
    assert outcome.details["trained_on"] == len(set(range(60)) - set(held.tolist()) - set(bad))


@both
@pytest.mark.parametrize("mode", ["cached", "online"])
@pytest.mark.parametrize("select_on", ["held_out", "test"])
def test_nothing_to_train_on_can_be_read(protocol, mode, select_on):
    data = dataclasses.replace(dataset(40, 12), train=images(40, bad=tuple(range(40)), split="train"))
    with pytest.raises(ValueError, match="images can be read"):
        run(dataclasses.replace(protocol, mode=mode, select_on=select_on), Told("oracle"), data)


@both
def test_how_it_differs_from_the_published_is_noted(protocol):
    cached = dataclasses.replace(protocol, mode="cached", **SHORT[protocol.name])
    whose = "AIMv2's" if isinstance(protocol, AttentiveProbe) else "DINOv2's"
    kept = f"trained without augmentation, on features that were kept; mode=online is {whose}"
    few = "18 training images are fewer than a batch of 32: a step is an epoch"
    assert run(cached, Told("oracle"), dataset(60, 9)).details["notes"] == [kept]
    assert run(cached, Told("oracle"), dataset(20, 9)).details["notes"] == [kept, few]
    online = dataclasses.replace(cached, mode="online", batch_size=8)
    assert run(online, Told("oracle"), dataset(20, 9)).details["notes"] == []


@both
def test_the_encoder_is_not_described_for_nothing(protocol, tmp_path, monkeypatch):
    """It takes a digest of all weights."""
    protocol = dataclasses.replace(protocol, **SHORT[protocol.name])
    described, describe = [], Told.describe
    monkeypatch.setattr(Told, "describe", lambda self: described.append(self) or describe(self))
    run(protocol, Told("oracle"), dataset(20, 9))
    assert not described
    protocol.run(Told("oracle"), dataset(20, 9), Session(quiet=True, folder=tmp_path))
    assert described


def test_heads_that_diverged_are_noted_and_all_of_them_are_refused():
    """Even the first of several that are always wrong is not chosen, if it diverged."""
    data = dataset(60, 30, classes=3)
    protocol = LinearProbe(lrs=(1e39, 0.1), steps=40, batch_size=32, layers="output")
    assert run(protocol, Told("oracle"), data).details["notes"][-1] == (
        "1 of 2 heads diverged: their last losses are not finite"
    )
    for select_on in ("held_out", "test"):
        for lrs in ((1e38, 1e39), (1e39,)):
            with pytest.raises(ValueError, match=f"all {len(lrs)} heads diverged"):
                run(dataclasses.replace(protocol, lrs=lrs, select_on=select_on), Told("oracle"), data)
    sweeps = {"output": Said([2, 0, 0])}
    losses = {"output": np.array([[1.0, np.inf, 1.0], [np.nan, 1.0, 1.0]])}
    source = CachedFeatures(Told("random"), dataset(20, 9, 2), PatchStreams(), Session(quiet=True))
    choice = Choice(sweeps=sweeps, losses=losses, source=source, data=source.data, held_out=np.arange(0, 20, 2), key="")
    sweeps["output"].classes[1:] = [1, 1]  # nobody is right on what is held out, which is all of class 0
    outcome = choice.outcome({"notes": []}, np.zeros(20, bool))
    assert outcome.details["selection"]["head"] == 1


class Said:
    """Heads that always say their class."""

    def __init__(self, classes: list[int]):
        self.classes, self.settings = classes, [{"head": number} for number in range(len(classes))]

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.tensor(self.classes), 3).float()[:, None, :2].expand(-1, len(x), -1)

    def tensors(self, number: int) -> dict[str, torch.Tensor]:
        return {}


@both
def test_the_best_on_what_is_held_out_is_quoted(protocol):
    """And not the best on the test set; every other is told of."""
    protocol = dataclasses.replace(protocol, layers="all")
    outcome = run(protocol, Told("random"), dataset(80, 60, classes=3))
    sweep, chosen = outcome.details["sweep"], outcome.details["selection"]
    assert len(sweep) == 3 * 2 and [row["stream"] for row in sweep[::2]] == ["block_00", "block_01", "output"]
    assert chosen["held_out"] == max(row["held_out"] for row in sweep)
    assert chosen["on"] == "8 held-out training images" and outcome.details["trained_on"] == 72
    (row,) = (row for row in sweep if row["stream"] == chosen["stream"] and row["lr"] == chosen["lr"])
    assert row["top1"] == outcome.metrics["top1"].value
    assert next(iter(outcome.metrics)) == "top1"
    for stream, found in outcome.details["layers"].items():
        best = max((row for row in sweep if row["stream"] == stream), key=lambda row: row["held_out"])
        assert found["value"] == outcome.metrics[f"top1@{stream}"].value == best["top1"]
        assert found["lr"] == best["lr"] and found["n"] == 60
    assert all(1 < len(row["loss"]) <= 100 and row["loss"][0] > 0 for row in sweep)
    on_test = run(dataclasses.replace(protocol, select_on="test"), Told("random"), dataset(80, 60, classes=3))
    assert on_test.details["selection"]["on"] == "test" and on_test.details["trained_on"] == 80
    assert on_test.metrics["top1"].value == max(row["top1"] for row in on_test.details["sweep"])
    assert "held_out" not in on_test.details["sweep"][0]


@both
def test_fewer_images_than_a_batch(protocol):
    assert run(dataclasses.replace(protocol, batch_size=1024), Told("oracle"), dataset(30, 9, 3)).details["steps"] > 1


@both
def test_what_can_not_be_probed(protocol):
    data = dataset(20, 10)
    without = dataclasses.replace(data, train=None)
    with pytest.raises(ValueError, match="has no training set"):
        run(protocol, Told("oracle"), without)
    broken = dataclasses.replace(data, train=images(20, bad=tuple(range(20)), split="train"))
    with pytest.raises(ValueError, match="none of 20 images can be read"):
        run(protocol, Told("oracle"), broken)
    with pytest.raises(ValueError, match="blocks 0 to 1"):
        run(dataclasses.replace(protocol, layers="7"), Told("oracle"), data)
    wrong = {
        "mode": ["both"],
        "select_on": ["train"],
        "lrs": [(), (0.0,), (0.1, np.nan), (np.inf,)],
        "batch_size": [0],
        "most_cached": [-1],
        "held_out": [0.0, 1.0, 2.0, np.nan],
        "seed": [-1],
    }
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(ValueError, match=f"^{name} .*: expected"):
                dataclasses.replace(protocol, **{name: value})
    with pytest.raises(ValueError, match="layers ''"):
        run(dataclasses.replace(protocol, layers=""), Told("oracle"), data)
