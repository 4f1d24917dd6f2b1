"""A little of the shapes world on disk, and a run folder as training leaves it."""

import json
from pathlib import Path

import torch

from aimv2.config import to_json
from aimv2.data.loader import DataConfig
from aimv2.data.mixture import Source
from aimv2.data.shapes import ShapesRecipe, write_shards
from aimv2.data.shards import ensure_indices, expand_shards
from aimv2.data.tokenizer import Tokenizer
from aimv2.data.transforms import TransformConfig
from aimv2.decoder import DecoderConfig
from aimv2.encoder import VisionConfig
from aimv2.exports import export_model
from aimv2.objectives.aimv2 import AIMv2Config
from aimv2.preprocessing import ProcessorConfig

ROOT = Path(__file__).parents[1]


def write_shapes(folder: Path) -> DataConfig:
    """150 quick validation scenes in two shards, neither flipped nor cropped, read in this process."""
    recipe = ShapesRecipe(difficulty="quick", folder=str(folder), train=1, validation=150, samples_per_shard=100)
    write_shards(recipe)
    ensure_indices(expand_shards(f"{folder}/*.tar"))
    return DataConfig(
        train=[Source(name="shapes", shards=f"{folder}/train-*.tar")],
        validation=Source(name="shapes", shards=f"{folder}/validation-*.tar"),
        tokenizer=str(ROOT / "tokenizers" / "shapes"),
        transform=TransformConfig(image_size=48, crop_scale=None, flip=0.0),
        context_length=40,
        workers=0,
        made_by=recipe,
    )


def write_run(folder: Path, shapes: DataConfig) -> Path:
    """A run of three steps on `shapes`, with the export of a model that was never trained."""
    torch.manual_seed(0)
    config = AIMv2Config(
        vision=VisionConfig(width=16, depth=1, heads=2, mlp_hidden=16, image_size=48, patch_size=16),
        decoder=DecoderConfig(
            width=16,
            depth=1,
            heads=2,
            mlp_hidden=16,
            vocab_size=Tokenizer(shapes.tokenizer).vocab_size,
            context_length=shapes.context_length,
        ),
    )
    export_model(
        config.build(),
        folder / "export",
        config=config,
        processing=ProcessorConfig(image_size=48, patch_size=16, mean=shapes.transform.mean, std=shapes.transform.std),
        tokenizer=shapes.tokenizer,
    )
    (folder / "config.json").write_text(json.dumps({"seed": 0, "data": to_json(shapes)}))
    lines = ({"step": step, "loss": 1.0, "pixel_loss": 1 / step, "caption_loss": 5 / step} for step in (1, 2, 3))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
