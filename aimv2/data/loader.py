"""From a data config to batches: every one a pure function of (seed, g), for any number of ranks and workers.

g is the global sample number, B the micro-batch, N the patches of an image.
"""

import atexit
import itertools
import logging
import multiprocessing
import os
import signal
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch.utils.data import DataLoader

from aimv2.data.batch import Batch
from aimv2.data.mixture import MixtureChange, Source, weights_over_time
from aimv2.data.native import NativeConfig, NativeOrder, SizedSample, patch_budget
from aimv2.data.remote import RemoteConfig
from aimv2.data.samples import Samples
from aimv2.data.shapes import ShapesRecipe
from aimv2.data.tar import ShardError
from aimv2.data.tokenizer import open_tokenizer
from aimv2.data.transforms import TransformConfig

logger = logging.getLogger(__name__)

WINDOW, MOST_REPLACED = 10_000, 100  # 1 %


@dataclass(slots=True, kw_only=True)
class DataConfig:
    """What a run is trained and validated on."""

    train: list[Source]
    changes: list[MixtureChange] = field(default_factory=list)  # of the weights, in mid-run
    validation: Source | None = None
    remote: RemoteConfig | None = None  # what may be read from elsewhere; None: local files only
    tokenizer: str  # path, or "clip" for CLIP's byte pairs
    transform: TransformConfig = field(default_factory=TransformConfig)
    native: NativeConfig | None = None  # None: every image at transform.image_size
    context_length: int = 77  # most tokens of a caption, EOS included
    pad_text_to_context: bool = False  # False: pad to the longest caption of the micro-batch
    workers: int = 2
    made_by: ShapesRecipe | None = None  # what writes the shards if they are missing

    def __post_init__(self):
        if not self.train:
            raise ValueError("train is empty: expected at least one source")
        weights_over_time(self.train, self.changes)
        if self.context_length < 1 or self.workers < 0:
            raise ValueError(
                f"context_length {self.context_length} and workers {self.workers}: expected at least 1 and 0"
            )
        if self.native is not None and self.transform.crop_scale is not None:
            raise ValueError(
                f"transform.crop_scale {self.transform.crop_scale} with native: expected None, for whole images"
            )


class SampleCounter:
    """Counts replaced samples by reason, and ends a run whose data are not what they should be."""

    def __init__(self):
        self.by_reason: Counter[str] = Counter()
        self._recent: deque[bool] = deque(maxlen=WINDOW)

    def add(self, batch: Batch) -> None:
        """Count one batch.

        Raises:
            ShardError: more than 100 of this rank's last 10,000 samples were replaced, in a row or not.
        """
        bad = {r.sample for r in batch.replaced}
        self._recent.extend(g in bad for g in batch.sample.tolist())
        for r in batch.replaced:
            self.by_reason[r.reason] += 1
            count = self.by_reason[r.reason]
            if count & (count - 1) == 0:  # 1, 2, 4, 8, ...: not a line for each
                logger.warning("replaced sample %d: %s: %s (%d so far)", r.sample, r.where, r.reason, count)
        if bad and sum(self._recent) > MOST_REPLACED:
            reasons = ", ".join(f"{reason}: {n}" for reason, n in self.by_reason.most_common())
            raise ShardError(f"over {MOST_REPLACED} of {WINDOW} samples had to be replaced ({reasons})")


class SampleLoader(DataLoader):
    """A DataLoader whose batches pass a SampleCounter, `replaced`, in the main process.

    Of training, `order.samples(first_batch, number)` says how many samples are in so many micro-batches of all ranks.
    """

    @property
    def order(self) -> "_TrainOrder | NativeOrder":
        return self.batch_sampler

    def __iter__(self) -> Iterator[Batch]:
        self.replaced = SampleCounter()
        try:
            for batch in super().__iter__():
                self.replaced.add(batch)
                yield batch
        except ShardError as error:  # from a worker it comes with the worker's traceback in its message
            raise ShardError(str(error).rstrip().rpartition("ShardError: ")[2]) from error


@dataclass(slots=True, kw_only=True)
class _TrainOrder:
    """Sample numbers of one rank's micro-batches, for ever."""

    micro_batch: int
    start: int
    rank: int
    world_size: int

    def samples(self, first_batch: int, number: int) -> int:
        """As `NativeOrder.samples`."""
        return number * self.micro_batch

    def __iter__(self) -> Iterator[range]:
        for k in itertools.count():
            first = self.start + (k * self.world_size + self.rank) * self.micro_batch
            yield range(first, first + self.micro_batch)


