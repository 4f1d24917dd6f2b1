"""From images to the features of a frozen encoder: sharded over ranks without padding, kept on disk, resumable.

B images of a pass, S side of the prepared image, n images of a split.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as MapDataset

from aimv2.data.images import BadImage
from aimv2.evals.datasets.interface import ImageSet
from aimv2.evals.encoders.interface import Encoder
from aimv2.evals.session import Session
from aimv2.processor import Processor
from aimv2.whole_files import whole_file, write_json

CHUNK = 256  # images that are done or not done; a rank takes every world-th chunk
_DONE = np.dtype([("readable", "?"), ("digest", "<u8")])


class View(Protocol):
    """What is kept of images. `key` tells views apart in the cache."""

    key: str

    def __call__(self, encoder: Encoder, images: Tensor) -> dict[str, Tensor]:
        """Prepared images (B, 3, S, S) -> named features (B, ...)."""


@dataclass(slots=True)
class Extracted:
    """Features of a whole split, on every rank.

    arrays: (n, ...) float32 by the view's names, perhaps on disk; rows of images that could not be read are 0.
    readable: (n,) bool. digests: (n,) uint64 of the prepared pixels; equal ones are the same picture to the encoder.
    """

    arrays: dict[str, np.ndarray]
    readable: np.ndarray
    digests: np.ndarray


class _Prepared(MapDataset):
    """(row, pixels (3, S, S), readable, digest) by row, in whatever process asks."""

    def __init__(self, images: ImageSet, processor: Processor):
        self.images, self.processor = images, processor

    def __getitem__(self, row: int) -> tuple[int, Tensor, bool, int]:
        try:
            pixels = prepared(self.processor, self.images.image(row))
        except BadImage:
            side = self.processor.config.image_size
            return row, torch.zeros(3, side, side), False, 0
        digest = hashlib.blake2b(pixels.numpy().tobytes(), digest_size=8).digest()
        return row, pixels, True, int.from_bytes(digest, "little")


class _Augmented(MapDataset):
    """(row, pixels) by row; what a transform draws depends on the key and the row alone."""

    def __init__(self, images: ImageSet, transform: Callable[[Image.Image], Tensor], key: tuple[int, ...]):
        self.images, self.transform, self.key = images, transform, key

    def __getitem__(self, row: int) -> tuple[int, Tensor | None]:
        try:
            image = self.images.image(row)
        except BadImage:
            return row, None
        with keyed_randomness(*self.key, row):
            return row, self.transform(image)


def extract(encoder: Encoder, images: ImageSet, view: View, session: Session) -> Extracted:
    """The view of every image of a split, prepared as the encoder's checkpoint says.

    Raises:
        ValueError: features that are not finite, naming the image.
    """
    names = _shapes(encoder, view, session)
    store = _Store(encoder, images, view, names, session)
    chunks = [range(start, min(start + CHUNK, len(images))) for start in range(0, len(images), CHUNK)]
    todo = [chunk for chunk in chunks[session.rank :: session.world_size] if not store.is_done(chunk)]
    batches = [
        list(chunk[i : i + session.batch_size]) for chunk in todo for i in range(0, len(chunk), session.batch_size)
    ]
    loader = _loader(_Prepared(images, encoder.processor), batches, list, session)
    with session.progress(sum(map(len, todo)), "image", f"{images.name} {images.split}: {view.key}") as bar:
        for items in loader:
            rows, pixels, readable, digests = zip(*items, strict=True)
            features = _view(encoder, view, torch.stack(pixels), session)
            store.put(np.array(rows), features, np.array(readable), np.array(digests, np.uint64))
            bar.update(len(rows))
    extracted = store.finish(chunks)
    session.seen[images.identity] = extracted.readable, extracted.digests
    return extracted


def online(
    encoder: Encoder,
    images: ImageSet,
    view: View,
    session: Session,
    batches: Sequence[np.ndarray],
    transform: Callable[[Image.Image], Tensor],
    seed: int,
    epoch: int,
) -> Iterator[tuple[np.ndarray, dict[str, Tensor]]]:
    """Views of augmented images, for features that can't be kept: (rows, features) for each of `batches`.

    A batch holds the rows of all ranks; this one gets `batch[rank::world_size]`, without the images that can't be read,
    which may be none. What the transform draws depends on (seed, epoch, row): neither on ranks nor on workers.
    """
    shares = [batch[session.rank :: session.world_size].tolist() for batch in batches]
    names = _shapes(encoder, view, session)
    loader = _loader(_Augmented(images, transform, (seed, epoch)), shares, _without_missing, session)
    for items in loader:
        if not items:
            empty = {name: torch.zeros(0, *shape, device=session.device) for name, shape in names.items()}
            yield np.zeros(0, np.int64), empty
            continue
        rows, pixels = zip(*items, strict=True)
        parts = [_view(encoder, view, part, session) for part in torch.stack(pixels).split(session.batch_size)]
        yield np.array(rows), {name: torch.cat([part[name] for part in parts]) for name in names}


def _loader(images: MapDataset, batches: list[list[int]], collate: Callable, session: Session) -> DataLoader:
    """With a generator of its own: an epoch draws a number, which must not come from that of a run in progress."""
    return DataLoader(
        images,
        batch_sampler=batches,
        num_workers=session.workers,
        collate_fn=collate,
        generator=torch.Generator(),
    )


def _without_missing(items: list[tuple[int, Tensor | None]]) -> list[tuple[int, Tensor]]:
    return [item for item in items if item[1] is not None]


def _view(encoder: Encoder, view: View, pixels: Tensor, session: Session) -> dict[str, Tensor]:
    with torch.no_grad():
        return {name: value.float() for name, value in view(encoder, pixels.to(session.device)).items()}


def _shapes(encoder: Encoder, view: View, session: Session) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an image's features."""
    side = encoder.processor.config.image_size
    features = _view(encoder, view, torch.zeros(1, 3, side, side), session)
    return {name: tuple(value.shape[1:]) for name, value in features.items()}


