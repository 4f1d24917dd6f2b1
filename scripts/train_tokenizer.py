"""Train a sentencepiece tokenizer from captions.

python scripts/train_tokenizer.py --captions data/pairs/shards.list --vocab-size 32000 --out tokenizers/pairs \\
    --source "web image captions" --licence CC-BY-4.0
"""

import argparse
import glob
import itertools
import json
import shlex
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from aimv2.data.shard_list import read_shard_list
from aimv2.data.shards import Shards
from aimv2.data.tokenizer import Tokenizer, train_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--captions",
        required=True,
        nargs="+",
        metavar="FILES",
        help="paths or globs: .tar (its .txt members, or --column of its .json members), a shards.list (the samples "
        "kept of its shards), .txt (one caption a line), .jsonl or .parquet (--column)",
    )
    parser.add_argument("--column", metavar="NAME", help="field with a caption or a list of captions")
    parser.add_argument("--limit", type=int, default=5_000_000, metavar="N", help="read the first N (%(default)s)")
    parser.add_argument("--vocab-size", type=int, default=32_000, metavar="N", help="at most (%(default)s)")
    parser.add_argument("--model-type", choices=("unigram", "bpe"), default="unigram")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="tokenizers/NAME")
    parser.add_argument("--source", required=True, help="where the captions come from")
    parser.add_argument("--licence", required=True, help="the licence of the captions")
    parser.add_argument("--force", action="store_true", help="replace the tokenizer that is there")
    arguments = parser.parse_args()
    try:
        path = train(arguments)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"train_tokenizer: {error}")
    print(f"{Tokenizer(path).vocab_size} pieces in {path}")


def train(arguments: argparse.Namespace) -> Path:
    files = expand(arguments.captions)
    captions = itertools.islice(read_captions(files, arguments.column), arguments.limit)
    return train_tokenizer(
        tqdm(captions, unit=" captions", unit_scale=True, delay=0.5),  # the delay keeps an immediate error to one line
        arguments.out,
        arguments.vocab_size,
        source=arguments.source,
        licence=arguments.licence,
        model_type=arguments.model_type,
        command=shlex.join(["python", *sys.argv]),
        force=arguments.force,
    )


def expand(patterns: list[str]) -> list[Path]:
    """The files of all patterns, those of each in sorted order."""
    files = []
    for pattern in patterns:
        found = sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise FileNotFoundError(f"no file matches {pattern}")
        files += map(Path, found)
    return files


def read_captions(files: list[Path], column: str | None) -> Iterator[str | bytes]:
    """Every caption of the files, in their order."""
    readers = {
        ".tar": _read_tar,
        ".list": _read_list,
        ".txt": _read_text,
        ".jsonl": _read_jsonl,
        ".parquet": _read_parquet,
    }
    for file in files:
        if file.suffix not in readers:
            raise ValueError(f"cannot read captions from {file}: expected {', '.join(readers)}")
        try:
            yield from readers[file.suffix](file, column)
        except (ValueError, RecursionError, tarfile.TarError) as error:  # json's and pyarrow's are ValueErrors
            raise ValueError(f"{file}: {error}") from None


def _read_tar(file: Path, column: str | None) -> Iterator[str | bytes]:
    with tarfile.open(file, "r:") as tar:
        for member in tar:
            if not member.isfile():
                continue
            if column is None and member.name.endswith(".txt"):
                yield tar.extractfile(member).read()
            elif column is not None and member.name.endswith(".json"):
                yield from _field(json.load(tar.extractfile(member)), column, member.name)


def _read_list(file: Path, column: str | None) -> Iterator[str | bytes]:
    for sample in Shards(read_shard_list(str(file)), ("txt",) if column is None else ("json",)):
        if column is None and sample.text is not None:
            yield sample.text
        elif column is not None and sample.json is not None:
            yield from _field(json.loads(sample.json), column, sample.key)


def _read_text(file: Path, column: str | None) -> Iterator[bytes]:
    with file.open("rb") as lines:
        yield from lines


def _read_jsonl(file: Path, column: str | None) -> Iterator[str]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number} is not JSON: {error}") from None
            yield from _field(record, column, f"line {number}")


def _read_parquet(file: Path, column: str | None) -> Iterator[str]:
    from pyarrow import parquet  # only for whoever has parquet files

    table = parquet.ParquetFile(file)
    if column not in table.schema_arrow.names:
        raise ValueError(f"it has the columns {', '.join(table.schema_arrow.names)}; --column is {column}")
    for batch in table.iter_batches(columns=[column]):
        for row in batch.to_pylist():
            yield from _field(row, column, "a row")


def _field(record: object, column: str | None, where: str) -> list[str]:
    """The captions of a record: a string, a list of strings, or null for none."""
    if not isinstance(record, dict):
        raise ValueError(f"{where} is {type(record).__name__}, expected an object with fields")
    if column not in record:
        raise ValueError(f"{where} has the fields {', '.join(record)}; --column is {column}")
    value = record[column]
    values = value if isinstance(value, list) else [value]
    return [caption for caption in values if isinstance(caption, str)]


if __name__ == "__main__":
    main()
