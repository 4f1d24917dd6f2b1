"""Models written for others: our export, and the layouts of Apple, transformers and timm.

Every export is a folder with `model.safetensors`, a `config.json` and a model card. In ours, `config.json` holds what
the weights alone don't say:

    format, version     "aimv2" and 1
    architecture        "AIMv2" (encoder and decoder), "LiT" or "VisionEncoder"
    model               its config, as `aimv2.config.to_json` writes it
    preprocessing       what is done to an image, `ProcessorConfig.to_preprocessing`
    tokenizer           {"file", "sha256"}, or null for a model without one
    metadata            whatever is to be remembered
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from aimv2.config import from_json, to_json
from aimv2.encoder import SIZES, VisionConfig, VisionEncoder
from aimv2.features import FeatureEncoder
from aimv2.layouts import LAYOUTS, from_ours, misfits
from aimv2.lit import LiT, LiTConfig
from aimv2.manifest import sync
from aimv2.objectives.aimv2 import AIMv2, AIMv2Config
from aimv2.preprocessing import ProcessorConfig
from aimv2.weights import SAFETENSORS, ModelError

FORMAT, VERSION = "aimv2", 1
CONFIG, PREPROCESSOR, TOKENIZER, CARD = "config.json", "preprocessor_config.json", "tokenizer.model", "README.md"
ARCHITECTURES = {"AIMv2": AIMv2Config, "LiT": LiTConfig, "VisionEncoder": VisionConfig}
FORMATS = ("ours", "apple", "transformers", "timm")

ModelConfig = AIMv2Config | LiTConfig | VisionConfig


@dataclass(slots=True, kw_only=True)
class Card:
    """What a model card says beyond the architecture and the preprocessing."""

    name: str = "AIMv2 model"
    licence: str = "unknown"  # an identifier of the hub, as apache-2.0
    data: str = "not stated"
    recipe: str = "not stated"


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
        tokenizer: a folder with tokenizer.model, or a model file; copied.
        dtype: of the weights; None: as they are.

    Raises:
        ModelError: the weights don't fit the config, the format has no place for this model, `folder` exists and is no
            export, or what was written does not read back the same.
    """
    if format not in FORMATS:
        raise ModelError(f"format {format!r}: expected one of {', '.join(FORMATS)}")
    folder = Path(folder)
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
        contents, theirs = _CONFIGS[format](config, processing), _in_layout(state, config, format)
    weights = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in theirs.items()}
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        temporary.chmod(0o755)  # mkdtemp's folder is for the owner only
        save_file(weights, temporary / SAFETENSORS, metadata={"format": "pt"})
        if format == "ours":
            copied = None if tokenizer is None else _copy_tokenizer(Path(tokenizer), temporary / TOKENIZER)
            contents = _our_config(config, processing) | {"tokenizer": copied, "metadata": metadata or {}}
        elif format != "timm":  # whose config.json says it
            _write_json(temporary / PREPROCESSOR, processing.to_transformers())
        _write_json(temporary / CONFIG, contents)
        (temporary / CARD).write_text(_card(card or Card(), config, processing, format), encoding="utf-8")
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


def _in_layout(state: Mapping[str, Tensor], config: VisionConfig | LiTConfig, format: str) -> dict[str, Tensor]:
    layout = LAYOUTS[format]
    names = layout.lit if isinstance(config, LiTConfig) else layout.vision
    if names is None:
        raise ModelError(f"{format} has no LiT model: export its encoder, or to apple or transformers")
    return from_ours(state, names)


def _apple_config(config: VisionConfig | LiTConfig, processing: ProcessorConfig) -> dict:
    """As beside Apple's own weights; what reads these files by Apple's names (vLLM does) wants these fields."""
    vision = config.vision if isinstance(config, LiTConfig) else config
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


def _refuse_aim(config: VisionConfig, format: str) -> None:
    if (config.mlp, config.norm) != ("swiglu", "rmsnorm"):
        raise ModelError(
            f"{format} has AIMv2 (swiglu, rmsnorm) only, not an encoder with {config.mlp} and {config.norm}"
        )


_CONFIGS = {"apple": _apple_config, "transformers": _transformers_config, "timm": _timm_config}
_TAGS = "tags: [aimv2, vision]"  # by which a card of ours is known
_OPENED = {
    "ours": 'encoder = aimv2.load_encoder("FOLDER")',
    "apple": 'encoder = aimv2.load_encoder("FOLDER")  # or whatever reads Apple\'s names',
    "transformers": 'model = transformers.AutoModel.from_pretrained("FOLDER")',
    "timm": 'model = timm.create_model("local-dir:FOLDER", pretrained=True)',
}


def _card(card: Card, config: ModelConfig, processing: ProcessorConfig, format: str) -> str:
    """A model card with the hub's header."""
    vision = config if isinstance(config, VisionConfig) else config.vision
    library = {"transformers": "transformers", "timm": "timm"}.get(format, "aimv2")
    size = "any size" if processing.image_size is None else f"{processing.image_size} px"
    rows = {
        "architecture": f"{_name_of(config)}: {vision.depth} blocks of width {vision.width}, {vision.heads} heads, "
        f"{vision.mlp} {vision.mlp_hidden}, {vision.norm}, patches of {vision.patch_size} px, no CLS token",
        "positions": f"{vision.positions}, for {vision.image_size} px",
        "preprocessing": f"{size}, {processing.to_preprocessing()['resize']}, {processing.interpolation}, "
        f"mean {list(processing.mean)}, std {list(processing.std)}",
        "data": card.data,
        "recipe": card.recipe,
        "licence": card.licence,
    }
    table = "\n".join(f"| {name} | {text} |" for name, text in rows.items())
    return (
        f"---\nlibrary_name: {library}\nlicense: {card.licence}\npipeline_tag: image-feature-extraction\n"
        f"{_TAGS}\n---\n\n# {card.name}\n\n| | |\n|---|---|\n{table}\n\n"
        f"```python\n{_OPENED[format]}\n```\n"
    )


def _copy_tokenizer(source: Path, target: Path) -> dict[str, str]:
    source = source / TOKENIZER if source.is_dir() else source
    if not source.is_file():
        raise ModelError(f"no tokenizer at {source}")
    shutil.copyfile(source, target)
    return {"file": target.name, "sha256": hashlib.sha256(target.read_bytes()).hexdigest()}


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
    ours = card.is_file() and _TAGS in card.read_text(encoding="utf-8", errors="replace")
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
