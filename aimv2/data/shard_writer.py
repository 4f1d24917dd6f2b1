"""Webdataset shards from any source of samples: in parallel, whole or not at all, going on where a run stopped.

`FOLDER/NAME.tar` appear one by one, each under a temporary name until it is complete. `FOLDER/recipe.unfinished.json`
says from the start what is being written and becomes `recipe.json` at the end. The bytes of a shard depend on its
samples only: members have no time, owner or mode.

What a source cannot use is counted by reason, shard by shard, in `FOLDER/written/NAME.json`, so that a run that goes on
knows of it; `written/report.json` is their sum.
"""

import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, Protocol

from aimv2.data.processes import run_jobs
from aimv2.data.shard_list import LIST_NAME
from aimv2.data.shard_scan import build_index
from aimv2.whole_files import whole_file, write_json

MOST_EXAMPLES = 5  # of what was dropped for one reason

_BEGUN, _DONE = "recipe.unfinished.json", "recipe.json"
_RECORDS, _REPORT = "written", "report.json"


class RawSample(NamedTuple):
    """What a source gives of one sample."""

    key: str
    members: dict[str, bytes]  # by extension, in their order in the tar
    notes: tuple[str, ...] = ()  # what is worth counting but no reason to drop it


class Dropped(NamedTuple):
    """What a source could not use."""

    source: str  # where it is
    reason: str  # a few words without numbers, so that they can be counted


class ShardJob(NamedTuple):
    """One shard to be written."""

    name: str  # of its file, without .tar
    candidates: int  # samples, if all can be used
    read: Callable[[], Iterator[RawSample | Dropped]]  # can be pickled


class SampleSource(Protocol):
    """Where samples come from."""

    recipe: dict  # what decides the samples, as JSON: the same recipe makes the same jobs
    opaque: dict[str, str]  # fields of the recipe that tell a reader nothing, and what to say of another value
    notes: Counter[str]  # what was seen beside samples, and left alone

    def __len__(self) -> int:
        """The candidates of all jobs."""

    def jobs(self) -> Iterator[ShardJob]: ...


@dataclass(slots=True)
class Written:
    """What became of the candidates of one shard, or of several."""

    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)  # by reason
    examples: dict[str, list[str]] = field(default_factory=dict)  # sources of the first ones dropped, by reason
    notes: Counter[str] = field(default_factory=Counter)

    def drop(self, dropped: Dropped) -> None:
        self.dropped[dropped.reason] += 1
        self._show(dropped.reason, [dropped.source])

    def add(self, other: "Written") -> None:
        self.kept += other.kept
        self.dropped += other.dropped
        self.notes += other.notes
        for reason, sources in other.examples.items():
            self._show(reason, sources)

    def reasons(self) -> str:
        """`1200 no caption, 3 over 32 MiB`, the most frequent first."""
        counts = sorted(self.dropped.items(), key=lambda item: (-item[1], item[0]))
        return ", ".join(f"{count} {reason}" for reason, count in counts)

    def summary(self) -> str:
        """What was kept and what was dropped, in lines."""
        lines = [f"kept {self.kept} of {self.kept + self.dropped.total()} samples"]
        for reason, count in sorted(self.dropped.items(), key=lambda item: (-item[1], item[0])):
            lines.append(f"  dropped {count}: {reason} (such as {self.examples[reason][0]})")
        lines += [f"  noted {count}: {note}" for note, count in sorted(self.notes.items())]
        return "\n".join(lines)

    def _show(self, reason: str, sources: list[str]) -> None:
        shown = self.examples.setdefault(reason, [])
        shown += sources[: MOST_EXAMPLES - len(shown)]


def is_complete(folder: Path, recipe: dict, opaque: Mapping[str, str] = MappingProxyType({})) -> bool:
    """Whether all shards of this recipe have been written to the folder.

    Args:
        opaque: what to say where these fields of the recipe differ, instead of their values: "the files are others".

    Raises:
        ValueError: the folder holds (or has begun to hold) the shards of another recipe; names what differs.
    """
    for marker in _markers(folder):
        found = json.loads(marker.read_text())
        for name in {**recipe, **found}:
            if found.get(name) != recipe.get(name):
                said = f"{marker} says {name} = {found.get(name)!r}, the recipe says {recipe.get(name)!r}"
                if name in opaque:
                    said = f"{opaque[name]} than when {folder} was written"
                raise ValueError(f"{said}: write to another folder or remove this one")
    return is_written(folder)


