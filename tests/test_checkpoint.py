"""Saving, going on and refusing to, with a fake engine; faults are in test_checkpoint_faults.py."""

import json
import os
import random

import numpy as np
import pytest
import torch
from fake_engine import FINGERPRINTS, Engine, Guarded, commit, names, resume, two_steps, weights

from aimv2 import checkpoint, manifest
from aimv2.checkpoint import CheckpointError, TrainState, restore


@pytest.fixture
def run(tmp_path):
    return two_steps(tmp_path / "run")


@pytest.mark.parametrize("kind", [Engine, Guarded])
def test_a_resumed_run_is_bit_identical(tmp_path, kind):
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    np.random.standard_normal()  # leaves a second normal behind, which is part of the state
    engine = kind()
    engine.step()
    assert commit(engine, tmp_path, 1)
    for _ in range(5):
        engine.step()
    expected = weights(engine), random.random(), np.random.standard_normal(), torch.rand(3).tolist()

    other, state = resume(tmp_path, kind)
    assert state == TrainState(step=1, sample=8, log={"loss": 1 / 3})
    for _ in range(5):
        other.step()
    assert (weights(other), random.random(), np.random.standard_normal(), torch.rand(3).tolist()) == expected


@pytest.mark.gpu
def test_the_generator_of_the_gpu_is_restored(tmp_path):
    torch.cuda.manual_seed(5)
    torch.rand(3, device="cuda")
    assert commit(Engine(), tmp_path, 1)
    expected = torch.rand(3, device="cuda").tolist()
    resume(tmp_path)
    assert torch.rand(3, device="cuda").tolist() == expected


def test_a_fresh_run_has_nothing_to_restore(tmp_path):
    assert resume(tmp_path)[1] is None
    (tmp_path / "checkpoints" / ".tmp-step_00000001" / "engine").mkdir(parents=True)
    assert resume(tmp_path)[1] is None
    assert names(tmp_path) == []


def test_the_manifest_tells_what_was_run(run):
    contents = json.loads((run[0] / "checkpoints" / "step_00000002" / manifest.NAME).read_text())
    assert contents["state"] == {"step": 2, "sample": 16, "skipped": 0, "log": {"loss": 2 / 3}}
    assert contents["config"] == {"seed": 0} and contents["fingerprints"] == FINGERPRINTS
    assert contents["world_size"] == 1 and contents["versions"]["torch"] == torch.__version__.split("+")[0]
    assert sorted(contents["files"]) == ["engine/model.pt", "engine/optimizer_0.pt", "rng_00000.pt"]


def test_frozen_parameters_are_left_out_and_not_asked_for(tmp_path):
    engine = Engine(frozen=True)
    commit(engine, tmp_path, 1)
    restore(engine, tmp_path, fingerprints=lambda sample: FINGERPRINTS)
    assert engine.calls == [
        {"save_latest": False, "exclude_frozen_parameters": True},
        {"load_module_strict": False},
    ]
    assert resume(tmp_path)[0].calls == [{"load_module_strict": True}]


def test_only_the_newest_are_kept(tmp_path):
    engine = Engine()
    for step in (5, 99_999_999, 100_000_000, 7):  # 7 last: the newest by step stay, not by time
        assert commit(engine, tmp_path, step, keep=3)
    assert names(tmp_path) == ["step_00000007", "step_100000000", "step_99999999"]
    assert resume(tmp_path)[1].step == 100_000_000
    with pytest.raises(ValueError, match="keep 1: expected at least 2"):
        commit(engine, tmp_path, 8, keep=1)


def test_a_step_that_is_committed_already_is_left_alone(run):
    folder, engine, by_step = run
    engine.step()
    assert commit(engine, folder, 2)
    assert weights(resume(folder)[0]) == by_step[2]


def test_what_changed_is_named(run):
    folder = run[0]
    changed = {"data": "d1", "tokenizer": "t2"}
    with pytest.raises(CheckpointError, match=r"step_00000002: the tokenizer changed: saved t1, now t2"):
        resume(folder, fingerprints=changed)
    assert resume(folder, fingerprints=changed, allow={"tokenizer"})[1].step == 2
    with pytest.raises(CheckpointError, match="the mixture changed: saved None, now m"):
        resume(folder, fingerprints={**FINGERPRINTS, "mixture": "m"})
    with pytest.raises(CheckpointError, match="the tokenizer changed: saved t1, now None"):
        resume(folder, fingerprints={"data": "d1"})


def test_fingerprints_are_asked_for_the_samples_consumed(run):
    asked = []
    restore(Engine(), run[0], fingerprints=lambda sample: asked.append(sample) or FINGERPRINTS)
    assert asked == [16]  # step 2, 8 a step


def test_another_number_of_ranks_is_refused(run, monkeypatch):
    monkeypatch.setattr(checkpoint, "_world_size", lambda: 3)
    with pytest.raises(CheckpointError, match=r"by 1 ranks and this run has 3: go on with as many"):
        resume(run[0])


def test_another_zero_stage_is_refused(run, monkeypatch):
    monkeypatch.setattr(Engine, "zero_optimization_stage", lambda self: 2, raising=False)
    with pytest.raises(CheckpointError, match="ZeRO stage None, this run has 2"):
        resume(run[0])


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    """Somebody's own manifest can make any file verify: DeepSpeed would unpickle it."""

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    engine = Guarded()
    assert commit(engine, tmp_path, 1)
    path = tmp_path / "checkpoints" / "step_00000001"
    torch.save({"weight": Attack()}, path / "engine" / "model_0.pt")
    contents = json.loads((path / manifest.NAME).read_text())
    (path / manifest.NAME).unlink()
    manifest.write(path, {k: v for k, v in contents.items() if k not in ("files", "sha256")}, {})
    with pytest.raises(CheckpointError, match="Weights only load failed"):
        resume(tmp_path, Guarded)
    assert not (tmp_path / "executed").exists()
    assert engine.checkpoint_engine.load.__func__ is Guarded.Writer.load
