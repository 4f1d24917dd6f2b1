"""The tiny run with a teacher, which sees the images at a larger size. Give it objective.teacher besides."""

from dataclasses import replace
from pathlib import Path

from aimv2.config import load_config
from aimv2.objectives.distill import DistillConfig
from aimv2.train import TrainConfig

TEACHER_SIZE = 96


def config() -> TrainConfig:
    run = load_config(Path(__file__).with_name("tiny_run.py"))
    run.objective = DistillConfig(
        student=run.objective,
        teacher="runs/tiny/export",
        teacher_image_size=TEACHER_SIZE,
        features="full",  # its grid is another
    )
    run.data.transform = replace(run.data.transform, image_size=TEACHER_SIZE)
    return run
