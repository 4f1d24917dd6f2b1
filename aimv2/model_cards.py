"""The README.md of an export: a model card with the hub's header."""

from dataclasses import dataclass

from aimv2.encoder import VisionConfig
from aimv2.lit import LiTConfig
from aimv2.objectives.aimv2 import AIMv2Config
from aimv2.preprocessing import ProcessorConfig

TAGS = "tags: [aimv2, vision]"  # by which a card of ours is known

_LIBRARIES = {"transformers": "transformers", "timm": "timm"}
_ENCODER = {
    "ours": 'encoder = aimv2.load_encoder("FOLDER")',
    "apple": 'encoder = aimv2.load_encoder("FOLDER")  # or whatever reads Apple\'s names',
    "transformers": 'model = transformers.AutoModel.from_pretrained("FOLDER")',
    "timm": 'model = timm.create_model("local-dir:FOLDER", pretrained=True)',
}
_LIT = {
    "ours": 'model = aimv2.load_model("FOLDER")',
    "apple": 'model = aimv2.load_model("FOLDER")  # or whatever reads Apple\'s names',
    "transformers": """model = transformers.AutoModel.from_pretrained("FOLDER")
processor = transformers.AutoProcessor.from_pretrained("FOLDER", backend="pil")
texts = ["a photo of a cat", "a photo of a dog"]
inputs = processor(text=texts, images=[image], padding=True, truncation=True, return_tensors="pt")
logits = model(**inputs).logits_per_image  # (1, 2)""",
}
_ATTENTION = """
Attention is eager, as config.json says. With sdpa the text tower of transformers (5.23) is not causal whenever no text
of the batch is padded: the features are wrong. An `attention_mask`, as the processor gives it, is needed in any case.
"""
_PROCESSOR = """
The processor cleans texts less than open_clip's tokenizer, which also repairs broken encodings and HTML entities. With
`backend="pil"` it prepares images as in training. Without, transformers resizes with torchvision, whose rounding is
another.
"""
_NO_TOKENIZER = """
There is no tokenizer here: the text tower has {tokens} tokens of its own, not CLIP's byte pairs. Images are prepared by
`AutoImageProcessor`; token ids have to come from the tokenizer it was trained with, end with {eos} and go into
`model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=images)`, padded with {eos}.
"""
_LIT_WITHOUT_TOKENIZER = """model = transformers.AutoModel.from_pretrained("FOLDER")
processor = transformers.AutoImageProcessor.from_pretrained("FOLDER")"""


@dataclass(slots=True, kw_only=True)
class Card:
    """What a model card says beyond the architecture and the preprocessing."""

    name: str = "AIMv2 model"
    licence: str = "unknown"  # an identifier of the hub, as apache-2.0
    data: str = "not stated"
    recipe: str = "not stated"


def model_card(
    card: Card,
    architecture: str,
    config: AIMv2Config | LiTConfig | VisionConfig,
    processing: ProcessorConfig,
    format: str,
    by_clip: bool = False,
) -> str:
    """`architecture` is the name of `config`'s; `by_clip`: it reads CLIP's byte pairs."""
    vision = config if isinstance(config, VisionConfig) else config.vision
    size = "any size" if processing.image_size is None else f"{processing.image_size} px"
    rows = {
        "architecture": f"{architecture}: {vision.depth} blocks of width {vision.width}, {vision.heads} heads, "
        f"{vision.mlp} {vision.mlp_hidden}, {vision.norm}, patches of {vision.patch_size} px, no CLS token",
        "positions": f"{vision.positions}, for {vision.image_size} px",
        "preprocessing": f"{size}, {processing.to_preprocessing()['resize']}, {processing.interpolation}, "
        f"mean {list(processing.mean)}, std {list(processing.std)}",
        "data": card.data,
        "recipe": card.recipe,
        "licence": card.licence,
    }
    if isinstance(config, LiTConfig):
        text = config.text
        rows["text"] = (
            f"{text.depth} causal blocks of width {text.width}, {text.heads} heads, {text.vocab_size} tokens, at most "
            f"{text.context_length} with EOS {text.eos}; both towers are projected to {config.projection}"
        )
    task = "zero-shot-image-classification" if isinstance(config, LiTConfig) else "image-feature-extraction"
    table = "\n".join(f"| {name} | {text} |" for name, text in rows.items())
    opened, notes = _opened(config, format, by_clip)
    return (
        f"---\nlibrary_name: {_LIBRARIES.get(format, 'aimv2')}\nlicense: {card.licence}\npipeline_tag: {task}\n"
        f"{TAGS}\n---\n\n# {card.name}\n\n| | |\n|---|---|\n{table}\n\n```python\n{opened}\n```\n{notes}"
    )


def _opened(config: AIMv2Config | LiTConfig | VisionConfig, format: str, by_clip: bool) -> tuple[str, str]:
    """How it is opened, and what one should know of that."""
    if not isinstance(config, LiTConfig):
        return _ENCODER[format], ""
    if format != "transformers":
        return _LIT[format], ""
    if by_clip:
        return _LIT[format], _ATTENTION + _PROCESSOR
    return _LIT_WITHOUT_TOKENIZER, _ATTENTION + _NO_TOKENIZER.format(tokens=config.text.vocab_size, eos=config.text.eos)
