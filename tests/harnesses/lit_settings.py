"""A small LiT model with CLIP's tokens, and a zero-shot task for it."""

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
