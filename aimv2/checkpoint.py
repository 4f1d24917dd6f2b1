"""Training checkpoints that survive a kill at any moment, a full disk and a flipped bit; and going on from them.

A checkpoint is a folder that appears by ONE rename after every byte of it is on disk, with a manifest that lists the
size and sha256 of each file. No pointer file can go wrong: a run goes on from the newest folder that verifies.

    checkpoints/
        step_00010000/            committed
            MANIFEST.json         files, state, fingerprints, config, world size, versions
            engine/               DeepSpeed's own files
            rng_00000.pt          random number generators, one file per rank
        .tmp-step_00020000/       being written
        .trash-step_00000000/     being deleted
        .damaged-step_00010010/   did not verify and was passed over; deleted after the next commit

`engine` is a DeepSpeed engine, of which `save_checkpoint` and `load_checkpoint` are required. All ranks call `save` and
`restore` together, and share the file system of the run folder.
"""

import contextlib
import importlib.metadata
import json
import logging
import os
import random
import re
import shutil
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from aimv2 import manifest
from aimv2.ranks import gather_objects

LOG = logging.getLogger(__name__)
TAG = "engine"
T = TypeVar("T")

# What DeepSpeed 0.19 pickles besides tensors and plain containers: (module, name).
PICKLED_BY_DEEPSPEED = (
    ("deepspeed.utils.tensor_fragment", "fragment_address"),
    ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
    ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"),
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
)


class CheckpointError(ValueError):
    """A checkpoint cannot be written or resumed from; the message says why and what to do."""


@dataclass(slots=True, kw_only=True)
class TrainState:
    """Where a run stands, apart from what the engine holds."""

    step: int = 0  # optimizer steps done
    sample: int = 0  # global sample numbers consumed
    skipped: int = 0  # steps skipped because the loss or the gradient was not finite
    log: dict[str, float] = field(default_factory=dict)  # the logger's unfinished window, `Logger.pending()`


def save(
    engine: Any,
    state: TrainState,
    folder: str | Path,
    *,
    config: dict[str, Any],
    fingerprints: dict[str, str],
    keep: int = 2,
) -> bool:
    """Commits a checkpoint of `state.step` under the run folder and prunes to the newest `keep` (at least 2).

    Returns, the same on every rank, whether it is committed. An error on any rank leaves the earlier checkpoints
    alone, is logged as an error and lets the run go on.
    """
    if keep < 2:
        raise ValueError(f"keep {keep}: expected at least 2 checkpoints, so that a damaged one has a predecessor")
    checkpoints = Path(folder) / "checkpoints"
    final = checkpoints / f"step_{state.step:08d}"
    temporary = checkpoints / f".tmp-{final.name}"
    try:
        if _on_first_rank(partial(_begin, final, temporary)) == "committed already":
            return True
        files: manifest.Files = {}
        for written in _together(partial(_write, engine, temporary)):
            files |= written
        contents = {
            "state": asdict(state),
            "fingerprints": fingerprints,
            "config": config,
            "world_size": _world_size(),
            "zero_stage": _zero_stage(engine),
            "versions": {name: _version(name) for name in ("aimv2", "torch", "deepspeed")},
        }
        _on_first_rank(partial(_commit, temporary, final, contents, files))
    except CheckpointError as error:
        if _rank() == 0:
            LOG.error("NO CHECKPOINT at step %d, training goes on without: %s", state.step, error)
            shutil.rmtree(temporary, ignore_errors=True)
        return False
    if _rank() == 0:
        _prune(checkpoints, keep)
    return True


def restore(
    engine: Any, folder: str | Path, *, fingerprints: Callable[[int], dict[str, str]], allow: Collection[str] = ()
) -> TrainState | None:
    """Loads the newest checkpoint that verifies into `engine` and the random number generators; None if there is none.

    `fingerprints` gives those of a run that has consumed so many samples.

    Damaged newer ones are reported and moved aside. Raises CheckpointError, on all ranks, if there are checkpoints and
    none verifies, if a fingerprint differs whose key is not in `allow`, or if it was written by another number of
    ranks or another ZeRO stage.
    """
    checkpoints = Path(folder) / "checkpoints"
    chosen = _on_first_rank(partial(_choose, checkpoints))
    if chosen is None:
        return None
    name, contents = chosen
    current = fingerprints(contents["state"]["sample"])
    _together(partial(_check, name, contents, _zero_stage(engine), current, allow))
    _together(partial(_load, engine, checkpoints / name))
    if _rank() == 0:
        LOG.info("going on from %s", checkpoints / name)
    return TrainState(**contents["state"])


