"""The measures of a shard, `prepared/00000.measures.parquet` for `00000.tar`: a row for each of its samples, in order.

Numbers that came with the samples stay where they are (see `shard_columns`), but those of each KEY.json are taken along
where there is no better place.
"""

import json
import os
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from aimv2.data.images import FORMATS, MOST_BYTES
from aimv2.data.shard_index import IMAGE_EXTENSIONS, NO_FORMAT, ShardIndex
from aimv2.data.tar import ShardError
from aimv2.data.tokenizer import Tokenizer
from aimv2.ingest.measures import (
    CaptionMeasures,
    MeasureConfig,
    find_caption,
    find_numbers,
    measure_caption,
    measure_image,
    parse_json,
)
from aimv2.ingest.prepared_folder import COLUMNS, FOLDER, MEASURES, writing
from aimv2.whole_files import whole_file

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError as error:
    raise ImportError('measures are kept as parquet files: pip install "aimv2[train]"') from error

FORMAT = "aimv2 measures 1"
MOST_JSON_NUMBERS = 64  # names in one shard, the most frequent ones
DAMAGED = "other bytes than were indexed"

JSON = "json:"  # before the names of numbers from KEY.json
HAS = "has_"  # before txt and json:KEY

_META = b"aimv2"
_TYPES = {
    "key": pa.string(),
    "unusable": pa.string(),  # why the reader would not use the sample; null if it would
    "image_bytes": pa.uint32(),
    "image_crc32": pa.uint32(),
    "width": pa.uint16(),  # as stored, before any EXIF rotation; 0 if the header cannot be read
    "height": pa.uint16(),
    "format": pa.string(),
    "phash": pa.uint64(),
    "caption_bytes": pa.uint32(),
    "caption_characters": pa.uint16(),
    "caption_words": pa.uint16(),
    "caption_tokens": pa.uint16(),
}
HYGIENE = CaptionMeasures._fields[4:]
_TYPES |= {f"caption_{flag}": pa.bool_() for flag in HYGIENE}


def measures_path(shard: Path) -> Path:
    return shard.parent / FOLDER / f"{shard.stem}{MEASURES}"


def numbers_path(shard: Path) -> Path | None:
    """The parquet file with the numbers that came with the samples of a shard, if there is one."""
    for path in (shard.parent / FOLDER / f"{shard.stem}{COLUMNS}", shard.with_suffix(".parquet")):
        if path.is_file():
            return path
    return None


@dataclass(slots=True, kw_only=True)
class _Contents:
    """What a file of measures was made from. It serves whoever asks for the same or less."""

    digest: str
    decode: bool
    phash: bool
    tokenizer: str  # fingerprint, or ""
    captions: list[str]
    numbers: bool  # of KEY.json

    def serves(self, wanted: "_Contents") -> bool:
        return (
            self.digest == wanted.digest
            and self.decode >= wanted.decode
            and self.phash >= wanted.phash
            and self.numbers >= wanted.numbers
            and wanted.tokenizer in ("", self.tokenizer)
            and self.captions[:1] == wanted.captions[:1]
            and set(self.captions) >= set(wanted.captions)
        )


