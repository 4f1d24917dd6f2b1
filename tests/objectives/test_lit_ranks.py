"""LiT's objective in real processes: DeepSpeed at each stage against plain torch with the whole batch at once."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import finish, start
from test_aimv2 import part_of
from tiny_lit_objective import CONFIG, LIT, random_batch
from torch import Tensor

from aimv2.checkpoint import TrainState, restore, save
from aimv2.data.batch import Batch, Counts, count_targets
from aimv2.engine import (
    Engine,
    EngineConfig,
    backward,
    build_engine,
    evaluation_model,
    full_state_dict,
    global_counts,
    look_ahead,
    set_learning_rate,
    start_distributed,
)
from aimv2.objectives.lit import LiTObjective
from aimv2.optim import OptimConfig, build_optimizer, learning_rate
from aimv2.ranks import gather_rows

OPTIM = OptimConfig(peak_lr=1e-3, warmup_steps=2, clip=0.5)
BATCH, STEPS = 8, 4


def run(tmp_path, body, *args, ranks):
    log = tmp_path / "terminal.log"
    codes = finish(start(body, *args, ranks=ranks, log=log))
    assert codes == [0] * ranks, log.read_text()


def whole_batch(step: int) -> Batch:
    """Captions of uneven length; one of them is empty, and in step 1 half of them."""
    lengths = [3, 6, 2, 5, 1, 4, 6, 3]
    lengths[step % BATCH] = 0
    if step == 1:
        lengths[:4] = [0] * 4  # all of a micro-batch, or of a rank
    return random_batch(lengths, torch.float32, seed=step + 1)


def my_part(batch: Batch, micro: int) -> list[Batch]:
    parts = [part_of(batch, slice(i, i + micro)) for i in range(0, BATCH, micro)]
    return parts[dist.get_rank() :: dist.get_world_size()]


def build_objective(loss: str) -> LiTObjective:
    torch.manual_seed(0)
    return replace(CONFIG, loss=loss).build()


def build(zero: int, micro: int, loss: str, precision: str = "fp32") -> Engine:
    config = EngineConfig(batch_size=BATCH, micro_batch=micro, zero_stage=zero, precision=precision)
    return build_engine(build_objective(loss), OPTIM, config)


def take_step(engine: Engine, step: int, micro: int) -> Tensor:
    """One turn of the training loop -> (2,) this rank's part of loss and accuracy."""
    set_learning_rate(engine, OPTIM, step, STEPS)
    micro_batches = my_part(whole_batch(step), micro)
    counts = global_counts(micro_batches, torch.device("cpu"))
    look_ahead(engine, micro_batches, counts)
    total = torch.zeros(2)
    for batch in micro_batches:
        losses = engine(batch, counts)
        backward(engine, losses["loss"])
        engine.step()
        total += torch.stack([losses["loss"].detach(), losses["accuracy"]])
    return total


def plain_training(loss: str) -> tuple[dict[str, Tensor], list[list[float]]]:
    """The weights after STEPS steps of torch alone, and each step's norm of the gradient, loss and accuracy."""
    objective = build_objective(loss)
    optimizer = build_optimizer(objective, OPTIM)
    numbers = []
    for step in range(STEPS):
        batch = whole_batch(step)
        counts = Counts.of(count_targets([batch]).float())
        optimizer.zero_grad()
        objective.look_ahead([batch], counts)
        losses = objective(batch, counts)
        losses["loss"].backward()
        norm = torch.nn.utils.clip_grad_norm_([p for p in objective.parameters() if p.requires_grad], OPTIM.clip)
        numbers.append([norm.item(), losses["loss"].item(), losses["accuracy"].item()])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(OPTIM, step, STEPS)
        optimizer.step()
    return objective.state_dict(), numbers


def compare_with_plain_training(zero, micro, loss):
    expected, numbers = plain_training(loss)  # before there are other ranks
    start_distributed()
    engine = build(zero, micro, loss)
    locked = full_state_dict(engine.module.encoder)
    for step in range(STEPS):
        total = take_step(engine, step, micro)
        if dist.get_world_size() > 1:
            dist.all_reduce(total)
        found = [float(engine.get_global_grad_norm()), *total.tolist()]
        assert found == pytest.approx(numbers[step], rel=1e-5)
    trained = full_state_dict(engine.module)
    assert set(trained) == set(expected)
    for name, value in expected.items():
        # Sums in another order differ by 1e-7 of their size, which Adam can make 1e-3 (lr) times as much of.
        torch.testing.assert_close(trained[name], value, rtol=0, atol=2e-6, msg=lambda m, name=name: f"{name}: {m}")
    after = full_state_dict(engine.module.encoder)
    assert all(torch.equal(after[name], value) for name, value in locked.items())
    exported = full_state_dict(engine.module.exported)
    assert set(exported) == set(LIT.build().state_dict())


