"""Which shards there are: a glob, a range in braces, or a list that `make_shards.py prepare` wrote.

A list, `shards.list`, has names relative to its own folder, and how many samples of each shard are kept; so a process
starts without opening each. Local paths, and URLs where a `RemoteFiles` allows them.
"""

import glob
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from aimv2.data.remote import RemoteFiles, is_remote
from aimv2.data.shard_index import read_index
from aimv2.data.tar import ShardError
from aimv2.whole_files import write_json

LIST_NAME = "shards.list"
MOST_IN_RANGE = 256  # URLs; the index of each is fetched when a process starts
LIST_FORMAT = "aimv2 shards 1"

_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


class ShardEntry(NamedTuple):
    """A shard of a list."""

    location: Path | str  # str: a URL
    samples: int  # kept
    digest: str  # of its index, `ShardIndex.identity`


def expand_shards(pattern: str, remote: RemoteFiles | None = None) -> list[Path | str | ShardEntry]:
    """The shards that a pattern stands for: `data/*.tar`, `data/{000..127}.tar`, `data/shards.list`, or such URLs.

    A glob and a range are sorted, a list keeps its order.

    Raises:
        ShardError: nothing matches, one of a range is missing, the list is damaged or names a place outside its folder,
            or the pattern is neither a local path nor an allowed URL.
    """
    if not is_remote(pattern):
        paths = _expand_braces(os.path.expanduser(pattern))
    elif remote is None:
        raise ShardError(f"{pattern}: not a local path; what may be read from elsewhere is said by data.remote")
    elif glob.has_magic(pattern):
        raise ShardError(f"{pattern}: a server can't be asked for a glob; expected a range in braces or a list")
    else:
        remote.check(pattern)
        paths = _expand_braces(pattern)
        if len(paths) > MOST_IN_RANGE:
            raise ShardError(f"{pattern}: {len(paths)} shards elsewhere, each to be asked for at the start; list them")
    if pattern.endswith(".list"):
        return read_shard_list(pattern, remote)
    if is_remote(pattern):
        return sorted(set(paths))
    shards = sorted({Path(shard) for path in paths for shard in _match(path)})
    if not shards:
        raise ShardError(f"{pattern}: no .tar file matches")
    return shards


def write_shard_list(folder: Path, names: Sequence[str]) -> Path:
    """Write `folder`/shards.list of these tars, as their indices are now, whole or not at all, and return its path."""
    shards = []
    for name in names:
        index = read_index(folder / name, columns=False)
        shards.append({"name": name, "samples": index.samples, "digest": index.identity})
    path = folder / LIST_NAME
    write_json(path, {"format": LIST_FORMAT, "shards": shards})
    return path


def read_shard_list(location: str, remote: RemoteFiles | None = None) -> list[ShardEntry]:
    """The shards of a list with samples kept.

    Raises:
        ShardError: there is none, it is damaged, or it names a place outside its folder.
    """
    path = remote.local_copy(location) if is_remote(location) and remote else Path(location).expanduser()
    try:
        contents = json.loads(path.read_bytes())
        if contents["format"] != LIST_FORMAT:
            raise ValueError(f"format {contents['format']!r}, expected {LIST_FORMAT!r}")
        entries = [(str(s["name"]), int(s["samples"]), str(s["digest"])) for s in contents["shards"]]
        for name, samples, _ in entries:
            if not re.fullmatch(r"[^/\\\0]+\.tar", name) or not 0 <= samples < 2**32:
                raise ValueError(f"{samples} samples of {name!r}, expected the name of a .tar beside the list")
    except FileNotFoundError:
        raise ShardError(f"{location}: no such file") from None
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError, OSError) as error:
        raise ShardError(f"{location}: not a usable list of shards ({error})") from None
    folder = location.rpartition("/")[0] if is_remote(location) else path.parent
    place = f"{folder}/{{}}".format if is_remote(location) else folder.joinpath
    if len({name for name, *_ in entries}) < len(entries):
        raise ShardError(f"{location}: not a usable list of shards (it names one twice)")
    shards = [ShardEntry(place(name), samples, digest) for name, samples, digest in entries if samples]
    if not shards:
        raise ShardError(f"{location}: no sample is left in any of its {len(entries)} shards")
    return shards


def _expand_braces(pattern: str) -> list[str]:
    paths = [pattern]
    while (braces := _BRACES.search(paths[0])) is not None:
        first, last = braces.groups()
        numbers = [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)]
        paths = [path.replace(braces.group(), number, 1) for path in paths for number in numbers]
        if not paths:
            raise ShardError(f"{pattern}: the range {braces.group()} is empty")
    return paths


def _match(path: str) -> list[str]:
    if glob.has_magic(path):
        return [found for found in glob.glob(path) if found.endswith(".tar")]
    if not os.path.isfile(path):
        raise ShardError(f"{path}: no such file")
    return [path]
