"""A million samples in a hundred shards: what the index costs, and that memory does not grow with what has been read.

The slow test prints bytes of index a sample, and the memory of each process; the other is the same, smaller.
"""

import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile_images import made
from test_shards import write_tar
from torch.utils.data import DataLoader

from aimv2.data.loader import DataConfig, train_loader
from aimv2.data.mixture import Source
from aimv2.data.shard_index import index_path
from aimv2.data.shards import OPEN_SHARDS, Shards, ensure_indices, expand_shards
from aimv2.data.transforms import TransformConfig

BATCH = 500  # samples; the workers take turns, so both are looked at
TOKENIZER = Path(__file__).parents[2] / "tokenizers" / "shapes"


def write_many(folder: Path, shards: int, samples: int) -> str:
    """A pattern of shards of three members a sample and keys of nine digits: one tar under many names."""
    first = folder / "00000.tar"
    jpegs = [made("JPEG", 40, 33, quality=20 + i) for i in range(10)]
    write_tar(
        first,
        [
            (f"{row:09d}.{extension}", data)
            for row in range(samples)
            for extension, data in (("jpg", jpegs[row % 10]), ("txt", b"a red circle"), ("json", b"{}"))
        ],
    )
    ensure_indices([first])
    for shard in range(1, shards):
        path = folder / f"{shard:05d}.tar"
        os.link(first, path)
        shutil.copy(index_path(first), index_path(path))
    return f"{folder}/*.tar"


def memory() -> dict[str, float]:
    """MB of this process: shared with no other (uss), mapped from files (file), and all (rss)."""
    values = {}
    with open("/proc/self/smaps_rollup") as file:
        for line in file:
            name, _, rest = line.partition(":")
            values[name] = values.get(name, 0) + int(rest.split()[0]) / 1024 if rest.strip().endswith("kB") else 0
    uss = values["Private_Clean"] + values["Private_Dirty"]
    return {"anonymous": values["Anonymous"], "uss": uss, "rss": values["Rss"]}


class Reading(torch.utils.data.Dataset):
    """Every sample of some shards, and now and then the memory of the process that read it, in each of two batches."""

    def __init__(self, pattern: str, every: int):
        self.shards, self.every = Shards(expand_shards(pattern)), every
        self.rows = len(self.shards) // len(self.shards.locations)

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, number: int) -> tuple[int, int, dict | None]:
        sample = self.shards[number]
        assert sample.key == f"{number % self.rows:09d}" and sample.text == b"a red circle" and sample.image
        return number, os.getpid(), memory() if number % self.every in (0, BATCH) else None


def walk(pattern: str, every: int, workers: int = 2) -> tuple[dict[int, list[float]], float]:
    """{process: its anonymous memory in MB over time}, and samples a second."""
    data = Reading(pattern, every)
    found: dict[int, list[float]] = {}
    begin = time.perf_counter()
    seen = 0
    for batch in DataLoader(data, batch_size=BATCH, num_workers=workers, collate_fn=list, shuffle=False):
        seen += len(batch)
        for _, process, used in batch:
            if used is not None:
                found.setdefault(process, []).append(used["anonymous"])
    assert seen == len(data)
    return found, seen / (time.perf_counter() - begin)


def check_scale(folder: Path, shards: int, samples: int) -> None:
    pattern = write_many(folder, shards, samples)
    paths = expand_shards(pattern)
    total = shards * samples
    size = sum(index_path(path).stat().st_size for path in paths)
    assert size < 100 * total

    before = memory()["anonymous"]
    reader = Shards(paths)
    rng = np.random.default_rng(0)
    for number in rng.integers(0, total, 2000).tolist():  # every shard is opened, many again and again
        assert reader[number].key == f"{number % samples:09d}"
    own = memory()["anonymous"] - before
    assert len(reader._opened) <= OPEN_SHARDS

    used, rate = walk(pattern, every=total // 100)
    assert len(used) == 2
    growth = {process: np.mean(mb[-5:]) - np.mean(mb[5:10]) for process, mb in used.items()}
    print(f"\n{total} samples in {shards} shards: {size / total:.1f} bytes of index a sample, mapped from files")
    print(f"  reading 2,000 anywhere: {own:.1f} MB of its own, {own * 2**20 / total:.2f} bytes a sample")
    print(f"  2 workers over all of them, {rate:.0f} a second: grew by {[f'{g:.1f} MB' for g in growth.values()]}")
    # Python's and glibc's pools come and go by a few MB; a million of anything would be more.
    assert own < 8 and max(growth.values()) < 8


def test_memory_is_flat_over_fifty_thousand_samples(tmp_path):
    check_scale(tmp_path, shards=100, samples=500)


@pytest.mark.slow
def test_memory_is_flat_over_a_million_samples(tmp_path):
    check_scale(tmp_path, shards=100, samples=10_000)


@pytest.mark.slow
def test_training_memory_is_flat_and_the_first_batch_is_quick(tmp_path):
    """The whole path (shuffled, decoded, cropped, encoded) over 40,000 of a million samples, and from g = 10^9."""
    pattern = write_many(tmp_path, shards=100, samples=10_000)
    config = DataConfig(
        train=[Source(name="a", shards=pattern)],
        tokenizer=str(TOKENIZER),
        transform=TransformConfig(image_size=32),
        context_length=16,
        workers=0,
    )

    def batches(start: int):
        return iter(train_loader(config, patch_size=8, micro_batch=100, start=start, seed=0, rank=0, world_size=1))

    begin = time.perf_counter()
    first = next(batches(10**9))
    took = time.perf_counter() - begin
    assert first.sample.tolist() == list(range(10**9, 10**9 + 100))
    used = []
    for number, _ in zip(range(400), batches(0), strict=False):
        if number % 10 == 0:
            used.append(memory()["anonymous"])
    print(f"\nfirst batch of 100 at g = 10^9 of a million samples: {1000 * took:.0f} ms, opening everything")
    print(f"  40,000 samples: from {np.mean(used[5:10]):.0f} to {np.mean(used[-5:]):.0f} MB")
    assert np.mean(used[-5:]) - np.mean(used[5:10]) < 8
