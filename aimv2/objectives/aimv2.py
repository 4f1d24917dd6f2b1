"""AIMv2: predict the image's next patches, then its caption's tokens (arXiv 2411.14402, section 2.1)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from aimv2 import losses
from aimv2.data.batch import Batch, Counts
from aimv2.decoder import DecoderConfig, MultimodalDecoder
from aimv2.encoder import VisionConfig, VisionEncoder
from aimv2.flops import training_flops
from aimv2.masks import prefix_mask
from aimv2.objectives.checks import check_context, check_image_size, check_native

if TYPE_CHECKING:  # it needs what only training has
    from aimv2.data.loader import DataConfig


@dataclass(slots=True, kw_only=True)
class AIMv2Config:
    vision: VisionConfig
    decoder: DecoderConfig
    pixel_weight: float = 0.4  # alpha; it goes with a pixel loss that is a mean over the 3P^2 values of a patch

    def build(self) -> "AIMv2":
        return AIMv2(self)

    @property
    def vocab_size(self) -> int:
        return self.decoder.vocab_size

    @property
    def data_patch_size(self) -> int:
        """Side of a patch in the pixels of the data."""
        return self.vision.patch_size

    def check(self, data: "DataConfig") -> None:
        """Raises ValueError for data that the model has no place for."""
        check_image_size(data, self.vision.image_size, "objective.vision.image_size")
        check_native(data, self.vision, "objective.vision")
        check_context(data, self.decoder.context_length, "objective.decoder.context_length")

    def training_flops(self, tokens: int) -> float:
        """Of one image of the configured size with so many caption tokens."""
        return training_flops(self.vision, self.decoder, tokens)


class AIMv2(nn.Module):
    """L = L_caption + alpha * L_pixel over [image patches ; caption] (paper eq. 2-3)."""

    def __init__(self, config: AIMv2Config):
        super().__init__()
        self.config = config
        self.encoder = VisionEncoder(config.vision)
        self.decoder = MultimodalDecoder(config.decoder, config.vision.width, config.vision.patch_size)

    @property
    def exported(self) -> nn.Module:
        """What a run leaves behind: itself."""
        return self

    def forward(self, batch: Batch, counts: Counts) -> dict[str, Tensor]:
        """Losses of a micro-batch, each already divided by the optimizer step's global number of targets."""
        mask = prefix_mask(batch.prefix_length, batch.num_patches)
        features = self.encoder(batch.image, mask, grid=batch.grid)  # (B, N, D)
        pixels, logits = self.decoder(features, batch.text, batch.real_patches())  # (B, N, 3P^2), (B, T, V)
        patch_size = self.config.vision.patch_size
        pixel_loss = losses.pixel(pixels, batch.image, batch.prefix_length, patch_size, batch.patch_counts())
        pixel_loss = pixel_loss / counts.patches
        caption_loss = losses.caption(logits, batch.text, batch.text_length) / counts.tokens
        loss = caption_loss + self.config.pixel_weight * pixel_loss
        return {"loss": loss, "pixel_loss": pixel_loss.detach(), "caption_loss": caption_loss.detach()}
