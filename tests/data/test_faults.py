"""Damage in tars before, after and while they are read: all of it is reported. `pytest -s` prints the figures."""

import errno
import functools
import io
import multiprocessing
import os
import re
import signal
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hostile_images import made
from test_shards import write_tar

from aimv2.data.batch import Batch
from aimv2.data.loader import DataConfig, train_loader
from aimv2.data.mixture import Source
from aimv2.data.shards import DamagedMember, ShardError, Shards, ensure_indices
from aimv2.data.transforms import TransformConfig

TOKENIZER = Path(__file__).parents[2] / "tokenizers" / "shapes"

# --- damage: 5 kinds x 20 places ------------------------------------------------------------------------------------


@functools.cache
def whole() -> tuple[bytes, list[tuple[int, int, int]]]:
    """A GNU tar of 60 members, a third with long names; (header, contents, end) of each."""
    rng = np.random.default_rng(0)
    names = [f"{'long' * 30 if i % 3 == 0 else 'k'}{i:03d}.{e}" for i in range(20) for e in ("jpg", "txt", "json")]
    buffer = io.BytesIO()

    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = int(rng.integers(1, 3000))
            tar.addfile(member, io.BytesIO(rng.bytes(member.size)))
    buffer.seek(0)
    with tarfile.open(fileobj=buffer) as tar:
        places = [(m.offset, m.offset_data, m.offset_data + -(-m.size // 512) * 512) for m in tar]
    return buffer.getvalue(), places


def flip_header(data: bytearray, place: tuple[int, int, int], rng) -> bytearray:
    at = place[1] - 512 + int(rng.integers(512))
    data[at] ^= 1 << int(rng.integers(8))
    return data


def cut_member(data: bytearray, place: tuple[int, int, int], rng) -> bytearray:
    return data[: int(rng.integers(place[0] + 1, place[2]))]


def cut_between(data: bytearray, place: tuple[int, int, int], rng) -> bytearray:
    return data[: place[2]]


def lose_bytes(data: bytearray, place: tuple[int, int, int], rng) -> bytearray:
    """What a copy that skips does: all that follows is in the wrong place."""
    at, count = int(rng.integers(place[0], place[2])), int(rng.integers(1, 512))
    return data[:at] + data[at + count :]


def zero_header(data: bytearray, place: tuple[int, int, int], rng) -> bytearray:
    """What a disk that loses two sectors does: it looks like the end of the archive."""
    data[place[1] - 512 : place[1] + 512] = bytes(1024)
    return data


KINDS = [flip_header, cut_member, cut_between, lose_bytes, zero_header]


def theirs(path: Path) -> int | None:
    """The samples that webdataset's reader gives without a word; None if it raises."""
    try:
        return sum(1 for _ in webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False))
    except Exception:
        return None


def test_every_damage_is_reported_with_shard_and_offset(tmp_path):
    """100 of 100. The offset is that of the damaged member or, where it was not to be seen there, after it."""
    data, places = whole()
    reported, silent = Counter(), Counter()
    for kind in KINDS:
        rng = np.random.default_rng(1)
        for place in places[::3]:
            path = tmp_path / "damaged.tar"
            path.write_bytes(kind(bytearray(data), place, rng))
            with pytest.raises(ShardError) as caught:
                ensure_indices([path])
            words = str(caught.value).removeprefix(f"{path}: byte ").partition(": ")
            assert words[0].isdigit() and words[2]
            assert place[0] <= int(words[0]) <= (place[2] if kind is not zero_header else place[2] + 512)
            reported[kind.__name__] += 1
            silent[kind.__name__] += theirs(path) is not None
    assert reported == {kind.__name__: 20 for kind in KINDS}
    print(f"\ndamaged tars: {reported.total()} of 100 reported; webdataset is silent about {silent.total()}: {silent}")


def test_bytes_that_change_after_indexing_are_found_when_they_are_read(tmp_path):
    """100 flipped bits in members, size and time as they were: each is a bad sample with shard and key, or a header."""

    data, places = whole()
    path = tmp_path / "a.tar"
    path.write_bytes(data)
    ensure_indices([path])
    stat, rng, found = path.stat(), np.random.default_rng(2), 0
    good = list(Shards([path]))
    for trial in range(100):
        _, begin, _ = places[trial % 60]
        changed = bytearray(data)
        changed[begin] ^= 1 << int(rng.integers(8))
        path.write_bytes(changed)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        shards = Shards([path])
        bad = trial % 60 // 3
        with pytest.raises(DamagedMember):
            shards[bad]
        assert shards.describe(bad) == f"{path}: sample {good[bad].key}"
        assert shards[(bad + 1) % 20] == good[(bad + 1) % 20]
        found += 1
    print(f"\nbits flipped after indexing: {found} of 100 found")


# --- while it is read -----------------------------------------------------------------------------------------------


def source_of(path: Path, workers: int = 0) -> DataConfig:
    return DataConfig(
        train=[Source(name="a", shards=str(path), captions=None)],
        tokenizer=str(TOKENIZER),
        transform=TransformConfig(image_size=16),
        context_length=4,
        workers=workers,
    )


def batches_of(config: DataConfig) -> Iterator[Batch]:
    return iter(train_loader(config, patch_size=8, micro_batch=2, start=0, seed=0, rank=0, world_size=1))


@pytest.fixture
def shard(tmp_path) -> Path:
    path = write_tar(tmp_path / "a.tar", [(f"{i:03d}.jpg", made("JPEG", 40 + i % 9, 40)) for i in range(60)])
    ensure_indices([path])
    return path


def test_an_input_error_names_shard_place_and_sample(shard, monkeypatch):
    shards = Shards([shard])
    good = shards[7]

    def fail(fd, size, offset):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(
        ShardError, match=rf"^{re.escape(str(shard))}: byte \d+: sample {good.key}: .*Input/output error"
    ):
        shards[7]


def test_a_shard_that_is_cut_while_it_is_read(shard):
    """What is left is read; the rest is bad, and soon ends the run."""
    shards = Shards([shard])
    good = list(shards)
    os.truncate(shard, shard.stat().st_size // 2)
    found, damaged = [], []
    for number in range(60):
        try:
            assert shards[number] == good[number]
            found.append(number)
        except DamagedMember:
            damaged.append(number)
    assert 20 < len(found) < 40 and found + damaged == list(range(60))


def test_a_shard_replaced_by_one_of_the_same_size_and_time(shard):
    """Another version of the data, put there with `cp -p`: none of its samples is taken for one that was indexed."""
    stat, files = shard.stat(), [(f"{i:03d}.jpg", made("JPEG", 40 + i % 9, 40, mode="L")) for i in range(60)]
    size = [len(made("JPEG", 40 + i % 9, 40)) for i in range(60)]
    write_tar(shard, [(name, data[: size[i]].ljust(size[i], b"\0")) for i, (name, data) in enumerate(files)])
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert shard.stat().st_size == stat.st_size
    with pytest.raises(ShardError, match=r"no usable sample in 9 tries: .*other bytes than were indexed"):
        next(batches_of(source_of(shard)))


def test_processes_that_index_at_once_leave_one_good_index(tmp_path):
    paths = [write_tar(tmp_path / f"{i}.tar", [(f"{j:03d}.jpg", made("JPEG")) for j in range(40)]) for i in range(4)]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=ensure_indices, args=(paths,)) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 6
    assert len(list(Shards(paths))) == 160
    assert sorted(os.listdir(tmp_path)) == sorted(name for i in range(4) for name in (f"{i}.tar", f"{i}.tar.idx"))


def test_a_worker_that_is_killed_ends_the_run_and_does_not_hang_it(shard):
    others = set(multiprocessing.active_children())
    batches = batches_of(source_of(shard, workers=2))
    next(batches)
    (worker, _) = set(multiprocessing.active_children()) - others
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises((RuntimeError, ConnectionError, EOFError)):  # whichever end of it is noticed first
        for _ in range(100):
            next(batches)
