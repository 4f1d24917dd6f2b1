"""The join of COYO's metadata, on a small made COYO, against a join by hand; and the made one against img2dataset."""

import functools
import http.server
import json
import shutil
import subprocess
import sys
import tarfile
import threading
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_coyo import COLUMNS, SAVED, make_coyo
from PIL import Image

from aimv2.data.tar import ShardError
from aimv2.ingest import coyo
from aimv2.ingest.coyo import join_coyo, report_path
from aimv2.ingest.coyo_columns import columns_path
from aimv2.ingest.shard_measures import numbers_path
from aimv2.ingest.sidecars import read_sidecar


@pytest.fixture(scope="module")
def made_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    return folder, make_coyo(folder)


@pytest.fixture
def made(made_once, tmp_path):
    """A copy that may be changed."""
    folder, made = made_once
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    return replace(deepcopy(made), metadata=tmp_path / "coyo-metadata", images=tmp_path / "coyo")


def read(made, name):
    return pq.read_table(columns_path(made.images / f"{name}.tar"))


def keys(made, name):
    """The keys of a tar, by tarfile."""
    with tarfile.open(made.images / f"{name}.tar") as tar:
        return [member.name.partition(".")[0] for member in tar if member.name.endswith(".json")]


def check(made):
    """Every row of every finished shard is that of the metadata, by hand."""
    for name, ids in made.shards.items():
        table = read(made, name)
        assert table.schema.remove_metadata() == pa.schema([("key", pa.string()), *COLUMNS])
        expected = [{"key": key, **made.rows[i]} for key, i in zip(keys(made, name), ids, strict=True)]
        assert table.to_pylist() == expected


def snapshot(made):
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in made.images.iterdir() if p.is_file()}


def test_every_sample_gets_its_row(made):
    before = snapshot(made)
    joined = join_coyo(made.metadata, made.images)
    check(made)
    assert snapshot(made) == before  # nothing beside `prepared` is touched
    samples = sum(map(len, made.shards.values()))
    assert (joined.shards, joined.samples, joined.matched, joined.unmatched) == (7, samples, samples, {})
    assert joined.download.unfinished == ["00007.tar"] and joined.download.gaps == ["00002"]
    assert not columns_path(made.images / "00007.tar").exists()
    downloaded = {i for ids in made.shards.values() for i in ids}
    assert joined.repeated == sum(i in downloaded for pair in made.same_url for i in pair) > 0
    assert json.loads(report_path(made.images).read_text())["matched"] == samples
    assert all(columns_path(made.images / f"{n}.tar") == numbers_path(made.images / f"{n}.tar") for n in made.shards)
    assert "unfinished, left out: 00007.tar" in joined.summary() and "missing numbers: 00002" in joined.summary()


def test_by_id_where_it_was_saved(tmp_path):
    made = make_coyo(tmp_path, samples=120, saved=("id", *SAVED))
    joined = join_coyo(made.metadata, made.images)
    assert joined.matched == joined.samples and joined.repeated == 0
    check(made)


def test_the_same_with_several_processes_and_small_groups(made, monkeypatch):
    monkeypatch.setattr(coyo, "MOST_SAMPLES", 50)
    done = []
    joined = join_coyo(made.metadata, made.images, workers=2, progress=lambda *step: done.append(step))
    check(made)
    for doing, total in (("look", 7), ("find", 128), ("join", joined.samples)):
        assert sum(n for what, n, of in done if what == doing and of == total) == total


