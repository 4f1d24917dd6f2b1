"""A folder of shards made ready for training: indexed, measured, filtered. The tars are only read.

What is left is written in this order: the rows kept into each index, the report, and last the list `shards.list`. An
old list is removed before the first index changes, so a preparation that was cut short can be seen: no list is there,
and the same command again makes it.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from aimv2.data.processes import run_jobs
from aimv2.data.shard_index import ShardIndex, index_path, read_index, select_rows
from aimv2.data.shard_list import LIST_NAME, write_shard_list
from aimv2.data.shards import ensure_indices
from aimv2.data.tar import ShardError
from aimv2.ingest.downloads import is_download, read_download
from aimv2.ingest.filters import Filter, check_columns, find_thresholds
from aimv2.ingest.measures import MeasureConfig
from aimv2.ingest.notes import find_notes
from aimv2.ingest.prepared_folder import FOLDER, WriteError, is_of_writing, lock_folder, remove_leftovers, writing
from aimv2.ingest.report_pictures import draw_histograms, draw_samples
from aimv2.ingest.reports import Report, sample_values, write_report
from aimv2.ingest.selection import DUPLICATES, Selection, select
from aimv2.ingest.shard_columns import ShardColumns, has_given_hashes
from aimv2.ingest.shard_measures import ShardMeasurer, measures_path, verify_shard

NSFW = ("nsfw_score_opennsfw2", "nsfw_score_gantman")
MOST_NSFW = 0.5  # COYO's own limit for either score (its data card, image level)
QUICK_SHARDS = 500  # that one process has done by the time that another is up, if they are measured

Progress = Callable[[str, int, int], None]  # (what is being done, how much of it now, of how much in all)


@dataclass(slots=True, kw_only=True)
class PrepareConfig:
    """What to measure and what to keep."""

    measure: MeasureConfig = field(default_factory=MeasureConfig)
    keep: tuple[str, ...] = ()  # filters, see `Filter.parse`
    duplicates: str = "none"  # or one of DUPLICATES
    most_nsfw: float | None = MOST_NSFW  # of the columns NSFW, where there are such; None: no limit
    keep_missing: bool = False  # a sample without a value passes the filters
    keep_all: bool = False  # drop nothing, whatever else is said
    leave: bool = False  # where there is a list of shards, measure only: the rows kept and the list stay
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
        ValueError: no tar, no tokenizer, a filter that cannot be, or another process prepares the folder.
        WriteError: the folder cannot be written; the disk is full.
        LostProcess: a process was killed.
    """
    folder = Path(folder)
    filters = [Filter.parse(text) for text in config.keep]
    measurer = _measurer(config.measure)  # finds out at once whether it can
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise ValueError(f"{folder}: no .tar file")
    _check_hashes(tars, config, measurer)
    with lock_folder(folder) as locked:
        report = _prepare(folder, tars, filters, config, progress or _no_progress)
        if locked and report.selection.kept:
            remove_leftovers(folder)
    return report


def _check_hashes(tars: Sequence[Path], config: PrepareConfig, measurer: ShardMeasurer) -> None:
    """That there can be perceptual hashes, before anything is measured."""
    hashed = config.measure.decode and config.measure.phash
    if config.duplicates != "phash" or hashed:
        return
    if not any(has_given_hashes(tar) or measurer.has_hashes(tar) for tar in tars):
        option = "--no-phash" if config.measure.decode else "--no-decode"
        raise ValueError(f"duplicates by phash, but no image is hashed: leave out {option}")


