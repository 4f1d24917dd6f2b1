"""The same weights under other libraries' names: Apple's releases, Apple's trainer, transformers and timm.

A layout maps the names of our modules to theirs. Nothing is computed but q, k and v joined or split and a table's
leading axis dropped, so that the way there and back is equal to the bit.

D width, P patch side, N patches.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from aimv2.encoder import VisionConfig
from aimv2.lit import LiTConfig
from aimv2.text_encoder import TextConfig
from aimv2.weights import ModelError

HEAD_WIDTH = 128  # of every published model; the shapes of the weights don't tell
# Ours -> theirs; {} is a block's number; several lie one below the other.
Names = dict[str, str | tuple[str, ...]]


def _below(ours: str, theirs: str, names: Names | None) -> Names:
    """`names` with a prefix on each side."""

    def prefixed(name: str | tuple[str, ...]) -> str | tuple[str, ...]:
        return theirs + name if isinstance(name, str) else tuple(theirs + part for part in name)

    return {ours + name: prefixed(other) for name, other in names.items()}


@dataclass(frozen=True)
class Layout:
    """How one library names an encoder's weights (`vision`) and, where it has them, those of a LiT model (`lit`)."""

    name: str
    vision: Names | None  # None: as ours
    lit: Names | None = None
    head: str | None = None  # what an encoder's file may hold besides: a head on top of it


_APPLE_BLOCKS: Names = {
    "blocks.{}.norm1": "trunk.blocks.{}.norm_1",
    "blocks.{}.norm2": "trunk.blocks.{}.norm_2",
    "blocks.{}.attention.qkv": "trunk.blocks.{}.attn.qkv",
    "blocks.{}.attention.proj": "trunk.blocks.{}.attn.proj",
    "blocks.{}.mlp.gate": "trunk.blocks.{}.mlp.fc1",
    "blocks.{}.mlp.up": "trunk.blocks.{}.mlp.fc3",
    "blocks.{}.mlp.down": "trunk.blocks.{}.mlp.fc2",
    "blocks.{}.mlp.fc1": "trunk.blocks.{}.mlp.fc1",
    "blocks.{}.mlp.fc2": "trunk.blocks.{}.mlp.fc2",
    "norm": "trunk.post_trunk_norm",
}
_APPLE_VISION: Names = {
    "patch_embed": "preprocessor.patchifier.proj",
    "patch_norm": "preprocessor.patchifier.norm",
    "positions.weight": "preprocessor.pos_embed",
    **_APPLE_BLOCKS,
}
_APPLE_LIT: Names = {
    **_below("encoder.", "image_encoder.", _APPLE_VISION),
    "pool.query": "image_encoder.head.cls_token",
    "pool.key": "image_encoder.head.k",
    "pool.value": "image_encoder.head.v",
    "pool.proj": "image_encoder.head.linear",
    "image_projection": "image_projector",
    "text_encoder.tokens": "text_encoder.preprocessor.text_embedding",
    "text_encoder.positions": "text_encoder.preprocessor.positional_embedding",
    **_below("text_encoder.", "text_encoder.", _APPLE_BLOCKS),
    "text_projection": "text_projector",
    "log_scale": "log_logit_scale",
}
_TRAINER_QKV = tuple(f"trunk.blocks.{{}}.attn.{part}_proj" for part in "qkv")
_TRAINER_VISION: Names = {  # below "models.image_encoder.", beside "models.text_decoder."
    **_APPLE_BLOCKS,
    "blocks.{}.attention.qkv": _TRAINER_QKV,
    "patch_embed": "preprocessor.blocks.0.patchifier.proj",
    "patch_norm": "preprocessor.blocks.0.patchifier.norm",
    "positions.weight": "preprocessor.blocks.0.pos_embed",
}
_TRANSFORMERS_BLOCKS: Names = {
    "blocks.{}.norm1": "encoder.layers.{}.rms_norm1",
    "blocks.{}.norm2": "encoder.layers.{}.rms_norm2",
    "blocks.{}.attention.qkv": tuple(f"encoder.layers.{{}}.attention.{part}_proj" for part in "qkv"),
    "blocks.{}.attention.proj": "encoder.layers.{}.attention.out_proj",
    "blocks.{}.mlp.gate": "encoder.layers.{}.ffn.gate_proj",
    "blocks.{}.mlp.up": "encoder.layers.{}.ffn.up_proj",
    "blocks.{}.mlp.down": "encoder.layers.{}.ffn.down_proj",
    "norm": "rms_norm",
}
_TRANSFORMERS_VISION: Names = {
    "patch_embed": "embeddings.patch_embed",
    "patch_norm": "embeddings.rms_norm",
    "positions.weight": "embeddings.position_embedding.weight",
    **_TRANSFORMERS_BLOCKS,
}
_TRANSFORMERS_LIT: Names = {
    **_below("encoder.", "vision_model.", _TRANSFORMERS_VISION),
    "pool.query": "vision_model.head.cls_token",
    "pool.key": "vision_model.head.k_proj",
    "pool.value": "vision_model.head.v_proj",
    "pool.proj": "vision_model.head.output_proj",
    "image_projection": "visual_projection",
    "text_encoder.tokens": "text_model.embeddings.token_embedding",
    "text_encoder.positions": "text_model.embeddings.position_embedding.weight",
    **_below("text_encoder.", "text_model.", _TRANSFORMERS_BLOCKS),
    "text_projection": "text_projection",
    "log_scale": "logit_scale",
}
_TIMM_VISION: Names = {
    "patch_embed": "patch_embed.proj",
    "patch_norm": "patch_embed.norm",
    "positions.weight": "pos_embed",
    "blocks.{}.norm1": "blocks.{}.norm1",
    "blocks.{}.norm2": "blocks.{}.norm2",
    "blocks.{}.attention.qkv": "blocks.{}.attn.qkv",
    "blocks.{}.attention.proj": "blocks.{}.attn.proj",
    "blocks.{}.mlp.gate": "blocks.{}.mlp.fc1_g",
    "blocks.{}.mlp.up": "blocks.{}.mlp.fc1_x",
    "blocks.{}.mlp.down": "blocks.{}.mlp.fc2",
    "norm": "norm",
}

LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("ours", None),
        Layout("apple", _APPLE_VISION, _APPLE_LIT, head="head."),
        Layout("apple-trainer", _TRAINER_VISION),
        Layout("transformers", _TRANSFORMERS_VISION, _TRANSFORMERS_LIT, head="head."),
        Layout("timm", _TIMM_VISION, head="head."),
    )
}


def parts(names: Names | None, name: str) -> tuple[str, ...]:
    """What our parameter `name` is called there: one name, or those of its parts, one below the other.

    Raises ModelError for a parameter that the layout has no place for.
    """
    if names is None:
        return (name,)
    block = re.search(r"(?<=blocks\.)\d+", name)
    pattern = name if block is None else f"{name[: block.start()]}{{}}{name[block.end() :]}"
    module, _, parameter = pattern.rpartition(".")
    if pattern in names:
        module, parameter = pattern, ""
    if module not in names:
        raise ModelError(f"{name} has no name in this layout")
    theirs = names[module]
    theirs = (theirs,) if isinstance(theirs, str) else theirs
    suffix = f".{parameter}" if parameter else ""
    return tuple((part + suffix).format(block and block.group()) for part in theirs)


def find_vision(shapes: Mapping[str, tuple[int, ...]]) -> tuple[Layout, str]:
    """(layout, prefix) of the encoder among these names; ModelError if there is none of a known layout."""
    for layout in LAYOUTS.values():
        (first,) = parts(layout.vision, "patch_embed.weight")
        others = [parts(layout.vision, name)[0] for name in ("patch_norm.weight", "norm.weight")]
        for name in shapes:
            prefix = name.removesuffix(first)
            whole = name.endswith(first) and (not prefix or prefix.endswith("."))
            if whole and all(prefix + other in shapes for other in others):
                return layout, prefix
    some = ", ".join(list(shapes)[:3]) or "nothing"
    raise ModelError(f"no AIM or AIMv2 encoder of a known layout ({', '.join(LAYOUTS)}): it holds {some}, ...")


def find_lit(shapes: Mapping[str, tuple[int, ...]]) -> Layout | None:
    """The layout, if these are the names of a LiT model."""
    for layout in LAYOUTS.values():
        if layout.lit and all(parts(layout.lit, name)[0] in shapes for name in ("log_scale", "text_projection.weight")):
            return layout
    return None


