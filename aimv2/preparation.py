"""What a run has before its first step: its folder, its data, its model and all that is opened once."""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from aimv2.checkpoint import TrainState, saved_fingerprints
from aimv2.config import ConfigError, compare_configs, to_json, with_defaults
from aimv2.data.fingerprints import DataFingerprints
from aimv2.data.loader import DataConfig, SampleLoader, train_loader
from aimv2.data.native import patch_budget
from aimv2.data.remote import RemoteFiles
from aimv2.data.shapes import is_written, write_shards
from aimv2.data.shards import ensure_indices, expand_shards
from aimv2.data.tokenizer import Tokenizer, open_tokenizer
from aimv2.evals.validation import ValidationLoss
from aimv2.flops import peak_flops
from aimv2.init_from import check_initial, load_initial
from aimv2.logger import Logger
from aimv2.ranks import gather_objects, on_rank_zero, together
from aimv2.train_config import EvalConfig, TrainConfig
from aimv2.whole_files import write_json

logger = logging.getLogger(__name__)

# The checkpoint's fingerprints say whether the data before it are the same; those after it may be others.
MAY_CHANGE_ON_RESUME = {"out", "steps", "save_every", "keep", "log_every", "wandb", "evals"}
MAY_CHANGE_ON_RESUME |= {"objective.feature_cache"} | {
    f"data.{name}" for name in ("workers", "train", "changes", "remote")
}


Evaluate = Callable[[nn.Module], dict[str, float]]


def prepare_data(config: DataConfig) -> None:
    """Write the data if they are missing and the config knows how, and index the shards. For rank 0."""
    recipe = config.made_by
    if recipe is not None and not is_written(recipe):
        logger.info("%s: no data there, so writing %d images first", recipe.folder, recipe.train + recipe.validation)
        with tqdm(total=recipe.train + recipe.validation, unit="image") as bar:
            write_shards(recipe, workers=os.cpu_count(), progress=bar.update)
    sources = [*config.train, *([config.validation] if config.validation else [])]
    remote = RemoteFiles(config.remote) if config.remote else None
    ensure_indices(shard for source in sources for shard in expand_shards(source.shards, remote))


