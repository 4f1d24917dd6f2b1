"""The objective against its equations, and what must hold for any split of a batch.

B samples, N patches, T text positions, S prefix length, P patch side, V vocabulary.
"""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_aimv2 import (
    CONFIG,
    CONTEXT,
    DECODER,
    EOS,
    GRID,
    PREFIX_LENGTH,
    TEXT_LENGTH,
    VISION,
    N,
    P,
    counts_of,
    gradients,
    random_batch,
    random_model,
)
from torch import Tensor

from aimv2.data.batch import Batch, Counts, count_targets
from aimv2.masks import prefix_mask
from aimv2.objectives.aimv2 import AIMv2

# --- the equations, in float64, one sample, one patch, one token at a time


class Reference:
    """AIMv2's forward pass and loss with loops, from the papers' equations. Nothing of the package is used."""

    def __init__(self, model: AIMv2):
        self.weight = {name: value.numpy() for name, value in model.state_dict().items()}

    def rms_norm(self, x, name):
        return np.array([row / math.sqrt((row**2).mean() + 1e-5) for row in x]) * self.weight[f"{name}.weight"]

    def attention(self, x, name, heads, may_attend):
        n, d = x.shape
        q, k, v = np.split(x @ self.weight[f"{name}.qkv.weight"].T, 3, axis=1)
        out = np.zeros((n, d))
        for h in range(heads):
            part = slice(h * d // heads, (h + 1) * d // heads)
            for i in range(n):
                keys = [j for j in range(n) if may_attend(i, j)]
                weights = np.exp([q[i, part] @ k[j, part] / math.sqrt(d // heads) for j in keys])
                out[i, part] = weights / weights.sum() @ v[keys, part]
        return out @ self.weight[f"{name}.proj.weight"].T

    def swiglu(self, x, name):
        gate, up, down = (self.weight[f"{name}.{part}.weight"].T for part in ("gate", "up", "down"))
        gated = x @ gate
        return (gated / (1 + np.exp(-gated)) * (x @ up)) @ down

    def trunk(self, x, name, depth, heads, may_attend):
        for i in range(depth):
            block = f"{name}.blocks.{i}"
            x = x + self.attention(self.rms_norm(x, f"{block}.norm1"), f"{block}.attention", heads, may_attend)
            x = x + self.swiglu(self.rms_norm(x, f"{block}.norm2"), f"{block}.mlp")
        return self.rms_norm(x, f"{name}.norm")

    def patch(self, image, i):
        """Patch i in raster order, (3, P, P)."""
        row, column = P * (i // GRID), P * (i % GRID)
        return image[:, row : row + P, column : column + P]

    def encode(self, image, s):
        kernel, bias = self.weight["encoder.patch_embed.weight"], self.weight["encoder.patch_embed.bias"]
        x = np.array([(kernel * self.patch(image, i)).sum((1, 2, 3)) + bias for i in range(N)])
        x = self.rms_norm(x, "encoder.patch_norm") + self.weight["encoder.positions.weight"][0]
        return self.trunk(x, "encoder", VISION.depth, VISION.heads, lambda q, k: k <= q or k < s)

    def decode(self, features, tokens):
        """The decoder's output for [image ; BOS ; tokens]."""
        image = features @ self.weight["decoder.projection.weight"].T + self.weight["decoder.projection.bias"]
        text = [self.weight["decoder.bos"], *self.weight["decoder.tokens.weight"][tokens]]
        text = np.array(text) + self.weight["decoder.text_positions"][: len(text)]
        return self.trunk(np.concatenate([image, text]), "decoder", DECODER.depth, DECODER.heads, lambda q, k: k <= q)

    def loss(self, batch: Batch, alpha: float) -> tuple[float, float, float]:
        pixel_sum = caption_sum = 0.0
        pixel_targets = caption_targets = 0
        for b in range(len(batch)):
            image, s = batch.image[b].numpy(), batch.prefix_length[b].item()
            caption = batch.text[b, : batch.text_length[b]].tolist()
            y = self.decode(self.encode(image, s), caption)
            for i in range(s, N):
                target = np.transpose(self.patch(image, i), (1, 2, 0)).reshape(-1)
                target = (target - target.mean()) / math.sqrt(target.var(ddof=1) + 1e-6)
                prediction = self.weight["decoder.pixel_head.weight"] @ y[i - 1]
                pixel_sum += ((prediction - target) ** 2).mean()
                pixel_targets += 1
            for t, token in enumerate(caption):
                logits = self.weight["decoder.text_head.weight"] @ y[N + t]
                caption_sum -= logits[token] - math.log(np.exp(logits).sum())
                caption_targets += 1
        pixel, caption = pixel_sum / pixel_targets, caption_sum / max(caption_targets, 1)
        return caption + alpha * pixel, pixel, caption


@pytest.mark.parametrize("alpha", [0.4, 0.0, 2.5])
@torch.no_grad()
def test_loss_equals_the_equations(alpha):
    model = random_model(replace(CONFIG, pixel_weight=alpha))
    batch = random_batch()
    losses = model(batch, counts_of(batch))
    expected = Reference(model).loss(batch, alpha)
    # float64 on both sides: some hundred roundings of 1e-16
    for name, value in zip(("loss", "pixel_loss", "caption_loss"), expected, strict=True):
        assert losses[name].item() == pytest.approx(value, rel=1e-10)


def test_counts_are_the_numbers_of_targets():
    batch = random_batch()
    counts = counts_of(batch)
    assert counts.patches == sum(len(range(s, N)) for s in PREFIX_LENGTH)
    assert counts.tokens == sum(TEXT_LENGTH)


# --- no prediction sees its target, or anything after it


def pixel_jacobian(model: AIMv2, image: Tensor, prefix_length: list[int]) -> Tensor:
    """(S, predicted patch i = 1..N-1, patch): largest |d prediction of patch i / d pixels of the patch|, each S."""
    image = image.expand(len(prefix_length), -1, -1, -1).clone().requires_grad_()
    text = torch.zeros(len(prefix_length), 1, dtype=torch.long)
    features = model.encoder(image, prefix_mask(torch.tensor(prefix_length), N))
    pixels, _ = model.decoder(features, text)
    jacobian = torch.zeros(len(prefix_length), N, N, dtype=torch.float64)
    for i in range(1, N):
        for value in range(3 * P**2):
            # samples do not mix, so the gradient of a sum over samples holds each sample's own
            (gradient,) = torch.autograd.grad(pixels[:, i - 1, value].sum(), image, retain_graph=True)
            by_patch = gradient.reshape(-1, 3, GRID, P, GRID, P).abs().amax((1, 3, 5)).flatten(1)
            jacobian[:, i] = torch.maximum(jacobian[:, i], by_patch)
    return jacobian


def test_no_supervised_patch_is_predicted_from_itself_or_its_future():
    prefix_lengths = list(range(1, N))
    jacobian = pixel_jacobian(random_model(), random_batch([0], [1]).image, prefix_lengths)
    for s, of_sample in zip(prefix_lengths, jacobian, strict=True):
        for i in range(1, N):
            if i >= s:
                assert (of_sample[i, i:] == 0).all(), f"prefix {s}: patch {i} is predicted from what it must predict"
                assert (of_sample[i, :i] > 1e-6).all(), f"prefix {s}: patch {i} does not see all of its past"
            else:  # why these carry no loss: attention within the prefix goes both ways
                assert (of_sample[i, i:s] > 1e-6).all() and (of_sample[i, s:] == 0).all()


def test_no_token_is_predicted_from_itself_or_its_future():
    model, batch = random_model(), random_batch([CONTEXT, CONTEXT], [1, 5])
    embedded = []
    model.decoder.tokens.register_forward_hook(lambda _module, _input, out: embedded.append(out))
    image = batch.image.requires_grad_()
    features = model.encoder(image, prefix_mask(batch.prefix_length, N))
    pixels, logits = model.decoder(features, batch.text)
    (embedded,) = embedded  # (B, T-1, W): the last token is only a target
    assert embedded.shape[1] == CONTEXT - 1
    for t in range(CONTEXT):
        seen = torch.zeros(CONTEXT - 1, dtype=torch.float64)
        for value in range(DECODER.vocab_size):
            gradient, of_image = torch.autograd.grad(logits[:, t, value].sum(), [embedded, image], retain_graph=True)
            seen = torch.maximum(seen, gradient.abs().amax((0, 2)))
            assert (of_image != 0).all()
        assert (seen[t:] == 0).all() and (seen[:t] > 1e-6).all()
    (gradient,) = torch.autograd.grad(pixels.sum(), embedded)
    assert (gradient == 0).all()  # the image comes before the text


def test_the_last_position_of_the_image_carries_no_pixel_loss():
    model, batch = random_model(), random_batch()
    outputs = []
    model.decoder.pixel_head.register_forward_hook(lambda _module, _input, out: outputs.append(out))
    loss = model(batch, counts_of(batch))["loss"]
    (gradient,) = torch.autograd.grad(loss, outputs)
    supervised = gradient.abs().sum(-1) > 0
    assert supervised.tolist() == [[s - 1 <= i <= N - 2 for i in range(N)] for s in PREFIX_LENGTH]


def test_eos_is_supervised_exactly_once_a_caption():
    model, batch = random_model(), random_batch()
    outputs = []
    model.decoder.text_head.register_forward_hook(lambda _module, _input, out: outputs.append(out))
    (gradient,) = torch.autograd.grad(model(batch, counts_of(batch))["loss"], outputs)
    supervised = gradient.abs().sum(-1) > 0
    assert supervised.sum(1).tolist() == TEXT_LENGTH
    assert (supervised & (batch.text == EOS)).sum(1).tolist() == [min(n, 1) for n in TEXT_LENGTH]


# --- any split of a batch gives the gradient of the whole


def part_of(batch: Batch, rows: slice) -> Batch:
    """Some samples of a batch, padded to the longest caption among them."""
    length = max(1, int(batch.text_length[rows].max()))
    return replace(
        batch,
        image=batch.image[rows],
        text=batch.text[rows, :length],
        text_length=batch.text_length[rows],
        prefix_length=batch.prefix_length[rows],
        sample=batch.sample[rows],
    )


def relative_difference(a: list[Tensor], b: list[Tensor]) -> float:
    a, b = (torch.cat([x.flatten() for x in xs]) for xs in (a, b))
    return ((a - b).norm() / b.norm()).item()


SPLITS = [[1, 1, 1, 1, 1], [2, 3], [4, 1], [1, 3, 1]]  # [1, ...] has a micro-batch of an empty caption alone


@pytest.mark.parametrize("sizes", SPLITS)
def test_accumulation_equals_the_full_batch(sizes):
    model, batch = random_model(), random_batch()
    whole = model(batch, counts_of(batch))
    whole["loss"].backward()
    expected = gradients(model)
    ends = np.cumsum(sizes).tolist()
    parts = [part_of(batch, slice(end - size, end)) for size, end in zip(sizes, ends, strict=True)]
    counts = counts_of(*parts)
    model.zero_grad()
    losses = [model(part, counts) for part in parts]
    for part_losses in losses:
        part_losses["loss"].backward()
    assert relative_difference(gradients(model), expected) < 1e-12
    for name, value in whole.items():
        assert sum(part_losses[name] for part_losses in losses).item() == pytest.approx(value.item(), rel=1e-12)
    # and this test would see a mean of the parts' means
    model.zero_grad()
    for part in parts:
        (model(part, counts_of(part))["loss"] / len(parts)).backward()
    assert relative_difference(gradients(model), expected) > 1e-2


def test_ranks_with_accumulation_equal_the_full_batch():
    model, batch = random_model(), random_batch()
    model(batch, counts_of(batch))["loss"].backward()
    expected = gradients(model)
    ranks = [[part_of(batch, slice(0, 1)), part_of(batch, slice(1, 3))], [part_of(batch, slice(3, 5))]]
    # what an all-reduce does: local targets are summed, then clamped
    counts = Counts.of(sum(count_targets(rank) for rank in ranks))
    total = [torch.zeros_like(g) for g in expected]
    for rank in ranks:
        replica = copy.deepcopy(model)
        replica.zero_grad()
        for part in rank:
            replica(part, counts)["loss"].backward()
        total = [a + b for a, b in zip(total, gradients(replica), strict=True)]
    assert relative_difference(total, expected) < 1e-12


# --- edges


@pytest.mark.parametrize(
    ("text_length", "prefix_length"),
    [([0, 0], [1, 4]), ([0], [N - 1]), ([6], [1]), ([1], [N - 1]), ([6, 6], [1, 1]), ([1, 1], [N - 1, N - 1])],
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_edges_are_finite(text_length, prefix_length, training):
    model, batch = random_model(dtype=torch.float32), random_batch(text_length, prefix_length, torch.float32)
    losses = model.train(training)(batch, counts_of(batch))
    losses["loss"].backward()
    assert all(value.isfinite() for value in losses.values())
    assert losses["pixel_loss"] > 0 and (losses["caption_loss"] > 0) == (sum(text_length) > 0)
    # every parameter has a gradient, even with no caption: ranks reduce the same tensors
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_constant_image_is_finite():
    model, batch = random_model(dtype=torch.float32), random_batch(dtype=torch.float32)
    batch = replace(batch, image=torch.full_like(batch.image, 2.2489))  # white, as normalised
    losses = model(batch, counts_of(batch))
    losses["loss"].backward()
    assert losses["loss"].isfinite() and all(g.isfinite().all() for g in gradients(model))


@torch.no_grad()
def test_validation_pass_equals_training_pass():
    model, batch = random_model(), random_batch()
    assert model.eval()(batch, counts_of(batch)) == model.train()(batch, counts_of(batch))


def test_reported_losses_hold_no_graph():
    losses = random_model()(batch := random_batch(), counts_of(batch))
    assert losses["loss"].requires_grad
    assert not losses["pixel_loss"].requires_grad and not losses["caption_loss"].requires_grad
