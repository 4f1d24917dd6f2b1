"""The index beside a shard, `00000.tar.idx` for `00000.tar`: where each member of each sample is, and its crc32.

A safetensors file, mapped into memory and so shared by all processes: 8 bytes and the key a sample, 13 bytes a member.
Members are grouped as webdataset groups them: the key is the path up to the first dot of its last part. A member whose
extension is not in EXTENSIONS is counted and never read.
"""

import hashlib
import json
import mmap
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from aimv2.data.tar import BLOCK, Member, ShardError, read_members

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
EXTENSIONS = (*IMAGE_EXTENSIONS, "txt", "json")
FORMAT = "aimv2 shard index 1"
LARGEST_MEMBER = 2**32 - 1  # bytes

_KEY = re.compile(rb"((?:.*/)?[^./]+)[.]([^/]*)", re.DOTALL)  # no match: no extension, or a hidden file
_META = re.compile(rb"__[^/]*__($|/)")  # webdataset skips these
_DTYPES = {"U8": np.uint8, "U32": np.uint32}
_READ = 1 << 20


@dataclass(slots=True)
class ShardIndex:
    """Where the samples of one shard are."""

    samples: int
    source_size: int  # bytes of the tar that was scanned
    source_mtime_ns: int
    digest: str  # sha256 of all columns: of keys, places, sizes and crc32s
    ignored: dict[str, int]  # {extension: members not indexed}; "" for those without one
    columns: dict[str, np.ndarray]  # per sample: key_end, member_end; per member: extension, block, size, crc32; keys

    def key(self, row: int) -> str:
        begin, end = self._span("key_end", row)
        return self.columns["keys"][begin:end].tobytes().decode("utf-8", "backslashreplace")

    def members(self, row: int) -> list[tuple[str, int, int, int]]:
        """(extension, offset, size, crc32) of each member of a sample, in the order of the tar."""
        begin, end = self._span("member_end", row)
        rows = (self.columns[name][begin:end].tolist() for name in ("extension", "block", "size", "crc32"))
        return [(EXTENSIONS[e], block * BLOCK, size, crc) for e, block, size, crc in zip(*rows, strict=True)]

    def is_of(self, stat: os.stat_result) -> bool:
        """Whether this is the index of the tar as it is now."""
        return (self.source_size, self.source_mtime_ns) == (stat.st_size, stat.st_mtime_ns)

    def _span(self, column: str, row: int) -> tuple[int, int]:
        ends = self.columns[column]
        return (int(ends[row - 1]) if row else 0), int(ends[row])


def index_path(shard: Path) -> Path:
    return shard.with_name(shard.name + ".idx")


def build_index(shard: Path) -> ShardIndex:
    """Scan a tar, write its index beside it (whole, by a rename) and return it.

    Raises:
        ShardError: the tar is damaged, has a key in two places, a member twice, or no sample.
    """
    with open(shard, "rb", buffering=0) as file:
        index = scan_shard(shard, file.fileno())
    write_index(shard, index)
    return index


def write_index(shard: Path, index: ShardIndex) -> None:
    meta = {name: str(getattr(index, name)) for name in ("samples", "source_size", "source_mtime_ns", "digest")}
    meta |= {"format": FORMAT, "ignored": json.dumps(index.ignored)}
    path = index_path(shard)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(save(index.columns, metadata=meta))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_index(shard: Path, columns: bool = True) -> ShardIndex:
    """The index of a shard, its columns mapped into memory; or without them, the few hundred bytes of its header.

    Raises:
        ShardError: there is no index, or the file is damaged or of another version.
    """
    path = index_path(shard)
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > _READ:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(file.read(length))
            meta = header.pop("__metadata__")
            if meta["format"] != FORMAT:
                raise ValueError(f"format {meta['format']!r}, expected {FORMAT!r}")
            return ShardIndex(
                samples=int(meta["samples"]),
                source_size=int(meta["source_size"]),
                source_mtime_ns=int(meta["source_mtime_ns"]),
                digest=meta["digest"],
                ignored=json.loads(meta["ignored"]),
                columns=_map_columns(file.fileno(), 8 + length, header) if columns else {},
            )
    except FileNotFoundError:
        raise ShardError(f"{shard}: no index ({path.name}); build it first") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{path}: not a usable index ({error}); delete it, and it is built again") from None


def _map_columns(fd: int, begin: int, header: dict) -> dict[str, np.ndarray]:
    memory = mmap.mmap(fd, 0, access=mmap.ACCESS_READ)
    columns = {}
    for name, info in header.items():
        (count,), (first, _) = info["shape"], info["data_offsets"]
        columns[name] = np.frombuffer(memory, _DTYPES[info["dtype"]], count, begin + first)
    return columns


@dataclass(slots=True)
class _Scan:
    """What a scan has found so far."""

    read_crc32: Callable[[Member], int]
    keys: list[bytes] = field(default_factory=list)
    member_end: list[int] = field(default_factory=list)
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
        row = (EXTENSIONS.index(extension), member.offset // BLOCK, member.size, self.read_crc32(member))
        self.members.append(row)
        self.member_end[-1] = len(self.members)


def scan_shard(shard: Path, fd: int) -> ShardIndex:
    stat = os.fstat(fd)
    scan = _Scan(read_crc32=lambda member: _crc32(shard, fd, member))
    for member in read_members(shard, fd):
        scan.add(shard, member)
    if not scan.keys:
        raise ShardError(f"{shard}: no sample: no member's extension is one of {' '.join(EXTENSIONS)}")
    extension, block, size, crc32 = zip(*scan.members, strict=True)
    columns = {
        "key_end": np.cumsum([len(key) for key in scan.keys], dtype=np.uint32),
        "keys": np.frombuffer(b"".join(scan.keys), np.uint8),
        "member_end": np.array(scan.member_end, np.uint32),
        "extension": np.array(extension, np.uint8),
        "block": np.array(block, np.uint32),
        "size": np.array(size, np.uint32),
        "crc32": np.array(crc32, np.uint32),
    }
    return ShardIndex(
        samples=len(scan.keys),
        source_size=stat.st_size,
        source_mtime_ns=stat.st_mtime_ns,
        digest=hashlib.sha256(b"".join(columns[name].tobytes() for name in sorted(columns))).hexdigest(),
        ignored=dict(sorted(scan.ignored.items())),
        columns=columns,
    )


def _crc32(shard: Path, fd: int, member: Member) -> int:
    crc, position, end = 0, member.offset, member.offset + member.size
    while position < end:
        chunk = os.pread(fd, min(_READ, end - position), position)
        if not chunk:
            raise ShardError.at(shard, position, "the file got shorter while it was read")
        crc = zlib.crc32(chunk, crc)
        position += len(chunk)
    return crc
