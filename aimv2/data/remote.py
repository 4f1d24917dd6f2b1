"""Files on servers and in object stores, from an explicit allow-list, through a cache on the local disk.

Each block of a file is fetched once a machine, and kept in a `BlockCache`. (fsspec's own block cache has no bound, and
its processes overwrite each other's list of what is there.)
"""

import hashlib
import logging
import struct
import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from aimv2.data.block_cache import PAGE, BlockCache
from aimv2.data.connections import OPTIONS, Connections, url_problem
from aimv2.data.tar import ShardError

logger = logging.getLogger(__name__)

MAX_AGE = 600.0  # seconds after which a file's size is asked for again
SMALLEST_CACHE = 16  # blocks
LARGEST_COPY = 1 << 28  # bytes; an index has about 70 a sample
PARALLEL = 16  # requests of one process

_RECORD = struct.Struct("<QQ16s")  # size, time it was asked for, version


@dataclass(slots=True, kw_only=True)
class RemoteConfig:
    """Which files may be read from elsewhere, and where their blocks are kept."""

    allow: list[str]  # prefixes that end in "/": "https://data.example.org/coyo/", "s3://bucket/coyo/"
    cache: str  # local folder, shared by all processes of a machine
    cache_gib: float = 100.0  # the most it holds
    block_mib: float = 2.0  # unit of reading and caching: more saves requests, less saves bytes
    options: dict[str, dict[str, str | bool]] = field(default_factory=dict)  # {"s3": {"endpoint_url": "https://..."}}

    def __post_init__(self):
        for prefix in self.allow:
            if url_problem(prefix) or not prefix.endswith("/"):
                expected = f"PROTOCOL://HOST-OR-BUCKET/.../, PROTOCOL one of {' '.join(OPTIONS)}"
                raise ValueError(f"allow {prefix!r}: {url_problem(prefix) or 'no / at its end'}; expected {expected}")
        if not self.allow or not self.cache:
            raise ValueError(f"allow {self.allow} and cache {self.cache!r}: expected at least one prefix and a folder")
        if not PAGE <= self.block_mib * 2**20 <= 2**26 or self.block_mib * 2**20 % PAGE:
            raise ValueError(f"block_mib {self.block_mib}: expected a multiple of 1/16, at most 64")
        if not SMALLEST_CACHE * self.block_mib <= self.cache_gib * 1024 < float("inf"):
            raise ValueError(f"cache_gib {self.cache_gib}: expected room for {SMALLEST_CACHE} blocks or more")
        for protocol, options in self.options.items():
            if protocol not in OPTIONS or (unknown := sorted(options.keys() - OPTIONS[protocol])):
                which = f"{protocol}.{unknown[0]}" if protocol in OPTIONS else protocol
                known = " ".join(f"{name}.{option}" for name, names in OPTIONS.items() for option in sorted(names))
                raise ValueError(f"options {which}: expected among {known}; secrets belong into the environment")


def is_remote(location: str) -> bool:
    """Whether it is anything but a local path; `RemoteFiles.check` says whether it may be read."""
    return "://" in location or "::" in location or location.startswith("pipe:")


class RemoteFile(NamedTuple):
    """What a server says about a file."""

    size: int  # bytes
    version: bytes  # (16,), a hash of its ETag or date


