"""Files of weights, read without executing anything: safetensors (whole or in shards) and plain PyTorch pickles."""

import hashlib
import json
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

SAFETENSORS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = {".pth", ".pt", ".bin", ".ckpt"}
NESTED = ("state_dict", "model")  # where training code puts the weights beside other things


class ModelError(ValueError):
    """A model that can't be read or written; the message names the file and what was expected."""


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of names, types, shapes and values, in the order given; one tensor at a time is in memory."""
    found = hashlib.sha256()
    for name, tensor in tensors:
        values = tensor.detach().cpu().contiguous()
        found.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        found.update(memoryview(values.flatten().view(torch.uint8).numpy()))
    return found.hexdigest()


class WeightFiles:
    """Tensors by name, each read when it is asked for: safetensors are memory-mapped, and so are pickles.

    Raises ModelError for anything that is not weights, naming the file and what it seems to be.
    """

    def __init__(self, path: str | Path, device: torch.device | str | None = None):
        self.path, self.device = Path(path), torch.device("cpu" if device is None else device)
        if not self.path.is_file():
            raise ModelError(f"{self.path} is missing")
        self._tensors: Mapping[str, Tensor] = {}
        self._files: dict[str, safe_open] = {}  # of each name
        if self.path.name.endswith(".index.json"):
            self._open_shards()
        elif self.path.suffix in PICKLES:
            self._tensors = _read_pickle(self.path)
        else:
            self._open(self.path)
        self.shapes: dict[str, tuple[int, ...]] = {
            **{name: tuple(file.get_slice(name).get_shape()) for name, file in self._files.items()},
            **{name: tuple(tensor.shape) for name, tensor in self._tensors.items()},
        }

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name] if name in self._tensors else self._files[name].get_tensor(name)
        return tensor.to(self.device)

    def _open(self, path: Path) -> None:
        try:
            file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} {_what_is_wrong(path)}: {error}") from error
        self._files |= dict.fromkeys(file.keys(), file)

    def _open_shards(self) -> None:
        try:
            shards = json.loads(self.path.read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(shards.values()))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ModelError(f"{self.path} is not an index of shards: {type(error).__name__}: {error}") from error
        for name in names:
            if Path(name).name != name:
                raise ModelError(f"{self.path} names the shard {name!r}: expected a file beside it")
            if not (path := self.path.with_name(name)).is_file():
                raise ModelError(f"{path} is missing, a shard of {self.path.name}")
            self._open(path)
        if missing := sorted(shards.keys() - self._files.keys()):
            raise ModelError(f"{self.path}: its shards lack {', '.join(missing)}")


def find_weights(folder: Path) -> Path:
    """The file of weights in a model's folder; ModelError if there is none, or several and no usual name."""
    for name in (SAFETENSORS, INDEX):
        if (folder / name).is_file():
            return folder / name
    found = sorted(path for path in folder.iterdir() if path.suffix in {".safetensors", *PICKLES})
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        if (folder / "export" / SAFETENSORS).is_file():  # a run's folder
            names += f"; did you mean {folder / 'export'}?"
        raise ModelError(f"{folder}: expected {SAFETENSORS}, {INDEX} or one file of weights; found {names}")
    return found[0]


def _read_pickle(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a pickle that holds nothing else; whatever would run code is refused before it runs."""
    zipped = is_zipfile(path)
    if not zipped and _head(path)[:1] != b"\x80":  # torch's format before 1.6
        raise ModelError(f"{path} {_what_is_wrong(path)}")
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"{path} holds more than weights and was refused, nothing of it was run: {reason}") from error
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise ModelError(f"{path} {_what_is_wrong(path)}: {type(error).__name__}: {error}") from error
    for key in NESTED:
        if isinstance(contents, Mapping) and isinstance(contents.get(key), Mapping):
            contents = contents[key]
    if not isinstance(contents, Mapping) or not all(isinstance(value, Tensor) for value in contents.values()):
        raise ModelError(f"{path}: expected tensors by name, found {type(contents).__name__}")
    return contents


def _what_is_wrong(path: Path) -> str:
    """What a file that is no weights looks like."""
    head = _head(path).lstrip()
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the weights (git lfs pull fetches them)"
    if head[:1] == b"<":
        return "is a web page, not weights (a download that needed a login?)"
    return "is damaged, cut off or no file of weights"


def _head(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(64)
