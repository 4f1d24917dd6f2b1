"""Small models with random weights, for tests of whatever loads, exports and wraps them."""

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from aimv2.encoder import VisionConfig, VisionEncoder
from aimv2.layouts import LAYOUTS, from_ours
from aimv2.lit import LiT, LiTConfig
from aimv2.text_encoder import TextConfig

V2 = VisionConfig(width=256, depth=3, heads=2, mlp_hidden=352, image_size=56)  # heads of 128, as all published ones
NATIVE = replace(V2, positions="sincos", image_size=224)
V1 = replace(NATIVE, mlp_hidden=384, mlp="gelu", norm="layernorm", norm_eps=1e-6)
LIT = LiTConfig(
    vision=V2,
    text=TextConfig(width=128, depth=2, heads=1, mlp_hidden=64, vocab_size=60, context_length=9, eos=59),
    projection=32,
    pool_heads=2,
)


def random_encoder(config: VisionConfig, seed: int = 0) -> VisionEncoder:
    torch.manual_seed(seed)
    return randomised(VisionEncoder(config)).eval()


def random_lit(config: LiTConfig = LIT, seed: int = 0) -> LiT:
    torch.manual_seed(seed)
    return randomised(config.build()).eval()


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    """Random norms and biases too: at their initial values, two of them exchanged would not be seen."""
    for name, parameter in module.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=0.3)
    return module


def write(path: Path, config, layout: str) -> Path:
    """Bare weights in a layout, without any config file."""
    state = from_ours(random_encoder(config).state_dict(), LAYOUTS[layout].vision)
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    torch.save(state, path) if path.suffix == ".pth" else save_file(state, path)
    return path


def to_transformers(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Keys of `Aimv2VisionModel` or `Aimv2TextModel`, by hand."""
    names = {
        "tokens.": "embeddings.token_embedding.",
        "patch_embed.": "embeddings.patch_embed.",
        "patch_norm.": "embeddings.rms_norm.",
        "positions.": "embeddings.position_embedding.",
        "positions": "embeddings.position_embedding.weight",
        "blocks.": "encoder.layers.",
        "norm.": "rms_norm.",
    }
    parts = {"norm1": "rms_norm1", "norm2": "rms_norm2", "attention.proj": "attention.out_proj"}
    parts |= {f"mlp.{name}": f"ffn.{name}_proj" for name in ("gate", "up", "down")}
    out = {}
    for key, value in state.items():
        prefix = next(p for p in names if key.startswith(p))
        key = names[prefix] + key.removeprefix(prefix)
        if "attention.qkv" in key:
            for name, part in zip("qkv", value.chunk(3), strict=True):
                out[key.replace("qkv", f"{name}_proj")] = part
            continue
        for ours, theirs in parts.items():
            key = key.replace(f".{ours}.", f".{theirs}.")
        out[key] = value[0] if value.ndim == 3 else value
    return out
