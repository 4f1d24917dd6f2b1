"""Probes tell the truth: what is known in advance comes out, and nothing is found where there is nothing."""

import dataclasses

import numpy as np
import pytest
from made_images import Pictures, dataset, images
from made_probes import Told

from aimv2.evals.attentive_probe import AttentiveProbe
from aimv2.evals.datasets import Dataset
from aimv2.evals.linear_probe import LinearProbe
from aimv2.evals.session import Session

PROTOCOLS = [
    AttentiveProbe(lrs=(1e-3, 1e-2), weight_decays=(0.05,), epochs=20, warmup_epochs=1, batch_size=32),
    LinearProbe(lrs=(0.01, 1.0), steps=100, batch_size=32),
]
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
def test_images_that_can_not_be_read(protocol):
    """In the test set they are wrong; in the training set, or among what is held out, they are left out."""
    data = dataset(60, 24, classes=3, bad=(0, 1, 2, 3, 4, 5))
    for mode in ("cached", "online") if isinstance(protocol, AttentiveProbe) else ("cached",):
        outcome = run(dataclasses.replace(protocol, mode=mode), Told("oracle"), data)
        wrong = [sample["sample"] for sample in outcome.samples if not sample["correct"]]
        if mode == "cached":  # colours are augmented online, so that the oracle errs there
            assert wrong == [f"{row:04d}.png" for row in range(6)]
            assert outcome.metrics["top1"].value == pytest.approx(18 / 24)
            assert outcome.details["selection"]["held_out"] == 1.0
        assert [sample["prediction"] for sample in outcome.samples[:6]] == [None] * 6
        # What is held out is only looked at: online, an image of it is not among those that training could not read.
        lost = set(outcome.details["unreadable_keys"])
        assert lost <= {f"{row:04d}.png" for row in range(6)} and outcome.details["unreadable"] == len(lost) >= 4


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
    with pytest.raises(ValueError, match="training images can be read"):
        run(protocol, Told("oracle"), broken)
    with pytest.raises(ValueError, match="blocks 0 to 1"):
        run(dataclasses.replace(protocol, layers="7"), Told("oracle"), data)
    for wrong in ({"mode": "both"}, {"select_on": "train"}, {"lrs": ()}, {"lrs": (0.0,)}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="expected"):
            dataclasses.replace(protocol, **wrong)
