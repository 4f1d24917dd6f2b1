"""The index beside a shard, `00000.tar.idx` for `00000.tar`: where each member of each sample is, and its crc32.

A safetensors file, mapped into memory and so shared by all processes: 19 bytes and the key a sample, 13 bytes a member.
Members are grouped as webdataset groups them: the key is the path up to the first dot of its last part. A member whose
extension is not in EXTENSIONS is counted and never read.

A row is a sample of the tar, in its order. An index may keep some rows only (`select_rows`); training sees no others.
"""

import hashlib
import json
import mmap
import os
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from aimv2.data.tar import BLOCK, ShardError
from aimv2.whole_files import whole_file

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
EXTENSIONS = (*IMAGE_EXTENSIONS, "txt", "json")
FORMAT = "aimv2 shard index 3"
NO_FORMAT = 255  # of an image whose header cannot be read, or is not there

_DTYPES = {"U8": np.uint8, "U16": np.uint16, "U32": np.uint32}
_COLUMNS = dict.fromkeys(("key_end", "member_end", "row_crc32", "block", "size", "crc32", "kept"), "U32")
_COLUMNS |= dict.fromkeys(("keys", "extension", "image_format"), "U8")
_COLUMNS |= dict.fromkeys(("width", "height", "caption_bytes"), "U16")
_PER_ROW = ("key_end", "member_end", "row_crc32", "width", "height", "image_format", "caption_bytes")
_DIGESTED = ("block", "crc32", "extension", "key_end", "keys", "member_end", "size")
_CURE = "; delete it and prepare the folder again, for the rows it kept go with it"
_MEMBER = struct.Struct("<BIII")  # extension, block, size, crc32
_LONGEST_HEADER = 1 << 20  # bytes
_NUMBERS, _TEXTS = ("samples", "rows", "source_size", "source_mtime_ns"), ("digest", "selection", "reason")


@dataclass(slots=True)
class ShardIndex:
    """Where the samples of one shard are, and what its images' headers say.

    The columns: for each row key_end, member_end, width, height (as stored, before any EXIF rotation), image_format (of
    FORMATS) and caption_bytes (of the txt; at most 65,535); for each member extension, block, size, crc32; the keys;
    and `kept`, the rows kept, where a filter has been at work.
    """

    samples: int  # rows kept
    rows: int  # samples of the tar
    source_size: int  # bytes of the tar that was scanned
    source_mtime_ns: int
    digest: str  # sha256 of the keys, places, sizes and crc32s
    selection: str  # sha256 of the rows kept; "" if all are
    reason: str  # why these rows are kept, as `select_rows` was told
    ignored: dict[str, int]  # {extension: members not indexed}; "" for those without one
    columns: dict[str, np.ndarray]
    place: str = ""  # of its file, for messages

    def __len__(self) -> int:
        return self.rows

    @property
    def kept(self) -> np.ndarray | None:
        """(samples,) uint32, the rows kept, ascending; None if all are."""
        return self.columns.get("kept")

    @property
    def identity(self) -> str:
        """Of the shard's contents and of the rows kept."""
        return f"{self.digest}-{self.selection[:16]}" if self.selection else self.digest

    def row(self, number: int) -> int:
        """The row of the sample of this number among those kept."""
        return number if self.kept is None else int(self.kept[number])

    def key(self, row: int) -> str:
        begin, end = self._span("key_end", row)
        return self.columns["keys"][begin:end].tobytes().decode("utf-8", "backslashreplace")

    def members(self, row: int) -> list[tuple[str, int, int, int]]:
        """(extension, offset, size, crc32) of each member of a sample, in the order of the tar.

        Raises:
            ShardError: the row is damaged; without that an image might be read with its neighbour's caption.
        """
        begin, end = self._span("member_end", row)
        columns = (self.columns[name][begin:end].tolist() for name in ("extension", "block", "size", "crc32"))
        members = list(zip(*columns, strict=True))
        first, last = self._span("key_end", row)
        if row_crc32(self.columns["keys"][first:last].tobytes(), members) != self.columns["row_crc32"][row]:
            raise ShardError(f"{self.place}: row {row} is damaged{_CURE}")
        return [(EXTENSIONS[extension], block * BLOCK, size, crc) for extension, block, size, crc in members]

    def is_of(self, stat: os.stat_result) -> bool:
        """Whether this is the index of the tar as it is now. Many copies keep whole seconds only."""
        seconds = self.source_mtime_ns // 10**9, stat.st_mtime_ns // 10**9
        return self.source_size == stat.st_size and seconds[0] == seconds[1]

    def _span(self, column: str, row: int) -> tuple[int, int]:
        ends = self.columns[column]
        return (int(ends[row - 1]) if row else 0), int(ends[row])


def row_crc32(key: bytes, members: Iterable[tuple[int, int, int, int]]) -> int:
    """Of a row: its key and, of each member, (number in EXTENSIONS, block, size, crc32)."""
    return zlib.crc32(b"".join(_MEMBER.pack(*member) for member in members), zlib.crc32(key))


def index_path(shard: Path) -> Path:
    return shard.with_name(shard.name + ".idx")


