"""From the global sample number to a sample of a source: one endless, weighted, shuffled order, computed, not stored.

g is the global sample number, w_i the share of source i.
"""

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from math import gcd, lcm

import numpy as np

LONGEST_PERIOD = 1 << 18  # of the schedule; shares that need more are rounded
WINDOW = 1 << 14  # samples that are mixed with each other
SMALLEST_CHUNK = 64  # neighbouring samples that stay in one window, so that reads stay local
MOST_CHUNKS = 1 << 22  # each costs 4 bytes in every process


@dataclass(slots=True, kw_only=True)
class Source:
    """One set of shards in a mixture."""

    name: str
    shards: str  # glob, range in braces or list: "data/coyo/{00000..00127}.tar", "data/coyo/shards.list"
    weight: float = 1.0  # share of the samples, relative to the other sources; 0: none, until a change of the mixture
    # "txt"; "json:KEY", a string or a list of which one is drawn; {either: probability}, drawn among those that the
    # sample has; None: images only
    captions: str | dict[str, float] | None = "txt"

    def __post_init__(self):
        if not 0 <= self.weight < float("inf"):
            raise ValueError(f"weight {self.weight} of source {self.name!r}: expected 0 or a positive number")
        for where in self.caption_shares:
            if where != "txt" and not re.fullmatch("json:.+", where):
                raise ValueError(
                    f"captions {where!r} of source {self.name!r}: expected 'txt', 'json:KEY', "
                    "a dict of such with their probabilities, or None"
                )
        shares = self.caption_shares.values()
        if self.captions is not None and not (shares and all(0 < share < float("inf") for share in shares)):
            raise ValueError(f"captions {self.captions} of source {self.name!r}: expected positive probabilities")

    @property
    def caption_shares(self) -> dict[str, float]:
        """Where captions are, and how often each is drawn, relative to the others."""
        if isinstance(self.captions, dict):
            return self.captions
        return {} if self.captions is None else {self.captions: 1.0}


@dataclass(slots=True, kw_only=True)
class MixtureChange:
    """Other weights from a sample number on."""

    sample: int  # global: the images seen before
    weights: dict[str, float]  # {name of a source: its weight}; the others keep theirs; 0 leaves one out

    def __post_init__(self):
        if self.sample < 1:
            raise ValueError(f"a change of the mixture at sample {self.sample}: expected 1 or more")


def weights_over_time(sources: Sequence[Source], changes: Sequence[MixtureChange]) -> list[tuple[int, list[float]]]:
    """(first sample number, the weight of each source) of every version of a mixture.

    Raises:
        ValueError: a source is unknown, a weight is negative, all are 0, or the changes are not in order.
    """
    weights = {source.name: source.weight for source in sources}
    if len(weights) < len(sources):
        raise ValueError(f"sources {[source.name for source in sources]}: expected a different name for each")
    versions = [(0, list(weights.values()))]
    for change in changes:
        if unknown := change.weights.keys() - weights.keys():
            raise ValueError(f"the mixture has {', '.join(weights)}, but a change names {', '.join(sorted(unknown))}")
        if change.sample <= versions[-1][0]:
            raise ValueError(f"a change at sample {change.sample} after one at {versions[-1][0]}: expected their order")
        weights |= change.weights
        versions.append((change.sample, list(weights.values())))
    for sample, version in versions:
        if not all(0 <= weight < float("inf") for weight in version) or not any(version):
            raise ValueError(f"weights {version} from sample {sample}: expected none below 0, and one above")
    return versions


@dataclass(slots=True)
class _Version:
    """The schedule from one change of the weights to the next."""

    start: int  # g
    given: list[int]  # samples of each source before
    shares: list[int]  # of each source in one period
    source: np.ndarray = field(init=False)  # (period,) which is next
    earlier: np.ndarray = field(init=False)  # (period,) samples of the same source before, in the period

    def __post_init__(self):
        self.source = np.array(fair_schedule(self.shares), np.uint16)
        self.earlier = np.zeros(len(self.source), np.uint32)
        for i in range(len(self.shares)):
            of_source = self.source == i
            self.earlier[of_source] = np.arange(of_source.sum())

    def given_before(self, g: int) -> list[int]:
        """Samples of each source that come before global sample number g."""
        period, place = divmod(g - self.start, len(self.source))
        partial = np.bincount(self.source[:place], minlength=len(self.shares)).tolist()
        return [n + period * share + p for n, share, p in zip(self.given, self.shares, partial, strict=True)]


