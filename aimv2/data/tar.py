"""A strict walk over the members of a tar: damage is an error, never an early end.

Reads ustar, GNU (long names, base-256 sizes) and PAX (path, size). Everything that is not a plain file or an empty
directory entry is refused: a shard has no use for links, devices or sparse files. Nothing is ever extracted.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Self

BLOCK = 512
LARGEST_EXTENDED_HEADER = 1 << 20  # bytes; a name, not a place to hide gigabytes
_PLAIN, _FOLDER = (b"0", b"\0", b"7"), (b"5", b"\0")  # before ustar, a folder was a file named "NAME/"
_ZEROS = bytes(BLOCK)
_READ = 1 << 20


class ShardError(ValueError):
    """A shard that cannot be used: `SHARD: REASON`, and `SHARD: byte OFFSET: REASON` where a place is to blame."""

    @classmethod
    def at(cls, shard: str | Path, offset: int, reason: str) -> Self:
        return cls(f"{shard}: byte {offset}: {reason}")


class Member(NamedTuple):
    """A plain file in a tar."""

    name: bytes
    header: int  # where its first header begins
    offset: int  # where its contents begin, a multiple of 512
    size: int


def read_members(shard: Path, fd: int) -> Iterator[Member]:
    """The plain files of the tar open as `fd`, in order.

    Raises:
        ShardError: a header whose checksum is wrong, a member cut off, no end-of-archive (two zero blocks), anything
            but zeros after it, or a kind of member that no shard needs.
    """
    length = os.fstat(fd).st_size
    position = 0
    extended: dict[bytes, bytes] = {}  # what the headers so far say about the member to come
    begin = None
    while True:
        header = os.pread(fd, BLOCK, position)
        if len(header) < BLOCK:
            raise ShardError.at(shard, position, "the file ends without an end-of-archive mark")
        if header == _ZEROS:
            if extended:
                raise ShardError.at(shard, position, "an extended header with no member after it")
            return _check_end(shard, fd, position, length)
        _check_sum(shard, header, position)
        begin = position if begin is None else begin
        kind, offset = header[156:157], position + BLOCK
        size = int(extended.get(b"size", b"-1"))
        size = size if size >= 0 else _number(shard, header[124:136], position)
        position = offset + -(-size // BLOCK) * BLOCK
        if position > length:
            raise ShardError.at(shard, begin, f"a member of {size} bytes, but the file ends at byte {length}")
        if kind in (b"L", b"K", b"x", b"g"):
            extended |= _extended(shard, fd, kind, offset, size)
            begin = None if kind == b"g" else begin  # that one is of no member
            continue
        name = extended.get(b"path") or _name(header)
        if kind in _PLAIN and not (kind == b"\0" and name.endswith(b"/")):
            yield Member(name, begin, offset, size)
        elif kind not in _FOLDER or size:
            raise ShardError.at(shard, begin, f"member {name!r} has type {kind!r}, expected a plain file")
        extended, begin = {}, None


def _check_end(shard: Path, fd: int, position: int, length: int) -> None:
    if length - position < 2 * BLOCK:
        raise ShardError.at(shard, position, "the file ends without an end-of-archive mark")
    while chunk := os.pread(fd, _READ, position):
        if chunk.strip(b"\0"):
            offset = position + len(chunk) - len(chunk.lstrip(b"\0"))
            raise ShardError.at(shard, offset, "bytes after the end of the archive")
        position += len(chunk)


def _check_sum(shard: Path, header: bytes, position: int) -> None:
    """The checksum counts itself as eight spaces."""
    found = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    if found != _number(shard, header[148:156], position):
        raise ShardError.at(shard, position, "a damaged header (its checksum is wrong)")


def _number(shard: Path, field: bytes, position: int) -> int:
    """Octal digits, or base 256 after a first byte of 0x80 (GNU, for sizes from 8 GiB)."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip(b" ")
    if digits.strip(b"01234567"):
        raise ShardError.at(shard, position, f"a damaged header ({field!r} is not a number)")
    return int(digits or b"0", 8)


def _name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0" and (prefix := header[345:500].split(b"\0", 1)[0]):
        return prefix + b"/" + name
    return name


def _extended(shard: Path, fd: int, kind: bytes, offset: int, size: int) -> dict[bytes, bytes]:
    """{b"path": ..., b"size": ...}, those that the extended header sets for the next member."""
    if size > LARGEST_EXTENDED_HEADER:
        raise ShardError.at(shard, offset, f"an extended header of {size} bytes")
    data = os.pread(fd, size, offset)
    if kind in (b"L", b"K"):  # a long name, or the long target of a link
        return {b"path": data.split(b"\0", 1)[0]} if kind == b"L" else {}
    records = _pax_records(shard, data, offset)
    if any(key.startswith(b"GNU.sparse") for key in records) or (kind == b"g" and {b"path", b"size"} & set(records)):
        raise ShardError.at(shard, offset, "a sparse file, or one name or size for all members")
    if not re.fullmatch(rb"\d{1,20}", size := records.get(b"size", b"0")):
        raise ShardError.at(shard, offset, f"a PAX size of {size[:40]!r}")
    return {key: value for key, value in records.items() if key in (b"path", b"size")}


def _pax_records(shard: Path, data: bytes, offset: int) -> dict[bytes, bytes]:
    """Records are `LENGTH KEY=VALUE\\n`, the length counting all of it."""
    records, begin = {}, 0
    data = data.rstrip(b"\0")
    while begin < len(data):
        length, space, _ = data[begin : begin + 20].partition(b" ")
        end = begin + int(length) if space and length.isdigit() else 0
        record = data[begin + len(length) + 1 : end - 1]
        if b"=" not in record or data[end - 1 : end] != b"\n":
            raise ShardError.at(shard, offset + begin, "a damaged PAX header")
        key, _, value = record.partition(b"=")
        records[key] = value
        begin = end
    return records
