"""From the global sample number to a sample of a source: one endless, weighted, shuffled order, computed, not stored.

g is the global sample number, w_i the share of source i.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import gcd, lcm

import numpy as np

LONGEST_PERIOD = 1 << 16  # of the schedule; shares are rounded to multiples of its inverse if they need more
WINDOW = 1 << 14  # samples that are mixed with each other
SMALLEST_CHUNK = 64  # neighbouring samples that stay in one window, so that reads stay local
MOST_CHUNKS = 1 << 20


@dataclass(slots=True, kw_only=True)
class Source:
    """One set of shards in a mixture."""

    name: str
    shards: str  # glob or range in braces: "data/coyo/{00000..00127}.tar"
    weight: float = 1.0  # share of the samples, relative to the other sources
    captions: str | None = "txt"  # "txt"; "json:KEY", a string or a list of which one is drawn; None: images only

    def __post_init__(self):
        if not 0 < self.weight < float("inf"):
            raise ValueError(f"weight {self.weight} of source {self.name!r}: expected a positive number")
        if self.captions not in ("txt", None) and not re.fullmatch("json:.+", self.captions):
            raise ValueError(f"captions {self.captions!r} of source {self.name!r}: expected 'txt', 'json:KEY' or None")


class Mixture:
    """The order in which the samples of several sources are seen.

    After any number n of samples, source i has given more than w_i n - 1 and fewer than w_i n + 1. Each source is
    shuffled anew in every epoch of its own, and each epoch sees each of its samples once.

    Args:
        lengths: samples in each source.
        weights: relative, positive. Exact if they are as whole numbers whose sum is at most LONGEST_PERIOD (0.7 and 0.3
            are as 7 and 3); else a share is rounded to the nearest of about that period. `shares` has what is used.
        seed: of the shuffles.
    """

    def __init__(self, lengths: Sequence[int], weights: Sequence[float], seed: int):
        if len(lengths) != len(weights) or not lengths or min(lengths) < 1:
            raise ValueError(f"lengths {list(lengths)} and weights {list(weights)}: expected as many, all positive")
        self.lengths, self.seed = list(lengths), seed
        self.shares = whole_shares(weights)  # out of their sum, the period
        schedule = fair_schedule(self.shares)
        self._source = np.array(schedule, np.uint16)
        self._earlier = np.zeros(len(schedule), np.uint32)  # samples of the same source before, in the period
        for i in range(len(lengths)):
            of_source = self._source == i
            self._earlier[of_source] = np.arange(of_source.sum())

    def locate(self, g: int) -> tuple[int, int, int]:
        """(source, epoch of that source, sample of that source) of global sample number g."""
        period, place = divmod(g, len(self._source))
        source = int(self._source[place])
        given = period * self.shares[source] + int(self._earlier[place])
        epoch, position = divmod(given, self.lengths[source])
        return source, epoch, shuffled(position, self.lengths[source], (self.seed, source, epoch))


def whole_shares(weights: Sequence[float]) -> list[int]:
    """Coprime whole numbers in proportion to the weights, or nearly so if their sum would exceed LONGEST_PERIOD."""
    exact = [Fraction(str(weight)) for weight in weights]
    scale = lcm(*(f.denominator for f in exact))
    shares = [int(f * scale) for f in exact]
    shares = [share // gcd(*shares) for share in shares]
    if (total := sum(shares)) <= LONGEST_PERIOD:
        return shares
    return [max(1, round(share * LONGEST_PERIOD / total)) for share in shares]


def fair_schedule(shares: Sequence[int]) -> list[int]:
    """Which source is next, for one period of sum(shares) places.

    Earliest deadline first. With n places filled, sample c of source i (both from 0) may come next if c < w_i (n + 1),
    so that its source never gets a whole sample ahead, and must be among the first ceil((c + 1) / w_i), so that it
    never falls one behind. As the w_i sum to 1, every deadline is met (Baruah et al., Proportionate progress, 1996).
    """
    period, sources = sum(shares), range(len(shares))
    given = [0] * len(shares)
    earliest = [0] * len(shares)  # place where the next sample of a source may come
    deadline = [-(-period // share) for share in shares]
    schedule = []
    for n in range(period):
        i = min((i for i in sources if earliest[i] <= n), key=deadline.__getitem__)
        schedule.append(i)
        given[i] += 1
        earliest[i] = given[i] * period // shares[i]
        deadline[i] = -(-(given[i] + 1) * period // shares[i])
    return schedule


def shuffled(position: int, length: int, key: tuple[int, ...]) -> int:
    """Where `position` of a keyed random order of range(length) points: a bijection for every key.

    Runs of neighbours (chunks) are put into random order, then the samples of each window of chunks are mixed. Data of
    up to WINDOW samples are mixed completely. The chunks begin at a random sample, so that they differ between keys.
    """
    chunk = max(SMALLEST_CHUNK, -(-length // MOST_CHUNKS))
    window = max(1, WINDOW // chunk) * chunk
    number, inside = divmod(position, window)
    begin = number * window
    mixed = begin + int(permutation(min(window, length - begin), (*key, 2 + number))[inside])
    place, offset = divmod(mixed, chunk)
    whole = length // chunk  # chunks; what is left over stays at the end
    if place < whole:
        place = int(permutation(whole, (*key, 0))[place])
    return (place * chunk + offset + start_of(length, (*key, 1))) % length


@lru_cache(maxsize=128)
def permutation(length: int, key: tuple[int, ...]) -> np.ndarray:
    """(length,) uint32, a random permutation that is a function of the key."""
    return np.random.default_rng(key).permutation(length).astype(np.uint32)


@lru_cache(maxsize=128)
def start_of(length: int, key: tuple[int, ...]) -> int:
    return int(np.random.default_rng(key).integers(length))
