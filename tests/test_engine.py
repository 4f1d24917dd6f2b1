"""DeepSpeed against plain torch, in real processes of one or two ranks."""

import os
import time
from dataclasses import fields
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from processes import finish, start
from torch import Tensor

from aimv2.data.batch import Batch, Counts, count_targets
from aimv2.decoder import DecoderConfig
from aimv2.encoder import VisionConfig
from aimv2.engine import (
    Engine,
    EngineConfig,
    backward,
    build_engine,
    deepspeed_config,
    evaluation_model,
    full_state_dict,
    global_counts,
    limit_waiting,
    set_learning_rate,
    start_distributed,
)
from aimv2.objectives.aimv2 import AIMv2, AIMv2Config
from aimv2.optim import OptimConfig, build_optimizer, learning_rate
from aimv2.ranks import lost_peer, on_rank_zero

SHAPE = {"width": 16, "depth": 1, "heads": 2, "mlp_hidden": 24}
MODEL = AIMv2Config(
    vision=VisionConfig(image_size=16, patch_size=8, **SHAPE),
    decoder=DecoderConfig(vocab_size=11, context_length=5, **SHAPE),
)
OPTIM = OptimConfig(peak_lr=1e-3, warmup_steps=2)
BATCH, MICRO, STEPS = 8, 2, 5


# -- Without processes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "expected"), [(8, 8, 1, 1), (8, 2, 1, 4), (8, 2, 2, 2), (8192, 128, 8, 8)]
)
def test_accumulation(batch, micro, ranks, expected):
    config = EngineConfig(batch_size=batch, micro_batch=micro)
    assert config.accumulation(ranks) == expected
    made = deepspeed_config(config, 1.0, ranks)
    assert made["train_batch_size"] == batch
    assert made["train_micro_batch_size_per_gpu"] * made["gradient_accumulation_steps"] * ranks == batch


@pytest.mark.parametrize(("batch", "micro", "ranks"), [(10, 4, 1), (8, 4, 3), (4, 8, 1)])
def test_a_batch_that_does_not_divide(batch, micro, ranks):
    text = f"engine.batch_size {batch} is not a multiple of engine.micro_batch {micro} x {ranks} ranks"
    with pytest.raises(ValueError, match=text):
        EngineConfig(batch_size=batch, micro_batch=micro).accumulation(ranks)


@pytest.mark.parametrize("name", ["batch_size", "micro_batch"])
def test_no_images_at_all(name):
    with pytest.raises(ValueError, match=f"{name} 0: expected 1 or more"):
        EngineConfig(**{"batch_size": 8, "micro_batch": 8, name: 0})