def train_loader(
    config: DataConfig,
    *,
    patch_size: int,
    micro_batch: int,
    start: int,
    seed: int,
    rank: int,
    world_size: int,
    first_batch: int = 0,
) -> SampleLoader:
    """Endless batches from global sample `start` on; micro-batch k of a rank is g = start + (k world + rank) B + j.

    Native: micro-batches have the patches, not the images, of `micro_batch` images of the transform's size, and
    micro-batch k of a rank is number first_batch + k world + rank of all, see `NativeOrder`. A run goes on with as many
    samples and micro-batches as all ranks together have had.

    Raises:
        ShardError: a shard or its index is missing, or they disagree (see `shards.ensure_indices`).
        ValueError: the image size is not a multiple of the patch size.
    """
    samples = _samples(config, config.train, changes=config.changes, patch_size=patch_size, seed=seed, training=True)
    if rank == 0 and len(config.train) > 1:
        for since, shares in samples.mixture.shares:
            parts = (f"{s.name} {share / sum(shares):.4%}" for s, share in zip(config.train, shares, strict=True))
            logger.info("from sample %d on: %s", since, ", ".join(parts))
    place = {"start": start, "rank": rank, "world_size": world_size}
    if config.native is None:
        order = _TrainOrder(micro_batch=micro_batch, **place)
    else:
        budget = patch_budget(micro_batch, config.transform.image_size, patch_size)
        if rank == 0 and config.native.max_patches > budget:
            words = "native: images of up to %d patches, one by one, exceed a micro-batch of %d, %d images of %d pixels"
            logger.warning(words, config.native.max_patches, budget, micro_batch, config.transform.image_size)
        order = NativeOrder(config=config.native, budget=budget, seed=seed, first_batch=first_batch, **place)
    return _loader(samples, order, config.workers, persistent=True)


def validation_loader(
    config: DataConfig,
    *,
    patch_size: int,
    micro_batch: int,
    seed: int,
    rank: int,
    world_size: int,
    limit: int | None = None,
    area: int | None = None,
) -> SampleLoader:
    """One pass in fixed order over the first `limit` validation samples: rank r gets r, r + world, ...; no padding.

    With an area, at most so many patches an image, they are whole and come as strips; without one they do if the
    config is native, with as many patches as a square image of the transform's size.
    """
    if config.validation is None:
        raise ValueError("the data config has no validation source")
    if area is not None and area < 2:
        raise ValueError(f"area {area}: expected 2 patches or more")
    samples = _samples(config, [config.validation], patch_size=patch_size, seed=seed, training=False)
    if area is None and config.native is not None:
        area = samples.num_patches
    count = len(samples.shards[0])
    mine = range(rank, count if limit is None else min(limit, count), world_size)
    order = [mine[i : i + micro_batch] for i in range(0, len(mine), micro_batch)]
    if area is not None:
        order = [[SizedSample(g, area) for g in numbers] for numbers in order]
    return _loader(samples, order, min(config.workers, len(order)), persistent=False)


def _samples(config: DataConfig, sources: list[Source], **place) -> Samples:
    return Samples(
        sources,
        config.transform,
        open_tokenizer(config.tokenizer),
        context_length=config.context_length,
        pad_text_to_context=config.pad_text_to_context,
        remote=config.remote,
        **place,
    )


def _loader(
    samples: Samples, order: Iterable[Sequence[int | SizedSample]], workers: int, persistent: bool
) -> SampleLoader:
    leaving = multiprocessing.RawValue("b", False)  # shared with the workers
    atexit.register(setattr, leaving, "value", True)
    return SampleLoader(
        samples,
        batch_sampler=order,
        collate_fn=samples.collate,
        num_workers=workers,
        worker_init_fn=partial(_start_worker, leaving),
        persistent_workers=persistent and workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else iter() draws from the global one, which a resumed run would notice
    )


def _start_worker(leaving, worker: int) -> None:
    """Let the main process decide when to stop: with a worker that dies of the same signal the last save would be lost.

    An exiting interpreter ends its children by SIGTERM and waits for them, so then it must not be ignored.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if leaving.value else None)
    torch.set_num_threads(1)
