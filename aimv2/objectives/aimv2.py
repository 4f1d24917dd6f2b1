"""AIMv2: predict the image's next patches, then its caption's tokens (arXiv 2411.14402, section 2.1)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from aimv2 import losses
from aimv2.data.batch import Batch, Counts
from aimv2.decoder import DecoderConfig, MultimodalDecoder
from aimv2.encoder import VisionConfig, VisionEncoder
from aimv2.flops import training_flops
from aimv2.masks import prefix_mask
from aimv2.objectives.checks import check_context, check_images
from aimv2.objectives.interface import Objective, ObjectiveConfig

if TYPE_CHECKING:  # it needs what only training has
    from aimv2.data.loader import DataConfig


@dataclass(slots=True, kw_only=True)
class AIMv2Config(ObjectiveConfig):
    vision: VisionConfig
    decoder: DecoderConfig
    pixel_weight: float = 0.4  # alpha; it goes with a pixel loss that is a mean over the 3P^2 values of a patch

    def build(self) -> "AIMv2":
        return AIMv2(self)

    @property
    def vocab_size(self) -> int:
        return self.decoder.vocab_size

    def check(self, data: "DataConfig") -> None:
        check_images(data, self.vision, "objective.vision")
        check_context(data, self.decoder.context_length, "objective.decoder.context_length")

    def training_flops(self, tokens: int) -> float:
        return training_flops(self.vision, self.decoder, tokens)


class AIMv2(Objective):
    """L = L_caption + alpha * L_pixel over [image patches ; caption] (paper eq. 2-3)."""

    def __init__(self, config: AIMv2Config):
        super().__init__()
        self.config = config
        self.encoder = VisionEncoder(config.vision)
        self.decoder = MultimodalDecoder(config.decoder, config.vision.width, config.vision.patch_size)

    def forward(self, batch: Batch, counts: Counts) -> dict[str, Tensor]:
        _, pixels, logits = self.predict(batch.image, batch, prefix_mask(batch.prefix_length, batch.num_patches))
        return self.losses(pixels, logits, batch.image, batch, counts)

    def predict(self, image: Tensor, batch: Batch, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-> features (B, N, D), pixels (B, N, 3P^2), logits (B, T, V); `image` is the batch's, maybe resized."""
        features = self.encoder(image, mask, grid=batch.grid)
        return features, *self.decoder(features, batch.text, batch.real_patches())

    def losses(self, pixels: Tensor, logits: Tensor, image: Tensor, batch: Batch, counts: Counts) -> dict[str, Tensor]:
        patch_size, patches = self.config.vision.patch_size, batch.patch_counts()
        pixel_loss = losses.pixel(pixels, image, batch.prefix_length, patch_size, patches) / counts.patches
        caption_loss = losses.caption(logits, batch.text, batch.text_length) / counts.tokens
        loss = caption_loss + self.config.pixel_weight * pixel_loss
        return {"loss": loss, "pixel_loss": pixel_loss.detach(), "caption_loss": caption_loss.detach()}
