import math

import numpy as np
import pytest
import torch

from aimv2.positions import InterpolatedPositions, LearnedPositions, SinCosPositions, bicubic_weights


@pytest.mark.parametrize("grid", [(1, 1), (16, 16), (3, 7), (64, 2)])
def test_sincos_against_the_formula(grid):
    height, width, channels = *grid, 16
    quarter = channels // 4
    expected = np.empty((height * width, channels))
    for row in range(height):
        for column in range(width):
            for j in range(quarter):
                frequency = 10000 ** (-j / quarter)
                vector = expected[row * width + column]
                vector[j] = math.sin(column * frequency)
                vector[quarter + j] = math.cos(column * frequency)
                vector[2 * quarter + j] = math.sin(row * frequency)
                vector[3 * quarter + j] = math.cos(row * frequency)
    positions = SinCosPositions(channels)(height, width)
    # an angle of up to 63 in fp32 is rounded to 4e-6
    np.testing.assert_allclose(positions.numpy(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [2 / 3, 0.5, 3.0])
def test_scale_multiplies_rows_and_columns(scale):
    positions = SinCosPositions(16, scale)(24, 5)
    for row, column in ((0, 0), (23, 0), (7, 4)):
        angles = [c * scale * 10000 ** (-j / 4) for c in (column, row) for j in range(4)]
        expected = [f(a) for half in (angles[:4], angles[4:]) for f in (math.sin, math.cos) for a in half]
        # an angle of up to 69 in fp32 is rounded to 4e-6
        np.testing.assert_allclose(positions[row * 5 + column].numpy(), expected, rtol=0, atol=1e-5)
    plain = SinCosPositions(16)(8, 8).view(8, 8, 16)
    spread = SinCosPositions(16, 0.5)(16, 16).view(16, 16, 16)
    assert torch.equal(spread[::2, ::2], plain)  # every other one of a grid twice as fine


def test_first_half_of_sincos_encodes_the_column():
    positions = SinCosPositions(32)(5, 7).view(5, 7, 32)
    assert torch.equal(positions[..., :16], positions[:1, :, :16].expand(5, -1, -1))
    assert torch.equal(positions[..., 16:], positions[:, :1, 16:].expand(-1, 7, -1))
    assert len(positions.view(35, 32).unique(dim=0)) == 35


def test_sincos_has_no_parameters_and_checks_its_width():
    assert not list(SinCosPositions(8).parameters()) and not SinCosPositions(8).state_dict()
    with pytest.raises(ValueError, match="multiple of 4, not 30"):
        SinCosPositions(30)


def test_learned_positions_are_the_parameter():
    positions = LearnedPositions((2, 3), 8)
    assert positions.weight.shape == (1, 6, 8)
    assert torch.equal(positions(2, 3), positions.weight[0])


@pytest.mark.parametrize("grid", [(8, 32), (32, 8), (16, 15), (24, 24), (1, 256)])
def test_learned_positions_refuse_another_grid_even_with_as_many_cells(grid):
    with pytest.raises(ValueError, match=rf"{grid[0]}x{grid[1]} patches.*16x16"):
        LearnedPositions((16, 16), 8)(*grid)


# --- strips: each its own grid

GRIDS = [(2, 3), (1, 6), (4, 2), (3, 1), (1, 1)]


@pytest.mark.parametrize("n", [8, 11], ids=["longest", "longer"])
@pytest.mark.parametrize("positions", [SinCosPositions(8), InterpolatedPositions((3, 2), 8)])
def test_each_strip_has_the_positions_of_its_own_grid(positions, n):
    found = positions.of_grids(torch.tensor(GRIDS), n)
    assert found.shape == (5, n, 8) and found.isfinite().all()
    for row, (height, width) in zip(found, GRIDS, strict=True):
        # fp32: weights of two sides multiplied at once, and not side by side
        torch.testing.assert_close(row[: height * width], positions(height, width), rtol=0, atol=1e-7)


def test_a_learned_table_of_strips_gets_the_gradient_of_all():
    positions = LearnedPositions((2, 3), 8)
    positions.of_grids(torch.tensor([[2, 3]] * 4), 9).sum().backward()
    assert torch.equal(positions.weight.grad, torch.full((1, 6, 8), 4.0))


@pytest.mark.parametrize("grid", [(3, 2), (1, 6), (4, 4)])
def test_learned_positions_refuse_a_strip_of_another_grid(grid):
    with pytest.raises(ValueError, match=rf"{grid[0]}x{grid[1]} patches.*2x3"):
        LearnedPositions((2, 3), 8).of_grids(torch.tensor([(2, 3), grid]), 16)


@pytest.mark.parametrize("positions", [SinCosPositions(8), InterpolatedPositions((2, 3), 8)])
@pytest.mark.parametrize("grid", [(2, 3), (0, 4)])
def test_a_grid_that_does_not_fit_its_strip_is_refused(positions, grid):
    with pytest.raises(ValueError, match=f"{grid[0]}x{grid[1]} patches in a strip of 5"):
        positions.of_grids(torch.tensor([(1, 5), grid]), 5)


@pytest.mark.parametrize("positions", [LearnedPositions((2, 3), 8), InterpolatedPositions((2, 3), 8)])
def test_a_table_is_called_once_for_all_strips(positions):
    """Under ZeRO-3 every call gathers the table, which all ranks must do equally often, whatever their grids."""
    calls = []
    positions.register_forward_hook(lambda *_: calls.append(1))
    grids = GRIDS if isinstance(positions, InterpolatedPositions) else [(2, 3)] * 2
    positions.of_grids(torch.tensor(grids), 8)
    assert len(calls) == 1


def test_positions_on_a_canvas_are_those_of_each_image():
    positions = InterpolatedPositions((3, 2), 8)
    positions.double()
    real = torch.zeros(len(GRIDS) + 1, 4, 6, dtype=torch.bool)
    for canvas, (height, width) in zip(real, GRIDS, strict=False):
        canvas[:height, :width] = True
    real[2, 1, 0] = False  # a hole
    found = positions.of_canvas(real).unflatten(1, (4, 6))
    for canvas, (height, width) in zip(found, GRIDS, strict=False):
        torch.testing.assert_close(canvas[:height, :width].flatten(0, 1), positions(height, width), rtol=0, atol=1e-14)
    torch.testing.assert_close(found[-1].flatten(0, 1), positions(4, 6), rtol=0, atol=1e-14)  # nothing there


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 9, 16, 23])
def test_weights_are_those_of_resizing(size):
    """Against torch, which resizes the unit vectors; its own size is left as it is."""
    unit = torch.eye(8, dtype=torch.float64)[None, None]  # (1, 1, from, cells)
    expected = torch.nn.functional.interpolate(unit, size=(8, size), mode="bicubic", antialias=True)[0, 0].T
    found = bicubic_weights(torch.arange(size + 2)[None], torch.tensor([size]), 8)[0]
    torch.testing.assert_close(found[:size], expected, rtol=0, atol=1e-12)
    assert torch.equal(found[size:], found[size - 1 : size].expand(2, -1))
    assert size != 8 or torch.equal(found[:8], unit[0, 0])
