"""A small encoder of each library, written to a folder where the library reads one."""

import json
import re
from pathlib import Path

import torch
from tiny_models import LIT, V2, random_encoder, random_lit

from aimv2.exports import export_model
from aimv2.preprocessing import ProcessorConfig

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 50,
    "max_position_embeddings": 8,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
BOTH = {"vision_config": SIZES, "text_config": TEXT, "projection_dim": 24}
CLIP_32 = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 32},
    "crop_size": {"height": 32, "width": 32},
}
SIGLIP_32 = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 32, "width": 32}}
BIT_32 = {
    "image_processor_type": "BitImageProcessor",
    "size": {"shortest_edge": 36},
    "crop_size": {"height": 32, "width": 32},
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
VIT_32 = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
TRANSFORMERS = {  # name -> (class of the config, its arguments, class of the model, preprocessing)
    "hf-dinov2": ("Dinov2Config", {**SIZES, "mlp_ratio": 2}, "Dinov2Model", BIT_32),
    "hf-dinov2-registers": (
        "Dinov2WithRegistersConfig",
        {**SIZES, "mlp_ratio": 2, "num_register_tokens": 4},
        "Dinov2WithRegistersModel",
        BIT_32,
    ),
    "hf-vit": ("ViTConfig", SIZES, "ViTModel", VIT_32),
    "hf-clip": ("CLIPConfig", BOTH, "CLIPModel", CLIP_32),
    "hf-clip-vision": ("CLIPVisionConfig", SIZES, "CLIPVisionModel", CLIP_32),
    "hf-clip-projection": (
        "CLIPVisionConfig",
        {**SIZES, "projection_dim": 24},
        "CLIPVisionModelWithProjection",
        CLIP_32,
    ),
    "hf-siglip": ("SiglipConfig", BOTH, "SiglipModel", SIGLIP_32),
    "hf-siglip-vision": ("SiglipVisionConfig", SIZES, "SiglipVisionModel", SIGLIP_32),
    "hf-aimv2": ("Aimv2VisionConfig", {**SIZES, "use_head": False}, "Aimv2VisionModel", CLIP_32),
    "hf-aimv2-lit": ("Aimv2Config", BOTH, "Aimv2Model", CLIP_32),
}
OPEN_CLIP_TEXT = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
OPEN_CLIP = {  # name -> vision_cfg
    "tiny-clip": {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 3},
    "tiny-clip-gap": {
        "image_size": 32,
        "patch_size": 8,
        "width": 32,
        "head_width": 16,
        "layers": 3,
        "pool_type": "avg",
        "final_ln_after_pool": True,
    },
    "tiny-coca": {
        "image_size": 32,
        "patch_size": 8,
        "width": 32,
        "head_width": 16,
        "layers": 3,
        "attentional_pool": True,
        "attn_pooler_heads": 2,
        "attn_pooler_queries": 5,
        "output_tokens": True,
    },
    "tiny-siglip": {"image_size": 160, "timm_model_name": "test_vit3", "timm_pool": "map", "timm_proj": "none"},
}
TIMM = ("test_vit", "test_vit2", "test_vit3", "test_vit4")
ALL = ("aimv2", "lit", "pixels", *(f"timm-{name}" for name in TIMM), *OPEN_CLIP, *TRANSFORMERS)
_BLOCK = re.compile(r"(?:.*\.)?(?:blocks|resblocks|layers?)\.\d+")


def write_encoder(name: str, folder: Path) -> str:
    """The spec of one of `ALL`, whose files are in `folder`."""
    if name == "pixels":
        return "pixels"
    if name in ("aimv2", "lit"):
        model = random_encoder(V2) if name == "aimv2" else random_lit(LIT)
        export_model(model, folder / name / "export", config=V2 if name == "aimv2" else LIT, processing=OURS)
        return f"aimv2:{folder / name / 'export'}"
    if name in OPEN_CLIP:
        return f"open_clip:{register_open_clip(name, folder)}"
    if name in TRANSFORMERS:
        return f"hf:{write_transformers(name, folder / name)}"
    return f"timm:{name.removeprefix('timm-')}"


OURS = ProcessorConfig(image_size=56, patch_size=14, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), crop_pct=0.875)


def write_transformers(name: str, folder: Path) -> Path:
    import transformers

    config, arguments, model, preprocessing = TRANSFORMERS[name]
    torch.manual_seed(1)
    model = getattr(transformers, model)(getattr(transformers, config)(**arguments))
    shake(model).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    return folder


def register_open_clip(name: str, folder: Path) -> str:
    import open_clip

    entry = {
        "embed_dim": 96 if name == "tiny-siglip" else 24,
        "vision_cfg": OPEN_CLIP[name],
        "text_cfg": OPEN_CLIP_TEXT,
    }
    if name == "tiny-coca":
        entry["multimodal_cfg"] = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
        entry["custom_text"] = True
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(entry))
    open_clip.add_model_config(folder / f"{name}.json")
    return name


@torch.no_grad()
def shake(model: torch.nn.Module) -> torch.nn.Module:
    """Every parameter away from what it starts at: two norms exchanged, or a bias lost, would not be seen."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def block_modules(encoder) -> list[torch.nn.Module]:
    """By their names, for all libraries; of the image tower, in order."""
    modules = [module for name, module in encoder.model.named_modules() if _BLOCK.fullmatch(name)]
    return modules


def images_for(encoder, number: int = 2, seed: int = 0) -> torch.Tensor:
    size = encoder.processor.config.image_size
    return torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(seed))
