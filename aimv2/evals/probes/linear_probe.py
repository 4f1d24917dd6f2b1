"""DINOv2's linear probe: a Linear on the image feature, for every learning rate and every way to make that feature.

B images, D width, E length of a feature, S learning rates, C classes.

Source: DINOv2 (arXiv 2304.07193) and its official code: {last block, last 4 blocks} x {CLS, CLS and the mean of the
patches} x 13 learning rates, SGD without weight decay, cosine to 0, all at once. There the images are augmented, which
is mode=online here; by default the features are kept.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from aimv2.evals.checks import require, require_classes
from aimv2.evals.datasets import Dataset
from aimv2.evals.encoders import Encoder
from aimv2.evals.extraction import feature_shapes
from aimv2.evals.pooled_streams import POOLED, means_of_blocks, split_words
from aimv2.evals.probes.features import cropped
from aimv2.evals.probes.outcome import check_settings, run_probe
from aimv2.evals.results import Outcome
from aimv2.evals.session import Session

MOMENTUM = 0.9
BLOCKS = 4


@dataclass(frozen=True, slots=True)
class LinearFeatures:
    """A view of vectors (B, E) by name.

    grid: DINOv2's, each block after the final norm: last1 (the CLS token), last1_patches (with the mean of the last
    block's patches), last4 (the CLS tokens side by side), last4_patches. Without a CLS token it is the mean of the
    patches, and what would then be twice the same is there once: last1 and last4. An encoder with fewer blocks of the
    last one's shape has as many. Pixels have no features, so that their grid is `pooled`: all of them.

    pooled: the library's own image feature. Other layers: the mean of the patches of `parse_layers`' streams.
    """

    layers: str = "grid"

    def __post_init__(self):
        split_words(self.layers)

    @property
    def key(self) -> str:
        return "linear " + self.layers.replace(" ", "")

    def __call__(self, encoder: Encoder, images: Tensor) -> dict[str, Tensor]:
        words, blocks = split_words(self.layers, "grid", POOLED)
        if encoder.source == "pixels" and "grid" in words:
            words = {POOLED}
        found = _grid(encoder, images) if "grid" in words else {}
        if POOLED in words:
            found[POOLED] = encoder.pooled(images)
        return found | means_of_blocks(encoder, images, blocks)


def _grid(encoder: Encoder, images: Tensor) -> dict[str, Tensor]:
    if encoder.layers:  # chosen in the spec, as raw block outputs
        return {"output": encoder.output(images).patches.mean(dim=1)}
    numbers = range(max(0, encoder.depth - BLOCKS), encoder.depth)
    blocks = encoder.blocks(images, numbers)
    while blocks[0].patches.shape != blocks[-1].patches.shape:  # a convnet's earlier stages
        blocks = blocks[1:]
    means = [encoder.norm(block.patches).mean(dim=1) for block in blocks]  # each (B, D)
    several = f"last{len(blocks)}"
    if blocks[0].cls is None:
        return {"last1": means[-1], several: torch.cat(means, dim=1)}
    tokens = [encoder.norm(block.cls) for block in blocks]
    return {
        "last1": tokens[-1],
        "last1_patches": torch.cat([tokens[-1], means[-1]], dim=1),
        several: torch.cat(tokens, dim=1),
        f"{several}_patches": torch.cat([*tokens, means[-1]], dim=1),
    }


class LinearSweep:
    """A Linear for each learning rate, all beginning with the same weights: N(0, 0.01) from `seed`, biases 0."""

    def __init__(
        self, lrs: Sequence[float], *, scale: float, width: int, classes: int, seed: int, device: torch.device
    ):
        self.settings = [{"lr": lr} for lr in lrs]
        self.rates = scale * torch.tensor(lrs, device=device)  # (S,)
        generator = torch.Generator().manual_seed(seed)
        weight = 0.01 * torch.randn(classes, width, generator=generator)
        self.weight = weight.repeat(len(lrs), 1, 1).to(device).requires_grad_()  # (S, C, E)
        self.bias = torch.zeros(len(lrs), classes, device=device, requires_grad=True)  # (S, C)
        self.momenta = [torch.zeros_like(parameter.detach()) for parameter in (self.weight, self.bias)]

    def step(self, x: Tensor, labels: Tensor, step: int, steps: int, session: Session) -> Tensor:
        """One update of all heads from this rank's part of a batch, x (B, E); its part of the mean losses (S,)."""
        count = float(session.sum(torch.tensor(float(len(labels)), device=x.device)))
        if not count:
            return torch.zeros(len(self.settings), device=x.device)
        logits = self._logits(x).transpose(1, 2)  # (B, C, S)
        each = F.cross_entropy(logits, labels[:, None].expand(-1, len(self.settings)), reduction="none")  # (B, S)
        losses = each.sum(dim=0) / count
        gradients = torch.autograd.grad(losses.sum(), (self.weight, self.bias))
        rates = self.rates * 0.5 * (1 + math.cos(math.pi * step / steps))
        with torch.no_grad():
            for parameter, gradient, momentum in zip((self.weight, self.bias), gradients, self.momenta, strict=True):
                momentum.mul_(MOMENTUM).add_(session.sum(gradient))
                parameter.sub_(rates.view(-1, *[1] * (parameter.ndim - 1)) * momentum)
        return losses.detach()

    @torch.no_grad()
    def scores(self, x: Tensor) -> Tensor:
        """(B, E) -> (S, B, C)."""
        return self._logits(x).transpose(0, 1)

    def state_dict(self) -> dict:
        return {"weight": self.weight.detach(), "bias": self.bias.detach(), "momenta": self.momenta}

    def load_state_dict(self, state: dict) -> None:
        with torch.no_grad():
            self.weight.copy_(state["weight"])
            self.bias.copy_(state["bias"])
            for momentum, saved in zip(self.momenta, state["momenta"], strict=True):
                momentum.copy_(saved)

    def tensors(self, number: int) -> dict[str, Tensor]:
        """Of a head, as nn.Linear names them."""
        return {"weight": self.weight[number].detach(), "bias": self.bias[number].detach()}

    def _logits(self, x: Tensor) -> Tensor:
        """(B, S, C)"""
        return (x @ self.weight.flatten(0, 1).T).unflatten(1, self.bias.shape) + self.bias


