import itertools
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aimv2.data import mixture
from aimv2.data.mixture import (
    LONGEST_PERIOD,
    WINDOW,
    Mixture,
    MixtureChange,
    Source,
    fair_schedule,
    shuffled,
    weights_over_time,
    whole_shares,
)

# As whole numbers of hundredths they sum to less than LONGEST_PERIOD.
weights = st.lists(st.one_of(st.integers(1, 80), st.integers(1, 8000).map(lambda n: n / 100)), min_size=1, max_size=8)


def counts(schedule: list[int], length: int, sources: int) -> np.ndarray:
    """(length, sources): how often each source came in every prefix of the repeated schedule."""
    repeated = np.resize(schedule, length)
    return np.cumsum(repeated[:, None] == np.arange(sources), axis=0)


@settings(max_examples=60, deadline=None)
@given(weights)
@example([1] * 16)
@example([100, 1, 1, 1, 1, 1])
@example([0.999, 0.001])
@example([0.123456789, 3.3333333, 1.7777])  # too fine for a whole period: rounded
def test_every_prefix_is_within_one_sample_of_the_shares(given_weights):
    shares = whole_shares(given_weights)
    n = np.arange(1, 100_001)[:, None]
    error = counts(fair_schedule(shares), 100_000, len(shares)) * sum(shares) - n * np.array(shares)  # exact, int64
    assert np.abs(error).max() < sum(shares)


@settings(max_examples=100, deadline=None)
@given(weights)
def test_shares_are_the_weights_exactly_if_their_period_is_short(given_weights):
    shares, scale = whole_shares(given_weights), 100 / sum(given_weights)
    assert [100 * s / sum(shares) for s in shares] == pytest.approx([w * scale for w in given_weights], rel=1e-12)


@given(st.lists(st.floats(1e-4, 1e4), min_size=2, max_size=10))
def test_shares_of_any_weights_are_near(given_weights):
    """Even of the longest period each share would be rounded by half a unit, or raised to one, for each source."""
    shares = np.array(whole_shares(given_weights))
    exact = np.array(given_weights) / sum(given_weights)
    assert shares.min() >= 1
    assert np.abs(shares / shares.sum() - exact).max() <= (len(shares) + 1) / LONGEST_PERIOD


@settings(deadline=None)
@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=3))
def test_few_weights_of_any_kind_are_kept_within_a_sample_of_a_million(given_weights):
    """The best of all periods errs by about its length to the power of -1.5 with three sources: 0.01 in a million."""
    shares = np.array(whole_shares(given_weights))
    exact = np.array(given_weights) / sum(given_weights)
    assert np.abs(shares / shares.sum() - exact).max() * 1e6 < 1


def test_locate_is_what_walking_from_the_start_finds():
    lengths, seen = [7, 3, 20], [0, 0, 0]
    mix = Mixture(lengths, [0.5, 0.2, 0.3], seed=3)
    for g in range(500):
        source, epoch, number = mix.locate(g)
        position = seen[source]
        assert (epoch, number) == (
            position // lengths[source],
            shuffled(position % lengths[source], lengths[source], (3, source, epoch)),
        )
        seen[source] += 1


def test_every_epoch_of_every_source_sees_each_sample_once():
    lengths = [50, 17, 130]
    mix = Mixture(lengths, [3, 1, 2], seed=0)
    seen = Counter(mix.locate(g) for g in range(6 * 4000))
    assert max(seen.values()) == 1
    for source, length in enumerate(lengths):
        epochs = {e for s, e, _ in seen if s == source}
        complete = sorted(epochs)[:-1]
        assert len(complete) > 10
        for epoch in complete:
            assert {n for s, e, n in seen if (s, e) == (source, epoch)} == set(range(length))


@settings(max_examples=60, deadline=None)
@given(
    length=st.one_of(st.integers(1, 300), st.integers(WINDOW - 70, WINDOW + 70), st.integers(1, 3 * WINDOW)),
    key=st.tuples(st.integers(0, 2**40), st.integers(0, 9), st.integers(0, 10**6)),
)
def test_a_shuffle_is_a_bijection(length, key):
    assert sorted(shuffled(i, length, key) for i in range(length)) == list(range(length))


def test_shuffles_differ_by_seed_source_and_epoch():
    orders = {
        tuple(shuffled(i, 100, key) for i in range(100)) for key in itertools.product((0, 1), (0, 1), (0, 1, 2**33))
    }
    assert len(orders) == 12


def test_small_data_are_shuffled_uniformly():
    """All 24 orders of 4 samples: 4,800 draws, 200 expected of each, deviation 13.8; the bound is 6 deviations."""
    found = Counter(tuple(shuffled(i, 4, (0, 0, epoch)) for i in range(4)) for epoch in range(4800))
    assert len(found) == 24
    assert max(abs(n - 200) for n in found.values()) < 6 * 13.8


