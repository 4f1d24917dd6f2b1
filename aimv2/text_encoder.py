"""The causal text tower of AIMv2's LiT model: a caption -> one feature, taken where the caption ends.

B captions, T token positions, D width.
Source: Apple's inference code; initialisation from Apple's training code.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from aimv2.layers import NORMS, Block, init_trunk


@dataclass(slots=True, kw_only=True)
class TextConfig:
    """The published text tower; its tokens are CLIP's byte pairs."""

    width: int = 768
    depth: int = 12
    heads: int = 6
    mlp_hidden: int = 2048
    vocab_size: int = 49408
    context_length: int = 77  # tokens, EOS included
    eos: int = 49407
    norm_eps: float = 1e-5
    checkpointing: bool = False

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if not 0 <= self.eos < self.vocab_size:
            raise ValueError(f"eos {self.eos}: expected an id of the vocabulary, 0 to {self.vocab_size - 1}")


class TextEncoder(nn.Module):
    """Token ids -> the feature of the first EOS. It sees nothing that follows, so padding needs no mask, of any id.

    Alone or padded, a caption has the same feature to the bit. In a batch of longer ones other kernels may do the
    sums: up to 2e-7 in a unit vector of fp32.
    """

    def __init__(self, config: TextConfig):
        super().__init__()
        c = self.config = config
        self.tokens = nn.Embedding(c.vocab_size, c.width)
        self.positions = nn.Parameter(torch.empty(c.context_length, c.width))
        self.blocks = nn.ModuleList(
            Block(c.width, c.heads, c.mlp_hidden, "swiglu", "rmsnorm", c.norm_eps, layer) for layer in range(c.depth)
        )
        self.norm = NORMS["rmsnorm"](c.width, eps=c.norm_eps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.01)
        init_trunk(self.blocks)

    def forward(self, text: Tensor) -> Tensor:
        """Token ids (B, T) -> (B, D) after the final norm, at each row's first EOS.

        Raises ValueError for an empty batch, a text longer than the context, an id that is not in the vocabulary and
        a row without EOS. The last two are read from the device, and go unseen in a compiled or exported graph.
        """
        if text.dim() != 2 or text.numel() == 0:
            raise ValueError(f"text of shape {tuple(text.shape)}: expected captions x tokens, at least one of each")
        if text.shape[1] > self.config.context_length:
            raise ValueError(f"text of {text.shape[1]} tokens, but the context holds {self.config.context_length}")
        is_eos = text == self.config.eos
        end = is_eos.int().argmax(dim=1)  # (B,), of equals the first
        if not torch.compiler.is_compiling():
            self._check(text, is_eos)
            text = text[:, : end.max() + 1]  # what is padding in every row would only cost time
        x = self.tokens(text) + self.positions[: text.shape[1]]  # (B, T, D)
        for block in self.blocks:
            if self.config.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, None, True, use_reentrant=False)
            else:
                x = block(x, causal=True)
        return self.norm(x[torch.arange(x.shape[0], device=x.device), end])  # (B, D)

    def _check(self, text: Tensor, is_eos: Tensor) -> None:
        unknown = (text < 0) | (text >= self.config.vocab_size)
        endless = ~is_eos.any(dim=1)
        if not (unknown.any() | endless.any()):  # one answer, as a GPU is waited for
            return
        if unknown.any():
            row, position = unknown.nonzero()[0].tolist()
            raise ValueError(
                f"row {row} of the text has token id {text[row, position]} at position {position}: "
                f"expected 0 to {self.config.vocab_size - 1}"
            )
        raise ValueError(
            f"row {endless.nonzero()[0].item()} of the text has no EOS: end it with token id {self.config.eos}"
        )
