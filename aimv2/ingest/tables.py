"""A table of image paths and captions (CSV, TSV, JSON lines or parquet) to jobs for the shard writer.

The paths are relative to a folder and stay inside it. Nothing is downloaded: for URLs there is img2dataset.
"""

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from aimv2.data.images import MOST_BYTES, BadImage
from aimv2.data.shard_writer import Dropped, RawSample, ShardJob
from aimv2.ingest.pairs import Packing, Unusable, as_captions, chunks, pack_pair, read_inside, shard_name

Row = dict[str, Any] | Unusable

_LONGEST_FIELD = 1 << 20  # characters, in CSV
_BATCH = 1000  # rows of a parquet file at a time


@dataclass(slots=True, kw_only=True)
class ImageTable:
    """The rows of a table, each an image of `root` with its captions.

    Args:
        path: NAME.csv, .tsv, .jsonl or .parquet; the first two with a line of column names.
        image_column: paths relative to `root`.
        caption_columns: of a caption each, or of lists of them; the first usable one becomes the txt.

    Raises:
        ValueError: the file is of another kind, or damaged, or has not these columns.
    """

    path: Path
    root: Path
    image_column: str
    caption_columns: Sequence[str]
    packing: Packing
    rows: int = field(init=False)
    notes: Counter[str] = field(default_factory=Counter)  # columns of bytes, which have no place in JSON

    def __post_init__(self):
        if not self.path.is_file():
            raise ValueError(f"{self.path}: no such file")
        if not self.root.is_dir():
            raise ValueError(f"{self.root}: not a folder")
        self.root = self.root.resolve()
        columns, left_out = _columns(self.path)
        for name in (self.image_column, *self.caption_columns):
            if name not in columns:
                raise ValueError(f"{self.path}: no column {name!r}; it has {', '.join(map(repr, columns))}")
        self.rows = sum(1 for _ in read_table(self.path))
        if not self.rows:
            raise ValueError(f"{self.path}: no row")
        self.notes.update({f"column {name!r} of bytes left out": self.rows for name in left_out})

    def __len__(self) -> int:
        return self.rows

    @property
    def recipe(self) -> dict:
        with open(self.path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {
            "source": "table",
            "rows": self.rows,
            "digest": digest,
            "image_column": self.image_column,
            "caption_columns": list(self.caption_columns),
            **asdict(self.packing),
        }

    def jobs(self) -> Iterator[ShardJob]:
        size = self.packing.samples_per_shard
        columns = self.image_column, tuple(self.caption_columns)
        for first, rows in chunks(read_table(self.path), size):
            read = partial(_read, self.root, self.path.name, rows, first, *columns, self.packing)
            yield ShardJob(shard_name(first, size), len(rows), read)


def read_table(path: Path) -> Iterator[Row]:
    """The rows of a table, or why one is none.

    Raises:
        ValueError: what comes next cannot be told from the damage.
    """
    return _readers()[path.suffix.lower()](path)


def _readers() -> dict:
    return {
        ".csv": partial(_read_csv, dialect="excel"),
        ".tsv": partial(_read_csv, dialect="excel-tab"),
        ".jsonl": _read_jsonl,
        ".parquet": _read_parquet,
    }


def _columns(path: Path) -> tuple[list[str], list[str]]:
    """The columns of a table, and those of them that are left out."""
    if path.suffix.lower() not in _readers():
        raise ValueError(f"{path}: expected a file whose extension is one of {', '.join(_readers())}")
    if path.suffix.lower() == ".parquet":
        file = _parquet_file(path)
        readable = _readable(file)
        return readable, [name for name in file.schema_arrow.names if name not in readable]
    first = next((row for row in read_table(path) if isinstance(row, dict)), {})
    return list(first), []


def _read_csv(path: Path, dialect: str) -> Iterator[Row]:
    csv.field_size_limit(_LONGEST_FIELD)
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        reader = csv.reader(file, dialect, strict=True)  # strict: a quote that is not closed would swallow the rest
        try:
            names = next(reader, [])
            for values in reader:
                if len(values) == len(names):
                    yield dict(zip(names, values, strict=True))
                elif values:
                    yield Unusable("a row of another length than the first")
        except csv.Error as error:
            raise ValueError(f"{path}: line {reader.line_num}: {error}") from None


def _read_jsonl(path: Path) -> Iterator[Row]:
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        for line in file:
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            yield row if isinstance(row, dict) else Unusable("a line that is not a JSON object")


def _read_parquet(path: Path) -> Iterator[Row]:
    file = _parquet_file(path)
    for batch in file.iter_batches(_BATCH, columns=_readable(file)):
        yield from batch.to_pylist()


def _readable(file) -> list[str]:
    """The columns that are not of bytes, which have no place in JSON."""
    return [field.name for field in file.schema_arrow if "binary" not in str(field.type)]


def _parquet_file(path: Path):
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ImportError('parquet files need pyarrow: pip install "aimv2[train]"') from error
    try:
        return pq.ParquetFile(path)
    except ValueError as error:  # pyarrow's errors are
        raise ValueError(f"{path}: not a parquet file ({str(error).splitlines()[0]})") from None


def _read(
    root: Path,
    table: str,
    rows: list[Row],
    first: int,
    image_column: str,
    caption_columns: tuple[str, ...],
    packing: Packing,
) -> Iterator[RawSample | Dropped]:
    for number, row in enumerate(rows, first):
        source = f"{table}: row {number}"
        try:
            if isinstance(row, Unusable):
                raise row
            path = row.get(image_column)
            if not isinstance(path, str) or not path:
                raise Unusable("no image path")
            image = read_inside(root, path, MOST_BYTES, "image")
            captions = [caption for name in caption_columns for caption in as_captions(row.get(name))]
            other = {name: value for name, value in row.items() if name not in caption_columns}
            yield pack_pair(f"{number:09d}", source, image, captions, other, packing)
        except (BadImage, Unusable) as reason:
            yield Dropped(source, str(reason))
