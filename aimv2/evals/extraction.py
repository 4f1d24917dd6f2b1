"""From images to the features of a frozen encoder: sharded over ranks without padding, kept on disk, resumable.

B images of a pass, S side of the prepared image, n images of a split.
"""

import hashlib
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
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
from aimv2.evals.feature_store import CHUNK, VERSION, Extracted, FileStore, MemoryStore, fingerprint
from aimv2.evals.session import Session
from aimv2.processor import Processor


class View(Protocol):
    """What is kept of images. `key` tells views apart in the cache."""

    key: str

    def __call__(self, encoder: Encoder, images: Tensor) -> dict[str, Tensor]:
        """Prepared images (B, 3, S, S) -> named features (B, ...)."""


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
    """(row, pixels) by (epoch, row); what a transform draws depends on these and the seed alone."""

    def __init__(self, images: ImageSet, transform: Callable[[Image.Image], Tensor], seed: int):
        self.images, self.transform, self.seed = images, transform, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, Tensor | None]:
        epoch, row = key
        try:
            image = self.images.image(row)
        except BadImage:
            return row, None
        with keyed_randomness(self.seed, epoch, row):
            return row, self.transform(image)


def extract(encoder: Encoder, images: ImageSet, view: View, session: Session) -> Extracted:
    """The view of every image of a split, prepared as the encoder's checkpoint says.

    Raises:
        ValueError: features that are not finite, naming the image; a split of which no image can be read.
    """
    shapes, count = feature_shapes(encoder, view, session), len(images)
    if session.folder is None:
        store = MemoryStore(shapes, count, session)
    else:
        made_of = {"encoder": encoder.describe(), "images": images.pictures, "view": view.key, "version": VERSION}
        folder = session.folder / "features" / fingerprint(made_of)
        store = FileStore(folder, made_of, shapes, count, session)
    chunks = [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
    todo = [chunk for chunk in chunks[session.rank :: session.world_size] if not store.is_done(chunk)]
    if todo:
        _extract_chunks(encoder, images, view, session, store, todo)
    extracted = store.finish(chunks)
    if not extracted.readable.any():
        raise ValueError(f"{images.name} {images.split}: none of {count} images can be read, as {images.keys[0]}")
    session.seen[images.identity] = extracted.readable, extracted.digests
    return extracted


def _extract_chunks(
    encoder: Encoder,
    images: ImageSet,
    view: View,
    session: Session,
    store: MemoryStore | FileStore,
    chunks: Sequence[range],
) -> None:
    size = session.batch_size
    batches = [list(chunk[start : start + size]) for chunk in chunks for start in range(0, len(chunk), size)]
    loader = _loader(_Prepared(images, encoder.processor), batches, list, session)
    passed: list[tuple] = []  # (features, readable, digests) of the chunk's batches so far
    with session.progress(sum(map(len, chunks)), "image", f"{images.name} {images.split}: {view.key}") as bar:
        for items in loader:
            rows, pixels, readable, digests = zip(*items, strict=True)
            features = _view(encoder, view, torch.stack(pixels), session)
            passed.append((_checked(features, readable, rows, images.keys), readable, digests))
            if rows[-1] == chunks[0][-1]:
                parts, readable, digests = zip(*passed, strict=True)
                arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
                store.put(chunks[0], arrays, sum(readable, ()), sum(digests, ()))
                chunks, passed = chunks[1:], []
            bar.update(len(items))


def _checked(
    features: dict[str, Tensor], readable: Sequence[bool], rows: Sequence[int], keys: Sequence[str]
) -> dict[str, np.ndarray]:
    """On the CPU, and 0 where an image could not be read. Raises ValueError for what is not finite."""
    missing = ~np.array(readable)
    arrays = {name: value.cpu().numpy() for name, value in features.items()}
    for array in arrays.values():
        array[missing] = 0
        finite = np.isfinite(array).reshape(len(rows), -1).all(axis=1)
        if not finite.all():
            key = keys[rows[int(np.argmin(finite))]]
            raise ValueError(f"the encoder's features of {key} are not finite: expected numbers")
    return arrays


def online(
    encoder: Encoder,
    images: ImageSet,
    view: View,
    session: Session,
    batches: Iterable[tuple[int, np.ndarray]],
    transform: Callable[[Image.Image], Tensor],
    seed: int,
) -> Iterator[tuple[np.ndarray, dict[str, Tensor]]]:
    """Views of augmented images, for features that can't be kept: (rows, features) for each of `batches`.

    A batch is an epoch and the rows of all ranks; this one gets `rows[rank::world_size]`, without the images that can't
    be read, which may be none. What the transform draws depends on (seed, epoch, row): neither on ranks nor on workers.
    No two streams share memory. The processes that decode start once, for all epochs, and are handed no more than
    `session.batch_size` images at a time.
    """
    shapes, size = feature_shapes(encoder, view, session), session.batch_size
    lengths: deque[int] = deque()  # in parts, of the batches that the loader has begun

    def parts() -> Iterator[list[tuple[int, int]]]:
        for epoch, batch in batches:
            share = [(epoch, row) for row in batch[session.rank :: session.world_size].tolist()]
            cut = [share[start : start + size] for start in range(0, len(share), size)] or [[]]
            lengths.append(len(cut))
            yield from cut

    loaded = iter(_loader(_Augmented(images, transform, seed), parts(), _without_missing, session))
    for first in loaded:
        rows: list[int] = []
        features = {name: [torch.zeros(0, *shape, device=session.device)] for name, shape in shapes.items()}
        for part in chain([first], islice(loaded, lengths.popleft() - 1)):
            if part:
                numbers, pixels = zip(*part, strict=True)
                rows += numbers
                for name, value in _view(encoder, view, torch.stack(pixels), session).items():
                    features[name].append(value)
        yield np.array(rows, np.int64), {name: torch.cat(values) for name, values in features.items()}


def _loader(images: MapDataset, batches: Iterable[list], collate: Callable, session: Session) -> DataLoader:
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


def feature_shapes(encoder: Encoder, view: View, session: Session) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an image's features."""
    side = encoder.processor.config.image_size
    features = _view(encoder, view, torch.zeros(1, 3, side, side), session)
    return {name: tuple(value.shape[1:]) for name, value in features.items()}


def prepared(processor: Processor, image: Image.Image) -> Tensor:
    """(3, S, S). Raises BadImage for a size that can't be prepared, such as 1 x 1,000."""
    try:
        return processor(image).pixel_values[0]
    except ValueError as error:
        raise BadImage(str(error)) from error


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
