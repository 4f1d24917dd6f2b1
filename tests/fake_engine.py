"""An engine of a few tensors in DeepSpeed's place, and what the checkpoint tests say often."""

import os
import random
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from aimv2 import checkpoint
from aimv2.checkpoint import TrainState, restore, save

FINGERPRINTS = {"data": "d1", "tokenizer": "t1"}


class Engine:
    """A model and AdamW with DeepSpeed's two methods: rank 0 writes the model, every rank its optimizer."""

    def __init__(self, frozen=False):
        torch.manual_seed(0)
        self.module = nn.Linear(3, 2)
        self.module.bias.requires_grad_(not frozen)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=0.1)
        self.calls = []

    def step(self):
        """A step that depends on each of the global generators."""
        noise = torch.rand(2, 3) + random.random() + float(np.random.rand())
        if dist.is_initialized():
            dist.all_reduce(noise)
        for parameter in self.module.parameters():
            parameter.grad = noise[0, :2] if parameter.ndim == 1 else noise
        self.optimizer.step()

    def write(self, tensors, path):
        torch.save(tensors, path)

    def save_checkpoint(self, folder, *, tag, save_latest, exclude_frozen_parameters):
        self.calls.append({"save_latest": save_latest, "exclude_frozen_parameters": exclude_frozen_parameters})
        if checkpoint._rank() == 0:
            self.write(self.module.state_dict(), f"{folder}/{tag}/model.pt")
        self.write(self.optimizer.state_dict(), f"{folder}/{tag}/optimizer_{checkpoint._rank()}.pt")

    def load_checkpoint(self, folder, *, tag, load_module_strict, load_lr_scheduler_states):
        self.calls.append({"load_module_strict": load_module_strict})
        self.module.load_state_dict(torch.load(f"{folder}/{tag}/model.pt"))
        self.optimizer.load_state_dict(torch.load(f"{folder}/{tag}/optimizer_{checkpoint._rank()}.pt"))
        return f"{folder}/{tag}", {}


class Guarded(Engine):
    """As DeepSpeed does it: writes through `checkpoint_engine`, collectives around them, pickles read back."""

    class Writer:
        def makedirs(self, path, exist_ok=False):
            os.makedirs(path, exist_ok=exist_ok)

        def save(self, state_dict, path):
            torch.save(state_dict, path)

        def load(self, path, map_location=None):
            return torch.load(path, map_location=map_location, weights_only=False)

    def __init__(self):
        super().__init__()
        self.checkpoint_engine = self.Writer()

    def _copy_recovery_script(self, folder):
        Path(folder, "zero_to_fp32.py").write_text("pass")

    def save_checkpoint(self, folder, *, tag, save_latest, exclude_frozen_parameters):
        self.checkpoint_engine.makedirs(folder, exist_ok=True)
        if dist.is_initialized():
            dist.barrier()
        self.checkpoint_engine.save(self.module.state_dict(), f"{folder}/{tag}/model_{checkpoint._rank()}.pt")
        self.checkpoint_engine.save(
            state_dict=self.optimizer.state_dict(), path=f"{folder}/{tag}/optimizer_{checkpoint._rank()}.pt"
        )
        if checkpoint._rank() == 0:
            self._copy_recovery_script(folder)
        if dist.is_initialized():
            dist.barrier()

    def load_checkpoint(self, folder, *, tag, load_module_strict, load_lr_scheduler_states):
        load = self.checkpoint_engine.load
        self.module.load_state_dict(load(f"{folder}/{tag}/model_{checkpoint._rank()}.pt", map_location="cpu"))
        self.optimizer.load_state_dict(load(f"{folder}/{tag}/optimizer_{checkpoint._rank()}.pt"))
        return f"{folder}/{tag}", {}


def commit(engine, folder, step, keep=2):
    state = TrainState(step=step, sample=8 * step, log={"loss": step / 3})
    return save(engine, state, folder, config={"seed": 0}, fingerprints=FINGERPRINTS, keep=keep)


def weights(engine):
    """Everything that must be the same, bit for bit."""
    state = engine.optimizer.state_dict()["state"]
    tensors = [*engine.module.state_dict().values(), *(value for entry in state.values() for value in entry.values())]
    return [tensor.tolist() for tensor in tensors]


def names(folder):
    return sorted(path.name for path in (Path(folder) / "checkpoints").iterdir())


def resume(folder, kind=Engine, fingerprints=FINGERPRINTS, **changes):
    engine = kind()
    return engine, restore(engine, folder, fingerprints=lambda sample: fingerprints, **changes)


def two_steps(folder):
    """Begins a run: (its folder with checkpoints of steps 1 and 2, the engine at step 2, its weights by step)."""
    engine = Engine()
    by_step = {}
    for step in (1, 2):
        engine.step()
        by_step[step] = weights(engine)
        assert commit(engine, folder, step)
    return folder, engine, by_step
