"""The mixture at every prefix, and the same samples after any restart, on any number of ranks and workers.

`pytest -s` prints the figures. B samples of a micro-batch, W ranks, g the global sample number.
"""

import functools
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hostile_images import made
from test_shards import Files, write_tar

from aimv2.data import mixture
from aimv2.data.batch import Batch
from aimv2.data.loader import DataConfig, train_loader
from aimv2.data.mixture import LONGEST_PERIOD, Mixture, MixtureChange, Source, fair_schedule
from aimv2.data.shards import ShardError, ensure_indices
from aimv2.data.transforms import TransformConfig

TOKENIZER = Path(__file__).parents[2] / "tokenizers" / "shapes"

# --- mixture --------------------------------------------------------------------------------------------------------

N = 1_000_000
WEIGHTS = {
    "one source": [1.0],
    "AIMv2's public half": [0.3, 0.3, 0.3, 0.1],
    "thirds": [1, 1, 1],
    "halves of a percent": [0.305, 0.28, 0.2, 0.12, 0.095],
    "very skewed": [0.9999, 0.0001],
    "skewed both ways": [1e-4, 0.4999, 0.25, 0.25],
    "one in a thousand each": [0.001] * 7 + [0.993],
    "forty sources": list(range(1, 41)),
    "primes": [2, 3, 5, 7, 11, 13, 10007],
}
FINE = {
    "pi, e and the golden ratio": [3.141592653589793, 2.718281828459045, 1.618033988749895],
    "roots": [2**0.5, 3**0.5, 5**0.5, 7**0.5],
    "finer than the period": [0.123456789, 3.3333333, 1.7777],
    "under one in the period": [1e-6, 1.0],
}


def shares_of(mix: Mixture) -> list[int]:
    ((start, shares),) = mix.shares
    assert start == 0
    return shares


def realised(weights: Sequence[float]) -> tuple[np.ndarray, Mixture]:
    """(N,) the source of every g below N, and the mixture; `locate` is checked to agree at 3,000 of them."""
    mix = Mixture([10**9] * len(weights), weights, seed=0)
    source = np.resize(np.array(fair_schedule(shares_of(mix)), np.int16), N)
    for g in [0, 1, N - 1, *np.random.default_rng(0).integers(0, N, 3000).tolist()]:
        assert mix.locate(g)[0] == source[g]
    return source, mix


def largest_deviation(source: np.ndarray, shares: list[Fraction]) -> float:
    """max over i and n <= N of |given_i(n) - share_i n|, in whole numbers: no rounding hides anything."""
    worst = Fraction(0)
    n = np.arange(1, N + 1, dtype=np.int64)
    for i, share in enumerate(shares):
        over = np.cumsum(source == i, dtype=np.int64) * share.denominator - n * share.numerator
        worst = max(worst, Fraction(int(np.abs(over).max()), share.denominator))
    return float(worst)


def exact_shares(weights: Sequence[float]) -> list[Fraction]:
    weights = [Fraction(str(weight)) for weight in weights]
    return [weight / sum(weights) for weight in weights]


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_mixture_is_within_one_sample_at_every_prefix_up_to_a_million(monkeypatch, name):
    monkeypatch.setattr(mixture, "shuffled", lambda position, length, key: position)  # the order within is not asked
    source, _ = realised(WEIGHTS[name])
    worst = largest_deviation(source, exact_shares(WEIGHTS[name]))
    print(f"\n{name}: at most {worst:.4f} samples off at any prefix up to 10^6")
    assert worst < 1


@pytest.mark.parametrize("name", FINE)
def test_weights_that_no_period_holds_are_rounded_once(monkeypatch, name):
    """Within one sample of the shares in use at every prefix; these are off the weights by a known, printed rate."""
    monkeypatch.setattr(mixture, "shuffled", lambda position, length, key: position)
    source, mix = realised(FINE[name])
    total = sum(shares_of(mix))
    used, asked = [Fraction(share, total) for share in shares_of(mix)], exact_shares(FINE[name])
    assert largest_deviation(source, used) < 1
    rate = max(abs(share - want) for share, want in zip(used, asked, strict=True))
    print(f"\n{name}: shares off by {float(rate):.1e} at most: {float(rate * N):.1f} samples in 10^6")
    # Half a unit of the period for its own rounding and half for that of each other source; 1 is the least share.
    assert rate <= Fraction(1 + len(asked), 2 * LONGEST_PERIOD)


