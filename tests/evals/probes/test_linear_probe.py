"""DINOv2's grid against its construction by hand, and its heads against torch's SGD."""

import pytest
import torch
import torch.nn.functional as F
from made_images import dataset
from made_probes import Threads, Told
from torch import nn

from aimv2.evals.encoders import open_encoder
from aimv2.evals.probes.linear_probe import LinearFeatures, LinearProbe, LinearSweep
from aimv2.evals.session import Session

IMAGES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
LRS = (0.01, 0.1, 1.0)


def test_the_published_grid():
    """DINOv2's eval/linear.py: thirteen rates, for a batch of 256; 12,500 iterations."""
    protocol = LinearProbe()
    assert protocol.lrs == (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
    assert protocol.steps == 12_500 and protocol.select_on == "held_out"


@pytest.mark.parametrize("depth", [1, 3, 4, 6])
def test_features_with_a_cls_token(depth):
    """`create_linear_input` of DINOv2: CLS tokens of the last blocks, normed, then the mean of the last's patches."""
    encoder = Told("random", depth=depth, cls=True)
    blocks = encoder.blocks(IMAGES, range(depth))[-4:]
    tokens = [encoder.norm(block.cls) for block in blocks]
    mean = encoder.norm(blocks[-1].patches).mean(dim=1)
    found, several = LinearFeatures()(encoder, IMAGES), f"last{min(depth, 4)}"
    expected = {
        "last1": tokens[-1],
        "last1_patches": torch.cat([tokens[-1], mean], dim=1),
        several: torch.cat(tokens, dim=1),
        f"{several}_patches": torch.cat([*tokens, mean], dim=1),
    }
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("depth", [1, 6])
def test_features_without_a_cls_token(depth):
    """Means of the patches; what coincides is there once."""
    encoder = Told("random", depth=depth)
    means = [encoder.norm(block.patches).mean(dim=1) for block in encoder.blocks(IMAGES, range(depth))[-4:]]
    expected = {"last1": means[-1]} | ({"last4": torch.cat(means, dim=1)} if depth > 1 else {})
    torch.testing.assert_close(LinearFeatures()(encoder, IMAGES), expected)


def test_other_layers():
    encoder = Told("random", depth=3)
    found = LinearFeatures("grid, pooled, 0-1")(encoder, IMAGES)
    assert list(found) == ["last1", "last3", "pooled", "blocks_00-01"]
    raw = encoder.blocks(IMAGES, [0, 1])
    torch.testing.assert_close(found["blocks_00-01"], (raw[0].patches + raw[1].patches).mean(dim=1) / 2)
    encoder.layers = (1,)  # as `@1` in a spec
    torch.testing.assert_close(LinearFeatures()(encoder, IMAGES), {"output": raw[1].patches.mean(dim=1)})
    pixels = LinearFeatures()(open_encoder("pixels:8"), IMAGES)
    torch.testing.assert_close(pixels, {"pooled": IMAGES.flatten(1)})


def batches(count: int = 12, size: int = 7):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        yield torch.randn(size, 10, generator=generator), torch.randint(4, (size,), generator=generator)


def sweep_of(lrs=LRS, scale=0.5) -> LinearSweep:
    return LinearSweep(lrs, scale=scale, width=10, classes=4, seed=0, device=torch.device("cpu"))


def train(sweep: LinearSweep, session: Session) -> torch.Tensor:
    return torch.stack([sweep.step(x, labels, i, 12, session) for i, (x, labels) in enumerate(batches())])


@pytest.mark.parametrize("number", range(len(LRS)))
def test_each_head_is_a_linear_trained_by_torch(number):
    """SGD with momentum and a cosine to 0. 1e-5: fp32 rounding over 12 steps."""
    sweep = sweep_of()
    linear = nn.Linear(10, 4)
    linear.load_state_dict({name: tensor.clone() for name, tensor in sweep.tensors(number).items()})
    assert not linear.bias.any() and linear.weight.std().item() == pytest.approx(0.01, rel=0.5)
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.5 * LRS[number], momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
    losses = train(sweep, Session())[:, number]
    for (x, labels), found in zip(batches(), losses, strict=True):
        loss = F.cross_entropy(linear(x), labels)
        torch.testing.assert_close(found, loss.detach(), rtol=1e-5, atol=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    torch.testing.assert_close(sweep.tensors(number), dict(linear.state_dict()), rtol=1e-5, atol=1e-5)
    x, _ = next(batches())
    torch.testing.assert_close(sweep.scores(x)[number], linear(x).detach(), rtol=1e-5, atol=1e-5)


def test_ranks_share_a_batch():
    """Seven images by three ranks. 1e-5: as above."""
    alone = sweep_of()
    losses = train(alone, Session())

    def on_rank(session: Session):
        sweep, own = sweep_of(), slice(session.rank, None, 3)
        parts = [sweep.step(x[own], labels[own], i, 12, session) for i, (x, labels) in enumerate(batches())]
        return sweep.state_dict(), torch.stack(parts)

    ranks = Threads(3).run(on_rank)
    torch.testing.assert_close(sum(part for _, part in ranks), losses, rtol=1e-5, atol=1e-5)
    for state, _ in ranks:
        torch.testing.assert_close(state, alone.state_dict(), rtol=1e-5, atol=1e-5)


def test_a_head_that_diverges_is_not_chosen():
    """Its loss is no JSON number, its predictions are wrong, and the others are not touched."""
    protocol = LinearProbe(lrs=(1e39, 0.1), steps=40, batch_size=32)
    outcome = protocol.run(Told("oracle"), dataset(60, 30, classes=3), Session(quiet=True))
    broken, fine = outcome.details["sweep"][:2]
    assert broken["loss"][-1] is None and broken["top1"] == broken["held_out"] == 0.0
    assert outcome.metrics["top1"].value == fine["top1"] == 1.0
    alone = LinearProbe(lrs=(0.1,), steps=40, batch_size=32)
    expected = alone.run(Told("oracle"), dataset(60, 30, classes=3), Session(quiet=True)).details["sweep"][0]
    assert fine["loss"] == pytest.approx(expected["loss"], rel=1e-4)


def test_rates_scale_with_the_batch():
    """As in DINOv2, with the batch that there is."""
    rates = []
    original = LinearSweep.__init__

    def spied(self, lrs, *, scale, **others):
        rates.append(scale)
        original(self, lrs, scale=scale, **others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LinearSweep, "__init__", spied)
        for batch_size in (18, 1024):
            LinearProbe(batch_size=batch_size, steps=1).run(Told("random"), dataset(40, 8), Session(quiet=True))
    assert set(rates) == {18 / 256, 36 / 256}  # 4 of 40 are held out
