"""Byte ranges of files on servers and in object stores, from an explicit allow-list, through a cache on the local disk.

fsspec speaks the protocols; what it is given has passed `check`. Each block of a file is fetched once a machine, and
kept in a `BlockCache`. (fsspec's own block cache has no bound, and its processes overwrite each other's list of what
is there.) Nothing waits for ever: a request has TIMEOUT seconds and is made ATTEMPTS times.

A redirect is followed only to where the allow-list allows; the query of a signed address is passed on and not logged.
Object stores are asked by their own clients, at the provider's address or at the `endpoint_url` of the options.
Credentials, proxies and certificates are those of the environment (AWS_*, ~/.netrc, HTTPS_PROXY, roles of the machine),
never of a config.
"""

import hashlib
import logging
import os
import random
import re
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
from fsspec.asyn import AsyncFileSystem, sync

from aimv2.data.block_cache import PAGE, BlockCache
from aimv2.data.tar import ShardError

logger = logging.getLogger(__name__)

OPTIONS = {  # of each protocol, none of them a secret
    "http": frozenset(),
    "https": frozenset(),
    "s3": frozenset({"endpoint_url", "profile", "anon", "requester_pays"}),
    "gs": frozenset({"endpoint_url", "project", "requester_pays"}),
    "gcs": frozenset({"endpoint_url", "project", "requester_pays"}),
    "az": frozenset({"account_name", "anon"}),
    "abfs": frozenset({"account_name", "anon"}),
}
TIMEOUT = 30.0  # seconds for one request of at most a block
ATTEMPTS, FIRST_WAIT = 4, 1.0  # seconds; doubled each time
MAX_AGE = 600.0  # seconds after which a file's size is asked for again
SMALLEST_CACHE = 16  # blocks

_URL = re.compile(r"(?P<protocol>[a-z0-9]+)://[A-Za-z0-9._-]+(:[0-9]+)?/(?P<path>[A-Za-z0-9._~!$&'()+,;=@:%{}/-]*)")
_BAD_ESCAPE = re.compile(r"%(?![0-9a-f]{2})|%(2e|2f|5c|25|[01][0-9a-f]|7f)", re.IGNORECASE)
_RECORD = struct.Struct("<QQ16s")  # size, time it was asked for, version


@dataclass(slots=True, kw_only=True)
class RemoteConfig:
    """Which files may be read from elsewhere, and where their blocks are kept."""

    allow: list[str]  # prefixes that end in "/": "https://data.example.org/coyo/", "s3://bucket/coyo/"
    cache: str  # local folder, shared by all processes of a machine
    cache_gib: float = 100.0  # the most it holds
    block_mib: float = 8.0  # unit of reading and caching; neighbouring samples share blocks
    options: dict[str, dict[str, str | bool]] = field(default_factory=dict)  # {"s3": {"endpoint_url": "https://..."}}

    def __post_init__(self):
        for prefix in self.allow:
            if _problem(prefix) or not prefix.endswith("/"):
                expected = f"PROTOCOL://HOST-OR-BUCKET/.../, PROTOCOL one of {' '.join(OPTIONS)}"
                raise ValueError(f"allow {prefix!r}: {_problem(prefix) or 'no / at its end'}; expected {expected}")
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


