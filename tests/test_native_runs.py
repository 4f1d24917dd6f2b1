"""What the loop and its config do at native resolution: what is refused, what is logged, ZeRO-3 with unlike grids."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from processes import finish, start
from strips import image_batch, random_images, strip_batch

from aimv2 import preparation
from aimv2.checkpoint import TrainState
from aimv2.config import load_config
from aimv2.data.batch import Counts, count_targets
from aimv2.data.native import NativeConfig
from aimv2.decoder import DecoderConfig
from aimv2.encoder import VisionConfig
from aimv2.engine import EngineConfig, backward, build_engine, full_state_dict, global_counts, start_distributed
from aimv2.evals.shapes_captions import ShapesCaptions
from aimv2.evals.validation import ValidationLoss
from aimv2.objectives.aimv2 import AIMv2Config
from aimv2.optim import OptimConfig, build_optimizer
from aimv2.train import TrainConfig

P = 4


def tiny_run() -> TrainConfig:
    return load_config(Path(__file__).with_name("tiny_run.py"))


@pytest.mark.parametrize(
    ("positions", "area", "words"),
    [("learned", 9, "captions: area 9 with positions 'learned'"), ("sincos", 1, "area 1 .*expected 2 or more")],
)
def test_captions_at_an_area_that_can_not_be_are_refused_before_the_first_step(positions, area, words):
    run = tiny_run()
    vision = replace(run.objective.vision, positions=positions)
    with pytest.raises(ValueError, match=words):
        replace(run, objective=replace(run.objective, vision=vision), evals=[ShapesCaptions(area=area)])
    replace(run, evals=[ShapesCaptions()])


@pytest.mark.parametrize("native", [None, NativeConfig(min_patches=4, max_patches=16)])
def test_no_mfu_at_native_resolution(native, monkeypatch):
    """A step has other images than the batch size says, of other sizes than the flops are counted for."""
    made = []
    monkeypatch.setattr(preparation, "Logger", lambda *args, **settings: made.append(settings))
    monkeypatch.setattr(preparation, "peak_flops", lambda *args: 1e12)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    run = tiny_run()
    run.data.native = native
    preparation.open_logger(run, TrainState(), torch.device("cpu"))
    assert made[0]["peak_flops"] == (None if native else 2e12)


def test_validation_losses_of_strips_do_not_depend_on_how_they_are_batched(monkeypatch):
    """All in one batch, two and two, one by one as squares of pixels; and as two ranks, whose sums add up."""
    torch.manual_seed(0)
    small = replace(LARGE.vision, image_size=3 * P)
    model = AIMv2Config(vision=small, decoder=LARGE.decoder).build().double()
    images, texts, prefixes = random_images(GRIDS[0], P), [[3, 1], [2, 4, 1], [], [5, 6, 1]], [4, 1, 11, 1]
    parts = list(zip(images, texts, prefixes, strict=True))

    def validate(batches, data, sent=None, others=None):
        def add(sums):
            sent is None or sent.append(sums)
            return sums if others is None else sums + others.pop(0)

        monkeypatch.setattr("aimv2.evals.validation.validation_loader", lambda *_, **__: batches)
        monkeypatch.setattr("aimv2.evals.validation.sum_over_ranks", add)
        place = {"patch_size": P, "seed": 0, "rank": 0, "world_size": 1, "device": torch.device("cpu")}
        return ValidationLoss().build(data, **place)(model)

    def strips_of(*rows):
        return strip_batch(*map(list, zip(*(parts[row] for row in rows), strict=True)), P)

    data = SimpleNamespace(validation=object(), made_by=None)
    whole = validate([strips_of(0, 1, 2, 3)], data)
    assert len(whole) == 3 and all(value > 0 for value in whole.values())
    # counts and captions' logits are fp32
    assert validate([strips_of(3, 0), strips_of(2, 1)], data) == pytest.approx(whole, rel=1e-6)
    assert validate([image_batch(*part, P) for part in parts], data) == pytest.approx(whole, rel=1e-6)
    counts = count_targets([strips_of(0, 1, 2, 3)])
    sent, others = [], [counts - count_targets([strips_of(0, 1)]), torch.zeros(3, dtype=torch.float64)]
    validate([strips_of(0, 1)], data, sent, others)
    others = [counts - count_targets([strips_of(2, 3)]), sent[1]]
    assert validate([strips_of(2, 3)], data, None, others) == pytest.approx(whole, rel=1e-6)


# --- ZeRO-3: a table over the persistence threshold, 1e5 values, is gathered for every call of its module

LARGE = AIMv2Config(
    vision=VisionConfig(
        width=16, depth=1, heads=2, mlp_hidden=16, image_size=80 * P, patch_size=P, positions="interpolated"
    ),
    decoder=DecoderConfig(width=16, depth=1, heads=2, mlp_hidden=16, vocab_size=7, context_length=4),
)
OPTIM = OptimConfig(peak_lr=1e-3, warmup_steps=1, clip=1e9)
GRIDS = ([(3, 3), (1, 7), (4, 3), (2, 1)], [(3, 3)] * 4)  # of two ranks


def batch_of(rank: int, step: int):
    torch.manual_seed(10 * step + rank)
    return strip_batch(random_images(GRIDS[rank], P, torch.float32), [[3, 1]] * 4, [1] * 4, P)


def train_with_unlike_grids():
    device = start_distributed()
    torch.manual_seed(0)
    model, plain = LARGE.build(), LARGE.build()
    plain.load_state_dict(model.state_dict())
    assert plain.encoder.positions.weight.numel() > 1e5
    engine = build_engine(model, OPTIM, EngineConfig(batch_size=8, micro_batch=4, zero_stage=3, precision="fp32"))
    optimizer = build_optimizer(plain, OPTIM)
    for group in (*engine.optimizer.param_groups, *optimizer.param_groups):
        group["lr"] = OPTIM.peak_lr
    for step in range(2):
        batch = batch_of(dist.get_rank(), step)
        backward(engine, engine(batch, global_counts([batch], device))["loss"])
        engine.step()
        whole = [batch_of(rank, step) for rank in (0, 1)]
        counts = Counts.of(count_targets(whole).float())
        optimizer.zero_grad()
        sum(plain(part, counts)["loss"] for part in whole).backward()
        optimizer.step()
    trained, expected = full_state_dict(engine.module), plain.state_dict()
    for name in expected:  # as test_engine: sums in another order, which Adam may make lr / 1e-8 times as much of
        torch.testing.assert_close(trained[name], expected[name], rtol=0, atol=1e-5, msg=name)


def test_ranks_with_unlike_grids_train_one_table_under_zero_3(tmp_path):
    log = tmp_path / "terminal.log"
    codes = finish(start(train_with_unlike_grids, ranks=2, log=log), seconds=300)
    assert codes == [0, 0], log.read_text()
