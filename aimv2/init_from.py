"""Where a run starts: weights of an earlier run, or anybody's, put into an objective before training begins.

A run that goes on has them in its checkpoint and doesn't read them again, but for a locked tower, which checkpoints
leave out.
"""

import hashlib
import json
import logging
import math
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from aimv2.config import ConfigError, to_json
from aimv2.decoder import DecoderConfig
from aimv2.encoder import TABLES, VisionConfig
from aimv2.exports import empty_model, shapes_of
from aimv2.lit import LiTConfig
from aimv2.objectives.aimv2 import AIMv2, AIMv2Config
from aimv2.positions import resize_positions
from aimv2.pretrained import Checkpoint, open_checkpoint, sized
from aimv2.weights import ModelError, digest

if TYPE_CHECKING:  # they need what only training has
    from aimv2.data.transforms import TransformConfig
    from aimv2.objectives.distill import DistillConfig
    from aimv2.objectives.lit import LiTObjectiveConfig

logger = logging.getLogger(__name__)

PARTS = ("encoder", "decoder")
TABLE = "positions.weight"
# What may be another in the run than in the source: the same weights serve both.
_FREE = {"image_size", "positions", "position_scale", "checkpointing"}
_NO_DECODER = "init_from.parts=[encoder], with a decoder that begins anew"


@dataclass(slots=True, kw_only=True)
class InitFrom:
    """Weights to start from."""

    source: str  # a file, folder or hub name, as `load_encoder` takes it; of a run its export/
    parts: list[Literal["encoder", "decoder"]] | None = None  # None: all that the objective has of them
    # Learned positions are interpolated once to the run's grid, or replaced by what the objective begins with. Fixed
    # ones have no weights: `position_scale` of the run's encoder says how they are laid over its grid.
    positions: Literal["interpolate", "replace"] = "interpolate"

    def __post_init__(self):
        if self.parts is not None and (not self.parts or len(set(self.parts)) < len(self.parts)):
            raise ValueError(f"parts {self.parts}: expected one or both of {', '.join(PARTS)}, or none for all")


def check_initial(
    config: "AIMv2Config | DistillConfig | LiTObjectiveConfig | LiTConfig",
    init: InitFrom,
    *,
    tokenizer_sha256: str | None,
    transform: "TransformConfig | None" = None,
) -> Checkpoint:
    """Open the source and make sure that it fits, without reading a weight.

    The encoder may be of any layout and for any grid. Only an AIMv2 of ours has a decoder; the sizes of both must be
    the objective's, and the decoder's captions must have been made of the same tokens.

    Args:
        config: the objective's; `.vision` and, if it has one, `.decoder` are what weights are wanted for. A tower that
            is locked (`needs_weights`) can't get used to anything: it keeps its positions.
        tokenizer_sha256: of the run's tokenizer; None fits no decoder.
        transform: of the run's images; None: not compared.

    Raises:
        ModelError: nothing there, or damaged, or it lacks a part.
        ConfigError: weights of other sizes, positions, images or tokens than the run's; it says which settings would
            do.
    """
    chosen = _chosen(config, init)
    checkpoint = open_checkpoint(init.source)
    whole = checkpoint.whole()[0]
    if hasattr(config, "text") and isinstance(whole, LiTConfig) and init.parts is None:
        raise ConfigError(
            f"{checkpoint.path} is a LiT, whose text tower isn't loaded: expected init_from.parts=[encoder], with a "
            "text tower that begins anew"
        )
    if "encoder" in chosen:
        stored, layout, prefix = checkpoint.vision()
        _check_sizes(checkpoint, stored, config.vision, "encoder")
        _check_positions(checkpoint, stored, config, init)
        if transform is not None:
            checkpoint.check_normalisation(transform)
        allowed = (prefix + layout.head,) if layout.head else ()
        checkpoint.check(shapes_of(empty_model(stored)), layout.vision, prefix, allowed)
    if "decoder" in chosen:
        _check_decoder(checkpoint, config, tokenizer_sha256)
    return checkpoint