def write_shards(
    folder: Path, source: SampleSource, workers: int = 1, progress: Callable[[int], None] | None = None
) -> Written:
    """Write the shards of a source and their indices. Those that are already there are kept.

    A list `shards.list` in the folder is removed when a shard has to be written: the new one has no filters yet.

    Args:
        workers: processes; with 1 everything happens in this one.
        progress: called in this process with the number of candidates of each shard done (or found).

    Raises:
        ValueError: the folder holds the shards of another recipe, or of none at all; or not one sample can be used.
    """
    recipe = source.recipe
    begin(folder, recipe, source.opaque)
    (folder / _RECORDS).mkdir(exist_ok=True)
    shards: dict[str, Written] = {}
    for name, candidates, written in run_jobs(partial(_write_recorded, folder), source.jobs(), workers):
        shards[name] = written
        if progress is not None:
            progress(candidates)
    total = Written(notes=Counter(source.notes))
    for name in sorted(shards):  # not in the order in which they got done, so that the examples are always the same
        total.add(shards[name])
    write_json(folder / _RECORDS / _REPORT, {"recipe": recipe, **_as_json(total)})
    if not total.kept:
        raise ValueError(f"{folder}: not one sample can be used: {total.reasons()}")
    finish(folder)
    return total


def is_written(folder: Path) -> bool:
    """Whether all shards of some recipe have been written to the folder."""
    return (folder / _DONE).is_file()


def report_path(folder: Path) -> Path:
    return folder / _RECORDS / _REPORT


def begin(folder: Path, recipe: dict, opaque: Mapping[str, str] = MappingProxyType({})) -> None:
    """Mark the folder as holding the shards of this recipe, which are not all there.

    Raises:
        ValueError: the folder holds the shards of another recipe, or of none at all.
    """
    if is_complete(folder, recipe, opaque):
        return
    folder.mkdir(parents=True, exist_ok=True)
    strangers = [] if _markers(folder) else sorted(folder.glob("*.tar"))
    if strangers:
        raise ValueError(f"{folder} has {strangers[0].name} but no {_DONE}: expected an empty folder")
    write_json(folder / _BEGUN, recipe)


def finish(folder: Path) -> None:
    """Mark the folder as complete, and remove what interrupted runs have left."""
    for pattern in (".*.tar.*.tmp", f"{_RECORDS}/.*.json.*.tmp"):
        for leftover in folder.glob(pattern):
            leftover.unlink(missing_ok=True)
    if (folder / _BEGUN).is_file():
        os.replace(folder / _BEGUN, folder / _DONE)


def write_tar(path: Path, samples: Iterable[RawSample]) -> int:
    """Write a tar, whole or not at all, and return the number of samples. Without any, there is no tar."""
    count = 0
    with whole_file(path) as temporary:
        with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
            for key, members, _ in samples:
                count += 1
                for extension, data in members.items():
                    member = tarfile.TarInfo(f"{key}.{extension}")  # mtime, owner and mode are constants
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        if not count:
            temporary.unlink()
    return count


def _write_recorded(folder: Path, job: ShardJob) -> tuple[str, int, Written]:
    """The record comes last: a shard without one is written again."""
    path, record = folder / f"{job.name}.tar", folder / _RECORDS / f"{job.name}.json"
    if record.is_file():
        written = _from_json(json.loads(record.read_text()))
        if path.is_file() or not written.kept:
            return job.name, job.candidates, written
    (folder / LIST_NAME).unlink(missing_ok=True)
    written = Written()
    written.kept = write_tar(path, _usable(job.read(), written))
    if written.kept:
        build_index(path)
    write_json(record, _as_json(written))
    return job.name, job.candidates, written


def _usable(samples: Iterator[RawSample | Dropped], written: Written) -> Iterator[RawSample]:
    for sample in samples:
        if isinstance(sample, Dropped):
            written.drop(sample)
        else:
            written.notes.update(sample.notes)
            yield sample


def _as_json(written: Written) -> dict:
    counts = {name: dict(sorted(getattr(written, name).items())) for name in ("dropped", "examples", "notes")}
    return {"kept": written.kept, **counts}


def _from_json(fields: dict) -> Written:
    return Written(**fields | {name: Counter(fields[name]) for name in ("dropped", "notes")})


def _markers(folder: Path) -> Sequence[Path]:
    return [folder / name for name in (_DONE, _BEGUN) if (folder / name).is_file()]
