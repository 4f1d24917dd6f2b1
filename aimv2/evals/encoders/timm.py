"""Encoders of timm: vision transformers by their tokens, anything else by its feature maps.

B images, N patches, D width, C channels of a map of h x w cells, T tokens before the patches.
"""

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Self

import torch
from torch import Tensor, nn

from aimv2.evals.encoders.interface import BlockOutput, Encoder, modules_of
from aimv2.evals.encoders.packages import optional
from aimv2.preprocessing import ProcessorConfig

_COMPLETE = ("hf-hub:", "local-dir:")  # names of timm's that stand for an architecture and its weights


class TokenEncoder(Encoder):
    """Of a timm model whose blocks put out tokens. The image feature is what timm's head would get.

    `trunk` is the timm model, which is `model` itself or a part of it.
    """

    def __init__(self, model: nn.Module, trunk: nn.Module, config: ProcessorConfig, **described):
        super().__init__(
            model,
            config,
            width=trunk.num_features,
            depth=len(trunk.blocks),
            heads=getattr(getattr(trunk.blocks[0], "attn", None), "num_heads", 1),
            grid=tuple(trunk.patch_embed.grid_size),
            **described,
        )
        self.trunk = trunk

    def _pass(
        self, images: Tensor, numbers: Sequence[int], output: bool
    ) -> tuple[list[BlockOutput], BlockOutput | None]:
        if not numbers:
            return [], self._split(self.trunk.forward_features(images))
        found = self.trunk.forward_intermediates(
            images,
            indices=list(numbers),
            output_fmt="NLC",
            return_prefix_tokens=True,
            stop_early=not output,
            intermediates_only=not output,
        )
        last, found = found if output else (None, found)
        blocks = [self._named(*block) if isinstance(block, tuple) else BlockOutput(block, None) for block in found]
        return blocks, self._split(last) if output else None

    def _split(self, tokens: Tensor) -> BlockOutput:
        number = self.trunk.num_prefix_tokens
        return self._named(tokens[:, number:], tokens[:, :number])

    def _named(self, patches: Tensor, prefix: Tensor) -> BlockOutput:
        """The CLS token, where there is one, comes first; then there may be registers or a distillation token."""
        has_cls = getattr(self.trunk, "cls_token", None) is not None and self.trunk.num_prefix_tokens
        return BlockOutput(patches, prefix[:, 0] if has_cls else None)

    def _pooled(self, images: Tensor) -> Tensor:
        return pooled_over_space(self.model(images))

    def norm(self, x: Tensor) -> Tensor:
        return self.trunk.norm(x)


class MapEncoder(Encoder):
    """Of any other timm model: its blocks are the stages, its patches the cells of their feature maps.

    Stages differ in width and grid; what the spec chooses of them must not.
    """

    def __init__(self, model: nn.Module, config: ProcessorConfig, **described):
        maps, last = _maps(model, torch.zeros(1, 3, config.image_size, config.image_size), None, True)
        self.shapes = [tuple(one.shape[1:]) for one in maps]  # (C, h, w) of each stage
        width, *grid = last.shape[1:]
        super().__init__(model, config, width=width, depth=len(maps), heads=1, grid=tuple(grid), **described)

    def average(self, layers: tuple[int, ...]) -> Self:
        shapes = {self.shapes[number] for number in layers}
        if len(shapes) > 1:
            raise ValueError(f"stages {list(layers)} of shapes {sorted(shapes)} have no mean: take one of them")
        for self.width, *grid in shapes:
            self.grid = tuple(grid)
        return super().average(layers)

    def _pass(
        self, images: Tensor, numbers: Sequence[int], output: bool
    ) -> tuple[list[BlockOutput], BlockOutput | None]:
        maps, last = _maps(self.model, images, list(numbers), output)
        return [_cells(one) for one in maps], _cells(last) if output else None

    def _pooled(self, images: Tensor) -> Tensor:
        return pooled_over_space(self.model(images))

    def norm(self, x: Tensor) -> Tensor:
        return x


