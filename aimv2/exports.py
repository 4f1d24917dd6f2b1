"""Models written for others: our export, and the layouts of Apple, transformers and timm.

Every export is a folder with `model.safetensors`, a `config.json` and a model card. In ours, `config.json` holds what
the weights alone don't say:

    format, version     "aimv2" and 1
    architecture        "AIMv2" (encoder and decoder), "LiT" or "VisionEncoder"
    model               its config, as `aimv2.config.to_json` writes it
    preprocessing       what is done to an image, `ProcessorConfig.to_preprocessing`
    tokenizer           {"file", "sha256"}; {"name", "sha256"} for "clip", whose byte pairs come with open_clip; or null
    metadata            whatever is to be remembered
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from aimv2.clip_tokens import CLIP, EOS, VOCABULARY, are_clips, write_tokenizer
from aimv2.config import from_json, to_json
from aimv2.encoder import VisionConfig, VisionEncoder
from aimv2.export_formats import FORMATS, format_config, format_processing, in_layout
from aimv2.features import FeatureEncoder
from aimv2.layouts import misfits
from aimv2.lit import LiT, LiTConfig
from aimv2.manifest import sync
from aimv2.model_cards import TAGS, Card, model_card
from aimv2.objectives.aimv2 import AIMv2, AIMv2Config
from aimv2.preprocessing import ProcessorConfig
from aimv2.weights import SAFETENSORS, ModelError

FORMAT, VERSION = "aimv2", 1
CONFIG, PREPROCESSOR, TOKENIZER, CARD = "config.json", "preprocessor_config.json", "tokenizer.model", "README.md"
ARCHITECTURES = {"AIMv2": AIMv2Config, "LiT": LiTConfig, "VisionEncoder": VisionConfig}

ModelConfig = AIMv2Config | LiTConfig | VisionConfig


def export_model(
    model: nn.Module | Mapping[str, Tensor],
    folder: str | Path,
    *,
    config: ModelConfig,
    processing: ProcessorConfig,
    format: str = "ours",
    tokenizer: str | Path | None = None,
    metadata: dict | None = None,
    card: Card | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write `model` (or its state dict) to `folder` and return it. One process calls this, with whole weights.

    Written beside it, read back, compared, and renamed into place: an export is complete or absent. An export that is
    already there is replaced. In the layouts of others AIMv2 is its encoder: they have no decoder.

    Args:
        format: one of FORMATS.
        tokenizer: a folder with tokenizer.model, or a model file; copied into ours. "clip": open_clip's byte pairs. For
            transformers a LiT model with CLIP's tokens gets transformers' files of them, unless it has a model file.
        dtype: of the weights; None: as they are.

    Raises:
        ModelError: the weights don't fit the config, nor "clip" the text tower, the format has no place for this model,
            `folder` exists and is no export, or what was written does not read back the same.
    """
    if format not in FORMATS:
        raise ModelError(f"format {format!r}: expected one of {', '.join(FORMATS)}")
    folder, by_clip = Path(folder), _has_clip_tokens(config, tokenizer)
    _check_replaceable(folder)
    model = model.encoder if isinstance(model, FeatureEncoder) else model
    state = dict(model.state_dict() if isinstance(model, nn.Module) else model)
    if problems := misfits(shapes_of(empty_model(config)), {name: tuple(t.shape) for name, t in state.items()}, None):
        raise ModelError(f"the weights don't fit the config: {'; '.join(problems)}")
    if format != "ours" and isinstance(config, AIMv2Config):
        state = {name.removeprefix("encoder."): t for name, t in state.items() if name.startswith("encoder.")}
        config = config.vision
    if format == "ours":
        contents, theirs = {}, state
    else:
        processing = format_processing(config, processing)
        contents, theirs = format_config(config, processing, format), in_layout(state, config, format)
    weights = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in theirs.items()}
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        temporary.chmod(0o755)  # mkdtemp's folder is for the owner only
        save_file(weights, temporary / SAFETENSORS, metadata={"format": "pt"})
        if format == "ours":
            beside = {"tokenizer": _keep_tokenizer(tokenizer, temporary), "metadata": metadata or {}}
            contents = _our_config(config, processing) | beside
        elif format != "timm":  # whose config.json says it
            _write_json(temporary / PREPROCESSOR, processing.to_transformers())
        if format == "transformers" and isinstance(config, LiTConfig):
            write_tokenizer(temporary, config.text.context_length if by_clip else None)
        _write_json(temporary / CONFIG, contents)
        text = model_card(card or Card(), _name_of(config), config, processing, format, by_clip)
        (temporary / CARD).write_text(text, encoding="utf-8")
        _verify(temporary, weights)
        _replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


