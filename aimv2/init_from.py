"""Where a run starts: weights of an earlier run, or anybody's, put into an objective before training begins.

What is read once here is not read again when the run resumes, but for what is frozen: a checkpoint leaves that out.
"""

from dataclasses import dataclass, fields, replace
from typing import Literal

from torch import Tensor, nn

from aimv2.config import ConfigError
from aimv2.decoder import DecoderConfig
from aimv2.encoder import TABLES, VisionConfig
from aimv2.exports import empty_model
from aimv2.objectives.aimv2 import AIMv2, AIMv2Config
from aimv2.positions import resize_positions
from aimv2.pretrained import Checkpoint, open_checkpoint, sized
from aimv2.weights import ModelError, digest

PARTS = ("encoder", "decoder")
TABLE = "positions.weight"
# What may be another in the run than in the source: the same weights serve both.
_FREE = {"image_size", "positions", "position_scale", "checkpointing"}


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


def load_initial(objective: nn.Module, init: InitFrom, *, tokenizer_sha256: str | None) -> str:
    """Copy weights into `objective`, whole and not yet DeepSpeed's, and return a digest of those that were read.

    The encoder may be of any layout and for any grid. Only an AIMv2 of ours has a decoder; the sizes of both must be
    the objective's, and the decoder's captions must have been made of the same tokens. Either all is copied or nothing.

    Args:
        objective: `.encoder` and, if it has one, `.decoder` are filled.
        tokenizer_sha256: of the run's tokenizer; None fits no decoder.

    Raises:
        ModelError: nothing there, or damaged, or it lacks a part.
        ConfigError: weights of other sizes, positions or tokens than the run's; it says which settings would do.
    """
    own = [part for part in PARTS if hasattr(objective, part)]
    chosen = own if init.parts is None else init.parts
    if absent := [part for part in chosen if part not in own]:
        raise ConfigError(f"init_from.parts {absent}: expected what the objective has, {' and '.join(own)}")
    checkpoint = open_checkpoint(init.source)
    read, states = [], {}
    if "encoder" in chosen:
        stored, state = _read_encoder(checkpoint, objective.encoder.config)
        # As stored: what is interpolated may differ in the last bit between machines.
        read += [(f"encoder.{name}", state[name]) for name in sorted(state)]
        states["encoder"] = _with_positions(state, stored, objective.encoder, init)
    if "decoder" in chosen:
        states["decoder"] = state = _read_decoder(checkpoint, objective, tokenizer_sha256)
        read += [(f"decoder.{name}", state[name]) for name in sorted(state)]
    for part, state in states.items():
        getattr(objective, part).load_state_dict(state)
    return digest(read)


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


def _read_encoder(checkpoint: Checkpoint, config: VisionConfig) -> tuple[VisionConfig, dict[str, Tensor]]:
    """The config of the encoder that is stored, and its weights as they are."""
    stored, layout, prefix = checkpoint.vision()
    _check_sizes(checkpoint, stored, config, "encoder")
    return stored, checkpoint.read_vision(stored, stored, layout, prefix, None).state_dict()


def _with_positions(state: dict[str, Tensor], stored: VisionConfig, encoder: nn.Module, init: InitFrom) -> dict:
    """The same weights with the positions that the objective's encoder is to begin with."""
    state, config = dict(state), encoder.config
    table = state.pop(TABLE, None)
    has_table = config.positions in TABLES
    if init.positions == "replace":
        return state | ({TABLE: encoder.state_dict()[TABLE]} if has_table else {})
    if table is not None and not has_table:
        raise ConfigError(
            f"init_from.source {init.source} has learned positions, for {stored.image_size} px, but the run's are "
            f"fixed ({config.positions!r}): init_from.positions=replace drops the learned ones, vision.positions="
            "interpolated keeps them and serves any size"
        )
    if table is None and has_table:
        raise ConfigError(
            f"init_from.source {init.source} has fixed positions, but the run's are {config.positions!r}: expected "
            f"vision.positions={stored.positions}, or init_from.positions=replace to learn new ones"
        )
    return state if table is None else state | {TABLE: _resized(table, stored, config)}


def _resized(table: Tensor, stored: VisionConfig, config: VisionConfig) -> Tensor:
    """(1, N, D) -> (1, N', D)."""
    return resize_positions(table, (stored.grid, stored.grid), (config.grid, config.grid))


def _read_decoder(checkpoint: Checkpoint, objective: nn.Module, tokenizer_sha256: str | None) -> dict[str, Tensor]:
    offer = "init_from.parts=[encoder] leaves the decoder as it is initialised"
    config = _whole(checkpoint, f"expected an AIMv2 of ours, for its decoder; {offer}")
    vision = objective.encoder.config
    for name in ("width", "patch_size"):  # of the decoder's projection and pixel head
        if getattr(config.vision, name) != getattr(vision, name):
            raise ConfigError(
                f"{checkpoint.path}: its decoder is for an encoder of {name} {getattr(config.vision, name)}, "
                f"but the run's has {getattr(vision, name)}: {offer}"
            )
    _check_sizes(checkpoint, config.decoder, objective.decoder.config, "decoder", f": {offer}")
    theirs = (checkpoint.config.get("tokenizer") or {}).get("sha256")
    if theirs is None or theirs != tokenizer_sha256:
        described = "no tokenizer beside it" if theirs is None else f"the tokenizer of sha256 {theirs[:12]}"
        ours = "none" if tokenizer_sha256 is None else tokenizer_sha256[:12]
        raise ConfigError(f"{checkpoint.path} has {described}, not the run's, {ours}: {offer}")
    return checkpoint.read_whole().decoder.state_dict()


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
