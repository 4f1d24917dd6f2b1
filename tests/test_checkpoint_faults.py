"""Checkpoints against every fault that can be injected: damage, kills, disk errors, and each of them on one rank."""

import builtins
import contextlib
import datetime
import errno
import logging
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from fake_engine import FINGERPRINTS, Engine, Guarded, commit, names, resume, two_steps, weights

from aimv2 import checkpoint
from aimv2.checkpoint import CheckpointError


@pytest.fixture(scope="module", autouse=True)
def warm():
    """The first step of an optimizer imports a lot; forked processes inherit it."""
    Engine().step()


@pytest.fixture
def run(tmp_path):
    return two_steps(tmp_path / "run")


# -- Damage --


def damage(path, rng):
    """A flipped bit, a cut, a lost or a longer file; says which."""
    whole = path.read_bytes()
    kind = rng.choice(["flip", "flip", "cut", "lost", "longer"])
    if kind == "lost":
        path.unlink()
    elif kind == "cut":
        path.write_bytes(whole[: rng.randrange(len(whole))])
    elif kind == "longer":
        path.write_bytes(whole + bytes([rng.randrange(256)]))
    else:
        place = rng.randrange(len(whole))
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :])
    return f"{kind} in {path.name}"


def test_any_damage_is_found_and_costs_one_checkpoint(run, tmp_path, caplog):
    source, _, by_step = run
    rng = random.Random(0)
    files = [p.relative_to(source) for p in (source / "checkpoints" / "step_00000002").rglob("*") if p.is_file()]
    assert len(files) == 4
    for case in range(100):
        folder = tmp_path / str(case)
        shutil.copytree(source, folder)
        what = damage(folder / files[case % 4], rng)
        caplog.clear()
        engine, state = resume(folder)
        assert state.step == 1, what
        assert weights(engine) == by_step[1], what
        assert [r.levelname for r in caplog.records if "step_00000002 is damaged and passed over" in r.message] == [
            "ERROR"
        ]
        assert names(folder) == [".damaged-step_00000002", "step_00000001"]
        shutil.rmtree(folder)


def test_the_run_goes_over_the_damaged_step_again(run):
    folder, _, by_step = run
    (folder / "checkpoints" / "step_00000002" / "engine" / "model.pt").unlink()
    engine, _ = resume(folder)
    engine.step()
    assert commit(engine, folder, 2)
    assert names(folder) == ["step_00000001", "step_00000002"]
    again, state = resume(folder)
    assert state.step == 2 and weights(again) == by_step[2]


def test_a_step_that_went_bad_since_is_replaced(run):
    folder, engine, by_step = run
    (folder / "checkpoints" / "step_00000002" / "engine" / "model.pt").write_bytes(b"")
    assert commit(engine, folder, 2)
    assert weights(resume(folder)[0]) == by_step[2]
    assert names(folder) == ["step_00000001", "step_00000002"]


def test_nothing_that_verifies_is_an_error_and_never_a_fresh_start(run):
    folder = run[0]
    for path in (folder / "checkpoints").rglob("model.pt"):
        path.write_bytes(b"")
    before = names(folder)
    with pytest.raises(
        CheckpointError, match=r"no checkpoint in .* verifies.*step_00000002: engine/model.pt.*step_00000001"
    ):
        resume(folder)
    assert names(folder) == before


def test_a_renamed_checkpoint_is_not_believed(run):
    checkpoints = run[0] / "checkpoints"
    os.rename(checkpoints / "step_00000001", checkpoints / "step_00000009")
    assert resume(run[0])[1].step == 2
    assert names(run[0]) == [".damaged-step_00000009", "step_00000002"]


# -- Kills and full disks --


class Kill(BaseException):
    """Stands for kill -9: nothing may catch it."""


@contextlib.contextmanager
def failing(monkeypatch, number, error, lasting=False):
    """Raises `error` in place of file operation `number`, and of every later one that needs space if `lasting`.

    A write that fails leaves half a file. Yields the list of the operations so far.
    """
    seen = []

    def wrap(name, real):
        def attempt(*args, **kwargs):
            if name == "open" and "w" not in str(args[1:2]):
                return real(*args, **kwargs)
            seen.append(name)
            again = lasting and len(seen) - 1 > number >= 0 and name not in ("unlink", "rmdir")
            if len(seen) - 1 == number or again:
                if name == "save":
                    Path(args[1]).write_bytes(b"half")
                if name == "open":
                    real(*args, **kwargs).close()
                raise error
            return real(*args, **kwargs)

        return attempt

    with monkeypatch.context() as patch:
        for name in ("rename", "fsync", "mkdir", "unlink", "rmdir"):
            patch.setattr(os, name, wrap(name, getattr(os, name)))
        patch.setattr(torch, "save", wrap("save", torch.save))
        patch.setattr(builtins, "open", wrap("open", open))
        yield seen


def third_save(source, folder, monkeypatch, number, error, **how):
    """Copies a run at step 2, goes on to step 3 and saves it under the fault: (outcome, operations, engine)."""
    shutil.copytree(source, folder)
    engine, state = resume(folder)
    assert state.step == 2
    engine.step()
    with failing(monkeypatch, number, error, **how) as seen:
        try:
            outcome = commit(engine, folder, 3)
        except Kill:
            outcome = "killed"
    return outcome, seen, engine


