"""What img2dataset's `00000.parquet` says of the samples of `00000.tar`: a row for every download, failed ones too.

Rows are in the order in which the downloads ended, which is the order of the tar. Seen with img2dataset 1.47.
"""

import json
import os
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from aimv2.data.tar import ShardError, read_members
from aimv2.ingest.downloads import read_successes

MOST_JSON_BYTES = 1 << 20


class Sidecar(NamedTuple):
    """The samples of one shard, in the order of its tar."""

    keys: pa.Array  # of strings
    names: pa.Array  # what each is called elsewhere
    column: str  # where: "id" or "url"
    captions: pa.Array  # as they were downloaded; null if that was not asked for
    from_json: bool  # read from the members of the tar, for want of a parquet file


def read_sidecar(shard: Path) -> Sidecar:
    """The samples of a finished shard, from the parquet file beside it or, without a usable one, from its JSON members.

    Raises:
        ShardError: there is neither, or their number is not that of the stats.
    """
    table = _read_parquet(shard.with_suffix(".parquet"))
    from_json = table is None
    if table is None:
        table = _read_json(shard)
    column = "id" if "id" in table.column_names else "url"
    successes = read_successes(shard)
    if table.num_rows != successes:
        source = "its json members" if from_json else shard.with_suffix(".parquet").name
        raise ShardError(f"{shard}: {table.num_rows} samples in {source}, {successes} in its stats")
    try:
        keys = table["key"].combine_chunks().cast(pa.string())
        names = table[column].combine_chunks().cast(pa.int64() if column == "id" else pa.string())
        captions = table["caption"].combine_chunks() if "caption" in table.column_names else pa.nulls(len(keys))
        return Sidecar(keys, names, column, captions.cast(pa.string()), from_json)
    except pa.ArrowInvalid as error:
        raise ShardError(f"{shard}: its keys, captions or column {column} ({error})") from None


def _read_parquet(path: Path) -> pa.Table | None:
    """The rows that succeeded, or None if there is no such file or it is damaged."""
    try:
        file = pq.ParquetFile(path)
        names = {"key", "url", "status", "id", "caption"} & set(file.schema_arrow.names)
        if not {"key", "url", "status"} <= names:
            return None
        return file.read(sorted(names)).filter(pa.compute.field("status") == "success")
    except (FileNotFoundError, pa.ArrowInvalid):
        return None


def _read_json(shard: Path) -> pa.Table:
    """Key, url, caption and, if all have one, id, of every JSON member."""
    records = []
    with open(shard, "rb", buffering=0) as file:
        for member in read_members(shard, file.fileno()):
            if not member.name.endswith(b".json"):
                continue
            try:
                if member.size > MOST_JSON_BYTES:
                    raise ValueError(f"{member.size} bytes")
                record = json.loads(os.pread(file.fileno(), member.size, member.offset))
                records.append({name: record.get(name) for name in ("key", "url", "id", "caption")})
            except (ValueError, AttributeError, RecursionError) as error:
                raise ShardError.at(shard, member.header, f"a json member that is none ({error})") from None
    schema = [("key", pa.string()), ("url", pa.string()), ("caption", pa.string())]
    if records and all(isinstance(record["id"], int) for record in records):
        schema.append(("id", pa.int64()))
    try:
        return pa.Table.from_pylist(records, pa.schema(schema))
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ShardError(f"{shard}: json members without a key and a url ({error})") from None
