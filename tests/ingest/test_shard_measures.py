import dataclasses
import json
import os
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_tars import picture, write_samples

pytest.importorskip("sentencepiece")

from aimv2.data.images import FORMATS
from aimv2.data.shard_scan import build_index
from aimv2.data.tar import ShardError
from aimv2.ingest.measures import MeasureConfig, measure_caption, measure_image
from aimv2.ingest.shard_columns import ShardColumns
from aimv2.ingest.shard_measures import ShardMeasurer, measures_path, verify_shard

SAMPLES = [
    {"jpg": picture(0, (64, 48)), "txt": b"a dog", "json": b'{"score": 0.5, "long": "a big dog", "n": 1}'},
    {"png": picture(1, (100, 50), "PNG"), "txt": b"caf\xe9 &amp; bar", "json": b'{"score": 1e400, "n": true}'},
    {"txt": b"no image at all", "json": b"{"},
    {"jpg": b"not an image", "json": b'{"long": ["x y z", "w"], "score": -1}'},
    {"jpg": picture(3, (300, 200))[:3000], "txt": b"cut off", "json": b'{"long": 3}'},
    {"webp": picture(4, (40, 90), "WEBP"), "txt": b""},
]


@pytest.fixture
def shard(tmp_path):
    return write_samples(tmp_path / "00000.tar", SAMPLES)


def measured(shard, **config) -> ShardColumns:
    index, measurer = build_index(shard), ShardMeasurer(MeasureConfig(**config))
    assert measurer.measure(shard, index) == []
    assert measurer.is_measured(shard, index)
    return ShardColumns(shard)


def test_rows_are_the_measures_of_the_samples(shard):
    columns = measured(shard, captions=("txt", "json:long"))
    rows = pq.read_table(measures_path(shard)).to_pylist()
    assert [row["key"] for row in rows] == [f"{i:06d}" for i in range(6)]
    assert [row["format"] for row in rows] == ["JPEG", "PNG", None, None, "JPEG", "WEBP"]
    assert [(row["width"], row["height"]) for row in rows] == [
        (64, 48),
        (100, 50),
        (0, 0),
        (0, 0),
        (300, 200),
        (40, 90),
    ]
    assert [row["has_json:long"] for row in rows] == [True, False, False, True, False, False]
    for row, sample in zip(rows, SAMPLES, strict=True):
        image = next((data for extension, data in sample.items() if extension not in ("txt", "json")), None)
        assert row["image_bytes"] == (None if image is None else len(image))
        expected = ("no image", None) if image is None else measure_image(image)
        assert (row["unusable"], row["phash"]) == expected
        caption = measure_caption(sample["txt"])._asdict() if "txt" in sample else {}
        assert {name: row[f"caption_{name}"] for name in ("bytes", "words", "escaped", "not_utf8", "empty")} == {
            name: caption.get(name) for name in ("bytes", "words", "escaped", "not_utf8", "empty")
        }
    assert columns.unusable().tolist() == [row["unusable"] for row in rows]
    np.testing.assert_array_equal(columns["min_side"], [48, 50, np.nan, np.nan, 200, 40])
    np.testing.assert_allclose(columns["aspect"], [64 / 48, 2, np.nan, np.nan, 1.5, 90 / 40])
    np.testing.assert_array_equal(columns["score"], [0.5, np.nan, np.nan, -1, np.nan, np.nan])  # infinity is no value
    np.testing.assert_array_equal(columns["n"], [1, 1, np.nan, np.nan, np.nan, np.nan])
    images = {0: "jpg", 1: "png", 3: "jpg", 4: "jpg", 5: "webp"}
    expected = [zlib.crc32(SAMPLES[i][name]) + len(SAMPLES[i][name]) * 2**32 for i, name in images.items()]
    values, valid = columns.hashes("bytes")
    assert values[valid].tolist() == expected and np.flatnonzero(valid).tolist() == list(images)
    assert {"min_side", "aspect", "width", "score", "n", "caption_words", "image_bytes"} <= set(columns.names)
    assert not {"phash", "key", "image_crc32", "json:score", "has_txt"} & set(columns.names)


def test_headers_only(shard):
    columns = measured(shard, decode=False)
    assert columns.unusable().tolist() == [None, None, "no image", "not a " + ", ".join(FORMATS), None, None]
    assert columns["width"][4] == 300 and not columns.hashes("phash")[1].any()


def test_the_first_place_of_captions_is_measured(shard):
    columns = measured(shard, captions=("json:long", "txt"))
    np.testing.assert_array_equal(columns["caption_words"], [3, np.nan, np.nan, 3, np.nan, np.nan])
    assert columns.has_caption("txt").tolist() == [True, True, True, False, True, True]
    without = measured(shard, captions=())
    assert np.isnan(without["caption_words"]).all()


def test_measures_serve_whoever_asks_for_the_same_or_less(shard, pytestconfig):
    index = build_index(shard)
    tokenizer = str(pytestconfig.rootpath / "tokenizers" / "shapes")
    full = MeasureConfig(tokenizer=tokenizer, captions=("txt", "json:long"))
    ShardMeasurer(full).measure(shard, index)

    def serves(**changes) -> bool:
        return ShardMeasurer(dataclasses.replace(full, **changes)).is_measured(shard, index)

    assert serves() and serves(tokenizer=None) and serves(captions=("txt",)) and serves(decode=False, phash=False)
    assert not serves(captions=("json:long", "txt")) and not serves(captions=("txt", "json:other"))
    assert not ShardMeasurer(full).is_measured(shard, dataclasses.replace(index, digest="another"))
    ShardMeasurer(MeasureConfig(phash=False)).measure(shard, index)
    assert not serves() and not serves(tokenizer=None, captions=("txt",))
    assert serves(tokenizer=None, captions=("txt",), phash=False)
    assert serves(tokenizer=None, captions=("txt",), phash=True, decode=False)
    # With a parquet beside the shard nobody looked for numbers in each json; without it they are wanted.
    pq.write_table(pa.table({"key": ["a"]}), shard.with_suffix(".parquet"))
    ShardMeasurer(full).measure(shard, index)
    assert serves()
    shard.with_suffix(".parquet").unlink()
    assert not serves()


