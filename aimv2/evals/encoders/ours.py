"""Encoders of this package: exports and every layout that `load_encoder` reads, untrained ones, and one in training.

B images, N patches, D width.
"""

import copy
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from aimv2.encoder import SIZES, VisionEncoder
from aimv2.evals.encoders.interface import BlockOutput, Encoder
from aimv2.evals.encoders.taps import tap
from aimv2.preprocessing import ProcessorConfig
from aimv2.pretrained import load_configs, load_encoder

RANDOM = "random:"


class OurEncoder(Encoder):
    """Of any `VisionEncoder`. There is no CLS token; the image feature is the mean of the patches."""

    def _pass(
        self, images: Tensor, numbers: Sequence[int], output: bool
    ) -> tuple[list[BlockOutput], BlockOutput | None]:
        model = self.model if output else _first_blocks(self.model, max(numbers) + 1)
        found, last = tap(lambda: model(images), self.model.blocks, numbers)
        return [BlockOutput(patches, None) for patches in found], BlockOutput(last, None)

    def _pooled(self, images: Tensor) -> Tensor:
        return self.model(images).mean(dim=1)

    @torch.no_grad()
    def norm(self, x: Tensor) -> Tensor:
        return self.model.norm(x.to(self.model.norm.weight.dtype)).float()


def encoder_of(model: VisionEncoder, processing: ProcessorConfig, spec: str = "model") -> OurEncoder:
    """An encoder that may be in training: it keeps its mode, dtype and gradients, evaluations don't see them.

    Raises ValueError for native preprocessing: an evaluation takes all images at one size.
    """
    if processing.resize == "native":
        raise ValueError(f"{spec}: a native encoder takes images of any size, evaluations one: expected an image_size")
    side = processing.image_size // model.config.patch_size
    c = model.config
    return OurEncoder(
        model,
        processing,
        spec=spec,
        name=spec,
        source="aimv2",
        width=c.width,
        depth=c.depth,
        heads=c.heads,
        grid=(side, side),
        settings={name: value for name, value in asdict(c).items() if name != "checkpointing"},
    )


def open_ours(path: str, spec: str, image_size: int | None) -> OurEncoder:
    """`aimv2:PATH`, whatever `load_encoder` takes."""
    if path.startswith(RANDOM):
        return open_random(path.removeprefix(RANDOM), spec, image_size)
    loaded = load_encoder(path, image_size=image_size, dtype=torch.float32)
    return encoder_of(loaded.encoder.requires_grad_(False), loaded.processor.config, spec)


def open_random(path: str, spec: str, image_size: int | None) -> OurEncoder:
    """`random:PATH`: the architecture and preprocessing of what `load_encoder` takes, as before training.

    Its weights come from torch's generator. PATH may also be a published size, as large-336.
    """
    if not Path(path).exists() and any(path == size or path.startswith(f"{size}-") for size in SIZES):
        path = RANDOM + path
    vision, processing = load_configs(path, image_size=image_size)
    encoder = encoder_of(VisionEncoder(vision).eval().requires_grad_(False), processing, spec)
    encoder.trained = False
    return encoder


def _first_blocks(model: VisionEncoder, number: int) -> VisionEncoder:
    """The same encoder without its later blocks; it shares the others."""
    shorter = copy.copy(model)
    shorter._modules = {**model._modules, "blocks": model.blocks[:number]}
    return shorter
