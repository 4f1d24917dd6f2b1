import hashlib
import io
import json
import tarfile
from collections import Counter

import pyarrow.parquet as pq
import pytest
from made_coyo import COLUMNS, PARTS, make_coyo, phash
from PIL import Image, JpegImagePlugin

from aimv2.data.shapes import render, scene
from aimv2.data.shard_scan import build_index
from aimv2.data.tar import ShardError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_coyo(tmp_path_factory.mktemp("made"))


def members(made):
    """(shard, name, bytes) of every member of the finished shards."""
    for name in made.shards:
        with tarfile.open(made.images / f"{name}.tar") as tar:
            for member in tar:
                yield name, member.name, tar.extractfile(member).read()


def digest(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in files)).hexdigest()


def test_the_same_arguments_give_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        make_coyo(tmp_path / name, samples=100)
    make_coyo(tmp_path / "three", samples=100, seed=1)
    assert digest(tmp_path / "one") == digest(tmp_path / "two") != digest(tmp_path / "three")


def test_metadata_in_128_parts(made):
    parts = sorted(made.metadata.iterdir())
    assert len(parts) == PARTS and parts[127].name.startswith("part-00127-")
    tables = [pq.read_table(part) for part in parts]
    assert {str(table.schema) for table in tables} == {str(COLUMNS)}
    rows = [row for table in tables for row in table.to_pylist()]
    assert {row["id"]: row for row in rows} == made.rows and len(rows) == len(made.rows)
    assert sum(table.num_rows < 5 for table in tables) > 100
    texts = [row["text"] for row in rows]
    assert max(len(text.split()) for text in texts) == 1500
    assert any("&amp;#39;" in text for text in texts) and not all(map(str.isascii, texts))


def test_samples_are_in_the_order_of_the_parquet_file(made):
    for name, ids in made.shards.items():
        records = pq.read_table(made.images / f"{name}.parquet").to_pylist()
        keys = [r["key"] for r in records if r["status"] == "success"]
        names = [member.partition(".")[0] for shard, member, _ in members(made) if shard == name]
        assert names == [key for key in keys for _ in range(3)] and len(ids) == len(keys)
        assert keys != sorted(keys) or len(keys) < 10
        stats = json.loads((made.images / f"{name}_stats.json").read_text())
        assert stats["successes"] == len(keys) and sum(stats["status_dict"].values()) == stats["count"] == len(records)


def test_all_kinds_of_images_are_there(made):
    kinds = Counter()
    for _, name, data in members(made):
        if name.endswith(("json", "txt")):
            continue
        image = Image.open(io.BytesIO(data))
        kinds[name.rpartition(".")[2], image.format, image.mode] += 1
        kinds["progressive"] += isinstance(image, JpegImagePlugin.JpegImageFile) and "progressive" in image.info
        kinds["turned"] += image.getexif().get(0x0112) == 6
    assert (
        not {
            *(("jpg", "JPEG", mode) for mode in ("RGB", "CMYK", "L")),
            *(("jpg", "PNG", "RGB"), ("jpg", "WEBP", "RGB"), ("png", "PNG", "RGB"), ("webp", "WEBP", "RGB")),
            *("progressive", "turned"),
        }
        - (+kinds).keys()
    )


def test_the_unfinished_shard_is_cut_off(made):
    assert (made.unfinished, made.missing) == (["00007"], ["00002"])
    with pytest.raises(ShardError, match=r"00007\.tar: byte"):
        build_index(made.images / "00007.tar")
    assert not (made.images / "00007_stats.json").exists() and not (made.images / "00002.tar").exists()


def test_same_images_and_same_urls(made):
    for pairs, column in ((made.same_image, "image_phash"), (made.same_url, "url")):
        assert len(pairs) >= 5
        assert all(made.rows[a][column] == made.rows[b][column] for a, b in pairs)
        assert len({row[column] for row in made.rows.values()}) == len(made.rows) - len(pairs)


def test_phash_is_that_of_the_package():
    imagehash = pytest.importorskip("imagehash")
    for index in range(50):
        image = render(scene(3, "test", index, "full"))
        assert phash(image) == str(imagehash.phash(image))


def test_too_few_samples(tmp_path):
    with pytest.raises(ValueError, match="samples is 99"):
        make_coyo(tmp_path, samples=99)
