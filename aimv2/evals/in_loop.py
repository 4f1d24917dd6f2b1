"""Frozen-encoder evaluations of a model while it trains, by the functions that the scripts call."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from aimv2.data.loader import DataConfig
from aimv2.evals.datasets import open_dataset
from aimv2.evals.dense.patch_probe import PatchProbe
from aimv2.evals.encoders import encoder_of, parse_layers
from aimv2.evals.few_shot import FewShot
from aimv2.evals.harness import at_rest
from aimv2.evals.knn import KNN
from aimv2.evals.pooled_streams import split_words
from aimv2.evals.probes.attentive_probe import AttentiveProbe
from aimv2.evals.probes.linear_probe import LinearProbe
from aimv2.evals.retrieval import Retrieval
from aimv2.evals.run import shortened
from aimv2.evals.session import Session
from aimv2.evals.text_image import text_image_of
from aimv2.evals.zero_shot import ZeroShot
from aimv2.preprocessing import ProcessorConfig
from aimv2.pretrained import resized

WITH_TEXT = (ZeroShot, Retrieval)
POOLED = ("pooled", "grid")  # layers that every encoder has


@dataclass(slots=True, kw_only=True)
class FrozenEvaluation:
    """A protocol on a dataset; every rank takes its share of the images.

    Zero-shot classification and retrieval need an objective with a text tower. Images are prepared as the run's own are
    for validation, but squashed to one size at native resolution, where the run's keep their aspect ratio. Nothing is
    kept on disk.
    """

    protocol: AttentiveProbe | LinearProbe | FewShot | KNN | PatchProbe | ZeroShot | Retrieval
    dataset: str  # as --data of the scripts
    root: str | None = None  # folder of the named datasets
    every: int = 0  # steps; 0: at the end only
    train: int | None = 10_000  # images of the split, drawn once; None: all
    test: int | None = 2_000
    batch_size: int = 64  # images per rank and pass
    workers: int = 0  # processes per rank that decode images
    label: str | None = None  # in the logs; None: the protocol's name and the dataset

    @property
    def name(self) -> str:
        return self.label or f"{self.protocol.name} {self.dataset}"

    def check(self, depth: int, has_text: bool) -> None:
        """Raises ValueError for what an encoder of so many blocks, or a model without a text tower, can't be asked."""
        if isinstance(self.protocol, WITH_TEXT):
            if not has_text:
                raise ValueError(f"{self.name}: the objective has no text tower, which {self.protocol.name} needs")
        else:
            _, blocks = split_words(self.protocol.layers, *POOLED)
            parse_layers(blocks or "output", depth)

    def build(
        self, data: DataConfig, *, patch_size: int, seed: int, rank: int, world_size: int, device: torch.device
    ) -> Callable[[nn.Module], dict[str, float]]:
        """The eval, objective -> {name: number}, equal on all ranks. ValueError for a dataset that isn't there."""
        images = shortened(open_dataset(self.dataset, root=self.root), self.train, self.test)
        processing = ProcessorConfig.of_training(data, data.transform.image_size, patch_size)
        if data.native is not None:  # an evaluation takes all images at one size
            processing = resized(processing, data.transform.image_size)
        where = {"device": device, "rank": rank, "world_size": world_size}

        def evaluate(objective: nn.Module) -> dict[str, float]:
            session = Session(**where, batch_size=self.batch_size, workers=self.workers, quiet=True)
            with at_rest(objective), torch.enable_grad():  # a probe's head is trained
                if isinstance(self.protocol, WITH_TEXT):
                    model = text_image_of(objective, processing, data.tokenizer)
                else:
                    model = encoder_of(objective.encoder, processing)
                outcome = self.protocol.run(model, images, session)
            return {name: metric.value for name, metric in outcome.metrics.items()}

        return evaluate
