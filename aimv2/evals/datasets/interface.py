"""What an evaluation sees of a dataset: classes, and for each split images, labels, captions and names, by row.

n images of a split, C classes.
"""

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from aimv2.data.images import BadImage
from aimv2.processor import read_image

Box = tuple[float, float, float, float]  # xyxy as shares of the image's sides, origin at the top left


class Texts(Sequence[str]):
    """Many short texts in two arrays: 14 million keys take a tenth of what a list of them would."""

    def __init__(self, texts: Iterable[str]):
        joined, ends = bytearray(), array("Q")
        for text in texts:
            try:
                joined += text.encode("utf-8", "surrogateescape")
            except UnicodeEncodeError:
                raise ValueError(f"{text!r}: no file can have this name") from None
            ends.append(len(joined))
        self._joined = np.frombuffer(joined, np.uint8)
        self._ends = np.array(ends, np.uint32 if len(joined) < 2**32 else np.uint64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, row: int) -> str:
        row = range(len(self))[row]
        begin = int(self._ends[row - 1]) if row else 0
        return self._joined[begin : int(self._ends[row])].tobytes().decode("utf-8", "surrogateescape")

    @property
    def digest(self) -> str:
        """sha256 of the texts and of where each ends."""
        digest = hashlib.sha256(self._joined)
        digest.update(self._ends.astype(np.uint64))
        return digest.hexdigest()


class ImageSet:
    """The images of one split. Can be pickled, for the processes that decode images.

    Args:
        name: of the dataset.
        split: as the dataset calls it.
        images: by row what `processor.read_image` takes; raises BadImage for what is not there.
        keys: a name for each image, a path relative to the dataset where there is one.
        digest: of the keys and the contents of the images, or of what stands for these, such as sizes.
        labels: numbers of classes, or None.
        captions: by row, or None.
        boxes: by row (class, box) of each object, or None.
        masks: by row an image of a class for each pixel, or None.
        rows: which of all this is in the set; None: everything.

    Attributes:
        labels: (n,) int64, or None.
        identity: a hex digest of keys, labels and contents. Sets with the same one are the same.
        pictures: the same without the labels.
    """

    def __init__(
        self,
        *,
        name: str,
        split: str,
        images: Sequence[Any],
        keys: Sequence[str],
        digest: str,
        labels: Sequence[int] | np.ndarray | None = None,
        captions: Sequence[list[str]] | None = None,
        boxes: Sequence[list[tuple[int, Box]]] | None = None,
        masks: Sequence[Image.Image] | None = None,
        rows: np.ndarray | None = None,
    ):
        self.name, self.split = name, split
        self._whole = {"images": images, "keys": keys, "captions": captions, "boxes": boxes, "masks": masks}
        self._digest, self._rows = digest, rows
        self._labels = None if labels is None else np.asarray(labels, np.int64)
        for what, column in {**self._whole, "labels": self._labels}.items():
            if column is not None and len(column) != len(keys):
                raise ValueError(f"{name} {split}: {len(column)} {what} for {len(keys)} keys")
        self.keys: Sequence[str] = self._of("keys")
        self.captions: Sequence[list[str]] | None = self._of("captions")
        self.labels = self._labels if rows is None or labels is None else self._labels[rows]
        self.identity, self.pictures = self._identity(self._labels), self._identity(None)

    def __len__(self) -> int:
        return len(self.keys)

    def __repr__(self) -> str:
        return f"ImageSet({self.name} {self.split}, {len(self)} images)"

    def image(self, i: int) -> Image.Image:
        """An upright RGB image.

        Raises:
            BadImage: it is missing or damaged.
            OSError: the disk fails, which is not the image's fault.
            ShardError: the shard that it is in was replaced.
        """
        source = self._whole["images"][self._row(i)]
        try:
            return read_image(source)
        except BadImage:
            raise
        except ValueError as error:
            raise BadImage(str(error)) from error

    @property
    def has_boxes(self) -> bool:
        return self._whole["boxes"] is not None

    @property
    def has_masks(self) -> bool:
        return self._whole["masks"] is not None

    def boxes(self, i: int) -> list[tuple[int, Box]]:
        """(class, box) of each object in an image. Raises ValueError if none are known."""
        return self._known("boxes")[self._row(i)]

    def mask(self, i: int) -> Image.Image:
        """An image of mode "L": the class of each pixel, 255 for those that don't count.

        Raises:
            BadImage: it is missing or damaged.
            ValueError: no masks are known, or this one is not of the image's shape.
        """
        return self._known("masks")[self._row(i)]

    def subset(self, rows: Sequence[int] | np.ndarray) -> "ImageSet":
        """These rows, in this order. Raises IndexError for one that isn't there, ValueError for what is no number."""
        rows = np.asarray(rows)
        if rows.size and rows.dtype.kind not in "iu":
            raise ValueError(f"rows of type {rows.dtype}, expected the numbers of rows")
        rows = rows.astype(np.int64)
        if rows.size and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of {len(self)}")
        rows = rows if self._rows is None else self._rows[rows]
        whole = np.array_equal(rows, np.arange(len(self._whole["keys"])))
        return ImageSet(
            name=self.name,
            split=self.split,
            digest=self._digest,
            labels=self._labels,
            rows=None if whole else rows,
            **self._whole,
        )

    def _row(self, i: int) -> int:
        i = range(len(self))[i]
        return i if self._rows is None else int(self._rows[i])

    def _of(self, what: str) -> Sequence | None:
        column = self._whole[what]
        return column if column is None or self._rows is None else _Picked(column, self._rows)

    def _known(self, what: str) -> Sequence:
        if self._whole[what] is None:
            raise ValueError(f"{self.name} {self.split} has no {what}")
        return self._whole[what]

    def _identity(self, labels: np.ndarray | None) -> str:
        digest = hashlib.sha256(self._digest.encode())
        for column in (labels, self._rows):
            digest.update(b"none" if column is None else column.astype("<i8").tobytes())
        return digest.hexdigest()


