"""Exported models: a folder with `model.safetensors`, `config.json` and the tokenizer, for eval, `init_from` and users.

`config.json` holds what the weights alone don't say:

    format, version     "aimv2" and 1
    architecture        the objective's class, here "AIMv2"
    objective           its config, as `aimv2.config.to_json` writes it; `objective.vision` builds the encoder
    preprocessing       image_size, mean, std, resize and interpolation of the images the model expects
    tokenizer           {"file", "sha256"}, or null for a model without text
    metadata            whatever the run wants to be remembered

Weights are named as in our own modules: `encoder.*`, `decoder.*`.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from aimv2.config import from_json
from aimv2.data.transforms import TransformConfig
from aimv2.encoder import VisionConfig, VisionEncoder
from aimv2.manifest import sync
from aimv2.objectives.aimv2 import AIMv2, AIMv2Config

FORMAT, VERSION, ARCHITECTURE = "aimv2", 1, "AIMv2"
WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.model"


class ExportError(ValueError):
    """An exported model that can't be written or read; the message names the file and what was expected."""


def export_model(
    model: nn.Module | Mapping[str, Tensor],
    folder: str | Path,
    *,
    objective: dict,
    transform: TransformConfig,
    tokenizer: str | Path | None = None,
    metadata: dict | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write `model` (or its state dict) to `folder` and return it. One process calls this, with whole weights.

    Written beside it, read back, compared, and renamed into place: an export is complete or absent. An export that is
    already there is replaced.

    Args:
        objective: `to_json` of the objective's config.
        transform: that of the training data; what concerns evaluation is kept.
        tokenizer: a folder with tokenizer.model, or a model file; copied.

    Raises:
        ExportError: `folder` exists and is no export, or what was written does not read back the same.
    """
    folder = Path(folder)
    _check_replaceable(folder)
    state = model.state_dict() if isinstance(model, nn.Module) else model
    weights = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in state.items()}
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        temporary.chmod(0o755)  # mkdtemp's folder is for the owner only
        save_file(weights, temporary / WEIGHTS, metadata={"format": "pt"})
        config = {
            "format": FORMAT,
            "version": VERSION,
            "architecture": ARCHITECTURE,
            "objective": objective,
            "preprocessing": preprocessing(transform),
            "tokenizer": None if tokenizer is None else _copy_tokenizer(Path(tokenizer), temporary / TOKENIZER),
            "metadata": metadata or {},
        }
        (temporary / CONFIG).write_text(json.dumps(config, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        _verify(temporary, weights)
        _replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def load_model(
    folder: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> AIMv2:
    """The whole model of an export, encoder and decoder, in eval mode.

    Raises:
        ExportError: a missing file, another format, or weights that don't fit; lists all of them.
    """
    config = read_export_config(folder)
    if config["architecture"] != ARCHITECTURE:
        raise ExportError(f"{folder} holds a model of architecture {config['architecture']!r}, not {ARCHITECTURE!r}")
    with _Blank(), torch.device("meta"):
        model = from_json(AIMv2Config, config["objective"]).build()
    return _load_weights(model, Path(folder) / WEIGHTS, "", dtype, device)


def load_encoder(
    folder: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> VisionEncoder:
    """The vision encoder of an export, in eval mode; the rest of the file is not read. Raises as `load_model`."""
    config = read_export_config(folder)
    with _Blank(), torch.device("meta"):
        encoder = VisionEncoder(from_json(VisionConfig, config["objective"]["vision"]))
    return _load_weights(encoder, Path(folder) / WEIGHTS, "encoder.", dtype, device)


def read_export_config(folder: str | Path) -> dict:
    """The export's config.json; ExportError if there is none or it is not ours."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ExportError(f"{folder} is not a folder: expected an exported model, with {CONFIG} and {WEIGHTS}")
    path = folder / CONFIG
    if not path.is_file():
        raise ExportError(f"{path} is missing: expected an exported model")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ExportError(f"{path} is not JSON: {error}") from None
    found = (config.get("format"), config.get("version")) if isinstance(config, dict) else None
    if found != (FORMAT, VERSION):
        raise ExportError(f"{path}: (format, version) is {found}, expected {(FORMAT, VERSION)}")
    return config


def preprocessing(transform: TransformConfig) -> dict:
    """What `eval_transform` does to an image, in words and numbers."""
    return {
        "image_size": transform.image_size,
        "mean": list(transform.mean),
        "std": list(transform.std),
        "resize": "shortest edge, then centre crop",
        "interpolation": "bicubic",
    }


class _Blank(TorchFunctionMode):
    """Leaves out `normal_`: on the meta device it fills nothing, but loads torch's compiler, which takes seconds."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        return kwargs["tensor"] if function is nn.init.normal_ else function(*args, **kwargs)


def _load_weights(
    module: nn.Module, path: Path, prefix: str, dtype: torch.dtype | None, device: torch.device | str | None
) -> nn.Module:
    """Fill a module on the meta device with the tensors whose names begin with `prefix`."""
    if not path.is_file():
        raise ExportError(f"{path} is missing")
    expected = module.state_dict()
    try:
        with safe_open(path, framework="pt", device=str(device or "cpu")) as file:
            names = {name.removeprefix(prefix) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118
            shapes = {name: tuple(file.get_slice(prefix + name).get_shape()) for name in names & expected.keys()}
            problems = [f"{prefix}{name} is missing" for name in expected if name not in names]
            problems += [f"{prefix}{name} is not a parameter" for name in sorted(names - expected.keys())]
            problems += [
                f"{prefix}{name} is {shapes[name]}, expected {tuple(tensor.shape)}"
                for name, tensor in expected.items()
                if name in shapes and shapes[name] != tensor.shape
            ]
            if problems:
                raise ExportError(f"{path} does not fit the model of its {CONFIG}: {'; '.join(problems)}")
            weights = {name: file.get_tensor(prefix + name).to(dtype=dtype) for name in expected}
    except SafetensorError as error:
        raise ExportError(f"{path} is damaged: {error}") from error
    module.load_state_dict(weights, assign=True)
    return module.eval()


def _copy_tokenizer(source: Path, target: Path) -> dict[str, str]:
    source = source / TOKENIZER if source.is_dir() else source
    if not source.is_file():
        raise ExportError(f"no tokenizer at {source}")
    shutil.copyfile(source, target)
    return {"file": target.name, "sha256": hashlib.sha256(target.read_bytes()).hexdigest()}


def _verify(folder: Path, weights: dict[str, Tensor]) -> None:
    """Read back what was written, bit for bit: a full disk or a bad one must not pass for an export."""
    read_export_config(folder)
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        same = set(file.keys()) == set(weights)
        same = same and all(torch.equal(_bytes(file.get_tensor(name)), _bytes(weights[name])) for name in weights)
    if not same:
        raise ExportError(f"{folder / WEIGHTS} does not read back as it was written")


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _check_replaceable(folder: Path) -> None:
    """Only an export or an empty folder may go: a run's own folder has a config.json, too."""
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists():
        try:
            read_export_config(folder)
        except ExportError as error:
            raise ExportError(f"{folder} exists and is no exported model to be replaced ({error})") from None


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
