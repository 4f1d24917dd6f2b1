import itertools
import json
import multiprocessing
import os
import signal
import tarfile
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest

from aimv2.data import shard_writer
from aimv2.data.shard_index import index_path
from aimv2.data.shard_writer import Dropped, RawSample, ShardJob, is_complete, report_path, write_shards, write_tar
from aimv2.data.shards import Shards


@dataclass
class Numbers:
    """`count` samples in shards of ten; those that 7 divides are dropped, and every one from 20 to 29."""

    count: int = 45
    calls: Path | None = None  # gets a line for every shard that is read
    stop: int = 10**9  # the first shard that cannot be read
    notes: Counter = field(default_factory=Counter)
    opaque: dict = field(default_factory=dict)

    def __len__(self):
        return self.count

    @property
    def recipe(self):
        return {"source": "numbers", "count": self.count}

    def jobs(self):
        for first in range(0, self.count, 10):
            numbers = range(first, min(first + 10, self.count))
            read = partial(read_numbers, numbers, self.calls, self.stop)
            yield ShardJob(f"{first // 10:03d}", len(numbers), read)


def read_numbers(numbers, calls, stop):
    if calls is not None:
        with open(calls, "a") as file:
            file.write(f"{numbers.start} ")
    for n in numbers:
        if n >= stop:
            raise ValueError(f"{n} is too many")
        if n % 7 == 0 or 20 <= n < 30:
            yield Dropped(f"number {n}", "divided by seven" if n % 7 == 0 else "in the twenties")
        else:
            notes = ("odd",) if n % 2 else ()
            yield RawSample(f"{n:05d}", {"jpg": b"picture" * n, "txt": f"number {n}".encode(), "json": b"{}"}, notes)


KEPT = [n for n in range(45) if n % 7 and not 20 <= n < 30]


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the indices, which know when their tar was written."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.suffix != ".idx"}


