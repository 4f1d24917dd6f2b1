"""A view of one vector an image: the encoder's image feature, or means over the patches of its blocks.

B images, N patches, D width, S side of an image.
"""

from dataclasses import dataclass

from torch import Tensor

from aimv2.evals.encoders import Encoder, parse_layers, streams

POOLED = "pooled"


@dataclass(frozen=True, slots=True)
class PooledStreams:
    """layers: as `parse_layers` reads it, and "pooled", the encoder's own image feature; commas join: "pooled,all"."""

    layers: str = POOLED

    def __post_init__(self):
        split_words(self.layers)

    @property
    def key(self) -> str:
        return "means " + self.layers.replace(" ", "")

    def __call__(self, encoder: Encoder, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, S, S) -> {stream: (B, D)}."""
        pooled, blocks = split_words(self.layers, POOLED)
        found = {POOLED: encoder.pooled(images)} if pooled else {}
        return found | means_of_blocks(encoder, images, blocks)


def split_words(layers: str, *names: str) -> tuple[set[str], str]:
    """Which of `names` are among the words that commas join, and the other words, for `parse_layers`.

    Raises ValueError for an empty word.
    """
    words = [word.strip() for word in layers.split(",")]
    if not all(words):
        raise ValueError(f"layers {layers!r}: expected a stream before and after each comma")
    return {word for word in words if word in names}, ",".join(word for word in words if word not in names)


def means_of_blocks(encoder: Encoder, images: Tensor, layers: str) -> dict[str, Tensor]:
    """{stream: (B, D)} of `parse_layers`; none for ""."""
    if not layers:
        return {}
    patches = streams(encoder, images, parse_layers(layers, encoder.depth))  # each (B, N, D)
    return {name: value.mean(dim=1) for name, value in patches.items()}
