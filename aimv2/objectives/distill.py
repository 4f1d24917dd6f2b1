"""Distillation: an AIMv2 learns its own objective and, besides, what a frozen teacher makes of the same images.

Apple released distilled models but published no method: these losses are our choice (docs/post-training.md).

B samples, N patches of the student, N' of the teacher, D and E their widths, P patch side, T text positions,
V vocabulary.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from aimv2 import losses
from aimv2.data.batch import Batch, Counts
from aimv2.decoder import DecoderConfig, MultimodalDecoder
from aimv2.encoder import VisionConfig, VisionEncoder
from aimv2.flops import decoder_flops, encoder_flops, training_flops
from aimv2.masks import prefix_mask
from aimv2.objectives.aimv2 import AIMv2, AIMv2Config
from aimv2.objectives.checks import check_context, check_image_size, check_native
from aimv2.objectives.teacher import (
    Teacher,
    check_decoder,
    check_grid,
    check_strips,
    check_tokenizer,
    fingerprint,
    open_teacher,
    resize_features,
    resize_images,
)
from aimv2.pretrained import Checkpoint, open_checkpoint

if TYPE_CHECKING:  # it needs what only training has
    from aimv2.data.loader import DataConfig


@dataclass(slots=True, kw_only=True)
class DistillConfig:
    """L = L_student + feature_weight * L_feature + prediction_weight * (L_teacher_caption + alpha * L_teacher_pixel).

    L_student is AIMv2's loss and alpha its `pixel_weight`. What has weight 0 is left out.
    """

    student: AIMv2Config
    teacher: str  # whatever `load_model` reads; with a decoder if its predictions are used
    teacher_image_size: int | None = None  # pixels of what the teacher sees; None: as many as the student's
    # What is seen where features are compared: what the prefix mask shows, or, in a pass of its own, the whole image.
    # On the shapes world both are as good, but "full" takes 1.6 times as long; a teacher of another grid needs it.
    features: Literal["prefix", "full"] = "prefix"
    feature_weight: float = 1.0
    prediction_weight: float = 0.0  # predictions gained nothing there

    def __post_init__(self):
        if self.teacher.lower() in ("", "none"):
            raise ValueError(f"teacher {self.teacher!r}: expected a path or a name of the hub")
        for name, weight in (("feature_weight", self.feature_weight), ("prediction_weight", self.prediction_weight)):
            if weight < 0:
                raise ValueError(f"{name} {weight}: expected 0 or more")
        if not self.feature_weight and not self.prediction_weight:
            raise ValueError("feature_weight and prediction_weight are both 0: expected something to learn")
        if self.seen_by_teacher < 1 or self.image_size % self.vision.grid:
            raise ValueError(
                f"teacher_image_size {self.teacher_image_size}: expected at most the student's image_size "
                f"{self.vision.image_size}, or a multiple of the {self.vision.grid} patches along its side, and in "
                "either case a multiple of the teacher's patch_size"
            )

    def build(self) -> "Distill":
        """Raises ModelError without a teacher, ConfigError if it can't teach this student."""
        return Distill(self)

    @property
    def vision(self) -> VisionConfig:
        return self.student.vision

    @property
    def decoder(self) -> DecoderConfig:
        return self.student.decoder

    @property
    def vocab_size(self) -> int:
        return self.student.vocab_size

    @property
    def seen_by_teacher(self) -> int:
        """Pixels along a side."""
        return self.vision.image_size if self.teacher_image_size is None else self.teacher_image_size

    @property
    def image_size(self) -> int:
        """Of the data: the larger of what student and teacher see, from which the smaller is made."""
        return max(self.vision.image_size, self.seen_by_teacher)

    @property
    def data_patch_size(self) -> int:
        """Side of the student's patches in the pixels of the data, by which prefixes are drawn for its grid."""
        return self.image_size // self.vision.grid

    def check(self, data: "DataConfig") -> None:
        """Raises ValueError for data that student or teacher has no place for. The teacher itself isn't asked."""
        if self.teacher_image_size is None:
            check_image_size(data, self.image_size, "objective.student.vision.image_size")
        elif data.transform.image_size != self.image_size:
            raise ValueError(
                f"data.transform.image_size {data.transform.image_size}: expected {self.image_size}, the larger of "
                f"objective.student.vision.image_size {self.vision.image_size} and "
                f"objective.teacher_image_size {self.teacher_image_size}"
            )
        check_native(data, self.vision, "objective.student.vision")
        if data.native is not None and self.teacher_image_size is not None:
            raise ValueError(f"objective.teacher_image_size {self.teacher_image_size} with data.native: expected none")
        check_context(data, self.decoder.context_length, "objective.student.decoder.context_length")

    def check_sources(self, data: "DataConfig") -> None:
        """Ask the teacher, which is downloaded if it is a name of the hub.

        Raises:
            ModelError: there is none.
            ConfigError: it can't teach this student with these data.
        """
        checkpoint = open_checkpoint(self.teacher)
        if data.native is not None:
            check_strips(checkpoint, self.student)
        self.check_teacher(checkpoint)
        checkpoint.check_normalisation(data.transform)
        if self.prediction_weight:
            check_tokenizer(checkpoint, data)

    def check_teacher(self, checkpoint: Checkpoint) -> VisionConfig:
        """The teacher's encoder. Raises ConfigError if it can't teach this student."""
        must_match = {}
        if self.prediction_weight:
            check_decoder(checkpoint, self.student)
            must_match[f"objective.prediction_weight {self.prediction_weight}"] = "objective.prediction_weight=0"
        if self.feature_weight and self.features == "prefix":
            must_match["objective.features=prefix"] = "objective.features=full"
        check_grid(checkpoint, self.student, self.seen_by_teacher, must_match)
        return checkpoint.vision()[0]

    def training_flops(self, tokens: int) -> float:
        """Of one image of the configured size with so many caption tokens: the teacher only goes forward."""
        checkpoint = open_checkpoint(self.teacher)
        teacher = replace(checkpoint.vision()[0], image_size=self.seen_by_teacher)
        full = int(self.feature_weight > 0 and self.features == "full")
        masked = int(self.prediction_weight > 0 or self.features == "prefix")
        flops = training_flops(self.vision, self.decoder, tokens) + full * 3 * encoder_flops(self.vision)
        flops += (full + masked) * encoder_flops(teacher)
        if self.prediction_weight:
            flops += decoder_flops(teacher, checkpoint.whole()[0].decoder, tokens)
        return flops


