"""From a data config to batches: every one a pure function of (seed, g), for any number of ranks and workers.

g is the global sample number, B the micro-batch, N the patches of an image.
"""

import atexit
import hashlib
import itertools
import json
import logging
import signal
import weakref
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from aimv2.data.batch import Batch, Replaced
from aimv2.data.mixture import Mixture, Source
from aimv2.data.shapes import ShapesRecipe
from aimv2.data.shards import IMAGE_EXTENSIONS, DamagedMember, Sample, ShardError, Shards, expand_shards
from aimv2.data.tokenizer import Tokenizer
from aimv2.data.transforms import (
    BadImage,
    TransformConfig,
    decode_image,
    draft_size,
    eval_transform,
    train_transform,
)

logger = logging.getLogger(__name__)

MOST_ATTEMPTS = 8  # at replacing one sample
WINDOW, MOST_REPLACED = 10_000, 100  # 1 %
TRAIN, VALIDATION = 0, 1  # purposes of random numbers


@dataclass(slots=True, kw_only=True)
class DataConfig:
    """What a run is trained and validated on."""

    train: list[Source]
    validation: Source | None = None
    tokenizer: str  # path
    transform: TransformConfig = field(default_factory=TransformConfig)
    context_length: int = 77  # most tokens of a caption, EOS included
    pad_text_to_context: bool = False  # False: pad to the longest caption of the micro-batch
    workers: int = 2
    made_by: ShapesRecipe | None = None  # what writes the shards if they are missing

    def __post_init__(self):
        if not self.train:
            raise ValueError("train is empty: expected at least one source")
        if self.context_length < 1 or self.workers < 0:
            raise ValueError(
                f"context_length {self.context_length} and workers {self.workers}: expected at least 1 and 0"
            )


class BadCaption(ValueError):
    """A caption that is not where the source says. The message is a reason of a few words."""


class Example(NamedTuple):
    """One sample, before it is put into a batch."""

    sample: int
    image: Tensor  # (3, S, S)
    text: list[int]
    prefix_length: int
    replaced: list[Replaced]


