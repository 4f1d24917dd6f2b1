"""`prepared/00000.columns.parquet`: the rows of the metadata for the samples of `00000.tar`, in their order.

How far the search for them went is said in the schema's metadata, so that the two cannot disagree.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from aimv2.ingest.metadata import find_rows, join_values
from aimv2.ingest.sidecars import Sidecar, read_sidecar
from aimv2.whole_files import whole_file

FOLDER = "prepared"  # where `prepare` looks for columns

_STATE = b"aimv2.coyo"


@dataclass(slots=True)
class State:
    """What was done for one shard."""

    tar_bytes: int
    samples: int
    matched: int
    repeated: int  # samples whose id or url several rows of a part have
    from_json: bool
    all_parts: bool  # were searched

    @property
    def done(self) -> bool:
        return self.all_parts or self.matched == self.samples


class Group(NamedTuple):
    """Shards that are joined together."""

    names: list[str]
    parts: list[Path]  # to search, in this order
    all_parts: bool


def columns_path(shard: Path) -> Path:
    return shard.parent / FOLDER / f"{shard.stem}.columns.parquet"


def read_state(shard: Path) -> State | None:
    """What was done for a shard; None if nothing, or for another tar of that name."""
    try:
        state = State(**json.loads(pq.read_schema(columns_path(shard)).metadata[_STATE]))
    except (FileNotFoundError, pa.ArrowInvalid, KeyError, TypeError):  # none, damaged, or not ours: made anew
        return None
    return state if state.tar_bytes == shard.stat().st_size else None


def join_group(images: Path, schema: pa.Schema, group: Group) -> list[str]:
    """Write or complete the columns of a group's shards."""
    shards = [(shard, read_sidecar(shard)) for shard in (images / f"{name}.tar" for name in group.names)]
    for column in ("id", "url"):
        chosen = [(shard, sidecar) for shard, sidecar in shards if sidecar.column == column]
        if chosen:
            _join_shards(chosen, column, schema, group)
    return group.names


def _join_shards(shards: list[tuple[Path, Sidecar]], column: str, schema: pa.Schema, group: Group) -> None:
    wanted = pa.concat_arrays([_missing(shard, sidecar) for shard, sidecar in shards])
    found, rows, repeats = find_rows(group.parts, [column], wanted, schema)
    several = np.flatnonzero(repeats)
    if len(several) and column == "url" and "text" in schema.names:
        captions = pa.concat_arrays([sidecar.captions for _, sidecar in shards])
        pairs = join_values(*(values.take(pa.array(several)) for values in (wanted, captions)))
        same, exact, _ = find_rows(group.parts, ["url", "text"], pairs, schema)
        found[several] = np.where(same >= 0, rows.num_rows + same, found[several])
        rows = pa.concat_tables([rows, exact]).combine_chunks()
    ends = np.cumsum([len(sidecar.keys) for _, sidecar in shards])
    for (shard, sidecar), end in zip(shards, ends.tolist(), strict=True):
        mine = slice(end - len(sidecar.keys), end)
        new = rows.take(pa.array(found[mine], mask=found[mine] < 0))
        _write_columns(shard, sidecar, new, int(np.count_nonzero(repeats[mine])), group.all_parts)


def _missing(shard: Path, sidecar: Sidecar) -> pa.Array:
    """What the samples without a row are called; null for the others."""
    if read_state(shard) is None:
        return sidecar.names
    found = pq.read_table(columns_path(shard), columns=["id"])["id"].combine_chunks()
    return pc.if_else(found.is_null(), sidecar.names, None)


def _write_columns(shard: Path, sidecar: Sidecar, new: pa.Table, repeated: int, all_parts: bool) -> None:
    """Write a shard's columns: the rows found now, and those found before."""
    path, old = columns_path(shard), read_state(shard)
    table = new
    if old is not None:
        before = pq.read_table(path)
        table = pa.table({name: pc.coalesce(new[name], before[name]) for name in new.column_names})
    state = State(
        tar_bytes=shard.stat().st_size,
        samples=table.num_rows,
        matched=table.num_rows - table["id"].null_count,
        repeated=repeated + (old.repeated if old else 0),
        from_json=sidecar.from_json,
        all_parts=all_parts,
    )
    table = table.add_column(0, "key", sidecar.keys).replace_schema_metadata({_STATE: json.dumps(asdict(state))})
    with whole_file(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")