class _Store:
    """Arrays for a split's features: files of the session's folder, or memory."""

    def __init__(
        self, encoder: Encoder, images: ImageSet, view: View, shapes: dict[str, tuple[int, ...]], session: Session
    ):
        self.session, self.keys, self.count = session, images.keys, len(images)
        self.done = np.zeros(self.count, _DONE)
        self.folder = None
        if session.folder is None:
            self.arrays = {name: np.zeros((self.count, *shape), np.float32) for name, shape in shapes.items()}
            return
        description = {"encoder": encoder.describe(), "images": images.pictures, "view": view.key}
        self.folder = session.folder / "features" / fingerprint(description)
        if session.rank == 0:
            self._create(shapes, description)
        session.wait()
        self.arrays = {name: np.load(self.folder / f"{name}.npy", mmap_mode="r+") for name in shapes}

    def is_done(self, chunk: range) -> bool:
        """Whether an earlier run has these rows already."""
        return self.folder is not None and self._mark(chunk).exists()

    def put(self, rows: np.ndarray, features: dict[str, Tensor], readable: np.ndarray, digests: np.ndarray) -> None:
        """Rows in rising order; the last row of a chunk marks it as done."""
        for name, value in features.items():
            value = value.cpu().numpy()
            finite = np.isfinite(value).reshape(len(rows), -1).all(axis=1) | ~readable
            if not finite.all():
                key = self.keys[int(rows[np.argmin(finite)])]
                raise ValueError(f"the encoder's features of {key} are not finite: expected numbers")
            value[~readable] = 0
            self.arrays[name][rows] = value
        self.done["readable"][rows], self.done["digest"][rows] = readable, digests
        last = int(rows[-1])
        if self.folder is not None and (last % CHUNK == CHUNK - 1 or last == self.count - 1):
            for array in self.arrays.values():
                array.flush()
            chunk = range(last // CHUNK * CHUNK, last + 1)
            with whole_file(self._mark(chunk)) as path:
                path.write_bytes(self.done[chunk.start : chunk.stop].tobytes())

    def finish(self, chunks: Sequence[range]) -> Extracted:
        """What all ranks have put."""
        self.session.wait()
        if self.folder is None:
            for name, array in self.arrays.items():
                self.arrays[name] = self.session.sum(torch.from_numpy(array)).numpy()
            done = self.session.sum(torch.from_numpy(self.done.view(np.uint8))).numpy().view(_DONE)
        else:
            done = np.concatenate([np.frombuffer(self._mark(chunk).read_bytes(), _DONE) for chunk in chunks])
            self.arrays = {name: np.load(self.folder / f"{name}.npy", mmap_mode="r") for name in self.arrays}
        return Extracted(self.arrays, done["readable"].copy(), done["digest"].copy())

    def _create(self, shapes: dict[str, tuple[int, ...]], description: dict) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, shape in shapes.items():
            path = self.folder / f"{name}.npy"
            if not path.exists():
                with whole_file(path) as temporary:
                    np.lib.format.open_memmap(temporary, "w+", np.float32, (self.count, *shape)).flush()
        write_json(self.folder / "description.json", description)

    def _mark(self, chunk: range) -> Path:
        return self.folder / f"done_{chunk.start:09d}"


def prepared(processor: Processor, image: Image.Image) -> Tensor:
    """(3, S, S). Raises BadImage for a size that can't be prepared, such as 1 x 1,000."""
    try:
        return processor(image).pixel_values[0]
    except ValueError as error:
        raise BadImage(str(error)) from error


def fingerprint(description: dict) -> str:
    """16 hexadecimal digits that tell JSON descriptions apart."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def keyed_randomness(*key: int) -> Iterator[None]:
    """Python's, numpy's and torch's generators from a key; afterwards each goes on as if nothing had been drawn."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = np.random.SeedSequence(key).generate_state(1, np.uint32).item()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