def saved_fingerprints(folder: str | Path) -> dict[str, str] | None:
    """What the newest checkpoint that says it was saved with; None if there is no checkpoint, and nothing to resume."""
    steps = _steps(Path(folder) / "checkpoints")
    for path in steps:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # damaged: `restore` will say so
            return dict(json.loads((path / manifest.NAME).read_text())["fingerprints"])
    return {} if steps else None


def _begin(final: Path, temporary: Path) -> str:
    if final.exists():
        with contextlib.suppress(manifest.DamagedError):  # then it is written anew
            _examine(final)
            return "committed already"
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / TAG).mkdir(parents=True)
    return "begun"


def _write(engine: Any, temporary: Path) -> manifest.Files:
    """This rank's part: the engine's files and the generators. Returns the files known to be its own."""
    with _caught_writes(engine) as (paths, errors):
        engine.save_checkpoint(str(temporary), tag=TAG, save_latest=False, exclude_frozen_parameters=True)
    if errors:
        raise errors[0]
    paths.append(temporary / f"rng_{_rank():05d}.pt")
    torch.save(_random_state(), paths[-1])
    return {path.relative_to(temporary).as_posix(): manifest.seal(path) for path in paths}


@contextlib.contextmanager
def _caught_writes(engine: Any) -> Iterator[tuple[list[Path], list[Exception]]]:
    """Makes DeepSpeed's writes record their path and their error instead of raising.

    Its `save_checkpoint` has collectives after the writes: a rank that left by an exception would hang the others.
    """
    paths: list[Path] = []
    errors: list[Exception] = []

    def caught(action: Callable[..., Any]) -> Callable[..., None]:
        def attempt(*args: Any, **kwargs: Any) -> None:
            try:
                action(*args, **kwargs)
            except Exception as error:
                errors.append(error)

        return attempt

    writer = getattr(engine, "checkpoint_engine", None)
    with contextlib.ExitStack() as stack:
        if writer is not None:
            write = writer.save

            def save_and_note(state_dict: Any, path: str) -> None:
                write(state_dict, path)
                paths.append(Path(path))

            stack.enter_context(_replaced(writer, "save", caught(save_and_note)))
            stack.enter_context(_replaced(writer, "makedirs", caught(writer.makedirs)))
            stack.enter_context(_replaced(engine, "_copy_recovery_script", caught(engine._copy_recovery_script)))
        yield paths, errors


def _commit(temporary: Path, final: Path, contents: dict[str, Any], files: manifest.Files) -> None:
    manifest.write(temporary, contents, files)
    if final.exists():  # damaged, or `_begin` would have stopped
        os.rename(final, _cleared(final.with_name(f".trash-{final.name}")))
    os.rename(temporary, final)
    try:
        manifest.sync(final.parent)
    except OSError as error:  # it is committed all the same
        LOG.error("%s might not survive a power cut: %s", final, error)


def _prune(checkpoints: Path, keep: int) -> None:
    """Deletes all but the newest `keep`, each renamed first: a kill half-way leaves no folder that looks whole."""
    for old in [*_steps(checkpoints)[keep:], *checkpoints.glob(".damaged-*")]:
        try:
            trash = _cleared(old.with_name(f".trash-{old.name}"))
            os.rename(old, trash)
            shutil.rmtree(trash)
        except OSError as error:
            LOG.error("could not delete the old checkpoint %s: %s", old, error)


def _choose(checkpoints: Path) -> tuple[str, dict[str, Any]] | None:
    """(name, manifest contents) of the newest checkpoint that verifies, None if there is none at all."""
    for stale in [*checkpoints.glob(".tmp-*"), *checkpoints.glob(".trash-*")]:
        shutil.rmtree(stale, ignore_errors=True)
    damaged: dict[Path, str] = {}
    for path in _steps(checkpoints):
        try:
            contents = _examine(path)
        except manifest.DamagedError as damage:
            damaged[path] = str(damage)
            continue
        for newer, reason in damaged.items():
            LOG.error("%s is damaged and passed over for %s: %s", newer, path.name, reason)
            os.rename(newer, _cleared(newer.with_name(f".damaged-{newer.name}")))
        return path.name, contents
    if damaged:
        reasons = "; ".join(f"{path.name}: {reason}" for path, reason in damaged.items())
        raise CheckpointError(f"no checkpoint in {checkpoints} verifies, delete the folder to start anew ({reasons})")
    return None


