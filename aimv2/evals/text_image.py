"""Models of images and text of every library, behind one interface: for zero-shot classification and retrieval.

B images or texts, T token positions, S side of an image, E length of a feature.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aimv2.evals.encoders.interface import describe_module, modules_of, weights_digest
from aimv2.evals.encoders.open_clip import clip_processing, create_open_clip
from aimv2.evals.encoders.opening import as_one_line, own_seed, short_name
from aimv2.evals.encoders.packages import optional
from aimv2.evals.encoders.transformers import settings_of, transformers_processing
from aimv2.evals.harness import at_rest
from aimv2.exports import TOKENIZER
from aimv2.lit import LiT, LiTConfig
from aimv2.preprocessing import ProcessorConfig
from aimv2.pretrained import open_checkpoint, resized
from aimv2.processor import Processor
from aimv2.text_encoder import TextConfig

CLIP_VOCABULARY, CLIP_EOS = 49408, 49407


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
        tokenizer: sentencepiece model, or a folder with one, if the tokens are not CLIP's byte pairs.

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


def open_text_image(spec: str, *, device: torch.device | str = "cpu") -> TextImageModel:
    """A model of images and text, in fp32.

    Args:
        spec: one of
            aimv2:PATH                  LiT, as our export or in Apple's or transformers' layout: folder, file, hub name
            open_clip:NAME[,WEIGHTS]    WEIGHTS a tag or a file; without: untrained, the same each time
            hf:NAME-OR-FOLDER           of transformers: CLIP, SigLIP, AIMv2 with text

    Raises:
        ValueError: another spec, a model without a text tower, or one that can't be opened.
    """
    kind, _, rest = spec.partition(":")
    if kind not in SOURCES or not rest:
        raise ValueError(f"model {spec!r}: expected aimv2:PATH, open_clip:NAME[,WEIGHTS] or hf:NAME-OR-FOLDER")
    with as_one_line(spec), own_seed():
        model = SOURCES[kind](rest, spec)
        model.name = short_name(kind, rest, None, model.trained)
    return model.to(device)


def open_lit(path: str, spec: str) -> TextImageModel:
    """`aimv2:PATH`. A native model is given squares: evaluations stack images, and have no place for a mask."""
    checkpoint = open_checkpoint(path)
    config, *_ = checkpoint.whole()
    if not isinstance(config, LiTConfig):
        kind = type(config).__name__.removesuffix("Config")
        raise ValueError(f"{spec} is {kind}, without a text tower: expected a model of images and text")
    vision, layout, _ = checkpoint.vision()
    processing = checkpoint.processor_config(vision, layout)
    if processing.resize == "native":
        processing = resized(processing, vision.image_size)
    beside = checkpoint.path.parent / TOKENIZER
    model = checkpoint.read_whole(torch.float32).requires_grad_(False)
    return text_image_of(model, processing, beside if beside.exists() else None, spec)


def lit_tokenizer(
    config: TextConfig, spec: str, model_file: str | Path | None = None
) -> tuple[Callable[[Sequence[str]], Tensor], dict]:
    """The tokenizer of a text tower and its description: `model_file`'s, or CLIP's byte pairs.

    Raises:
        ValueError: neither has the tower's vocabulary.
    """
    if model_file is not None:
        tokens = SentencepieceTokens(model_file, config, spec)
        return tokens, {"kind": "sentencepiece", "sha256": tokens.fingerprint, "context": config.context_length}
    if (config.vocab_size, config.eos) != (CLIP_VOCABULARY, CLIP_EOS):
        raise ValueError(
            f"{spec} has {config.vocab_size} tokens and EOS {config.eos}, not CLIP's {CLIP_VOCABULARY} and {CLIP_EOS}: "
            f"expected a {TOKENIZER} beside its weights"
        )
    return _clip_tokens(config.context_length), {"kind": "CLIP byte pairs", "context": config.context_length}


def _clip_tokens(context_length: int) -> Callable[[Sequence[str]], Tensor]:
    return optional("open_clip").tokenizer.SimpleTokenizer(context_length=context_length)


class SentencepieceTokens:
    """Texts -> ids (B, T) that end with the first EOS. A text without any usable character is EOS alone.

    Raises:
        ValueError: the sentencepiece model is another vocabulary's.
    """

    def __init__(self, model_file: str | Path, config: TextConfig, spec: str):
        from aimv2.data.tokenizer import Tokenizer

        self._tokenizer, self._config = Tokenizer(model_file), config
        self.fingerprint = self._tokenizer.fingerprint
        found = (self._tokenizer.vocab_size, self._tokenizer.eos_id)
        if found != (config.vocab_size, config.eos):
            raise ValueError(
                f"{model_file} has {found[0]} tokens and EOS {found[1]}: "
                f"expected {config.vocab_size} and {config.eos}, as {spec} has"
            )

    def __call__(self, texts: Sequence[str]) -> Tensor:
        c = self._config
        ids = torch.full((len(texts), c.context_length), c.eos)
        for row, text in zip(ids, texts, strict=True):
            found = self._tokenizer.encode(text, c.context_length)
            row[: len(found)] = torch.tensor(found, dtype=torch.int64)
        return ids


class TransformersTextImage(TextImageModel):
    """Of transformers' `get_image_features` and `get_text_features`."""

    def _encode_image(self, images: Tensor) -> Tensor:
        return self.model.get_image_features(images).pooler_output

    def _encode_text(self, text: Tensor) -> Tensor:
        causal = {}
        if self.model.config.model_type == "aimv2":  # whose text tower looks ahead when there is no mask
            causal = {"attention_mask": torch.ones_like(text)}
        return self.model.get_text_features(text, **causal).pooler_output


def open_open_clip_pair(rest: str, spec: str) -> TextImageModel:
    """`open_clip:NAME[,WEIGHTS]`, prepared as `open_encoder` does."""
    model, trained = create_open_clip(rest, spec)
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


def open_transformers_pair(rest: str, spec: str) -> TransformersTextImage:
    """`hf:NAME-OR-FOLDER`. In AIMv2's text tower only eager attention with a mask is causal."""
    transformers = optional("transformers")
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
    entry = transformers.AutoImageProcessor.from_pretrained(rest, backend="pil").to_dict()
    tokenizer = transformers.AutoTokenizer.from_pretrained(rest)
    context = kind.text_config.max_position_embeddings

    def tokens(texts: Sequence[str]) -> Tensor:
        settings = {"padding": "max_length", "max_length": context, "truncation": True, "return_tensors": "pt"}
        return tokenizer(list(texts), **settings).input_ids

    return TransformersTextImage(
        model.eval().requires_grad_(False),
        transformers_processing(entry, 1),
        tokens,
        spec=spec,
        source="transformers",
        tokens={"kind": type(tokenizer).__name__, "context": context},
        settings=settings_of(kind),
    )


SOURCES = {"aimv2": open_lit, "open_clip": open_open_clip_pair, "hf": open_transformers_pair}
