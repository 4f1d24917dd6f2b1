"""Our models in the layouts of Apple, transformers and timm: the config.json of each, and names of weights."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from aimv2.encoder import SIZES, VisionConfig
from aimv2.layouts import LAYOUTS, from_ours
from aimv2.lit import LiTConfig
from aimv2.preprocessing import ProcessorConfig
from aimv2.weights import ModelError

FORMATS = ("ours", "apple", "transformers", "timm")


def format_config(config: VisionConfig | LiTConfig, processing: ProcessorConfig, format: str) -> dict:
    """The config.json of a format that is not ours. Raises ModelError for what it has no place for."""
    return _CONFIGS[format](config, processing)


def format_processing(config: VisionConfig | LiTConfig, processing: ProcessorConfig) -> ProcessorConfig:
    """For a format that is not ours: there a table of positions is for one size, to which images are squashed."""
    vision = config.vision if isinstance(config, LiTConfig) else config
    if processing.resize != "native" or vision.positions == "sincos":
        return processing
    return replace(processing, image_size=vision.image_size, resize="squash")


def in_layout(state: Mapping[str, Tensor], config: VisionConfig | LiTConfig, format: str) -> dict[str, Tensor]:
    layout = LAYOUTS[format]
    names = layout.lit if isinstance(config, LiTConfig) else layout.vision
    if names is None:
        raise ModelError(f"{format} has no LiT model: export its encoder, or to apple or transformers")
    return from_ours(state, names)


def _apple_config(config: VisionConfig | LiTConfig, processing: ProcessorConfig) -> dict:
    """As beside Apple's own weights; what reads these files by Apple's names (vLLM does) wants these fields."""
    vision = config.vision if isinstance(config, LiTConfig) else config
    _refuse_scale(vision, "apple")
    return {
        "architectures": ["AIMv2Model"],
        "model_type": "aimv2",
        "hidden_size": vision.width,
        "image_size": vision.image_size,
        "intermediate_size": vision.mlp_hidden,
        "num_attention_heads": vision.heads,
        "num_channels": 3,
        "num_hidden_layers": vision.depth,
        "patch_size": vision.patch_size,
        "rms_norm_eps": vision.norm_eps,
        "projection_dropout": 0.0,
        "attention_dropout": 0.0,
        "qkv_bias": False,
        "use_bias": False,
    }


def _transformers_config(config: VisionConfig | LiTConfig, processing: ProcessorConfig) -> dict:
    """For `AutoModel.from_pretrained`, without remote code: Aimv2VisionModel, or Aimv2Model for LiT."""
    if isinstance(config, VisionConfig):
        return {"architectures": ["Aimv2VisionModel"], **_transformers_vision(config)}
    if config.pool_heads != config.vision.heads:
        raise ModelError(
            f"pool_heads {config.pool_heads}: transformers has as many as the encoder, {config.vision.heads}"
        )
    text = config.text
    return {
        "architectures": ["Aimv2Model"],
        "model_type": "aimv2",
        "attn_implementation": "eager",  # with sdpa its text tower looks ahead where no text is padded
        "projection_dim": config.projection,
        "vision_config": {**_transformers_vision(config.vision), "use_head": True},
        "text_config": {
            "model_type": "aimv2_text_model",
            "hidden_size": text.width,
            "intermediate_size": text.mlp_hidden,
            "num_hidden_layers": text.depth,
            "num_attention_heads": text.heads,
            "vocab_size": text.vocab_size,
            "max_position_embeddings": text.context_length,
            "eos_token_id": text.eos,
            "rms_norm_eps": text.norm_eps,
            "hidden_act": "silu",
            "qkv_bias": False,
            "mlp_bias": False,
        },
    }


def _transformers_vision(config: VisionConfig) -> dict:
    _refuse_aim(config, "transformers")
    return {
        "model_type": "aimv2_vision_model",
        "hidden_size": config.width,
        "intermediate_size": config.mlp_hidden,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "num_channels": 3,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "qkv_bias": False,
        "mlp_bias": False,
        "use_head": False,
        "is_native": config.positions == "sincos",
    }


def _timm_config(config: VisionConfig | LiTConfig, processing: ProcessorConfig) -> dict:
    """For `timm.create_model("local-dir:FOLDER")` and for a repository of the hub."""
    if isinstance(config, LiTConfig):
        raise ModelError("timm has no LiT model: export its encoder, or to apple or transformers")
    _refuse_aim(config, "timm")
    if config.norm_eps != 1e-5:
        raise ModelError(f"timm's AIMv2 has norm_eps 1e-05, not {config.norm_eps}")
    if config.positions == "sincos":
        raise ModelError(
            "timm's AIMv2 has a table of positions for one size: positions 'sincos' can't be exported to it"
        )
    same = replace(config, image_size=224, patch_size=14, checkpointing=False, positions="learned")
    size = next((name for name, known in SIZES.items() if known == same and name != "base"), "large")
    return {
        "architecture": f"aimv2_{size}_patch14_224",
        "num_classes": 0,
        "num_features": config.width,
        "global_pool": "avg",
        "pretrained_cfg": {
            **processing.to_timm(config.image_size),
            "fixed_input_size": True,
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
        "model_args": {
            "img_size": config.image_size,
            "patch_size": config.patch_size,
            "embed_dim": config.width,
            "depth": config.depth,
            "num_heads": config.heads,
            "mlp_ratio": (config.mlp_hidden + 0.5) / config.width,  # timm cuts the product to an integer
        },
    }


def _refuse_scale(config: VisionConfig, format: str) -> None:
    if config.position_scale != 1:
        raise ModelError(f"{format} has sincos positions of scale 1 only, not {config.position_scale}")


def _refuse_aim(config: VisionConfig, format: str) -> None:
    _refuse_scale(config, format)
    if (config.mlp, config.norm) != ("swiglu", "rmsnorm"):
        raise ModelError(
            f"{format} has AIMv2 (swiglu, rmsnorm) only, not an encoder with {config.mlp} and {config.norm}"
        )


_CONFIGS = {"apple": _apple_config, "transformers": _transformers_config, "timm": _timm_config}
