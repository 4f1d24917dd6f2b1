"""AIM and AIMv2 encoders as timm has models: `timm.create_model("aimv2_export", source=PATH)`.

B images, H x W pixels, P patch side, h x w patches, N = h*w, D width, C classes.

timm has AIMv2's architecture, and opens our exports in its layout. These are our own modules by the same interface: any
layout and name, AIM v1, native positions.
Interface: timm 1.0's VisionTransformer.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aimv2.encoder import VisionEncoder
from aimv2.preprocessing import ProcessorConfig
from aimv2.pretrained import load_configs, load_encoder

try:
    import timm
    from timm.layers import global_pool_nlc
    from timm.models import build_model_with_cfg, register_model
except ImportError as error:
    raise ImportError('timm\'s models need timm: pip install "aimv2[eval]"') from error

NAME = "aimv2_export"
POOLS = ("avg", "avgmax", "max", "")
_OUTPUT_FORMATS = ("NCHW", "NLC")
_registered: dict[str, dict] = {}  # name -> arguments


class TimmEncoder(nn.Module):
    """A vision encoder by the names timm's models have: no prefix tokens, a mean over the patches, a linear head.

    `encoder` is ours, for `aimv2.exports.export_model` after training.

    Args:
        num_classes: C; 0: without a head.
        global_pool: one of POOLS; "": all patches.
        drop_rate: of dropout before the head.
        pad: pad images with zeros, at the right and below, to multiples of P.
    """

    num_prefix_tokens = 0
    has_class_token = False
    in_chans = 3

    def __init__(
        self,
        encoder: VisionEncoder,
        num_classes: int = 0,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        pad: bool = False,
    ):
        super().__init__()
        c = encoder.config
        self.encoder, self.pad = encoder, pad
        self.num_features = self.head_hidden_size = self.embed_dim = c.width
        self.feature_info = [
            {"module": f"encoder.blocks.{number}", "num_chs": c.width, "reduction": c.patch_size}
            for number in range(c.depth)
        ]
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C), (B, D) without a head; with N as their second axis where nothing is pooled."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, N, D) after the final norm. Errors are `VisionEncoder`'s."""
        return self.encoder(self._padded(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, N, D) -> (B, C); `pre_logits` stops before the head: (B, D)."""
        x = self.head_drop(global_pool_nlc(x, pool_type=self.global_pool, num_prefix_tokens=0))
        return x if pre_logits else self.head(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]] | dict[str, Tensor | list[Tensor]]:
        """(B, 3, H, W) -> (B, N, D) after the final norm, and a map for each block asked for.

        Args:
            indices: blocks from 0, negative from the last; a number: that many, to the last; None: all.
            return_prefix_tokens: changes nothing: there are none.
            norm: apply the final norm to the maps.
            stop_early: the first result belongs to the highest of these blocks. It saves no time here:
                `prune_intermediate_layers` does, and `features_only` calls it.
            output_fmt: of the maps: "NCHW" (B, D, h, w) or "NLC" (B, N, D).
            intermediates_only: return the maps only.
            output_dict: return {"image_intermediates", "image_features"}.
        """
        if output_fmt not in _OUTPUT_FORMATS:
            raise ValueError(f"output_fmt {output_fmt!r}: expected one of {', '.join(_OUTPUT_FORMATS)}")
        numbers, x = _blocks(indices, len(self.encoder.blocks)), self._padded(x)
        features, states = self.encoder(x, output_hidden_states=True)
        if stop_early:
            features = self.encoder.norm(states[max(numbers)])
        maps = [state for number, state in enumerate(states) if number in numbers]  # in the blocks' order, as timm's
        maps = [self.encoder.norm(one) for one in maps] if norm else maps
        if output_fmt == "NCHW":
            grid = [side // self.encoder.config.patch_size for side in x.shape[-2:]]
            maps = [one.transpose(1, 2).unflatten(2, grid).contiguous() for one in maps]  # (B, D, h, w)
        if output_dict:
            return {"image_intermediates": maps} | ({} if intermediates_only else {"image_features": features})
        return maps if intermediates_only else (features, maps)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks above the highest of `indices`, for good; return these, counted from 0."""
        numbers = _blocks(indices, len(self.encoder.blocks))
        depth = max(numbers) + 1
        self.encoder.blocks = self.encoder.blocks[:depth]
        self.encoder.config = replace(self.encoder.config, depth=depth)
        if prune_norm:
            self.encoder.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return numbers

    def _padded(self, x: Tensor) -> Tensor:
        if not self.pad:
            return x
        p = self.encoder.config.patch_size
        return F.pad(x, (0, -x.shape[-1] % p, 0, -x.shape[-2] % p))

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head, or none with 0 classes; `global_pool` None leaves the pooling."""
        global_pool = self.global_pool if global_pool is None else global_pool
        if global_pool not in POOLS:
            raise ValueError(f"global_pool {global_pool!r}: expected one of {POOLS}, as there is no token but patches")
        if num_classes < 0:
            raise ValueError(f"num_classes {num_classes}: expected 0 or more")
        self.num_classes, self.global_pool, self.head = num_classes, global_pool, nn.Identity()
        if num_classes:
            weight = self.encoder.patch_embed.weight
            self.head = nn.Linear(self.num_features, num_classes, device=weight.device, dtype=weight.dtype)
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)
        self.head.train(self.training)

    def group_matcher(self, coarse: bool = False) -> dict:
        """Names in the order of depth, for layer-wise learning rates."""
        stem = r"^encoder\.(?:patch_embed|patch_norm|positions)"
        return {"stem": stem, "blocks": [(r"^encoder\.blocks\.(\d+)", None), (r"^encoder\.norm", (99999,))]}

    def no_weight_decay(self) -> set[str]:
        return {"encoder.positions.weight"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass."""
        self.encoder.config = replace(self.encoder.config, checkpointing=enable)


def _blocks(indices: int | Sequence[int] | None, depth: int) -> list[int]:
    """Blocks from 0 for timm's indices: a number is that many, to the last; ValueError for one that is not there."""
    wanted = depth if indices is None else indices
    numbers = list(range(-wanted, 0)) if isinstance(wanted, int) else list(wanted)
    if not numbers or not all(-depth <= number < depth for number in numbers):
        raise ValueError(f"out_indices {indices}: expected blocks from {-depth} to {depth - 1}, or how many")
    return [number % depth for number in numbers]


def register_timm(name: str = NAME, **arguments) -> str:
    """Let `timm.create_model(name, ...)` build encoders of ours, and return the name.

    `arguments`, which `create_model` may change, are for what passes on a name and no more. They are:

        source: whatever `aimv2.load_encoder` takes. Its weights are read whatever `pretrained` says: fresh ones are
            asked for by `random:large-224`.
        num_classes, global_pool, drop_rate: `TimmEncoder`'s.
        img_size: S or (S, S): positions are interpolated to it once.
        dynamic_img_size: interpolate them for each image, of any size that patches divide.
        dynamic_img_pad: pad an image with zeros, at the right and below, to a size that they divide.
        features_only, out_indices: timm's own wrapper around it, for maps (B, D, h, w) at reduction P.
        device, dtype: of the weights.

    Raises ValueError for a name that is timm's own or that `create_model` would take apart.
    """
    if not name.isidentifier():
        raise ValueError(f"name {name!r}: expected letters, digits and _")
    if timm.is_model(name) and name not in _registered:
        raise ValueError(f"name {name!r}: timm has a model of its own by this name")

    def create(pretrained: bool = False, **changes) -> nn.Module:
        return _create(name, **(arguments | changes))

    if _registered.get(name) != arguments:  # timm warns when one takes the place of another
        create.__name__ = name
        register_model(create)
        _registered[name] = arguments
    return name


def _create(
    name: str,
    *,
    source: str | Path | None = None,
    img_size: int | Sequence[int] | None = None,
    dynamic_img_size: bool = False,
    dynamic_img_pad: bool = False,
    in_chans: int = 3,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    pretrained_cfg=None,
    cache_dir=None,
    **arguments,
) -> nn.Module:
    if source is None:
        raise ValueError(f"{name}: expected source=PATH, whatever aimv2.load_encoder takes")
    if in_chans != 3:
        raise ValueError(f"in_chans {in_chans}: expected 3")
    for key, value in (("pretrained_cfg", pretrained_cfg), ("cache_dir", cache_dir)):
        if value:
            raise ValueError(f"{key} {value!r}: expected none, the source is all there is (downloads go to HF_HOME)")
    image_size = None if img_size is None else _side(img_size)
    vision, processing = load_configs(source, image_size=image_size)
    any_size = dynamic_img_size or vision.positions == "sincos"
    encoder = load_encoder(
        source, image_size="native" if dynamic_img_size else image_size, device=device, dtype=dtype, frozen=False
    ).encoder
    return build_model_with_cfg(
        lambda **kwargs: TimmEncoder(encoder, pad=dynamic_img_pad, **kwargs),
        name,
        pretrained=False,
        pretrained_cfg=timm_config(processing, vision.image_size, fixed=not any_size) | {"architecture": name},
        feature_cfg={"out_indices": arguments.pop("out_indices", 3), "feature_cls": "getter"},
        kwargs_filter=("img_size", "in_chans"),
        **arguments,
    )


def _side(img_size: int | Sequence[int]) -> int:
    sides = {img_size} if isinstance(img_size, int) else set(img_size)
    if len(sides) != 1:
        raise ValueError(f"img_size {img_size!r}: expected one side or two equal ones (dynamic_img_size takes others)")
    return sides.pop()


def timm_config(processing: ProcessorConfig, image_size: int, fixed: bool = True) -> dict:
    """The `pretrained_cfg` by which timm prepares images as `processing` does; native ones as `image_size`."""
    return {
        **processing.to_timm(image_size),
        "fixed_input_size": fixed,
        "num_classes": 0,
        "pool_size": None,
        "first_conv": "encoder.patch_embed",
        "classifier": "head",
    }
