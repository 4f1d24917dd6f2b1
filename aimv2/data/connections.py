"""Requests by URL through fsspec: an allow-list before every one, a time limit, and retries.

A redirect of HTTP is followed only to where the allow-list allows; the query of a signed address is passed on and not
logged. Object stores are asked by their own clients, at the provider's address or at the `endpoint_url` of the options.
Credentials, proxies and certificates are those of the environment (AWS_*, ~/.netrc, HTTPS_PROXY, roles of the machine),
never of a config.
"""

import logging
import os
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Any

import fsspec
from fsspec.asyn import AsyncFileSystem, sync

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
ATTEMPTS = 8
FIRST_WAIT, LONGEST_WAIT = 1.0, 32.0  # seconds; doubled each time
PATIENCE = 120.0  # seconds after which no new attempt is made: other ranks wait 180 for this one

_URL = re.compile(
    r"(?P<protocol>[a-z0-9]+)://[A-Za-z0-9][A-Za-z0-9._-]*(:[0-9]+)?/(?P<path>[A-Za-z0-9._~!$&'()+,;=@:%{}/-]*)"
)
_BAD_ESCAPE = re.compile(r"%(?![0-9a-f]{2})|%(2e|2f|5c|25|[01][0-9a-f]|7f)", re.IGNORECASE)


def url_problem(url: str) -> str | None:
    """Why it is not a plain URL of a known protocol."""
    match = _URL.fullmatch(url)
    if match is None or "::" in url:
        return "not a plain PROTOCOL://HOST-OR-BUCKET/PATH"
    if match["protocol"] not in OPTIONS:
        return f"protocol {match['protocol']!r}"
    if {".", ".."} & set(match["path"].split("/")) or _BAD_ESCAPE.search(url):
        return "a segment . or .., or an escape that could hide one"
    return None


class Connections:
    """To what an allow-list allows. Each process that uses one opens its own.

    Args:
        allow: prefixes that end in "/".
        options: {protocol: storage options}, among OPTIONS.

    Raises:
        ValueError: a protocol needs a package that is not installed.
    """

    def __init__(self, allow: Sequence[str], options: Mapping[str, Mapping[str, str | bool]]):
        self.allow, self._options = tuple(allow), options
        for protocol in {prefix.partition("://")[0] for prefix in allow}:
            try:
                fsspec.get_filesystem_class(protocol)
            except ImportError as error:
                raise ValueError(f"{protocol}:// of the allow-list needs a package: {error}") from error

    def check(self, url: str) -> None:
        """Raises ShardError unless the URL is plain and begins with a prefix of the allow-list."""
        problem = url_problem(url) or (None if url.startswith(self.allow) else "not in the allow-list")
        if problem:
            raise ShardError(f"{url!r} may not be read: {problem}; allowed is {' '.join(self.allow)}")

    def info(self, url: str) -> tuple[int, str]:
        """(bytes of a file, its ETag or date, or "").

        Raises:
            ShardError: not allowed, not there, not a file, or not to be reached.
        """

        def ask(fs: AsyncFileSystem) -> dict:
            return sync(fs.loop, fs._info, url, timeout=TIMEOUT)

        info = self._retry(url, url, ask)
        if info["type"] != "file" or info["size"] is None:
            raise ShardError(f"{url}: expected a file of known size, found {info['type']}, {info['size']} bytes")
        names = ("ETag", "etag", "Last-Modified", "LastModified", "last_modified", "updated")
        return info["size"], next((str(info[name]) for name in names if info.get(name)), "")

    def fetch(self, url: str, begin: int, end: int) -> bytes:
        """Bytes begin:end of a file.

        Raises:
            ShardError: as `info`; or the server doesn't serve ranges.
        """

        def fetch(fs: AsyncFileSystem) -> bytes:
            data = sync(fs.loop, fs._cat_file, url, start=begin, end=end, timeout=TIMEOUT)
            if len(data) != end - begin:
                raise OSError(f"{len(data)} bytes came instead of {end - begin}")
            return data

        return self._retry(url, f"{url}: byte {begin}", fetch)

    def _retry(self, url: str, place: str, request: Callable[[AsyncFileSystem], Any]) -> Any:
        self.check(url)
        begun = time.monotonic()
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return request(self._filesystem(url.partition("://")[0]))
            except Exception as error:  # the libraries behind fsspec have no common base class
                reason, transient = _explain(error)
                if not transient or attempt == ATTEMPTS or time.monotonic() - begun > PATIENCE:
                    tries = f" (tried {attempt} times)" if attempt > 1 else ""
                    raise ShardError(f"{place}: {reason}{tries}") from error
            # Not all processes at once, and without a random number that training would miss.
            wait = min(FIRST_WAIT * 2 ** (attempt - 1), LONGEST_WAIT) * random.SystemRandom().uniform(0.5, 1.0)
            logger.warning("%s: %s; try %d of %d in %.1f s", place, reason, attempt + 1, ATTEMPTS, wait)
            time.sleep(wait)

    def _filesystem(self, protocol: str) -> AsyncFileSystem:
        options = dict(self._options.get(protocol, {}))
        key = os.getpid(), protocol, repr((self.allow, options))
        if key not in _opened:
            if protocol in ("http", "https"):
                options["client_kwargs"] = {"middlewares": (_guard(self.check),), "trust_env": True}
                options["headers"] = {"Accept-Encoding": "identity"}
            made = fsspec.filesystem(protocol, skip_instance_cache=True, use_listings_cache=False, **options)
            _opened.setdefault(key, made)  # another thread may have been first
        return _opened[key]


# {(process, protocol, config): its connections}. Those of a parent process stay in here: were they collected in a
# child, they would close what the parent still uses.
_opened: dict[tuple[int, str, str], AsyncFileSystem] = {}


def _guard(check: Callable[[str], None]) -> Callable:
    """A middleware of aiohttp, which sees each request, also those a redirect asks for, and the head of each answer."""

    async def guard(request, handler):
        check(str(request.url.with_query(None).with_fragment(None)))
        response = await handler(request)
        asked = request.headers.get("Range", "").removeprefix("bytes=")
        if not asked or response.status not in (200, 206):
            return response
        first, last = map(int, asked.split("-"))
        given, encoding = (response.headers.get(name) for name in ("Content-Range", "Content-Encoding"))
        if encoding not in (None, "identity"):
            problem = ShardError(f"the server sends it as {encoding}")
        elif response.status == 200 and response.content_length != last - first + 1:
            problem = ShardError("the server ignores Range: it would send the whole file")
        elif response.status == 206 and not (given or "").startswith(f"bytes {first}-{last}/"):
            problem = OSError(f"the server sends {given!r} when asked for bytes {asked}")
        else:
            return response
        response.close()
        raise problem

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
    status = getattr(root, "status", None) or getattr(root, "status_code", None)
    if status is None and isinstance(response := getattr(root, "response", None), dict):  # botocore
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    if isinstance(status, int) and status in HTTPStatus._value2member_map_:
        return f"HTTP {status} {HTTPStatus(status).phrase}", status >= 500 or status in (408, 425, 429)
    if isinstance(root, FileNotFoundError):
        return "not found", False
    said = re.sub(r"\?\S*", "", " ".join(str(root).split()))
    return f"{type(root).__name__}: {said}", not isinstance(root, (PermissionError, ValueError, TypeError))