class ShardMeasurer:
    """Measures shards.

    Raises:
        ValueError: no tokenizer where the config says.
    """

    def __init__(self, config: MeasureConfig):
        self.config = config
        self.tokenizer = Tokenizer(config.tokenizer) if config.tokenizer else None

    def has_hashes(self, shard: Path) -> bool:
        """Whether a shard that was measured before has perceptual hashes."""
        found = _read_contents(measures_path(shard))
        return found is not None and found.phash

    def is_measured(self, shard: Path, index: ShardIndex) -> bool:
        """Whether the shard, as indexed, has all measures that the config asks for."""
        found = _read_contents(measures_path(shard))
        return found is not None and found.serves(self._contents(shard, index))

    def measure(self, shard: Path, index: ShardIndex) -> list[str]:
        """Write the measures of a shard, and return one line for each member that is damaged.

        Raises:
            ShardError: the disk does not give the bytes.
            WriteError: it does not take the measures.
        """
        contents = self._contents(shard, index)
        path = measures_path(shard)
        rows, damage = self._measure(shard, index, contents)
        table = _table(rows, contents)
        with writing(path), whole_file(path) as temporary:
            path.parent.mkdir(exist_ok=True)
            pq.write_table(table, temporary, compression="zstd")
        return damage

    def _contents(self, shard: Path, index: ShardIndex) -> _Contents:
        return _Contents(
            digest=index.digest,
            decode=self.config.decode,
            phash=self.config.phash and self.config.decode,
            tokenizer=self.tokenizer.fingerprint if self.tokenizer else "",
            captions=list(self.config.captions),
            numbers=numbers_path(shard) is None,
        )

    def _measure(self, shard: Path, index: ShardIndex, contents: _Contents) -> tuple[list[dict], list[str]]:
        needed = set(IMAGE_EXTENSIONS) if contents.decode else set()
        needed |= {where.partition(":")[0] for where in contents.captions}
        needed |= {"json"} if contents.numbers else set()
        rows, damage = [], []
        with open(shard, "rb", buffering=0) as file:
            for row in range(index.rows):
                members = index.members(row)
                image = next((member for member in members if member[0] in IMAGE_EXTENSIONS), None)
                measured: dict = {"key": index.key(row), "unusable": "no image"}
                if image is not None:
                    measured |= {"unusable": None, "image_bytes": image[2], "image_crc32": image[3]}
                read: dict[str, bytes] = {}
                for extension, offset, size, crc32 in members:
                    if extension not in needed:
                        continue
                    if size > MOST_BYTES:
                        measured["unusable"] = "over 32 MiB"
                        continue
                    data = _read(shard, file.fileno(), offset, size)
                    if zlib.crc32(data) != crc32:
                        damage.append(_damage(shard, offset, measured["key"], extension))
                        measured["unusable"] = DAMAGED
                    read[extension] = data
                self._add_image(measured, read.get(image[0]) if image else None, contents, index, row)
                self._add_caption(measured, read, contents)
                rows.append(measured)
        return rows, damage

    def _add_image(self, measured: dict, data: bytes | None, contents: _Contents, index: ShardIndex, row: int) -> None:
        columns = index.columns
        number = int(columns["image_format"][row])
        measured["width"], measured["height"] = int(columns["width"][row]), int(columns["height"][row])
        measured["format"] = None if number == NO_FORMAT else FORMATS[number]
        if measured["unusable"] is not None:
            return
        if data is not None:
            measured["unusable"], measured["phash"] = measure_image(data, contents.phash)
        elif number == NO_FORMAT:
            measured["unusable"] = "not a " + ", ".join(FORMATS)

    def _add_caption(self, measured: dict, read: dict[str, bytes], contents: _Contents) -> None:
        fields = parse_json(read.get("json")) if "json" in read else {}
        captions = [find_caption(where, read.get("txt"), fields) for where in contents.captions]
        for where, caption in zip(contents.captions, captions, strict=True):
            measured[HAS + where] = caption is not None
        if captions and captions[0] is not None:
            measures = measure_caption(captions[0], self.tokenizer)._asdict()
            measured |= {f"caption_{name}": value for name, value in measures.items()}
        if contents.numbers:
            measured |= {JSON + name: value for name, value in find_numbers(fields).items()}


def verify_shard(shard: Path, index: ShardIndex) -> list[str]:
    """Read every member again: a line `SHARD: byte OFFSET: REASON` for each that is not what was indexed.

    Raises:
        ShardError: the disk does not give the bytes.
    """
    damage = []
    with open(shard, "rb", buffering=0) as file:
        for row in range(index.rows):
            for extension, offset, size, crc32 in index.members(row):
                found = 0
                for place in range(offset, offset + size, MOST_BYTES):
                    chunk = min(MOST_BYTES, offset + size - place)
                    found = zlib.crc32(_read(shard, file.fileno(), place, chunk), found)
                if found != crc32:
                    damage.append(_damage(shard, offset, index.key(row), extension))
    return damage


def _read(shard: Path, fd: int, offset: int, size: int) -> bytes:
    try:
        return os.pread(fd, size, offset)
    except OSError as error:
        raise ShardError.at(shard, offset, str(error)) from error


def _damage(shard: Path, offset: int, key: str, extension: str) -> str:
    shown = key if key.isprintable() else repr(key)  # damage is a line, whatever the key
    return str(ShardError.at(shard, offset, f"sample {shown}: its {extension} has {DAMAGED}"))


def _table(rows: list[dict], contents: _Contents) -> pa.Table:
    types = _TYPES | {HAS + where: pa.bool_() for where in contents.captions}
    numbers = Counter(name for row in rows for name in row if name.startswith(JSON))
    types |= {name: pa.float64() for name, _ in numbers.most_common(MOST_JSON_NUMBERS)}
    meta = {name: getattr(contents, name) for name in contents.__slots__} | {"format": FORMAT}
    columns = [pa.array([row.get(name) for row in rows], kind) for name, kind in types.items()]
    return pa.table(columns, pa.schema(list(types.items()), {_META: json.dumps(meta)}))


def _read_contents(path: Path) -> _Contents | None:
    """None if there is no file, or one that cannot be used: it is made again."""
    try:
        meta = json.loads(pq.read_schema(path).metadata[_META])
        return _Contents(**meta) if meta.pop("format") == FORMAT else None
    except (OSError, ValueError, KeyError, TypeError):  # pyarrow's errors are ValueErrors
        return None