def load_initial(
    objective: nn.Module,
    config: "AIMv2Config | DistillConfig | LiTObjectiveConfig | LiTConfig",
    init: InitFrom,
    *,
    tokenizer_sha256: str | None,
    transform: "TransformConfig | None" = None,
) -> str:
    """Copy weights into `objective`, whole and not yet DeepSpeed's, and return a digest of those that were read.

    `objective` is that of `config`; the other arguments and errors are `check_initial`'s. Either all is copied or
    nothing.
    """
    checkpoint = check_initial(config, init, tokenizer_sha256=tokenizer_sha256, transform=transform)
    chosen = _chosen(config, init)
    read, states, described = [], {}, {}
    if "encoder" in chosen:
        stored, layout, prefix = checkpoint.vision()
        state = checkpoint.read_vision(stored, stored, layout, prefix, None).state_dict()
        # As stored: what is interpolated may differ in the last bit between machines.
        read += [(f"encoder.{name}", state[name]) for name in sorted(state)]
        described = {name: to_json(stored)[name] for name in ("image_size", "positions", "position_scale")}
        states["encoder"] = _with_positions(state, stored, objective.encoder, init)
    if "decoder" in chosen:
        states["decoder"] = state = checkpoint.read_whole().decoder.state_dict()
        read += [(f"decoder.{name}", state[name]) for name in sorted(state)]
    for part, state in states.items():
        getattr(objective, part).load_state_dict(state)
    about = _positions_described(stored, config.vision, init) if "encoder" in chosen else "nothing of its encoder"
    logger.info("starting from the %s of %s: %s", " and ".join(chosen), checkpoint.path, about)
    return hashlib.sha256((digest(read) + json.dumps(described, sort_keys=True)).encode()).hexdigest()


def open_objective(source: str, image_size: int | str | None = None) -> AIMv2:
    """An AIMv2 of ours, decoder included, in eval mode; for another size its positions are interpolated once.

    Learned ones are resampled; fixed ones are laid over the range that they were trained on, but for native models,
    which were trained on many.

    Args:
        image_size: as `load_encoder` takes it: None for its own, pixels, or "native".

    Raises:
        ModelError: nothing there, damaged, or without a decoder.
        ValueError: a size that isn't one.
    """
    checkpoint = open_checkpoint(source)
    config = _whole(checkpoint, "expected an AIMv2 of ours")
    model = checkpoint.read_whole()
    vision = sized(config.vision, image_size, checkpoint.processor_config(*checkpoint.vision()[:2]))
    if vision == config.vision:
        return model
    state = model.state_dict()
    if (name := f"encoder.{TABLE}") in state:
        state[name] = _resized(state[name], config.vision, vision)
    model = empty_model(replace(config, vision=vision))
    model.load_state_dict(state, assign=True)
    return model.eval()


def _chosen(config: object, init: InitFrom) -> list[str]:
    """The parts to load."""
    own = [part for part in PARTS if part == "encoder" or hasattr(config, part)]
    chosen = own if init.parts is None else init.parts
    if absent := [part for part in chosen if part not in own]:
        raise ConfigError(f"init_from.parts {absent}: expected what the objective has, {' and '.join(own)}")
    return chosen


def _key(config: object) -> str:
    """What a user types for the config of the encoder."""
    inner = [f.name for f in fields(config) if is_dataclass(getattr(config, f.name)) and f.name != "vision"]
    inner = [name for name in inner if getattr(getattr(config, name), "vision", None) is config.vision]
    return ".".join(["objective", *inner, "vision"])


def _check_positions(checkpoint: Checkpoint, stored: VisionConfig, config: object, init: InitFrom) -> None:
    """Whether positions can go on in the run's encoder, or are meant to be others."""
    ours, key, locked = config.vision, _key(config), getattr(config, "needs_weights", False)
    has_table, had_table = ours.positions in TABLES, stored.positions in TABLES
    if init.positions == "replace":
        if locked:
            raise ConfigError(
                "init_from.positions=replace: a locked tower would never learn the new ones: expected interpolate"
            )
        return
    if had_table and not has_table:
        offer = "" if locked else "init_from.positions=replace drops the learned ones, "
        raise ConfigError(
            f"{checkpoint.path} has learned positions, for {stored.image_size} px, but the run's are fixed "
            f"({ours.positions!r}): {offer}{key}.positions=interpolated keeps them and serves any size"
        )
    if has_table and not had_table:
        offer = "" if locked else ", or init_from.positions=replace to learn new ones"
        raise ConfigError(
            f"{checkpoint.path} has fixed positions, but the run's are {ours.positions!r}: expected "
            f"{key}.positions={stored.positions}{offer}"
        )
    understood = _scales(stored, ours)
    if not has_table and not any(math.isclose(ours.position_scale, scale, rel_tol=1e-4) for scale in understood):
        raise ConfigError(
            f"{checkpoint.path} has positions of scale {stored.position_scale:g} for {stored.grid}x{stored.grid} "
            f"patches, the run's {ours.position_scale:g} for {ours.grid}x{ours.grid}: expected "
            f"{key}.position_scale={understood[0]:g}, by which they run on, or {understood[1]:g}, by which they are "
            "laid over the range that they were trained on"
        )