def test_large_data_are_read_in_few_places_and_well_mixed(monkeypatch):
    monkeypatch.setattr(mixture, "WINDOW", 1024)
    length = 100_000
    order = np.array([shuffled(i, length, (0, 0, 0)) for i in range(length)])
    window = np.sort(order[:1024])
    assert (np.diff(window) > 1).sum() <= 1024 // 64 - 1 + 1  # runs of 64; one may wrap round the end
    # Each window is mixed in its own way: places in the runs of 64 agree by chance only.
    assert np.mean((order[:1024] - order[1024:2048]) % 64 == 0) < 0.1
    # The correlation of place and sample of independent orders has deviation 1 / sqrt(chunks) = 0.025.
    assert abs(np.corrcoef(order, np.arange(length))[0, 1]) < 6 * 0.0253
    neighbours = np.abs(np.diff(order))
    assert np.median(neighbours) > length / 10


@pytest.mark.parametrize("weights", [[1], [0.7, 0.2, 0.1], [0.123456789, 3.3333333, 1.7777]])
def test_a_distant_sample_costs_nothing(weights):
    """CPU seconds, not wall: other processes must not make this fail."""
    begin = time.process_time()
    mix = Mixture([747_000_000, 12_000_000, 1_281_167][: len(weights)], weights, seed=0)
    mix.locate(10**9)
    assert time.process_time() - begin < 2  # measured 0.2 to 0.4


def test_far_out_the_counts_are_still_exact():
    mix = Mixture([1000, 10], [0.7, 0.3], seed=0)
    base = 10**15
    found = Counter(mix.locate(base + i)[0] for i in range(1000))
    assert found == {0: 700, 1: 300}
    source, epoch, number = mix.locate(base)
    assert epoch == (base * 7 // 10) // 1000 if source == 0 else (base * 3 // 10) // 10
    assert 0 <= number < 1000


@pytest.mark.parametrize(("lengths", "weights"), [([], []), ([1], [1, 2]), ([0, 4], [1, 1])])
def test_refused_lengths(lengths, weights):
    with pytest.raises(ValueError, match="expected as many, all positive"):
        Mixture(lengths, weights, seed=0)


@pytest.mark.parametrize(
    "change",
    [
        *({"weight": weight} for weight in (-1.0, float("nan"), float("inf"))),
        *({"captions": captions} for captions in ("json:", "text", {}, {"txt": 0.0}, {"txt": 1.0, "csv": 1.0})),
    ],
)
def test_refused_sources(change):
    with pytest.raises(ValueError, match="of source 'x': expected"):
        Source(name="x", shards="*.tar", **change)


# --- changes in mid-run ---------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 5), min_size=3, max_size=3).filter(any), min_size=2, max_size=4),
    st.lists(st.integers(1, 300), min_size=3, max_size=3, unique=True).map(sorted),
)
def test_a_change_is_exact_from_its_sample_on_and_loses_nothing(versions, places):
    lengths = [7, 3, 20]
    changes = list(zip(places, versions[1:], strict=False))
    mix, before = Mixture(lengths, versions[0], 3, changes), Mixture(lengths, versions[0], 3)
    given_so_far, since, start, weights = [0, 0, 0], [0, 0, 0], 0, versions[0]
    for g in range(400):
        for place, changed in changes:
            if g == place:
                since, start, weights = [0, 0, 0], g, changed
        source, epoch, number = mix.locate(g)
        # Every source goes on where it was: none of its samples is lost or seen twice.
        place_in_epoch = given_so_far[source] % lengths[source]
        assert epoch == given_so_far[source] // lengths[source]
        assert number == shuffled(place_in_epoch, lengths[source], (3, source, epoch))
        given_so_far[source] += 1
        since[source] += 1
        for count, weight in zip(since, weights, strict=True):
            assert abs(count * sum(weights) - weight * (g + 1 - start)) < sum(weights)
        if g < places[0]:
            assert mix.locate(g) == before.locate(g)


def test_weights_over_time():
    sources = [Source(name=name, shards="*.tar", weight=weight) for name, weight in (("a", 0.7), ("b", 0.3), ("c", 0))]
    changes = [MixtureChange(sample=10, weights={"c": 1.0}), MixtureChange(sample=20, weights={"a": 0.0, "b": 2.0})]
    assert weights_over_time(sources, changes) == [(0, [0.7, 0.3, 0]), (10, [0.7, 0.3, 1.0]), (20, [0.0, 2.0, 1.0])]
    for wrong, message in (
        ([MixtureChange(sample=5, weights={"d": 1.0})], "the mixture has a, b, c, but a change names d"),
        (changes[::-1], "a change at sample 10 after one at 20"),
        ([MixtureChange(sample=5, weights={"a": -1.0})], "weights \\[-1.0, 0.3, 0\\] from sample 5"),
        (
            [MixtureChange(sample=5, weights={"a": 0.0, "b": 0.0})],
            "from sample 5: expected none below 0, and one above",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            weights_over_time(sources, wrong)
    with pytest.raises(ValueError, match="expected a different name for each"):
        weights_over_time([sources[0], sources[0]], [])
    with pytest.raises(ValueError, match="sample 0: expected 1 or more"):
        MixtureChange(sample=0, weights={"a": 1.0})
