"""The columns of a measured shard by name: what was measured, what follows from it, and what came with the samples.

The latter are the numbers of `prepared/00000.columns.parquet` (rows as in the tar), else of img2dataset's
`00000.parquet` (joined by key), else those at the top level of each KEY.json. Where a name is both measured and given,
the measure counts.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from aimv2.data.tar import ShardError
from aimv2.ingest.prepared_folder import FOLDER
from aimv2.ingest.shard_measures import HAS, JSON, measures_path, numbers_path

DERIVED = ("min_side", "aspect")
GIVEN_PHASH = "image_phash"  # COYO's, 16 hex digits
HIDDEN = ("phash", "image_crc32")  # numbers that measure nothing


class ShardColumns:
    """The columns of one measured shard by name, each (rows,) float64 with NaN where a sample has no value.

    Raises:
        ShardError: no measures, or the source's numbers are not those of this shard.
    """

    def __init__(self, shard: Path):
        self.shard = shard
        try:
            self._measured = pq.ParquetFile(measures_path(shard), memory_map=True)
            path = numbers_path(shard)
            self._given = None if path is None else pq.ParquetFile(path, memory_map=True)
        except (OSError, ValueError) as error:
            raise ShardError(f"{shard}: its measures cannot be read ({error})") from None
        self.rows = self._measured.metadata.num_rows
        self._columns: dict[str, np.ndarray] = {}
        self._measured_names = set(self._measured.schema_arrow.names)
        given = () if self._given is None else self._given.schema_arrow
        self._given_types = {field.name: field.type for field in given}

    @property
    def names(self) -> list[str]:
        """All numeric columns, those that follow from others included."""
        schema = self._measured.schema_arrow
        measured = [f.name for f in schema if _is_number(f.type) and not f.name.startswith((HAS, JSON))]
        given = [name for name, kind in self._given_types.items() if _is_number(kind)]
        given += [name.removeprefix(JSON) for name in schema.names if name.startswith(JSON)]
        texts = self._measured_names - set(measured)  # a number given under the name of one is not found
        return [n for n in dict.fromkeys((*measured, *DERIVED, *given)) if n not in HIDDEN and n not in texts]

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._columns:
            self._columns[name] = self._compute(name)
        return self._columns[name]

    def _compute(self, name: str) -> np.ndarray:
        if name in DERIVED:
            short, long = np.sort([self["width"], self["height"]], axis=0)
            if name == "min_side":
                return short
            return np.divide(long, short, where=short > 0, out=np.full(self.rows, np.nan))
        if name in self._measured_names:
            values = _floats(self._read(name))
            return np.where(values > 0, values, np.nan) if name in ("width", "height") else values
        if name in self._given_types and _is_number(self._given_types[name]):
            return _floats(self._read_given(name))
        if JSON + name in self._measured_names:
            return _floats(self._read(JSON + name))
        return np.full(self.rows, np.nan)

    def unusable(self) -> np.ndarray:
        """(rows,) of reasons; None where the sample can be used."""
        return self._read("unusable").to_numpy(zero_copy_only=False)

    def has_caption(self, where: str) -> np.ndarray:
        """(rows,) bool."""
        return self._read(HAS + where).to_numpy(zero_copy_only=False).astype(bool)

    def formats(self) -> Counter[str]:
        counts = pc.value_counts(self._read("format").drop_null())
        return Counter({entry["values"]: entry["counts"] for entry in counts.to_pylist()})

    def hashes(self, kind: str) -> tuple[np.ndarray, np.ndarray]:
        """(rows,) uint64 of "bytes" (crc32 and size) or "phash" (COYO's if given); (rows,) bool where there is one."""
        if kind == "bytes":
            crc32, size = (self._read(name) for name in ("image_crc32", "image_bytes"))
            values = [column.fill_null(0).to_numpy().astype(np.uint64) for column in (crc32, size)]
            return values[0] | (values[1] << np.uint64(32)), size.is_valid().to_numpy(zero_copy_only=False)
        if GIVEN_PHASH not in self._given_types:
            values = self._read("phash")
            return values.fill_null(0).to_numpy(), values.is_valid().to_numpy(zero_copy_only=False)
        texts = self._read_given(GIVEN_PHASH).cast(pa.string())
        valid = pc.match_substring_regex(texts, "^[0-9a-fA-F]{16}$").fill_null(False)
        digits = "".join(pc.if_else(valid, texts, "0" * 16).to_pylist())
        return np.frombuffer(bytes.fromhex(digits), ">u8").astype(np.uint64), valid.to_numpy(zero_copy_only=False)

    def check(self) -> None:
        """That the source's numbers are of the samples of this shard.

        Raises:
            ShardError: they are not.
        """
        if self._given is None:
            return
        path = numbers_path(self.shard)
        if "key" not in self._given_types:
            raise ShardError(f"{self.shard}: {path} has no column key")
        if path.parent.name != FOLDER:
            return  # joined by key; a sample that is not there has no numbers
        if not self._given.read(["key"])["key"].combine_chunks().cast(pa.string()).equals(self._read("key")):
            raise ShardError(f"{self.shard}: {path} is of other samples; make it again")

    def _read(self, column: str) -> pa.Array:
        return self._measured.read([column])[column].combine_chunks()

    def _read_given(self, column: str) -> pa.Array:
        values = self._given.read([column])[column].combine_chunks()
        return values if self._places is None else values.take(self._places)

    @cached_property
    def _places(self) -> pa.Array | None:
        """Where each sample is in the given numbers, null if nowhere; None if they are in the tar's order."""
        if numbers_path(self.shard).parent.name == FOLDER:
            return None
        return pc.index_in(self._read("key"), value_set=self._given.read(["key"])["key"].combine_chunks())


def has_given_hashes(shard: Path) -> bool:
    """Whether COYO's perceptual hashes came with the samples."""
    path = numbers_path(shard)
    try:
        return path is not None and GIVEN_PHASH in pq.read_schema(path).names
    except (OSError, ValueError):  # reported when it is read for its numbers
        return False


def open_columns(shards: Iterable[Path]) -> Iterator[ShardColumns]:
    """One shard after the other, so that memory does not grow with their number."""
    return map(ShardColumns, shards)


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def _floats(values: pa.Array) -> np.ndarray:
    """Nothing, NaN and infinity are all no value."""
    floats = values.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    return np.where(np.isfinite(floats), floats, np.nan)
