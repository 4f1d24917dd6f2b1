"""AIMv2-H at 336 px: as configs/aimv2_large_336.py, which says what the paper has and what is our choice.

    deepspeed scripts/train_aimv2.py --config configs/aimv2_huge_336.py

Not run. Expected: ImageNet-1k, attentive probe, top-1 88.2 (paper).
"""

from pathlib import Path

from aimv2.config import load_config
from aimv2.encoder import vision_config
from aimv2.train import TrainConfig


def config() -> TrainConfig:
    run = load_config(Path(__file__).with_name("aimv2_large_336.py"))
    run.out = "runs/aimv2_huge_336"
    run.init_from.source = "runs/aimv2_huge/export"
    run.objective.vision = vision_config("huge", 336)
    run.optim.peak_lr, run.optim.final_lr = 8e-5, 8e-7
    run.engine.micro_batch = 32
    return run
