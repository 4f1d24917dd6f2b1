"""The embedded chain's fourth stage: a student of an eighth of the parameters learns from the native model.

    deepspeed scripts/train_aimv2.py --config configs/shapes_distilled.py

Without the teacher: `objective.feature_weight=0 objective.prediction_weight=0` is refused, for that is another
objective: `configs/shapes_student.py`.
"""

from pathlib import Path

from aimv2.config import load_config
from aimv2.objectives.distill import DistillConfig
from aimv2.train import TrainConfig


def config() -> TrainConfig:
    run = load_config(Path(__file__).with_name("shapes_student.py"))
    run.out = "runs/shapes_distilled"
    run.objective = DistillConfig(student=run.objective, teacher="runs/shapes_native/export")
    return run
