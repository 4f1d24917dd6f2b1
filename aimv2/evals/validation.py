"""The objective's losses over a held-out split."""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from aimv2.data.batch import Batch, Counts, count_targets
from aimv2.data.loader import DataConfig, validation_loader
from aimv2.data.shapes import caption_entropy
from aimv2.evals.harness import at_rest
from aimv2.ranks import sum_over_ranks


@dataclass(slots=True, kw_only=True)
class ValidationLoss:
    """Whatever the objective returns, over the whole split: `pixel_loss` is the mean over supervised patches,
    `caption_loss` the mean over caption tokens, EOS included, in nats.

    If the data are the shapes world, `caption_entropy` stands beside the latter: nats per token that no model goes
    below.
    """

    name: ClassVar[str] = "validation"
    every: int = 500  # steps; 0: at the end only
    samples: int = 512  # at most, over all ranks
    batch_size: int = 64  # images per rank and pass, at most a rank's share of the samples

    def build(
        self, data: DataConfig, *, patch_size: int, seed: int, rank: int, world_size: int, device: torch.device
    ) -> Callable[[nn.Module], dict[str, float]]:
        """The eval, objective -> {name: number}: the same samples and prefixes at each call, equal on all ranks."""
        loader = validation_loader(
            data,
            patch_size=patch_size,
            micro_batch=self.batch_size,
            seed=seed,
            rank=rank,
            world_size=world_size,
            limit=self.samples,
        )
        # On the first call, not here: a run should not wait for it.
        totals = functools.cache(lambda: count_split(loader, world_size, device))

        def evaluate(objective: nn.Module) -> dict[str, float]:
            counts = totals()
            sums: dict[str, Tensor] = {}
            with at_rest(objective):
                for batch in loader:
                    for name, loss in objective(batch.to(device), counts).items():
                        sums[name] = sums.get(name, 0.0) + loss.double()
            metrics = dict(zip(sums, sum_over_ranks(torch.stack(list(sums.values()))).tolist(), strict=True))
            if data.made_by is not None and "caption_loss" in metrics:
                captions_per_token = (counts.captions / counts.tokens).item()
                metrics["caption_entropy"] = caption_entropy(data.made_by.difficulty) * captions_per_token
            return metrics

        return evaluate


def count_split(loader: Iterable[Batch], world_size: int, device: torch.device) -> Counts:
    """Targets of all ranks' batches. Losses divided by the split's counts simply add up, as in training.

    Raises ValueError if there are fewer samples than ranks: the losses of a rank without any are unknown.
    """
    totals = count_targets([])
    for batch in loader:
        totals += count_targets([batch])
    totals = sum_over_ranks(totals.to(device))
    samples = totals[2].item()
    if samples < world_size:
        raise ValueError(f"{samples:.0f} validation samples for {world_size} ranks: expected at least one for each")
    return Counts.of(totals.float())
