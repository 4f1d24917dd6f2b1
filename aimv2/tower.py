"""AIMv2 where LLaVA has CLIP: its vision-tower contract, over `aimv2.load_encoder`.

B images, T tiles of an image, H x W pixels, S side of the encoder's square image, N patches, D length of a feature.

AIMv2 has no CLS token. Where CLIP's wrapper drops the first token, this one drops nothing: N = (S / patch size)^2.
Interface: LLaVA 1.5 (haotian-liu/LLaVA, clip_encoder.py) and LLaVA-NeXT, whose positional arguments are the same.
"""

import importlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from aimv2.features import block_numbers
from aimv2.pretrained import load_configs, load_encoder, resized
from aimv2.processor import Processor
from aimv2.weights import ModelError

LORA_TARGETS = ["qkv", "proj"]  # of attention, for peft's `target_modules`
_NO_DECAY = r"bias$|norm\d?\.weight$|positions"
_DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")  # of accelerate; a tower stays in one piece


@dataclass(frozen=True, slots=True)
class TowerConfig:
    """The encoder's config by transformers' names, which LLaVA's other modules read."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    num_channels: int = 3


class AIMv2VisionTower(nn.Module):
    """LLaVA's vision tower; also LLaVA-NeXT's, which may name the second argument `vision_tower_cfg`.

    Args:
        vision_tower: whatever `load_encoder` takes: a folder, a file, a name of the hub.
        args: an object with any of these attributes:
            mm_vision_select_layer: an entry of transformers' `hidden_states`, or several, concatenated along D: -1
                (default) is the last block, -2 the last but one, k > 0 the k-th.
            mm_vision_norm: apply the encoder's final norm to it (default True).
            mm_vision_select_feature: "patch".
            mm_vision_image_size: `load_encoder`'s image_size: None, pixels or "native".
            mm_vision_checkpointing: recompute each block in the backward pass (default False).
            unfreeze_mm_vision_tower: train it (default False).
        delay_load: read config and preprocessing now, the weights in `load_model`; a tower to be trained is loaded at
            once, since a checkpoint of LLaVA then has its weights.

    It is frozen while none of its parameters requires a gradient, and then without graph and in eval mode whatever
    `train()` says: `requires_grad_`, parameter by parameter as in LLaVA-NeXT, and peft's adapters all work.

    Raises:
        ValueError: a layer or feature that isn't there; ModelError, one of them, as `load_encoder`.
    """

    def __init__(self, vision_tower: str, args=None, delay_load: bool = False, *, vision_tower_cfg=None):
        super().__init__()
        args = vision_tower_cfg if args is None else args
        self.vision_tower_name = vision_tower
        self.select_layer = getattr(args, "mm_vision_select_layer", -1)
        self.select_feature = getattr(args, "mm_vision_select_feature", "patch")
        if self.select_feature != "patch":
            raise ValueError(
                f"mm_vision_select_feature {self.select_feature!r}: expected 'patch', as AIMv2 has no CLS token"
            )
        self.norm = getattr(args, "mm_vision_norm", True)
        self.load_size = getattr(args, "mm_vision_image_size", None)
        self.checkpointing = bool(getattr(args, "mm_vision_checkpointing", False))
        self.unfreeze = bool(getattr(args, "unfreeze_mm_vision_tower", False))
        tuned = self.unfreeze or "mm_vision_tower" in (getattr(args, "mm_tunable_parts", None) or "")  # LLaVA-NeXT's
        self.is_loaded = False
        config, processing = load_configs(vision_tower, image_size=self.load_size)
        self.layers = block_numbers(_blocks(self.select_layer), config.depth)
        self.cfg_only = TowerConfig(
            config.width, config.mlp_hidden, config.depth, config.heads, config.image_size, config.patch_size
        )
        self.image_processor = Processor(processing)
        if not delay_load or tuned:
            self.load_model()

    def load_model(self, device_map: str | int | torch.device | dict | None = None) -> None:
        """Read the weights, unless that is done. `device_map` is where all of them go; None: the CPU, as stored."""
        if self.is_loaded:
            return
        encoder = load_encoder(
            self.vision_tower_name,
            layer=self.layers,
            norm=self.norm,
            image_size=self.load_size,
            checkpointing=self.checkpointing,
            device=_device(device_map),
            frozen=False,  # this module sees to it
        )
        self.vision_tower = encoder.requires_grad_(self.unfreeze)
        encoder.encoder.norm.requires_grad_(self.unfreeze and self.norm)  # else DDP waits for a gradient of it
        self.is_loaded = True
        self.train(self.training)

    @property
    def frozen(self) -> bool:
        return not any(parameter.requires_grad for parameter in self.parameters())

    def train(self, mode: bool = True) -> "AIMv2VisionTower":
        return super().train(mode and not self.frozen)

    def feature_select(self, outputs: Tensor | tuple) -> Tensor:
        """The chosen features of what `self.vision_tower` returned: every patch of them."""
        return outputs[0] if isinstance(outputs, tuple) else outputs

    def forward(self, images: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
        """Features in the images' dtype. Images are what `image_processor` makes, as floats.

        (B, 3, H, W) -> (B, N, D); anyres tiles (B, T, 3, H, W) -> (B, T, N, D); a list of (3, H, W) or (T, 3, H, W) of
        any sizes -> a list of (1, N, D) or (T, N, D).

        Raises ValueError for other shapes, and sizes that the encoder's positions are not for.
        """
        self._check_loaded()
        if isinstance(images, list | tuple):
            return [self._features(image[None] if image.ndim == 3 else image) for image in images]
        return self._features(images)

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in the weights' dtype -> (B, N, D)."""
        return self.feature_select(self.vision_tower(images))

    def _features(self, images: Tensor) -> Tensor:
        if images.ndim not in (4, 5) or not images.is_floating_point():
            raise ValueError(
                f"images of shape {tuple(images.shape)} and {images.dtype}: expected floats (B, 3, H, W), "
                "(B, T, 3, H, W), or a list of (3, H, W) or (T, 3, H, W)"
            )
        flat = images.flatten(0, -4).to(self.device, self.dtype)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            features = self.encode(flat)
        return features.unflatten(0, images.shape[:-3]).to(images.dtype)

    @property
    def dummy_feature(self) -> Tensor:
        """(1, D) of zeros, LLaVA's stand-in for a sample without an image."""
        return torch.zeros(1, self.hidden_size, device=self.device, dtype=self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        self._check_loaded()
        return self.vision_tower.dtype

    @property
    def device(self) -> torch.device:
        self._check_loaded()
        return self.vision_tower.device

    @property
    def config(self) -> TowerConfig:
        return self.cfg_only

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.config.hidden_size * len(self.layers)

    @property
    def image_size(self) -> int:
        """Side of the image, or of each anyres tile, that `image_processor` makes; native: of the encoder's grid."""
        return self.image_processor.config.image_size or self.config.image_size

    @property
    def num_patches_per_side(self) -> int:
        return self.config.image_size // self.config.patch_size

    @property
    def num_patches(self) -> int:
        """N of a square image; there is no other token."""
        return self.num_patches_per_side**2

    def _check_loaded(self) -> None:
        if not self.is_loaded:  # no AttributeError: nn.Module would blame another name
            raise RuntimeError(f"vision tower {self.vision_tower_name}: call load_model() first")


class AIMv2VisionTowerS2(AIMv2VisionTower):
    """S2 (arXiv 2403.13043): one image at several scales, each cut into tiles of S x S that the encoder sees alone.

    The tiles' features, laid side by side, are averaged down to the grid of one tile, and those of all scales
    concatenated along D, smallest first: N as before, D once per scale. `args.s2_scales`, as "336,672,1008" or numbers,
    are multiples of S; the default is S, 2 S and 3 S. Images are square, best of the largest scale, and the processor
    makes them so; they are resized bicubic and, to be smaller, anti-aliased.
    """

    def __init__(self, vision_tower: str, args=None, delay_load: bool = False, *, vision_tower_cfg=None):
        super().__init__(vision_tower, args, delay_load, vision_tower_cfg=vision_tower_cfg)
        side = self.config.image_size
        scales = getattr(vision_tower_cfg if args is None else args, "s2_scales", None) or (side, 2 * side, 3 * side)
        self.s2_scales = sorted(map(int, scales.split(",") if isinstance(scales, str) else scales))
        if self.s2_scales[0] != side or any(scale % side for scale in self.s2_scales):
            raise ValueError(f"s2_scales {scales!r}: expected the encoder's {side} pixels and multiples of it")
        self.image_processor = Processor(resized(self.image_processor.config, self.s2_scales[-1]))

    def encode(self, images: Tensor) -> Tensor:
        if images.shape[-2] != images.shape[-1]:
            raise ValueError(f"images of {images.shape[-2]}x{images.shape[-1]} pixels: S2 expected squares")
        return torch.cat([self._encode_scale(images, scale) for scale in self.s2_scales], dim=-1)

    def _encode_scale(self, images: Tensor, scale: int) -> Tensor:
        """(B, 3, H, H) at scale x scale pixels, r x r tiles -> (B, N, D of one scale)."""
        if images.shape[-1] != scale:
            pixels = F.interpolate(images.float(), size=(scale, scale), mode="bicubic", antialias=True)
            images = pixels.to(images.dtype)
        r, h = scale // self.config.image_size, self.num_patches_per_side
        tiles = rearrange(images, "b c (i h) (j w) -> (b i j) c h w", i=r, j=r)
        features = super().encode(tiles)  # (B r r, N, D)
        grid = rearrange(features, "(b i j) (h w) d -> b d (i h) (j w)", i=r, j=r, h=h)
        return rearrange(F.avg_pool2d(grid, r), "b d h w -> b (h w) d")

    @property
    def hidden_size(self) -> int:
        return super().hidden_size * len(self.s2_scales)


def build_vision_tower(vision_tower_cfg, **kwargs) -> AIMv2VisionTower:
    """What LLaVA's function of this name does: the tower that `mm_vision_tower`, or `vision_tower`, and `s2` say."""
    kind = AIMv2VisionTowerS2 if getattr(vision_tower_cfg, "s2", False) else AIMv2VisionTower
    return kind(_tower_name(vision_tower_cfg), vision_tower_cfg, **kwargs)


def register_llava() -> None:
    """Let the installed `llava` (1.5 or NeXT) build our tower for AIMv2's and AIM's names; call it before the model.

    Those are the hub's, `random:...`, and files and folders here that `load_encoder` knows, whatever they are called.
    All others go where they went before. Raises ModuleNotFoundError without llava.
    """
    try:
        builder = importlib.import_module("llava.model.multimodal_encoder.builder")
        arch = importlib.import_module("llava.model.llava_arch")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"register_llava: LLaVA is not installed or not complete ({error})") from error
    build = _extended(builder.build_vision_tower)
    builder.build_vision_tower = arch.build_vision_tower = build  # the second has its own reference


