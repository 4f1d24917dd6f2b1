"""The loop that trains probes: the same result however it is stopped or split over ranks."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from made_images import dataset
from made_probes import Told
from processes import finish, start

from aimv2.evals.probes import training
from aimv2.evals.probes.attentive_probe import AttentiveProbe
from aimv2.evals.probes.attentive_sweep import AttentiveSweep
from aimv2.evals.probes.linear_probe import LinearProbe, LinearSweep
from aimv2.evals.probes.training import batches_per_epoch, split_rows
from aimv2.evals.session import Session, launched_session

ATTENTIVE = AttentiveProbe(lrs=(1e-3, 1e-2), epochs=5, warmup_epochs=1, batch_size=16, layers="all")
LINEAR = LinearProbe(lrs=(0.01, 0.1, 1.0), steps=13, batch_size=16, layers="grid,all")
SWEEPS = {"attentive_probe": AttentiveSweep, "linear_probe": LinearSweep}


def same(outcome, other) -> bool:
    tensors = zip(outcome.tensors.values(), other.tensors.values(), strict=True)
    return (outcome.metrics, outcome.details, outcome.samples) == (other.metrics, other.details, other.samples) and all(
        torch.equal(*pair) for pair in tensors
    )


@pytest.mark.parametrize("mode", ["cached", "online"])
@pytest.mark.parametrize("protocol", [ATTENTIVE, LINEAR], ids=lambda protocol: protocol.name)
def test_stopped_and_gone_on_from(tmp_path, monkeypatch, protocol, mode):
    """To the bit, at whatever step it was stopped."""
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    protocol, encoder, data = replace(protocol, mode=mode), Told("oracle"), dataset(40, 9, classes=3)
    whole = protocol.run(encoder, data, Session(quiet=True))
    assert same(whole, protocol.run(encoder, data, Session(quiet=True)))
    sweep, steps = SWEEPS[protocol.name], []

    def stopping(self, x, labels, step, *others):
        steps.append(step)
        if step == 7:
            raise KeyboardInterrupt
        return plain(self, x, labels, step, *others)

    plain = sweep.step
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "step", stopping)
        with pytest.raises(KeyboardInterrupt):
            protocol.run(encoder, data, Session(folder=tmp_path, quiet=True))
    steps.clear()

    def counting(self, x, labels, step, *others):
        steps.append(step)
        return plain(self, x, labels, step, *others)

    monkeypatch.setattr(sweep, "step", counting)
    assert same(whole, protocol.run(encoder, data, Session(folder=tmp_path, quiet=True)))
    assert min(steps) == 6  # two steps an epoch, three epochs were done
    steps.clear()
    assert same(whole, protocol.run(encoder, data, Session(folder=tmp_path, quiet=True)))  # only the looking is left
    assert not steps
    for other, features in ((replace(protocol, seed=1), encoder), (protocol, Told("random"))):  # other trainings
        steps.clear()
        other.run(features, data, Session(folder=tmp_path, quiet=True))
        assert min(steps) == 0


def outcomes(folder, batch_size: int):
    """Of both protocols in both modes: batches of 15 of 40 images, some held out and two unreadable; 23 to test."""
    data = dataset(40, 23, classes=3, bad=(5, 8))
    with launched_session("cpu", quiet=True, batch_size=batch_size) as session:
        for protocol, layers in ((ATTENTIVE, "output"), (LINEAR, "grid")):
            for mode in ("cached", "online"):
                outcome = replace(protocol, mode=mode, layers=layers, batch_size=15).run(Told("random"), data, session)
                if session.rank == 0:
                    contents = {"sweep": outcome.details["sweep"]}
                    contents["metrics"] = [(name, metric.value) for name, metric in outcome.metrics.items()]
                    torch.save(contents, folder / f"{protocol.name}-{mode}-{session.world_size}.pt")


def stopped(folder, out):
    """Both ranks stop before the second epoch's end and go on, with what could not be read before."""
    training.SAVE_SECONDS = 0.0
    data, plain = dataset(40, 23, classes=3, bad=(5, 8)), LinearSweep.step

    def stopping(self, x, labels, step, *others):
        if step == 3:
            raise KeyboardInterrupt
        return plain(self, x, labels, step, *others)

    with launched_session("cpu", quiet=True, folder=folder) as session:
        protocol = replace(LINEAR, mode="online", layers="grid", batch_size=15)
        if folder is not None:
            LinearSweep.step = stopping
            with pytest.raises(KeyboardInterrupt):
                protocol.run(Told("random"), data, session)
            LinearSweep.step = plain
        outcome = protocol.run(Told("random"), data, session)
        if session.rank == 0:
            torch.save([outcome.details, {key: value.value for key, value in outcome.metrics.items()}], out)


def test_two_ranks_go_on_where_they_stopped(tmp_path):
    """To the bit, since each takes the same part of every batch."""
    for folder, out in ((tmp_path / "work", tmp_path / "again"), (None, tmp_path / "whole")):
        assert finish(start(stopped, folder, out, ranks=2, log=tmp_path / "log")) == [0, 0], (
            tmp_path / "log"
        ).read_text()
    again, whole = (torch.load(tmp_path / name, weights_only=True) for name in ("again", "whole"))
    for mine, other in zip(again[0].pop("sweep"), whole[0].pop("sweep"), strict=True):
        np.testing.assert_allclose(mine.pop("loss"), other.pop("loss"), rtol=1e-5)  # sums in another order
        assert mine == other
    assert again == whole
    assert whole[0]["unreadable"] == 2


def test_one_rank_is_two_ranks(tmp_path):
    """The losses differ by the order of sums, and by what Adam makes of that; who is right differs for no image."""
    log = tmp_path / "log"
    processes = start(outcomes, tmp_path, 5, ranks=2, log=log)
    outcomes(tmp_path, 5)
    assert finish(processes) == [0, 0], log.read_text()
    for name in ("attentive_probe-cached", "attentive_probe-online", "linear_probe-cached", "linear_probe-online"):
        one, two = (torch.load(tmp_path / f"{name}-{ranks}.pt", weights_only=True) for ranks in (1, 2))
        assert one["metrics"] == two["metrics"], name
        for mine, other in zip(one["sweep"], two["sweep"], strict=True):
            np.testing.assert_allclose(mine.pop("loss"), other.pop("loss"), rtol=2e-3)
            assert mine == other


def test_fewer_images_than_a_batch_are_one():
    assert [batches_per_epoch(rows, 8) for rows in (1, 7, 8, 15, 16)] == [1, 1, 1, 1, 2]


def test_what_is_held_out_does_not_depend_on_what_can_be_read():
    labels, readable = np.arange(40) % 2, np.ones(40, bool)
    rows, held = split_rows(labels, readable, "held_out", 0.1, 0)
    readable[rows[:3]] = False
    fewer, same_held = split_rows(labels, readable, "held_out", 0.1, 0)
    assert sorted([*rows, *held]) == list(range(40)) and len(held) == 4
    assert fewer.tolist() == rows[3:].tolist() and same_held.tolist() == held.tolist()
    everything, none = split_rows(labels, np.ones(40, bool), "test", 0.1, 0)
    assert len(everything) == 40 and none is None
    with pytest.raises(ValueError, match="none of 36 training images can be read"):
        split_rows(labels, np.zeros(40, bool), "held_out", 0.1, 0)
