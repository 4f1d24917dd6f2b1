"""The embedded chain's second stage: the 48 px model of configs/shapes_mixed.py at 72 px, as 224 px becomes 336.

    deepspeed scripts/train_aimv2.py --config configs/shapes_hires.py

As configs/aimv2_large_336.py: from the smaller model's export, without weight decay. For 448, `..._hires.py
data.transform.image_size=96 objective.vision.image_size=96 steps=500 out=runs/shapes_hires96`. Steps are ours, and the
learning rate, pre-training's own: after minutes of that there is little to undo, unlike after weeks.
The positions are fixed ones, which run on: there is nothing to interpolate.

Measured: of 1,000 held-out images, 66 % captioned with exactly the right set of objects; at 96 px, 500 steps, 62 %.
"""

from dataclasses import replace
from pathlib import Path

from aimv2.config import load_config
from aimv2.init_from import InitFrom
from aimv2.train import TrainConfig

IMAGE_SIZE = 72


def config() -> TrainConfig:
    run = load_config(Path(__file__).with_name("shapes_mixed.py"))
    run.init_from = InitFrom(source=f"{run.out}/export")
    run.out = "runs/shapes_hires"
    run.steps = 1200
    run.data.transform = replace(run.data.transform, image_size=IMAGE_SIZE)
    run.objective.vision = replace(run.objective.vision, image_size=IMAGE_SIZE)
    run.optim = replace(run.optim, warmup_steps=50, weight_decay=0.0)
    run.save_every = 400
    return run
