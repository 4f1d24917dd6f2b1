"""A table of image paths and captions (CSV, TSV, JSON lines or parquet) to jobs for the shard writer.

The paths are relative to a folder and stay inside it. Nothing is downloaded: for URLs there is img2dataset.
"""

import codecs
import csv
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from aimv2.data.images import MOST_BYTES, BadImage
from aimv2.data.shard_writer import Dropped, RawSample, ShardJob
from aimv2.ingest.pairs import Packing, Unusable, as_captions, chunks, pack_pair, read_inside, shard_name

Row = dict[str, Any] | Unusable

_LONGEST_FIELD = 1 << 20  # characters, in CSV; a row with a longer one is dropped
_LONGEST_PARSED = 1 << 26  # characters; beyond them a quote was never closed, and the table is refused
_BATCH = 1000  # rows of a parquet file at a time
_MOST_LISTED = 50  # columns, in a message
_SEPARATORS = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a vertical bar"}
# strict: a quote that is not closed would swallow the rest. In .tsv a quote is a character like any other.
_DIALECTS = {
    ".csv": {"delimiter": ",", "strict": True},
    ".tsv": {"delimiter": "\t", "quoting": csv.QUOTE_NONE},
}
_NOT_UTF8 = "rows with U+FFFD, which stands for bytes that are not in the table's encoding"


@dataclass(slots=True, kw_only=True)
class ImageTable:
    """The rows of a table, each an image of `root` with its captions.

    Args:
        path: NAME.csv, .tsv (without quoting), .jsonl or .parquet; the first two with a line of column names. Texts are
            UTF-8, or UTF-16 with a byte order mark.
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
    notes: Counter[str] = field(default_factory=Counter)  # columns of bytes, and texts that are damaged

    def __post_init__(self):
        if not self.path.is_file():
            raise ValueError(f"{self.path}: no such file")
        if not self.root.is_dir():
            raise ValueError(f"{self.root}: not a folder")
        self.root = self.root.resolve()
        if self.path.suffix.lower() not in _readers():
            raise ValueError(f"{self.path}: expected a file whose extension is one of {', '.join(_readers())}")
        columns = self._survey()
        if not self.rows:
            raise ValueError(f"{self.path}: no row")
        for name in (self.image_column, *self.caption_columns):
            if name not in columns:
                raise ValueError(f"{self.path}: no column {name!r}; it has {_listed(columns, self.path)}")

    def __len__(self) -> int:
        return self.rows

    @property
    def opaque(self) -> dict[str, str]:
        return {"digest": f"the contents of {self.path} are others"}

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

    def _survey(self) -> list[str]:
        """Count the rows, note what is odd about them, and return the columns."""
        kind, columns, left_out, damaged = self.path.suffix.lower(), {}, [], 0
        if kind in _DIALECTS:
            columns = dict.fromkeys(_read_names(self.path))
        elif kind == ".parquet":
            file = _parquet_file(self.path)
            columns = dict.fromkeys(_readable(file))
            left_out = [name for name in file.schema_arrow.names if name not in columns]
        self.rows = 0
        for _, row in read_table(self.path):
            self.rows += 1
            if isinstance(row, dict):
                columns |= dict.fromkeys(row)  # lines of JSON may have different ones
                damaged += any(isinstance(value, str) and "\ufffd" in value for value in row.values())
        self.notes.update({f"column {name!r} of bytes left out": self.rows for name in left_out})
        if damaged:
            self.notes[_NOT_UTF8] = damaged
        return list(columns)


def read_table(path: Path) -> Iterator[tuple[str, Row]]:
    """(where it is, "line 2"; the row, or why it is none) of every row.

    Raises:
        ValueError: what comes next cannot be told from the damage.
    """
    return _readers()[path.suffix.lower()](path)


def _readers() -> dict:
    return {".csv": _read_csv, ".tsv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}


def _listed(columns: Sequence[str], path: Path) -> str:
    """The columns a table has, and what may have gone wrong if that is a single one."""
    listed = ", ".join(map(repr, columns[:_MOST_LISTED])) or "none"
    if len(columns) == 1 and path.suffix.lower() in _DIALECTS:
        expected = _DIALECTS[path.suffix.lower()]["delimiter"]
        most = max(_SEPARATORS, key=columns[0].count)
        if most != expected and most in columns[0]:
            return f"{listed}: separated by {_SEPARATORS[most]}, where {path.suffix} has {_SEPARATORS[expected]}?"
    if any(name != name.strip() for name in columns):
        return f"{listed}: the spaces around a name are part of it"
    return listed


def _open_text(path: Path, newline: str | None = None) -> TextIO:
    with open(path, "rb") as file:
        marked = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    return open(path, encoding="utf-16" if marked else "utf-8-sig", errors="replace", newline=newline)


def _csv_reader(file: TextIO, path: Path):
    csv.field_size_limit(_LONGEST_PARSED)
    return csv.reader(file, **_DIALECTS[path.suffix.lower()])


def _read_names(path: Path) -> list[str]:
    """The line of column names."""
    with _open_text(path, newline="") as file:
        try:
            names = next(_csv_reader(file, path), [])
        except csv.Error as error:
            raise ValueError(f"{path}: line 1: {error}") from None
    for name, count in Counter(names).items():
        if count > 1:
            raise ValueError(f"{path}: {count} columns are called {name!r}, expected each name once")
    return names


def _read_csv(path: Path) -> Iterator[tuple[str, Row]]:
    names = _read_names(path)
    with _open_text(path, newline="") as file:
        reader = _csv_reader(file, path)
        try:
            next(reader, [])
            line = reader.line_num + 1
            for values in reader:
                if values:
                    yield f"line {line}", _csv_row(names, values)
                line = reader.line_num + 1
        except csv.Error as error:
            raise ValueError(f"{path}: line {reader.line_num}: {error}") from None


def _csv_row(names: list[str], values: list[str]) -> Row:
    if len(values) != len(names):
        return Unusable("a row of another length than the first")
    if max(map(len, values)) > _LONGEST_FIELD:
        return Unusable(f"a field of over {_LONGEST_FIELD >> 20} MiB")
    return dict(zip(names, values, strict=True))


def _read_jsonl(path: Path) -> Iterator[tuple[str, Row]]:
    with _open_text(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            yield f"line {number}", row if isinstance(row, dict) else Unusable("a line that is not a JSON object")


def _read_parquet(path: Path) -> Iterator[tuple[str, Row]]:
    file, number = _parquet_file(path), itertools.count()
    for batch in file.iter_batches(_BATCH, columns=_readable(file)):
        yield from ((f"row {next(number)}", row) for row in batch.to_pylist())


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
    rows: list[tuple[str, Row]],
    first: int,
    image_column: str,
    caption_columns: tuple[str, ...],
    packing: Packing,
) -> Iterator[RawSample | Dropped]:
    for number, (place, row) in enumerate(rows, first):
        source = f"{table}: {place}"
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