class Mixture:
    """The order in which the samples of several sources are seen.

    After any number n of samples, source i has given more than w_i n - 1 and fewer than w_i n + 1; when the weights
    change, the count begins anew, and each source goes on where it was. Each source is shuffled anew in every epoch of
    its own, and each epoch sees each of its samples once.

    Args:
        lengths: samples in each source.
        weights: relative. Exact if they are as whole numbers whose sum is at most LONGEST_PERIOD (0.7 and 0.3 are as 7
            and 3); else the nearest shares of such a period. `shares` has what is used.
        seed: of the shuffles.
        changes: (g, weights from there on), ascending.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        weights: Sequence[float],
        seed: int,
        changes: Sequence[tuple[int, Sequence[float]]] = (),
    ):
        if len(lengths) != len(weights) or not lengths or min(lengths) < 1:
            raise ValueError(f"lengths {list(lengths)} and weights {list(weights)}: expected as many, all positive")
        self.lengths, self.seed = list(lengths), seed
        self._versions = [_Version(0, [0] * len(lengths), whole_shares(weights))]
        for start, changed in changes:
            given = self._versions[-1].given_before(start)
            self._versions.append(_Version(start, given, whole_shares(changed)))
        self._starts = [version.start for version in self._versions]

    @property
    def shares(self) -> list[tuple[int, list[int]]]:
        """(first g, share of each source out of their sum) of every version."""
        return [(version.start, version.shares) for version in self._versions]

    def locate(self, g: int) -> tuple[int, int, int]:
        """(source, epoch of that source, sample of that source) of global sample number g."""
        version = self._versions[bisect_right(self._starts, g) - 1]
        period, place = divmod(g - version.start, len(version.source))
        source = int(version.source[place])
        given = version.given[source] + period * version.shares[source] + int(version.earlier[place])
        epoch, position = divmod(given, self.lengths[source])
        return source, epoch, shuffled(position, self.lengths[source], (self.seed, source, epoch))


def whole_shares(weights: Sequence[float]) -> list[int]:
    """Coprime whole numbers in proportion to the weights; where their sum would exceed LONGEST_PERIOD, the nearest."""
    exact = [Fraction(str(weight)) for weight in weights]
    scale = lcm(*(f.denominator for f in exact))
    shares = [int(f * scale) for f in exact]
    shares = [share // gcd(*shares) for share in shares]
    if sum(shares) <= LONGEST_PERIOD:
        return shares
    wanted = np.array([float(f / sum(exact)) for f in exact])
    periods = np.arange(1, LONGEST_PERIOD + 1)[:, None]
    candidates = np.maximum(np.rint(periods * wanted), wanted > 0)  # a source that is wanted comes at least once
    error = np.abs(candidates / candidates.sum(axis=1, keepdims=True) - wanted).max(axis=1)
    return [int(share) for share in candidates[error.argmin()]]


def fair_schedule(shares: Sequence[int]) -> list[int]:
    """Which source is next, for one period of sum(shares) places.

    Earliest deadline first. With n places filled, sample c of source i (both from 0) may come next if c < w_i (n + 1),
    so that its source never gets a whole sample ahead, and must be among the first ceil((c + 1) / w_i), so that it
    never falls one behind. As the w_i sum to 1, every deadline is met (Baruah et al., Proportionate progress, 1996).
    """
    period, sources = sum(shares), range(len(shares))
    given = [0] * len(shares)
    earliest = [0 if share else period for share in shares]  # place where the next sample of a source may come
    deadline = [-(-period // share) if share else period for share in shares]
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
