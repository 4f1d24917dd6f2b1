"""AIMv2-L at 336 px, taught by AIMv2-3B at 336 px: as configs/aimv2_large_distilled.py, from what that leaves behind.

    deepspeed scripts/train_aimv2.py --config configs/aimv2_large_distilled_336.py

Not run. No figure is published; the same model without a teacher has 87.6 (paper), ImageNet-1k, attentive probe, top-1.
Learning rate, data and weight decay are those of configs/aimv2_large_336.py.
"""

from pathlib import Path

from aimv2.config import load_config
from aimv2.init_from import InitFrom
from aimv2.objectives.distill import DistillConfig
from aimv2.train import TrainConfig


def config() -> TrainConfig:
    run = load_config(Path(__file__).with_name("aimv2_large_336.py"))
    run.out = "runs/aimv2_large_distilled_336"
    run.init_from = InitFrom(source="runs/aimv2_large_distilled/export")
    run.objective = DistillConfig(student=run.objective, teacher="runs/aimv2_3b_336/export")
    run.engine.micro_batch = 32
    run.engine.compile = False
    return run