def test_webdatasets_own_reader_and_ours_read_what_was_given(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    written = write_shards(tmp_path, Numbers())
    paths = sorted(tmp_path.glob("*.tar"))
    assert [p.name for p in paths] == ["000.tar", "001.tar", "003.tar", "004.tar"]  # no tar without a sample
    given = [(f"{n:05d}", b"picture" * n, f"number {n}".encode(), b"{}") for n in KEPT]
    theirs = webdataset.WebDataset([str(p) for p in paths], shardshuffle=False)
    assert [(s["__key__"], s["jpg"], s["txt"], s["json"]) for s in theirs] == given
    assert [(s.key, s.image, s.text, s.json) for s in Shards(paths)] == given  # the indices are there
    assert written.kept == len(KEPT) == 45 - written.dropped.total()


def test_members_have_neither_time_nor_owner(tmp_path):
    write_tar(tmp_path / "a.tar", [RawSample("0", {"jpg": b"x"})])
    with tarfile.open(tmp_path / "a.tar") as tar:
        (member,) = tar.getmembers()
    assert (member.mtime, member.uid, member.gid, member.uname, member.gname, member.mode) == (0, 0, 0, "", "", 0o644)


def test_what_is_dropped_is_counted_by_reason_with_examples(tmp_path):
    written = write_shards(tmp_path, Numbers(notes=Counter({"zero": 1})))
    assert written.dropped == {"divided by seven": 7, "in the twenties": 8}
    assert written.examples == {
        "divided by seven": [f"number {n}" for n in (0, 7, 14, 21, 28)],
        "in the twenties": [f"number {n}" for n in (20, 22, 23, 24, 25)],
    }
    assert written.notes == {"odd": sum(n % 2 for n in KEPT), "zero": 1}
    report = json.loads(report_path(tmp_path).read_text())
    assert report["recipe"] == Numbers().recipe
    assert {name: report[name] for name in ("kept", "dropped", "examples", "notes")} == {
        "kept": written.kept,
        "dropped": dict(written.dropped),
        "examples": written.examples,
        "notes": dict(written.notes),
    }
    assert written.summary().splitlines()[:2] == [
        "kept 30 of 45 samples",
        "  dropped 8: in the twenties (such as number 20)",
    ]


def test_neither_bytes_nor_report_depend_on_the_workers(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    assert write_shards(one, Numbers()) == write_shards(two, Numbers(), workers=2)
    assert contents(one) == contents(two)


def test_an_interrupted_run_goes_on_and_reports_all(tmp_path):
    whole, folder, calls = tmp_path / "whole", tmp_path / "folder", tmp_path / "calls"
    write_shards(whole, Numbers())
    done = []
    with pytest.raises(ValueError, match="30 is too many"):
        write_shards(folder, Numbers(calls=calls, stop=30), progress=done.append)
    assert done == [10, 10, 10] and not is_complete(folder, Numbers().recipe)
    assert sorted(p.name for p in folder.iterdir()) == [
        *("000.tar", "000.tar.idx", "001.tar", "001.tar.idx"),
        *("recipe.unfinished.json", "written"),
    ]
    write_shards(folder, Numbers(calls=calls), progress=done.append)
    assert calls.read_text() == "0 10 20 30 30 40 "  # the third shard, empty, is not tried again
    assert done == [10, 10, 10, 10, 10, 10, 10, 5]
    assert contents(folder) == contents(whole) and is_complete(folder, Numbers().recipe)


@pytest.mark.parametrize("at", ["addfile", "build_index", "write_json", "replace"])
def test_a_run_killed_anywhere_loses_nothing(tmp_path, at):
    """kill -9 at the second to seventh time that something is about to be written, indexed, recorded or renamed."""
    whole, folder = tmp_path / "whole", tmp_path / "folder"
    write_shards(whole, Numbers())
    for time in range(2, 8):
        child = multiprocessing.get_context("fork").Process(target=write_and_die, args=(folder, at, time))
        child.start()
        child.join(60)
        assert child.exitcode in (0, -signal.SIGKILL)
    write_shards(folder, Numbers())
    assert contents(folder) == contents(whole)
    for path in folder.glob("*.tar"):
        assert list(Shards([path]))


def write_and_die(folder, at, time):
    calls = itertools.count(1)

    def die(original):
        def call(*args, **kwargs):
            if next(calls) == time:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call

    module = {"addfile": tarfile.TarFile, "replace": os}.get(at, shard_writer)
    setattr(module, at, die(getattr(module, at)))
    write_shards(folder, Numbers())


@pytest.mark.parametrize("lost", ["000.tar", "written/000.json"])
def test_a_shard_without_its_record_or_its_tar_is_written_again(tmp_path, lost):
    write_shards(tmp_path, Numbers())
    whole = contents(tmp_path)
    (tmp_path / lost).unlink()
    (tmp_path / ".000.tar.999999.tmp").write_bytes(b"left by a killed run")
    assert write_shards(tmp_path, Numbers()).kept == 30
    assert contents(tmp_path) == whole
    assert list(Shards([tmp_path / "000.tar"]))
    assert index_path(tmp_path / "000.tar").exists()


def test_another_recipe_is_refused(tmp_path):
    write_shards(tmp_path, Numbers())
    with pytest.raises(ValueError, match=r"recipe\.json says count = 45, the recipe says 46"):
        write_shards(tmp_path, Numbers(count=46))


def test_what_says_nothing_to_a_reader_is_put_in_words(tmp_path):
    write_shards(tmp_path, Numbers())
    with pytest.raises(
        ValueError, match=rf"^the numbers are others than when {tmp_path} was written: write to another"
    ):
        write_shards(tmp_path, Numbers(count=46, opaque={"count": "the numbers are others"}))


def test_a_list_goes_when_a_shard_is_written_and_only_then(tmp_path):
    write_shards(tmp_path, Numbers())
    (tmp_path / "shards.list").touch()
    write_shards(tmp_path, Numbers())
    assert (tmp_path / "shards.list").exists()
    (tmp_path / "001.tar").unlink()
    write_shards(tmp_path, Numbers())
    assert not (tmp_path / "shards.list").exists()


def test_shards_of_someone_else_are_refused(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"precious")
    with pytest.raises(ValueError, match=r"a\.tar but no recipe\.json"):
        write_shards(tmp_path, Numbers())
    assert contents(tmp_path) == {"a.tar": b"precious"}


def test_nothing_to_keep_is_an_error_that_says_why(tmp_path):
    with pytest.raises(ValueError, match=r"not one sample can be used: 1 divided by seven$"):
        write_shards(tmp_path, Numbers(count=1))
    assert not is_complete(tmp_path, Numbers(count=1).recipe)


def test_no_workers(tmp_path):
    with pytest.raises(ValueError, match="workers is 0"):
        write_shards(tmp_path, Numbers(), workers=0)
