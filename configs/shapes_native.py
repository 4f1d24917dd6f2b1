"""The embedded chain's third stage: one model for many sizes and aspect ratios (docs/post-training.md).

    deepspeed scripts/train_aimv2.py --config configs/shapes_native.py

As configs/aimv2_large_native.py, from the 72 px model of configs/shapes_hires.py: each micro-batch has an area of its
own, here of 32 to 160 patches, and images keep their aspect ratio. Steps and learning rate are ours.

Measured: of 1,000 held-out images at 81 patches, 69 % captioned with exactly the right set of objects.
"""

from dataclasses import replace
from pathlib import Path

from aimv2.config import load_config
from aimv2.data.native import NativeConfig
from aimv2.init_from import InitFrom
from aimv2.train import TrainConfig


def config() -> TrainConfig:
    run = load_config(Path(__file__).with_name("shapes_hires.py"))
    run.init_from = InitFrom(source=f"{run.out}/export")
    run.out = "runs/shapes_native"
    run.steps = 1600
    run.data.native = NativeConfig(min_patches=32, max_patches=160)
    run.optim = replace(run.optim, peak_lr=5e-4, warmup_steps=50)
    run.engine = replace(run.engine, batch_size=32, micro_batch=32)  # of 81 patches
    run.save_every = 400
    return run
