"""`open_encoder`: an encoder of any library by its spec."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from aimv2.evals.encoders.interface import Encoder
from aimv2.evals.encoders.layers import parse_layers
from aimv2.evals.encoders.open_clip import open_open_clip
from aimv2.evals.encoders.ours import open_ours, open_random
from aimv2.evals.encoders.pixels import open_pixels
from aimv2.evals.encoders.timm import open_timm
from aimv2.evals.encoders.transformers import open_transformers

SEED = 241114402  # of untrained weights; no run's own, whose beginning they would be
SOURCES = {
    "aimv2": (open_ours, "PATH"),
    "random": (open_random, "PATH"),
    "timm": (open_timm, "NAME[,WEIGHTS]"),
    "open_clip": (open_open_clip, "NAME[,WEIGHTS]"),
    "hf": (open_transformers, "NAME-OR-FOLDER"),
    "pixels": (open_pixels, "SIDE"),
}
_INSIDE = {"export", "checkpoint", "encoder", "model"}  # folders and files that are called so in every run


def open_encoder(spec: str, *, image_size: int | None = None, device: torch.device | str = "cpu") -> Encoder:
    """An encoder at rest, in fp32.

    Args:
        spec: one of these, with `@LAYER` behind it for raw block outputs in place of the encoder's own output: a
            block, FIRST-LAST or lastN, of which the mean is taken.
                aimv2:PATH                  a folder, file or hub name of any layout, or random:large-224
                random:PATH                 its architecture and preprocessing, without training
                timm:NAME[,WEIGHTS]         WEIGHTS a tag or a file; without: untrained; NAME.TAG is NAME,TAG
                open_clip:NAME[,WEIGHTS]    the same
                hf:NAME-OR-FOLDER           of transformers: AIMv2, CLIP, DINOv2, SigLIP, ViT
                pixels[:SIDE]               no encoder at all
            Untrained weights are the same each time.
        image_size: None: what the weights are made for. Positions are interpolated where the library does that.

    Raises:
        ValueError: what is wrong with the spec, or why it can't be opened, in one line.
    """
    with as_one_line(spec), own_seed():
        kind, rest, layer = _split(spec)
        if image_size is not None and (not isinstance(image_size, int) or image_size < 1):
            raise ValueError(f"image_size {image_size!r}: expected pixels")
        encoder = SOURCES[kind][0](rest, spec, image_size)
        if layer is not None:
            encoder.average(_one_stream(layer, encoder.depth))
        encoder.name = short_name(kind, rest, layer, encoder.trained)
    return encoder.to(device)


def _split(spec: str) -> tuple[str, str, str | None]:
    """(source, its part of the spec, layer if there is one)"""
    body, at, layer = spec.rpartition("@")
    path = spec.partition(":")[2]
    if not at or (path and Path(path).exists()):
        body, layer = spec, None
    kind, _, rest = body.partition(":")
    if kind not in SOURCES or (not rest and kind != "pixels"):
        known = ", ".join(f"{name}:{words}" for name, (_, words) in SOURCES.items())
        raise ValueError(f"encoder {spec!r}: expected one of {known}, maybe with @LAYER behind it")
    return kind, rest, layer


def _one_stream(layer: str, depth: int) -> tuple[int, ...]:
    streams = parse_layers(layer, depth)
    if len(streams) > 1:
        raise ValueError(f"layer {layer!r} is several ({', '.join(streams)}): expected one in a spec")
    return next(iter(streams.values()))


def short_name(kind: str, rest: str, layer: str | None, trained: bool) -> str:
    """Short, and fit for a file's name."""
    name, _, weights = rest.partition(",") if kind in ("timm", "open_clip") else (rest, "", "")
    if kind in ("aimv2", "random", "hf"):
        telling = [part for part in Path(rest).parts if Path(part).stem not in _INSIDE]
        name = telling[-1].removeprefix("random:") if telling else rest
    words = ["pixels" if kind == "pixels" else "" if trained else "random", name, Path(weights).name]
    name = re.sub(r"[^\w.+-]+", "-", "-".join(filter(None, words))).strip("-")
    return name if layer is None else f"{name}@{layer}"


@contextmanager
def as_one_line(spec: str) -> Iterator[None]:
    """Libraries raise whatever a wrong name or file leads to, over many lines."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:500]
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(reason if spec in reason else f"{spec}: {kind}{reason}") from error


@contextmanager
def own_seed() -> Iterator[None]:
    """Weights are drawn from a fixed seed, and the global generator stays as it was."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(SEED)  # torch.manual_seed would set the devices' as well
    try:
        yield
    finally:
        torch.set_rng_state(state)