class _Picked(Sequence):
    """Some rows of a sequence."""

    def __init__(self, column: Sequence, rows: np.ndarray):
        self.column, self.rows = column, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Any:
        return self.column[int(self.rows[i])]


@dataclass(slots=True, kw_only=True)
class Dataset:
    """What `open_dataset` returns.

    Raises:
        ValueError: a label that is no class; a split without images.
    """

    spec: str
    name: str
    classes: tuple[str, ...]  # none, where there are captions only
    train: ImageSet | None
    test: ImageSet
    templates: tuple[str, ...] | None = None  # for zero-shot classification, "{}" is the class
    report: dict = field(default_factory=dict)  # what was counted and noticed, as JSON

    def __post_init__(self):
        for split, images in (("training", self.train), ("test", self.test)):
            if images is None:
                continue
            if not len(images):
                raise ValueError(f"{self.spec}: no {split} images")
            if images.labels is None or not self.classes:
                continue
            if images.labels.min() < 0 or images.labels.max() >= len(self.classes):
                row = int(np.argmax((images.labels < 0) | (images.labels >= len(self.classes))))
                raise ValueError(
                    f"{self.spec}: {images.keys[row]} has label {images.labels[row]}, "
                    f"expected 0 to {len(self.classes) - 1}"
                )
            counts = np.bincount(images.labels, minlength=len(self.classes))
            empty = [self.classes[number] for number in np.flatnonzero(counts == 0)]
            self.report = {**self.report, f"classes_without_{split}_images": empty}


def held_out(labels: Sequence[int] | np.ndarray, share: float = 0.1, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(rows to train on, rows held out), each rising; the same for the same arguments.

    Of each class its share is held out, rounded up or down for the total, and never all of it: classes of one member
    are trained on. Where most rows are the only ones of their class, these together are treated as one class: otherwise
    less than half of the share could be held out.

    Args:
        labels: (n,) at least 2; any integers.
        share: between 0 and 1, of the rows of classes with several members. At least one row is held out.
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or len(labels) < 2 or not 0 < share < 1:
        raise ValueError(f"labels {labels.shape}, share {share}: expected 2 rows or more, a share between 0 and 1")
    rng = np.random.default_rng(seed)
    _, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    alone = counts == 1
    if 2 * np.sum(alone) > len(labels):
        classes = np.where(alone, 0, np.cumsum(~alone))[classes]
        counts = np.bincount(classes)
    quota = np.where(counts > 1, share * counts, 0)
    taken = np.minimum(np.floor(quota).astype(np.int64), counts - 1)
    missing = max(1, round(quota.sum())) - taken.sum()
    wish = np.where(taken < counts - 1, quota - taken, 0)  # by largest remainder, ties by lot
    order = np.lexsort((rng.random(len(wish)), -wish))
    best = order[: max(missing, 0)]
    taken[best[wish[best] > 0]] += 1
    shuffled = np.lexsort((rng.random(len(labels)), classes))  # by class, in each by lot
    place = np.empty(len(labels), np.int64)  # of each row in its class
    place[shuffled] = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    out = place < taken[classes]
    return np.flatnonzero(~out), np.flatnonzero(out)
