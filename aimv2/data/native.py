"""Native resolution: images that keep their aspect ratio, every micro-batch at an area of its own.

A is the area, the most patches of an image, C the patches of a micro-batch (its budget), m the number of a micro-batch
counted over all ranks, g the global sample number, P the patch side, r x c patches, n = r*c.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np


@dataclass(slots=True, kw_only=True)
class NativeConfig:
    """Areas of the micro-batches. The defaults are AIMv2's (paper, native resolution).

    Micro-batches of unlike areas have as many patches but, for attention and captions, some take half as long again as
    others. Ranks that work on them at once wait for the longest; with `shared_by` a multiple of the ranks they don't.
    """

    min_patches: int = 128
    max_patches: int = 4096
    shared_by: int = 1  # micro-batches, counted over all ranks, that have one area

    def __post_init__(self):
        if self.shared_by < 1:
            raise ValueError(f"shared_by {self.shared_by}: expected 1 or more")
        if not 2 <= self.min_patches <= self.max_patches <= 1 << 20:
            raise ValueError(
                f"min_patches {self.min_patches}, max_patches {self.max_patches}: expected 2 <= min <= max <= 2^20"
            )


class SizedSample(NamedTuple):
    """What a sample is asked for by where its size isn't always the same."""

    sample: int  # g
    area: int  # A


def patch_budget(micro_batch: int, image_size: int, patch_size: int) -> int:
    """C: what `micro_batch` square images of `image_size` pixels have."""
    return micro_batch * (image_size // patch_size) ** 2


def area_grid(height: int, width: int, area: int) -> tuple[int, int]:
    """(rows, columns), at most `area` patches in all, for an image of height x width (pixels, or anything).

    Of all such grids it is the one that holds the image largest with its aspect ratio kept; the image is then stretched
    to fill it. Of two that are as good, the one of more patches.

    `processor.native_grid` is for one image by itself, which keeps its size where the limits allow it; here all images
    of a micro-batch are brought to one area, so that they have nearly as many patches.
    """
    # At A patches the image would be r* x c* with r*^2 = A height / width, and fits in r x c at the scale
    # min(r / r*, c / c*), which is in proportion to min(r width, c height). The best has one side next to its ideal.
    rows, columns = math.isqrt(area * height // width), math.isqrt(area * width // height)
    sides = [min(max(side, 1), area) for side in (rows, rows + 1, columns, columns + 1)]
    grids = [(side, area // side) for side in sides[:2]] + [(area // side, side) for side in sides[2:]]
    return max(grids, key=lambda grid: (min(grid[0] * width, grid[1] * height), grid[0] * grid[1], grid))


@dataclass(slots=True, kw_only=True)
class NativeOrder:
    """The micro-batches of one rank, for ever, as the samples and the area of each.

    Area and size of micro-batch m are a function of (seed, m), so that with m also the first sample of each is the same
    for any number of ranks: rank r of W has m = first_batch + r, first_batch + r + W, ...
    """

    config: NativeConfig
    budget: int  # C
    seed: int
    start: int  # g of the first sample of micro-batch `first_batch`
    first_batch: int
    rank: int
    world_size: int

    def area(self, m: int) -> int:
        """A = 2^n, rounded; n is a normal variable cut off at one deviation, mapped to the limits' logarithms."""
        c = self.config
        return _area(self.seed, m // c.shared_by, c.min_patches, c.max_patches)

    def samples(self, first_batch: int, number: int) -> int:
        """How many samples are in micro-batches first_batch, ..., first_batch + number - 1."""
        return sum(self._batch_size(m) for m in range(first_batch, first_batch + number))

    def __iter__(self) -> Iterator[list[SizedSample]]:
        first, done = self.start, self.first_batch
        for m in itertools.count(self.first_batch + self.rank, self.world_size):
            first += self.samples(done, m - done)
            done = m
            yield [SizedSample(g, self.area(m)) for g in range(first, first + self._batch_size(m))]

    def _batch_size(self, m: int) -> int:
        return max(1, self.budget // self.area(m))


@lru_cache(maxsize=1 << 16)  # every rank asks for the same ones: its own, and those between
def _area(seed: int, m: int, fewest: int, most: int) -> int:
    """The counter's highest word keeps these numbers from those of the samples (see `Samples`)."""
    rng = np.random.Generator(np.random.Philox(key=(seed << 64) | m, counter=2 << 192))
    draws = iter(rng.standard_normal, None)
    share = (next(x for x in draws if abs(x) <= 1) + 1) / 2
    return min(max(round(fewest * (most / fewest) ** share), fewest), most)