def _scales(stored: VisionConfig, ours: VisionConfig) -> tuple[float, float]:
    """Of fixed positions: by which they run on, and by which they keep the stored encoder's range."""
    return stored.position_scale, stored.position_scale * stored.grid / ours.grid


def _positions_described(stored: VisionConfig, ours: VisionConfig, init: InitFrom) -> str:
    grids = f"{stored.grid}x{stored.grid} to {ours.grid}x{ours.grid} patches"
    if ours.positions not in TABLES and stored.positions not in TABLES:
        return f"fixed positions, {grids}, scale {stored.position_scale:g} to {ours.position_scale:g}"
    if init.positions == "replace":
        return f"its {stored.positions} positions are dropped, and {ours.positions} ones begin anew"
    return f"learned positions, {grids}" + (", interpolated" if stored.grid != ours.grid else "")


def _with_positions(state: dict[str, Tensor], stored: VisionConfig, encoder: nn.Module, init: InitFrom) -> dict:
    """The same weights with the positions that the objective's encoder is to begin with."""
    state = dict(state)
    table = state.pop(TABLE, None)
    if encoder.config.positions not in TABLES:
        return state
    if init.positions == "replace":
        return state | {TABLE: encoder.state_dict()[TABLE]}
    return state | {TABLE: _resized(table, stored, encoder.config)}


def _resized(table: Tensor, stored: VisionConfig, config: VisionConfig) -> Tensor:
    """(1, N, D) -> (1, N', D)."""
    return resize_positions(table, (stored.grid, stored.grid), (config.grid, config.grid))


def _check_decoder(checkpoint: Checkpoint, config: "AIMv2Config | DistillConfig", sha256: str | None) -> None:
    """Whether the decoder goes on with the run's encoder and tokens."""
    whole = _whole(checkpoint, f"expected an AIMv2 of ours, for its decoder, or {_NO_DECODER}")
    offer = f"or {_NO_DECODER}"
    for name in ("width", "patch_size"):  # of the decoder's projection and pixel head
        if (theirs := getattr(whole.vision, name)) != (ours := getattr(config.vision, name)):
            raise ConfigError(
                f"{checkpoint.path}: its decoder is for an encoder of {name} {theirs}, but the run's has {ours}: "
                f"expected the same, {offer}"
            )
    _check_sizes(checkpoint, whole.decoder, config.decoder, "decoder", f": expected the same, {offer}")
    theirs = (checkpoint.config.get("tokenizer") or {}).get("sha256")
    if theirs is None or theirs != sha256:
        has = "no tokenizer beside it" if theirs is None else f"the tokenizer of sha256 {theirs[:12]}"
        run = "the run has none" if sha256 is None else f"the run's is of sha256 {sha256[:12]}"
        raise ConfigError(f"{checkpoint.path} has {has}, {run}: expected the same, {offer}")
    config, names, prefix, allowed = checkpoint.whole()
    checkpoint.check(shapes_of(empty_model(config)), names, prefix, allowed)


def _whole(checkpoint: Checkpoint, expected: str) -> AIMv2Config:
    """The config of an AIMv2 of ours; ModelError for anything else."""
    config = checkpoint.whole()[0]
    if not isinstance(config, AIMv2Config):
        found = "a bare encoder" if isinstance(config, VisionConfig) else "a LiT"
        raise ModelError(f"{checkpoint.path} is {found}: {expected}")
    return config


def _check_sizes(
    checkpoint: Checkpoint,
    stored: VisionConfig | DecoderConfig,
    config: VisionConfig | DecoderConfig,
    part: str,
    offer: str = "",
) -> None:
    """Raises ConfigError with all that differs, heads and eps too, which no weight's shape would tell."""
    pairs = {f.name: (getattr(stored, f.name), getattr(config, f.name)) for f in fields(config) if f.name not in _FREE}
    different = [f"{name} {theirs}, not {ours}" for name, (theirs, ours) in pairs.items() if theirs != ours]
    if different:
        raise ConfigError(f"{checkpoint.path}: its {part} is not of the run's sizes: {'; '.join(different)}{offer}")
