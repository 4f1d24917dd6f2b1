"""A folder of shards made ready for training: indexed, measured, filtered. The tars are only read.

What is left is written in this order: the rows kept into each index, the report, and last the list `shards.list`. An
old list is removed before the first index changes, so a preparation that was cut short can be seen: no list is there,
and the same command again makes it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from aimv2.data.processes import run_jobs
from aimv2.data.shard_index import read_index, select_rows
from aimv2.data.shard_list import LIST_NAME, write_shard_list
from aimv2.data.shards import ensure_indices
from aimv2.data.tar import ShardError
from aimv2.ingest.downloads import is_download, read_download
from aimv2.ingest.filters import Filter, check_columns, find_thresholds
from aimv2.ingest.measures import MeasureConfig
from aimv2.ingest.report_pictures import draw_histograms, draw_samples
from aimv2.ingest.reports import Report, sample_values, write_report
from aimv2.ingest.selection import DUPLICATES, Selection, select
from aimv2.ingest.shard_columns import ShardColumns
from aimv2.ingest.shard_measures import FOLDER, ShardMeasurer, measures_path, verify_shard

NSFW = ("nsfw_score_opennsfw2", "nsfw_score_gantman")
MOST_NSFW = 0.5  # COYO's own limit for either score (its data card, image level)

Progress = Callable[[str, int, int], None]  # (what is being done, how much of it now, of how much in all)


@dataclass(slots=True, kw_only=True)
class PrepareConfig:
    """What to measure and what to keep."""

    measure: MeasureConfig = field(default_factory=MeasureConfig)
    keep: tuple[str, ...] = ()  # filters, see `Filter.parse`
    duplicates: str = "none"  # or one of DUPLICATES
    most_nsfw: float | None = MOST_NSFW  # for those of the columns NSFW that there are; None: no limit
    keep_missing: bool = False  # a sample without a value passes the filters
    keep_all: bool = False  # drop nothing, whatever else is said
    verify: bool = False  # read every member again where there was an index
    workers: int = 1  # processes
    command: str = ""  # what was typed, for the report

    def __post_init__(self):
        if self.duplicates not in ("none", *DUPLICATES):
            raise ValueError(f"duplicates {self.duplicates!r}: expected none, {' or '.join(DUPLICATES)}")
        if self.workers < 1:
            raise ValueError(f"workers is {self.workers}, expected at least 1")


def prepare(folder: str | Path, config: PrepareConfig, progress: Progress | None = None) -> Report:
    """Prepare the tars of a folder and return the report that is written to `folder`/prepared.

    A damaged tar is left out and reported, and so is one of img2dataset's that is not finished. Nothing is changed but
    the indices and the measures, which are kept for the next time, if no sample is left.

    Raises:
        ValueError: no tar, no tokenizer, or a filter that cannot be.
        OSError: the disk is full.
        LostProcess: a process was killed.
    """
    folder = Path(folder)
    filters = [Filter.parse(text) for text in config.keep]
    _measurer(config.measure)  # finds out at once whether it can
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise ValueError(f"{folder}: no .tar file")
    download = read_download(folder) if is_download(folder) else None
    report = Report(folder=folder, command=config.command, tars=len(tars), download=download)
    left_out = {*download.unfinished, *download.empty} if download else set()
    finished = [tar for tar in tars if tar.name not in left_out]

    measured, names = _measure(finished, config, report.damage, progress)
    samples = sum(measured.values())
    shards = sorted(measured)
    filters = list(dict.fromkeys((*_safety(config, names), *filters)))
    if not shards:
        return report
    check_columns(filters, names)
    report.selection = select(
        shards,
        find_thresholds(filters, shards, samples),
        captions=config.measure.captions,
        duplicates=config.duplicates,
        keep_missing=config.keep_missing,
        keep_all=config.keep_all,
    )
    if report.selection.kept:
        _write(folder, report, names, config)
    return report


def _safety(config: PrepareConfig, names: set[str]) -> list[Filter]:
    if config.most_nsfw is None:
        return []
    return [Filter(column=name, operator="<=", threshold=config.most_nsfw) for name in NSFW if name in names]


def _write(folder: Path, report: Report, names: set[str], config: PrepareConfig) -> None:
    out, selection = folder / FOLDER, report.selection
    values, kept = sample_values(selection, sorted(names))
    report.summarise(values)
    draw_histograms(values, kept, selection.filters, out / "histograms.png")
    draw_samples(selection, report.measured_caption, out / "samples.png")
    _apply(selection, _reason(config, selection.filters))
    write_report(report, out)
    write_shard_list(folder, [shard.name for shard in selection.shards])


def _reason(config: PrepareConfig, filters: Sequence[Filter]) -> str:
    """What an index says of the rows it keeps; without counts, so that other shards do not change it."""
    parts = ["usable"]
    parts += [f"with a caption in {' or '.join(config.measure.captions)}"] if config.measure.captions else []
    parts += [f"{f.column} {f.operator} {f.threshold:.6g}" for f in filters]
    parts += [f"no duplicate ({config.duplicates})"] if config.duplicates != "none" else []
    return "; ".join(parts)


def _apply(selection: Selection, reason: str) -> None:
    """Write the rows kept into the indices that keep others."""
    for number, shard in enumerate(selection.shards):
        mask = selection.mask(number)
        rows = None if mask.all() else np.flatnonzero(mask)
        index = read_index(shard)
        same = index.kept is None if rows is None else index.kept is not None and np.array_equal(index.kept, rows)
        new_reason = "" if rows is None else reason
        if not same:
            shard.with_name(LIST_NAME).unlink(missing_ok=True)
        if not same or index.reason != new_reason:
            select_rows(shard, rows, new_reason)


def _measure(
    shards: Sequence[Path], config: PrepareConfig, damage: list[str], progress: Progress | None
) -> tuple[dict[Path, int], set[str]]:
    """({shard: samples} of those that are whole, the names of their columns); appends to `damage`."""
    sizes = {shard: shard.stat().st_size if shard.exists() else 0 for shard in shards}  # a link may lead nowhere
    rows, names, lines, total = {}, set(), {}, sum(sizes.values())
    to_do = [shard for shard in shards if config.verify or not _is_indexed(shard)]
    for found in _each(partial(_index_shard, config.verify), shards, to_do, config.workers):
        lines[found.shard] = found.damage
        if found.rows:
            rows[found.shard] = found.rows
        if progress is not None:
            progress("index", sizes[found.shard], total)
    measurer, total = _measurer(config.measure), sum(rows.values())
    to_do = [shard for shard in rows if not measurer.is_measured(shard, read_index(shard, columns=False))]
    for found in _each(partial(_measure_shard, config.measure), rows, to_do, config.workers):
        lines[found.shard] += [line for line in found.damage if line not in lines[found.shard]]
        names |= found.names
        if progress is not None:
            progress("measure", rows[found.shard], total)
        if not found.rows:
            del rows[found.shard]
    damage += [line for shard in sorted(lines) for line in lines[shard]]
    return rows, names


@dataclass(slots=True, kw_only=True)
class _Outcome:
    """What a process says of one shard."""

    shard: Path
    rows: int = 0  # 0: it is left out
    damage: list[str] = field(default_factory=list)
    names: set[str] = field(default_factory=set)


def _index_shard(verify: bool, shard: Path) -> _Outcome:
    """Index a shard, or `verify` it if it has an index."""
    try:
        built = ensure_indices([shard])
        index = read_index(shard)
        damage = verify_shard(shard, index) if verify and not built else []
        if damage:
            measures_path(shard).unlink(missing_ok=True)  # the new ones will know which samples are damaged
        return _Outcome(shard=shard, rows=index.rows, damage=damage)
    except ShardError as error:
        return _Outcome(shard=shard, damage=[str(error)])
    except OSError as error:
        return _Outcome(shard=shard, damage=[f"{shard}: {error}"])


def _measure_shard(config: MeasureConfig, shard: Path) -> _Outcome:
    measurer, damage = _measurer(config), []
    try:
        index = read_index(shard)
        if not measurer.is_measured(shard, index):
            damage = measurer.measure(shard, index)
        columns = ShardColumns(shard)
        columns.check()
    except ShardError as error:
        return _Outcome(shard=shard, damage=[*damage, str(error)])
    return _Outcome(shard=shard, rows=index.rows, damage=damage, names=set(columns.names))


def _is_indexed(shard: Path) -> bool:
    try:
        return read_index(shard, columns=False).is_of(shard.stat())
    except (ShardError, OSError):
        return False


def _each(
    function: Callable[[Path], _Outcome], shards: Iterable[Path], to_do: list[Path], workers: int
) -> Iterator[_Outcome]:
    """The function's outcome for every shard; those with something `to_do` in other processes."""
    yield from map(function, sorted(set(shards) - set(to_do)))
    yield from run_jobs(function, sorted(to_do), max(1, min(workers, len(to_do))))


@lru_cache(maxsize=1)
def _measurer(config: MeasureConfig) -> ShardMeasurer:
    return ShardMeasurer(config)
