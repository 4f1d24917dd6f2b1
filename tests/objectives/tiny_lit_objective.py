"""A LiT small enough for loops, its objective, and random batches for it."""

import torch
from torch import Tensor

from aimv2.data.batch import Batch
from aimv2.encoder import VisionConfig
from aimv2.lit import LiTConfig
from aimv2.objectives.lit import LiTObjective, LiTObjectiveConfig
from aimv2.text_encoder import TextConfig

P, GRID, CONTEXT, EOS = 2, 3, 6, 1
N = GRID**2
VISION = VisionConfig(width=16, depth=2, heads=2, mlp_hidden=24, image_size=P * GRID, patch_size=P)
TEXT = TextConfig(width=12, depth=2, heads=3, mlp_hidden=20, vocab_size=11, context_length=CONTEXT, eos=EOS)
LIT = LiTConfig(vision=VISION, text=TEXT, projection=8, pool_heads=2)
CONFIG = LiTObjectiveConfig(model=LIT)
TEXT_LENGTH = [6, 0, 3, 1, 4, 5]


def random_objective(config: LiTObjectiveConfig = CONFIG, dtype: torch.dtype = torch.float64) -> LiTObjective:
    """All parameters random, norms and biases too, and a scale below its bound."""
    torch.manual_seed(0)
    objective = config.build().to(dtype)
    for name, parameter in objective.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
        elif parameter.ndim and (parameter.ndim < 2 or "positions" in name or "tokens" in name or "query" in name):
            torch.nn.init.normal_(parameter, std=0.5)
    torch.nn.init.constant_(objective.model.log_scale, 1.5)
    return objective


def random_batch(text_length=TEXT_LENGTH, dtype: torch.dtype = torch.float64, seed: int = 0, pad: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    samples, longest = len(text_length), max(1, *text_length)
    text = torch.randint(2, TEXT.vocab_size, (samples, longest), generator=generator)
    for row, n in zip(text, text_length, strict=True):
        row[max(n - 1, 0) :] = pad
        if n:
            row[n - 1] = EOS
    return Batch(
        image=torch.randn(samples, 3, P * GRID, P * GRID, generator=generator, dtype=torch.float64).to(dtype),
        text=text,
        text_length=torch.tensor(text_length),
        prefix_length=torch.ones(samples, dtype=torch.int64),
        sample=torch.arange(samples) + 100 * seed,
        num_patches=N,
    )


def gradients(objective: LiTObjective) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in objective.named_parameters() if p.requires_grad}
