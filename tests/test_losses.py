import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aimv2 import losses

PATCH, ROWS, COLUMNS = 2, 2, 3
N, VALUES = ROWS * COLUMNS, 3 * PATCH**2


def normalized_patch(image: np.ndarray, i: int) -> np.ndarray:
    """The values of patch i of a (3, H, W) image: row by row, channel fastest, its own mean and deviation removed."""
    row, column = PATCH * (i // COLUMNS), PATCH * (i % COLUMNS)
    values = np.array([image[c, row + y, column + x] for y in range(PATCH) for x in range(PATCH) for c in range(3)])
    return (values - values.mean()) / np.sqrt(values.var(ddof=1) + 1e-6)


@settings(deadline=None)
@given(prefix_length=st.lists(st.integers(1, N - 1), min_size=1, max_size=4), seed=st.integers(0, 1000))
def test_pixel_loss_against_loops(prefix_length, seed):
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(len(prefix_length), 3, ROWS * PATCH, COLUMNS * PATCH))
    pixels = rng.normal(size=(len(prefix_length), N, VALUES))
    expected = 0.0
    for b, s in enumerate(prefix_length):
        for i in range(s, N):  # patch i, predicted at position i-1
            expected += ((pixels[b, i - 1] - normalized_patch(image[b], i)) ** 2).mean()
    loss = losses.pixel(torch.from_numpy(pixels), torch.from_numpy(image), torch.tensor(prefix_length), PATCH)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@settings(deadline=None)
@given(patches=st.lists(st.integers(2, N), min_size=1, max_size=4), seed=st.integers(0, 1000))
def test_pixel_loss_of_padded_images_against_loops(patches, seed):
    """The padding is anything: here the rest of the image."""
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(len(patches), 3, ROWS * PATCH, COLUMNS * PATCH))
    pixels = rng.normal(size=(len(patches), N, VALUES))
    prefix_length = [int(rng.integers(1, n)) for n in patches]
    expected = 0.0
    for b, (s, n) in enumerate(zip(prefix_length, patches, strict=True)):
        for i in range(s, n):
            expected += ((pixels[b, i - 1] - normalized_patch(image[b], i)) ** 2).mean()
    tensors = torch.from_numpy(pixels), torch.from_numpy(image), torch.tensor(prefix_length)
    loss = losses.pixel(*tensors, PATCH, torch.tensor(patches))
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@settings(deadline=None)
@given(text_length=st.lists(st.integers(0, 5), min_size=1, max_size=4), seed=st.integers(0, 1000))
def test_caption_loss_against_loops(text_length, seed):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(len(text_length), 5, 7)) * 3
    text = rng.integers(0, 7, size=(len(text_length), 5))
    expected = 0.0
    for b, length in enumerate(text_length):
        for t in range(length):
            expected += np.log(np.exp(logits[b, t]).sum()) - logits[b, t, text[b, t]]
    loss = losses.caption(torch.from_numpy(logits), torch.from_numpy(text), torch.tensor(text_length))
    assert loss.item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_predicting_the_mean_costs_the_variance():
    """Predicting 0 costs the mean square of a normalised patch: (n-1)/n, the variance being unbiased."""
    image = torch.randn(2, 3, ROWS * PATCH, COLUMNS * PATCH, dtype=torch.float64)
    loss = losses.pixel(torch.zeros(2, N, VALUES), image, torch.tensor([1, N - 1]), PATCH)
    assert loss.item() == pytest.approx(N * (VALUES - 1) / VALUES, rel=1e-4)  # 1e-6 of the variance is eps


def test_gradient_reaches_only_the_positions_that_predict_supervised_patches():
    pixels = torch.randn(N - 1, N, VALUES, requires_grad=True)
    prefix_length = torch.arange(1, N)
    losses.pixel(pixels, torch.randn(N - 1, 3, ROWS * PATCH, COLUMNS * PATCH), prefix_length, PATCH).backward()
    supervised = pixels.grad.abs().sum(-1) > 0
    position = torch.arange(N)
    expected = (position >= prefix_length[:, None] - 1) & (position <= N - 2)  # S-1..N-2
    assert torch.equal(supervised, expected)