def _examine(path: Path) -> dict[str, Any]:
    """The verified contents of a checkpoint's manifest; DamagedError."""
    contents = manifest.read(path)
    if path.name != f"step_{contents['state']['step']:08d}":
        raise manifest.DamagedError(f"it holds step {contents['state']['step']}")
    return contents


def _check(
    name: str, contents: dict[str, Any], zero_stage: int | None, fingerprints: dict[str, str], allow: Collection[str]
) -> None:
    """Refuses a checkpoint that this run cannot go on from."""
    if contents["world_size"] != _world_size():
        raise CheckpointError(
            f"{name} was written by {contents['world_size']} ranks and this run has {_world_size()}: go on with as many"
        )
    if contents["zero_stage"] != zero_stage:
        raise CheckpointError(f"{name} was written with ZeRO stage {contents['zero_stage']}, this run has {zero_stage}")
    saved = contents["fingerprints"]
    for key in sorted((saved.keys() | fingerprints.keys()) - set(allow)):
        if saved.get(key) != fingerprints.get(key):
            raise CheckpointError(f"{name}: the {key} changed: saved {saved.get(key)}, now {fingerprints.get(key)}")


def _load(engine: Any, path: Path) -> None:
    module = getattr(engine, "module", None)
    frozen = module is not None and any(not parameter.requires_grad for parameter in module.parameters())
    with _plain_reads(engine):
        loaded, _ = engine.load_checkpoint(
            str(path), tag=TAG, load_module_strict=not frozen, load_lr_scheduler_states=False
        )
    if loaded is None:
        raise CheckpointError(f"the engine could not load {path}")
    _set_random_state(torch.load(path / f"rng_{_rank():05d}.pt", weights_only=True))


@contextlib.contextmanager
def _plain_reads(engine: Any) -> Iterator[None]:
    """Makes DeepSpeed read its files without running code found in them (it asks for weights_only=False)."""
    reader = getattr(engine, "checkpoint_engine", None)
    if reader is None:
        yield
        return
    classes = [getattr(sys.modules[module], name) for module, name in PICKLED_BY_DEEPSPEED if module in sys.modules]
    plain = partial(torch.load, weights_only=True)
    with torch.serialization.safe_globals(classes), _replaced(reader, "load", plain):
        yield


def _together(action: Callable[[], T] | None) -> list[T | None]:
    """Runs `action` on this rank and gathers the results of all; CheckpointError on all if any of them failed."""
    result, failure = None, None
    try:
        result = action() if action else None
    except Exception as error:
        failure = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
        if not isinstance(error, OSError | CheckpointError):
            LOG.exception("rank %d failed at a checkpoint", _rank())
    outcomes = gather_objects((result, failure))
    failures = {rank: text for rank, (_, text) in enumerate(outcomes) if text}
    if failures:
        same = len(set(failures.values())) == 1 and len(failures) == len(outcomes)
        raise CheckpointError(failures[0] if same else "; ".join(f"rank {r}: {text}" for r, text in failures.items()))
    return [result for result, _ in outcomes]


def _on_first_rank(action: Callable[[], T]) -> T:
    """Runs `action` on rank 0 only and gives its result, or its failure, to all."""
    return _together(action if _rank() == 0 else None)[0]


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _zero_stage(engine: Any) -> int | None:
    return int(engine.zero_optimization_stage()) if hasattr(engine, "zero_optimization_stage") else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _steps(checkpoints: Path) -> list[Path]:
    """The committed checkpoints, newest first."""
    found = [path for path in checkpoints.glob("step_*") if re.fullmatch(r"step_\d{8,}", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")), reverse=True)


def _cleared(path: Path) -> Path:
    """`path`, with what stood there removed."""
    shutil.rmtree(path, ignore_errors=True)
    return path


@contextlib.contextmanager
def _replaced(owner: Any, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """Hides a method of one object behind another."""
    setattr(owner, name, method)
    try:
        yield
    finally:
        delattr(owner, name)


def _random_state() -> dict[str, Any]:
    """The global generators as tensors and plain values, which weights_only reads."""
    kind, keys, *rest = np.random.get_state()
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    numpy = (kind, torch.from_numpy(keys.astype(np.int64)), *rest)
    return {"python": random.getstate(), "numpy": numpy, "torch": torch.get_rng_state(), "cuda": cuda}


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
