"""The embedded chain's fourth stage: a student of half the parameters learns from the native model.

    deepspeed scripts/train_aimv2.py --config configs/shapes_distilled.py

Everything but the teacher is that of configs/shapes_student.py, which is the same student alone. Features under the
prefix mask are what helps here; docs/post-training.md compares the losses.

Measured, three seeds: of 1,000 held-out images, 30 % captioned with exactly the right set of objects; alone 17 %.
"""

from pathlib import Path

from aimv2.config import load_config
from aimv2.objectives.distill import DistillConfig
from aimv2.train import TrainConfig


def config() -> TrainConfig:
    run = load_config(Path(__file__).with_name("shapes_student.py"))
    run.out = "runs/shapes_distilled"
    teacher = "runs/shapes_native/export"
    run.objective = DistillConfig(student=run.objective, teacher=teacher, features="prefix", prediction_weight=0.0)
    return run
