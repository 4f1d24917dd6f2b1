"""One evaluation from beginning to end: a protocol, an encoder, a dataset -> a JSON file with its samples beside it."""

import dataclasses
import hashlib
import json
import logging
import platform
import re
import time
from importlib import metadata
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors.torch import save_file

from aimv2.evals.datasets.interface import Dataset, ImageSet
from aimv2.evals.feature_store import fingerprint
from aimv2.evals.results import MOST_KEYS, Outcome
from aimv2.evals.session import Session
from aimv2.whole_files import whole_file, write_json

FORMAT = "aimv2 evaluation 1"
PACKAGES = (
    "aimv2",
    "torch",
    "torchvision",
    "numpy",
    "pillow",
    "timm",
    "open_clip_torch",
    "transformers",
    "scikit-learn",
)

logger = logging.getLogger(__name__)


class Evaluation(Protocol):
    """A dataclass of settings: AttentiveProbe, LinearProbe, KNN, ZeroShot, Retrieval and so on.

    `trains` is False where a training set is not looked at, so that it does not tell results apart.
    """

    name: str
    trains: bool = True

    def run(self, encoder, data: Dataset, session: Session) -> Outcome: ...


def evaluate(protocol: Evaluation, encoder, data: Dataset, out: Path, session: Session) -> Path:
    """Run a protocol and write OUT/STEM.json, on rank 0; what has been evaluated already is not done again.

    STEM is PROTOCOL-DATA-ENCODER-HASH, the hash being of all that decides the result but library versions. Beside it
    are STEM.samples.jsonl, a line for each test sample, and STEM.safetensors, if there are weights to keep. The JSON
    comes last.

    Args:
        encoder: what the protocol takes, an Encoder or a TextImageModel.
        session: features and states of training are kept in its folder, if it has one, for the next evaluation.
    """
    description = describe(protocol, encoder, data)
    stem = stem_of(protocol.name, data.spec, description["encoder"]["spec"])
    path = Path(out) / f"{stem}-{fingerprint(description)[:8]}.json"
    there = torch.tensor(session.rank == 0 and path.exists(), dtype=torch.int32)
    if session.sum(there):  # the others may see it later, or only what this run writes
        logger.info("%s is there already", path)
        return path
    began = time.monotonic()
    session.seen.clear()
    outcome = protocol.run(encoder, data, session)
    if session.rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        result = {"format": FORMAT, "hash": fingerprint(description), **description}
        looked_at = data if "train" in description["data"] else dataclasses.replace(data, train=None)
        result["data"] |= seen(looked_at, outcome, session)
        result["metrics"] = {name: dataclasses.asdict(metric) for name, metric in outcome.metrics.items()}
        result["details"] = outcome.details
        result["environment"] = environment(session, time.monotonic() - began)
        write_beside(path, outcome)
        write_json(path, result)
    session.wait()
    return path


def stem_of(*names: str) -> str:
    """A file name from names that may be paths; of long ones the end."""
    return "-".join(re.sub(r"[^\w.@]+", "_", name).strip("_.")[-60:] for name in names)


def shortened(data: Dataset, train: int | None, test: int | None) -> Dataset:
    """So many images of each split, drawn once and for all: the first would be of a few classes. None: all.

    Raises ValueError for less than one.
    """
    for count in (train, test):
        if count is not None and count < 1:
            raise ValueError(f"{count} images: expected 1 or more")

    def drawn(images: ImageSet | None, count: int | None) -> ImageSet | None:
        if images is None or count is None or count >= len(images):
            return images
        return images.subset(np.sort(np.random.default_rng(0).permutation(len(images))[:count]))

    return dataclasses.replace(data, train=drawn(data.train, train), test=drawn(data.test, test))


def describe(protocol: Evaluation, encoder, data: Dataset) -> dict:
    """What decides a result, as JSON. Settings that are files have a digest of what is in them."""
    settings = json.loads(json.dumps(dataclasses.asdict(protocol), default=str))
    files = {name: Path(value).expanduser() for name, value in settings.items() if isinstance(value, str)}
    digests = {name: file_digest(path) for name, path in files.items() if path.is_file()}
    described = {
        "spec": data.spec,
        "name": data.name,
        "classes": len(data.classes),
        "words": fingerprint([data.classes, data.templates]),
        "test": _size(data.test),
        "report": data.report,
    }
    if data.train is not None and getattr(protocol, "trains", Evaluation.trains):
        described["train"] = _size(data.train)
    return {
        "protocol": {"name": protocol.name, **settings, **({"files": digests} if digests else {})},
        "encoder": encoder.describe(),
        "data": described,
    }


def seen(data: Dataset, outcome: Outcome, session: Session) -> dict:
    """What was noticed of the images: how many could not be read, and which. Where all were prepared alike, also how
    many are the same picture as one before, and how many test images are also in train.
    """
    found, digests = {}, {}
    for name, images in (("train", data.train), ("test", data.test)):
        if images is None:
            continue
        found[name] = _size(images)
        if images.identity in session.seen:
            readable, split_digests = session.seen[images.identity]
            digests[name] = split_digests[readable]
            unreadable = [images.keys[int(row)] for row in np.flatnonzero(~readable)]
            found[name] |= {"unreadable": len(unreadable), "unreadable_keys": unreadable[:MOST_KEYS]}
            found[name]["duplicates"] = int(readable.sum()) - len(np.unique(digests[name]))
        elif name == "train" and "unreadable" in outcome.details:  # a probe on augmented images
            found[name] |= {key: outcome.details[key] for key in ("unreadable", "unreadable_keys")}
    if len(digests) == 2:
        found["across_duplicates"] = int(np.isin(digests["test"], digests["train"]).sum())
    return found


def environment(session: Session, seconds: float) -> dict:
    """Versions, device and time."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    device = torch.cuda.get_device_name(session.device) if session.device.type == "cuda" else platform.machine()
    return found | {"device": device, "ranks": session.world_size, "seconds": round(seconds, 1)}


def write_beside(path: Path, outcome: Outcome) -> None:
    """The samples and the weights of a result."""
    with whole_file(path.with_suffix(".samples.jsonl")) as temporary:
        temporary.write_text("".join(f"{json.dumps(sample)}\n" for sample in outcome.samples), encoding="utf-8")
    if outcome.tensors:
        with whole_file(path.with_suffix(".safetensors")) as temporary:
            save_file({name: tensor.cpu().contiguous() for name, tensor in outcome.tensors.items()}, temporary)


def file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _size(images: ImageSet) -> dict:
    return {"n": len(images), "identity": images.identity}