def _prepare(
    folder: Path, tars: Sequence[Path], filters: list[Filter], config: PrepareConfig, progress: Progress
) -> Report:
    download = read_download(folder) if is_download(folder) else None
    report = Report(folder=folder, command=config.command, tars=len(tars), download=download)
    left_out = {*download.unfinished, *download.empty} if download else set()
    finished = [tar for tar in tars if tar.name not in left_out]
    measured, names = _measure(finished, config, report.damage, progress)
    samples = sum(header.rows for header in measured.values())
    shards = sorted(measured)
    if not shards:
        return report
    for header in measured.values():
        report.ignored.update(header.ignored)
    if config.leave and (folder / LIST_NAME).is_file():
        report.left, report.selection = True, Selection(shards, [], samples=samples)
        report.notes = find_notes(folder, report.selection)
        return report
    filters = [*_safety(config, names, filters), *dict.fromkeys(filters)]
    check_columns(filters, names)
    workers = _processes(config, len(shards))
    report.selection = select(
        shards,
        find_thresholds(filters, shards, samples, workers),
        captions=config.measure.captions,
        duplicates=config.duplicates,
        keep_missing=config.keep_missing,
        keep_all=config.keep_all,
        workers=workers,
        progress=lambda done: progress("select", done, samples),
    )
    report.notes = find_notes(folder, report.selection)
    if report.selection.kept:
        _write(report, measured, names, config, progress)
    return report


def _no_progress(what: str, done: int, total: int) -> None:
    """Nobody looks."""


def _safety(config: PrepareConfig, names: set[str], typed: Sequence[Filter]) -> list[Filter]:
    """What is filtered unasked. It drops no sample for want of a score."""
    if config.most_nsfw is None:
        return []
    filters = [
        Filter(column=name, operator="<=", threshold=config.most_nsfw, missing_passes=True)
        for name in NSFW
        if name in names
    ]
    return [f for f in filters if str(f) not in map(str, typed)]


