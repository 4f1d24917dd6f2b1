"""The class of each patch, from masks or from boxes, where the processor puts it.

n images, h x w cells of a grid over what the encoder sees of an image, N = h*w, C classes.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as MapDataset

from aimv2.data.images import BadImage
from aimv2.evals.datasets.interface import Box, Dataset, ImageSet
from aimv2.evals.session import Session
from aimv2.preprocessing import ProcessorConfig

BACKGROUND = "background"
IGNORED = -1  # the label of a patch that does not count
NOT_COUNTED = 255  # in a mask
WHOLE = (0.0, 0.0, 1.0, 1.0)
SAMPLED = 16  # places along a side of a cell at which a mask is looked up


def patch_classes(data: Dataset) -> tuple[str, ...]:
    """What patches may be: the classes of the masks, or the background and then the classes of the boxes.

    Raises ValueError for data with neither.
    """
    splits = [images for images in (data.train, data.test) if images is not None]
    if all(images.has_masks for images in splits):
        return data.classes
    if all(images.has_boxes for images in splits):
        return (BACKGROUND, *data.classes)
    raise ValueError(f"{data.spec} has neither masks nor boxes: no labels for patches")


def visible_part(config: ProcessorConfig, width: int, height: int) -> Box:
    """What the processor keeps of an image of width x height pixels: xyxy as shares of its sides.

    Raises ValueError for native preprocessing, which has no square result.
    """
    if config.resize == "native":
        raise ValueError("native preprocessing: expected a processor with an image_size")
    resized_width = resized_height = config.resize_size
    if config.resize == "shortest_edge" and width < height:
        resized_height = int(resized_height * height / width)
    elif config.resize == "shortest_edge":
        resized_width = int(resized_width * width / height)
    margins = (resized_width - config.image_size, resized_height - config.image_size)
    left, top = (margin // 2 if config.crop_rounding == "down" else round(margin / 2) for margin in margins)
    right, bottom = left + config.image_size, top + config.image_size
    return left / resized_width, top / resized_height, right / resized_width, bottom / resized_height


def labels_from_boxes(boxes: list[tuple[int, Box]], part: Box, grid: tuple[int, int]) -> np.ndarray:
    """(N,): 1 + the class of the box that covers a cell's centre, the smallest if several do; else 0, background."""
    x, y = _centres(part[0], part[2], grid[1]), _centres(part[1], part[3], grid[0])
    labels = np.zeros(grid, np.int64)
    for number, (x0, y0, x1, y1) in sorted(boxes, key=lambda entry: -_area(entry[1])):
        labels[np.ix_((y0 <= y) & (y < y1), (x0 <= x) & (x < x1))] = number + 1
    return labels.ravel()


def labels_from_mask(mask: np.ndarray, part: Box, grid: tuple[int, int], classes: int) -> np.ndarray:
    """(H, W) uint8 -> (N,): the class that most of a cell has, the lowest of equals; -1 where no pixel counts.

    Raises ValueError for a class that is not there.
    """
    x, y = (_centres(part[i], part[i + 2], grid[1 - i] * SAMPLED) for i in range(2))
    rows, columns = (y * mask.shape[0]).astype(np.int64), (x * mask.shape[1]).astype(np.int64)
    seen = mask[np.ix_(rows, columns)].astype(np.int64)  # (h * SAMPLED, w * SAMPLED)
    counted = seen != NOT_COUNTED
    if counted.any() and seen[counted].max() >= classes:
        raise ValueError(f"class {seen[counted].max()} in a mask: expected 0 to {classes - 1}, or {NOT_COUNTED}")
    seen = seen.reshape(grid[0], SAMPLED, grid[1], SAMPLED).swapaxes(1, 2).reshape(-1, SAMPLED**2)  # (N, places)
    counted = seen != NOT_COUNTED
    cells = np.broadcast_to(np.arange(len(seen))[:, None], seen.shape)
    votes = np.bincount(cells[counted] * classes + seen[counted], minlength=len(seen) * classes)
    votes = votes.reshape(len(seen), classes)
    return np.where(votes.any(axis=1), votes.argmax(axis=1), IGNORED)


def patch_labels(
    images: ImageSet, config: ProcessorConfig, grid: tuple[int, int], classes: int, session: Session
) -> np.ndarray:
    """(n, N) int64, on every rank. An image whose mask can't be read has -1 everywhere.

    Of an image that can't be read it is not known what the encoder would see: it is taken as a whole.
    """
    labels = np.zeros((len(images), grid[0] * grid[1]), np.int64)
    rows = range(session.rank, len(images), session.world_size)
    loader = DataLoader(
        _Labelled(images, config, grid, classes), sampler=rows, batch_size=None, num_workers=session.workers
    )
    with session.progress(len(rows), "image", f"{images.name} {images.split}: labels of patches") as bar:
        for row, of_image in zip(rows, loader, strict=True):
            labels[row] = of_image
            bar.update(1)
    return session.sum(torch.from_numpy(labels)).numpy()


@dataclass
class _Labelled(MapDataset):
    """(N,) by row, in whatever process asks."""

    images: ImageSet
    config: ProcessorConfig
    grid: tuple[int, int]
    classes: int

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> np.ndarray:
        if not self.images.has_masks:
            return labels_from_boxes(self.images.boxes(row), self._part(row), self.grid)
        try:
            mask = np.asarray(self.images.mask(row))
            return labels_from_mask(mask, self._part(row), self.grid, self.classes)
        except BadImage:
            return np.full(self.grid[0] * self.grid[1], IGNORED)
        except ValueError as error:
            raise ValueError(f"{self.images.keys[row]}: {error}") from error

    def _part(self, row: int) -> Box:
        if self.config.resize == "squash":  # whatever the image's size
            return visible_part(self.config, 1, 1)
        try:
            return visible_part(self.config, *self.images.image(row).size)
        except BadImage:
            return WHOLE


def _centres(low: float, high: float, count: int) -> np.ndarray:
    """(count,): the middles of equal parts of low to high."""
    return low + (np.arange(count) + 0.5) / count * (high - low)


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