def test_samples_that_no_probe_points_to_are_found_in_all_parts(made, monkeypatch):
    """Metadata that were shuffled before the download: the rows of a shard are anywhere."""
    monkeypatch.setattr(coyo, "PROBES", 1)
    rows = list(made.rows.values())
    order = np.random.default_rng(0).permutation(len(rows))
    for path in made.metadata.iterdir():
        path.unlink()
    for part in range(4):
        table = pa.Table.from_pylist([rows[i] for i in order[part::4]], COLUMNS)
        pq.write_table(table, made.metadata / f"{part}.parquet")
    joined = join_coyo(made.metadata, made.images)
    assert joined.matched == joined.samples
    for name, found in made.shards.items():
        for row, i in zip(read(made, name).to_pylist(), found, strict=True):
            assert row["url"] == made.rows[i]["url"]
            if not any(i in pair for pair in made.same_url):  # they may be in two parts now, of which one is searched
                assert row["id"] == i


def test_a_url_that_came_twice_is_its_first_row_where_captions_were_not_downloaded(made):
    for name in made.shards:
        path = made.images / f"{name}.parquet"
        pq.write_table(pq.read_table(path).drop_columns("caption"), path)
    join_coyo(made.metadata, made.images)
    first = {later: earlier for earlier, later in made.same_url}
    assert first.keys() & {i for ids in made.shards.values() for i in ids}
    made.shards = {name: [first.get(i, i) for i in ids] for name, ids in made.shards.items()}
    check(made)


def test_samples_that_are_nowhere_are_null(made):
    part = sorted(made.metadata.iterdir())[1]
    part.unlink()
    joined = join_coyo(made.metadata, made.images)
    gone = [i for i in made.shards["00003"] if i >> 33 == 1]
    assert joined.unmatched == {"not in the metadata": len(gone)} and len(gone) == 23
    table = read(made, "00003")
    assert table["key"].to_pylist() == keys(made, "00003")
    assert all(table[name].null_count == 23 for name in COLUMNS.names)
    again = join_coyo(made.metadata, made.images)  # all parts were searched: not again
    assert again.unmatched == joined.unmatched


def test_an_interrupted_join_goes_on(made):
    class Killed(Exception):
        pass

    def kill(doing, done, total):
        if doing == "join":
            raise Killed

    with pytest.raises(Killed):
        join_coyo(made.metadata, made.images, progress=kill)
    written = {p: p.stat().st_mtime_ns for p in (made.images / "prepared").glob("*.columns.parquet")}
    assert 0 < len(written) < 7
    join_coyo(made.metadata, made.images)
    check(made)
    assert all(path.stat().st_mtime_ns == time for path, time in written.items())


def test_shards_that_come_later_are_added(made):
    later = [made.images / f"00008{suffix}" for suffix in (".tar", ".parquet", "_stats.json")]
    for path in later:
        path.rename(path.with_name(f"{path.name}.later"))
    assert join_coyo(made.metadata, made.images).shards == 6
    times = {p: p.stat().st_mtime_ns for p in (made.images / "prepared").glob("*.columns.parquet")}
    for path in later:
        path.with_name(f"{path.name}.later").rename(path)
    assert join_coyo(made.metadata, made.images).shards == 7
    check(made)
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())


def test_a_shard_downloaded_anew_is_joined_anew(made):
    join_coyo(made.metadata, made.images)
    for suffix in (".tar", ".parquet", "_stats.json"):
        shutil.copy(made.images / f"00001{suffix}", made.images / f"00000{suffix}")
    join_coyo(made.metadata, made.images)
    made.shards["00000"] = made.shards["00001"]
    check(made)


def test_a_damaged_or_lost_columns_file_is_written_again(made):
    join_coyo(made.metadata, made.images)
    columns_path(made.images / "00000.tar").write_bytes(b"PAR1")
    columns_path(made.images / "00001.tar").unlink()
    shutil.copy(made.images / "00003.parquet", columns_path(made.images / "00003.tar"))
    join_coyo(made.metadata, made.images)
    check(made)