@dataclass(slots=True, kw_only=True)
class LinearProbe:
    """All learning rates on all features of `layers`, in one pass.

    By default the features are extracted once, without augmentation, and a note says so; DINOv2's is mode=online.
    """

    name: ClassVar[str] = "linear_probe"
    layers: str = "grid"  # as `LinearFeatures`: "grid", "pooled", or streams as "all"; commas join
    lrs: tuple[float, ...] = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
    batch_size: int = 1024  # over all ranks; the rates are for 256 and scale with it
    steps: int = 12_500  # 10 epochs of ImageNet
    mode: str = "cached"  # online: augmented anew in each epoch; auto: cached if the features fit
    most_cached: int = 4 << 30  # bytes of features that fit, for auto
    select_on: str = "held_out"  # or test
    held_out: float = 0.1  # of the training set, to choose on
    seed: int = 0  # of the weights, the order, the augmentation and what is held out

    def __post_init__(self):
        check_settings(self)
        require(self.steps >= 1, "1 or more", steps=self.steps)

    def run(self, encoder: Encoder, data: Dataset, session: Session) -> Outcome:
        """Images of the test set that can't be read are wrong; of the training set, left out.

        Raises:
            ValueError: no classes, no training set; layers that aren't there; as `run_probe`.
        """
        require_classes(data, "a linear probe")
        view = LinearFeatures(self.layers)
        shapes = feature_shapes(encoder, view, session)  # each (E,)

        def sweeps(batch_size: int) -> dict[str, LinearSweep]:
            settings = {"scale": batch_size / 256, "classes": len(data.classes), "seed": self.seed}
            return {
                name: LinearSweep(self.lrs, width=width, device=session.device, **settings)
                for name, (width,) in shapes.items()
            }

        return run_probe(
            self,
            encoder,
            data,
            view,
            session,
            augmentation=cropped,
            sweeps=sweeps,
            steps=lambda batches: self.steps,
            published="DINOv2's",
        )