def prepare_run(config: TrainConfig) -> None:
    """Make the run folder, or make sure that it is this run's. For rank 0.

    A run that came to nothing, without a checkpoint and without a logged step, gives way to any other.
    """
    path = Path(config.out) / "config.json"
    metrics = path.with_name("metrics.jsonl")
    begun = any(path.parent.glob("checkpoints/step_*")) or (metrics.exists() and metrics.stat().st_size > 0)
    if path.exists() and begun:
        saved = with_defaults(TrainConfig, json.loads(path.read_text()))
        if differences := compare_configs(saved, to_json(config), MAY_CHANGE_ON_RESUME):
            raise ConfigError(f"{config.out} is the folder of another run: {'; '.join(differences)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, to_json(config))


def check_ranks_agree(described: dict[str, str]) -> None:
    """Ranks with other data or settings would train one model together, and nothing would look wrong.

    Raises:
        ConfigError: on all ranks, naming the first that differs and in what.
    """
    ranks = gather_objects(described)
    for rank, theirs in enumerate(ranks):
        if different := sorted(key for key in theirs.keys() | ranks[0].keys() if theirs.get(key) != ranks[0].get(key)):
            raise ConfigError(f"rank {rank} has another {', '.join(different)} than rank 0: expected the same on all")


def load_tokenizer(config: TrainConfig) -> Tokenizer:
    tokenizer = open_tokenizer(config.data.tokenizer)
    if tokenizer.vocab_size != config.objective.vocab_size:
        raise ConfigError(
            f"data.tokenizer {config.data.tokenizer} has {tokenizer.vocab_size} pieces, "
            f"but the objective's vocab_size is {config.objective.vocab_size}"
        )
    text = getattr(config.objective, "text", None)  # a tower that looks for EOS, which decoders don't
    if text is not None and text.eos != tokenizer.eos_id:
        raise ConfigError(
            f"data.tokenizer {config.data.tokenizer} has EOS {tokenizer.eos_id}, but the text tower's eos is {text.eos}"
        )
    return tokenizer


def kept_digest(config: TrainConfig) -> str | None:
    """Of the initial weights of a run that goes on and needs them no more; None if they are to be read.

    A checkpoint has all weights but those of a locked tower.
    """
    if getattr(config.objective, "needs_weights", False):
        return None
    return (saved_fingerprints(config.out) or {}).get("init_from")


def check_sources(config: TrainConfig, tokenizer: Tokenizer) -> None:
    """Open, and download, the models that the run is given, and make sure that they fit. For rank 0, before any work.

    Raises ModelError or ConfigError.
    """
    if hasattr(config.objective, "check_sources"):
        config.objective.check_sources(config.data)
    if config.init_from is not None and kept_digest(config) is None:
        check_initial(config.objective, config.init_from, **_given(config, tokenizer))


def build_model(config: TrainConfig, tokenizer: Tokenizer) -> tuple[nn.Module, dict[str, str]]:
    """The objective with its initial weights, and fingerprints of what it was given besides its config.

    Rank 0 alone reads the weights: DeepSpeed begins by giving its own to the others. A rank that fails ends all.
    """
    built = []

    def build() -> None:
        model = config.objective.build()
        built.append((model, model.fingerprints() if hasattr(model, "fingerprints") else {}))

    def load() -> str | None:
        if config.init_from is None:
            return None
        kept = kept_digest(config)
        return kept or load_initial(model, config.objective, config.init_from, **_given(config, tokenizer))

    together(build)
    [(model, given)] = built
    digest = on_rank_zero(load)
    return model, given | ({} if digest is None else {"init_from": digest})


def _given(config: TrainConfig, tokenizer: Tokenizer) -> dict:
    """What weights have to fit besides the objective."""
    return {"tokenizer_sha256": tokenizer.fingerprint, "transform": config.data.transform}


def fingerprints_of(
    config: TrainConfig, tokenizer: Tokenizer, given: dict[str, str]
) -> Callable[[int], dict[str, str]]:
    """What must be the same where a run goes on after so many samples."""
    size = config.data.transform.image_size
    budget = patch_budget(config.engine.micro_batch, size, config.objective.data_patch_size)
    data = DataFingerprints(config.data, tokenizer, budget=budget)
    return lambda samples: given | data.before(samples)


def open_loader(config: TrainConfig, state: TrainState) -> SampleLoader:
    return train_loader(
        config.data,
        patch_size=config.objective.data_patch_size,
        micro_batch=config.engine.micro_batch,
        start=state.sample,
        first_batch=state.step * config.engine.micro_batches,
        seed=config.seed,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
    )


def open_evaluation(config: TrainConfig, settings: EvalConfig, device: torch.device) -> Evaluate:
    """Losses are those of training; all else sees images of the encoder's own size."""
    data, patch_size = config.data, config.objective.data_patch_size
    if not isinstance(settings, ValidationLoss):
        data, patch_size = config.own_size, config.objective.vision.patch_size
    place = {"rank": dist.get_rank(), "world_size": dist.get_world_size(), "device": device}
    return settings.build(data, patch_size=patch_size, seed=config.seed, **place)


def open_logger(config: TrainConfig, state: TrainState, device: torch.device) -> Logger:
    """The run's log; where the device's data sheet is known, also of its MFU, with captions as long as the context."""
    peak = peak_flops(device, torch.bfloat16 if config.engine.precision == "bf16" else torch.float32)
    if config.data.native is not None:  # images of other sizes, and other numbers of them, than flops are counted for
        peak = None
    return Logger(
        config.out,
        steps=config.steps,
        batch_size=config.engine.batch_size,
        every=config.log_every,
        wandb=config.wandb,
        rank=dist.get_rank(),
        flops_per_image=config.objective.training_flops(config.data.context_length) if peak else None,
        peak_flops=peak and peak * dist.get_world_size(),
        start=state.step,
        pending=state.log,
    )