@pytest.mark.parametrize(("eos", "pad"), [(2, 0), (1, 1)], ids=["own-padding", "eos-is-padding"])
def test_eos_is_supervised_exactly_once_a_caption(eos, pad):
    text = torch.tensor([[5, 6, eos, pad, pad], [eos, pad, pad, pad, pad], [5, 4, 3, 6, eos], [pad] * 5])
    text_length = torch.tensor([3, 1, 5, 0])
    logits = torch.zeros(4, 5, 7, requires_grad=True)
    losses.caption(logits, text, text_length).backward()
    supervised = logits.grad.abs().sum(-1) > 0
    assert supervised.sum(1).tolist() == text_length.tolist()
    assert (supervised & (text == eos)).sum(1).tolist() == [1, 1, 1, 0]
    assert torch.equal(supervised, torch.arange(5) < text_length[:, None])
    # the target's probability pulls its logit up, by 1 - 1/7 here
    assert logits.grad[0, 2, eos].item() == pytest.approx(1 / 7 - 1)


def test_padding_ids_do_not_matter():
    logits, text = torch.randn(2, 5, 7), torch.tensor([[5, 6, 2, 0, 0], [2, 0, 0, 0, 0]])
    text_length = torch.tensor([3, 1])
    other = torch.where(text == 0, 6, text)
    assert torch.equal(losses.caption(logits, text, text_length), losses.caption(logits, other, text_length))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_sums_are_at_least_fp32(dtype):
    """A sum of thousands of terms of about 1 has no bits left in bf16."""
    logits = torch.zeros(4, 1000, 8, dtype=dtype)
    loss = losses.caption(logits, torch.zeros(4, 1000, dtype=torch.long), torch.full((4,), 1000))
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.item() == pytest.approx(4000 * math.log(8), rel=1e-5)
    image = torch.randn(4, 3, ROWS * PATCH, COLUMNS * PATCH, dtype=dtype)
    pixels = torch.zeros(4, N, VALUES, dtype=dtype)
    assert losses.pixel(pixels, image, torch.ones(4, dtype=torch.long), PATCH).dtype == loss.dtype


def test_contrastive_losses_of_own_pairs_among_all():
    """Pairs 1 and 3 of four, by the equations."""
    images, texts = (torch.nn.functional.normalize(torch.randn(4, 5, dtype=torch.float64), dim=1) for _ in range(2))
    own = torch.tensor([1, 3])
    score, bias = 7 * images @ texts.T, -0.5
    p_caption, p_image = score.softmax(dim=1), score.softmax(dim=0)
    expected = -sum(math.log(p_caption[i, i]) + math.log(p_image[i, i]) for i in (1, 3)) / 2
    assert losses.contrastive(score[own], score.T[own], own).item() == pytest.approx(expected, rel=1e-13)
    together = 1 / (1 + (-score - bias).exp())
    expected = -sum(math.log(together[i, j] if i == j else 1 - together[i, j]) for i in (1, 3) for j in range(4))
    assert losses.sigmoid_contrastive(score[own] + bias, own).item() == pytest.approx(expected, rel=1e-13)


def test_contrastive_losses_are_finite_in_bf16_and_zero_of_nothing():
    score, own, none = 100 * torch.eye(3, dtype=torch.bfloat16), torch.tensor([2, 0, 1]), torch.arange(0)
    # every image and caption prefers another by 100, more than bf16's probabilities can tell from 0
    assert losses.contrastive(score, score.T, own).item() == pytest.approx(3 * 100)
    assert losses.sigmoid_contrastive(score, own).item() == pytest.approx(3 * 100 + 6 * math.log(2))
    for candidates in (0, 3):
        empty = torch.zeros(0, candidates)
        assert losses.contrastive(empty, empty, none) == losses.sigmoid_contrastive(empty, none) == 0