def parameter_groups(tower: nn.Module, lr: float, *, layer_decay: float = 1.0, weight_decay: float = 0.0) -> list[dict]:
    """The trainable parameters of a tower, or of `load_encoder`'s module, as an optimizer's groups.

    The final norm learns at `lr`, each block at `layer_decay` times the rate of the one above, patches and positions
    below them all. Biases, norms and positions don't decay.
    """
    named = [(name, parameter) for name, parameter in tower.named_parameters() if parameter.requires_grad]
    block = {name: int(found[1]) for name, _ in named if (found := re.search(r"(?:^|\.)blocks\.(\d+)\.", name))}
    top = max(block.values(), default=-1)
    groups: dict[tuple[int, bool], dict] = {}
    for name, parameter in named:
        below = (
            top - block[name] + 1
            if name in block
            else 0
            if re.search(r"encoder\.norm\.(weight|bias)$", name)
            else top + 2
        )
        decays = not re.search(_NO_DECAY, name)
        group = {"params": [], "lr": lr * layer_decay**below, "weight_decay": weight_decay if decays else 0.0}
        groups.setdefault((below, decays), group)["params"].append(parameter)
    return list(groups.values())


def _extended(build: Callable) -> Callable:
    def build_either(vision_tower_cfg, **kwargs):
        name = _tower_name(vision_tower_cfg)
        ours = name is not None and _is_ours(name)
        return (build_vision_tower if ours else build)(vision_tower_cfg, **kwargs)

    return build_either