def _problem(url: str) -> str | None:
    """Why it is not a plain URL of a known protocol."""
    match = _URL.fullmatch(url)
    if match is None or "::" in url:
        return "not a plain PROTOCOL://HOST-OR-BUCKET/PATH"
    if match["protocol"] not in OPTIONS:
        return f"protocol {match['protocol']!r}"
    if {".", ".."} & set(match["path"].split("/")) or _BAD_ESCAPE.search(url):
        return "a segment . or .., or an escape that could hide one"
    return None


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
        self._files: dict[str, tuple[RemoteFile, float]] = {}  # {url: (what is known, until when)}
        for protocol in {prefix.partition("://")[0] for prefix in config.allow}:
            try:
                fsspec.get_filesystem_class(protocol)
            except ImportError as error:
                raise ValueError(f"{protocol}:// of the allow-list needs a package: {error}") from error

    def __reduce__(self):
        return RemoteFiles, (self.config,)

    def check(self, url: str) -> None:
        """Raises ShardError unless the URL is plain and begins with a prefix of the allow-list."""
        problem = _problem(url) or (None if url.startswith(tuple(self.config.allow)) else "not in the allow-list")
        if problem:
            raise ShardError(f"{url!r} may not be read: {problem}; allowed is {' '.join(self.config.allow)}")

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

    def local_copy(self, url: str) -> Path:
        """The whole of a small file, in the cache: to be opened at once, for it may be evicted later.

        Raises:
            ShardError: as `read`.
        """
        file = self._file(url)
        name = self._name(url, *file) + "-whole"
        if (path := self._cache.read_copy(name)) is not None:
            return path
        with self._cache.fetching(name):
            if (path := self._cache.read_copy(name)) is not None:
                return path
            begins = range(0, file.size, self._block)
            parts = [self._fetch(url, begin, min(begin + self._block, file.size)) for begin in begins]
            return self._cache.write_copy(name, b"".join(parts))

    def _name(self, *of: Any) -> str:
        return hashlib.sha256(repr((self._block, *of)).encode()).hexdigest()[:32]

    def _file(self, url: str) -> RemoteFile:
        known, until = self._files.get(url, (None, 0.0))
        if known is not None and time.monotonic() < until:
            return known
        self.check(url)
        file, age = self._ask(url)
        if known is not None and known.size != file.size:
            raise ShardError(f"{url}: has {file.size} bytes, and had {known.size} before: it changed while in use")
        if known is not None and known.version != file.version:
            logger.warning("%s: changed while in use, or differs between servers; its blocks are fetched anew", url)
        self._files[url] = file, time.monotonic() + MAX_AGE - age
        return file

    def _ask(self, url: str) -> tuple[RemoteFile, float]:
        """What is known about a file and for how many seconds: from another process, else from the server."""
        name = self._name(url) + "-size"
        with self._cache.fetching(name):
            record = self._cache.read(name, _RECORD.size)
            size, asked, version = _RECORD.unpack(record) if record else (0, 0, b"")
            if 0 <= (age := time.time() - asked) < MAX_AGE:
                return RemoteFile(size, version), age
            info = self._retry(url, url, lambda fs: sync(fs.loop, fs._info, url, timeout=TIMEOUT))
            if info["type"] != "file" or info["size"] is None:
                raise ShardError(f"{url}: expected a file of known size, found {info['type']}, {info['size']} bytes")
            names = ("ETag", "etag", "Last-Modified", "LastModified", "last_modified", "updated")
            said = next((str(info[name]) for name in names if info.get(name)), "")
            file = RemoteFile(info["size"], hashlib.sha256(said.encode()).digest()[:16])
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
                    whole = self._fetch(url, first, first + length)
                    self._cache.write(name, whole)
                    data = whole[begin:end]
        return data

    def _fetch(self, url: str, begin: int, end: int) -> bytes:
        def fetch(fs: AsyncFileSystem) -> bytes:
            data = sync(fs.loop, fs._cat_file, url, start=begin, end=end, timeout=TIMEOUT)
            if len(data) != end - begin:
                raise OSError(f"{len(data)} bytes came instead of {end - begin}")
            return data

        return self._retry(url, f"{url}: byte {begin}", fetch)

    def _retry(self, url: str, place: str, request: Callable[[AsyncFileSystem], Any]) -> Any:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return request(_filesystem(self, url.partition("://")[0]))
            except Exception as error:  # the libraries behind fsspec have no common base class
                reason, transient = _explain(error)
                if not transient or attempt == ATTEMPTS:
                    tries = f" (tried {attempt} times)" if attempt > 1 else ""
                    raise ShardError(f"{place}: {reason}{tries}") from error
            wait = (
                FIRST_WAIT * 2 ** (attempt - 1) * random.SystemRandom().uniform(0.5, 1.0)
            )  # so that not all come at once
            logger.warning("%s: %s; try %d of %d in %.1f s", place, reason, attempt + 1, ATTEMPTS, wait)
            time.sleep(wait)


# {(process, protocol, config): its connections}. Those of a parent process stay in here: were they collected in a
# child, they would close what the parent still uses.
_opened: dict[tuple[int, str, str], AsyncFileSystem] = {}


def _filesystem(files: RemoteFiles, protocol: str) -> AsyncFileSystem:
    key = os.getpid(), protocol, repr(files.config)
    if key not in _opened:
        options = dict(files.config.options.get(protocol, {}))
        if protocol in ("http", "https"):
            guard = _guard(files.check)
            options["client_kwargs"] = {"middlewares": (guard,), "trust_env": True}
            options["headers"] = {"Accept-Encoding": "identity"}
        _opened[key] = fsspec.filesystem(protocol, skip_instance_cache=True, use_listings_cache=False, **options)
    return _opened[key]


def _guard(check: Callable[[str], None]) -> Callable:
    """A middleware of aiohttp, which sees each request, also those a redirect asks for, and the head of each answer."""

    async def guard(request, handler):
        check(str(request.url.with_query(None).with_fragment(None)))
        response = await handler(request)
        asked = request.headers.get("Range", "").removeprefix("bytes=")
        if asked and response.status in (200, 206):
            first, last = map(int, asked.split("-"))
            given = response.headers.get("Content-Range", "")
            encoding = response.headers.get("Content-Encoding", "identity")
            if response.status == 200 and response.content_length != last - first + 1:
                problem = "the server ignores Range: it would send the whole file"
            elif response.status == 206 and not given.startswith(f"bytes {first}-{last}/"):
                problem = f"the server sends {given!r} when asked for bytes {asked}"
            elif encoding != "identity":
                problem = f"the server sends it as {encoding}"
            else:
                return response
            response.close()
            raise ShardError(problem)
        return response

    return guard


def _explain(error: BaseException) -> tuple[str, bool]:
    """What went wrong, in one line and without a query, and whether it may be gone the next time."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    if any(isinstance(e, TimeoutError) for e in chain):
        return f"no answer within {TIMEOUT:g} s", True
    root = chain[-1]
    if isinstance(root, ShardError):
        return str(root), False
    status = getattr(root, "status", None) or getattr(root, "status_code", None) or getattr(root, "code", None)
    if status is None and isinstance(response := getattr(root, "response", None), dict):  # botocore
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    if isinstance(status, int) and status in HTTPStatus._value2member_map_:
        return f"HTTP {status} {HTTPStatus(status).phrase}", status >= 500 or status in (408, 425, 429)
    if isinstance(root, FileNotFoundError):
        return "not found", False
    return f"{type(root).__name__}: {root}", not isinstance(root, PermissionError)
