"""The training loop: one loop for every objective."""

import json
import logging
import os
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from aimv2.checkpoint import TrainState, restore, save
from aimv2.config import ConfigError, compare_configs, to_json
from aimv2.data.batch import Batch
from aimv2.data.fingerprints import DataFingerprints
from aimv2.data.loader import DataConfig, SampleLoader, train_loader
from aimv2.data.native import patch_budget
from aimv2.data.remote import RemoteFiles
from aimv2.data.shapes import is_written, write_shards
from aimv2.data.shards import ensure_indices, expand_shards
from aimv2.data.tokenizer import Tokenizer, open_tokenizer
from aimv2.engine import (
    Engine,
    EngineConfig,
    Preemption,
    backward,
    build_engine,
    evaluation_model,
    full_state_dict,
    global_counts,
    limit_waiting,
    look_ahead,
    on_rank_zero,
    set_learning_rate,
    start_distributed,
)
from aimv2.evals.in_loop import FrozenEvaluation
from aimv2.evals.predictions import draw_run
from aimv2.evals.shapes_captions import ShapesCaptions
from aimv2.evals.validation import ValidationLoss
from aimv2.exports import export_model
from aimv2.flops import peak_flops
from aimv2.init_from import InitFrom, load_initial
from aimv2.logger import Logger, logging_to
from aimv2.objectives.aimv2 import AIMv2Config
from aimv2.objectives.distill import DistillConfig
from aimv2.objectives.lit import LiTObjectiveConfig
from aimv2.optim import OptimConfig
from aimv2.preprocessing import ProcessorConfig
from aimv2.whole_files import write_json

logger = logging.getLogger(__name__)

MOST_SKIPPED_IN_A_ROW = 5
# The checkpoint's fingerprints say whether the data before it are the same; those after it may be others.
MAY_CHANGE_ON_RESUME = {"out", "steps", "save_every", "keep", "log_every", "wandb", "evals"}
MAY_CHANGE_ON_RESUME |= {"objective.feature_cache"} | {
    f"data.{name}" for name in ("workers", "train", "changes", "remote")
}


Objective = AIMv2Config | DistillConfig | LiTObjectiveConfig
EvalConfig = ValidationLoss | ShapesCaptions | FrozenEvaluation
Evaluate = Callable[[nn.Module], dict[str, float]]


class TrainingError(RuntimeError):
    """The run can't go on; the message says why."""


@dataclass(slots=True, kw_only=True)
class TrainConfig:
    """A whole run. `configs/*.py` return one; the command line changes fields by `key.sub=value`."""

    objective: Objective
    data: DataConfig
    optim: OptimConfig
    engine: EngineConfig
    steps: int
    out: str
    init_from: InitFrom | None = None  # weights to begin with; a checkpoint of this run's own goes before
    seed: int = 0
    save_every: int = 1000
    keep: int = 2  # newest checkpoints
    log_every: int = 10
    evals: list[EvalConfig] = field(default_factory=list)
    wandb: str | None = None  # project

    def __post_init__(self):
        self.objective.check(self.data)
        if self.init_from is None and getattr(self.objective, "needs_weights", False):
            raise ValueError(
                f"init_from is None, but {type(self.objective).__name__} trains on top of a trained image tower: "
                "expected init_from.source, an export or another checkpoint of one"
            )
        if self.data.validation is None and not all(isinstance(e, FrozenEvaluation) for e in self.evals):
            raise ValueError("data.validation is None, but evals need it: expected a source, or no evals")
        names = [e.name for e in self.evals]
        if len(set(names)) < len(names):
            raise ValueError(f"evals {', '.join(names)}: expected different names, as label=... gives")
        for e in self.evals:
            if isinstance(e, ShapesCaptions) and not hasattr(self.objective, "decoder"):
                raise ValueError(f"evals: {e.name} needs a decoder, which {type(self.objective).__name__} has not")
            if isinstance(e, FrozenEvaluation):
                e.check(self.objective.vision.depth, has_text=hasattr(self.objective, "text"))
        least = {"steps": 1, "save_every": 1, "log_every": 1, "seed": 0, "keep": 2}  # one checkpoint may be damaged
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name} {getattr(self, name)}: expected {value} or more")


