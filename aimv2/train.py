"""The training loop: one loop for every objective."""

import json
import logging
import sys
from contextlib import closing
from pathlib import Path

import torch
import torch.distributed as dist

from aimv2.checkpoint import TrainState, restore, save
from aimv2.config import to_json
from aimv2.data.batch import Batch, count_padding
from aimv2.data.tokenizer import Tokenizer
from aimv2.engine import (
    Engine,
    Preemption,
    backward,
    build_engine,
    evaluation_model,
    full_state_dict,
    global_counts,
    limit_waiting,
    look_ahead,
    set_learning_rate,
    start_distributed,
)
from aimv2.evals.predictions import draw_run
from aimv2.exports import export_model
from aimv2.logger import Logger, logging_to
from aimv2.preparation import (
    build_model,
    check_ranks_agree,
    check_sources,
    fingerprints_of,
    load_tokenizer,
    open_evaluation,
    open_loader,
    open_logger,
    prepare_data,
    prepare_run,
)
from aimv2.preprocessing import ProcessorConfig
from aimv2.ranks import on_rank_zero, together
from aimv2.train_config import TrainConfig

__all__ = ["TrainConfig", "TrainingError", "train"]

logger = logging.getLogger(__name__)

MOST_SKIPPED_IN_A_ROW = 5


class TrainingError(RuntimeError):
    """The run can't go on; the message says why."""


def due(step: int, every: int, steps: int) -> bool:
    """Whether something done `every` so many steps, and at the end, is done after step `step`; 0 is only at the end."""
    return step == steps or (every > 0 and step % every == 0)


def train(config: TrainConfig) -> TrainState:
    """Train until `config.steps`, going on from the newest checkpoint of the run folder `config.out` if it has one.

    Ends early, with a checkpoint, when any rank is told to stop (SIGTERM, SIGINT). Else ends with `export/`.
    """
    device = start_distributed()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    config.engine.accumulation(world_size)  # a batch that doesn't divide is refused before anything is written
    tokenizer = load_tokenizer(config)
    on_rank_zero(lambda: check_sources(config, tokenizer))
    on_rank_zero(lambda: prepare_run(config))
    with logging_to(config.out, rank):
        on_rank_zero(lambda: prepare_data(config.data))
        return run(config, tokenizer, device)


def run(config: TrainConfig, tokenizer: Tokenizer, device: torch.device) -> TrainState:
    """The steps of `train`, all else being prepared."""
    torch.manual_seed(config.seed)
    model, given = build_model(config, tokenizer)
    engine = build_engine(model, config.optim, config.engine)
    if hasattr(model, "prepare"):  # a teacher, to where the engine has put the model
        together(lambda: model.prepare(config.data))
    limit_waiting()  # data and weights, which take long, are there
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
            log.share("padding", *count_padding(micro_batches))
            log.step(state.step, images=images, lr=lr, grad_norm=norm, skipped=state.skipped or None)
            for settings, evaluate in evals:
                if due(state.step, settings.every, config.steps):
                    with log.paused():
                        found = evaluate(evaluation_model(engine, config.objective.build))
                        log.evaluation(state.step, settings.name, found)
            stop = preempted()
            if stop or due(state.step, config.save_every, config.steps):
                with log.paused():
                    state.log = log.pending()
                    known = fingerprints(state.sample)
                    save(engine, state, config.out, config=to_json(config), fingerprints=known, keep=config.keep)
            if stop:
                log.message(f"told to stop after step {state.step}; the same command goes on from the last checkpoint")
                return state
        finish(config, engine, state)
    return state


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


def finish(config: TrainConfig, engine: Engine, state: TrainState) -> None:
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
            metadata={"steps": config.steps, "images": state.sample, "seed": config.seed},
        )
        logger.info("exported to %s", folder)
        try:
            draw_run(config.out, config.own_size, seed=config.seed, device=engine.device)
            logger.info("drew %s", Path(config.out) / "{loss,predictions}.png")
        except Exception:  # whatever it is, the trained model is safe and must not look lost
            logger.exception("no pictures; once it is mended, scripts/show_predictions.py %s draws them", config.out)

    on_rank_zero(export_and_draw)
