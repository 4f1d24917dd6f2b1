"""Heads that are trained together are those trained alone, and the published head trained by torch's own parts."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from made_probes import Threads
from test_attentive_head import Published
from torch.nn.utils import clip_grad_norm_

from aimv2.evals.probes import attentive_sweep
from aimv2.evals.probes.attentive_sweep import AttentiveSweep, _Pool
from aimv2.evals.session import Session

WIDTH, HEADS, CLASSES = 16, 4, 5
SETTINGS = [{"lr": lr, "weight_decay": decay} for lr in (1e-4, 5e-3, 2e-2) for decay in (0.05, 0.5)]


def sweep_of(settings=SETTINGS, width=WIDTH, heads=HEADS, clip=0.05, warmup=0.25, device="cpu") -> AttentiveSweep:
    return AttentiveSweep(
        settings,
        width=width,
        heads=heads,
        classes=CLASSES,
        warmup=warmup,
        min_lr=1e-5,
        clip=clip,
        seed=0,
        device=torch.device(device),
    )


def batches(count: int = 8, size: int = 11, patches: int = 9, width: int = WIDTH):
    """Features with a mean, and labels that they tell something about."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        labels = torch.randint(CLASSES, (size,), generator=generator)
        x = 3 + 2 * torch.randn(size, patches, width, generator=generator)
        x[..., :CLASSES] += F.one_hot(labels, CLASSES)[:, None]
        yield x, labels


def train(sweep: AttentiveSweep, session: Session | None = None, **shape) -> torch.Tensor:
    """Losses (steps, S)."""
    found = list(batches(**shape))
    return torch.stack(
        [sweep.step(x, labels, i, len(found), session or Session()) for i, (x, labels) in enumerate(found)]
    )


@pytest.mark.parametrize("shape", [{}, {"patches": 16, "size": 8}, {"patches": 64, "size": 40, "width": 64}])
def test_a_sweep_is_its_heads_alone_to_the_bit(shape):
    width = shape.get("width", WIDTH)
    together = sweep_of(width=width)
    losses = train(together, **shape)
    ends = set()
    for number, setting in enumerate(SETTINGS):
        alone = sweep_of([setting], width=width)
        assert torch.equal(train(alone, **shape)[:, 0], losses[:, number])
        for name, tensor in alone.tensors(0).items():
            assert torch.equal(together.tensors(number)[name], tensor), (setting, name)
        ends.add(alone.tensors(0)["k.weight"].sum().item())
    assert len(ends) == len(SETTINGS)  # each setting matters


