"""A small LiT model with CLIP's tokens, a zero-shot task for it, and what transformers says about it."""

from collections.abc import Callable

import pytest
import torch
from tiny_models import V2

from aimv2.lit import LiTConfig
from aimv2.preprocessing import ProcessorConfig
from aimv2.text_encoder import TextConfig

CONFIG = LiTConfig(
    vision=V2,
    text=TextConfig(width=64, depth=2, heads=1, mlp_hidden=64),  # CLIP's vocabulary and context
    projection=32,
    pool_heads=2,
)
# Rounded as transformers does, whose preprocessor_config.json this is written from.
PROCESSING = ProcessorConfig(
    image_size=56, patch_size=14, mean=(0.5, 0.4, 0.3), std=(0.3, 0.2, 0.25), crop_rounding="down"
)
CLASSES = ["circle", "square", "triangle", "star", "cross", "heart"]
TEMPLATES = ["a photo of a {c}.", "the {c}"]


def transformers_features(folder) -> Callable:
    """Unit vectors of images or texts by transformers' model and image processor, with CLIP's ids from open_clip."""
    open_clip = pytest.importorskip("open_clip")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    processor = transformers.CLIPImageProcessorPil.from_pretrained(folder)

    @torch.no_grad()
    def features(images=(), texts=()):
        if images:
            pixels = processor([image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]
            vectors = model.get_image_features(pixels)
        else:
            ids = open_clip.get_tokenizer("ViT-B-32")(list(texts))
            vectors = model.get_text_features(ids, attention_mask=torch.ones_like(ids))  # without one it is not causal
        vectors = getattr(vectors, "pooler_output", vectors)
        return vectors / vectors.norm(dim=-1, keepdim=True)

    return features
