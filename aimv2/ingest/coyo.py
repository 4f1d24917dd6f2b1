"""COYO-700M's metadata, joined to the shards that img2dataset has downloaded of it.

For `00000.tar` this writes `prepared/00000.columns.parquet`: `key` and COYO's columns, a row for every sample in the
order of the tar, null where the metadata do not have the sample. The tars are neither copied nor changed. Samples are
found by COYO's id where img2dataset was told to save it, else by their url and, where that came more than once, their
caption.

747 million rows are not held at once. A few samples of every shard, its probes, tell which part of the metadata it
comes from; then shards of the same part are joined to it together. What is missing even then is looked for in all
parts.
"""

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from aimv2.data.processes import run_jobs
from aimv2.data.tar import ShardError
from aimv2.ingest.coyo_columns import FOLDER, Group, join_group, read_state
from aimv2.ingest.downloads import Download, read_download
from aimv2.ingest.metadata import matches, places_in, read_schema
from aimv2.ingest.sidecars import read_sidecar
from aimv2.whole_files import write_json

PROBES = 8  # samples of a shard
MOST_SAMPLES = 500_000  # joined at once by one process, which takes about 1 GB

_MARKER, _REPORT = "coyo.json", "coyo_report.json"

# What is being done, how much of it now, of how much in all: shards, parts of the metadata, or samples.
Progress = Callable[[str, int, int], None]


@dataclass(slots=True)
class Joined:
    """What was found, by this run and those before it."""

    download: Download
    shards: int = 0
    samples: int = 0
    matched: int = 0
    unmatched: dict[str, int] = field(default_factory=dict)  # by reason
    repeated: int = 0
    from_json: list[str] = field(default_factory=list)  # shards without a usable parquet file
    unusable: list[str] = field(default_factory=list)  # a line for each shard

    def summary(self) -> str:
        """What was found and what was not, in lines."""
        download = self.download
        lines = [f"{self.matched} of {self.samples} samples in {self.shards} shards have their row of the metadata"]
        lines += [f"  without: {count}, {reason}" for reason, count in self.unmatched.items()]
        if self.repeated:
            lines.append(f"  {self.repeated} of them have a url of several rows: that with their caption, or the first")
        for names, what in (
            (download.unfinished, "unfinished, left out"),
            (download.empty, "empty: every download had failed"),
            (download.gaps, "missing numbers"),
            (download.gone, "stats without a tar"),
            (self.from_json, "no usable parquet file, so its json members were read"),
        ):
            if names:
                lines.append(f"  {what}: {' '.join(names)}")
        failed = download.failed_to_download + download.failed_to_resize
        lines.append(f"  {failed} of {download.count} downloads had failed")
        return "\n".join([*lines, *download.unusable, *self.unusable])


class _Probe(NamedTuple):
    """A few of a shard's samples."""

    samples: int  # of the shard
    column: str  # "id" or "url"
    values: list


def _silent(doing: str, done: int, total: int) -> None:
    """No progress is shown."""


def report_path(images: Path) -> Path:
    return images / FOLDER / _REPORT


def join_coyo(metadata: Path, images: Path, workers: int = 1, progress: Progress = _silent) -> Joined:
    """Write the columns of every finished shard that has none yet, or not of all its samples.

    Args:
        metadata: the folder of COYO's parquet files, or of some of them.
        images: img2dataset's output folder.
        progress: called in this process with ("look", shards), ("find", parts) and ("join" or "search", samples).

    Raises:
        ValueError: a folder has no parquet file or no finished shard, or was joined to other metadata before.
    """
    parts = sorted(metadata.glob("*.parquet"))
    if not parts:
        inside = sorted({f"{path.parent.name}/" for path in metadata.glob("*/*.parquet")})
        hint = f"; there are some in {', '.join(inside)}" if inside else ""
        raise ValueError(f"{metadata}: no .parquet file{hint}")
    schema = read_schema(parts[0])
    result = Joined(read_download(images))
    unfinished = {name.removesuffix(".tar") for name in result.download.unfinished}
    shards = sorted(path.stem for path in images.glob("*.tar") if path.stem not in unfinished)
    if not shards:
        raise ValueError(f"{images}: no finished shard: no NNNNN.tar with an NNNNN_stats.json")
    (images / FOLDER).mkdir(exist_ok=True)
    _check_marker(images / FOLDER / _MARKER, parts)

    fresh = [name for name in shards if read_state(images / f"{name}.tar") is None]
    probes = _read_probes(images, fresh, result.unusable, workers, progress)
    near = _nearest_parts(images, probes, parts, workers, progress)
    join = partial(_join, images, schema, parts, workers=workers, progress=progress)
    join({name: probes[name].samples for name in near}, near, "join")
    missing = {}
    for name in shards:
        state = read_state(images / f"{name}.tar")
        if (state is None and name in probes) or (state is not None and not state.done):
            missing[name] = probes[name].samples if state is None else state.samples - state.matched
    join(missing, {}, "search")

    _sum_up(result, images, shards)
    report = _as_json(result) | {"download": _as_json(result.download)}
    write_json(report_path(images), report)
    return result