def test_a_file_that_cannot_be_used_is_not_there(shard):
    index, measurer = build_index(shard), ShardMeasurer(MeasureConfig())
    assert not measurer.is_measured(shard, index)
    path = measures_path(shard)
    path.parent.mkdir()
    for data in (b"", b"PAR1", b"not parquet"):
        path.write_bytes(data)
        assert not measurer.is_measured(shard, index)
    pq.write_table(pa.table({"key": ["a"]}), path)
    assert not measurer.is_measured(shard, index)
    measurer.measure(shard, index)
    assert measurer.is_measured(shard, index)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_members_that_are_not_what_was_indexed_are_named_with_their_place(shard):
    index = build_index(shard)
    assert verify_shard(shard, index) == []
    places = {(row, m[0]): m for row in range(index.rows) for m in index.members(row)}
    stat = shard.stat()
    with open(shard, "r+b") as file:
        for place in ((0, "jpg"), (1, "txt"), (5, "webp")):
            file.seek(places[place][1])
            first = file.read(1)
            file.seek(places[place][1])
            file.write(bytes([first[0] ^ 1]))
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    expected = [
        f"{shard}: byte {places[row, name][1]}: sample {row:06d}: its {name} has other bytes than were indexed"
        for row, name in ((0, "jpg"), (1, "txt"), (5, "webp"))
    ]
    assert verify_shard(shard, index) == expected
    assert ShardMeasurer(MeasureConfig()).measure(shard, index) == expected
    unusable = ShardColumns(shard).unusable().tolist()
    assert [i for i, reason in enumerate(unusable) if reason == "other bytes than were indexed"] == [0, 1, 5]


def test_members_that_nobody_would_read_are_not_read(shard, monkeypatch):
    index = build_index(shard)
    monkeypatch.setattr("aimv2.ingest.shard_measures.MOST_BYTES", 1500)
    assert verify_shard(shard, index) == []  # in several reads
    ShardMeasurer(MeasureConfig()).measure(shard, index)
    large = [any(size > 1500 for _, _, size, _ in index.members(row)) for row in range(index.rows)]
    assert [reason == "over 32 MiB" for reason in ShardColumns(shard).unusable()] == large and any(large)


def test_a_disk_that_gives_no_bytes_is_named_with_the_place(shard, monkeypatch):
    index = build_index(shard)
    place = index.members(4)[0][1]
    pread = os.pread

    def fails(fd, size, offset):
        if offset == place:
            raise OSError(5, "Input/output error")
        return pread(fd, size, offset)

    monkeypatch.setattr(os, "pread", fails)
    for read in (verify_shard, ShardMeasurer(MeasureConfig()).measure):
        with pytest.raises(ShardError, match=rf"00000\.tar: byte {place}: .*Input/output error"):
            read(shard, index)
    assert not measures_path(shard).exists()


def test_numbers_of_columns_parquet_come_before_those_of_img2dataset_and_of_json(shard):
    index = build_index(shard)
    keys = [index.key(row) for row in range(index.rows)]
    assert measured(shard)["score"][0] == 0.5
    # img2dataset: other rows too, in another order, some without a value; its width is not ours.
    table = {"key": [*reversed(keys), "none"], "score": [5.0, 4.0, None, 2.0, 1.0, 0.0, 9.0], "width": [7] * 7}
    pq.write_table(pa.table(table), shard.with_suffix(".parquet"))
    columns = ShardColumns(shard)
    columns.check()
    np.testing.assert_array_equal(columns["score"], [0, 1, 2, np.nan, 4, 5])
    assert columns["width"][0] == 64
    hashes = [f"{i:016x}" if i else None for i in range(6)]
    hashes[5] = "no hash"
    joined = pa.table({"key": keys, "score": list(range(10, 16)), "id": [2**53 + 1] * 6, "image_phash": hashes})
    pq.write_table(joined, measures_path(shard).with_name("00000.columns.parquet"))
    columns = ShardColumns(shard)
    columns.check()
    assert columns["score"].tolist() == [10, 11, 12, 13, 14, 15] and "id" in columns.names
    values, valid = columns.hashes("phash")
    assert valid.tolist() == [False, True, True, True, True, False] and values[1:5].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("keys", [["000000"] * 6, ["000000"], None])
def test_numbers_of_other_samples_are_an_error(shard, keys):
    measured(shard)
    path = measures_path(shard).with_name("00000.columns.parquet")
    pq.write_table(pa.table({"key": keys, "x": [1] * len(keys)} if keys else {"x": [1] * 6}), path)
    with pytest.raises(ShardError, match="make it again" if keys else "has no column key"):
        ShardColumns(shard).check()


def test_measures_that_are_missing_are_named(shard):
    with pytest.raises(ShardError, match="its measures cannot be read"):
        ShardColumns(shard)


def test_names_of_json_numbers_are_bounded(tmp_path):
    samples = [
        {"jpg": picture(0), "json": json.dumps({"often": i} | {f"n{i}_{j}": j for j in range(20)}).encode()}
        for i in range(10)
    ]
    names = measured(write_samples(tmp_path / "a.tar", samples), captions=()).names
    assert "often" in names and 64 <= sum(name.startswith("n") or name == "often" for name in names) < 70
