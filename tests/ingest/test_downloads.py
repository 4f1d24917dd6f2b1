import json
import tarfile

import pytest
from made_coyo import make_coyo

from aimv2.data.shard_writer import RawSample, write_tar
from aimv2.ingest.downloads import is_download, read_download
from aimv2.ingest.measures import MeasureConfig
from aimv2.ingest.prepare import PrepareConfig, prepare


def test_a_made_download(tmp_path):
    made = make_coyo(tmp_path, samples=200)
    assert is_download(made.images) and not is_download(made.metadata)
    download = read_download(made.images)
    failures = [failure for shard in made.failed.values() for failure in shard.values()]
    successes = sum(map(len, made.shards.values()))
    assert download.finished == len(made.shards)
    assert download.unfinished == [f"{name}.tar" for name in made.unfinished] and download.gaps == made.missing
    assert (download.count, download.successes) == (successes + len(failures), successes)
    for status in ("failed_to_download", "failed_to_resize"):
        assert getattr(download, status) == [failure[0] for failure in failures].count(status)
    messages = [message for _, message in failures]
    assert download.failures == {message: messages.count(message) for message in set(messages)}
    assert download.gone == []


def test_gaps_and_tars_that_are_gone(tmp_path):
    stats = {"count": 1, "successes": 1, "failed_to_download": 0, "failed_to_resize": 0, "status_dict": {"success": 1}}
    for number in (0, 1, 3, 7):
        (tmp_path / f"{number:05d}_stats.json").write_text(json.dumps(stats))
    for number in (0, 3, 8):
        (tmp_path / f"{number:05d}.tar").write_bytes(b"")
    download = read_download(tmp_path)
    assert download.gaps == ["00002", "00004-00006"]
    assert download.gone == ["00001.tar", "00007.tar"] and download.unfinished == ["00008.tar"]
    assert (download.finished, download.count) == (2, 4)


STATS = {"count": 2, "successes": 1, "failed_to_download": 1, "failed_to_resize": 0, "status_dict": {"success": 1}}


@pytest.fixture
def two(tmp_path):
    """Two finished shards."""
    for name in ("00000", "00001"):
        write_tar(tmp_path / f"{name}.tar", [RawSample("0", {"txt": b"a"})])
        (tmp_path / f"{name}_stats.json").write_text(json.dumps(STATS))
    return tmp_path


@pytest.mark.parametrize("text", ["", '{"count": 2, "succ', "[" * 100_000, "\0\0"])
def test_stats_that_a_killed_download_left_make_a_shard_unfinished(two, text):
    (two / "00000_stats.json").write_text(text)
    download = read_download(two)
    assert (download.finished, download.unfinished, download.count) == (1, ["00000.tar"], 2)
    assert download.unusable == [f"{two}/00000_stats.json: empty or cut short: the shard is taken as unfinished"]


@pytest.mark.parametrize("change", [{"count": "many"}, {"successes": None}, {"status_dict": [1]}, {"count": 1e999}])
def test_stats_of_something_else_leave_a_shard_out(two, change):
    (two / "00000_stats.json").write_text(json.dumps(STATS | change))
    download = read_download(two)
    assert (download.finished, download.unfinished, download.count) == (1, ["00000.tar"], 2)
    (line,) = download.unusable
    assert line.startswith(f"{two}/00000_stats.json: not the stats of an img2dataset shard") and "\n" not in line


def test_finished_shards_without_a_sample_are_known(two):
    none = json.dumps(STATS | {"successes": 0})
    for name in ("00002", "00003", "00004"):
        (two / f"{name}_stats.json").write_text(none)
        with tarfile.open(two / f"{name}.tar", "w"):
            pass
    (two / "00003.tar").write_bytes(b"")  # damage
    write_tar(two / "00004.tar", [RawSample("0", {"txt": b"a"})])  # it contradicts its stats
    download = read_download(two)
    assert download.empty == ["00002.tar"] and download.unfinished == [] and download.finished == 5


def test_a_preparation_leaves_out_what_is_empty_or_unfinished(two):
    (two / "00002_stats.json").write_text(json.dumps(STATS | {"successes": 0}))
    with tarfile.open(two / "00002.tar", "w"):
        pass
    (two / "00001_stats.json").write_text("")
    report = prepare(two, PrepareConfig(measure=MeasureConfig(decode=False, phash=False)))
    assert not any("00001" in line or "00002" in line for line in report.damage)