def _check_marker(path: Path, parts: list[Path]) -> None:
    """Other metadata would give the shards done before and those to come different columns."""
    listing = json.dumps([(part.name, part.stat().st_size) for part in parts])
    contents = {"parts": len(parts), "digest": hashlib.sha256(listing.encode()).hexdigest()}
    if not path.is_file():
        write_json(path, contents)
    elif (found := json.loads(path.read_text())) != contents:
        raise ValueError(
            f"{path}: joined to other metadata before ({found['parts']} parts, now {len(parts)}): "
            f"remove it and {FOLDER}/*.columns.parquet to begin anew"
        )


def _read_probes(
    images: Path, names: list[str], unusable: list[str], workers: int, progress: Progress
) -> dict[str, _Probe]:
    """A few samples of every shard. What is wrong with a shard is added to `unusable`."""
    probes = {}
    for name, found in run_jobs(partial(_read_probe, images), names, workers):
        if isinstance(found, str):
            unusable.append(found)
        else:
            probes[name] = found
        progress("look", 1, len(names))
    unusable.sort()
    return dict(sorted(probes.items()))


def _read_probe(images: Path, name: str) -> tuple[str, _Probe | str]:
    try:
        sidecar = read_sidecar(images / f"{name}.tar")
    except ShardError as error:
        return name, str(error)
    places = np.unique(np.linspace(0, max(len(sidecar.keys) - 1, 0), PROBES).astype(int))[: len(sidecar.keys)]
    return name, _Probe(len(sidecar.keys), sidecar.column, sidecar.names.take(pa.array(places)).to_pylist())


def _nearest_parts(
    images: Path, probes: dict[str, _Probe], parts: list[Path], workers: int, progress: Progress
) -> dict[str, list[Path]]:
    """The parts that have probes of a shard, most first. A shard of which none has any is not there."""
    if not probes:
        return {}
    rows = [(n, p.column, value) for n, p in enumerate(probes.values()) for value in p.values]
    columns = {}
    for column, kind in (("id", pa.int64()), ("url", pa.string())):
        numbers, values = [n for n, c, _ in rows if c == column], [v for _, c, v in rows if c == column]
        columns[column] = np.array(numbers, np.int64), pa.array(values, kind)
    hits: dict[str, Counter[Path]] = {}
    names = list(probes)
    for part, numbers in run_jobs(partial(_probe_part, columns), parts, workers):
        for number, count in numbers.items():
            hits.setdefault(names[number], Counter())[part] = count
        progress("find", 1, len(parts))
    return {name: sorted(hits[name], key=lambda part: (-hits[name][part], part)) for name in names if name in hits}


def _probe_part(columns: dict[str, tuple[np.ndarray, pa.Array]], part: Path) -> tuple[Path, Counter[int]]:
    """How many probes of which shards (by number) a part has."""
    counts: Counter[int] = Counter()
    for column, (numbers, values) in columns.items():
        if len(values):
            unique = pc.unique(values).drop_null()
            found = np.zeros(len(unique), bool)
            for _, _, at in matches(part, [column], unique):
                found[at] = True
            places = places_in(values, unique)
            counts.update(numbers[(places >= 0) & found[places]].tolist())
    return part, counts


def _groups(sizes: dict[str, int], near: dict[str, list[Path]], parts: list[Path]) -> list[Group]:
    """Shards with the same nearest part, or with none, of at most MOST_SAMPLES samples (or one shard)."""
    groups = []
    nearest = {name: near[name][0] if name in near else None for name in sizes}
    for part, names in itertools.groupby(sorted(sizes, key=lambda n: (str(nearest[n]), n)), key=nearest.get):
        group: list[str] = []
        for name in [*names, None]:
            full = name is None or (group and sum(map(sizes.get, (*group, name))) > MOST_SAMPLES)
            if full and group:
                others = sorted({p for n in group for p in near.get(n, ())} - {part})
                groups.append(Group(group, [part, *others] if part else parts, part is None))
                group = []
            group = [*group, name] if name else group
    return groups


def _join(
    images: Path,
    schema: pa.Schema,
    parts: list[Path],
    sizes: dict[str, int],
    near: dict[str, list[Path]],
    doing: str,
    *,
    workers: int,
    progress: Progress,
) -> None:
    """Join these shards to their nearest parts, or to all of them."""
    for names in run_jobs(partial(join_group, images, schema), _groups(sizes, near, parts), workers):
        progress(doing, sum(map(sizes.get, names)), sum(sizes.values()))


def _sum_up(result: Joined, images: Path, shards: Iterable[str]) -> None:
    for name in shards:
        if (state := read_state(images / f"{name}.tar")) is None:
            continue
        result.shards += 1
        result.samples += state.samples
        result.matched += state.matched
        result.repeated += state.repeated
        if state.from_json:
            result.from_json.append(name)
    if result.samples > result.matched:
        result.unmatched["not in the metadata"] = result.samples - result.matched


def _as_json(record) -> dict:
    return {field.name: getattr(record, field.name) for field in fields(record)}
