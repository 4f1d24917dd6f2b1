"""An AIMv2 small enough for loops, and random batches for it."""

import torch
from torch import Tensor

from aimv2.data.batch import Batch, Counts, count_targets
from aimv2.decoder import DecoderConfig
from aimv2.encoder import VisionConfig
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
    return Counts.of(count_targets(batches))


def gradients(model: AIMv2) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters()]
