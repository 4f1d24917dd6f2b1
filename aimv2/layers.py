"""The blocks that encoder, decoder and text tower are built from.

B samples, N positions, D width, H heads. All are pre-norm and without dropout, LayerScale or QK-norm.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aimv2.masks import causal_mask


def at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class SwiGlu(nn.Module):
    """down(silu(gate x) * up x), without biases (AIMv2)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.silu(self.gate(x))
        up = self.up(x)
        # Without a graph that needs silu(gate x), the product takes its place: 1 % of a forward on the CPU.
        return self.down(hidden * up if torch.is_grad_enabled() else hidden.mul_(up))


class GeluMlp(nn.Module):
    """fc2(gelu(fc1 x)), without biases (AIM v1)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


NORMS = {"rmsnorm": nn.RMSNorm, "layernorm": nn.LayerNorm}
MLPS = {"swiglu": SwiGlu, "gelu": GeluMlp}


class KeyValueCache:
    """Keys and values of the positions seen so far, one entry a layer, so that generation runs each position once."""

    def __init__(self):
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append (B, H, n, D/H) keys and values; return all of them so far."""
        if layer in self.layers:
            past_key, past_value = self.layers[layer]
            key, value = torch.cat([past_key, key], dim=2), torch.cat([past_value, value], dim=2)
        self.layers[layer] = key, value
        return key, value


def attention_in_products(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
    """softmax(q k^T / sqrt(D/H)) v as it is written; arguments and result as F.scaled_dot_product_attention's.

    For bf16 on the CPU, where torch's fused kernel multiplies no faster than in fp32: at 256 positions this takes half
    its time, at 36 its backward a tenth. The price: B x H x N x N scores are held, and rounded to bf16.
    """
    scores = q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)  # (B, H, N, N)
    if is_causal:
        attn_mask = causal_mask(q.shape[-2], q.device)
    if attn_mask is not None:
        scores = scores + torch.zeros_like(attn_mask, dtype=scores.dtype).masked_fill(~attn_mask, -torch.inf)
    return scores.softmax(dim=-1) @ v


class Attention(nn.Module):
    """Multi-head self-attention without biases; the mask is an argument."""

    def __init__(self, width: int, heads: int, layer: int = 0):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of the number of heads {heads}")
        self.heads = heads
        self.layer = layer
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, causal: bool = False, cache: KeyValueCache | None = None
    ) -> Tensor:
        b, n, d = x.shape
        q, k, v = (
            part.view(b, n, self.heads, d // self.heads).transpose(1, 2)  # (B, H, N, D/H)
            for part in self.qkv(x).chunk(3, dim=-1)  # not one permute of all three: its backward copies twice
        )
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        in_products = q.dtype == torch.bfloat16 and q.device.type == "cpu"
        attend = attention_in_products if in_products else F.scaled_dot_product_attention
        x = attend(q, k, v, attn_mask=mask, is_causal=causal)
        return self.proj(x.transpose(1, 2).reshape(b, n, d))


class Block(nn.Module):
    """x + attention(norm x), then x + mlp(norm x)."""

    def __init__(self, width: int, heads: int, mlp_hidden: int, mlp: str, norm: str, norm_eps: float, layer: int = 0):
        super().__init__()
        self.norm1 = NORMS[norm](width, eps=norm_eps)
        self.attention = Attention(width, heads, layer)
        self.norm2 = NORMS[norm](width, eps=norm_eps)
        self.mlp = MLPS[mlp](width, mlp_hidden)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, causal: bool = False, cache: KeyValueCache | None = None
    ) -> Tensor:
        x = x + self.attention(self.norm1(x), mask, causal, cache)
        return x + self.mlp(self.norm2(x))


class AttentionPool(nn.Module):
    """One learned query looks at all patches: (B, N, D) -> (B, D). The query has no projection, the output has a bias.

    The head of AIMv2's LiT image tower (Apple's inference code).
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of the number of heads {heads}")
        self.heads = heads
        self.query = nn.Parameter(torch.empty(1, 1, width))
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.proj = nn.Linear(width, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.query, std=0.02)
        for linear in (self.key, self.value, self.proj):
            nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """`mask`, boolean (B, N), is True where a patch is real, at least once a row; None is everywhere.

        Raises ValueError for a mask of another shape or type.
        """
        b, n, d = x.shape
        if mask is not None:
            if mask.shape != (b, n) or mask.dtype != torch.bool:
                raise ValueError(f"mask of {mask.dtype} {tuple(mask.shape)}: expected torch.bool {(b, n)}")
            mask = mask[:, None, None]  # (B, 1, 1, N)
        q, k, v = (
            part.view(b, -1, self.heads, d // self.heads).transpose(1, 2)  # (B, H, 1, D/H), twice (B, H, N, D/H)
            for part in (self.query.expand(b, 1, d), self.key(x), self.value(x))
        )
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(x.reshape(b, d))


def init_trunk(module: nn.Module) -> None:
    """Xavier-uniform for every Linear of a trunk, q, k and v each as a matrix of its own, as Apple's trainer does."""
    for child in module.modules():
        if isinstance(child, Attention):
            for projection in child.qkv.weight.chunk(3):
                nn.init.xavier_uniform_(projection)
            nn.init.xavier_uniform_(child.proj.weight)
        elif isinstance(child, (SwiGlu, GeluMlp)):
            for linear in child.children():
                nn.init.xavier_uniform_(linear.weight)
