import math

import numpy as np
import pytest
import torch

from aimv2.positions import LearnedPositions, SinCosPositions


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
