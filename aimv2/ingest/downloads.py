"""What img2dataset's `00000_stats.json` files say of a download. They come last: a tar without one is unfinished.

Seen with img2dataset 1.47: count, successes, failed_to_download, failed_to_resize, and status_dict, which counts
"success" and every error message.
"""

import itertools
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from aimv2.data.tar import ShardError, read_members

_STATS = "_stats.json"
_COUNTS = ("count", "successes", "failed_to_download", "failed_to_resize")


@dataclass(slots=True, kw_only=True)
class Download:
    """What came of the download of a folder's shards."""

    finished: int = 0  # shards with stats
    unfinished: list[str] = field(default_factory=list)  # tars without, or whose stats cannot be used
    empty: list[str] = field(default_factory=list)  # finished tars without a sample: every download had failed
    gone: list[str] = field(default_factory=list)  # stats without a tar
    gaps: list[str] = field(default_factory=list)  # numbers of which there is neither: "00002", "00005-00009"
    unusable: list[str] = field(default_factory=list)  # a line for each stats file that cannot be used
    count: int = 0  # rows that were to be downloaded
    successes: int = 0
    failed_to_download: int = 0
    failed_to_resize: int = 0
    failures: Counter[str] = field(default_factory=Counter)  # by message


class _Stats(NamedTuple):
    counts: dict[str, int]
    failures: dict[str, int]  # by message


def is_download(folder: Path) -> bool:
    return next(folder.glob(f"*{_STATS}"), None) is not None


def read_download(folder: Path) -> Download:
    """Sum up the stats of all finished shards in a folder. A shard whose stats cannot be used is not finished."""
    paths = {path.name.removesuffix(_STATS): path for path in sorted(folder.glob(f"*{_STATS}"))}
    tars = {path.stem for path in folder.glob("*.tar")}
    download = Download(gone=[f"{name}.tar" for name in sorted(paths.keys() - tars)], gaps=_gaps(paths.keys() | tars))
    finished = set()
    for name, path in paths.items():
        try:
            stats = _read_stats(path)
        except ShardError as error:
            download.unusable.append(str(error))
            continue
        for count, number in stats.counts.items():
            setattr(download, count, getattr(download, count) + number)
        download.failures.update(stats.failures)
        if name in tars:
            finished.add(name)
            if not stats.counts["successes"] and _has_no_sample(folder / f"{name}.tar"):
                download.empty.append(f"{name}.tar")
    download.finished = len(finished)
    download.unfinished = [f"{name}.tar" for name in sorted(tars - finished)]
    return download


def read_successes(shard: Path) -> int:
    """How many samples the stats of a shard promise.

    Raises:
        ShardError: it has no stats, or none that can be used.
    """
    return _read_stats(shard.with_name(f"{shard.stem}{_STATS}")).counts["successes"]


def _read_stats(path: Path) -> _Stats:
    try:
        contents = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else "empty or cut short"
        raise ShardError(f"{path}: {reason}: the shard is taken as unfinished") from None
    try:
        counts = {name: int(contents[name]) for name in _COUNTS}
        failures = {str(k): int(n) for k, n in contents["status_dict"].items() if k != "success"}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ShardError(f"{path}: not the stats of an img2dataset shard ({error!r}): it is left out") from None
    return _Stats(counts, failures)


def _has_no_sample(tar: Path) -> bool:
    """Whether it is a whole tar without a member."""
    try:
        with open(tar, "rb", buffering=0) as file:
            return next(read_members(tar, file.fileno()), None) is None
    except (ShardError, OSError):
        return False


def _gaps(names: set[str]) -> list[str]:
    digits = {int(name): len(name) for name in names if name.isdecimal()}
    gaps, numbers = [], sorted(digits)
    for before, after in itertools.pairwise(numbers):
        if after - before > 1:
            first, last = (f"{n:0{digits[before]}d}" for n in (before + 1, after - 1))
            gaps.append(first if first == last else f"{first}-{last}")
    return gaps