def _tower_name(cfg) -> str | None:
    return getattr(cfg, "mm_vision_tower", getattr(cfg, "vision_tower", None))


def _is_ours(name: str) -> bool:
    """By what is there: a folder of CLIP below one called aimv2 is none. By the name, if nothing readable is there."""
    path = Path(name).expanduser()
    named = bool(re.search(r"aimv2|^aim-|^random:", path.name, re.IGNORECASE))
    if not path.exists():
        return named
    try:
        load_configs(path)
    except ModelError:
        return named  # so that a damaged AIMv2 gives its own error, not CLIP's
    return True


def _blocks(select_layer: int | Sequence[int]) -> tuple[int, ...]:
    """Blocks from 0 for entries of transformers' `hidden_states`, whose first is what goes into block 0."""
    layers = (select_layer,) if isinstance(select_layer, int) else tuple(select_layer)
    if 0 in layers:
        raise ValueError("mm_vision_select_layer 0: that is the patch embedding, expected 1 or more, or negative")
    return tuple(layer - 1 if layer > 0 else layer for layer in layers)


def _device(device_map) -> torch.device | None:
    """Of transformers' `device_map`: a name, a number, or a dictionary with a single place."""
    if isinstance(device_map, dict):
        if len(set(map(str, device_map.values()))) != 1:
            raise ValueError(f"device_map {device_map}: expected one place, as a vision tower is not split")
        device_map = next(iter(device_map.values()))
    if device_map in _DEVICE_MAPS:
        device_map = "cuda" if torch.cuda.is_available() else "cpu"
    return None if device_map is None else torch.device(device_map)
