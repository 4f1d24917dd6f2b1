"""Ordinary webdataset tars, read by sample number through the index beside each (see `shard_index`).

Nothing in them is ever executed, unpickled or extracted.
"""

import logging
import os
import resource
import zlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from aimv2.data.images import MOST_BYTES
from aimv2.data.mixture import SMALLEST_CHUNK, WINDOW
from aimv2.data.remote import RemoteFiles
from aimv2.data.shard_index import EXTENSIONS, IMAGE_EXTENSIONS, ShardIndex, index_path, read_index
from aimv2.data.shard_list import ShardEntry, expand_shards
from aimv2.data.shard_scan import build_index, renew_index
from aimv2.data.tar import ShardError

__all__ = ["DamagedMember", "Sample", "ShardError", "Shards", "ensure_indices", "expand_shards"]

logger = logging.getLogger(__name__)

MOST_TEXT_BYTES = 4 << 20  # of a txt or json; parsed, JSON may take 25 times its size
MOST_TO_INDEX = 256  # at the start of a run
OPEN_SHARDS = WINDOW // SMALLEST_CHUNK + 64  # of one source in one process; two file descriptors each
MOST_FILES = 1 << 16  # descriptors of a process, where the system allows as many


class DamagedMember(ValueError):
    """What was read is not what was indexed. The message is the kind of damage, without the place."""


@dataclass(slots=True)
class Sample:
    """The members of one sample; None where it has none, or it was not asked for."""

    key: str
    image: bytes | None = None  # the first, if there are several
    text: bytes | None = None
    json: bytes | None = None


def ensure_indices(shards: Iterable[Path | str | ShardEntry]) -> int:
    """Build the indices that are missing; call it on one rank, and let the others wait. Returns how many it built.

    Remote shards are left alone: theirs must be beside them.

    Raises:
        ShardError: a shard is damaged, is not the one that its index was made from, or keeps other rows than its list
            says; or more than MOST_TO_INDEX have no index, which would take one process too long.
    """
    listed = {(shard.location if isinstance(shard, ShardEntry) else shard): shard for shard in shards}
    local = [path for path in listed if isinstance(path, Path)]
    missing = [path for path in local if not index_path(path).exists()]
    if len(missing) > MOST_TO_INDEX:
        raise ShardError(
            f"{missing[0]} and {len(missing) - 1} more have no index: `make_shards.py prepare FOLDER` builds them, on "
            "all cores"
        )
    for path in missing:
        build_index(path)
    if missing:
        logger.info("indexed %d shards", len(missing))
    for path in local:
        index, entry = read_index(path, columns=False), listed[path]
        if not index.is_of(os.stat(path)):
            logger.info("%s: its time is another than when it was indexed, so it is read again", path)
            renew_index(path, index)
        if isinstance(entry, ShardEntry) and (index.samples, index.identity) != (entry.samples, entry.digest):
            raise ShardError(f"{path}: its index is another than the list of shards says; prepare the folder again")
    return len(missing)


