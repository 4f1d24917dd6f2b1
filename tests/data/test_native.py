"""Grids, areas and the order of micro-batches at native resolution. `pytest -s` prints the figures.

A is an area, C the budget, m the number of a micro-batch, B its samples, W ranks, g the global sample number.
"""

import math
from itertools import accumulate, islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import conv2d

from aimv2.data import native
from aimv2.data.native import NativeConfig, NativeOrder, SizedSample, area_grid, patch_budget
from aimv2.patches import from_strip, patchify, to_strip

PAPER, SMALL = NativeConfig(), NativeConfig(min_patches=32, max_patches=160)


def order(config: NativeConfig = SMALL, budget: int = 1024, **place) -> NativeOrder:
    place = {"seed": 0, "start": 0, "first_batch": 0, "rank": 0, "world_size": 1} | place
    return NativeOrder(config=config, budget=budget, **place)


def aspects(count: int, spread: float = 0.4) -> np.ndarray:
    """Width over height, log-normal about a little more than square, as photographs are."""
    return np.exp(np.random.default_rng(1).normal(0.15, spread, count).clip(-2.3, 2.3))


# --- grids ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "area", "grid"),
    [
        (224, 224, 256, (16, 16)),
        (480, 640, 1200, (30, 40)),
        (640, 480, 1200, (40, 30)),
        (1000, 100, 4096, (204, 20)),  # ideally 202.4 x 20.2; 202 x 20 holds it as large, with fewer patches
        (100, 1000, 32, (2, 16)),  # 1.8 x 17.9
        (50, 50, 7, (2, 3)),
        (32, 320, 2, (1, 2)),
        (320, 32, 2, (2, 1)),
    ],
)
def test_grids_worked_by_hand(height, width, area, grid):
    rows, columns = area_grid(height, width, area)
    assert {rows, columns} == set(grid) if height == width else (rows, columns) == grid