class _Samples(Dataset):
    """Global sample number -> Example. `locate(g)` -> (source, number in it)."""

    def __init__(self, config: DataConfig, sources: list[Source], patch_size: int, seed: int, purpose: int):
        size = config.transform.image_size
        if size % patch_size:
            raise ValueError(f"transform.image_size {size} is not a multiple of the patch size {patch_size}")
        self.num_patches = (size // patch_size) ** 2
        if self.num_patches < 2:
            raise ValueError(
                f"an image of {size} pixels has {self.num_patches} patch of {patch_size}: expected 2 or more"
            )
        self.config, self.sources, self.seed, self.purpose = config, sources, seed, purpose
        self.tokenizer = Tokenizer(config.tokenizer)
        self.shards = [Shards(expand_shards(s.shards), _extensions(s)) for s in sources]
        self.mixture = Mixture([len(s) for s in self.shards], [s.weight for s in sources], seed)
        self._draft_size = draft_size(config.transform)

    def __getitem__(self, g: int) -> Example:
        rng = self._generator(g, 0)
        prefix_length = int(rng.integers(1, self.num_patches))
        source, number = self._locate(g)
        shards = self.shards[source]
        replaced = []
        for attempt in range(1, MOST_ATTEMPTS + 2):
            try:
                image, text = self._read(source, number, rng)
                return Example(g, image, text, prefix_length, replaced)
            except (BadImage, BadCaption, DamagedMember) as error:
                replaced.append(Replaced(g, str(error), shards.describe(number)))
            rng = self._generator(g, attempt)
            number = int(rng.integers(len(shards)))
        tried = "; ".join(f"{r.where}: {r.reason}" for r in replaced)
        raise ShardError(self.sources[source].shards, f"no usable sample in {len(replaced)} tries: {tried}")

    def collate(self, examples: list[Example]) -> Batch:
        lengths = [len(e.text) for e in examples]
        longest = self.config.context_length if self.config.pad_text_to_context else max(1, *lengths)
        text = [e.text + [self.tokenizer.pad_id] * (longest - len(e.text)) for e in examples]
        return Batch(
            image=torch.stack([e.image for e in examples]),
            text=torch.tensor(text),
            text_length=torch.tensor(lengths),
            prefix_length=torch.tensor([e.prefix_length for e in examples]),
            sample=torch.tensor([e.sample for e in examples]),
            num_patches=self.num_patches,
            replaced=[r for e in examples for r in e.replaced],
        )

    def _locate(self, g: int) -> tuple[int, int]:
        if self.purpose == VALIDATION:
            return 0, g
        source, _, number = self.mixture.locate(g)
        return source, number

    def _generator(self, g: int, attempt: int) -> np.random.Generator:
        """Philox numbers with key (seed, g); the counter's high words keep purposes and attempts apart."""
        counter = (self.purpose << 192) | (attempt << 128)
        return np.random.Generator(np.random.Philox(key=self.seed << 64 | g, counter=counter))

    def _read(self, source: int, number: int, rng: np.random.Generator) -> tuple[Tensor, list[int]]:
        sample = self.shards[source][number]
        if sample.image is None:
            raise BadImage("no image")
        captions = _captions(sample, self.sources[source].captions)
        transform = self.config.transform
        if self.purpose == VALIDATION:
            caption = captions[0]
            image = decode_image(sample.image)
            pixels = eval_transform(image, transform)
        else:
            caption = captions[int(rng.integers(len(captions)))] if len(captions) > 1 else captions[0]
            image = decode_image(sample.image, draft_size=self._draft_size)
            pixels = train_transform(image, transform, rng)
        return pixels, self.tokenizer.encode(caption, self.config.context_length)


def _extensions(source: Source) -> tuple[str, ...]:
    caption = source.captions.partition(":")[0] if source.captions else None
    return (*IMAGE_EXTENSIONS, caption) if caption else IMAGE_EXTENSIONS


def _captions(sample: Sample, where: str | None) -> Sequence[str | bytes]:
    """At least one; "" for a source of images only."""
    if where is None:
        return [""]
    if where == "txt":
        if sample.text is None:
            raise BadCaption("no txt")
        return [sample.text]
    if sample.json is None:
        raise BadCaption("no json")
    key = where.removeprefix("json:")
    try:
        value = json.loads(sample.json)[key]
    except (ValueError, RecursionError):
        raise BadCaption("damaged json") from None
    except (KeyError, TypeError):
        raise BadCaption(f"no {key!r} in json") from None
    captions = [value] if isinstance(value, str) else value
    if not isinstance(captions, list) or not captions or not all(isinstance(c, str) for c in captions):
        raise BadCaption(f"{key!r} in json is not a string or a list of them")
    return captions


class SampleCounter:
    """Counts replaced samples by reason, and ends a run whose data are not what they should be."""

    def __init__(self):
        self.by_reason: Counter[str] = Counter()
        self._recent: deque[bool] = deque(maxlen=WINDOW)

    def add(self, batch: Batch) -> None:
        """Raises ShardError once more than 100 of the last 10,000 samples of this rank had to be replaced."""
        bad = {r.sample for r in batch.replaced}
        self._recent.extend(g in bad for g in batch.sample.tolist())
        for r in batch.replaced:
            self.by_reason[r.reason] += 1
            logger.warning("sample %d replaced: %s: %s", r.sample, r.where, r.reason)
        if bad and sum(self._recent) > MOST_REPLACED:
            reasons = ", ".join(f"{reason}: {n}" for reason, n in self.by_reason.most_common())
            raise ShardError(batch.replaced[-1].where, f"over {MOST_REPLACED} of {WINDOW} samples replaced ({reasons})")


class SampleLoader(DataLoader):
    """A DataLoader whose batches pass a SampleCounter, `replaced`, in the main process."""

    def __iter__(self) -> Iterator[Batch]:
        batches = self._counted(super().__iter__())
        # An exiting interpreter stops its children by SIGTERM, which the workers ignore, and would wait for ever.
        atexit.register(_close, weakref.ref(batches))
        return batches

    def _counted(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        self.replaced = SampleCounter()
        for batch in batches:
            self.replaced.add(batch)
            yield batch


def _close(reference: weakref.ref) -> None:
    if (batches := reference()) is not None:
        batches.close()


@dataclass(slots=True, kw_only=True)
class _TrainOrder:
    """Sample numbers of one rank's micro-batches, for ever."""

    micro_batch: int
    start: int
    rank: int
    world_size: int

    def __iter__(self) -> Iterator[range]:
        for k in itertools.count():
            first = self.start + (k * self.world_size + self.rank) * self.micro_batch
            yield range(first, first + self.micro_batch)


def train_loader(
    config: DataConfig, *, patch_size: int, micro_batch: int, start: int, seed: int, rank: int, world_size: int
) -> DataLoader:
    """Endless batches from global sample `start` on; micro-batch k of a rank is g = start + (k world + rank) B + j.

    Raises:
        ShardError: a shard or its index is missing, or they disagree (see `shards.ensure_indices`).
        ValueError: the image size is not a multiple of the patch size.
    """
    samples = _Samples(config, config.train, patch_size, seed, TRAIN)
    order = _TrainOrder(micro_batch=micro_batch, start=start, rank=rank, world_size=world_size)
    return _loader(samples, order, config.workers)


def validation_loader(
    config: DataConfig,
    *,
    patch_size: int,
    micro_batch: int,
    seed: int,
    rank: int,
    world_size: int,
    limit: int | None = None,
) -> DataLoader:
    """One pass in a fixed order over the first `limit` validation samples: rank r gets r, r + world, ...; no padding."""
    if config.validation is None:
        raise ValueError("the data config has no validation source")
    samples = _Samples(config, [config.validation], patch_size, seed, VALIDATION)
    count = len(samples.shards[0])
    mine = range(rank, count if limit is None else min(limit, count), world_size)
    order = [mine[i : i + micro_batch] for i in range(0, len(mine), micro_batch)]
    return _loader(samples, order, config.workers)


def _loader(samples: _Samples, order, workers: int) -> DataLoader:
    return SampleLoader(
        samples,
        batch_sampler=order,
        collate_fn=samples.collate,
        num_workers=workers,
        worker_init_fn=_start_worker,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else iter() draws from the global one, which a resumed run would notice
    )


def _start_worker(worker: int) -> None:
    """The main process decides when to stop: a worker that died of the same signal would cost the last checkpoint."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)


def all_shards(config: DataConfig) -> list[Path]:
    """Every shard of every source."""
    sources = [*config.train, *([config.validation] if config.validation else [])]
    return [shard for source in sources for shard in expand_shards(source.shards)]


def fingerprint(config: DataConfig) -> str:
    """sha256 of all that decides the training samples but the seed. A resumed run must have the same."""
    sources = []
    for source in config.train:
        shards = Shards(expand_shards(source.shards))
        names = [
            (path.name, path.stat().st_size, digest) for path, digest in zip(shards.paths, shards.digests, strict=True)
        ]
        sources.append((source.name, source.weight, source.captions, len(shards), names))
    probe = np.random.default_rng(0).permutation(16).tolist()  # a numpy that shuffles differently changes the order
    return hashlib.sha256(repr((sources, config.transform, config.context_length, probe)).encode()).hexdigest()
