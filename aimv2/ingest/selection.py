"""Which rows of which shards are kept, and why the others are not.

A reason has two counts: the samples it concerns alone, and those it drops of what the reasons before it have left.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from aimv2.ingest.duplicates import Repeats, repeated_hashes
from aimv2.ingest.filters import Filter
from aimv2.ingest.shard_columns import ShardColumns, open_columns
from aimv2.ingest.shard_measures import HYGIENE

DUPLICATES = ("bytes", "phash")  # same crc32 and size; same perceptual hash
NO_CAPTION = "no caption"


@dataclass(slots=True)
class Dropped:
    """What one reason does."""

    reason: str
    alone: int = 0  # samples that it concerns
    dropped: int = 0  # of these, those that no reason before it has dropped


@dataclass(slots=True)
class Selection:
    """The rows kept, and all that was counted on the way."""

    shards: list[Path]
    filters: list[Filter]
    samples: int = 0
    reasons: dict[str, Dropped] = field(default_factory=dict)
    captions: Counter[str] = field(default_factory=Counter)  # samples with a caption in "txt", "json:KEY"
    hygiene: Counter[str] = field(default_factory=Counter)  # samples whose caption is so
    formats: Counter[str] = field(default_factory=Counter)
    duplicates: dict[str, int] = field(default_factory=dict)  # samples that repeat an earlier one, by kind of hash
    _kept: list[tuple[int, np.ndarray]] = field(default_factory=list)  # rows, and a bit for each

    @property
    def kept(self) -> int:
        return self.samples - sum(reason.dropped for reason in self.reasons.values())

    def mask(self, shard: int) -> np.ndarray:
        """(rows,) bool of the shard of this number."""
        rows, bits = self._kept[shard]
        return np.unpackbits(bits, count=rows).astype(bool)

    def add(self, mask: np.ndarray) -> None:
        self._kept.append((len(mask), np.packbits(mask)))

    def keep_only(self, shard: int, mask: np.ndarray) -> None:
        self._kept[shard] = len(mask), np.packbits(mask)

    def count(self, reason: str, concerned: np.ndarray, left: np.ndarray) -> None:
        entry = self.reasons.setdefault(reason, Dropped(reason))
        entry.alone += int(concerned.sum())
        entry.dropped += int((concerned & left).sum())


def select(
    shards: Sequence[Path],
    filters: Sequence[Filter],
    *,
    captions: Sequence[str] = ("txt",),
    duplicates: str = "none",
    keep_missing: bool = False,
    keep_all: bool = False,
) -> Selection:
    """Apply, in this order: usable at all, with a caption, the filters as given, no duplicate of what is left.

    A caption that cleans to nothing is a caption: its sample is kept, and trained on for its pixels. Of duplicates the
    first by (shard, row) stays. One shard is in memory at a time, and for duplicates 8 bytes a sample.

    Args:
        filters: their thresholds known.
        captions: where captions are; a sample that has one in none of these places is dropped. None given: images only.
        duplicates: "none", or one of DUPLICATES.
        keep_missing: a sample without a value passes the filter.
        keep_all: count, but drop nothing.

    Raises:
        ValueError: duplicates by a hash that was not measured.
    """
    selection = Selection(list(shards), list(filters))
    for columns in open_columns(shards):
        left = np.ones(columns.rows, bool)
        for reason, concerned in _reasons(columns, filters, captions, keep_missing):
            if keep_all:
                selection.count(reason, concerned, np.zeros_like(left))
            else:
                selection.count(reason, concerned, left)
                left &= ~concerned
        selection.samples += columns.rows
        selection.captions.update({where: int(columns.has_caption(where).sum()) for where in captions})
        selection.hygiene.update({flag: int(np.nansum(columns[f"caption_{flag}"])) for flag in HYGIENE})
        selection.formats.update(columns.formats())
        selection.add(left)
    unusable = {name: entry for name, entry in selection.reasons.items() if name.startswith("unusable: ")}
    selection.reasons = unusable | {n: entry for n, entry in selection.reasons.items() if n not in unusable}
    for kind in DUPLICATES:
        if any(columns.hashes(kind)[1].any() for columns in open_columns(shards)):
            hashes = (hashes[valid] for hashes, valid in (c.hashes(kind) for c in open_columns(shards)))
            selection.duplicates[kind] = repeated_hashes(hashes, selection.samples)[1]
    if duplicates not in ("none", *selection.duplicates):
        raise ValueError(f"duplicates by {duplicates}: no sample has one; measure it first")
    if duplicates != "none" and not keep_all:
        _drop_duplicates(selection, duplicates)
    return selection


def _reasons(
    columns: ShardColumns, filters: Sequence[Filter], captions: Sequence[str], keep_missing: bool
) -> Iterator[tuple[str, np.ndarray]]:
    """(reason, (rows,) whom it concerns), in order."""
    unusable = columns.unusable()
    for reason in sorted({reason for reason in unusable if reason is not None}):
        yield f"unusable: {reason}", unusable == reason
    if captions:
        yield NO_CAPTION, ~np.any([columns.has_caption(where) for where in captions], axis=0)
    told: set[str] = set()
    for f in filters:
        values = columns[f.column]
        missing = np.isnan(values)
        if not keep_missing and f.column not in told:
            yield f"{f.column} missing", missing
            told.add(f.column)
        yield f"not {f}", ~missing & ~f.passes(values)


def _drop_duplicates(selection: Selection, kind: str) -> None:
    """Among what is left, so that no image is lost because its first copy was dropped for another reason."""

    def hashes() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(hashes of the candidates, their rows)."""
        for shard, columns in enumerate(open_columns(selection.shards)):
            values, valid = columns.hashes(kind)
            rows = np.flatnonzero(valid & selection.mask(shard))
            yield values[rows], rows

    repeated, dropped = repeated_hashes((values for values, _ in hashes()), selection.kept)
    repeats = Repeats(repeated)
    for shard, (values, rows) in enumerate(hashes()):
        left = selection.mask(shard)
        left[rows[repeats.find(values)]] = False
        selection.keep_only(shard, left)
    reason = f"duplicate ({kind})"
    selection.reasons[reason] = Dropped(reason, alone=selection.duplicates[kind], dropped=dropped)
