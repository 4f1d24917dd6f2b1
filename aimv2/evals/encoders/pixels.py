"""Raw pixels as an encoder: the floor under all others. B images, S side, P patch side, N = 8*8 patches, D = 3P^2."""

from collections.abc import Sequence

from torch import Tensor, nn

from aimv2.evals.encoders.interface import BlockOutput, Encoder
from aimv2.patches import patchify
from aimv2.preprocessing import ProcessorConfig

SIDE, GRID = 32, 8


class PixelEncoder(Encoder):
    """One block, which only cuts the image up; the image feature is all of it, (B, 3S^2)."""

    def _pass(
        self, images: Tensor, numbers: Sequence[int], output: bool
    ) -> tuple[list[BlockOutput], BlockOutput | None]:
        patches = BlockOutput(patchify(images, images.shape[-1] // GRID), None)
        return [patches for _ in numbers], patches

    def _pooled(self, images: Tensor) -> Tensor:
        return images.flatten(1)

    def norm(self, x: Tensor) -> Tensor:
        return x


def open_pixels(side: str, spec: str, image_size: int | None) -> PixelEncoder:
    """`pixels` or `pixels:SIDE`; the shortest edge is resized to it, pixels are scaled to [-1, 1]."""
    text = side or str(image_size or SIDE)
    if not text.isdecimal() or int(text) < GRID or int(text) % GRID:
        raise ValueError(f"{spec}: side {text!r}: expected a multiple of {GRID}")
    if image_size not in (None, int(text)):
        raise ValueError(f"{spec}: image_size {image_size}: expected {text}, as in the spec")
    size, half = int(text), (0.5, 0.5, 0.5)
    config = ProcessorConfig(image_size=size, patch_size=size // GRID, mean=half, std=half)
    width = 3 * (size // GRID) ** 2
    return PixelEncoder(
        nn.Identity(),
        config,
        spec=spec,
        name=spec,
        source="pixels",
        width=width,
        depth=1,
        heads=1,
        grid=(GRID, GRID),
        trained=False,
    )