class Distill(nn.Module):
    """A student AIMv2, and a teacher that is no part of the module: neither trained, sharded, saved nor exported."""

    def __init__(self, config: DistillConfig):
        super().__init__()
        self.settings = config
        self.student = AIMv2(config.student)
        width = config.check_teacher(open_checkpoint(config.teacher)).width
        self.projection = nn.Linear(config.vision.width, width) if config.feature_weight else None
        if self.projection is not None:
            nn.init.xavier_uniform_(self.projection.weight)
            nn.init.zeros_(self.projection.bias)
        self._teacher: Teacher | None = None

    @property
    def encoder(self) -> VisionEncoder:
        return self.student.encoder

    @property
    def decoder(self) -> MultimodalDecoder:
        return self.student.decoder

    @property
    def config(self) -> AIMv2Config:
        return self.student.config

    @property
    def exported(self) -> nn.Module:
        """What a run leaves behind: the student."""
        return self.student

    def fingerprints(self) -> dict[str, str]:
        """What a run needs besides its checkpoint to go on as it began."""
        return {"teacher": fingerprint(open_checkpoint(self.settings.teacher))}

    def prepare(self, data: "DataConfig") -> None:
        """Open the teacher, where the student's weights are by now: before others wait for its first batch."""
        self.teacher(native=data.native is not None)

    def forward(self, batch: Batch, counts: Counts) -> dict[str, Tensor]:
        """Losses of a micro-batch, each already divided by the optimizer step's global number of targets.

        `feature_loss` is a mean over the patches of each image, and so over images.
        """
        c, n, teacher = self.settings, batch.patch_counts(), self.teacher(native=batch.grid is not None)
        image, shown = self._images(batch)
        mask, real = prefix_mask(batch.prefix_length, batch.num_patches), batch.real_patches()
        features = self.encoder(image, mask, grid=batch.grid)  # (B, N, D)
        pixels, logits = self.decoder(features, batch.text, real)  # (B, N, 3P^2), (B, T, V)
        pixel_loss = losses.pixel(pixels, image, batch.prefix_length, c.vision.patch_size, n) / counts.patches
        caption_loss = losses.caption(logits, batch.text, batch.text_length) / counts.tokens
        loss = caption_loss + self.config.pixel_weight * pixel_loss
        parts = {"pixel_loss": pixel_loss, "caption_loss": caption_loss}
        if c.prediction_weight or c.features == "prefix":
            targets = teacher.see(shown, mask, batch.grid)  # (B, N, E)
        if c.prediction_weight:
            target_pixels, target_logits = teacher.predict(targets, batch.text, real)
            pixel_loss = losses.teacher_pixel(pixels, target_pixels, batch.prefix_length, n) / counts.patches
            caption_loss = losses.teacher_caption(logits, target_logits, batch.text_length) / counts.tokens
            loss = loss + c.prediction_weight * (caption_loss + self.config.pixel_weight * pixel_loss)
            parts |= {"teacher_pixel_loss": pixel_loss, "teacher_caption_loss": caption_loss}
        if c.feature_weight and c.features == "full":
            features = self.encoder(image, grid=batch.grid)
            targets = teacher.see(shown, None, batch.grid)  # (B, N', E)
            targets = targets if batch.grid is not None else resize_features(targets, c.vision.grid)
        if c.feature_weight:
            feature_loss = losses.features(self.projection(features), targets, n) / counts.samples
            loss = loss + c.feature_weight * feature_loss
            parts["feature_loss"] = feature_loss
        return {"loss": loss, **{name: part.detach() for name, part in parts.items()}}

    def _images(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What the student sees, and what the teacher sees."""
        c = self.settings
        if batch.grid is not None:
            return batch.image, batch.image
        if batch.num_patches != c.vision.num_patches:
            raise ValueError(
                f"images of {batch.num_patches} patches: expected {c.vision.num_patches}, the student's, as data of "
                f"{c.image_size} px give at a patch size of {c.data_patch_size}"
            )
        return resize_images(batch.image, c.vision.image_size), resize_images(batch.image, c.seen_by_teacher)

    @torch.compiler.disable
    def teacher(self, native: bool = False) -> Teacher:
        """Where the student is, and of its dtype; for images of any size or of the one that it is shown."""
        c, weight = self.settings, self.encoder.patch_embed.weight
        image_size = "native" if native else c.seen_by_teacher
        if self._teacher is None or self._teacher.opened_for != (image_size, weight.dtype, weight.device):
            self._teacher = open_teacher(c.teacher, c.prediction_weight > 0, image_size, weight.dtype, weight.device)
        return self._teacher
