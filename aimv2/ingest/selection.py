"""Which rows of which shards are kept, and why the others are not.

A reason has two counts: the samples it concerns alone, and those it drops of what the reasons before it have left.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from aimv2.data.processes import run_jobs
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
    _kept: dict[int, tuple[int, np.ndarray]] = field(default_factory=dict)  # shard -> rows, and a bit for each

    @property
    def kept(self) -> int:
        return self.samples - sum(reason.dropped for reason in self.reasons.values())

    def mask(self, shard: int) -> np.ndarray:
        """(rows,) bool of the shard of this number."""
        rows, bits = self._kept[shard]
        return np.unpackbits(bits, count=rows).astype(bool)

    def rows(self, shard: int) -> int:
        return self._kept[shard][0]

    def add(self, shard: int, part: "Selection") -> None:
        """Take over what was found in one shard, the one of this number."""
        self._kept[shard] = part._kept[0]
        self.samples += part.samples
        for name in ("captions", "hygiene", "formats"):
            getattr(self, name).update(getattr(part, name))
        for name, entry in part.reasons.items():
            total = self.reasons.setdefault(name, Dropped(name))
            total.alone += entry.alone
            total.dropped += entry.dropped

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
    workers: int = 1,
    progress: Callable[[int], None] | None = None,
) -> Selection:
    """Apply, in this order: usable at all, with a caption, the filters as given, no duplicate of what is left.

    A caption that cleans to nothing is a caption: its sample is kept, and trained on for its pixels. Of duplicates the
    first by (shard, row) stays. One shard is in memory at a time, and for duplicates 8 bytes a sample.

    Args:
        filters: their thresholds known.
        captions: where captions are; a sample that has one in none of these places is dropped. None given: images only.
        duplicates: "none", or one of DUPLICATES; no other kind is counted.
        keep_missing: a sample without a value passes the filter.
        keep_all: count, but drop nothing.
        workers: processes.
        progress: called with the number of samples that are newly done.

    Raises:
        ValueError: duplicates by a hash that was not measured.
    """
    selection = Selection(list(shards), list(filters))
    look = partial(_select_rows, tuple(filters), tuple(captions), keep_missing, keep_all)
    for number, part in run_jobs(look, enumerate(shards), workers):
        selection.add(number, part)
        if progress is not None:
            progress(part.samples)
    unusable = {name: selection.reasons[name] for name in sorted(selection.reasons) if name.startswith("unusable: ")}
    selection.reasons = unusable | {n: entry for n, entry in selection.reasons.items() if n not in unusable}
    selection.formats = Counter(dict(sorted(selection.formats.items())))  # processes end in any order
    if duplicates != "none":
        repeated = _count_repeats(selection, duplicates, workers)
        if not keep_all:
            _drop_duplicates(selection, duplicates, repeated)
    return selection


def _select_rows(
    filters: Sequence[Filter], captions: Sequence[str], keep_missing: bool, keep_all: bool, job: tuple[int, Path]
) -> tuple[int, Selection]:
    """(the number of a shard, what is selected and counted in this shard alone)."""
    number, shard = job
    columns = ShardColumns(shard)
    part = Selection([], [], samples=columns.rows)
    left = np.ones(columns.rows, bool)
    for reason, concerned, drops in _reasons(columns, filters, captions, keep_missing):
        drops = drops and not keep_all
        part.count(reason, concerned, left if drops else np.zeros_like(left))
        if drops:
            left &= ~concerned
    part.captions.update({where: int(columns.has_caption(where).sum()) for where in captions})
    part.hygiene.update({flag: int(np.nansum(columns[f"caption_{flag}"])) for flag in HYGIENE})
    part.formats.update(columns.formats())
    part.keep_only(0, left)
    return number, part


def _count_repeats(selection: Selection, kind: str, workers: int) -> np.ndarray:
    """Counts the samples of all with the hash of an earlier one; returns the hashes that occur more than once."""
    chunks = run_jobs(partial(_valid_hashes, kind), selection.shards, workers)
    repeated, selection.duplicates[kind] = repeated_hashes(_some(chunks, kind), selection.samples)
    return repeated


def _valid_hashes(kind: str, shard: Path) -> np.ndarray:
    values, valid = ShardColumns(shard).hashes(kind)
    return values[valid]


def _some(chunks: Iterable[np.ndarray], kind: str) -> Iterator[np.ndarray]:
    found = False
    for chunk in chunks:
        found |= bool(len(chunk))
        yield chunk
    if not found:
        raise ValueError(f"duplicates by {kind}: no sample has one; measure it first")


def _reasons(
    columns: ShardColumns, filters: Sequence[Filter], captions: Sequence[str], keep_missing: bool
) -> Iterator[tuple[str, np.ndarray, bool]]:
    """(reason, (rows,) whom it concerns, whether it drops them), in order."""
    unusable = columns.unusable()
    for reason in sorted({reason for reason in unusable if reason is not None}):
        yield f"unusable: {reason}", unusable == reason, True
    if captions:
        yield NO_CAPTION, ~np.any([columns.has_caption(where) for where in captions], axis=0), True
    told: set[str] = set()
    for f in filters:
        values = columns[f.column]
        missing = np.isnan(values)
        name = f"{f.column} missing{', which passes' if f.missing_passes else ''}"
        if not keep_missing and name not in told:
            yield name, missing, not f.missing_passes
            told.add(name)
        yield f"not {f}", ~missing & ~f.passes(values), True


def _drop_duplicates(selection: Selection, kind: str, repeated: np.ndarray) -> None:
    """Among what is left, so that no image is lost because its first copy was dropped for another reason."""
    repeats, dropped = Repeats(repeated), 0
    for shard, columns in enumerate(open_columns(selection.shards)):
        left = selection.mask(shard)
        values, valid = columns.hashes(kind)
        rows = np.flatnonzero(valid & left)
        again = rows[repeats.find(values[rows])]
        left[again] = False
        dropped += len(again)
        selection.keep_only(shard, left)
    reason = f"duplicate ({kind})"
    selection.reasons[reason] = Dropped(reason, alone=selection.duplicates[kind], dropped=dropped)