def test_a_kill_between_any_two_file_operations_loses_nothing(run, tmp_path, monkeypatch):
    source, _, by_step = run
    outcome, operations, engine = third_save(source, tmp_path / "whole", monkeypatch, -1, Kill())
    assert outcome is True and operations.count("rename") == 2  # the commit, and the pruning of step 1
    before_commit = operations.index("rename") + 1
    # On the disk before the rename: three files, the manifest and two folders; right after it: the parent.
    assert operations[:before_commit].count("fsync") == 6 and operations[before_commit] == "fsync"
    by_step[3] = weights(engine)
    reached = []
    for number in range(len(operations)):
        folder = tmp_path / str(number)
        assert third_save(source, folder, monkeypatch, number, Kill())[0] == "killed"
        other, state = resume(folder)
        assert weights(other) == by_step[state.step]
        assert all(name.startswith("step_") for name in names(folder))
        reached.append(state.step)
        other.step()
        assert commit(other, folder, state.step + 1) and len(names(folder)) == 2
    assert reached == [2] * before_commit + [3] * (len(operations) - before_commit)


@pytest.mark.parametrize("lasting", [False, True])
def test_a_disk_error_at_any_file_operation_costs_at_most_that_checkpoint(run, tmp_path, monkeypatch, caplog, lasting):
    source, _, by_step = run
    error = OSError(errno.ENOSPC, "No space left on device")
    _, operations, _ = third_save(source, tmp_path / "whole", monkeypatch, -1, error)
    before_commit = operations.index("rename") + 1
    for number in range(len(operations)):
        folder = tmp_path / str(number)
        caplog.clear()
        outcome, _, engine = third_save(source, folder, monkeypatch, number, error, lasting=lasting)
        assert outcome is (number >= before_commit)
        assert any(record.levelname == "ERROR" and "No space left" in record.message for record in caplog.records)
        assert not [name for name in names(folder) if name.startswith(".tmp-")]
        other, state = resume(folder)
        assert state.step == 2 + outcome
        assert weights(other) == (weights(engine) if outcome else by_step[2])
        assert commit(engine, folder, 3)  # there is space again
        assert weights(resume(folder)[0]) == weights(engine)


def save_until_killed(folder):
    torch.set_num_threads(1)  # a forked process cannot use its parent's pool
    random.seed(1), np.random.seed(2)
    engine, state = resume(folder)
    step = state.step if state else 0
    while True:
        engine.step()
        step += 1
        commit(engine, folder, step)


def newest(folder):
    steps = checkpoint._steps(folder / "checkpoints")
    return int(steps[0].name.removeprefix("step_")) if steps else 0


def test_kills_at_random_moments_lose_nothing(tmp_path):
    """Real ones: 20 times SIGKILL, and the weights are those of a run that was never killed."""
    delays = random.Random(0)
    before = 0
    for _ in range(20):
        process = multiprocessing.get_context("fork").Process(target=save_until_killed, args=(tmp_path,))
        process.start()
        while newest(tmp_path) == before:
            assert process.is_alive()
            time.sleep(0.01)
        time.sleep(delays.uniform(0, 0.05))  # a save takes about 0.01 s: anywhere inside one, or between two
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert newest(tmp_path) > before
        before = newest(tmp_path)
    killed, state = resume(tmp_path)
    assert state.step == before
    random.seed(1), np.random.seed(2)
    undisturbed = Engine()
    for _ in range(before):
        undisturbed.step()
    assert weights(killed) == weights(undisturbed)


# -- Two ranks --


def scenarios(rank, folder):
    """Runs on both ranks; a hang is an error after 30 s."""
    torch.set_num_threads(1)
    logging.disable()
    timeout = datetime.timedelta(seconds=30)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=timeout)
    for kind in (Engine, Guarded):
        own = folder / kind.__name__
        random.seed(rank), np.random.seed(rank)
        engine = kind()
        torch.manual_seed(rank)
        engine.step()
        assert commit(engine, own, 1)
        at_one = weights(engine)
        draw = torch.rand(1).item()
        engine.step()

        broken = [(r, kind, method) for r in (0, 1) for method in BREAKS[kind]]
        for broken_rank, cls, method in broken:
            if rank == broken_rank:
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(cls if hasattr(cls, method) else cls.Writer, method, full_disk)
                    outcome = commit(engine, own, 2)
            else:
                outcome = commit(engine, own, 2)
            never_called = method == "_copy_recovery_script" and broken_rank == 1
            assert outcome is never_called, (kind, broken_rank, method)
            if never_called and rank == 0:
                shutil.rmtree(own / "checkpoints" / "step_00000002")
            dist.barrier()
            assert names(own) == ["step_00000001"]
            dist.barrier()

        assert commit(engine, own, 2)
        if rank == 0:
            next((own / "checkpoints" / "step_00000002").rglob("rng_00001.pt")).write_bytes(b"")
        other, state = resume(own, kind)
        assert state.step == 1 and weights(other) == at_one and torch.rand(1).item() == draw
        with pytest.raises(CheckpointError, match=r"^rank 1: step_00000001: the data changed: saved d1, now d2$"):
            resume(own, kind, fingerprints={**FINGERPRINTS, "data": f"d{1 + rank}"})
    dist.destroy_process_group()


BREAKS = {Engine: ["write"], Guarded: ["save", "makedirs", "_copy_recovery_script"]}


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_two_ranks_agree_on_everything(tmp_path):
    mp.start_processes(scenarios, (tmp_path,), nprocs=2, start_method="fork")
    with pytest.raises(CheckpointError, match="was written by 2 ranks and this run has 1"):
        resume(tmp_path / "Engine")
