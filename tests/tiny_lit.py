"""The tiny run as LiT, on an export. Give it init_from.source besides."""

from pathlib import Path

from aimv2.config import load_config
from aimv2.init_from import InitFrom
from aimv2.lit import LiTConfig
from aimv2.objectives.lit import LiTObjectiveConfig
from aimv2.text_encoder import TextConfig
from aimv2.train import TrainConfig


def config() -> TrainConfig:
    run = load_config(Path(__file__).with_name("tiny_run.py"))
    run.init_from = InitFrom(source="runs/tiny/export")
    vision = run.objective.vision
    text = TextConfig(width=32, depth=1, heads=2, mlp_hidden=64, vocab_size=128, eos=1)
    model = LiTConfig(vision=vision, text=text, projection=16, pool_heads=vision.heads)
    run.objective = LiTObjectiveConfig(model=model)
    return run
