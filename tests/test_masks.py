import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aimv2.masks import causal_mask, prefix_mask


@settings(deadline=None)
@given(n=st.integers(1, 12), data=st.data())
def test_prefix_mask_opens_the_past_and_the_prefix(n, data):
    prefix_length = data.draw(st.lists(st.integers(0, n), min_size=1, max_size=4))
    mask = prefix_mask(torch.tensor(prefix_length), n)
    assert mask.shape == (len(prefix_length), 1, n, n) and mask.dtype == torch.bool
    for b, s in enumerate(prefix_length):
        for q in range(n):
            for k in range(n):
                assert mask[b, 0, q, k] == (k <= q or k < s)


@settings(deadline=None)
@given(n=st.integers(1, 12))
def test_causal_mask_opens_the_past(n):
    assert causal_mask(n).tolist() == [[k <= q for k in range(n)] for q in range(n)]
