"""Images that occur more than once, found by their 64-bit hashes: 8 bytes a sample, sorted in place."""

from collections.abc import Iterable

import numpy as np


def repeated_hashes(chunks: Iterable[np.ndarray], most: int) -> tuple[np.ndarray, int]:
    """(the hashes that occur more than once, ascending; how many samples have the hash of an earlier one).

    Args:
        chunks: uint64 arrays.
        most: at most so many hashes in all of them.
    """
    values, end = np.empty(most, np.uint64), 0
    for chunk in chunks:
        values[end : end + len(chunk)] = chunk
        end += len(chunk)
    values = values[:end]
    values.sort()
    again = values[1:][values[1:] == values[:-1]]
    first = np.ones(len(again), bool)
    first[1:] = again[1:] != again[:-1]
    return again[first], len(again)


class Repeats:
    """Tells, shard by shard, which samples have the hash of one seen before.

    Args:
        repeated: the hashes that occur more than once, ascending.
    """

    def __init__(self, repeated: np.ndarray):
        self._repeated = repeated
        self._seen = np.zeros(len(repeated), bool)

    def find(self, hashes: np.ndarray) -> np.ndarray:
        """(n,) uint64 -> (n,) bool; in each call, and over all of them, a hash's first sample is False."""
        repeats = np.zeros(len(hashes), bool)
        if not len(self._repeated):
            return repeats
        places = np.searchsorted(self._repeated, hashes)
        places[places == len(self._repeated)] = 0
        candidates = np.flatnonzero(self._repeated[places] == hashes)
        places = places[candidates]
        _, first = np.unique(places, return_index=True)
        again = np.ones(len(places), bool)
        again[first] = False
        repeats[candidates] = again | self._seen[places]
        self._seen[places] = True
        return repeats
