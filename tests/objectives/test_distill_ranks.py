"""Distillation in real processes: DeepSpeed at each stage against plain torch with the whole batch at once."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import finish, start
from tiny_aimv2 import CONFIG, random_batch
from tiny_distill import part_of
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
    set_learning_rate,
    start_distributed,
)
from aimv2.objectives.distill import Distill, DistillConfig
from aimv2.optim import OptimConfig, build_optimizer, learning_rate
from aimv2.pretrained import load_model

OPTIM = OptimConfig(peak_lr=1e-3, warmup_steps=2, clip=0.5)
BATCH, MICRO, STEPS = 8, 2, 4


def run(tmp_path, body, *args, ranks):
    log = tmp_path / "terminal.log"
    codes = finish(start(body, *args, ranks=ranks, log=log))
    assert codes == [0] * ranks, log.read_text()


def whole_batch(step: int) -> Batch:
    """Captions of uneven length, one of them empty."""
    lengths = [3, 6, 2, 5, 1, 4, 6, 3]
    lengths[step % BATCH] = 0
    return random_batch(lengths, [1, 8, 4, 2, 7, 3, 5, 6], torch.float32, seed=step)


def my_part(batch: Batch) -> list[Batch]:
    parts = [part_of(batch, slice(i, i + MICRO)) for i in range(0, BATCH, MICRO)]
    return parts[dist.get_rank() :: dist.get_world_size()]


def build_objective(settings: dict) -> Distill:
    torch.manual_seed(0)
    return DistillConfig(student=CONFIG, **settings).build()


def build(settings: dict, zero: int, precision: str = "fp32") -> Engine:
    config = EngineConfig(batch_size=BATCH, micro_batch=MICRO, zero_stage=zero, precision=precision)
    return build_engine(build_objective(settings), OPTIM, config)


def take_step(engine: Engine, step: int) -> list[float]:
    set_learning_rate(engine, OPTIM, step, STEPS)
    micro_batches = my_part(whole_batch(step))
    counts = global_counts(micro_batches, torch.device("cpu"))
    losses = []
    for batch in micro_batches:
        losses.append(engine(batch, counts)["loss"])
        backward(engine, losses[-1])
        engine.step()
    assert engine.was_step_applied()
    return [loss.item() for loss in losses]


def plain_training(settings: dict) -> tuple[dict[str, Tensor], list[float]]:
    """The weights after STEPS steps of torch alone, each on the whole batch at once, and the norms of the gradients."""
    objective = build_objective(settings)
    optimizer = build_optimizer(objective, OPTIM)
    norms = []
    for step in range(STEPS):
        batch = whole_batch(step)
        loss = objective(batch, Counts.of(count_targets([batch]).float()))["loss"]
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(objective.parameters(), OPTIM.clip).item())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(OPTIM, step, STEPS)
        optimizer.step()
    return objective.state_dict(), norms


def check_teacher(objective: Distill, precision: str) -> None:
    """It is whole on this rank, in the student's dtype, and as it was."""
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    for name, expected in load_model(objective.settings.teacher).state_dict().items():
        part, _, rest = name.partition(".")
        model = getattr(objective.teacher(), part)
        if model is not None:  # no decoder where nothing is predicted
            assert torch.equal(model.state_dict()[rest], expected.to(dtype)), name


def compare_with_plain_training(settings: dict, zero: int):
    start_distributed()
    engine = build(settings, zero)
    expected, norms = plain_training(settings)
    for step in range(STEPS):
        take_step(engine, step)
        # Sums in another order: 1e-7 of their size each.
        assert float(engine.get_global_grad_norm()) == pytest.approx(norms[step], rel=1e-5)
    trained = full_state_dict(engine.module)
    assert trained.keys() == expected.keys()
    for name, value in expected.items():
        # Differences of 1e-7 can become 1e-3 (lr) times as much as that of a whole step by Adam.
        torch.testing.assert_close(
            trained[name], value, rtol=0, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
    check_teacher(engine.module, "fp32")
    exported = full_state_dict(engine.module.exported)
    assert exported.keys() == CONFIG.build().state_dict().keys()
    assert all(torch.equal(exported[name], trained[f"student.{name}"]) for name in exported)


KINDS = {
    "prefix": {"features": "prefix", "prediction_weight": 1.0},
    "full": {"features": "full", "prediction_weight": 1.0},  # its encoder runs twice, which ZeRO-3 has to follow
    "features": {},
    "predictions": {"feature_weight": 0.0, "prediction_weight": 1.0},
}
MATRIX = [(kind, zero, 2) for kind in KINDS for zero in (1, 2, 3)]
QUICK = [("full", 3, 2)]


@pytest.mark.parametrize(
    ("kind", "zero", "ranks"),
    [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in [*MATRIX, ("full", 1, 1)]],
)
def test_equals_plain_training(tmp_path, teacher, kind, zero, ranks):
    """Accumulation of 4 or of 2 x 2 ranks, clipped and decayed, is the whole batch at once."""
    run(tmp_path, compare_with_plain_training, {"teacher": teacher, **KINDS[kind]}, zero, ranks=ranks)


def stop_and_go_on(settings: dict, zero: int, precision: str, folder: Path):
    start_distributed()
    engine = build(settings, zero, precision)
    for step in range(2):
        take_step(engine, step)
    known = engine.module.fingerprints()
    assert save(engine, TrainState(step=2), folder, config={}, fingerprints=known)
    expected = [take_step(engine, step) for step in range(2, STEPS)]
    weights = full_state_dict(engine.module)

    again = build(settings, zero, precision)
    assert restore(again, folder, fingerprints=lambda sample: known) == TrainState(step=2)
    assert [take_step(again, step) for step in range(2, STEPS)] == expected
    assert all(torch.equal(value, weights[name]) for name, value in full_state_dict(again.module).items())
    check_teacher(again.module, precision)

    whole = evaluation_model(again, lambda: build_objective(settings))
    if dist.get_rank() == 0:  # the other doesn't take part: it must be whole
        batch = whole_batch(7)
        with torch.no_grad():
            found = whole(batch, Counts.of(count_targets([batch]).float()))
        assert found["loss"].isfinite()
        assert whole.teacher() is again.module.teacher()
    dist.barrier()


@pytest.mark.slow
@pytest.mark.parametrize(("zero", "precision"), [(1, "bf16"), (2, "fp32"), (3, "fp32"), (3, "bf16")])
def test_a_run_goes_on_as_if_nothing_had_happened(tmp_path, teacher, zero, precision):
    folder = tmp_path / "run"
    settings = {"teacher": teacher, "features": "full", "prediction_weight": 1.0}
    run(tmp_path, stop_and_go_on, settings, zero, precision, folder, ranks=2)
    stored = set()
    for file in (folder / "checkpoints").glob("*/engine/*model_states.pt"):
        state = torch.load(file, map_location="cpu", weights_only=False)
        stored |= set(state["module"]) | {name for group in state.get("param_shapes") or [] for name in group}
    own = build_objective(settings).state_dict().keys()
    assert stored == own  # and nothing of the teacher's
