import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aimv2.ingest import metadata
from aimv2.ingest.metadata import find_rows, join_values, matches, places_in, read_schema, search_parts

SCHEMA = pa.schema([("id", pa.int64()), ("url", pa.string()), ("score", pa.float64())])


def write_parts(folder, parts: list[list[str | None]], row_group: int) -> list:
    """Row n of part p has the id 1000 p + n."""
    paths = []
    for p, urls in enumerate(parts):
        rows = [{"id": 1000 * p + n, "url": url, "score": n / 8} for n, url in enumerate(urls)]
        path = folder / f"part-{p}.parquet"
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), path, row_group_size=row_group)
        paths.append(path)
    return paths


def naive(parts, values):
    """{value: (id of the first row of the first part that has it, further rows there)}."""
    found = {}
    for p, urls in enumerate(parts):
        for value in set(values) & set(urls) - found.keys():
            rows = [n for n, url in enumerate(urls) if url == value]
            found[value] = 1000 * p + rows[0], len(rows) - 1
    return found


urls = st.sampled_from([f"http://{i}" for i in range(12)])


@settings(max_examples=200, deadline=None)
@given(
    parts=st.lists(st.lists(st.none() | urls, max_size=20), min_size=1, max_size=4),
    values=st.lists(urls, unique=True, max_size=12),
    row_group=st.integers(1, 8),
    batches=st.tuples(st.integers(1, 9), st.integers(1, 9)),
)
def test_finds_what_a_naive_join_finds(tmp_path_factory, parts, values, row_group, batches):
    folder = tmp_path_factory.mktemp("parts")
    paths = write_parts(folder, parts, row_group)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metadata, "_ROWS", batches[0])
        patch.setattr(metadata, "_WHOLE_ROWS", batches[1])
        found, rows, repeats = search_parts(paths, ["url"], pa.array(values, pa.string()), SCHEMA)
    expected = naive(parts, values)
    records = rows.to_pylist()
    for value, place, repeated in zip(values, found.tolist(), repeats.tolist(), strict=True):
        if value not in expected:
            assert (place, repeated) == (-1, 0)
            continue
        row_id, again = expected[value]
        assert records[place] == {"id": row_id, "url": value, "score": row_id % 1000 / 8}
        assert repeated == again
    assert rows.num_rows == len(expected)


def test_by_number(tmp_path):
    paths = write_parts(tmp_path, [["a", "b"], ["c"]], 2)
    found, rows, repeats = search_parts(paths, ["id"], pa.array([1000, 7, 1]), SCHEMA)
    assert [rows["url"][int(p)].as_py() if p >= 0 else None for p in found] == ["c", None, "b"]
    assert not repeats.any()


def test_by_two_columns_and_values_that_repeat(tmp_path):
    rows = [{"id": n, "url": "ab"[n % 2], "text": "xyz"[n // 2]} for n in range(6)] + [{"id": 6, "url": "a"}]
    schema = pa.schema([("id", pa.int64()), ("url", pa.string()), ("text", pa.string())])
    pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "a.parquet", row_group_size=2)
    wanted = join_values(pa.array(["a", "b", "a", "c", "a", None]), pa.array(["y", "z", "y", "x", None, "x"]))
    found, table, repeats = find_rows([tmp_path / "a.parquet"], ["url", "text"], wanted, schema)
    assert [table["id"][int(p)].as_py() if p >= 0 else None for p in found] == [2, 5, 2, None, None, None]
    assert not repeats.any()
    found, table, repeats = find_rows([tmp_path / "a.parquet"], ["url"], pa.array(["b", None, "b", "a"]), schema)
    assert [table["id"][int(p)].as_py() if p >= 0 else None for p in found] == [1, None, 1, 0]
    assert repeats.tolist() == [2, 0, 2, 3]
    found, table, repeats = find_rows([tmp_path / "a.parquet"], ["url"], pa.nulls(2, pa.string()), schema)
    assert found.tolist() == [-1, -1] and repeats.tolist() == [0, 0] and table.num_rows == 0


def test_parts_are_not_read_once_all_is_found(tmp_path):
    paths = write_parts(tmp_path, [["a", "b"]], 2)
    _, rows, _ = search_parts([*paths, tmp_path / "missing.parquet"], ["url"], pa.array(["b"]), SCHEMA)
    assert rows["url"].to_pylist() == ["b"]


def test_only_row_groups_with_a_hit_are_read_whole(tmp_path, monkeypatch):
    (path,) = write_parts(tmp_path, [[f"http://{n}" for n in range(100)]], 10)
    read, original = [], pq.ParquetFile.iter_batches

    def iter_batches(self, *args, row_groups=None, **kwargs):
        read.append(row_groups)
        return original(self, *args, row_groups=row_groups, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", iter_batches)
    search_parts([path], ["url"], pa.array(["http://11", "http://15", "http://93"]), SCHEMA)
    assert read == [None, [1], [9]]


def test_matches_and_places(tmp_path):
    (path,) = write_parts(tmp_path, [["a", None, "b", "a"]], 4)
    ((first, rows, which),) = matches(path, ["url"], pa.array(["b", "a"]))
    assert first == 0 and rows.tolist() == [0, 2, 3] and which.tolist() == [1, 0, 1]
    places = places_in(pa.array(["b", None, "x", "a"]), pa.array(["a", "b"]))
    assert np.array_equal(places, [1, -1, -1, 0])


def test_errors(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match=r"a\.parquet: not a parquet file"):
        read_schema(tmp_path / "a.parquet")
    pq.write_table(pa.table({"url": ["a"]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"b\.parquet: expected columns id and url, it has url"):
        read_schema(tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"b\.parquet: no column 'id', which other parts have"):
        search_parts([tmp_path / "b.parquet"], ["url"], pa.array(["a"]), SCHEMA)
