"""How the objective starts and runs: initialisation, bf16, recomputing, compiling, CUDA."""

import copy
import math
from dataclasses import fields, replace

import pytest
import torch
from tiny_aimv2 import DECODER, VISION, counts_of, gradients, random_batch, random_model
from torch import Tensor

from aimv2.data.batch import Batch, Counts
from aimv2.objectives.aimv2 import AIMv2, AIMv2Config

# --- initialisation


def assert_moments(weight: Tensor, std: float, kurtosis: float) -> None:
    """Mean 0 and deviation `std` within 5 standard errors; that of the deviation depends on the kurtosis."""
    n = weight.numel()
    assert abs(weight.mean()) < 5 * std / math.sqrt(n)
    assert abs(weight.std() / std - 1) < 5 * math.sqrt((kurtosis - 1) / (4 * n)) + 1 / n


def assert_xavier(weight: Tensor) -> None:
    fan_out, fan_in = weight.shape
    bound = math.sqrt(6 / (fan_in + fan_out))
    assert weight.abs().max() <= bound
    assert_moments(weight, bound / math.sqrt(3), kurtosis=1.8)


def test_initialisation_is_the_published_one():
    torch.manual_seed(0)
    vision = replace(VISION, width=96, heads=3, mlp_hidden=256, patch_size=14, image_size=224)
    decoder = replace(DECODER, width=72, mlp_hidden=192, depth=3, vocab_size=500, context_length=77)
    model = AIMv2Config(vision=vision, decoder=decoder).build()
    seen = 0
    for name, weight in model.named_parameters():
        weight = weight.detach()
        if ".qkv." in name:
            for projection in weight.chunk(3):  # each a matrix of its own
                assert_xavier(projection)
        elif any(part in name for part in (".attention.proj.", ".mlp.", "projection.weight", "patch_embed.weight")):
            assert_xavier(weight.flatten(1))
        elif "norm" in name:
            assert (weight == 1).all()
        elif name.endswith(".bias"):
            assert (weight == 0).all()
        elif name in ("encoder.positions.weight", "decoder.tokens.weight", "decoder.bos"):
            assert_moments(weight, 0.02, kurtosis=3)
        elif name == "decoder.text_positions":
            assert_moments(weight, 0.01, kurtosis=3)
        elif name in ("decoder.pixel_head.weight", "decoder.text_head.weight"):
            std = math.sqrt(1 / (1 + decoder.depth) / decoder.width)
            assert_moments(weight, std, kurtosis=2.4)  # of a normal cut at two of its deviations
            assert 2 < weight.abs().max() / std < 2 / 0.8796
        else:
            raise AssertionError(f"{name}: nothing is known of its initialisation")
        seen += 1
    assert seen == len(model.state_dict())


# --- precision, compiling, recomputing, devices

WIDER = AIMv2Config(
    vision=replace(VISION, width=64, mlp_hidden=176, depth=3),
    decoder=replace(DECODER, width=64, heads=4, mlp_hidden=176, depth=3),
)


def as_vector(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.float().cpu().flatten() for t in tensors])


def forward_backward(model: AIMv2, batch: Batch, device: str = "cpu", bf16: str = "no") -> tuple[float, Tensor]:
    """The loss, and all gradients as one vector. `bf16` by "autocast", or by "weights" as DeepSpeed does it."""
    model, batch = copy.deepcopy(model).to(device), batch.to(device)
    if bf16 == "weights":
        model = model.bfloat16()
    counts = counts_of(batch)
    counts = Counts.of(torch.stack([getattr(counts, f.name) for f in fields(counts)]).to(device))
    with torch.autocast(device, torch.bfloat16, enabled=bf16 == "autocast"):
        loss = model(batch, counts)["loss"]
    loss.backward()
    return loss.item(), as_vector(gradients(model))


def assert_close_in_bf16(result: tuple[float, Tensor], expected: tuple[float, Tensor]) -> None:
    """A bf16 number is off by 2^-9 relative; some 50 roundings on the way through 6 blocks add up at random to 2 %."""
    assert result[0] == pytest.approx(expected[0], rel=0.02)
    assert result[1].isfinite().all()
    assert (result[1] - expected[1]).norm() / expected[1].norm() < 0.04  # there and back


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # autocast: bf16 features, fp32 norms
@pytest.mark.parametrize("bf16", ["autocast", "weights"])
def test_bf16_is_close_to_fp32(bf16):
    model, batch = random_model(WIDER, torch.float32), random_batch(dtype=torch.float32)
    assert_close_in_bf16(forward_backward(model, batch, bf16=bf16), forward_backward(model, batch))


def test_checkpointing_changes_no_bit():
    batch, results = random_batch(dtype=torch.float32), []
    for checkpointing in (False, True):
        vision = replace(VISION, checkpointing=checkpointing)
        decoder = replace(DECODER, checkpointing=checkpointing)
        model = random_model(AIMv2Config(vision=vision, decoder=decoder), torch.float32)
        results.append(forward_backward(model, batch))
    assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiles_without_graph_breaks(checkpointing):
    vision, decoder = (replace(c, checkpointing=checkpointing) for c in (VISION, DECODER))
    model = random_model(AIMv2Config(vision=vision, decoder=decoder), torch.float32)
    batch = random_batch(dtype=torch.float32)
    counts = counts_of(batch)
    torch._dynamo.reset()
    assert torch._dynamo.explain(model)(batch, counts).graph_break_count == 0
    expected = model(batch, counts)
    expected["loss"].backward()
    expected_gradients = gradients(model)
    model.zero_grad()
    losses = torch.compile(model, fullgraph=True, backend="eager")(batch, counts)
    losses["loss"].backward()
    assert losses == expected
    assert all(torch.equal(a, b) for a, b in zip(gradients(model), expected_gradients, strict=True))


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.gpu
@needs_cuda
def test_cuda_equals_cpu_in_fp32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model, batch = random_model(WIDER, torch.float32), random_batch(dtype=torch.float32)
    loss, gradient = forward_backward(model, batch, "cuda")
    expected_loss, expected_gradient = forward_backward(model, batch)
    # other summation orders: roundings of 6e-8, amplified by the norms of 6 blocks
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert (gradient - expected_gradient).norm() / expected_gradient.norm() < 1e-4


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("bf16", ["autocast", "weights"])
def test_cuda_in_bf16_is_close_to_fp32(bf16):
    model, batch = random_model(WIDER, torch.float32), random_batch(dtype=torch.float32)
    assert_close_in_bf16(forward_backward(model, batch, "cuda", bf16=bf16), forward_backward(model, batch))


@pytest.mark.gpu
@needs_cuda
def test_compiles_on_cuda(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model, batch = random_model(WIDER, torch.float32), random_batch(dtype=torch.float32)
    expected = forward_backward(model, batch)
    model, batch = model.cuda(), batch.to("cuda")
    counts = counts_of(batch)
    counts = Counts.of(torch.stack([getattr(counts, f.name) for f in fields(counts)]).cuda())
    torch._dynamo.reset()
    loss = torch.compile(model, fullgraph=True)(batch, counts)["loss"]
    loss.backward()
    gradient = as_vector(gradients(model))
    assert loss.item() == pytest.approx(expected[0], rel=1e-5)
    assert (gradient - expected[1]).norm() / expected[1].norm() < 1e-4
