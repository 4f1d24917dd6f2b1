"""Rows of metadata in parquet files, found by their values in one or two columns, without ever holding a whole file."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

_ROWS = 1 << 20  # of a part at a time; the table of what is looked for is built anew for each of them
_WHOLE_ROWS = 1 << 16  # the same for all columns


def read_schema(part: Path) -> pa.Schema:
    schema = _open(part).schema_arrow.remove_metadata()
    if not {"id", "url"} <= set(schema.names):
        raise ValueError(f"{part}: expected columns id and url, it has {', '.join(schema.names)}")
    return schema


def _open(part: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(part, memory_map=True)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{part}: not a parquet file ({str(error).splitlines()[0]})") from None


def find_rows(
    parts: Sequence[Path], columns: Sequence[str], values: pa.Array, schema: pa.Schema
) -> tuple[np.ndarray, pa.Table, np.ndarray]:
    """As `search_parts`, for values that may come more than once or be null."""
    unique = pc.unique(values).drop_null()
    found, rows, repeats = search_parts(parts, columns, unique, schema)
    places = places_in(values, unique)
    return np.append(found, -1)[places], rows, np.append(repeats, 0)[places]  # the last ones are for places of -1


def search_parts(
    parts: Sequence[Path], columns: Sequence[str], values: pa.Array, schema: pa.Schema
) -> tuple[np.ndarray, pa.Table, np.ndarray]:
    """Look for values in parts until all are found.

    Args:
        columns: where to look; of several, the values are those that `join_values` makes.
        values: each once.

    Returns:
        (len(values),) of places in the table of the rows found, -1 where there is none; that table; and (len(values),)
        of how many further rows of that part have the same value.
    """
    found, repeats = np.full(len(values), -1), np.zeros(len(values), int)
    tables, rows = [schema.empty_table()], 0
    for part in parts:
        left = np.flatnonzero(found < 0)
        if not len(left):
            break
        numbers = np.full(len(left), -1)  # rows of the part
        for first, at_rows, at in matches(part, columns, values.take(pa.array(left))):
            new, where = np.unique(at, return_index=True)  # the first of each
            repeats[left] += np.bincount(at, minlength=len(left))
            new, where = new[numbers[new] < 0], where[numbers[new] < 0]
            numbers[new] = first + at_rows[where]
        hit = numbers >= 0
        repeats[left[hit]] -= 1
        chosen, places = np.unique(numbers[hit], return_inverse=True)
        found[left[hit]] = rows + places
        tables.append(_take(part, chosen, schema))
        rows += len(chosen)
    return found, pa.concat_tables(tables).combine_chunks(), repeats


def matches(part: Path, columns: Sequence[str], values: pa.Array) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(first row of a batch, rows in it that have one of the values, which of the values), batch by batch."""
    first = 0
    for batch in _open(part).iter_batches(_ROWS, columns=list(columns)):
        joined = join_values(*(batch[name] for name in columns)).cast(values.type)
        at = pc.index_in(joined, value_set=values, skip_nulls=True)
        rows = np.flatnonzero(at.is_valid().to_numpy(zero_copy_only=False))
        yield first, rows, at.drop_null().to_numpy()
        first += batch.num_rows


def _take(part: Path, rows: np.ndarray, schema: pa.Schema) -> pa.Table:
    """These rows, ascending, of a part. Row groups without any are not read."""
    file = _open(part)
    sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    ends = np.cumsum(sizes)
    taken = [schema.empty_table()]
    if missing := set(schema.names) - set(file.schema_arrow.names):
        raise ValueError(f"{part}: no column {min(missing)!r}, which other parts have")
    for group in np.unique(np.searchsorted(ends, rows, side="right")).tolist():
        first = int(ends[group]) - sizes[group]
        for batch in file.iter_batches(_WHOLE_ROWS, row_groups=[group], columns=schema.names):
            inside = rows[(rows >= first) & (rows < first + batch.num_rows)] - first
            taken.append(pa.Table.from_batches([batch]).select(schema.names).take(pa.array(inside)).cast(schema))
            first += batch.num_rows
    return pa.concat_tables(taken)


def join_values(first: pa.Array, *others: pa.Array) -> pa.Array:
    """One value for those of several columns of texts; null if one of them is."""
    return pc.binary_join_element_wise(first, *others, "\0") if others else first


def places_in(values: pa.Array, unique: pa.Array) -> np.ndarray:
    """Where each value is in `unique`, -1 for null and what is not there."""
    return pc.index_in(values, value_set=unique, skip_nulls=True).fill_null(-1).to_numpy(zero_copy_only=False)
