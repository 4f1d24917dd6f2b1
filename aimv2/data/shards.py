"""Ordinary webdataset tars, read by sample number through the index beside each (see `shard_index`).

Local files only, and nothing in them is ever executed, unpickled or extracted.
"""

import glob
import logging
import os
import re
import zlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from aimv2.data.shard_index import (
    EXTENSIONS,
    IMAGE_EXTENSIONS,
    ShardIndex,
    build_index,
    index_path,
    read_index,
    scan_shard,
    write_index,
)
from aimv2.data.tar import ShardError

logger = logging.getLogger(__name__)

OPEN_SHARDS = 64  # of one source in one process; two file descriptors each

_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


class DamagedMember(ValueError):
    """What was read is not what was indexed. The message is the kind of damage, without the place."""


@dataclass(slots=True)
class Sample:
    """The members of one sample; None where it has none, or it was not asked for."""

    key: str
    image: bytes | None = None  # the first, if there are several
    text: bytes | None = None
    json: bytes | None = None


def expand_shards(pattern: str) -> list[Path]:
    """The tars that a glob or a range in braces (`data/{000..127}.tar`) stands for, sorted.

    Raises:
        ShardError: nothing matches, one of a range is missing, or the pattern is not a local path.
    """
    if "://" in pattern or "::" in pattern or pattern.startswith("pipe:"):
        raise ShardError(f"{pattern}: not a local path")
    paths = [os.path.expanduser(pattern)]
    while (braces := _BRACES.search(paths[0])) is not None:
        first, last = braces.groups()
        numbers = [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)]
        paths = [path.replace(braces.group(), number, 1) for path in paths for number in numbers]
        if not paths:
            raise ShardError(f"{pattern}: the range {braces.group()} is empty")
    shards = sorted({Path(shard) for path in paths for shard in _match(path)})
    if not shards:
        raise ShardError(f"{pattern}: no .tar file matches")
    return shards


def _match(path: str) -> list[str]:
    if glob.has_magic(path):
        return [found for found in glob.glob(path) if found.endswith(".tar")]
    if not os.path.isfile(path):
        raise ShardError(f"{path}: no such file")
    return [path]


def ensure_indices(shards: Iterable[Path]) -> int:
    """Build the indices that are missing; call it on one rank, and let the others wait. Returns how many it built.

    Raises:
        ShardError: a shard is damaged, or is not the one that its index was made from.
    """
    built = 0
    for shard in shards:
        if not index_path(shard).exists():
            build_index(shard)
            built += 1
        elif not (old := read_index(shard, columns=False)).is_of(os.stat(shard)):
            _renew_index(shard, old)
    if built:
        logger.info("indexed %d shards", built)
    return built


def _renew_index(shard: Path, old: ShardIndex) -> None:
    """A copied shard has another time but the same contents; a shard that was changed must not go unseen."""
    with open(shard, "rb", buffering=0) as file:
        new = scan_shard(shard, file.fileno())
    if new.digest != old.digest:
        raise ShardError(f"{shard}: its contents changed; if that was meant, delete {index_path(shard).name}")
    write_index(shard, new)


class Shards(Sequence[Sample]):
    """All samples of a list of shards, by number. Raises IndexError beyond the last.

    Shards and their indices are opened when first read, at most OPEN_SHARDS at a time, so neither memory nor file
    descriptors grow with the data. Can be pickled, and used after a fork.

    Args:
        paths: tars whose indices are built.
        extensions: members to read; others are skipped.

    Raises:
        ShardError: an index is missing, or its tar has changed since.
    """

    def __init__(self, paths: Sequence[Path], extensions: Collection[str] = EXTENSIONS):
        self.paths = list(paths)
        self._extensions = frozenset(extensions)
        indices = [_current_index(path, columns=False) for path in self.paths]
        self._ends = np.cumsum([index.samples for index in indices], dtype=np.int64)
        self.digests = [index.digest for index in indices]
        self._opened: dict[int, tuple[BinaryIO, ShardIndex]] = {}  # least recently used first

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, number: int) -> Sample:
        """Read a sample.

        Raises:
            DamagedMember: a member is cut off or has another crc32 than when it was indexed.
            ShardError: the shard was replaced, or cannot be read.
        """
        shard, row = self._locate(number)
        file, index = self._open(shard)
        sample = Sample(index.key(row))
        for extension, offset, size, crc32 in index.members(row):
            if extension not in self._extensions:
                continue
            try:
                data = os.pread(file.fileno(), size, offset)
            except OSError as error:
                raise ShardError.at(self.paths[shard], offset, f"sample {sample.key}: {error}") from error
            if zlib.crc32(data) != crc32:
                raise DamagedMember("other bytes than were indexed")
            _put(sample, extension, data)
        return sample

    def describe(self, number: int) -> str:
        """`SHARD: sample KEY`, for messages."""
        shard, row = self._locate(number)
        return f"{self.paths[shard]}: sample {self._open(shard)[1].key(row)}"

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_opened": {}}

    def _locate(self, number: int) -> tuple[int, int]:
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)}")
        shard = int(np.searchsorted(self._ends, number, side="right"))
        return shard, number - (int(self._ends[shard - 1]) if shard else 0)

    def _open(self, shard: int) -> tuple[BinaryIO, ShardIndex]:
        opened = self._opened.pop(shard, None)
        if opened is None:
            if len(self._opened) >= OPEN_SHARDS:
                self._opened.pop(next(iter(self._opened)))[0].close()
            path = self.paths[shard]
            opened = open(path, "rb", buffering=0), _current_index(path)  # noqa: SIM115 (stays open)
        self._opened[shard] = opened
        return opened


def _put(sample: Sample, extension: str, data: bytes) -> None:
    if extension == "txt":
        sample.text = data
    elif extension == "json":
        sample.json = data
    elif extension in IMAGE_EXTENSIONS and sample.image is None:
        sample.image = data


def _current_index(shard: Path, columns: bool = True) -> ShardIndex:
    index = read_index(shard, columns)
    stat = os.stat(shard)
    if not index.is_of(stat):
        raise ShardError(
            f"{shard}: its index is stale: made for {index.source_size} bytes and mtime {index.source_mtime_ns} ns, "
            f"found {stat.st_size} and {stat.st_mtime_ns}"
        )
    return index