def open_timm(rest: str, spec: str, image_size: int | None) -> Encoder:
    """`timm:NAME[,WEIGHTS]`, WEIGHTS a tag of timm's or a file; NAME.TAG is NAME,TAG; without: untrained.

    With `image_size`, transformers interpolate their positions as timm does; convnets take any size.
    """
    timm = optional("timm")
    name, _, weights = rest.partition(",")
    complete, settings = name.startswith(_COMPLETE), {}
    if weights and complete:
        raise ValueError(f"{spec}: {name} has weights of its own: expected none after a comma")
    if weights and Path(weights).is_file():
        settings = _file_settings(timm, name, weights)
    elif weights:
        if weights not in (tags := _tags(timm, name)):
            raise ValueError(f"{spec}: weights {weights!r}: no such file, nor one of timm's tags {', '.join(tags)}")
        name = f"{name}.{weights}"
    trained = complete or bool(weights) or "." in name
    model = timm.create_model(name, pretrained=trained, **settings)
    model.reset_classifier(0)  # only now: a model made without one is loaded with whatever of its weights is there
    model = model.float().eval().requires_grad_(False)
    if not hasattr(model, "forward_intermediates"):
        raise ValueError(f"{spec}: timm's {type(model).__name__} has no forward_intermediates")
    if image_size is not None and hasattr(model, "set_input_size"):
        model.set_input_size((image_size, image_size))
    config = timm_processing(model, image_size)
    settings = timm_settings(model)
    described = {"spec": spec, "name": spec, "source": "timm", "settings": settings, "trained": trained}
    if has_tokens(model):
        return TokenEncoder(model, model, config, **described)
    return MapEncoder(model, config, **described)


def has_tokens(model: nn.Module) -> bool:
    parts = ("blocks", "num_prefix_tokens", "norm", "patch_embed")
    return all(hasattr(model, part) for part in parts) and hasattr(model.patch_embed, "grid_size")


def timm_processing(model: nn.Module, image_size: int | None) -> ProcessorConfig:
    """What timm's `resolve_data_config` says of a model, maybe at another size."""
    data = optional("timm.data").resolve_data_config({}, pretrained_cfg=model.pretrained_cfg)
    if image_size is not None:
        data["input_size"] = (3, image_size, image_size)
    patch = model.patch_embed.patch_size[0] if has_tokens(model) else 1
    return ProcessorConfig.from_timm(data, patch if data["input_size"][1] % patch == 0 else 1)


def timm_settings(model: nn.Module) -> dict:
    """What its modules are, and how they are put together as far as these don't say it."""
    pooling = {name: repr(getattr(model, name, None)) for name in ("global_pool", "num_prefix_tokens")}
    return {"architecture": model.pretrained_cfg.get("architecture"), **pooling, "modules": modules_of(model)}


def pooled_over_space(features: Tensor) -> Tensor:
    """(B, E) of what a head puts out: some models don't pool, then the mean is taken."""
    return features.flatten(2).mean(-1) if features.ndim == 4 else features.mean(1) if features.ndim == 3 else features


def _file_settings(timm: ModuleType, name: str, path: str) -> dict:
    """What `create_model` has to be told about a file: how many classes it knows, so that nothing else may be amiss."""
    if path.endswith((".npz", ".npy")):
        return {"pretrained_cfg_overlay": {"file": path, "custom_load": True}}
    state, known = timm.models.load_state_dict(path), timm.get_pretrained_cfg(name)
    classifier = known.classifier if known else None
    head = state.get(f"{classifier[0] if isinstance(classifier, tuple) else classifier}.weight")
    classes = 0 if head is None else len(head)
    return {"pretrained_cfg_overlay": {"file": path, "num_classes": classes}, "num_classes": classes}


def _tags(timm: ModuleType, name: str) -> list[str]:
    return [found.partition(".")[2] for found in timm.list_pretrained(f"{name}.*")]


@torch.no_grad()
def _maps(
    model: nn.Module, images: Tensor, numbers: list[int] | None, output: bool
) -> tuple[list[Tensor], Tensor | None]:
    """(B, C, h, w) of some stages, None: of all, and of the whole model without its head."""
    if numbers == []:
        return [], _channels_first(model, model.forward_features(images))
    settings = {"indices": numbers, "output_fmt": "NCHW", "stop_early": not output, "intermediates_only": not output}
    found = model.forward_intermediates(images, **settings)
    return (found[1], _channels_first(model, found[0])) if output else (found, None)


def _channels_first(model: nn.Module, features: Tensor) -> Tensor:
    if features.ndim != 4:
        raise ValueError(f"timm's {type(model).__name__} ends in {features.ndim - 1} axes, not in a feature map")
    return features.permute(0, 3, 1, 2) if getattr(model, "output_fmt", "NCHW") == "NHWC" else features


def _cells(features: Tensor) -> BlockOutput:
    """(B, C, h, w) -> patches (B, h*w, C)."""
    return BlockOutput(features.flatten(2).transpose(1, 2), None)