# --- order: restarts, ranks, workers --------------------------------------------------------------------------------


def write_source(folder: Path, name: str, count: int, bad: int = 0) -> str:
    """A pattern of shards of `count` tiny images, the first `bad` of each thousand cut; two captions a sample."""
    for shard in range(0, count, 50):
        files: Files = []
        for i in range(shard, min(shard + 50, count)):
            jpeg = made("JPEG", 33 + i % 7, 33, quality=30 + i % 60)
            record = json.dumps({"captions": [f"a red circle {i}", f"a blue square {i}"]}).encode()
            files += [(f"{i:05d}.jpg", jpeg[:150] if i % 1000 < bad else jpeg), (f"{i:05d}.txt", b"a circle")]
            files.append((f"{i:05d}.json", record))
        write_tar(folder / f"{name}-{shard:05d}.tar", files)
    pattern = f"{folder}/{name}-*.tar"
    ensure_indices(sorted(folder.glob(f"{name}-*.tar")))
    return pattern


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> DataConfig:
    """Three sources, one of them with 4 % bad samples; the mixture changes twice."""
    folder = tmp_path_factory.mktemp("data")
    return DataConfig(
        train=[
            Source(name="a", shards=write_source(folder, "a", 150), weight=0.6, captions="json:captions"),
            Source(name="b", shards=write_source(folder, "b", 70), weight=0.3),
            Source(name="c", shards=write_source(folder, "c", 100, bad=4), weight=0.1, captions=None),
        ],
        changes=[
            MixtureChange(sample=333, weights={"a": 0.2, "b": 0.0}),
            MixtureChange(sample=700, weights={"b": 1.0, "c": 0.5}),
        ],
        tokenizer=str(TOKENIZER),
        transform=TransformConfig(image_size=16, min_size=32),
        context_length=8,
        pad_text_to_context=True,  # or the width of the text would be the micro-batch's
        workers=0,
    )


def digests(batch: Batch) -> dict[int, str]:
    """{g: sha256 of everything of that sample}."""
    found = {}
    for j, g in enumerate(batch.sample.tolist()):
        parts = (batch.image[j], batch.text[j], batch.text_length[j], batch.prefix_length[j])
        bad = sorted((r.reason, r.where) for r in batch.replaced if r.sample == g)
        found[g] = hashlib.sha256(b"".join(p.numpy().tobytes() for p in parts) + repr(bad).encode()).hexdigest()
    return found


def read(config: DataConfig, batches: int, **place) -> list[dict[int, str]]:
    place = {"patch_size": 8, "micro_batch": 4, "start": 0, "seed": 3, "rank": 0, "world_size": 1} | place
    loader = iter(train_loader(config, **place))
    found = [digests(batch) for batch in islice(loader, batches)]
    loader.close()
    return found


@pytest.fixture(scope="module")
def undisturbed(config) -> dict[int, str]:
    """The first 1,200 samples: more than five epochs of each source."""
    return functools.reduce(dict.__or__, read(config, 300))


def check_ranks(config: DataConfig, undisturbed, world_size: int, start: int, micro_batch: int, steps: int = 3) -> None:
    """Every rank, from `start`: the order is g = start + (k W + r) B + j, and the bytes are the undisturbed ones."""
    place = {"start": start, "micro_batch": micro_batch, "world_size": world_size}
    ranks = [read(config, steps, rank=rank, **place) for rank in range(world_size)]
    order = [g for step in zip(*ranks, strict=True) for batch in step for g in batch]
    assert order == list(range(start, start + steps * world_size * micro_batch))
    for rank in ranks:
        for batch in rank:
            assert batch == {g: undisturbed[g] for g in batch}