def select_rows(shard: Path, rows: np.ndarray | None, reason: str = "") -> ShardIndex:
    """Keep only these rows of the index beside a shard, or all of them again (None); write it and return it.

    Raises:
        ShardError: there is no usable index.
        ValueError: the rows are not ascending rows of the shard.
    """
    index = read_index(shard)
    columns = {name: column for name, column in index.columns.items() if name != "kept"}
    selection = ""
    if rows is not None:
        kept = np.asarray(rows, np.int64)
        if kept.size and (kept[0] < 0 or kept[-1] >= index.rows or (np.diff(kept) < 1).any()):
            raise ValueError(f"{shard}: rows {kept[:3]}...{kept[-3:]}: expected ascending ones below {index.rows}")
        columns["kept"] = kept.astype(np.uint32)
        selection = hashlib.sha256(columns["kept"].tobytes()).hexdigest()
    samples = index.rows if rows is None else len(columns["kept"])
    index = replace(index, samples=samples, selection=selection, reason=reason, columns=columns)
    write_index(shard, index)
    return index


def write_index(shard: Path, index: ShardIndex) -> None:
    meta = {name: str(getattr(index, name)) for name in _NUMBERS + _TEXTS}
    meta |= {"format": FORMAT, "ignored": json.dumps(index.ignored)}
    with whole_file(index_path(shard)) as temporary:
        temporary.write_bytes(save(index.columns, metadata=meta))


def read_index(shard: Path | str, columns: bool = True, path: Path | None = None) -> ShardIndex:
    """The index of a shard, its columns mapped into memory; or without them, the few hundred bytes of its header.

    Args:
        path: where the index is, if not beside the shard.

    Raises:
        ShardError: there is no index, or the file is damaged or of another version.
    """
    path = path or index_path(shard)
    where = str(path) if isinstance(shard, Path) else f"{shard}.idx"
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > _LONGEST_HEADER:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(file.read(length))
            meta = header.pop("__metadata__")
            if meta["format"] != FORMAT:
                raise ValueError(f"format {meta['format']!r}, expected {FORMAT!r}")
            index = ShardIndex(
                **{name: int(meta[name]) for name in _NUMBERS},
                **{name: meta[name] for name in _TEXTS},
                ignored=json.loads(meta["ignored"]),
                columns=_map_columns(file.fileno(), 8 + length, header) if columns else {},
                place=where,
            )
            if columns:
                _check_columns(index)
            if not 0 <= index.samples <= index.rows:
                raise ValueError(f"{index.samples} samples of {index.rows} rows")
            return index
    except FileNotFoundError:
        raise ShardError(f"{shard}: no index ({path.name}): `make_shards.py prepare` builds it") from None
    except OSError as error:
        raise ShardError(f"{path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ShardError(f"{where}: not a usable index ({str(error)[:200]}){_CURE}") from None


def digest_of(columns: dict[str, np.ndarray]) -> str:
    """sha256 of the keys, places, sizes and crc32s."""
    digest = hashlib.sha256()
    for name in _DIGESTED:
        digest.update(columns[name])
    return digest.hexdigest()


def _map_columns(fd: int, begin: int, header: dict) -> dict[str, np.ndarray]:
    memory = mmap.mmap(fd, 0, access=mmap.ACCESS_READ)
    columns = {}
    for name, info in header.items():
        (count,), (first, _) = info["shape"], info["data_offsets"]
        if count < 0 or info["dtype"] != _COLUMNS[name]:
            raise ValueError(f"column {name} of {count} {info['dtype']}, expected {_COLUMNS[name]}")
        dtype = _DTYPES[info["dtype"]]
        columns[name] = np.frombuffer(memory, dtype, count, begin + first) if count else np.empty(0, dtype)
    return columns


def _check_columns(index: ShardIndex) -> None:
    """That no row leads outside the columns: the IndexError would end whatever goes through the samples, unseen."""
    columns = index.columns
    per_row = {name: len(columns[name]) for name in _PER_ROW}
    members, keys = len(columns["block"]), len(columns["keys"])
    per_member = {name: len(columns[name]) for name in ("extension", "size", "crc32")}
    if set(per_row.values()) != {index.rows} or set(per_member.values()) != {members}:
        raise ValueError(f"columns of {per_row | per_member}, expected {index.rows} rows and {members} members")
    for name, end in (("key_end", keys), ("member_end", members)):
        if columns[name][-1] != end or (columns[name][1:] < columns[name][:-1]).any():
            raise ValueError(f"column {name} does not lead to {end}")
    if columns["extension"].max(initial=0) >= len(EXTENSIONS):
        raise ValueError("an unknown extension")
    kept = columns.get("kept", columns["key_end"][:0])
    if "kept" in columns and hashlib.sha256(kept.tobytes()).hexdigest() != index.selection:
        raise ValueError("its selection is not that of the rows kept")
    if (len(kept) if "kept" in columns else index.rows) != index.samples or kept.max(initial=0) >= index.rows:
        raise ValueError(f"the rows kept are not {index.samples} of {index.rows}")
