"""AIMv2-1B at 224 px: as configs/aimv2_large.py, which has the table and says where data and tokenizer are from.

    deepspeed scripts/train_aimv2.py --config configs/aimv2_1b.py

Not run. Expected: ImageNet-1k, attentive probe, top-1 88.1 (paper).
Blocks are recomputed in the backward pass, to save memory.
"""

from pathlib import Path

from aimv2.config import load_config
from aimv2.encoder import vision_config
from aimv2.train import TrainConfig


def config() -> TrainConfig:
    run = load_config(Path(__file__).with_name("aimv2_large.py"))
    run.out = "runs/aimv2_1b"
    run.objective.vision = vision_config("1b", checkpointing=True)
    run.optim.peak_lr = 8e-4
    run.engine.micro_batch = 64
    return run
