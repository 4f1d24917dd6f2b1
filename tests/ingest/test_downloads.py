import json

import pytest
from made_coyo import make_coyo

from aimv2.data.tar import ShardError
from aimv2.ingest.downloads import is_download, read_download


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


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"count": "many"}'])
def test_damaged_stats_are_named(tmp_path, text):
    (tmp_path / "00000_stats.json").write_text(text)
    with pytest.raises(ShardError, match=r"00000_stats\.json: not the stats"):
        read_download(tmp_path)
