"""Models that know which image they see and give the features that a test wants."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from made_images import Pictures
from torch import Tensor, nn

from aimv2.evals.datasets import Dataset, ImageSet
from aimv2.evals.encoders import BlockOutput, Encoder
from aimv2.evals.text_image import TextImageModel
from aimv2.preprocessing import ProcessorConfig

HALF = (0.5, 0.5, 0.5)
PROCESSING = ProcessorConfig(image_size=8, patch_size=4, mean=HALF, std=HALF)


def numbered(
    numbers: Sequence[int],
    labels: Sequence[int] | None = None,
    bad: tuple[int, ...] = (),
    split: str = "test",
    captions: list[list[str]] | None = None,
) -> ImageSet:
    """8 x 8 pictures of one colour, which is the image's number; those of the rows `bad` can't be read."""
    pixels = np.zeros((len(numbers), 8, 8, 3), np.uint8)
    pixels[..., 0] = np.asarray(numbers)[:, None, None] % 256
    pixels[..., 1] = np.asarray(numbers)[:, None, None] // 256
    keys = [f"{number:05d}" for number in numbers]
    digest = f"{list(numbers)} {bad}"
    pictures = Pictures(pixels, bad)
    return ImageSet(
        name="known", split=split, images=pictures, keys=keys, digest=digest, labels=labels, captions=captions
    )


def numbers_of(images: Tensor) -> Tensor:
    """(B, 3, 8, 8) -> (B,); 0 for the grey that stands for an image that can't be read."""
    red, green, blue = ((images[:, channel, 0, 0] * 0.5 + 0.5) * 255 for channel in range(3))
    return torch.where(blue.round() == 0, red.round() + 256 * green.round(), 0).long()


def dataset(
    train: int, test: int, labels: np.ndarray, bad_train: tuple[int, ...] = (), bad_test: tuple[int, ...] = ()
) -> Dataset:
    """Images 0 to train - 1 to train on, the next to test; `labels` are those of all, in that order."""
    return Dataset(
        spec="known",
        name="known",
        classes=tuple(f"class {number}" for number in range(int(labels.max()) + 1)),
        train=numbered(range(train), labels[:train], bad_train, "train"),
        test=numbered(range(train, train + test), labels[train : train + test], bad_test),
    )


class KnownEncoder(Encoder):
    """tables: for each block the features (images, D); the last is the output's and the image feature."""

    def __init__(self, *tables: np.ndarray | Tensor):
        self.tables = [torch.as_tensor(np.asarray(table), dtype=torch.float32) for table in tables]
        width = self.tables[0].shape[1]
        described = {"spec": "known", "name": "known", "source": "test", "width": width, "heads": 1, "grid": (2, 2)}
        super().__init__(nn.Identity(), PROCESSING, depth=len(tables), **described)

    def _pass(self, images: Tensor, numbers: Sequence[int], output: bool) -> tuple[list[BlockOutput], BlockOutput]:
        found = [self.tables[block][numbers_of(images)] for block in (*numbers, -1)]  # each (B, D)
        spread = torch.tensor([-1.0, 1.0, -2.0, 2.0])[:, None]  # the patches differ, their mean is the feature
        outputs = [BlockOutput(table[:, None] + spread, None) for table in found]
        return outputs[:-1], outputs[-1]

    def _pooled(self, images: Tensor) -> Tensor:
        return self.tables[-1][numbers_of(images)]

    def norm(self, x: Tensor) -> Tensor:
        return x


class KnownPair(TextImageModel):
    """Features of images by their numbers, and of texts by a function of the text."""

    def __init__(self, images: np.ndarray | Tensor, text: Callable[[str], np.ndarray]):
        self.images = torch.as_tensor(np.asarray(images), dtype=torch.float32)
        self.text, self.texts, self.calls = text, [], []
        super().__init__(nn.Linear(1, 1), PROCESSING, self._tokens, spec="known", source="test", tokens={})

    def _tokens(self, texts: Sequence[str]) -> Tensor:
        self.texts += texts
        return torch.arange(len(self.texts) - len(texts), len(self.texts))[:, None]

    def _encode_image(self, images: Tensor) -> Tensor:
        return self.images[numbers_of(images)]

    def _encode_text(self, text: Tensor) -> Tensor:
        self.calls.append(len(text))
        return torch.stack([torch.as_tensor(self.text(self.texts[row]), dtype=torch.float32) for row in text[:, 0]])


def within_chance(metric) -> bool:
    """Within four standard errors of a guess."""
    sigma = (metric.chance * (1 - metric.chance) / metric.n) ** 0.5
    return abs(metric.value - metric.chance) < 4 * sigma
