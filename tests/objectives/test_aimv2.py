"""The objective against its equations, and what must hold for any split of a batch.

B samples, N patches, T text positions, S prefix length, P patch side, V vocabulary.
"""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from aimv2.data.batch import Batch, Counts, count_targets
from aimv2.decoder import DecoderConfig
from aimv2.encoder import VisionConfig
from aimv2.masks import prefix_mask
from aimv2.objectives.aimv2 import AIMv2, AIMv2Config

P, GRID, CONTEXT, EOS = 2, 3, 6, 1  # as with SigLIP's tokenizer, EOS is padding too
N = GRID**2
VISION = VisionConfig(width=16, depth=2, heads=2, mlp_hidden=24, image_size=P * GRID, patch_size=P)
DECODER = DecoderConfig(width=12, depth=2, heads=3, mlp_hidden=20, vocab_size=11, context_length=CONTEXT)
CONFIG = AIMv2Config(vision=VISION, decoder=DECODER)
TEXT_LENGTH = [0, 6, 3, 1, 4]
PREFIX_LENGTH = [1, N - 1, 4, 5, 2]


def random_model(config: AIMv2Config = CONFIG, dtype: torch.dtype = torch.float64) -> AIMv2:
    """All parameters random, norms and biases too: at their initial values some errors would not be seen."""
    torch.manual_seed(0)
    model = config.build().to(dtype)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
        elif parameter.ndim < 2 or "positions" in name or "tokens" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def random_batch(
    text_length=TEXT_LENGTH, prefix_length=PREFIX_LENGTH, dtype: torch.dtype = torch.float64, seed: int = 0
) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    samples, length = len(text_length), max(1, *text_length)
    text = torch.randint(2, DECODER.vocab_size, (samples, length), generator=generator)
    for row, n in zip(text, text_length, strict=True):
        row[max(n - 1, 0) :] = EOS
    return Batch(
        image=torch.randn(samples, 3, GRID * P, GRID * P, generator=generator, dtype=torch.float64).to(dtype),
        text=text,
        text_length=torch.tensor(text_length),
        prefix_length=torch.tensor(prefix_length),
        sample=torch.arange(samples),
        num_patches=N,
    )


def counts_of(*batches: Batch) -> Counts:
    patches, tokens = count_targets(batches).clamp(min=1)
    return Counts(patches=patches, tokens=tokens)


def gradients(model: AIMv2) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters()]


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
    outputs_loss = model(batch, counts_of(batch))["loss"]
    (gradient,) = torch.autograd.grad(outputs_loss, outputs)
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
    patches, tokens = sum(count_targets(rank) for rank in ranks).clamp(min=1)
    counts = Counts(patches=patches, tokens=tokens)
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
    counts = Counts(patches=counts.patches.to(device), tokens=counts.tokens.to(device))
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
    counts = Counts(patches=counts.patches.cuda(), tokens=counts.tokens.cuda())
    torch._dynamo.reset()
    loss = torch.compile(model, fullgraph=True)(batch, counts)["loss"]
    loss.backward()
    gradient = as_vector(gradients(model))
    assert loss.item() == pytest.approx(expected[0], rel=1e-5)
    assert (gradient - expected[1]).norm() / expected[1].norm() < 1e-4