def infer_vision(
    shapes: Mapping[str, tuple[int, ...]], names: Names | None, prefix: str = "", *, hints: Mapping[str, int | float]
) -> VisionConfig:
    """An encoder's config from the shapes of its weights.

    `hints`: heads, norm_eps and image_size where a config file says them. Else heads are 128 wide, as all published
    ones; eps is 1e-5, and 1e-6 with LayerNorm, as in Apple's inference code; and sincos positions say 224 px.
    Raises ModelError for what can't be.
    """
    seen = _Shapes(shapes, names, prefix)
    width, channels, *patch = seen["patch_embed.weight"] if len(seen["patch_embed.weight"]) == 4 else (0, 0, 0, 1)
    if channels != 3 or patch[0] != patch[1]:
        raise ModelError(f"patch embedding of shape {seen['patch_embed.weight']}: expected (D, 3, P, P)")
    gated = "blocks.0.mlp.up.weight" in seen
    layernorm = "patch_norm.bias" in seen
    learned = "positions.weight" in seen
    image_size = hints.get("image_size", 224)
    if learned:
        cells = seen["positions.weight"][-2]
        if round(cells**0.5) ** 2 != cells:
            raise ModelError(f"{cells} positions are no square grid")
        image_size = round(cells**0.5) * patch[0]
    return VisionConfig(
        width=width,
        depth=seen.depth(),
        heads=hints.get("heads", max(width // HEAD_WIDTH, 1)),
        mlp_hidden=seen["blocks.0.mlp.gate.weight" if gated else "blocks.0.mlp.fc1.weight"][0],
        image_size=image_size,
        patch_size=patch[0],
        mlp="swiglu" if gated else "gelu",
        norm="layernorm" if layernorm else "rmsnorm",
        norm_eps=hints.get("norm_eps", 1e-6 if layernorm else 1e-5),
        positions="learned" if learned else "sincos",
    )


def infer_lit(
    shapes: Mapping[str, tuple[int, ...]],
    names: Names,
    *,
    vision_hints: Mapping[str, int | float],
    text_hints: Mapping[str, int | float],
) -> LiTConfig:
    """As `infer_vision`, for the whole model; `text_hints` are heads and eos."""
    seen = _Shapes(shapes, names, "")
    vision_names = {
        name.removeprefix("encoder."): other for name, other in names.items() if name.startswith("encoder.")
    }
    vision = infer_vision(shapes, vision_names, hints=vision_hints)
    vocab_size, width = seen["text_encoder.tokens.weight"]
    text = TextConfig(
        width=width,
        depth=seen.depth("text_encoder."),
        heads=text_hints.get("heads", max(width // HEAD_WIDTH, 1)),
        mlp_hidden=seen["text_encoder.blocks.0.mlp.gate.weight"][0],
        vocab_size=vocab_size,
        context_length=seen["text_encoder.positions"][0],
        eos=text_hints.get("eos", vocab_size - 1),
    )
    return LiTConfig(vision=vision, text=text, projection=seen["text_projection.weight"][0], pool_heads=vision.heads)


class _Shapes:
    """Shapes by our names."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], names: Names | None, prefix: str):
        self.shapes, self.names, self.prefix = shapes, names, prefix

    def __contains__(self, name: str) -> bool:
        try:
            return self.prefix + parts(self.names, name)[0] in self.shapes
        except ModelError:
            return False

    def __getitem__(self, name: str) -> tuple[int, ...]:
        theirs = self.prefix + parts(self.names, name)[0]
        if theirs not in self.shapes:
            raise ModelError(f"{theirs} is missing")
        return self.shapes[theirs]

    def depth(self, tower: str = "") -> int:
        """Blocks, counted from 0 without a gap."""
        depth = 0
        while f"{tower}blocks.{depth}.norm1.weight" in self:
            depth += 1
        if not depth:
            raise ModelError(
                f"no blocks: {self.prefix}{parts(self.names, f'{tower}blocks.0.norm1.weight')[0]} is missing"
            )
        return depth


def misfits(
    expected: Mapping[str, tuple[int, ...]],
    shapes: Mapping[str, tuple[int, ...]],
    names: Names | None,
    prefix: str = "",
    allowed: Iterable[str] = (),
) -> list[str]:
    """What is missing, unexpected or of another shape, in their names, when `expected` (ours) is to be read.

    `allowed`: prefixes of names that may be there besides. What doesn't begin with `prefix` is somebody else's.
    """
    problems, known = [], set()
    for name, shape in expected.items():
        theirs = parts(names, name)
        known |= {prefix + part for part in theirs}
        wanted = (shape[0] // len(theirs), *shape[1:]) if len(theirs) > 1 else shape
        for part in (prefix + part for part in theirs):
            if part not in shapes:
                problems.append(f"{part} is missing")
            elif _without_ones(shapes[part]) != _without_ones(wanted):
                problems.append(f"{part} is {shapes[part]}, expected {tuple(wanted)}")
    others = (name for name in shapes if name.startswith(prefix) and name not in known)
    return problems + [f"{name} is unexpected" for name in others if not name.startswith(tuple(allowed))]


def _without_ones(shape: Iterable[int]) -> tuple[int, ...]:
    """A table of positions is (N, D) here and (1, N, D) there."""
    return tuple(n for n in shape if n != 1)


def to_ours(
    source: Mapping[str, Tensor], names: Names | None, name: str, shape: tuple[int, ...], prefix: str = ""
) -> Tensor:
    """Our parameter `name` from their tensors."""
    tensors = [source[prefix + part] for part in parts(names, name)]
    return (tensors[0] if len(tensors) == 1 else torch.cat(tensors)).reshape(shape)


def from_ours(state: Mapping[str, Tensor], names: Names | None) -> dict[str, Tensor]:
    """A state dict of ours under their names."""
    theirs = {}
    for name, tensor in state.items():
        targets = parts(names, name)
        if targets[0].endswith("embedding.weight") and tensor.ndim == 3:
            tensor = tensor[0]  # a table of nn.Embedding is (N, D)
        theirs |= dict(zip(targets, tensor.chunk(len(targets)) if len(targets) > 1 else (tensor,), strict=True))
    return theirs
