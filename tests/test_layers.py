import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aimv2.layers import Attention, AttentionPool, Block, GeluMlp, KeyValueCache, SwiGlu
from aimv2.masks import prefix_mask

WIDTH, HEADS = 12, 3


def slow_attention(x: np.ndarray, qkv: np.ndarray, proj: np.ndarray, heads: int, may_attend) -> np.ndarray:
    """One query at a time, over the list of keys it may attend to. x (n, D), qkv (3D, D), proj (D, D)."""
    n, d = x.shape
    q, k, v = (x @ w.T for w in np.split(qkv, 3))
    out = np.zeros((n, d))
    for h in range(heads):
        part = slice(h * d // heads, (h + 1) * d // heads)
        for i in range(n):
            keys = [j for j in range(n) if may_attend(i, j)]
            scores = np.array([q[i, part] @ k[j, part] / math.sqrt(d // heads) for j in keys])
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            out[i, part] = sum(weight * v[j, part] for weight, j in zip(weights, keys, strict=True))
    return out @ proj.T


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 7), data=st.data())
def test_attention_under_a_prefix_mask_against_one_query_at_a_time(n, data):
    prefix_length = data.draw(st.lists(st.integers(0, n), min_size=1, max_size=3))
    torch.manual_seed(n)
    attention = Attention(WIDTH, HEADS).double()
    x = torch.randn(len(prefix_length), n, WIDTH, dtype=torch.float64)
    out = attention(x, prefix_mask(torch.tensor(prefix_length), n)).detach().numpy()
    weights = attention.qkv.weight.detach().numpy(), attention.proj.weight.detach().numpy()
    for b, s in enumerate(prefix_length):
        expected = slow_attention(x[b].numpy(), *weights, HEADS, lambda q, k, s=s: k <= q or k < s)
        np.testing.assert_allclose(out[b], expected, rtol=0, atol=1e-12)


def test_attention_without_a_mask_sees_all_and_causal_sees_the_past():
    attention = Attention(WIDTH, HEADS).double()
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    for out, prefix in ((attention(x), 5), (attention(x, causal=True), 0)):
        expected = attention(x, prefix_mask(torch.tensor([prefix, prefix]), 5))
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


def test_mlps_against_their_formulas():
    x = np.random.default_rng(0).normal(size=(5, WIDTH))
    for mlp in (SwiGlu(WIDTH, 20).double(), GeluMlp(WIDTH, 20).double()):
        weight = {name: p.detach().numpy().T for name, p in mlp.named_parameters()}
        if isinstance(mlp, SwiGlu):
            gate = x @ weight["gate.weight"]
            expected = (gate / (1 + np.exp(-gate)) * (x @ weight["up.weight"])) @ weight["down.weight"]
        else:
            hidden = x @ weight["fc1.weight"]
            hidden = hidden * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2))) / 2
            expected = hidden @ weight["fc2.weight"]
        np.testing.assert_allclose(mlp(torch.from_numpy(x)).detach().numpy(), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("norm", "mlp"), [("rmsnorm", "swiglu"), ("layernorm", "gelu")])
def test_block_is_pre_norm_with_two_residuals(norm, mlp):
    block = Block(WIDTH, HEADS, 20, mlp, norm, 1e-5).double()
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    middle = x + block.attention(block.norm1(x))
    assert torch.equal(block(x), middle + block.mlp(block.norm2(middle)))
    assert not any(name.endswith("bias") for name, _ in block.named_parameters() if not name.startswith("norm"))


@given(cut=st.integers(1, 6))
@settings(deadline=None)
def test_a_cache_filled_in_steps_equals_one_causal_pass(cut):
    block = Block(WIDTH, HEADS, 20, "swiglu", "rmsnorm", 1e-5).double()
    x = torch.randn(2, 7, WIDTH, dtype=torch.float64)
    cache = KeyValueCache()
    parts = [block(x[:, :cut], causal=True, cache=cache)]
    parts += [block(x[:, i : i + 1], cache=cache) for i in range(cut, 7)]
    torch.testing.assert_close(torch.cat(parts, dim=1), block(x, causal=True), rtol=0, atol=1e-12)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match=r"12 .* 5"):
        Attention(12, 5)


# --- attention pooling


def slow_pool(x: np.ndarray, weight: dict[str, np.ndarray], heads: int) -> np.ndarray:
    """One head at a time, over the real patches alone. x (n, D) -> (D,)."""
    d = x.shape[1]
    query, keys, values = weight["query"].reshape(d), x @ weight["key.weight"].T, x @ weight["value.weight"].T
    pooled = np.zeros(d)
    for h in range(heads):
        part = slice(h * d // heads, (h + 1) * d // heads)
        scores = np.array([query[part] @ key[part] / math.sqrt(d // heads) for key in keys])
        weights = np.exp(scores - scores.max())
        pooled[part] = sum(w * value[part] for w, value in zip(weights / weights.sum(), values, strict=True))
    return weight["proj.weight"] @ pooled + weight["proj.bias"]


def random_pool(seed: int) -> AttentionPool:
    """In float64, with a query and a bias large enough to be seen."""
    torch.manual_seed(seed)
    pool = AttentionPool(WIDTH, HEADS).double()
    for parameter in (pool.query, pool.proj.bias):
        torch.nn.init.normal_(parameter)
    return pool


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 7), data=st.data())
@torch.no_grad()
def test_attention_pool_against_one_head_at_a_time(n, data):
    real = data.draw(st.lists(st.lists(st.booleans(), min_size=n, max_size=n).filter(any), min_size=1, max_size=3))
    pool = random_pool(n)
    x = torch.randn(len(real), n, WIDTH, dtype=torch.float64)
    mask = torch.tensor(real)
    weight = {name: p.numpy() for name, p in pool.named_parameters()}
    everywhere, masked = pool(x), pool(x, mask)
    assert torch.equal(masked, pool(x.masked_fill(~mask[..., None], 1e3), mask))  # not a bit of what is no patch
    for b in range(len(x)):
        np.testing.assert_allclose(everywhere[b], slow_pool(x[b].numpy(), weight, HEADS), rtol=0, atol=1e-12)
        np.testing.assert_allclose(masked[b], slow_pool(x[b, mask[b]].numpy(), weight, HEADS), rtol=0, atol=1e-12)


def test_attention_pool_has_the_published_parameters():
    shapes = {name: tuple(p.shape) for name, p in AttentionPool(WIDTH, HEADS).named_parameters()}
    square = (WIDTH, WIDTH)
    assert shapes == {
        "query": (1, 1, WIDTH),
        "key.weight": square,
        "value.weight": square,
        "proj.weight": square,
        "proj.bias": (WIDTH,),
    }
    query = AttentionPool(4096, 1).query
    assert query.std().item() == pytest.approx(0.02, rel=4 / math.sqrt(2 * 4096))  # 4 deviations of a deviation


def test_attention_pool_refuses_other_masks_and_heads():
    pool, x = AttentionPool(WIDTH, HEADS), torch.zeros(2, 5, WIDTH)
    with pytest.raises(ValueError, match=r"float32 \(2, 5\): expected torch.bool \(2, 5\)"):
        pool(x, torch.ones(2, 5))  # SDPA would add it to the scores
    with pytest.raises(ValueError, match=r"bool \(2, 1, 5, 5\): expected"):
        pool(x, torch.ones(2, 1, 5, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"12 .* 5"):
        AttentionPool(12, 5)
