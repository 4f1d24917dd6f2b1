"""Image towers of open_clip: CLIP, SigLIP and their relatives. B images, N patches, D width, E embedding."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

from torch import Tensor, nn

from aimv2.evals.encoders.interface import BlockOutput, Encoder, modules_of
from aimv2.evals.encoders.packages import optional
from aimv2.evals.encoders.taps import tap
from aimv2.evals.encoders.timm import TokenEncoder, has_tokens
from aimv2.preprocessing import ProcessorConfig

_COMPLETE = ("hf-hub:", "local-dir:")  # names of open_clip's that stand for an architecture and its weights
_RESIZES = {"shortest": "shortest_edge", "squash": "squash"}


class ClipEncoder(Encoder):
    """Of open_clip's own VisionTransformer. The image feature is the projected embedding, as `encode_image`."""

    def __init__(self, visual: nn.Module, config: ProcessorConfig, **described):
        blocks = visual.transformer.resblocks
        super().__init__(
            visual,
            config,
            width=visual.conv1.out_channels,
            depth=len(blocks),
            heads=blocks[0].attn.num_heads,
            grid=tuple(visual.grid_size),
            **described,
        )

    def _pass(
        self, images: Tensor, numbers: Sequence[int], output: bool
    ) -> tuple[list[BlockOutput], BlockOutput | None]:
        wanted = sorted({*numbers, *([self.depth - 1] if output else ())})
        found, _ = tap(lambda: self.model(images), self.model.transformer.resblocks, wanted, stop=True)
        blocks = [_split(tokens) for tokens in found[: len(numbers)]]
        return blocks, _split(self.norm(found[-1])) if output else None

    def _pooled(self, images: Tensor) -> Tensor:
        return embedding(self.model(images))

    def norm(self, x: Tensor) -> Tensor:
        """`ln_post`, where it comes before the pooling: after it, it is none of the patches'."""
        pools_first = self.model.attn_pool is not None or self.model.final_ln_after_pool
        return x if pools_first else self.model.ln_post(x)


class ClipTimmEncoder(TokenEncoder):
    """Of a timm model in an open_clip tower."""

    def _pooled(self, images: Tensor) -> Tensor:
        return embedding(self.model(images))


def create_open_clip(rest: str, spec: str, image_size: int | None = None) -> tuple[nn.Module, bool]:
    """The whole model of `NAME[,WEIGHTS]` in fp32, at rest, and whether its weights were read.

    WEIGHTS is a tag of open_clip's or a file. Preprocessing is the tag's; else what all tags of NAME agree on; else
    open_clip's default.
    """
    open_clip = optional("open_clip")
    name, _, weights = rest.partition(",")
    complete = name.startswith(_COMPLETE)
    if not complete:
        _check_names(open_clip, name, weights, spec)
    tag = {} if complete else open_clip.get_pretrained_cfg(name.replace("/", "-"), weights)
    trained = complete or bool(weights)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "QuickGELU mismatch")  # the features would be wrong
        model = open_clip.create_model(
            name,
            pretrained=weights or None,
            require_pretrained=trained,
            pretrained_text=False,
            force_quick_gelu=tag.get("quick_gelu", False),
            force_image_size=image_size,
            force_preprocess_cfg=None if complete or tag else _agreed(open_clip, name),
        )
    return model.float().eval().requires_grad_(False), trained


def open_open_clip(rest: str, spec: str, image_size: int | None) -> Encoder:
    """The image tower of `open_clip:NAME[,WEIGHTS]`; without weights: untrained."""
    open_clip = optional("open_clip")
    model, trained = create_open_clip(rest, spec, image_size)
    visual = model.visual
    pooling = {name: getattr(visual, name, None) for name in ("pool_type", "final_ln_after_pool", "attn_pool_type")}
    settings = {**pooling, "modules": modules_of(visual)}
    described = {"spec": spec, "name": spec, "source": "open_clip", "settings": settings, "trained": trained}
    if isinstance(visual, open_clip.transformer.VisionTransformer):
        return ClipEncoder(visual, clip_processing(visual.preprocess_cfg, visual.patch_size[0]), **described)
    trunk = getattr(visual, "trunk", None)
    if trunk is None or not has_tokens(trunk):
        raise ValueError(f"{spec}: its image tower {type(trunk or visual).__name__} is no transformer of patches")
    config = clip_processing(visual.preprocess_cfg, trunk.patch_embed.patch_size[0])
    return ClipTimmEncoder(visual, trunk, config, **described)


def clip_processing(entry: Mapping, patch_size: int) -> ProcessorConfig:
    """From a tower's `preprocess_cfg`: what open_clip's `image_transform` does with it for evaluation."""
    size = entry["size"]
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise ValueError(f"size {size}: expected a square")
    if entry["resize_mode"] not in _RESIZES:
        raise ValueError(f"resize_mode {entry['resize_mode']!r}: expected one of {', '.join(_RESIZES)}")
    return ProcessorConfig(
        image_size=height,
        patch_size=patch_size if height % patch_size == 0 else 1,
        mean=_three(entry["mean"]),
        std=_three(entry["std"]),
        resize=_RESIZES[entry["resize_mode"]],
        interpolation="bilinear" if entry["interpolation"] == "bilinear" else "bicubic",  # "random" is for training
    )


def embedding(found: Tensor | tuple[Tensor, ...]) -> Tensor:
    """(B, E) of what a tower returns: CoCa's give their tokens as well."""
    return found[0] if isinstance(found, tuple) else found


def _split(tokens: Tensor) -> BlockOutput:
    """The one token before the patches is the CLS."""
    return BlockOutput(tokens[:, 1:], tokens[:, 0])


def _check_names(open_clip: ModuleType, name: str, weights: str, spec: str) -> None:
    """open_clip's own messages list every model there is."""
    if open_clip.get_model_config(name.replace("/", "-")) is None:
        raise ValueError(f"{spec}: {name!r} is not one of open_clip.list_models()")
    tags = open_clip.list_pretrained_tags_by_model(name.replace("/", "-"))
    if weights and weights not in tags and not Path(weights).is_file():
        raise ValueError(f"{spec}: weights {weights!r}: no such file, nor one of open_clip's tags {', '.join(tags)}")


def _agreed(open_clip: ModuleType, name: str) -> dict | None:
    """The preprocessing of all of an architecture's tags, for weights that are none of them; None if they differ.

    open_clip itself prepares a SigLIP of a file like a CLIP.
    """
    name = name.replace("/", "-")
    tags = open_clip.list_pretrained_tags_by_model(name)
    keys = ("mean", "std", "interpolation", "resize_mode")
    entries = [open_clip.get_pretrained_cfg(name, tag) for tag in tags]
    entries = [{key: entry[key] for key in keys if entry.get(key) is not None} for entry in entries]
    return entries[0] if entries and all(entry == entries[0] for entry in entries) else None


def _three(numbers: float | Sequence[float]) -> tuple[float, ...]:
    return (numbers,) * 3 if isinstance(numbers, int | float) else tuple(numbers)