class RemoteFiles:
    """Reads files by URL. Can be pickled, and used after a fork: each process opens its own connections.

    Raises:
        ShardError: the cache folder can't be written.
        ValueError: a protocol of the allow-list needs a package that is not installed.
    """

    def __init__(self, config: RemoteConfig):
        self.config = config
        self._block = int(config.block_mib * 2**20)
        self._cache = BlockCache(Path(config.cache).expanduser(), int(config.cache_gib * 2**30))
        self._connections = Connections(config.allow, config.options)
        self._files: dict[str, tuple[RemoteFile, float]] = {}  # {url: (what is known, until when)}

    def __reduce__(self):
        return RemoteFiles, (self.config,)

    def check(self, url: str) -> None:
        """Raises ShardError unless the URL is plain and begins with a prefix of the allow-list."""
        self._connections.check(url)

    def size(self, url: str) -> int:
        """Bytes of a file.

        Raises:
            ShardError: not allowed, not there, not to be reached, or another size than when it was first asked for.
        """
        return self._file(url).size

    def read(self, url: str, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset` on.

        Raises:
            ShardError: as `size`; or the range goes beyond the end, the server doesn't serve ranges, or the cache
                can't be written.
        """
        file = self._file(url)
        if offset < 0 or size < 0 or offset + size > file.size:
            raise ShardError.at(url, offset, f"no {size} bytes here: the file has {file.size}")
        parts = []
        for block in range(offset // self._block, -(-(offset + size) // self._block)):
            first = block * self._block
            begin, end = max(0, offset - first), min(self._block, offset + size - first)
            parts.append(self._read_block(url, file, block, begin, end))
        return b"".join(parts)

    def prefetch_copies(self, urls: Iterable[str]) -> None:
        """Have copies of small files in the cache, PARALLEL of them being fetched at a time.

        Raises:
            ShardError: as `local_copy`.
        """
        with ThreadPoolExecutor(PARALLEL) as pool:
            deque(pool.map(self.local_copy, urls), maxlen=0)

    def prefetch(self, ranges: Iterable[tuple[str, int, int]]) -> None:
        """Have the blocks of ranges (url, offset, size) in the cache, PARALLEL of them being fetched at a time.

        Raises:
            ShardError: as `read`.
        """
        with ThreadPoolExecutor(PARALLEL) as pool:
            deque(pool.map(lambda wanted: self.read(*wanted), ranges), maxlen=0)

    def local_copy(self, url: str) -> Path:
        """The whole of a small file, in the cache: to be opened at once, for it may be evicted later.

        Raises:
            ShardError: as `read`.
        """
        file = self._file(url)
        if file.size > LARGEST_COPY:
            raise ShardError(f"{url}: {file.size} bytes, expected at most {LARGEST_COPY}")
        name = self._name(url, *file) + "-whole"
        if (path := self._cache.read_copy(name)) is not None:
            return path
        with self._cache.fetching(name):
            if (path := self._cache.read_copy(name)) is not None:
                return path
            begins = range(0, file.size, self._block)
            parts = [self._connections.fetch(url, begin, min(begin + self._block, file.size)) for begin in begins]
            return self._cache.write_copy(name, b"".join(parts))

    def _name(self, *of: Any) -> str:
        return hashlib.sha256(repr((self._block, *of)).encode()).hexdigest()[:32]

    def _file(self, url: str) -> RemoteFile:
        known, until = self._files.get(url, (None, 0.0))
        if known is not None and time.monotonic() < until:
            return known
        try:
            file, age = self._ask(url)
        except ShardError as error:
            if known is None:
                raise
            logger.warning("%s; going on with what was known of it", error)
            file, age = known, 0.0
        if known is not None and known.size != file.size:
            raise ShardError(f"{url}: has {file.size} bytes, and had {known.size} before: it changed while in use")
        if known is not None and known.version != file.version:
            logger.warning("%s: changed while in use, or differs between servers; its blocks are fetched anew", url)
        self._files[url] = file, time.monotonic() + MAX_AGE - age
        return file

    def _ask(self, url: str) -> tuple[RemoteFile, float]:
        """What is known about a file and for how many seconds: from another process, else from the server."""
        self.check(url)  # also what another config allowed and left in the cache
        name = self._name(url) + "-size"
        with self._cache.fetching(name):
            record = self._cache.read(name, _RECORD.size)
            size, asked, version = _RECORD.unpack(record) if record else (0, 0, b"")
            if 0 <= (age := time.time() - asked) < MAX_AGE:
                return RemoteFile(size, version), age
            size, version = self._connections.info(url)
            file = RemoteFile(size, hashlib.sha256(version.encode()).digest()[:16])
            self._cache.write(name, _RECORD.pack(file.size, int(time.time()), file.version))
            return file, 0.0

    def _read_block(self, url: str, file: RemoteFile, block: int, begin: int, end: int) -> bytes:
        """Bytes begin:end of a block."""
        name = f"{self._name(url, *file)}-{block}"
        first = block * self._block
        length = min(self._block, file.size - first)
        data = self._cache.read(name, length, begin, end)
        if data is None:
            with self._cache.fetching(name):
                data = self._cache.read(name, length, begin, end)
                if data is None:
                    whole = self._connections.fetch(url, first, first + length)
                    self._cache.write(name, whole)
                    data = whole[begin:end]
        return data
