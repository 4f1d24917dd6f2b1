"""What img2dataset's `00000_stats.json` files say of a download. They come last: a tar without one is unfinished.

Seen with img2dataset 1.47: count, successes, failed_to_download, failed_to_resize, and status_dict, which counts
"success" and every error message.
"""

import itertools
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from aimv2.data.tar import ShardError

_STATS = "_stats.json"


@dataclass(slots=True, kw_only=True)
class Download:
    """What came of the download of a folder's shards."""

    finished: int = 0  # shards with stats
    unfinished: list[str] = field(default_factory=list)  # tars without
    gone: list[str] = field(default_factory=list)  # stats without a tar
    gaps: list[str] = field(default_factory=list)  # numbers of which there is neither: "00002", "00005-00009"
    count: int = 0  # rows that were to be downloaded
    successes: int = 0
    failed_to_download: int = 0
    failed_to_resize: int = 0
    failures: Counter[str] = field(default_factory=Counter)  # by message


def is_download(folder: Path) -> bool:
    return next(folder.glob(f"*{_STATS}"), None) is not None


def read_download(folder: Path) -> Download:
    """Sum up the stats of all finished shards in a folder.

    Raises:
        ShardError: one of them is not what img2dataset writes.
    """
    stats = {path.name.removesuffix(_STATS): path for path in sorted(folder.glob(f"*{_STATS}"))}
    tars = {path.stem for path in folder.glob("*.tar")}
    download = Download(
        finished=len(stats.keys() & tars),
        unfinished=[f"{name}.tar" for name in sorted(tars - stats.keys())],
        gone=[f"{name}.tar" for name in sorted(stats.keys() - tars)],
        gaps=_gaps(stats.keys() | tars),
    )
    for path in stats.values():
        try:
            contents = json.loads(path.read_bytes())
            for name in ("count", "successes", "failed_to_download", "failed_to_resize"):
                setattr(download, name, getattr(download, name) + int(contents[name]))
            download.failures.update({str(k): int(n) for k, n in contents["status_dict"].items() if k != "success"})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ShardError(f"{path}: not the stats of an img2dataset shard ({error!r})") from None
    return download


def _gaps(names: set[str]) -> list[str]:
    digits = {int(name): len(name) for name in names if name.isdecimal()}
    gaps, numbers = [], sorted(digits)
    for before, after in itertools.pairwise(numbers):
        if after - before > 1:
            first, last = (f"{n:0{digits[before]}d}" for n in (before + 1, after - 1))
            gaps.append(first if first == last else f"{first}-{last}")
    return gaps
