"""Small datasets and an encoder whose features are known, for tests of what evaluates them."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from aimv2.data.images import BadImage
from aimv2.evals.datasets.interface import Dataset, ImageSet
from aimv2.evals.encoders import Encoder, open_encoder


class Pictures(list):
    """8 x 8 pictures; a row of `bad` can't be read."""

    def __init__(self, pixels: np.ndarray, bad: tuple[int, ...] = ()):
        super().__init__(pixels)
        self.bad = bad

    def __getitem__(self, row: int) -> Image.Image:
        if row in self.bad:
            raise BadImage("cut off")
        return Image.fromarray(super().__getitem__(row))


def images(
    count: int = 20, classes: int = 2, seed: int = 0, bad: tuple[int, ...] = (), split: str = "test"
) -> ImageSet:
    """Random pictures whose red is the number of their class times 10."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    pixels = rng.integers(0, 256, (count, 8, 8, 3), np.uint8)
    pixels[..., 0] = labels[:, None, None] * 10
    return ImageSet(
        name="made",
        split=split,
        images=Pictures(pixels, bad),
        keys=[f"{row:04d}.png" for row in range(count)],
        digest=f"{count} {classes} {seed} {bad}",
        labels=labels,
    )


def dataset(train: int = 20, test: int = 11, classes: int = 2, **settings) -> Dataset:
    names = tuple(f"class {number}" for number in range(classes))
    return Dataset(
        spec="made",
        name="made",
        classes=names,
        train=images(train, classes, seed=1, split="train", **settings),
        test=images(test, classes, seed=2, **settings),
    )


def pixels() -> Encoder:
    return open_encoder("pixels:8")


@dataclass(frozen=True)
class MeanColour:
    """A view: the mean of each channel."""

    key: str = "mean colour"

    def __call__(self, encoder: Encoder, images: Tensor) -> dict[str, Tensor]:
        return {"colour": images.mean(dim=(2, 3))}  # (B, 3)


def colours(images: ImageSet, rows: list[int]) -> Tensor:
    """What MeanColour gives, by hand."""
    arrays = np.stack([np.asarray(images.image(row), np.float32) for row in rows])
    return torch.from_numpy(arrays).mean(dim=(1, 2)) / 127.5 - 1
