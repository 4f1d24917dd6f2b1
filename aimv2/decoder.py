"""The causal multimodal decoder of AIMv2: it predicts the next patch, then the next caption token.

B samples, N patches, T text positions, D vision width, V vocabulary, P patch side.
Source: AIMv2 (arXiv 2411.14402) section 2.1-2.2; initialisation from Apple's training code.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from aimv2.layers import NORMS, Block, KeyValueCache, init_trunk

TRUNCATED_STD = 0.87962566103423978  # deviation of a standard normal cut off at -2 and 2


@dataclass(slots=True, kw_only=True)
class DecoderConfig:
    """The published decoder: the same one for every encoder size."""

    width: int = 1024
    depth: int = 12
    heads: int = 8
    mlp_hidden: int = 2816
    vocab_size: int = 32000
    context_length: int = 77  # caption tokens, EOS included
    norm_eps: float = 1e-5
    checkpointing: bool = False


class MultimodalDecoder(nn.Module):
    """Sequence [patch features ; BOS ; caption]. Position i of the image predicts patch i+1, BOS predicts token 0."""

    def __init__(self, config: DecoderConfig, vision_width: int, patch_size: int):
        super().__init__()
        c = self.config = config
        self.projection = nn.Linear(vision_width, c.width)
        self.tokens = nn.Embedding(c.vocab_size, c.width)
        self.bos = nn.Parameter(torch.empty(c.width))
        self.text_positions = nn.Parameter(torch.empty(c.context_length + 1, c.width))  # BOS and the caption
        self.blocks = nn.ModuleList(
            Block(c.width, c.heads, c.mlp_hidden, "swiglu", "rmsnorm", c.norm_eps, layer) for layer in range(c.depth)
        )
        self.norm = NORMS["rmsnorm"](c.width, eps=c.norm_eps)
        self.pixel_head = nn.Linear(c.width, 3 * patch_size**2, bias=False)
        self.text_head = nn.Linear(c.width, c.vocab_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.bos, std=0.02)
        nn.init.normal_(self.text_positions, std=0.01)
        init_trunk(self.blocks)
        for head in (self.pixel_head, self.text_head):
            std = (1 / (1 + self.config.depth) / self.config.width) ** 0.5 / TRUNCATED_STD
            nn.init.trunc_normal_(head.weight, std=std, a=-2 * std, b=2 * std)

    def forward(self, features: Tensor, text: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Features (B, N, D) and token ids (B, T) -> pixels (B, N, 3P^2) and logits (B, T, V).

        pixels[:, i] predicts patch i+1; logits[:, t] predicts text[:, t]. Padding on the right needs no mask: the
        decoder is causal. `real`, boolean (B, N), is True where a patch is not padding; None is everywhere. Raises
        ValueError if the text is longer than the context.
        """
        image = self.projection(features)  # (B, N, W)
        x = torch.cat([image, self._embed(text[:, :-1], with_bos=True)], dim=1)  # (B, N + T, W)
        x = self.norm(self._padded_trunk(x, real))
        n = features.shape[1]
        return self.pixel_head(x[:, :n]), self.text_head(x[:, n:])

    def _embed(self, text: Tensor, with_bos: bool, start: int = 0) -> Tensor:
        """Token ids (B, T) at caption positions `start`... -> (B, T (+1 with BOS), W)."""
        x = self.tokens(text)
        if with_bos:
            x = torch.cat([self.bos.to(x).expand(len(text), 1, -1), x], dim=1)
        if start + x.shape[1] > len(self.text_positions) - 1:
            raise ValueError(
                f"caption of {start + x.shape[1]} tokens, but the context holds {self.config.context_length}"
            )
        return x + self.text_positions[start : start + x.shape[1]].to(x)

    def _padded_trunk(self, x: Tensor, real: Tensor | None, cache: KeyValueCache | None = None) -> Tensor:
        """(B, N + T, W), patches and text. Padding between them goes behind the text, and back again.

        There causal attention doesn't see it, without the mask that keeps fused kernels from being causal. A cache
        keeps the order in which padding comes last.
        """
        if real is None:
            return self._trunk(x, None, cache)
        text = real.new_ones(len(x), x.shape[1] - real.shape[1])
        order = torch.cat([real, text], dim=1).logical_not().byte().argsort(dim=1, stable=True)  # (B, N + T)
        x = self._trunk(x.take_along_dim(order[..., None], dim=1), None, cache)
        return x.take_along_dim(order.argsort(dim=1)[..., None], dim=1)

    def _trunk(self, x: Tensor, mask: Tensor | None = None, cache: KeyValueCache | None = None) -> Tensor:
        causal = x.shape[1] > 1  # a single new position sees all of the cache that its mask shows
        for block in self.blocks:
            if self.config.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, mask, causal, use_reentrant=False)
            else:
                x = block(x, mask, causal, cache)
        return x

    @torch.no_grad()
    def generate(
        self,
        features: Tensor,
        *,
        real: Tensor | None = None,
        eos_id: int,
        max_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> list[list[int]]:
        """Captions for features (B, N, D): greedy at temperature 0, else sampled from the top `top_p` of the mass.

        Keys and values are cached, so each position runs once. `real` is that of `forward`. Each caption ends before
        its EOS, or after `max_tokens` (at most, and by default, the context length).
        """
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens {max_tokens}: expected at least 1")
        limit = min(max_tokens or self.config.context_length, self.config.context_length)
        cache = KeyValueCache()
        empty = torch.empty(len(features), 0, dtype=torch.long, device=features.device)
        x = torch.cat([self.projection(features), self._embed(empty, with_bos=True)], dim=1)
        done = torch.zeros(len(features), dtype=torch.bool, device=features.device)
        tokens = []
        n = features.shape[1]
        seen = None
        if real is not None:  # in the cache: an image's patches and BOS, then its padding, then what is generated
            key = torch.arange(n + 1 + limit, device=features.device)
            seen = ((key <= real.sum(dim=1, keepdim=True)) | (key > n))[:, None, None]  # (B, 1, 1, N + 1 + limit)
        x = self._padded_trunk(x, real, cache)
        for position in range(1, limit + 1):
            logits = self.text_head(self.norm(x[:, -1]))  # (B, V)
            token = sample_token(logits.float(), temperature, top_p, generator)
            tokens.append(token)
            done |= token == eos_id
            if done.all() or position == limit:
                break
            x = self._embed(token[:, None], with_bos=False, start=position)
            x = self._trunk(x, None if seen is None else seen[..., : n + 1 + position], cache)
        rows = torch.stack(tokens, dim=1).tolist()
        return [row[: row.index(eos_id)] if eos_id in row else row for row in rows]


def sample_token(
    logits: Tensor, temperature: float = 0.0, top_p: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """Logits (B, V) -> ids (B,): the argmax at temperature 0, else drawn from the smallest set holding `top_p`."""
    if temperature < 0 or not 0 <= top_p <= 1:
        raise ValueError(f"temperature {temperature}, top_p {top_p}: expected at least 0, and between 0 and 1")
    if temperature == 0:
        return logits.argmax(dim=-1)
    probability, order = (logits / temperature).softmax(dim=-1).sort(dim=-1, descending=True)
    mass_before = probability.cumsum(dim=-1) - probability
    dropped = (mass_before >= top_p) & (mass_before > 0)  # the likeliest token always stays
    probability = probability.masked_fill(dropped, 0.0)
    return order.gather(1, torch.multinomial(probability, 1, generator=generator)).squeeze(1)
