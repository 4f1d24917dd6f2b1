"""Positions of patches on their grid: (h, w, device) -> (h*w, D). They check the grid, not the count of patches.

`of_grids` gives them to a batch of strips, images of different grids as rows of patches: B images, N patches of the
longest, `grids` (B, 2) their rows and columns; `InterpolatedPositions.of_canvas` to images that are padded to one size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def resize_positions(table: Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """(1, h*w, D) -> (1, h'*w', D): bicubic, anti-aliased where it shrinks, with the corners of the images aligned."""
    if grid == new_grid:
        return table
    image = table.to(torch.promote_types(table.dtype, torch.float32)).unflatten(1, grid)
    image = image.permute(0, 3, 1, 2)  # (1, D, h, w)
    image = F.interpolate(image, size=new_grid, mode="bicubic", antialias=True, align_corners=False)
    return image.flatten(2).transpose(1, 2).contiguous().to(table.dtype)


class LearnedPositions(nn.Module):
    """One learned vector for each cell of a fixed grid (AIMv2 at 224, 336 and 448 px)."""

    def __init__(self, grid: tuple[int, int], width: int):
        super().__init__()
        self.grid = grid
        self.weight = nn.Parameter(torch.empty(1, grid[0] * grid[1], width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, height: int, width: int, device: torch.device | None = None) -> Tensor:
        """(h*w, D), where the parameter lives; raises ValueError for another grid, were its count of cells the same."""
        if (height, width) != self.grid:
            raise ValueError(
                f"image of {height}x{width} patches, but the learned positions are for "
                f"{self.grid[0]}x{self.grid[1]}: resize the image, or interpolate the positions when loading"
            )
        return self.weight[0]

    def of_grids(self, grids: Tensor, n: int) -> Tensor:
        """(B, N, D), each image's own and then zeros; raises ValueError for another grid than the table's."""
        _check_fit(grids, n)
        table, *_ = [self(*grid) for grid in set(map(tuple, grids.tolist()))]  # it is one, or an error
        return F.pad(table, (0, 0, 0, n - len(table))).expand(len(grids), -1, -1)


class InterpolatedPositions(LearnedPositions):
    """Learned positions of one grid, resized to that of each image: any size at inference, at the table's own cost."""

    def forward(self, height: int, width: int, device: torch.device | None = None) -> Tensor:
        """(h*w, D), where the parameter lives, for any grid."""
        return resize_positions(self.weight, self.grid, (height, width))[0]

    def of_grids(self, grids: Tensor, n: int) -> Tensor:
        """(B, N, D), each image's own, to rounding as `forward`; behind its patches those of the last row.

        Raises ValueError for a grid that doesn't fit.
        """
        _check_fit(grids, n)
        patch = torch.arange(n, device=grids.device)
        return self._at(patch // grids[:, 1:], patch % grids[:, 1:], grids)

    def of_canvas(self, real: Tensor) -> Tensor:
        """(B, h*w, D) for smaller images on a canvas of h x w patches, `real` (B, h, w) where they are.

        An image reaches from the top left to its last row and column; if there is none, over the whole canvas.
        """
        height, width = real.shape[1:]
        row, column = torch.arange(height, device=real.device), torch.arange(width, device=real.device)
        rows, columns = real.any(dim=2) * (row + 1), real.any(dim=1) * (column + 1)  # (B, h), (B, w)
        grids = torch.stack([rows.amax(dim=1), columns.amax(dim=1)], dim=1)
        grids = torch.where(grids > 0, grids, torch.tensor([height, width], device=real.device))
        shape = len(real), height * width
        return self._at(row.repeat_interleave(width).expand(shape), column.repeat(height).expand(shape), grids)

    def _at(self, row: Tensor, column: Tensor, grids: Tensor) -> Tensor:
        """Rows and columns (B, N) of images of `grids` -> (B, N, D).

        The module is called once, with its own grid: under ZeRO-3 a call is a collective, and ranks have unlike grids.
        """
        table = self(*self.grid)
        table = table.to(torch.promote_types(table.dtype, torch.float32))  # (h*w, D)
        weights = [
            bicubic_weights(place, size, source).to(table)
            for place, size, source in zip((row, column), grids.T, self.grid, strict=True)
        ]
        return torch.einsum("bni,bnj->bnij", *weights).flatten(2) @ table


def bicubic_weights(place: Tensor, size: Tensor, source: int) -> Tensor:
    """Shares (B, N, source) that cells of a source have in cells `place` (B, N) of its resizing to `size` (B,).

    As `resize_positions` along one side. Cells beyond the last are as the last.
    """
    scale = (source / size.double())[:, None]  # (B, 1)
    centre = (torch.minimum(place, size[:, None] - 1) + 0.5) * scale
    cells = torch.arange(source, device=place.device) + 0.5
    x = ((cells - centre[..., None]) / scale.clamp(min=1)[..., None]).abs()  # wider where it shrinks: anti-aliasing
    near, far = (1.5 * x - 2.5) * x**2 + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2  # Keys' cubic, a = -0.5
    shares = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    return shares / shares.sum(dim=-1, keepdim=True)


class SinCosPositions(nn.Module):
    """Fixed 2-D sines and cosines for any grid (AIM v1, AIMv2-native), without parameters.

    Laid out [sin w | cos w | sin h | cos h]: the first half encodes the column. Temperature 10000. `scale` multiplies
    rows and columns: 2/3 lays a grid of 24 patches over the positions of one of 16.
    """

    def __init__(self, width: int, scale: float = 1.0):
        super().__init__()
        if width % 4:
            raise ValueError(f"2-D sincos positions need a width that is a multiple of 4, not {width}")
        self.width, self.scale = width, scale

    def forward(self, height: int, width: int, device: torch.device | None = None) -> Tensor:
        row = torch.arange(height, device=device).repeat_interleave(width)
        column = torch.arange(width, device=device).repeat(height)
        return self._at(row, column, max(height, width))

    def of_grids(self, grids: Tensor, n: int) -> Tensor:
        """(B, N, D), each image's own; behind its patches its grid goes on. Raises ValueError as `_check_fit`."""
        _check_fit(grids, n)
        columns = grids[:, 1:]  # (B, 1)
        patch = torch.arange(n, device=grids.device)
        return self._at(patch // columns, patch % columns, n)

    def _at(self, row: Tensor, column: Tensor, length: int) -> Tensor:
        """Rows and columns (...) below `length` -> (..., D)."""
        quarter = self.width // 4
        frequency = 10000.0 ** (-torch.arange(quarter, dtype=torch.float32, device=row.device) / quarter)
        place = torch.arange(length, dtype=torch.float32, device=row.device) * self.scale
        angle = place[:, None] * frequency  # (length, D/4)
        table = torch.cat([angle.sin(), angle.cos()], dim=1)
        return torch.cat([table[column], table[row]], dim=-1)


def _check_fit(grids: Tensor, n: int) -> None:
    """Raises ValueError for a grid of more than `n` patches or of none, where asking doesn't wait for a device."""
    if grids.device.type != "cpu" or torch.compiler.is_compiling():
        return
    counts = grids.prod(dim=1)
    if bad := grids[(counts > n) | (counts < 1)].tolist():
        raise ValueError(f"grid of {bad[0][0]}x{bad[0][1]} patches in a strip of {n}")
