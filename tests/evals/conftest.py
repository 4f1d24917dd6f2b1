"""A little of the shapes world on disk."""

from pathlib import Path

import pytest

from aimv2.data.loader import DataConfig
from aimv2.data.mixture import Source
from aimv2.data.shapes import ShapesRecipe, write_shards
from aimv2.data.shards import ensure_indices, expand_shards
from aimv2.data.transforms import TransformConfig

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> DataConfig:
    """150 quick validation scenes in two shards, neither flipped nor cropped, read in this process."""
    folder = tmp_path_factory.mktemp("shapes")
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