def test_200_restarts_anywhere_go_on_bit_for_bit(config, undisturbed):
    """200 of 200: from any g, with any micro-batch, as any rank of any number of them."""
    rng, exact = np.random.default_rng(0), 0
    for _ in range(200):
        start, micro_batch, world_size = int(rng.integers(1000)), int(rng.integers(1, 6)), int(rng.integers(1, 9))
        rank = int(rng.integers(world_size))
        (batch,) = read(config, 1, start=start, micro_batch=micro_batch, world_size=world_size, rank=rank)
        assert list(batch) == list(range(start + rank * micro_batch, start + (rank + 1) * micro_batch))
        assert batch == {g: undisturbed[g] for g in batch}
        exact += 1
    print(f"\nrestart points: {exact} of 200 exact")


@pytest.mark.parametrize("world_size", range(1, 9))
def test_world_sizes_see_the_same_samples(config, undisturbed, world_size):
    check_ranks(config, undisturbed, world_size, start=37, micro_batch=3)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("world_size", "workers"), [(1, 4), (2, 1), (3, 2), (2, 3)])
def test_workers_see_the_same_samples(config, undisturbed, world_size, workers):
    check_ranks(replace(config, workers=workers), undisturbed, world_size, start=5, micro_batch=2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_40_combinations_of_ranks_and_workers_see_the_same_samples(config, undisturbed):
    for world_size in range(1, 9):
        for workers in range(5):
            check_ranks(replace(config, workers=workers), undisturbed, world_size, start=91, micro_batch=2, steps=5)
    print("\nworld sizes 1 to 8 x workers 0 to 4: 40 of 40 the same order and bytes")


# --- bad samples ----------------------------------------------------------------------------------------------------


def count_until_the_end(config: DataConfig, bad: int, folder: Path, most: int) -> int | None:
    """How many samples a run sees before it ends for bad ones; None if it sees them all."""
    source = Source(name="bad", shards=write_source(folder, f"bad{bad}", 1000, bad=bad), captions=None)
    config = replace(config, train=[source], changes=[])
    loader = train_loader(config, patch_size=8, micro_batch=20, start=0, seed=0, rank=0, world_size=1)
    seen = 0
    try:
        for batch in loader:
            seen += len(batch)
            if seen >= most:
                return None
    except ShardError as error:
        assert "over 100 of 10000 samples had to be replaced (undecodable" in str(error)
        return seen


def test_a_run_ends_at_its_hundred_and_first_bad_sample(config, tmp_path):
    """Of 30 % bad samples: after 101 of them. Their number in 337 of 1,000 has deviation 7; 28 is four."""
    seen = count_until_the_end(config, 300, tmp_path, most=1000)
    assert abs(0.3 * seen - 101) <= 28


@pytest.mark.slow
def test_a_run_goes_on_with_under_one_percent_and_ends_with_more(config, tmp_path):
    """Of 9 or 11 in each thousand, and so 90 or 110 in each ten; epochs are of a thousand."""
    assert count_until_the_end(config, 9, tmp_path, most=20_400) is None
    seen = count_until_the_end(config, 11, tmp_path, most=20_400)
    print(f"\n0.9 % bad: not ended in 20,400 samples; 1.1 % bad: ended after {seen}")
    assert 8_500 < seen <= 10_020


# --- far out --------------------------------------------------------------------------------------------------------


def test_a_start_at_a_billion_computes_no_more_than_two_permutations(config, monkeypatch):
    """Of an epoch of 747 million: of its chunks, and of one window. No row before it is touched."""
    made_of = []
    original = mixture.permutation.__wrapped__

    def counting(length, key):
        made_of.append(length)
        return original(length, key)

    monkeypatch.setattr(mixture, "permutation", counting)
    Mixture([747_000_000], [1], seed=0).locate(10**9)
    assert len(made_of) <= 2 and max(made_of) <= mixture.MOST_CHUNKS
    begin = time.perf_counter()
    (batch,) = read(config, 1, start=10**9)
    print(f"\nfirst batch at g = 10^9: {1000 * (time.perf_counter() - begin):.0f} ms")
    assert list(batch) == list(range(10**9, 10**9 + 4))
