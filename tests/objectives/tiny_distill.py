"""A teacher for the model of tiny_aimv2.py, wider and of random weights, and what it teaches."""

from dataclasses import replace
from pathlib import Path

import torch
from tiny_aimv2 import CONFIG, DECODER, VISION, random_model
from torch import Tensor, nn

from aimv2.data.batch import Batch
from aimv2.data.loader import DataConfig
from aimv2.data.mixture import Source
from aimv2.data.transforms import TransformConfig
from aimv2.exports import export_model
from aimv2.objectives.aimv2 import AIMv2Config
from aimv2.objectives.distill import Distill, DistillConfig
from aimv2.preprocessing import ProcessorConfig

FEATURES = ["prefix", "full"]
ROOT = Path(__file__).parents[2]
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
TEACHER = AIMv2Config(vision=replace(VISION, width=24, heads=3), decoder=replace(DECODER, width=16, heads=4, depth=1))
NATIVE = replace(CONFIG, vision=replace(VISION, positions="sincos"))  # another student


def write_teacher(folder: Path, config: AIMv2Config = TEACHER, tokenizer: Path | None = None) -> str:
    """The path of an export with random weights."""
    model = random_model(config, torch.float32)
    vision = config.vision
    processing = ProcessorConfig(image_size=vision.image_size, patch_size=vision.patch_size, mean=MEAN, std=STD)
    export_model(model, folder, config=config, processing=processing, tokenizer=tokenizer)
    return str(folder)


def data_for(image_size: int = VISION.image_size, **changes) -> DataConfig:
    """Settings of data that are never read."""
    settings = {
        "train": [Source(name="none", shards="none-*.tar")],
        "tokenizer": str(ROOT / "tokenizers" / "shapes"),
        "transform": TransformConfig(image_size=image_size, crop_scale=None, mean=MEAN, std=STD),
        "context_length": CONFIG.decoder.context_length,
    }
    return DataConfig(**settings | changes)


def built(teacher: str, dtype: torch.dtype = torch.float64, **settings) -> Distill:
    """With a student that is not as it was initialised."""
    config = DistillConfig(student=CONFIG, teacher=teacher, **settings)
    objective = config.build().to(dtype)
    objective.student.load_state_dict(random_model(CONFIG, dtype).state_dict())
    return objective


def part_of(batch: Batch, rows: slice) -> Batch:
    """Some samples of a batch, padded to the longest caption among them."""
    length = max(1, int(batch.text_length[rows].max()))
    names = ("image", "text_length", "prefix_length", "sample")
    return replace(batch, text=batch.text[rows, :length], **{name: getattr(batch, name)[rows] for name in names})


def vector(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])
