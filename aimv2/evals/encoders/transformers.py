"""Encoders of transformers: AIMv2, CLIP, DINOv2 (with registers), SigLIP, fixed-size SigLIP2, ViT.

B images, N patches, D width, T tokens before the patches.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor, nn

from aimv2.evals.encoders.interface import BlockOutput, Encoder
from aimv2.evals.encoders.packages import optional
from aimv2.evals.encoders.taps import tap
from aimv2.preprocessing import ProcessorConfig
from aimv2.pretrained import resized

_ABOUT_FILES = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")
PROCESSORS = ("CLIPImageProcessor", "SiglipImageProcessor", "ViTImageProcessor", "BitImageProcessor")


@dataclass(frozen=True, slots=True)
class Family:
    """Where a model type keeps its parts, within `vision_model` if it has a text tower too."""

    blocks: str
    norm: str
    cls: bool
    pooled: str  # of the output: "cls", "head" for the model's own pooler_output


FAMILIES = {
    "dinov2": Family("encoder.layer", "layernorm", True, "cls"),
    "dinov2_with_registers": Family("encoder.layer", "layernorm", True, "cls"),
    "vit": Family("layers", "layernorm", True, "cls"),
    "clip": Family("encoder.layers", "post_layernorm", True, "head"),
    "clip_vision_model": Family("encoder.layers", "post_layernorm", True, "head"),
    "siglip": Family("encoder.layers", "post_layernorm", False, "head"),
    "siglip_vision_model": Family("encoder.layers", "post_layernorm", False, "head"),
    "aimv2": Family("encoder.layers", "rms_norm", False, "head"),
    "aimv2_vision_model": Family("encoder.layers", "rms_norm", False, "head"),
}


def settings_of(config) -> dict:
    """What a transformers config says of the model, without what it says of files and versions."""
    return {name: value for name, value in config.to_diff_dict().items() if name not in _ABOUT_FILES}


class TransformersEncoder(Encoder):
    """The output is the last block after the final norm, of CLIP too, whose `last_hidden_state` is without it.

    The image feature is CLS of DINOv2 and ViT, the projected embedding of CLIP and AIMv2's LiT, what the attention pool
    gives of SigLIP, and the mean of the patches of an AIMv2 without any.
    """

    def __init__(self, model: nn.Module, family: Family, config: ProcessorConfig, interpolate: bool, **described):
        self.vision = getattr(model, "vision_model", model)
        sizes, side = self.vision.config, config.image_size // self.vision.config.patch_size
        super().__init__(
            model,
            config,
            width=sizes.hidden_size,
            depth=sizes.num_hidden_layers,
            heads=sizes.num_attention_heads,
            grid=(side, side),
            settings=settings_of(sizes),
            **described,
        )
        self.family = family
        self.prefix = family.cls + getattr(sizes, "num_register_tokens", 0)
        self.arguments = {"interpolate_pos_encoding": True} if interpolate else {}

    def _pass(
        self, images: Tensor, numbers: Sequence[int], output: bool
    ) -> tuple[list[BlockOutput], BlockOutput | None]:
        wanted = sorted({*numbers, *([self.depth - 1] if output else ())})
        blocks = self.vision.get_submodule(self.family.blocks)
        found, _ = tap(lambda: self.vision(images, **self.arguments), blocks, wanted, stop=True)
        last = self._split(self.norm(found[-1])) if output else None
        return [self._split(tokens) for tokens in found[: len(numbers)]], last

    def _split(self, tokens: Tensor) -> BlockOutput:
        return BlockOutput(tokens[:, self.prefix :], tokens[:, 0] if self.family.cls else None)

    def _pooled(self, images: Tensor) -> Tensor:
        if self.family.pooled == "head":
            if hasattr(self.model, "get_image_features"):
                return self.model.get_image_features(images, **self.arguments).pooler_output
            found = self.model(images, **self.arguments)
            pooled = found.image_embeds if "image_embeds" in found else found.pooler_output
            if pooled is not None:
                return pooled
        last = self._pass(images, [], True)[1]
        return last.patches.mean(dim=1) if last.cls is None else last.cls

    def norm(self, x: Tensor) -> Tensor:
        return self.vision.get_submodule(self.family.norm)(x)


def open_transformers(rest: str, spec: str, image_size: int | None) -> TransformersEncoder:
    """`hf:NAME-OR-FOLDER`. With `image_size`, positions are interpolated where the model knows how to.

    Raises ValueError for a model type or preprocessing that is not known here, and for weights that aren't all there:
    transformers would draw them at random.
    """
    transformers = optional("transformers")
    kind = transformers.AutoConfig.from_pretrained(rest)
    if kind.model_type not in FAMILIES:
        raise ValueError(f"{spec}: model type {kind.model_type!r}: expected one of {', '.join(FAMILIES)}")
    model = _load(transformers, rest, kind)
    vision = getattr(model, "vision_model", model)
    entry = transformers.AutoImageProcessor.from_pretrained(rest, backend="pil").to_dict()
    patch = vision.config.patch_size
    config = transformers_processing(entry, patch, image_size)
    trained = getattr(vision.config, "image_size", None)
    knows_how = "interpolate_pos_encoding" in inspect.signature(vision.forward).parameters
    return TransformersEncoder(
        model,
        FAMILIES[kind.model_type],
        config,
        interpolate=knows_how and config.image_size != trained,
        spec=spec,
        name=spec,
        source="transformers",
    )


def transformers_processing(entry: Mapping, patch_size: int, image_size: int | None = None) -> ProcessorConfig:
    """From an image processor's `to_dict`, maybe at another size: the pixels of its Pillow version."""
    kind = str(entry.get("image_processor_type"))
    if kind.removesuffix("Pil").removesuffix("Fast") not in PROCESSORS:
        raise ValueError(f"image processor {kind}: expected one of {', '.join(PROCESSORS)}")
    plain = {
        **entry,
        "image_processor_type": PROCESSORS[0],
        "do_center_crop": bool(entry.get("do_center_crop")),  # which SigLIP's and ViT's don't have
        "resample": int(entry["resample"]),
        "image_mean": list(entry["image_mean"]),
        "image_std": list(entry["image_std"]),
    }
    config = ProcessorConfig.from_transformers(plain, 1)
    if config.resize == "native" and image_size is None:
        raise ValueError("images of any size are prepared for it, evaluations take one: expected an image_size")
    config = resized(config, image_size)
    return replace(config, patch_size=patch_size) if config.image_size % patch_size == 0 else config


def _load(transformers: ModuleType, source: str, kind) -> nn.Module:
    """In fp32, without a text tower."""
    cls, settings = transformers.AutoModel, {}
    if "CLIPVisionModelWithProjection" in (kind.architectures or ()):
        cls = transformers.CLIPVisionModelWithProjection
    if kind.model_type == "vit":
        settings = {"add_pooling_layer": False}
    model, found = cls.from_pretrained(source, dtype=torch.float32, output_loading_info=True, **settings)
    if hasattr(model, "get_image_features"):
        for name in {name for name, _ in model.named_children()} - {"vision_model", "visual_projection"}:
            delattr(model, name)
        for name in [name for name, _ in model.named_parameters(recurse=False)]:
            delattr(model, name)
    missing = sorted(name for name in found["missing_keys"] if name in model.state_dict())
    if missing:
        raise ValueError(f"{source}: its weights lack {', '.join(missing[:3])}" + (" ..." if missing[3:] else ""))
    return model.eval().requires_grad_(False)