def test_it_is_the_published_head_trained_by_torch():
    """AdamW, gradient clipping, warm-up and cosine written out. The tolerance: Adam divides by a gradient's size, so
    that where the gradient is near 0 its rounding is a share of a step, 5e-3 at most."""
    sweep, number = sweep_of(), 2
    setting = SETTINGS[number]
    head = Published(WIDTH, HEADS, CLASSES)
    head.load_state_dict(copy.deepcopy(sweep.tensors(number)))
    optimizer = torch.optim.AdamW(head.parameters(), lr=1.0, betas=(0.9, 0.999), weight_decay=setting["weight_decay"])
    losses = train(sweep)[:, number]
    for step, (x, labels) in enumerate(batches()):
        share = (step + 1) / 2 if step < 2 else None  # two of eight steps are warm-up
        cosine = 1e-5 + (setting["lr"] - 1e-5) * (1 + math.cos(math.pi * (step - 2) / 6)) / 2
        optimizer.param_groups[0]["lr"] = cosine if share is None else setting["lr"] * share
        loss = F.cross_entropy(head(x), labels)
        torch.testing.assert_close(losses[step], loss.detach(), rtol=1e-4, atol=1e-5)
        optimizer.zero_grad()
        loss.backward()
        assert clip_grad_norm_(head.parameters(), 0.05) > 0.05  # or the clipping would not be looked at
        optimizer.step()
    torch.testing.assert_close(sweep.tensors(number), head.state_dict(), rtol=1e-3, atol=2e-4)
    x, _ = next(batches())
    torch.testing.assert_close(sweep.scores(x.clone())[number], head.eval()(x).detach(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("chunk", [1, 3000, 1 << 20])
def test_pooling_and_its_gradient(monkeypatch, chunk):
    """Against autograd in float64, whatever is in the cache at a time."""
    monkeypatch.setitem(attentive_sweep.CHUNK_BYTES, "cpu", chunk)
    torch.manual_seed(0)
    x = torch.randn(7, 9, WIDTH, dtype=torch.float64)
    queries = torch.randn(3, HEADS, WIDTH, dtype=torch.float64)
    wanted = torch.randn(3, 7, HEADS, WIDTH, dtype=torch.float64)
    found = []
    for pool in (_Pool.apply, lambda x, q: (q[:, None] @ x.transpose(1, 2)).softmax(dim=-1) @ x):
        leaf = queries.clone().requires_grad_()
        pooled = pool(x, leaf)
        (pooled * wanted).sum().backward()
        found.append((pooled.detach(), leaf.grad))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


def test_a_shared_product_of_other_bits_is_noticed(monkeypatch):
    """Then each head has its own, and the result is the same."""
    trained = sweep_of()
    losses = train(trained)
    exact = attentive_sweep._pool_together
    monkeypatch.setattr(attentive_sweep, "_pool_together", lambda x, queries: exact(x, queries) * (1 + 2**-23))
    sweep = sweep_of()
    assert torch.equal(train(sweep), losses)
    assert not any(sweep._exact.values())


def test_nothing_random_is_drawn_from_others():
    """A training run that is evaluated goes on as if it had not been."""
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    train(sweep_of())
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.gpu
def test_a_sweep_is_its_heads_alone_on_a_gpu():
    session = Session(device=torch.device("cuda"))
    together, alone = sweep_of(device="cuda"), sweep_of(SETTINGS[2:3], device="cuda")
    for step, (x, labels) in enumerate(batches()):
        for sweep in (together, alone):
            sweep.step(x.to("cuda", copy=True), labels.to("cuda"), step, 8, session)
    for name, tensor in alone.tensors(0).items():
        assert torch.equal(together.tensors(2)[name], tensor)


def test_ranks_share_a_batch():
    """One rank, and three of which one has none of a batch; 11 images are not divisible. Adam's rounding as above."""
    alone, sweeps = sweep_of(), [sweep_of() for _ in range(3)]  # threads would seed one generator
    losses = train(alone)

    def on_rank(session: Session):
        sweep, parts = sweeps[session.rank], []
        for step, (x, labels) in enumerate(batches()):
            own = slice(0, 0) if session.rank == 2 and step == 3 else slice(session.rank, None, 3)
            if step == 3 and session.rank == 1:  # takes the third's as well
                own = [row for row in range(11) if row % 3]
            parts.append(sweep.step(x[own].contiguous(), labels[own], step, 8, session))
        return sweep, torch.stack(parts)

    ranks = Threads(3).run(on_rank)
    torch.testing.assert_close(sum(part for _, part in ranks), losses, rtol=1e-4, atol=1e-5)
    for number in range(len(SETTINGS)):
        for sweep, _ in ranks:
            torch.testing.assert_close(sweep.tensors(number), alone.tensors(number), rtol=1e-3, atol=2e-4)
            same = zip(sweep.tensors(number).values(), ranks[0][0].tensors(number).values(), strict=True)
            assert all(torch.equal(*tensors) for tensors in same)


def test_nothing_anywhere_changes_nothing():
    sweep = sweep_of()
    before = copy.deepcopy(sweep.state_dict()["heads"])
    assert not sweep.step(torch.zeros(0, 9, WIDTH), torch.zeros(0, dtype=torch.long), 0, 8, Session()).any()
    assert all(
        torch.equal(a[name], b[name]) for a, b in zip(before, sweep.state_dict()["heads"], strict=True) for name in a
    )
    assert sweep.scores(torch.zeros(0, 9, WIDTH)).shape == (len(SETTINGS), 0, CLASSES)


def test_a_rate_below_the_least_stays():
    sweep = sweep_of([{"lr": 1e-6, "weight_decay": 0.0}])
    train(sweep)
    assert sweep.optimizer.param_groups[0]["lr"] == pytest.approx(1e-6)