def test_a_shard_without_a_single_download(made):
    (made.images / "00010.tar").write_bytes(bytes(10240))
    table = pq.read_table(made.images / "00000.parquet")
    pq.write_table(table.filter(pa.compute.field("status") != "success"), made.images / "00010.parquet")
    stats = json.loads((made.images / "00000_stats.json").read_text())
    (made.images / "00010_stats.json").write_text(json.dumps(stats | {"successes": 0}))
    for _ in range(2):
        joined = join_coyo(made.metadata, made.images)
        assert joined.matched == joined.samples and joined.shards == 8
    assert read(made, "00010").num_rows == 0
    check(made)


@pytest.mark.parametrize("damage", [None, b"", b"PAR1", b"x" * 200])
def test_without_a_usable_parquet_file_the_json_members_are_read(made, damage):
    path = made.images / "00001.parquet"
    path.unlink()
    if damage is not None:
        path.write_bytes(damage)
    joined = join_coyo(made.metadata, made.images)
    check(made)
    assert joined.from_json == ["00001"]


def test_json_members_have_the_id_too(tmp_path):
    made = make_coyo(tmp_path, samples=100, saved=("id",))
    before = read_sidecar(made.images / "00000.tar")
    (made.images / "00000.parquet").unlink()
    after = read_sidecar(made.images / "00000.tar")
    assert (after.keys, after.names, after.column) == (before.keys, before.names, "id")


def test_a_shard_that_contradicts_itself_is_named_and_the_others_are_joined(made):
    stats = made.images / "00003_stats.json"
    stats.write_text(stats.read_text().replace('"successes": 23', '"successes": 24'))
    joined = join_coyo(made.metadata, made.images)
    assert joined.unusable == [f"{made.images}/00003.tar: 23 samples in 00003.parquet, 24 in its stats"]
    assert joined.shards == 6
    del made.shards["00003"]
    check(made)


