"""Which blocks of an encoder are looked at, written as on a command line.

B images, N patches, D width.
"""

import re

from torch import Tensor

from aimv2.evals.encoders.interface import Encoder, mean_of

WINDOW = 6  # AIM (arXiv 2401.08541) averages six blocks: the last, or the best

_BLOCK, _RANGE, _LAST = re.compile(r"-?\d+"), re.compile(r"(\d+)-(\d+)"), re.compile(r"last(\d+)")


def parse_layers(text: str, depth: int) -> dict[str, tuple[int, ...]]:
    """Streams of features by name: the blocks, counted from 0, whose raw outputs are averaged; none for the output.

        output      the encoder's own output: {"output": ()}
        5, -1       one block, from the last with negative numbers: {"block_05": (5,)}
        12-17       {"blocks_12-17": (12, ..., 17)}
        last6       the last six, named by their numbers
        all         every block, and the output
        windows     every run of six blocks; of all, if there are fewer

    Commas join. Raises ValueError for anything else and for blocks that are not there.
    """
    streams: dict[str, tuple[int, ...]] = {}
    for part in text.split(","):
        for numbers in _numbers(part.strip(), text, depth):
            streams[_name(numbers)] = numbers
    return streams


def streams(encoder: Encoder, images: Tensor, layers: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """(B, N, D) of the patches for each stream of `parse_layers`, from one pass no longer than needed.

    Raises ValueError for a mean of blocks of several shapes.
    """
    wanted = sorted({number for numbers in layers.values() for number in numbers})
    found, output = encoder.forward(images, wanted, output=() in layers.values())
    blocks = dict(zip(wanted, found, strict=True))
    return {
        name: mean_of([blocks[number] for number in numbers]).patches if numbers else output.patches
        for name, numbers in layers.items()
    }


def _numbers(part: str, text: str, depth: int) -> list[tuple[int, ...]]:
    """The blocks of each stream that one word stands for."""
    if part == "output":
        return [()]
    if part == "all":
        return [(number,) for number in range(depth)] + [()]
    if part == "windows":
        size = min(WINDOW, depth)
        return [tuple(range(first, first + size)) for first in range(depth - size + 1)]
    if match := _RANGE.fullmatch(part):
        first, last = int(match[1]), int(match[2])
    elif match := _LAST.fullmatch(part):
        first, last = depth - int(match[1]), depth - 1
    elif _BLOCK.fullmatch(part):
        first = last = int(part) + (depth if part.startswith("-") else 0)
    else:
        raise ValueError(f"layers {text!r}: expected output, all, windows, lastN, a block or FIRST-LAST, not {part!r}")
    if not 0 <= first <= last < depth:
        raise ValueError(f"layers {text!r}: {part!r} is not within blocks 0 to {depth - 1}")
    return [tuple(range(first, last + 1))]


def _name(numbers: tuple[int, ...]) -> str:
    if len(numbers) < 2:
        return f"block_{numbers[0]:02d}" if numbers else "output"
    return f"blocks_{numbers[0]:02d}-{numbers[-1]:02d}"
