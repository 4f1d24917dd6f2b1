"""The tiny run at native resolution, from an export: areas of 4 to 16 patches. Give it init_from.source besides."""

from dataclasses import replace
from pathlib import Path

from aimv2.config import load_config
from aimv2.data.native import NativeConfig
from aimv2.init_from import InitFrom
from aimv2.train import TrainConfig


def config() -> TrainConfig:
    run = load_config(Path(__file__).with_name("tiny_run.py"))
    run.init_from = InitFrom(source="runs/tiny/export", positions="replace")
    run.objective.vision = replace(run.objective.vision, positions="sincos")
    run.data.native = NativeConfig(min_patches=4, max_patches=16)
    run.data.transform = replace(run.data.transform, crop_scale=None)
    return run