def test_a_damaged_tar_without_a_parquet_file(made):
    (made.images / "00003.parquet").unlink()
    data = (made.images / "00003.tar").read_bytes()
    (made.images / "00003.tar").write_bytes(data[: len(data) // 2])
    joined = join_coyo(made.metadata, made.images)
    assert len(joined.unusable) == 1 and "00003.tar: byte" in joined.unusable[0]
    with pytest.raises(ShardError):
        read_sidecar(made.images / "00003.tar")


def test_other_metadata_are_refused(made):
    join_coyo(made.metadata, made.images)
    sorted(made.metadata.iterdir())[-1].unlink()
    with pytest.raises(ValueError, match=r"joined to other metadata before \(128 parts, now 127\)"):
        join_coyo(made.metadata, made.images)


def test_errors(made, tmp_path):
    with pytest.raises(ValueError, match=r"coyo: no finished shard|no \.parquet file"):
        join_coyo(tmp_path / "nowhere", made.images)
    with pytest.raises(ValueError, match="coyo-metadata: no finished shard"):
        join_coyo(made.metadata, made.metadata)
    with pytest.raises(ValueError, match="workers is 0"):
        join_coyo(made.metadata, made.images, workers=0)


def test_metadata_in_a_folder_of_the_metadata_are_pointed_to(made):
    (made.metadata.parent / "hub").mkdir()
    made.metadata.rename(made.metadata.parent / "hub" / "data")
    with pytest.raises(ValueError, match=r"hub: no \.parquet file; there are some in data/"):
        join_coyo(made.metadata.parent / "hub", made.images)


def test_stats_that_cannot_be_used_cost_their_shard_only(made):
    (made.images / "00000_stats.json").write_text("")
    (made.images / "00001_stats.json").write_text("{}")
    joined = join_coyo(made.metadata, made.images)
    assert joined.shards == 5 and not joined.unusable
    assert joined.download.unfinished == ["00000.tar", "00001.tar", "00007.tar"]
    said = joined.summary().splitlines()
    assert f"{made.images}/00000_stats.json: empty or cut short: the shard is taken as unfinished" in said
    assert any(line.startswith(f"{made.images}/00001_stats.json: not the stats of") for line in said)
    del made.shards["00000"], made.shards["00001"]
    check(made)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


DOWNLOAD = """
import json, sys
if __name__ == "__main__":
    from img2dataset import download
    download(**json.loads(sys.argv[1]))
"""


@pytest.mark.slow
def test_the_made_one_is_what_img2dataset_writes(tmp_path):
    """Field by field, on a download from this machine; and what it wrote is joined."""
    pytest.importorskip("img2dataset")
    site = tmp_path / "site"
    site.mkdir()
    for n in range(20):
        exif = Image.Exif()
        if n == 3:
            exif[0x0112] = 6
        Image.new("CMYK" if n == 4 else "RGB", (100, 80)).save(site / f"{n}.jpg", exif=exif)
    (site / "5.jpg").unlink()
    (site / "6.jpg").write_bytes(b"not an image")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    made = make_coyo(tmp_path / "made", samples=100)
    rows = list(made.rows.values())[:20]
    for n, row in enumerate(rows):
        row["url"] = f"http://127.0.0.1:{server.server_port}/{n}.jpg"
    real = replace(made, metadata=tmp_path / "metadata", images=tmp_path / "real")
    real.metadata.mkdir()
    pq.write_table(pa.Table.from_pylist(rows, COLUMNS), real.metadata / "part.parquet")
    options = {
        "url_list": str(real.metadata),
        "input_format": "parquet",
        "url_col": "url",
        "caption_col": "text",
        "output_format": "webdataset",
        "output_folder": str(real.images),
        "processes_count": 1,
        "thread_count": 4,
        "number_sample_per_shard": 20,
        "resize_mode": "no",
        "skip_reencode": True,
        "save_additional_columns": list(SAVED),
    }
    (tmp_path / "download.py").write_text(DOWNLOAD)
    command = [sys.executable, str(tmp_path / "download.py"), json.dumps(options)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    server.shutdown()
    assert sorted(p.name for p in real.images.iterdir()) == ["00000.parquet", "00000.tar", "00000_stats.json"], done

    theirs, ours = (pq.read_table(images / "00000.parquet") for images in (real.images, made.images))
    assert theirs.schema.remove_metadata() == ours.schema.remove_metadata()
    assert theirs["status"].to_pylist().count("success") == 18
    failed = {r["status"]: r["error_message"] for r in theirs.to_pylist() if r["status"] != "success"}
    assert failed == {
        "failed_to_download": "HTTP Error 404: File not found",
        "failed_to_resize": "Image decoding error",
    }
    assert [describe(real), describe(made)] == [describe(made)] * 2
    stats = [json.loads((m.images / "00000_stats.json").read_text()) for m in (real, made)]
    assert list(stats[0]) == list(stats[1])
    assert stats[0]["status_dict"] == {"success": 18, **dict.fromkeys(failed.values(), 1)}
    turned = next(r for r in theirs.to_pylist() if r["url"].endswith("/3.jpg"))
    assert turned["exif"] == '{"Image Orientation": "Rotated 90 CW"}'

    joined = join_coyo(real.metadata, real.images)
    assert (joined.matched, joined.samples) == (18, 18)
    by_url = {row["url"]: row for row in rows}
    for row, sidecar in zip(read(real, "00000").to_pylist(), filter(succeeded, theirs.to_pylist()), strict=True):
        assert row == {"key": sidecar["key"], **by_url[sidecar["url"]]}


def succeeded(record):
    return record["status"] == "success"


def describe(made) -> list:
    """What can be seen of the first sample of the first tar, but for its contents and its place in the order."""
    with tarfile.open(made.images / "00000.tar") as tar:
        members = [tar.next() for _ in range(3)]
        record = json.loads(tar.extractfile(members[1]).read())
    assert record["key"] == members[0].name.partition(".")[0]
    return [
        [(m.name.partition(".")[2], m.mode, m.uname, m.gname, m.type, sorted(m.pax_headers)) for m in members],
        [(name, type(value)) for name, value in record.items()],
    ]