class _Blank(TorchFunctionMode):
    """Leaves out `normal_`: on the meta device it fills nothing, but loads torch's compiler, which takes seconds."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        return kwargs["tensor"] if function is nn.init.normal_ else function(*args, **kwargs)


def empty_model(config: ModelConfig) -> AIMv2 | LiT | VisionEncoder:
    """The model of a config on the meta device."""
    kind = {AIMv2Config: AIMv2, LiTConfig: LiT, VisionConfig: VisionEncoder}[type(config)]
    with _Blank(), torch.device("meta"):
        return kind(config)


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def read_export_config(folder: str | Path) -> dict:
    """The config.json of an export of ours; ModelError if there is none or it is not ours."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelError(f"{folder} is not a folder: expected an exported model, with {CONFIG} and {SAFETENSORS}")
    path = folder / CONFIG
    if not path.is_file():
        raise ModelError(f"{path} is missing: expected an exported model")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not JSON: {error}") from None
    found = (config.get("format"), config.get("version")) if isinstance(config, dict) else None
    if found != (FORMAT, VERSION):
        raise ModelError(f"{path}: (format, version) is {found}, expected {(FORMAT, VERSION)}")
    if missing := [key for key in ("architecture", "model", "preprocessing") if key not in config]:
        raise ModelError(f"{path} lacks {', '.join(missing)}")
    return config


def export_architecture(config: Mapping) -> ModelConfig:
    """The model's config in an export's config.json; ModelError for an architecture that we don't know."""
    if config.get("architecture") not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ModelError(f"architecture {config.get('architecture')!r}: expected one of {known}")
    return from_json(ARCHITECTURES[config["architecture"]], config["model"])


def _name_of(config: ModelConfig) -> str:
    return next(name for name, kind in ARCHITECTURES.items() if isinstance(config, kind))


def _our_config(config: ModelConfig, processing: ProcessorConfig) -> dict:
    return {
        "format": FORMAT,
        "version": VERSION,
        "architecture": _name_of(config),
        "model": to_json(config),
        "preprocessing": processing.to_preprocessing(),
    }


def _has_clip_tokens(config: ModelConfig, tokenizer: str | Path | None) -> bool:
    """Whether it is a LiT model that reads CLIP's byte pairs. Raises ModelError for one that is only said to."""
    by_clip = isinstance(config, LiTConfig) and are_clips(config.text)
    if isinstance(config, LiTConfig) and tokenizer == CLIP and not by_clip:
        raise ModelError(
            f"tokenizer {CLIP!r}: the text tower has {config.text.vocab_size} tokens and EOS {config.text.eos}, "
            f"expected CLIP's {VOCABULARY} and {EOS}"
        )
    return by_clip and tokenizer in (None, CLIP)


def _keep_tokenizer(tokenizer: str | Path | None, folder: Path) -> dict[str, str] | None:
    """What an export's config.json says of it; a model file is copied to the folder."""
    if tokenizer is None:
        return None
    if tokenizer == CLIP:
        from aimv2.data.tokenizer import open_tokenizer  # which needs packages that few who export need

        return {"name": CLIP, "sha256": open_tokenizer(CLIP).fingerprint}
    source = Path(tokenizer)
    source = source / TOKENIZER if source.is_dir() else source
    if not source.is_file():
        raise ModelError(f"no tokenizer at {source}")
    shutil.copyfile(source, folder / TOKENIZER)
    return {"file": TOKENIZER, "sha256": hashlib.sha256(source.read_bytes()).hexdigest()}


def _write_json(path: Path, contents: dict) -> None:
    path.write_text(json.dumps(contents, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _verify(folder: Path, weights: dict[str, Tensor]) -> None:
    """Read back what was written, bit for bit: a full disk or a bad one must not pass for an export."""
    json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    with safe_open(folder / SAFETENSORS, framework="pt") as file:
        same = set(file.keys()) == set(weights)
        same = same and all(torch.equal(_bytes(file.get_tensor(name)), _bytes(weights[name])) for name in weights)
    if not same:
        raise ModelError(f"{folder / SAFETENSORS} does not read back as it was written")


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _check_replaceable(folder: Path) -> None:
    """Only an export or an empty folder may go: a run's own folder has a config.json, too."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    card = folder / CARD
    ours = card.is_file() and TAGS in card.read_text(encoding="utf-8", errors="replace")
    if not ours or not {CONFIG, SAFETENSORS} <= {path.name for path in folder.iterdir()}:
        raise ModelError(
            f"{folder} exists and is no exported model to be replaced: it lacks {CONFIG}, {SAFETENSORS} or our {CARD}"
        )


def _replace(new: Path, folder: Path) -> None:
    """Put `new` in the place of `folder`. If a kill comes between the renames, the old one is left beside it."""
    for path in (*new.iterdir(), new):
        sync(path)
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    os.rename(new, folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