@pytest.mark.parametrize(
    ("zero", "ranks", "micro", "loss"),
    [
        (1, 2, 2, "softmax"),
        pytest.param(1, 1, 2, "softmax", marks=pytest.mark.slow),
        pytest.param(1, 2, 4, "softmax", marks=pytest.mark.slow),
        pytest.param(1, 2, 2, "sigmoid", marks=pytest.mark.slow),
        pytest.param(2, 2, 2, "softmax", marks=pytest.mark.slow),
        pytest.param(2, 2, 4, "sigmoid", marks=pytest.mark.slow),
        pytest.param(3, 1, 2, "sigmoid", marks=pytest.mark.slow),
        pytest.param(3, 2, 2, "softmax", marks=pytest.mark.slow),
        pytest.param(3, 2, 2, "sigmoid", marks=pytest.mark.slow),
        pytest.param(3, 2, 4, "softmax", marks=pytest.mark.slow),
        pytest.param(3, 2, 4, "sigmoid", marks=pytest.mark.slow),
    ],
)
def test_equals_the_whole_batch_at_once(tmp_path, zero, ranks, micro, loss):
    run(tmp_path, compare_with_plain_training, zero, micro, loss, ranks=ranks)


def compare_cached_with_uncached(zero):
    start_distributed()
    rank, config = dist.get_rank(), EngineConfig(batch_size=8, micro_batch=2, zero_stage=zero, precision="fp32")
    engines = []
    for gib in (0.0, 1.0):
        torch.manual_seed(0)
        engines.append(build_engine(replace(CONFIG, feature_cache=gib).build(), OPTIM, config))
    for step in range(3):
        seed = rank if step == 0 or rank == 0 else 10 * step  # rank 0 sees its images again, rank 1 new ones
        parts = [random_batch(lengths, torch.float32, seed=seed + 2 * i) for i, lengths in enumerate(([3, 4], [2, 5]))]
        counts = global_counts(parts, torch.device("cpu"))
        for engine in engines:
            look_ahead(engine, parts, counts)
            for batch in parts:
                backward(engine, engine(batch, counts)["loss"])
                engine.step()
    assert len(engines[1].module._cache) == (4 if rank == 0 else 12)
    expected, found = (full_state_dict(engine.module) for engine in engines)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 2])  # at 3 it is refused
def test_a_rank_that_knows_its_images_stays_in_step(tmp_path, zero):
    run(tmp_path, compare_cached_with_uncached, zero, ranks=2)


def compare_with_uninterrupted(zero, precision, folder):
    start_distributed()
    prints = {"data": "d"}
    whole, first = (build(zero, 2, "sigmoid", precision) for _ in range(2))
    for step in range(STEPS):
        take_step(whole, step, 2)
    for step in range(2):
        take_step(first, step, 2)
    assert save(first, TrainState(step=2, sample=2 * BATCH), folder, config={}, fingerprints=prints)
    second = build(zero, 2, "sigmoid", precision)
    assert restore(second, folder, fingerprints=lambda sample: prints).step == 2
    for step in range(2, STEPS):
        take_step(second, step, 2)
    expected, found = full_state_dict(whole.module), full_state_dict(second.module)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    for path in Path(folder).rglob("*model_states.pt"):
        names = set(torch.load(path, weights_only=False)["module"])  # written above
        assert "model.log_scale" in names and not any(name.startswith("model.encoder.") for name in names)
    model = evaluation_model(second, replace(CONFIG, loss="sigmoid").build)
    with torch.no_grad():
        found = model(whole_batch(7), Counts.of(torch.ones(4)))
    assert found["loss"].isfinite()


@pytest.mark.slow
@pytest.mark.parametrize(("zero", "precision"), [(1, "fp32"), (1, "bf16"), (2, "bf16"), (3, "fp32"), (3, "bf16")])
def test_a_run_that_goes_on_is_the_same_bit_for_bit(tmp_path, zero, precision):
    run(tmp_path, compare_with_uninterrupted, zero, precision, str(tmp_path), ranks=2)


def gather():
    rows, first = gather_rows(torch.arange(6.0).view(3, 2))
    assert rows.shape == (3, 2) and first == 0  # alone
    start_distributed()
    rank = dist.get_rank()
    for lengths in ([3, 2], [0, 2], [2, 0], [0, 0], [2, 2]):
        own = torch.arange(lengths[rank] * 2.0).view(-1, 2) + 100 * rank
        rows, first = gather_rows(own)
        expected = [torch.arange(n * 2.0).view(-1, 2) + 100 * r for r, n in enumerate(lengths)]
        assert torch.equal(rows, torch.cat(expected)) and first == rank * lengths[0]


def evaluate_unevenly():
    """In evaluation ranks call it a different number of times, so nothing may wait for another."""
    start_distributed()
    engine = build(1, 2, "softmax")
    take_step(engine, 0, 2)
    with torch.no_grad():
        for step in range(1 + 2 * dist.get_rank()):
            engine.module(whole_batch(step), Counts.of(torch.ones(4)))
    take_step(engine, 1, 2)


def gather_and_evaluate():
    gather()
    evaluate_unevenly()


def test_ranks_of_any_number_of_rows(tmp_path):
    run(tmp_path, gather_and_evaluate, ranks=2)
