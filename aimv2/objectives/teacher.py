"""A frozen model to learn from, and whether it can teach a student.

B images, S side of a square image, N patches, E width.
"""

import hashlib
import json
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from aimv2.config import ConfigError
from aimv2.decoder import MultimodalDecoder
from aimv2.encoder import VisionEncoder
from aimv2.exports import empty_model, shapes_of
from aimv2.objectives.aimv2 import AIMv2Config
from aimv2.pretrained import Checkpoint, load_encoder, open_checkpoint, outside_zero_init
from aimv2.weights import digest

if TYPE_CHECKING:  # it needs what only training has
    from aimv2.data.loader import DataConfig


@dataclass(eq=False)
class Teacher:
    """In eval mode and without gradients."""

    encoder: VisionEncoder
    decoder: MultimodalDecoder | None
    opened_for: tuple[int | str, torch.dtype, torch.device]  # size of the images

    @torch.no_grad()
    def see(self, image: Tensor, mask: Tensor | None, grid: Tensor | None) -> Tensor:
        """Features (B, N, E); arguments as the encoder's."""
        return self.encoder(image, mask, grid=grid)

    @torch.no_grad()
    def predict(self, features: Tensor, text: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
        """Pixels (B, N, 3P^2) and logits (B, T, V); arguments as the decoder's."""
        return self.decoder(features, text, real)


_OPEN: WeakValueDictionary[tuple, Teacher] = WeakValueDictionary()


def open_teacher(
    source: str, with_decoder: bool, image_size: int | str, dtype: torch.dtype, device: torch.device
) -> Teacher:
    """The teacher for images of `image_size`, `load_encoder`'s, shared by all who ask while it is in use.

    The whole copy of an objective that is evaluated under ZeRO-3 then does without one of its own.
    """
    key = (source, with_decoder, image_size, dtype, device)
    if (teacher := _OPEN.get(key)) is None:
        encoder = load_encoder(source, image_size=image_size, dtype=dtype, device=device).encoder
        decoder = _read_decoder(source, dtype, device) if with_decoder else None
        teacher = _OPEN[key] = Teacher(encoder, decoder, (image_size, dtype, device))
    return teacher


def _read_decoder(source: str, dtype: torch.dtype, device: torch.device) -> MultimodalDecoder:
    """Without the encoder, and one tensor at a time: where it goes there is no room for another copy of the model."""
    checkpoint = open_checkpoint(source, device=device)
    model = checkpoint.named(empty_model, checkpoint.whole()[0])
    checkpoint.check(shapes_of(model), None, "")
    with outside_zero_init():
        weights = {name: checkpoint.weights[f"decoder.{name}"].to(dtype) for name in model.decoder.state_dict()}
        model.decoder.load_state_dict(weights, assign=True)
    return model.decoder.requires_grad_(False).eval()


def fingerprint(checkpoint: Checkpoint) -> str:
    """Of its weights, and of what they don't show and differs from our defaults: heads, eps, positions."""
    config = json.dumps(_described(checkpoint.whole()[0]), sort_keys=True)
    weights = digest((name, checkpoint.weights[name]) for name in sorted(checkpoint.weights.shapes))
    return hashlib.sha256(f"{weights} {config}".encode()).hexdigest()


def _described(config: Any) -> dict[str, Any]:
    """Defaults are left out: a field that is added later, with the default that changes nothing, shows nowhere."""
    values = {field.name: (getattr(config, field.name), field.default) for field in fields(config)}
    return {
        name: _described(value) if is_dataclass(value) else value
        for name, (value, default) in values.items()
        if value != default
    }


def check_grid(checkpoint: Checkpoint, student: AIMv2Config, image_size: int, must_match: dict[str, str]) -> None:
    """Whether it can see images of `image_size`, and in the student's patches if there are settings that need that.

    must_match: these settings, each with the one that doesn't need it.

    This and the others below raise ConfigError if not: a teacher that can't serve is a mistake of the run's config.
    """
    patch_size, ours = checkpoint.vision()[0].patch_size, student.vision.grid
    grid, rest = divmod(image_size, patch_size)
    right = ours * patch_size  # it suits both, and everything that may be compared
    if rest:
        raise ConfigError(
            f"{checkpoint.path} has patches of {patch_size} px: expected an objective.teacher_image_size that is a "
            f"multiple, not {image_size}, as {right}"
        )
    if must_match and grid != ours:
        raise ConfigError(
            f"{checkpoint.path} sees {grid}x{grid} patches in {image_size} px, the student {ours}x{ours}, but "
            f"{' and '.join(must_match)} compares them one by one: expected objective.teacher_image_size={right}, "
            f"or {' and '.join(must_match.values())}"
        )


def check_strips(checkpoint: Checkpoint, student: AIMv2Config) -> None:
    """Whether it has the patches of the student, in which images of native resolution come."""
    theirs, ours = checkpoint.vision()[0].patch_size, student.vision.patch_size
    if theirs != ours:
        raise ConfigError(
            f"{checkpoint.path} has patches of {theirs} px, but data.native cuts images into the student's, {ours} px: "
            "expected a teacher of the same, or data.native=none"
        )


def check_decoder(checkpoint: Checkpoint, student: AIMv2Config) -> None:
    """Whether it predicts what the student predicts."""
    config = checkpoint.whole()[0]
    offer = "expected another teacher, or objective.prediction_weight=0"
    if not isinstance(config, AIMv2Config):
        raise ConfigError(f"{checkpoint.path} has no decoder to predict with: {offer}")
    for key, theirs, ours in (
        ("vocab_size", config.vocab_size, student.vocab_size),
        ("patch_size", config.vision.patch_size, student.vision.patch_size),
    ):
        if theirs != ours:
            raise ConfigError(f"{checkpoint.path} predicts for {key} {theirs}, but the student's is {ours}: {offer}")
    if config.decoder.context_length < student.decoder.context_length:
        raise ConfigError(
            f"{checkpoint.path} has a context of {config.decoder.context_length} tokens, but the student's captions "
            f"may have {student.decoder.context_length}: {offer}"
        )


def check_tokenizer(checkpoint: Checkpoint, data: "DataConfig") -> None:
    """Whether its tokens are those of the data."""
    from aimv2.data.tokenizer import open_tokenizer

    theirs = (checkpoint.config.get("tokenizer") or {}).get("sha256")
    ours = open_tokenizer(data.tokenizer).fingerprint
    if theirs != ours:
        described = "no tokenizer beside it" if theirs is None else f"the tokenizer of sha256 {theirs[:12]}"
        raise ConfigError(
            f"{checkpoint.path} has {described}, not data.tokenizer {data.tokenizer}, {ours[:12]}: "
            "expected the same, or objective.prediction_weight=0"
        )


def resize_images(image: Tensor, size: int) -> Tensor:
    """(B, 3, S, S) -> (B, 3, size, size): bicubic, anti-aliased where it shrinks."""
    if image.shape[-1] == size:
        return image
    return F.interpolate(image, size=(size, size), mode="bicubic", antialias=True, align_corners=False)


def resize_features(features: Tensor, grid: int) -> Tensor:
    """(B, N, E) of a square grid -> (B, grid^2, E): bilinear, a weighted mean where it shrinks."""
    side = round(features.shape[1] ** 0.5)
    if side == grid:
        return features
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    image = features.unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (B, E, h, w)
    image = F.interpolate(image, size=(grid, grid), mode="bilinear", antialias=True, align_corners=False)
    return image.flatten(2).transpose(1, 2)