def test_deepspeed_config_follows_each_option():
    def made(**changes):
        return deepspeed_config(EngineConfig(batch_size=8, micro_batch=8, **changes), 0.5, 1)

    plain = made()
    assert plain["bf16"]["enabled"]
    assert plain["gradient_clipping"] == 0.5
    assert plain["zero_optimization"]["stage"] == 1
    assert "optimizer" not in plain and "scheduler" not in plain  # both are ours
    assert not made(precision="fp32")["bf16"]["enabled"]
    assert made(zero_stage=2)["zero_optimization"]["stage"] == 2
    assert made(zero_stage=3)["zero_optimization"]["memory_efficient_linear"] is False
    assert "offload_optimizer" not in plain["zero_optimization"]
    assert made(offload=True)["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert not plain["zero_force_ds_cpu_optimizer"]  # else offloading compiles for minutes
    assert made(compile=True) == plain  # the model is compiled, not the engine


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[pair.cc:545] Read error [127.0.0.1]:24251: Connection reset by peer."), True),
        (RuntimeError("[pair.cc:538] Connection closed by peer [127.0.1.1]:35627"), True),
        (dist.DistBackendError("NCCL error: remote process exited or there was a network error"), True),
        (RuntimeError("[unbound_buffer.cc:81] Timed out waiting 600000ms for recv operation to complete"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"), False),
    ],
)
def test_lost_peer(error, lost):
    assert lost_peer(error) is lost


# -- With processes: `body` runs on every rank -------------------------------------------------------------------------


def run(tmp_path, body, *args, ranks=1):
    log = tmp_path / "terminal.log"
    codes = finish(start(body, *args, ranks=ranks, log=log))
    assert codes == [0] * ranks, log.read_text()


def whole_batch(step: int) -> Batch:
    """BATCH samples with captions of uneven length, one of them empty."""
    random = torch.Generator().manual_seed(step)
    length = torch.randint(1, 6, (BATCH,), generator=random)
    length[step % BATCH] = 0
    return Batch(
        image=torch.randn(BATCH, 3, 16, 16, generator=random),
        text=torch.randint(0, 11, (BATCH, 5), generator=random),
        text_length=length,
        prefix_length=torch.randint(1, 4, (BATCH,), generator=random),
        sample=torch.arange(BATCH),
        num_patches=4,
    )


def my_part(batch: Batch) -> list[Batch]:
    """This rank's micro-batches of a batch."""
    tensors = {f.name: getattr(batch, f.name) for f in fields(batch) if isinstance(getattr(batch, f.name), Tensor)}
    parts = [{name: tensor[i : i + MICRO] for name, tensor in tensors.items()} for i in range(0, BATCH, MICRO)]
    mine = parts[dist.get_rank() :: dist.get_world_size()]
    return [Batch(num_patches=batch.num_patches, **part) for part in mine]


def build(zero: int, precision: str = "fp32") -> Engine:
    torch.manual_seed(0)
    config = EngineConfig(batch_size=BATCH, micro_batch=MICRO, zero_stage=zero, precision=precision)
    return build_engine(MODEL.build(), OPTIM, config)


def take_step(engine: Engine, step: int, spoil: bool = False) -> None:
    """One turn of the training loop; `spoil` makes one micro-batch of the last rank give a gradient of NaN."""
    set_learning_rate(engine, OPTIM, step, STEPS)
    micro_batches = my_part(whole_batch(step))
    counts = global_counts(micro_batches, torch.device("cpu"))
    for batch in micro_batches:
        loss = engine(batch, counts)["loss"]
        if spoil and batch is micro_batches[0] and dist.get_rank() == dist.get_world_size() - 1:
            loss = loss * float("nan")
        backward(engine, loss)
        engine.step()


def plain_training() -> tuple[dict[str, Tensor], list[float]]:
    """The weights after STEPS steps of torch alone, each on the whole batch at once, and the norms of the gradients."""
    torch.manual_seed(0)
    model: AIMv2 = MODEL.build()
    optimizer = build_optimizer(model, OPTIM)
    norms = []
    for step in range(STEPS):
        batch = whole_batch(step)
        loss = model(batch, Counts.of(count_targets([batch]).float()))["loss"]
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.clip).item())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(OPTIM, step, STEPS)
        optimizer.step()
    return model.state_dict(), norms


