"""LiT on AIMv2: an image tower and a text tower whose features can be compared.

B images or captions, N patches, T token positions, D width, E projection.
Sources: AIMv2 (arXiv 2411.14402), LiT (arXiv 2111.07991), Apple's inference code. The objective that trains it freezes
the image tower; here nothing is frozen.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aimv2.encoder import VisionConfig, VisionEncoder
from aimv2.layers import AttentionPool, at_least_fp32
from aimv2.text_encoder import TextConfig, TextEncoder

INITIAL_SCALE = 1 / 0.07
MAX_SCALE = 100.0


@dataclass(slots=True, kw_only=True)
class LiTConfig:
    """With `vision_config("large")`, the published model."""

    vision: VisionConfig
    text: TextConfig = field(default_factory=TextConfig)
    projection: int = 768
    pool_heads: int = 8

    def __post_init__(self):
        if self.vision.width % self.pool_heads:
            raise ValueError(f"vision width {self.vision.width} is not a multiple of pool_heads {self.pool_heads}")
        if self.projection < 1:
            raise ValueError(f"projection {self.projection}: expected at least 1")

    def build(self) -> "LiT":
        return LiT(self)


class LiT(nn.Module):
    """Images and captions -> unit vectors of one space, by the names open_clip has.

    logits[i, j] = scale * <image i, caption j>, scale = exp(clamp(log_scale, 0, ln 100)).
    """

    def __init__(self, config: LiTConfig):
        super().__init__()
        c = self.config = config
        self.encoder = VisionEncoder(c.vision)
        self.pool = AttentionPool(c.vision.width, c.pool_heads)
        self.image_projection = nn.Linear(c.vision.width, c.projection, bias=False)
        self.text_encoder = TextEncoder(c.text)
        self.text_projection = nn.Linear(c.text.width, c.projection, bias=False)
        self.log_scale = nn.Parameter(torch.empty(()))
        nn.init.constant_(self.log_scale, math.log(INITIAL_SCALE))

    def encode_image(self, images: Tensor, normalize: bool = True, mask: Tensor | None = None) -> Tensor:
        """Images (B, 3, H, W) -> (B, E): unit vectors in at least fp32, or the raw projection in the weights' type.

        `mask`, boolean (B, N), is True where a patch is real, for images that were padded to one size.
        """
        patches = self.encoder(images, real=mask)  # (B, N, D)
        return self.encode_patches(patches, normalize, mask)

    def encode_patches(self, patches: Tensor, normalize: bool = True, mask: Tensor | None = None) -> Tensor:
        """What `encode_image` does after the encoder, with its output (B, N, D)."""
        features = self.image_projection(self.pool(patches, mask))
        return unit(features) if normalize else features

    def encode_text(self, text: Tensor, normalize: bool = True) -> Tensor:
        """Token ids (B, T) -> (B, E): unit vectors in at least fp32, or the raw projection in the weights' type."""
        features = self.text_projection(self.text_encoder(text))
        return unit(features) if normalize else features

    @property
    def logit_scale(self) -> Tensor:
        """The LOGARITHM of the scale, clamped: open_clip's and transformers' users call `logit_scale.exp()`."""
        return bounded(at_least_fp32(self.log_scale).reshape(()))  # (1,) in training

    @property
    def scale(self) -> Tensor:
        return self.logit_scale.exp()

    def forward(
        self, images: Tensor | None, text: Tensor, *, patches: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """-> unit vectors of the images (B, E) and of the captions (B', E), and the scale: open_clip's own triple.

        `patches` (B, N, D), the encoder's output, stands for the images where it is there already.
        """
        if patches is None:
            return self.encode_image(images, mask=mask), self.encode_text(text), self.scale
        return self.encode_patches(patches, mask=mask), self.encode_text(text), self.scale

    def get_logits(self, images: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """-> logits per image (B, B') and per caption (B', B), from B images and B' captions."""
        image_features, text_features, scale = self(images, text)
        logits = scale * image_features @ text_features.T
        return logits, logits.T


def bounded(log_scale: Tensor) -> Tensor:
    return log_scale.clamp(0, math.log(MAX_SCALE))


def unit(x: Tensor) -> Tensor:
    """x / |x| in at least fp32: at scale 100, a length rounded to bf16 moves a logit by up to 0.2."""
    return F.normalize(at_least_fp32(x), dim=-1)
