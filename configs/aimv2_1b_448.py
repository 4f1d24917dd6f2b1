"""AIMv2-1B at 448 px: as configs/aimv2_1b_336.py, from the same 224 px model.

    deepspeed scripts/train_aimv2.py --config configs/aimv2_1b_448.py

Not run. Expected: ImageNet-1k, attentive probe, top-1 89.0 (paper).
"""

from pathlib import Path

from aimv2.config import load_config
from aimv2.train import TrainConfig


def config() -> TrainConfig:
    run = load_config(Path(__file__).with_name("aimv2_1b_336.py"))
    run.out = "runs/aimv2_1b_448"
    run.objective.vision.image_size = run.data.transform.image_size = 448
    run.engine.micro_batch = 16
    return run