class Shards(Sequence[Sample]):
    """The samples kept of a list of shards, by number. Raises IndexError beyond the last.

    Shards and their indices are opened when first read, at most OPEN_SHARDS at a time, so neither memory nor file
    descriptors grow with the data. Can be pickled, and used after a fork.

    Args:
        shards: tars whose indices are built, or entries of a list, of which nothing is opened before it is read.
        extensions: members to read; others are skipped.
        remote: what reads those that are URLs.

    Raises:
        ShardError: an index is missing, its tar has changed since, or it keeps no sample in any shard.
    """

    def __init__(
        self,
        shards: Sequence[Path | str | ShardEntry],
        extensions: Collection[str] = EXTENSIONS,
        remote: RemoteFiles | None = None,
    ):
        self._extensions, self._remote = frozenset(extensions), remote
        if not shards:
            raise ShardError("no shards: expected at least one")
        entries = [shard if isinstance(shard, ShardEntry) else self._entry(shard) for shard in shards]
        self.locations = [entry.location for entry in entries]
        self.digests = [entry.digest for entry in entries]
        self._ends = np.cumsum([entry.samples for entry in entries], dtype=np.int64)
        self._opened: dict[int, _OpenShard] = {}  # least recently used first
        if not len(self):
            raise ShardError(f"{self.locations[0]} and {len(entries) - 1} more: no sample is left after filtering")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, number: int) -> Sample:
        """Read a sample.

        Raises:
            DamagedMember: a member is cut off or has another crc32 than when it was indexed.
            ShardError: the shard was replaced, or cannot be read.
        """
        shard, place = self._locate(number)
        opened = self._open(shard)
        row = opened.index.row(place)
        sample = Sample(opened.index.key(row))
        for extension, offset, size, crc32 in opened.index.members(row):
            if extension not in self._extensions:
                continue
            if size > _most_bytes(extension):
                raise DamagedMember("over 32 MiB" if extension in IMAGE_EXTENSIONS else "a text over 4 MiB")
            try:
                data = opened.read(offset, size)
            except OSError as error:
                raise ShardError.at(self.locations[shard], offset, f"sample {sample.key}: {error}") from error
            if zlib.crc32(data) != crc32:
                raise DamagedMember("other bytes than were indexed")
            _put(sample, extension, data)
        return sample

    def unopened(self, number: int) -> str | None:
        """The URL of the index that has to be fetched before a sample can be read, if any."""
        shard, _ = self._locate(number)
        location = self.locations[shard]
        return f"{location}.idx" if isinstance(location, str) and shard not in self._opened else None

    def places(self, number: int) -> list[tuple[str, int, int]]:
        """(URL, offset, size) of the members that reading a sample needs from elsewhere, for `RemoteFiles.prefetch`."""
        shard, place = self._locate(number)
        if isinstance(location := self.locations[shard], Path):
            return []
        index = self._open(shard).index
        members = index.members(index.row(place))
        wanted = (member for member in members if member[0] in self._extensions)
        return [(location, offset, size) for name, offset, size, _ in wanted if size <= _most_bytes(name)]

    def describe(self, number: int) -> str:
        """`SHARD: sample KEY`, for messages."""
        shard, place = self._locate(number)
        index = self._open(shard).index
        return f"{self.locations[shard]}: sample {index.key(index.row(place))}"

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_opened": {}}

    def _locate(self, number: int) -> tuple[int, int]:
        """(shard, number among those that it keeps)."""
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)}")
        shard = int(np.searchsorted(self._ends, number, side="right"))
        return shard, number - (int(self._ends[shard - 1]) if shard else 0)

    def _open(self, shard: int) -> "_OpenShard":
        opened = self._opened.pop(shard, None)
        if opened is None:
            if not self._opened:
                _allow_open_files()
            if len(self._opened) >= OPEN_SHARDS:
                self._opened.pop(next(iter(self._opened))).close()
            location = self.locations[shard]
            opened = _OpenShard(location, self._index(location), self._remote)
            count = int(self._ends[shard]) - (int(self._ends[shard - 1]) if shard else 0)
            if (opened.index.identity, opened.index.samples) != (self.digests[shard], count):
                opened.close()
                raise ShardError(f"{location}: its index is another than when this began; was it prepared again?")
        self._opened[shard] = opened
        return opened

    def _entry(self, location: Path | str) -> ShardEntry:
        index = self._index(location, columns=False)
        return ShardEntry(location, index.samples, index.identity)

    def _index(self, location: Path | str, columns: bool = True) -> ShardIndex:
        """The index of a shard.

        Raises:
            ShardError: there is none, or it is not of the shard as it is now.
        """
        if isinstance(location, Path):
            index, stat = read_index(location, columns), os.stat(location)
            if index.is_of(stat):
                return index
            made_for = f"{index.source_size} bytes and mtime {index.source_mtime_ns} ns"
            raise ShardError(
                f"{location}: its index is stale: made for {made_for}, found {stat.st_size} and {stat.st_mtime_ns}"
            )
        if self._remote is None:
            raise ShardError(f"{location}: not a local path")
        index = read_index(location, columns, self._remote.local_copy(f"{location}.idx"))
        if (size := self._remote.size(location)) != index.source_size:
            raise ShardError(f"{location}: its index is stale: made for {index.source_size} bytes, found {size}")
        return index


class _OpenShard:
    """A shard that is being read, and its index."""

    def __init__(self, location: Path | str, index: ShardIndex, remote: RemoteFiles | None):
        self.index = index
        self._location, self._remote = location, remote
        self._file = open(location, "rb", buffering=0) if isinstance(location, Path) else None  # noqa: SIM115

    def read(self, offset: int, size: int) -> bytes:
        if self._file is None:
            return self._remote.read(self._location, offset, size)
        data = os.pread(self._file.fileno(), size, offset)
        while len(data) < size and (more := os.pread(self._file.fileno(), size - len(data), offset + len(data))):
            data += more  # file systems may give less than was asked for
        return data

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _allow_open_files() -> None:
    """The samples of a window may come from OPEN_SHARDS shards of each source; systems begin with 1,024 descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _most_bytes(extension: str) -> int:
    """Members may be as large as 4 GiB."""
    return MOST_BYTES if extension in IMAGE_EXTENSIONS else MOST_TEXT_BYTES


def _put(sample: Sample, extension: str, data: bytes) -> None:
    if extension == "txt":
        sample.text = data
    elif extension == "json":
        sample.json = data
    elif extension in IMAGE_EXTENSIONS and sample.image is None:
        sample.image = data
