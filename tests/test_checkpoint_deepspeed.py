"""What checkpoint.py believes of DeepSpeed's insides, asked of the installed DeepSpeed, on two ranks."""

import errno
import json
import os
from pathlib import Path

import processes
import pytest
import torch
import torch.distributed as dist
from torch import nn

from aimv2 import manifest
from aimv2.checkpoint import CheckpointError, TrainState, restore, save


def make_engine(stage, precision):
    import deepspeed  # slow to import, and only in the ranks

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[0].bias.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    settings = {
        "train_batch_size": 4,
        "train_micro_batch_size_per_gpu": 2,
        "bf16": {"enabled": precision == "bf16"},
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]


def train(engine, steps):
    """Losses of some steps; the data come from the global generator, whose state must be restored too."""
    losses = []
    for _ in range(steps):
        dtype = next(engine.module.parameters()).dtype
        loss = engine(torch.randn(2, 16).to(dtype)).float().square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def commit(engine, folder, step):
    return save(engine, TrainState(step=step), folder, config={}, fingerprints={})


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def forge(path, marker):
    """Puts code into the model files and makes the checkpoint verify again, as anyone could who may write there."""

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    for file in (path / "engine").glob("*model_states.pt"):
        torch.save({"module": Attack()}, file)
    contents = json.loads((path / manifest.NAME).read_text())
    (path / manifest.NAME).unlink()
    manifest.write(path, {k: v for k, v in contents.items() if k not in ("files", "sha256")}, {})


def scenario(stage, precision, folder):
    from aimv2.engine import start_distributed

    start_distributed()
    rank = dist.get_rank()
    engine = make_engine(stage, precision)
    torch.manual_seed(rank)
    train(engine, 3)
    assert commit(engine, folder, 3)
    expected = train(engine, 3)

    for owner, name, broken in (
        (type(engine.checkpoint_engine), "save", 1),
        (type(engine.checkpoint_engine), "save", 0),
        (type(engine), "_copy_recovery_script", 0),
    ):
        with pytest.MonkeyPatch.context() as patch:
            if rank == broken:
                patch.setattr(owner, name, full_disk)
            assert not commit(engine, folder, 6)

    engine = make_engine(stage, precision)
    assert restore(engine, folder, fingerprints=lambda sample: {}) == TrainState(step=3)
    assert train(engine, 3) == expected

    dist.barrier()
    if rank == 0:
        forge(folder / "checkpoints" / "step_00000003", folder / "executed")
    dist.barrier()
    with pytest.raises(CheckpointError, match="Weights only load failed"):
        restore(make_engine(stage, precision), folder, fingerprints=lambda sample: {})
    (folder / f"passed_{rank}").touch()


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "precision"), [(1, "fp32"), (1, "bf16"), (2, "bf16"), (3, "fp32"), (3, "bf16")])
def test_deepspeed_saves_fails_and_goes_on(tmp_path, stage, precision):
    folder, log = tmp_path / "run", tmp_path / "log"
    codes = processes.finish(processes.start(scenario, stage, precision, folder, ranks=2, log=log))
    assert codes == [0, 0], log.read_text()
    files = {path.name for path in Path(folder).iterdir()}
    assert files == {"checkpoints", "passed_0", "passed_1"}  # and not "executed"
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_00000003"]