def due(step: int, every: int, steps: int) -> bool:
    """Whether something done `every` so many steps, and at the end, is done after step `step`; 0 is only at the end."""
    return step == steps or (every > 0 and step % every == 0)


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
        saved = json.loads(path.read_text())
        if differences := compare_configs(saved, to_json(config), MAY_CHANGE_ON_RESUME):
            raise ConfigError(f"{config.out} is the folder of another run: {'; '.join(differences)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, to_json(config))


def check_ranks_agree(described: dict[str, str]) -> None:
    """Ranks with other data or settings would train one model together, and nothing would look wrong.

    Raises:
        ConfigError: on all ranks, naming the first that differs and in what.
    """
    ranks: list[dict[str, str]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(ranks, described)
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


def train(config: TrainConfig) -> TrainState:
    """Train until `config.steps`, going on from the newest checkpoint of the run folder `config.out` if it has one.

    Ends early, with a checkpoint, when any rank is told to stop (SIGTERM, SIGINT). Else ends with `export/`.
    """
    device = start_distributed()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    config.engine.accumulation(world_size)  # a batch that doesn't divide is refused before anything is written
    tokenizer = load_tokenizer(config)
    on_rank_zero(lambda: prepare_run(config))
    with logging_to(config.out, rank):
        on_rank_zero(lambda: prepare_data(config.data))
        limit_waiting()
        return run(config, tokenizer, device)


def run(config: TrainConfig, tokenizer: Tokenizer, device: torch.device) -> TrainState:
    """The steps of `train`, all else being prepared."""
    torch.manual_seed(config.seed)
    model, given = build_model(config, tokenizer)
    engine = build_engine(model, config.optim, config.engine)
    fingerprints = fingerprints_of(config, tokenizer, given)
    check_ranks_agree({"config": json.dumps(to_json(config)), **fingerprints(sys.maxsize)})
    state = restore(engine, config.out, fingerprints=fingerprints) or TrainState()
    loader = open_loader(config, state)
    evals = [(e, open_evaluation(config, e, device)) for e in config.evals]
    preempted = Preemption(device)
    with closing(open_logger(config, state, device)) as log:
        batches = iter(loader)
        skipped_in_a_row = 0
        while state.step < config.steps:
            lr = set_learning_rate(engine, config.optim, state.step, config.steps)
            with log.waiting():
                micro_batches = [next(batches) for _ in range(engine.gradient_accumulation_steps())]
            log.replaced(sum(batch.count_replaced() for batch in micro_batches))
            counts = global_counts(micro_batches, device)
            look_ahead(engine, micro_batches, counts)
            for batch in micro_batches:
                losses = engine(batch.to(device), counts)
                backward(engine, losses["loss"])
                engine.step()
                log.add(losses)
            skipped_in_a_row = note_skip(engine, state, micro_batches, log, skipped_in_a_row)
            state.step += 1
            images = loader.order.samples((state.step - 1) * config.engine.micro_batches, config.engine.micro_batches)
            state.sample += images
            norm = engine.get_global_grad_norm()
            log.step(state.step, images=images, lr=lr, grad_norm=norm, skipped=state.skipped or None)
            for settings, evaluate in evals:
                if due(state.step, settings.every, config.steps):
                    with log.paused():
                        model = evaluation_model(engine, config.objective.build)
                        log.evaluation(state.step, settings.name, evaluate(model))
            stop = preempted()
            if stop or due(state.step, config.save_every, config.steps):
                with log.paused():
                    state.log = log.pending()
                    known = fingerprints(state.sample)
                    save(engine, state, config.out, config=to_json(config), fingerprints=known, keep=config.keep)
            if stop:
                log.message(f"told to stop after step {state.step}; the same command goes on from the last checkpoint")
                return state
        finish(config, engine)
    return state


def build_model(config: TrainConfig, tokenizer: Tokenizer) -> tuple[nn.Module, dict[str, str]]:
    """The objective with its initial weights, and fingerprints of what it was given besides its config.

    They are loaded when a run goes on, too: checkpoints leave out what is frozen.
    """
    model = config.objective.build()
    given = model.fingerprints() if hasattr(model, "fingerprints") else {}
    if config.init_from is not None:
        given["init_from"] = load_initial(model, config.init_from, tokenizer_sha256=tokenizer.fingerprint)
    return model, given


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
        data, patch_size = data_at_own_size(config), config.objective.vision.patch_size
    place = {"rank": dist.get_rank(), "world_size": dist.get_world_size(), "device": device}
    return settings.build(data, patch_size=patch_size, seed=config.seed, **place)


def data_at_own_size(config: TrainConfig) -> DataConfig:
    """The data at the size of the exported encoder's images; its teacher's may be larger."""
    transform = replace(config.data.transform, image_size=config.objective.vision.image_size)
    return replace(config.data, transform=transform)


def open_logger(config: TrainConfig, state: TrainState, device: torch.device) -> Logger:
    """The run's log; where the device's data sheet is known, also of its MFU, with captions as long as the context."""
    peak = peak_flops(device, torch.bfloat16 if config.engine.precision == "bf16" else torch.float32)
    return Logger(
        config.out,
        steps=config.steps,
        batch_size=config.engine.batch_size,
        every=config.log_every,
        wandb=config.wandb,
        rank=dist.get_rank(),
        flops_per_image=config.objective.training_flops(config.data.context_length),
        peak_flops=peak and peak * dist.get_world_size(),
        start=state.step,
        pending=state.log,
    )


def note_skip(engine: Engine, state: TrainState, micro_batches: list[Batch], log: Logger, in_a_row: int) -> int:
    """Count the step if the engine skipped it, on all ranks, for a gradient that was not finite; end hopeless runs.

    Returns how many steps in a row have been skipped.
    """
    if engine.was_step_applied():
        return 0
    state.skipped += 1
    log.discard()
    samples = torch.cat([batch.sample for batch in micro_batches]).tolist()
    logger.warning("step %d skipped, its gradient is not finite; this rank's samples: %s", state.step + 1, samples)
    if in_a_row + 1 >= MOST_SKIPPED_IN_A_ROW:
        raise TrainingError(f"{in_a_row + 1} steps in a row, up to {state.step + 1}, had no finite gradient")
    return in_a_row + 1


def finish(config: TrainConfig, engine: Engine) -> None:
    """Export the model and draw what it learned; every rank calls it, for the weights are gathered from all."""
    model, vision = engine.module.exported, config.objective.vision
    weights = full_state_dict(model)

    def export_and_draw() -> None:
        folder = export_model(
            weights,
            Path(config.out) / "export",
            config=model.config,
            processing=ProcessorConfig.of_training(config.data, vision.image_size, vision.patch_size),
            tokenizer=config.data.tokenizer,
            metadata={"steps": config.steps, "images": config.steps * config.engine.batch_size, "seed": config.seed},
        )
        logger.info("exported to %s", folder)
        try:
            draw_run(config.out, data_at_own_size(config), seed=config.seed, device=engine.device)
            logger.info("drew %s", Path(config.out) / "{loss,predictions}.png")
        except Exception:  # whatever it is, the trained model is safe and must not look lost
            logger.exception("no pictures; once it is mended, scripts/show_predictions.py %s draws them", config.out)

    on_rank_zero(export_and_draw)
