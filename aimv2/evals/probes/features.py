"""Where a probe's features come from: kept, the same in each epoch, or made anew from augmented images.

B images, n images of a split.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from aimv2.evals.datasets import Dataset
from aimv2.evals.encoders import Encoder
from aimv2.evals.encoders.packages import optional
from aimv2.evals.extraction import View, extract, feature_shapes, online
from aimv2.evals.feature_store import Extracted
from aimv2.evals.session import Session

MODES = ("auto", "online", "cached")

Features = dict[str, Tensor]  # stream -> (B, ...)


class CachedFeatures:
    """Features of the evaluation's transform, extracted once: the same in each epoch."""

    mode = "cached"

    def __init__(self, encoder: Encoder, data: Dataset, view: View, session: Session):
        self.encoder, self.data, self.view, self.session = encoder, data, view, session
        self._extracted: dict[str, Extracted] = {}

    def readable(self, split: str) -> np.ndarray:
        """(n,) bool."""
        return self._of(split).readable

    def batches(self, batches: Iterable[tuple[int, np.ndarray]]) -> Iterator[tuple[np.ndarray, Features]]:
        """(rows, features) of this rank's part of each batch, which is (epoch, rows of all ranks); to be done with
        before the next is asked for.
        """
        arrays = self._of("train").arrays
        buffers = {name: np.empty((0, *array.shape[1:]), np.float32) for name, array in arrays.items()}
        for _, batch in batches:
            rows = batch[self.session.rank :: self.session.world_size]
            for name, buffer in buffers.items():
                if len(buffer) < len(rows):
                    buffers[name] = np.empty((len(rows), *buffer.shape[1:]), np.float32)
            yield rows, {name: self._taken(array, rows, buffers[name]) for name, array in arrays.items()}

    def apply(self, split: str, rows: np.ndarray, function: Callable[[Features], Features], key: str) -> Extracted:
        """What `function`, which may overwrite them, makes of the features of these rows."""
        extracted, size = self._of(split), self.session.batch_size
        own = np.arange(self.session.rank, len(rows), self.session.world_size)
        found: dict[str, Tensor] = {}
        for places in [own[start : start + size] for start in range(0, len(own), size)] or [own]:
            features = {name: self._taken(array, rows[places]) for name, array in extracted.arrays.items()}
            for name, value in function(features).items():
                found.setdefault(name, torch.zeros(len(rows), *value.shape[1:]))[places] = value.cpu()
        arrays = {name: self.session.sum(value).numpy() for name, value in found.items()}
        return Extracted(arrays, extracted.readable[rows], extracted.digests[rows])

    def _of(self, split: str) -> Extracted:
        if split not in self._extracted:
            self._extracted[split] = extract(self.encoder, getattr(self.data, split), self.view, self.session)
        return self._extracted[split]

    def _taken(self, array: np.ndarray, rows: np.ndarray, buffer: np.ndarray | None = None) -> Tensor:
        out = None if buffer is None else buffer[: len(rows)]
        return torch.from_numpy(np.take(array, rows, axis=0, out=out, mode="clip")).to(self.session.device)


class OnlineFeatures:
    """Features of augmented images, computed for each batch; those that a function is applied to, of the evaluation's
    transform. transform: None if there is no training.
    """

    mode = "online"

    def __init__(
        self,
        encoder: Encoder,
        data: Dataset,
        view: View,
        session: Session,
        *,
        transform: Callable[[Image.Image], Tensor] | None = None,
        seed: int = 0,
    ):
        self.encoder, self.data, self.view, self.session = encoder, data, view, session
        self.transform, self.seed = transform, seed

    def readable(self, split: str) -> np.ndarray:
        """(n,) bool, all True: nothing has been read yet."""
        return np.ones(len(getattr(self.data, split)), bool)

    def batches(self, batches: Iterable[tuple[int, np.ndarray]]) -> Iterator[tuple[np.ndarray, Features]]:
        """As `CachedFeatures.batches`, without the images that can't be read."""
        where = self.encoder, self.data.train, self.view, self.session
        return online(*where, batches, self.transform, self.seed)

    def apply(self, split: str, rows: np.ndarray, function: Callable[[Features], Features], key: str) -> Extracted:
        """As `CachedFeatures.apply`; `key` names what is found in the session's folder."""
        images = getattr(self.data, split)
        images = images if len(rows) == len(images) else images.subset(rows)
        return extract(self.encoder, images, _Applied(key, self.view, function), self.session)


@dataclass(frozen=True)
class _Applied:
    """A view: a function of another view, whose streams may be one tensor and the function may overwrite them."""

    key: str
    view: View
    function: Callable[[Features], Features]

    def __call__(self, encoder: Encoder, images: Tensor) -> Features:
        features = self.view(encoder, images)
        return self.function({name: value.to(torch.float32, copy=True) for name, value in features.items()})


def source_of(
    mode: str,
    encoder: Encoder,
    data: Dataset,
    view: View,
    session: Session,
    *,
    most_cached: int,
    augmentation: Callable[[Encoder], Callable[[Image.Image], Tensor]],
    seed: int,
) -> CachedFeatures | OnlineFeatures:
    """For a mode of MODES; "auto" keeps features of at most `most_cached` bytes, of both splits together."""
    if mode == "auto":
        values = sum(map(math.prod, feature_shapes(encoder, view, session).values()))
        mode = "cached" if 4 * values * (len(data.train) + len(data.test)) <= most_cached else "online"
    if mode == "cached":
        return CachedFeatures(encoder, data, view, session)
    return OnlineFeatures(encoder, data, view, session, transform=augmentation(encoder), seed=seed)


def cropped(encoder: Encoder, **others) -> Callable[[Image.Image], Tensor]:
    """DINOv2's augmentation for its linear probe: a random crop of 0.08 to 1 of the area, and a flip. `others` are of
    timm's create_transform. The encoder's size, mean and standard deviation."""
    config = encoder.processor.config
    settings = {"scale": (0.08, 1.0), "interpolation": "bicubic", "color_jitter": None, "auto_augment": None}
    settings |= {"mean": config.mean, "std": config.std, **others}
    return optional("timm.data").create_transform(config.image_size, is_training=True, **settings)


def augmented(encoder: Encoder) -> Callable[[Image.Image], Tensor]:
    """The augmentation of AIM's and AIMv2's attentive probe. They ask for a color_jitter of 0.3 too, which timm leaves
    out beside an auto_augment.
    """
    transform = cropped(encoder, auto_augment="rand-m9-mstd0.5-inc1")
    (augment,) = (part for part in transform.transforms if hasattr(part, "ops"))
    for operation in augment.ops:
        if operation.name.startswith("Posterize"):
            operation.aug_fn = _posterize
    return transform


def _posterize(image: Image.Image, bits: int, **_) -> Image.Image:
    """timm's, which at the highest magnitude keeps 0 bits: black by earlier Pillows, an error by Pillow 13."""
    return ImageOps.posterize(image, bits) if bits else Image.new(image.mode, image.size)