def _processes(config: PrepareConfig, quick: int, slow: int = 0) -> int:
    """For so many shards that are measured, and so many that are not."""
    return max(1, min(config.workers, slow + quick // QUICK_SHARDS))


def _write(
    report: Report, headers: dict[Path, ShardIndex], names: set[str], config: PrepareConfig, progress: Progress
) -> None:
    folder, selection = report.folder, report.selection
    out = folder / FOLDER
    values, kept = sample_values(selection, sorted(names))
    report.summarise(values)
    draw_histograms(values, kept, selection.filters, out / "histograms.png")
    report.boxes = draw_samples(selection, report.measured_caption, out / "samples.png")
    _apply(selection, headers, _reason(config, selection.filters), config, progress)
    with writing(out / "report.json"):
        write_report(report, out)
    with writing(folder / LIST_NAME):
        write_shard_list(folder, [shard.name for shard in selection.shards])


def _reason(config: PrepareConfig, filters: Sequence[Filter]) -> str:
    """What an index says of the rows it keeps; without counts, so that other shards do not change it."""
    parts = ["usable"]
    parts += [f"with a caption in {' or '.join(config.measure.captions)}"] if config.measure.captions else []
    parts += [
        f"{f.column} {f.operator} {f.threshold:.6g}{' or missing' if f.missing_passes or config.keep_missing else ''}"
        for f in filters
    ]
    parts += [f"no duplicate ({config.duplicates})"] if config.duplicates != "none" else []
    return "; ".join(parts)


def _apply(
    selection: Selection, headers: dict[Path, ShardIndex], reason: str, config: PrepareConfig, progress: Progress
) -> None:
    """Write the rows kept into the indices that keep others."""
    jobs = []
    for number, shard in enumerate(selection.shards):
        mask, header = selection.mask(number), headers[shard]
        rows = None if mask.all() else np.flatnonzero(mask).astype(np.uint32)
        same = header.selection == ("" if rows is None else hashlib.sha256(rows.tobytes()).hexdigest())
        new_reason = "" if rows is None else reason
        if not same:
            shard.with_name(LIST_NAME).unlink(missing_ok=True)
        if not same or header.reason != new_reason:
            jobs.append((shard, new_reason, None if rows is None else np.packbits(mask)))
    for _ in run_jobs(_select_rows, jobs, _processes(config, len(jobs))):
        progress("apply", 1, len(jobs))


def _select_rows(job: tuple[Path, str, np.ndarray | None]) -> None:
    shard, reason, bits = job
    with writing(index_path(shard)):
        select_rows(shard, None if bits is None else np.flatnonzero(np.unpackbits(bits)), reason)


@dataclass(slots=True, kw_only=True)
class _Outcome:
    """What a process says of one shard."""

    shard: Path
    header: ShardIndex | None = None  # the index without its columns; None: the shard is left out
    damage: list[str] = field(default_factory=list)
    names: set[str] = field(default_factory=set)


def _measure(
    shards: Sequence[Path], config: PrepareConfig, damage: list[str], progress: Progress
) -> tuple[dict[Path, ShardIndex], set[str]]:
    """({shard: its index without columns} of those that are whole, the names of theirs); appends to `damage`."""
    sizes = {shard: shard.stat().st_size if shard.exists() else 0 for shard in shards}  # a link may lead nowhere
    headers, names, lines, total = {}, set(), {}, sum(sizes.values())
    for found in _index(shards, config):
        lines[found.shard] = found.damage
        if found.header is not None:
            headers[found.shard] = found.header
        progress("index", sizes[found.shard], total)
    measurer, total = _measurer(config.measure), sum(header.rows for header in headers.values())
    jobs = [(shard, header, measurer.is_measured(shard, header)) for shard, header in sorted(headers.items())]
    jobs.sort(key=lambda job: job[2])  # those with something to do first
    done = sum(is_done for *_, is_done in jobs)
    processes = _processes(config, done, len(jobs) - done)
    for found in run_jobs(partial(_measure_shard, config.measure), jobs, processes):
        lines[found.shard] += [line for line in found.damage if line not in lines[found.shard]]
        names |= found.names
        progress("measure", headers[found.shard].rows, total)
        if found.header is None:
            del headers[found.shard]
    damage += [line for shard in sorted(lines) for line in lines[shard]]
    return headers, names


def _index(shards: Sequence[Path], config: PrepareConfig) -> Iterator[_Outcome]:
    """Those with something to do in other processes."""
    to_do = []
    for shard in shards:
        header = None if config.verify else _read_header(shard)
        if header is None:
            to_do.append(shard)
        else:
            yield _Outcome(shard=shard, header=header)
    yield from run_jobs(partial(_index_shard, config.verify), to_do, _processes(config, 0, len(to_do)))


def _read_header(shard: Path) -> ShardIndex | None:
    """The index of the shard as it is now, without its columns; None if there is none."""
    try:
        header = read_index(shard, columns=False)
        return header if header.is_of(shard.stat()) else None
    except (ShardError, OSError):
        return None


def _index_shard(verify: bool, shard: Path) -> _Outcome:
    """Index a shard, or `verify` it if it has an index."""
    try:
        built = ensure_indices([shard])
        index = read_index(shard)
        damage = verify_shard(shard, index) if verify and not built else []
        if damage:
            measures_path(shard).unlink(missing_ok=True)  # the new ones will know which samples are damaged
        return _Outcome(shard=shard, header=replace(index, columns={}), damage=damage)
    except ShardError as error:
        return _Outcome(shard=shard, damage=[str(error)])
    except OSError as error:
        if is_of_writing(error, shard):
            with writing(index_path(shard)):
                raise
        return _Outcome(shard=shard, damage=[f"{shard}: {error}"])


def _measure_shard(config: MeasureConfig, job: tuple[Path, ShardIndex, bool]) -> _Outcome:
    shard, header, is_measured = job
    damage = []
    try:
        index = read_index(shard)
        if not is_measured:
            damage = _measurer(config).measure(shard, index)
        columns = ShardColumns(shard)
        columns.check()
    except WriteError:
        raise
    except ShardError as error:
        return _Outcome(shard=shard, damage=[*damage, str(error)])
    except OSError as error:
        return _Outcome(shard=shard, damage=[*damage, f"{shard}: {error}"])
    return _Outcome(shard=shard, header=header, damage=damage, names=set(columns.names))


@lru_cache(maxsize=1)
def _measurer(config: MeasureConfig) -> ShardMeasurer:
    return ShardMeasurer(config)