def compare_with_plain_training(zero):
    start_distributed()
    engine = build(zero)
    expected, norms = plain_training()
    for step in range(STEPS):
        take_step(engine, step)
        assert engine.was_step_applied()
        assert float(engine.get_global_grad_norm()) == pytest.approx(norms[step], rel=1e-5)
    trained = full_state_dict(engine.module)
    assert list(trained) == list(expected)
    for name, value in expected.items():
        # Sums in another order differ by 1e-7 of their size, which Adam can make 1e-3 (lr) times as much of.
        torch.testing.assert_close(
            trained[name], value, rtol=0, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize(("zero", "ranks"), [(1, 1), (1, 2), (2, 2), (3, 2)])
def test_equals_plain_training(tmp_path, zero, ranks):
    """Accumulation of 4 or of 2 x 2 ranks, clipped and decayed, is the whole batch at once."""
    run(tmp_path, compare_with_plain_training, zero, ranks=ranks)


def compare_with_no_bad_step(zero):
    start_distributed()
    for precision in ("fp32", "bf16"):
        compare_engines(build(zero, precision), build(zero, precision))


def compare_engines(undisturbed: Engine, disturbed: Engine):
    for step in range(3):
        take_step(undisturbed, step)
        if step == 1:
            before = full_state_dict(disturbed.module)
            take_step(disturbed, step, spoil=True)
            assert not disturbed.was_step_applied()
            after = full_state_dict(disturbed.module)
            assert all(torch.equal(after[name], before[name]) for name in before)
        take_step(disturbed, step)
        assert disturbed.was_step_applied()
    expected, trained = full_state_dict(undisturbed.module), full_state_dict(disturbed.module)
    assert all(torch.equal(trained[name], expected[name]) for name in expected)


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_a_gradient_that_is_not_finite_leaves_nothing_behind(tmp_path, zero):
    """NaN on one of two ranks: weights stay, bit for bit, and the moments, too, for what follows is the same."""
    run(tmp_path, compare_with_no_bad_step, zero, ranks=2)


def evaluate_on_one_rank(zero, precision):
    start_distributed()
    engine = build(zero, precision)
    take_step(engine, 0)
    model = evaluation_model(engine, MODEL.build)
    weights = full_state_dict(engine.module)
    if dist.get_rank() == 0:  # the others don't take part: it must be whole
        batch = whole_batch(7)
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        one = Counts.of(torch.ones(4))
        plain = MODEL.build()
        plain.load_state_dict(weights)
        with torch.no_grad():
            assert torch.equal(model(batch, one)["loss"], plain.to(dtype)(batch, one)["loss"])
    dist.barrier()


@pytest.mark.parametrize(("zero", "precision"), [(1, "bf16"), (3, "bf16")])
def test_evaluation_model(tmp_path, zero, precision):
    run(tmp_path, evaluate_on_one_rank, zero, precision, ranks=2)


def agree():
    start_distributed()
    rank = dist.get_rank()

    def fail():
        assert rank == 0
        raise ValueError("only here")

    with pytest.raises(ValueError, match="only here"):
        on_rank_zero(fail)
    done = []
    on_rank_zero(lambda: done.append(rank))
    assert done == [0] * (1 - rank)

    parts = my_part(whole_batch(3))
    counts, expected = global_counts(parts, torch.device("cpu")), count_targets([whole_batch(3)])
    assert [counts.patches, counts.tokens, counts.samples, counts.captions] == expected.tolist()
    for part in parts:
        part.text_length.zero_()
    assert global_counts(parts, torch.device("cpu")).tokens == 1  # no captions anywhere: divided by one, not by zero


def test_ranks_agree(tmp_path):
    run(tmp_path, agree, ranks=2)


def wait_in_vain():
    start_distributed()
    limit_waiting(timedelta(seconds=1))
    if dist.get_rank() == 0:
        with pytest.raises(RuntimeError, match="Timed out") as failure:
            dist.all_reduce(torch.zeros(1))
        assert lost_peer(failure.value)
    else:
        time.sleep(4)


def test_waiting_is_limited(tmp_path):
    run(tmp_path, wait_in_vain, ranks=2)


def test_frozen_scalars_come_out_as_they_went_in():
    module = torch.nn.Module()
    for name, as_given in (("on_rank_0", True), ("elsewhere", False)):
        parameter = torch.nn.Parameter(torch.tensor([2.5]), requires_grad=False)  # as build_engine leaves it
        parameter.was_scalar = True
        if as_given:
            parameter.as_given = torch.tensor([2.625])
        setattr(module, name, parameter)
    found = full_state_dict(module)
    assert {name: (value.shape, value.item()) for name, value in found.items()} == {
        "on_rank_0": ((), 2.625),
        "elsewhere": ((), 2.5),
    }


def start_alone():
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    assert start_distributed().type == "cpu"
    assert (dist.get_rank(), dist.get_world_size()) == (0, 1)
    start_distributed()  # again is harmless


def test_without_a_launcher(tmp_path):
    run(tmp_path, start_alone)
