"""The training loop: one loop for every objective."""

import json
import logging
import os
import sys
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from aimv2.checkpoint import TrainState, restore, save
from aimv2.config import ConfigError, compare_configs, to_json
from aimv2.data.batch import Batch
from aimv2.data.fingerprints import DataFingerprints
from aimv2.data.loader import DataConfig, train_loader
from aimv2.data.remote import RemoteFiles
from aimv2.data.shapes import is_written, write_shards
from aimv2.data.shards import ensure_indices, expand_shards
from aimv2.data.tokenizer import Tokenizer
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
from aimv2.logger import Logger, logging_to
from aimv2.objectives.aimv2 import AIMv2Config
from aimv2.optim import OptimConfig
from aimv2.preprocessing import ProcessorConfig
from aimv2.whole_files import write_json

logger = logging.getLogger(__name__)

MOST_SKIPPED_IN_A_ROW = 5
# The checkpoint's fingerprints say whether the data before it are the same; those after it may be others.
MAY_CHANGE_ON_RESUME = {"out", "steps", "save_every", "keep", "log_every", "wandb", "evals"}
MAY_CHANGE_ON_RESUME |= {f"data.{name}" for name in ("workers", "train", "changes", "remote")}


class TrainingError(RuntimeError):
    """The run can't go on; the message says why."""


@dataclass(slots=True, kw_only=True)
class TrainConfig:
    """A whole run. `configs/*.py` return one; the command line changes fields by `key.sub=value`."""

    objective: AIMv2Config
    data: DataConfig
    optim: OptimConfig
    engine: EngineConfig
    steps: int
    out: str
    seed: int = 0
    save_every: int = 1000
    keep: int = 2  # newest checkpoints
    log_every: int = 10
    evals: list[ValidationLoss | ShapesCaptions | FrozenEvaluation] = field(default_factory=list)
    wandb: str | None = None  # project

    def __post_init__(self):
        self.objective.check(self.data)
        if self.data.validation is None and not all(isinstance(e, FrozenEvaluation) for e in self.evals):
            raise ValueError("data.validation is None, but evals need it: expected a source, or no evals")
        names = [e.name for e in self.evals]
        if len(set(names)) < len(names):
            raise ValueError(f"evals {', '.join(names)}: expected different names, as label=... gives")
        for e in self.evals:
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
    tokenizer = Tokenizer(config.data.tokenizer)
    if tokenizer.vocab_size != config.objective.vocab_size:
        raise ConfigError(
            f"data.tokenizer {config.data.tokenizer} has {tokenizer.vocab_size} pieces, "
            f"but the objective's vocab_size is {config.objective.vocab_size}"
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
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(config.seed)
    engine = build_engine(config.objective.build(), config.optim, config.engine)
    fingerprints = DataFingerprints(config.data, tokenizer)
    check_ranks_agree({"config": json.dumps(to_json(config)), **fingerprints.before(sys.maxsize)})
    state = restore(engine, config.out, fingerprints=fingerprints.before) or TrainState()
    keyed = {"patch_size": config.objective.vision.patch_size, "seed": config.seed}
    keyed |= {"rank": rank, "world_size": world_size}
    loader = train_loader(config.data, micro_batch=config.engine.micro_batch, start=state.sample, **keyed)
    evals = [(e, e.build(config.data, device=device, **keyed)) for e in config.evals]
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
            state.sample += config.engine.batch_size
            log.step(state.step, lr=lr, grad_norm=engine.get_global_grad_norm(), skipped=state.skipped or None)
            for settings, evaluate in evals:
                if due(state.step, settings.every, config.steps):
                    with log.paused():
                        model = evaluation_model(engine, config.objective.build)
                        log.evaluation(state.step, settings.name, evaluate(model))
            stop = preempted()
            if stop or due(state.step, config.save_every, config.steps):
                with log.paused():
                    state.log = log.pending()
                    known = fingerprints.before(state.sample)
                    save(engine, state, config.out, config=to_json(config), fingerprints=known, keep=config.keep)
            if stop:
                log.message(f"told to stop after step {state.step}; the same command goes on from the last checkpoint")
                return state
        finish(config, engine)
    return state


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


def processing_of(config: TrainConfig) -> ProcessorConfig:
    """How the trained encoder expects its images."""
    transform = config.data.transform
    return ProcessorConfig(
        image_size=transform.image_size,
        patch_size=config.objective.vision.patch_size,
        mean=transform.mean,
        std=transform.std,
    )


def finish(config: TrainConfig, engine: Engine) -> None:
    """Export the model and draw what it learned; every rank calls it, for the weights are gathered from all."""
    model = engine.module.exported
    weights = full_state_dict(model)

    def export_and_draw() -> None:
        folder = export_model(
            weights,
            Path(config.out) / "export",
            config=model.config,
            processing=processing_of(config),
            tokenizer=config.data.tokenizer,
            metadata={"steps": config.steps, "images": config.steps * config.engine.batch_size, "seed": config.seed},
        )
        logger.info("exported to %s", folder)
        try:
            draw_run(config.out, config.data, seed=config.seed, device=engine.device)
            logger.info("drew %s", Path(config.out) / "{loss,predictions}.png")
        except Exception:  # whatever it is, the trained model is safe and must not look lost
            logger.exception("no pictures; once it is mended, scripts/show_predictions.py %s draws them", config.out)

    on_rank_zero(export_and_draw)
