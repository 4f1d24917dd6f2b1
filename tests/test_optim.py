import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from aimv2.decoder import DecoderConfig
from aimv2.encoder import VisionConfig
from aimv2.objectives.aimv2 import AIMv2Config
from aimv2.optim import OptimConfig, build_optimizer, learning_rate, parameter_groups

PAPER = OptimConfig(peak_lr=1e-3, warmup_steps=12_500)


@pytest.fixture(scope="module")
def model():
    vision = VisionConfig(width=16, depth=2, heads=2, mlp_hidden=24, image_size=16, patch_size=8)
    decoder = DecoderConfig(width=16, depth=1, heads=2, mlp_hidden=24, vocab_size=11, context_length=5)
    return AIMv2Config(vision=vision, decoder=decoder).build()


# -- The learning rate -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 1e-6),
        (6_250, (1e-6 + 1e-3) / 2),  # half-way up
        (12_500, 1e-3),
        (12_500 + 247_500, 1e-5 + 0.99e-3 * 0.75),  # a third of the way down, where the cosine of 60 degrees is a half
        (12_500 + 371_250, (1e-3 + 1e-5) / 2),  # half-way down
        (755_000, 1e-5),
        (800_000, 1e-5),  # a run that goes on beyond its end
    ],
)
def test_learning_rate_by_hand(step, expected):
    assert learning_rate(PAPER, step, 755_000) == pytest.approx(expected, rel=1e-12)


def test_learning_rate_without_warmup_and_with_nothing_else():
    assert learning_rate(OptimConfig(peak_lr=0.5, warmup_steps=0), 0, 10) == 0.5
    assert learning_rate(OptimConfig(peak_lr=0.5, warmup_steps=10), 10, 10) == 0.5  # no step is left for the cosine
    assert learning_rate(OptimConfig(peak_lr=0.5, warmup_steps=10, start_lr=0.0), 5, 7) == 0.25


@given(st.integers(0, 50), st.integers(1, 200))
def test_learning_rate_goes_up_and_then_down(warmup, rest):
    config = OptimConfig(peak_lr=1e-3, warmup_steps=warmup)
    rates = [learning_rate(config, step, warmup + rest) for step in range(warmup + rest + 1)]
    assert rates[: warmup + 1] == sorted(rates[: warmup + 1])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert max(rates) == rates[warmup] == pytest.approx(1e-3)
    assert type(rates[0]) is float  # a numpy scalar would be refused when a checkpoint is read


@pytest.mark.parametrize(("values", "words"), [((0, 5), "peak_lr 0:"), ((1e-3, -1), "warmup_steps -1:")])
def test_impossible_rates_are_refused(values, words):
    with pytest.raises(ValueError, match=words):
        OptimConfig(peak_lr=values[0], warmup_steps=values[1])


# -- What decays -----------------------------------------------------------------------------------------------------


def test_exactly_these_parameters_decay(model):
    """Matrices, the patch convolution and the token table decay; biases, norms, positions and BOS do not."""
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, kept = ([names[id(p)] for p in group["params"]] for group in parameter_groups(model, PAPER))
    linear = ("attention.qkv", "attention.proj", "mlp.gate", "mlp.up", "mlp.down")
    blocks = ("encoder.blocks.0", "encoder.blocks.1", "decoder.blocks.0")
    assert sorted(decayed) == sorted(
        [f"{block}.{part}.weight" for block in blocks for part in linear]
        + ["encoder.patch_embed.weight", "decoder.projection.weight", "decoder.tokens.weight"]
        + ["decoder.pixel_head.weight", "decoder.text_head.weight"]
    )
    assert sorted(kept) == sorted(
        [f"{block}.{norm}.weight" for block in blocks for norm in ("norm1", "norm2")]
        + ["encoder.patch_embed.bias", "encoder.patch_norm.weight", "encoder.positions.weight", "encoder.norm.weight"]
        + ["decoder.projection.bias", "decoder.bos", "decoder.text_positions", "decoder.norm.weight"]
    )


def test_frozen_parameters_are_left_out():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    assert [len(group["params"]) for group in parameter_groups(model, PAPER)] == [1, 1]
    model[1].bias.requires_grad_(False)
    assert [len(group["params"]) for group in parameter_groups(model, PAPER)] == [1]  # no empty group


# -- The update ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoupled", [True, False])
def test_adamw_against_a_loop(decoupled):
    """p *= 1 - wd lr_t / lr_peak (or 1 - wd lr_t), then Adam; float64, through warm-up and decay."""
    steps, wd, b1, b2, eps = 12, 0.1, 0.9, 0.95, 1e-8
    config = OptimConfig(peak_lr=1e-2, warmup_steps=4, weight_decay=wd, decoupled=decoupled)
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    optimizer = build_optimizer(model, config)
    assert type(optimizer) is torch.optim.AdamW

    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    moments = {name: (torch.zeros_like(v), torch.zeros_like(v)) for name, v in values.items()}
    for step in range(steps):
        lr = learning_rate(config, step, steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for name, p in model.named_parameters():
            p.grad = torch.randn_like(p) * 10.0**-step
            m, v = moments[name]
            m, v = b1 * m + (1 - b1) * p.grad, b2 * v + (1 - b2) * p.grad**2
            moments[name] = m, v
            rate = (lr / config.peak_lr if decoupled else lr) * (wd if name == "weight" else 0)
            m, v = m / (1 - b1 ** (step + 1)), v / (1 - b2 ** (step + 1))
            values[name] = values[name] * (1 - rate) - lr * m / (v.sqrt() + eps)
        optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), values[name], rtol=1e-13, atol=0)  # float64 rounds at 1e-16 a step


def test_decay_at_the_peak_is_the_weight_decay_itself():
    """What "fully decoupled" is for: the decay doesn't change with the peak of the learning rate."""
    for peak in (1e-4, 1e-2):
        model = nn.Linear(2, 2, bias=False).double()
        before = model.weight.detach().clone()
        optimizer = build_optimizer(model, OptimConfig(peak_lr=peak, warmup_steps=0, weight_decay=1e-4))
        model.weight.grad = torch.zeros_like(model.weight)
        optimizer.step()
        assert torch.allclose(model.weight / before, torch.tensor(1 - 1e-4, dtype=torch.float64), rtol=1e-12)
        assert math.isclose(optimizer.param_groups[0]["lr"], peak)
