"""Models of images and text of every library, behind one interface: for zero-shot classification and retrieval.

B images or texts, T token positions, S side of an image, E length of a feature.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aimv2.clip_tokens import NO_TOKENIZER
from aimv2.evals.encoders.interface import describe_module, modules_of, weights_digest
from aimv2.evals.encoders.open_clip import clip_processing, create_open_clip
from aimv2.evals.encoders.opening import as_one_line, own_seed, short_name
from aimv2.evals.encoders.packages import optional
from aimv2.evals.encoders.transformers import settings_of, transformers_processing
from aimv2.evals.harness import at_rest
from aimv2.evals.lit_tokens import lit_tokenizer
from aimv2.exports import TOKENIZER
from aimv2.lit import LiT, LiTConfig
from aimv2.preprocessing import ProcessorConfig
from aimv2.pretrained import open_checkpoint, resized, sized
from aimv2.processor import Processor


class TextImageModel:
    """At rest whatever mode the model is in: without gradients, features in fp32.

    It can be handed to open_clip's zero-shot code and to what was written for its models: `encode_text(text,
    normalize=True)` and `model(text=text)` both work.

    Attributes:
        spec: what `open_text_image` was given.
        name: the same, short and fit for a file's name.
        source: the library.
        trained: whether the weights were read, and not drawn.
        settings: what is known of the model beside its weights, as JSON.
        processor: prepares images.
        tokenizer: list of str -> token ids (B, T).
        model: the module behind it, with `encode_image` and `encode_text`.
    """

    def __init__(
        self,
        model: nn.Module,
        config: ProcessorConfig,
        tokenizer: Callable[[Sequence[str]], Tensor],
        *,
        spec: str,
        source: str,
        tokens: dict,
        settings: Mapping[str, Any] | None = None,
        trained: bool = True,
    ):
        if config.resize == "native":
            raise ValueError(f"{spec}: it takes images of any size, evaluations one: expected an image_size")
        self.model, self.processor, self.tokenizer = model, Processor(config), tokenizer
        self.spec, self.name, self.source, self.trained = spec, spec, source, trained
        self.tokens, self.settings = tokens, settings or {}
        self.device = next(model.parameters()).device

    def encode_image(self, images: Tensor, normalize: bool = True) -> Tensor:
        """Prepared images (B, 3, S, S) -> (B, E); of length 1, or as projected."""
        with at_rest(self.model):
            return _finished(self._encode_image(images.to(self.device)), normalize)

    def encode_text(self, text: Tensor, normalize: bool = True) -> Tensor:
        """Token ids (B, T) -> (B, E); of length 1, or as projected."""
        with at_rest(self.model):
            return _finished(self._encode_text(text.to(self.device)), normalize)

    def __call__(
        self, image: Tensor | None = None, text: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """open_clip's triple: unit vectors of the images and of the texts, and the scale, None where there is none."""
        scale = getattr(self.model, "logit_scale", None)
        return (
            None if image is None else self.encode_image(image),
            None if text is None else self.encode_text(text),
            None if scale is None else scale.detach().exp(),
        )

    def _encode_image(self, images: Tensor) -> Tensor:
        return self.model.encode_image(images, normalize=False)

    def _encode_text(self, text: Tensor) -> Tensor:
        return self.model.encode_text(text, normalize=False)

    def to(self, device: torch.device | str) -> Self:
        self.model.to(device)
        self.device = torch.device(device)
        return self

    def describe(self) -> dict:
        """All that tells one model from another, ready for JSON."""
        return {
            "spec": self.spec,
            "name": self.name,
            "source": self.source,
            "trained": self.trained,
            "weights": weights_digest(self.model),
            "tokenizer": self.tokens,
            **describe_module(self.model, self.settings, self.processor.config),
        }


def _finished(features: Tensor, normalize: bool) -> Tensor:
    return F.normalize(features.float(), dim=-1) if normalize else features.float()


@dataclass(frozen=True, slots=True)
class ImageFeatures:
    """A view for `extract`: unit vectors to compare with those of texts."""

    key: str = "features beside text"

    def __call__(self, model: TextImageModel, images: Tensor) -> dict[str, Tensor]:
        return {"image": model.encode_image(images)}


def text_image_of(
    model: nn.Module, processing: ProcessorConfig, tokenizer: str | Path | None = None, spec: str = "model"
) -> TextImageModel:
    """A LiT model, or an objective with one in it, which may be in training: it keeps its mode and gradients.

    Args:
        tokenizer: sentencepiece model, or a folder with one, if the tokens are not CLIP's byte pairs: "clip" or None.

    Raises:
        ValueError: there is no text tower, or no tokenizer of its vocabulary.
    """
    lit = next((module for module in model.modules() if isinstance(module, LiT)), None)
    if lit is None:
        raise ValueError(f"{spec} is {type(model).__name__}, without a text tower: expected a model of images and text")
    tokens, described = lit_tokenizer(lit.config.text, spec, tokenizer)
    return TextImageModel(
        lit, processing, tokens, spec=spec, source="aimv2", tokens=described, settings=asdict(lit.config)
    )


def open_text_image(spec: str, *, image_size: int | None = None, device: torch.device | str = "cpu") -> TextImageModel:
    """A model of images and text, in fp32.

    Args:
        spec: one of
            aimv2:PATH                  LiT, as our export or in Apple's or transformers' layout: folder, file, hub name
            open_clip:NAME[,WEIGHTS]    WEIGHTS a tag or a file; without: untrained, the same each time
            hf:NAME-OR-FOLDER           of transformers: CLIP, SigLIP, AIMv2 with text
        image_size: pixels a side; None: what the weights are made for. Learned positions are interpolated, but by
            transformers for its AIMv2.

    Raises:
        ValueError: another spec or size, a model without a text tower, or one that can't be opened.
    """
    kind, _, rest = spec.partition(":")
    if kind not in SOURCES or not rest:
        raise ValueError(f"model {spec!r}: expected aimv2:PATH, open_clip:NAME[,WEIGHTS] or hf:NAME-OR-FOLDER")
    if image_size is not None and (not isinstance(image_size, int) or image_size < 1):
        raise ValueError(f"image_size {image_size!r}: expected pixels")
    with as_one_line(spec), own_seed():
        model = SOURCES[kind](rest, spec, image_size)
        model.name = short_name(kind, rest, None, model.trained)
    return model.to(device)


def open_lit(path: str, spec: str, image_size: int | None = None) -> TextImageModel:
    """`aimv2:PATH`; at another size its learned positions are interpolated once.

    A native model is given whole images as squares: evaluations stack images, and have no place for a mask.
    """
    checkpoint = open_checkpoint(path)
    config, *_ = checkpoint.whole()
    if not isinstance(config, LiTConfig):
        kind = type(config).__name__.removesuffix("Config")
        raise ValueError(f"{spec} is {kind}, without a text tower: expected a model of images and text")
    vision, layout, prefix = checkpoint.vision()
    stored = checkpoint.processor_config(vision, layout)
    size = vision.image_size if stored.resize == "native" and image_size is None else image_size
    processing = resized(stored, size)
    model = checkpoint.read_whole(torch.float32)
    if image_size not in (None, vision.image_size):
        model.config = replace(config, vision=sized(vision, image_size, stored))
        model.encoder = checkpoint.read_vision(model.config.vision, vision, layout, prefix, torch.float32).eval()
    beside = checkpoint.path.parent / TOKENIZER
    return text_image_of(model.requires_grad_(False), processing, beside if beside.exists() else None, spec)


class TransformersTextImage(TextImageModel):
    """Of transformers' `get_image_features` and `get_text_features`."""

    interpolate = False  # positions, for images of another size

    def _encode_image(self, images: Tensor) -> Tensor:
        arguments = {"interpolate_pos_encoding": True} if self.interpolate else {}
        return self.model.get_image_features(images, **arguments).pooler_output

    def _encode_text(self, text: Tensor) -> Tensor:
        causal = {}
        if self.model.config.model_type == "aimv2":  # whose text tower looks ahead when there is no mask
            causal = {"attention_mask": torch.ones_like(text)}
        return self.model.get_text_features(text, **causal).pooler_output


def open_open_clip_pair(rest: str, spec: str, image_size: int | None = None) -> TextImageModel:
    """`open_clip:NAME[,WEIGHTS]`, prepared as `open_encoder` does."""
    model, trained = create_open_clip(rest, spec, image_size)
    name = rest.partition(",")[0]
    tokenizer = optional("open_clip").get_tokenizer(name, context_length=getattr(model, "context_length", None))
    return TextImageModel(
        model,
        clip_processing(model.visual.preprocess_cfg, 1),
        tokenizer,
        spec=spec,
        source="open_clip",
        tokens={"kind": type(tokenizer).__name__, "context": tokenizer.context_length},
        settings={"modules": modules_of(model)},
        trained=trained,
    )


def open_transformers_pair(rest: str, spec: str, image_size: int | None = None) -> TransformersTextImage:
    """`hf:NAME-OR-FOLDER`. In AIMv2's text tower only eager attention with a mask is causal."""
    transformers = optional("transformers")
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    kind = transformers.AutoConfig.from_pretrained(rest)
    if not hasattr(kind, "text_config") or not hasattr(kind, "vision_config"):
        raise ValueError(f"{spec} is {kind.model_type}, without a text tower: expected a model of images and text")
    settings = {"attn_implementation": "eager"} if kind.model_type == "aimv2" else {}
    model, found = transformers.AutoModel.from_pretrained(
        rest, dtype=torch.float32, output_loading_info=True, **settings
    )
    if not hasattr(model, "get_text_features"):
        raise ValueError(f"{spec} is {type(model).__name__}: expected one with get_text_features")
    if found["missing_keys"]:
        raise ValueError(f"{spec}: its weights lack {', '.join(sorted(found['missing_keys'])[:3])}")
    if get_tokenizer_config(rest).get("tokenizer_class") == NO_TOKENIZER:
        raise ValueError(
            f"{spec} has no tokenizer, for its tokens aren't CLIP's: expected aimv2:PATH, of the export in our layout"
        )
    entry = transformers.AutoImageProcessor.from_pretrained(rest, backend="pil").to_dict()
    tokenizer = transformers.AutoTokenizer.from_pretrained(rest)
    context = kind.text_config.max_position_embeddings

    def tokens(texts: Sequence[str]) -> Tensor:
        settings = {"padding": "max_length", "max_length": context, "truncation": True, "return_tensors": "pt"}
        return tokenizer(list(texts), **settings).input_ids

    pair = TransformersTextImage(
        model.eval().requires_grad_(False),
        transformers_processing(entry, 1, image_size),
        tokens,
        spec=spec,
        source="transformers",
        tokens={"kind": type(tokenizer).__name__, "context": context},
        settings=settings_of(kind),
    )
    if image_size not in (None, kind.vision_config.image_size):
        pair.interpolate = "interpolate_pos_encoding" in inspect.signature(model.vision_model.forward).parameters
        if not pair.interpolate and not getattr(kind.vision_config, "is_native", False):
            raise ValueError(
                f"image_size {image_size}: expected {kind.vision_config.image_size}, transformers does not interpolate "
                f"the positions of {kind.model_type}"
            )
    return pair


SOURCES = {"aimv2": open_lit, "open_clip": open_open_clip_pair, "hf": open_transformers_pair}
