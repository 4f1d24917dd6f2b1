"""AIMv2-3B at 224 px: as configs/aimv2_large.py, which has the table and says where data and tokenizer are from.

    deepspeed scripts/train_aimv2.py --config configs/aimv2_3b.py

Not run. Expected: ImageNet-1k, attentive probe, top-1 88.5 (paper).
Blocks are recomputed in the backward pass and gradients are sharded (ZeRO 2), to save memory.
"""

from pathlib import Path

from aimv2.config import load_config
from aimv2.encoder import vision_config
from aimv2.train import TrainConfig


def config() -> TrainConfig:
    run = load_config(Path(__file__).with_name("aimv2_large.py"))
    run.out = "runs/aimv2_3b"
    run.objective.vision = vision_config("3b", checkpointing=True)
    run.optim.peak_lr = 4e-4
    run.engine.micro_batch = 32
    run.engine.zero_stage = 2
    return run
