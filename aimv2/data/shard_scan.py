"""From a tar to its index: every member's place and crc32, and what the headers of its images say."""

import os
import re
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from aimv2.data.images import FORMATS, MOST_BYTES, image_header
from aimv2.data.shard_index import (
    EXTENSIONS,
    IMAGE_EXTENSIONS,
    NO_FORMAT,
    ShardIndex,
    digest_of,
    index_path,
    read_index,
    row_crc32,
    write_index,
)
from aimv2.data.tar import BLOCK, Member, ShardError, read_members

LARGEST_MEMBER = 2**32 - 1  # bytes

_KEY = re.compile(rb"((?:.*/)?[^./]+)[.]([^/]*)", re.DOTALL)  # no match: no extension, or a hidden file
_META = re.compile(rb"__[^/]*__($|/)")  # webdataset skips these
_IMAGES = frozenset(IMAGE_EXTENSIONS)
_MOST_16_BITS = 65_535
_READ = 1 << 20  # bytes at a time


def build_index(shard: Path) -> ShardIndex:
    """Scan a tar, write its index beside it (whole, by a rename) and return it.

    Raises:
        ShardError: the tar is damaged, has a key in two places, a member twice, or no sample.
    """
    with open(shard, "rb", buffering=0) as file:
        index = scan_shard(shard, file.fileno())
    write_index(shard, index)
    return index


def renew_index(shard: Path, old: ShardIndex) -> None:
    """A copied shard has another time but the same contents, so its index, with the rows it keeps, is dated anew.

    Raises:
        ShardError: the contents are others: a shard that was changed must not go unseen.
    """
    with open(shard, "rb", buffering=0) as file:
        new = scan_shard(shard, file.fileno())
    if new.digest != old.digest:
        raise ShardError(
            f"{shard}: its contents changed; if that was meant, delete {index_path(shard).name} and prepare the folder "
            "again, for the rows it kept go with it"
        )
    write_index(shard, replace(read_index(shard), source_size=new.source_size, source_mtime_ns=new.source_mtime_ns))


@dataclass(slots=True)
class _Scan:
    """What a scan has found so far."""

    read: Callable[[Member], tuple[int, bytes]]  # crc32 of a member, and its first bytes
    read_whole: Callable[[Member], bytes]
    keys: list[bytes] = field(default_factory=list)
    member_end: list[int] = field(default_factory=list)
    headers: list[tuple[int, int, int]] = field(default_factory=list)  # width, height, format of each row
    caption_bytes: list[int] = field(default_factory=list)
    members: list[tuple[int, int, int, int]] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    seen: set[bytes] = field(default_factory=set)  # keys of any member
    current: bytes | None = None
    extensions: set[str] = field(default_factory=set)  # of the current key

    def add(self, shard: Path, member: Member) -> None:
        match = _KEY.fullmatch(member.name)
        if match is None or _META.match(member.name):
            self.ignored[""] += 1
            return
        key, extension = match.group(1), match.group(2).decode("utf-8", "backslashreplace").lower()
        if key != self.current:
            if key in self.seen:
                raise ShardError.at(shard, member.header, f"sample {key!r} comes back after others")
            self.seen.add(key)
            self.current, self.extensions = key, set()
        if extension in self.extensions:
            raise ShardError.at(shard, member.header, f"member {member.name!r} for the second time")
        self.extensions.add(extension)
        if extension not in EXTENSIONS:
            self.ignored[extension] += 1
            return
        if member.size > LARGEST_MEMBER:
            raise ShardError.at(shard, member.header, f"member {member.name!r} has {member.size} bytes")
        if not self.keys or self.keys[-1] != key:
            self.keys.append(key)
            self.member_end.append(0)
            self.headers.append((0, 0, NO_FORMAT))
            self.caption_bytes.append(0)
        crc32, beginning = self.read(member)
        self.members.append((EXTENSIONS.index(extension), member.offset // BLOCK, member.size, crc32))
        self.member_end[-1] = len(self.members)
        if extension == "txt":
            self.caption_bytes[-1] = min(member.size, _MOST_16_BITS)
        elif extension in IMAGE_EXTENSIONS and len(self.extensions & _IMAGES) == 1:
            self.headers[-1] = _header(beginning)
            if self.headers[-1][2] == NO_FORMAT and len(beginning) < member.size <= MOST_BYTES:
                self.headers[-1] = _header(self.read_whole(member))  # WebP is read whole; others have long metadata

    def _row_crc32s(self) -> list[int]:
        begins = [0, *self.member_end[:-1]]
        spans = zip(self.keys, begins, self.member_end, strict=True)
        return [row_crc32(key, self.members[begin:end]) for key, begin, end in spans]

    def columns(self) -> dict[str, np.ndarray]:
        extension, block, size, crc32 = zip(*self.members, strict=True)
        width, height, image_format = zip(*self.headers, strict=True)
        return {
            "key_end": np.cumsum([len(key) for key in self.keys], dtype=np.uint32),
            "keys": np.frombuffer(b"".join(self.keys), np.uint8),
            "member_end": np.array(self.member_end, np.uint32),
            "extension": np.array(extension, np.uint8),
            "block": np.array(block, np.uint32),
            "size": np.array(size, np.uint32),
            "crc32": np.array(crc32, np.uint32),
            "row_crc32": np.array(self._row_crc32s(), np.uint32),
            "width": np.array(width, np.uint16),
            "height": np.array(height, np.uint16),
            "image_format": np.array(image_format, np.uint8),
            "caption_bytes": np.array(self.caption_bytes, np.uint16),
        }


def _header(data: bytes) -> tuple[int, int, int]:
    """(width, height, number in FORMATS) of an image of which this is the beginning; (0, 0, NO_FORMAT) if of none."""
    if (header := image_header(data)) is None:
        return 0, 0, NO_FORMAT
    kind, width, height = header
    return min(width, _MOST_16_BITS), min(height, _MOST_16_BITS), FORMATS.index(kind)


def scan_shard(shard: Path, fd: int) -> ShardIndex:
    """The index of the tar open as `fd`, all rows kept.

    Raises:
        ShardError: the tar is damaged, has a key in two places, a member twice, or no sample.
    """
    stat = os.fstat(fd)
    scan = _Scan(
        read=lambda member: _read(shard, fd, member),
        read_whole=lambda member: os.pread(fd, member.size, member.offset),
    )
    for member in read_members(shard, fd):
        scan.add(shard, member)
    if not scan.keys:
        raise ShardError(f"{shard}: no sample: no member's extension is one of {' '.join(EXTENSIONS)}")
    columns = scan.columns()
    return ShardIndex(
        samples=len(scan.keys),
        rows=len(scan.keys),
        source_size=stat.st_size,
        source_mtime_ns=stat.st_mtime_ns,
        digest=digest_of(columns),
        selection="",
        reason="",
        ignored=dict(sorted(scan.ignored.items())),
        columns=columns,
    )


def _read(shard: Path, fd: int, member: Member) -> tuple[int, bytes]:
    """crc32 of a member, and its first MiB."""
    crc, position, end, first = 0, member.offset, member.offset + member.size, b""
    while position < end:
        chunk = os.pread(fd, min(_READ, end - position), position)
        if not chunk:
            raise ShardError.at(shard, position, "the file got shorter while it was read")
        crc = zlib.crc32(chunk, crc)
        first = first or chunk
        position += len(chunk)
    return crc, first