@settings(max_examples=200, deadline=None)
@given(
    height=st.integers(1, 20_000),
    width=st.integers(1, 20_000),
    area=st.one_of(st.integers(2, 300), st.integers(300, 5000)),
)
def test_the_grid_is_the_best_of_all(height, width, area):
    """Against a search through every grid of at most A patches: none holds the image larger, none as large and more."""
    rows, columns = area_grid(height, width, area)
    assert 2 <= rows * columns <= area

    def merit(r, c):
        return min(r * width, c * height), r * c  # whole numbers: both of these over A h w under a root are the scale

    best = max(merit(r, area // r) for r in range(1, area + 1))
    assert merit(rows, columns) == best


def test_turning_the_image_turns_the_grid():
    rng = np.random.default_rng(0)
    for height, width, area in zip(
        *rng.integers(32, 4000, (2, 2000)).tolist(), rng.integers(2, 4097, 2000).tolist(), strict=True
    ):
        if height != width:
            assert area_grid(height, width, area) == area_grid(width, height, area)[::-1]


@pytest.mark.parametrize(("config", "budget"), [(PAPER, 65_536), (PAPER, 16_384), (SMALL, 2048), (SMALL, 512)])
def test_under_five_percent_of_the_tokens_are_padding(config, budget):
    """The targets: under 5 % padding, at the paper's limits and at small ones. Aspects of photographs."""
    sizes = iter(np.rint(1000 * aspects(200_000)).astype(int).tolist())
    tokens = real = 0
    left, distortion = [], []
    for batch in islice(order(config, budget), 400):
        shapes = [(next(sizes), s.area) for s in batch]
        grids = [area_grid(1000, width, area) for width, area in shapes]
        counts = [r * c for r, c in grids]
        tokens, real = tokens + len(counts) * max(counts), real + sum(counts)
        left += [1 - n / area for n, (_, area) in zip(counts, shapes, strict=True)]
        distortion += [abs(math.log(c / r * 1000 / w)) for (r, c), (w, _) in zip(grids, shapes, strict=True)]
    print(f"\nareas {config.min_patches} to {config.max_patches}, C = {budget}: {1 - real / tokens:.2%} padding,")
    print(
        f"  {np.mean(left):.2%} under the area, aspect changed by {np.mean(distortion):.1%}, {max(distortion):.0%} most"
    )
    assert 1 - real / tokens < 0.05 and np.mean(left) < 0.05
    # A grid of s patches a side is off by about 1 / 2s, and most images are of small areas, where s is 14 and 7. The
    # most is a whole patch of a side of 2 or 3.
    assert np.mean(distortion) < (0.04 if config is PAPER else 0.1) and max(distortion) < 0.45


# --- strips ---------------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 5), columns=st.integers(1, 7), side=st.sampled_from([1, 2, 7]), more=st.integers(0, 3))
def test_a_strip_has_the_patches_of_its_image(rows, columns, side, more):
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(3, rows * side, columns * side, generator=generator)
    strip = to_strip(image, side)
    assert strip.shape == (3, side, rows * columns * side)
    assert torch.equal(patchify(strip[None], side), patchify(image[None], side))
    padded = torch.nn.functional.pad(strip, (0, more * side), value=7.0)
    assert torch.equal(from_strip(padded, rows, columns, side), image)
    assert torch.equal(to_strip(image[None, None], side), strip[None, None])


def test_the_patch_convolution_of_a_strip_is_that_of_its_image():
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 3, 3 * 4, 5 * 4, generator=generator, dtype=torch.float64)
    weight = torch.rand(6, 3, 4, 4, generator=generator, dtype=torch.float64)
    whole = conv2d(image, weight, stride=4).flatten(2)
    # The sums of 48 products may be added in another order.
    torch.testing.assert_close(conv2d(to_strip(image, 4), weight, stride=4).flatten(2), whole, rtol=1e-13, atol=1e-13)


# --- areas ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [PAPER, SMALL])
def test_areas_are_two_to_a_truncated_normal(config):
    """Kolmogorov-Smirnov against the closed form: 4,000 draws stay within 1.95 / sqrt(4000) with probability 0.999."""
    areas = np.array([order(config, seed=5).area(m) for m in range(4000)])
    assert areas.min() >= config.min_patches and areas.max() <= config.max_patches
    low, high = math.log2(config.min_patches), math.log2(config.max_patches)
    print(f"\nareas: {areas.min()} to {areas.max()}, median {np.median(areas):.0f}, mean {areas.mean():.0f}")
    # Rounded to whole areas: compared where they change, half-way between neighbours.
    edges = np.unique(areas) + 0.5
    normal = 2 * (np.log2(edges.clip(max=config.max_patches)) - low) / (high - low) - 1
    expected = (np.array([math.erf(x / math.sqrt(2)) for x in normal]) / math.erf(1 / math.sqrt(2)) + 1) / 2
    found = np.searchsorted(np.sort(areas), edges) / len(areas)
    assert abs(found - expected).max() < 1.95 / math.sqrt(4000)
    # Neighbours are independent: their correlation has deviation 1 / 63.
    assert abs(np.corrcoef(areas[:-1], areas[1:])[0, 1]) < 4 / 63


def test_equal_limits_are_one_area_and_the_seed_decides_the_others():
    one = NativeConfig(min_patches=64, max_patches=64)
    assert {order(one).area(m) for m in range(100)} == {64}
    a, b = ([order(seed=seed).area(m) for m in range(50)] for seed in (0, 1))
    assert a != b and a == [order(seed=0, rank=3, world_size=4, budget=9).area(m) for m in range(50)]


@pytest.mark.parametrize("shared_by", [2, 3, 64])
def test_micro_batches_in_a_row_share_an_area(shared_by):
    shared, alone = order(NativeConfig(min_patches=32, max_patches=160, shared_by=shared_by)), order()
    assert [shared.area(m) for m in range(200)] == [alone.area(m // shared_by) for m in range(200)]
    batches = list(islice(shared, 2 * shared_by))
    assert len({len(batch) for batch in batches[:shared_by]}) == 1
    assert shared.samples(shared_by, shared_by) == sum(map(len, batches[shared_by:]))
    # from the middle of a group on, as one of several ranks
    start = batches[shared_by + 1][0].sample
    place = {"start": start, "first_batch": shared_by + 1, "rank": 1, "world_size": 2}
    assert next(iter(order(shared.config, **place))) == list(islice(shared, shared_by + 3))[-1]


def test_shared_by_nobody_is_refused():
    with pytest.raises(ValueError, match="shared_by 0: expected 1 or more"):
        NativeConfig(shared_by=0)


@pytest.mark.parametrize("limits", [(1, 100), (0, 100), (101, 100), (128, 2**20 + 1), (-5, -1)])
def test_limits_that_make_no_sense_are_refused(limits):
    with pytest.raises(ValueError, match=f"min_patches {limits[0]}, max_patches {limits[1]}: expected 2 <= min"):
        NativeConfig(min_patches=limits[0], max_patches=limits[1])


# --- order ----------------------------------------------------------------------------------------------------------


def undisturbed(count: int, config: NativeConfig = SMALL, budget: int = 1024) -> list[list[SizedSample]]:
    """Of a single rank from the beginning, worked out plainly: C // A samples of area A, one after another."""
    areas = [order(config, budget).area(m) for m in range(count)]
    sizes = [max(1, budget // area) for area in areas]
    return [
        [SizedSample(g, area) for g in range(end - size, end)]
        for area, size, end in zip(areas, sizes, accumulate(sizes), strict=True)
    ]


def test_samples_come_one_after_another_within_the_budget():
    batches = list(islice(order(), 200))
    assert batches == undisturbed(200)
    assert all(1024 - batch[0].area < len(batch) * batch[0].area <= 1024 for batch in batches)
    assert len({len(batch) for batch in batches}) > 10
    assert order().samples(0, 200) == sum(map(len, batches)) == batches[-1][-1].sample + 1
    assert order().samples(7, 3) == sum(map(len, batches[7:10])) and order().samples(7, 0) == 0


def test_a_budget_under_the_area_is_a_single_image():
    batches = list(islice(order(budget=50), 200))
    assert batches == undisturbed(200, budget=50)
    assert {len(batch) for batch in batches if batch[0].area > 25} == {1}


@pytest.mark.parametrize("world_size", range(1, 9))
def test_ranks_share_one_order_and_go_on_from_anywhere(world_size):
    whole = undisturbed(300)
    rng = np.random.default_rng(world_size)
    for first_batch in [0, *rng.integers(0, 300 - 5 * world_size, 25).tolist()]:
        start = whole[first_batch][0].sample
        place = {"start": start, "first_batch": first_batch, "world_size": world_size}
        ranks = [list(islice(order(rank=rank, **place), 5)) for rank in range(world_size)]
        merged = [batch for step in zip(*ranks, strict=True) for batch in step]
        assert merged == whole[first_batch : first_batch + 5 * world_size]
        assert start == order().samples(0, first_batch)


def test_a_start_far_out_draws_no_area_but_those_of_its_own_step(monkeypatch):
    drawn = []
    original = native._area.__wrapped__
    monkeypatch.setattr(native, "_area", lambda *place: drawn.append(place[1]) or original(*place))
    first = next(iter(order(PAPER, 65_536, start=5 * 10**8, first_batch=10**7, rank=2, world_size=4)))
    assert set(drawn) == {10**7, 10**7 + 1, 10**7 + 2}
    assert first[0].sample == 5 * 10**8 + order(PAPER, 65_536).samples(10**7, 2)


def test_the_budget_is_of_square_images():
    assert patch_budget(4, 224, 14) == 4 * 256
