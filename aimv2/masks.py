"""Attention masks as boolean tensors, True where the query (row) may attend to the key (column)."""

import torch
from torch import Tensor


def causal_mask(n: int, device: torch.device | None = None) -> Tensor:
    """(n, n): each position sees itself and what comes before."""
    return torch.ones(n, n, dtype=torch.bool, device=device).tril()


def prefix_mask(prefix_length: Tensor, n: int) -> Tensor:
    """(B,) -> (B, 1, n, n): key k is open to query q if k <= q, or if k lies in the sample's prefix, k < S.

    AIM v1 section 3.2: attention is bidirectional within the prefix and causal after it.
    """
    key = torch.arange(n, device=prefix_length.device)
    in_prefix = key < prefix_length[:, None]  # (B, n)
    return (causal_mask(n, prefix_length.device) | in_prefix[:, None])[:, None]
