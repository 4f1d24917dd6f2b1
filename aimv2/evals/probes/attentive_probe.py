"""AIM's attentive probe: frozen patches of one or several layers, a head that attends to them, a sweep of its settings.

Protocol: AIMv2 (arXiv 2411.14402), appendix. The encoder's output, or with `layers` the mean of raw block outputs, as
in AIM (arXiv 2401.08541): "last6", or "windows" for the best six.
"""

import itertools
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from aimv2.evals.checks import require, require_classes
from aimv2.evals.datasets import Dataset
from aimv2.evals.encoders import Encoder, parse_layers, streams
from aimv2.evals.encoders.interface import weights_digest
from aimv2.evals.extraction import feature_shapes
from aimv2.evals.probes.attentive_head import load_head
from aimv2.evals.probes.attentive_sweep import AttentiveSweep
from aimv2.evals.probes.features import OnlineFeatures, augmented
from aimv2.evals.probes.outcome import Choice, check_settings, identify, run_probe
from aimv2.evals.results import Outcome
from aimv2.evals.session import Session


@dataclass(frozen=True, slots=True)
class PatchStreams:
    """A view of all patches of each stream of `parse_layers`, (B, N, D)."""

    layers: str = "output"

    @property
    def key(self) -> str:
        return "patches " + self.layers.replace(" ", "")

    def __call__(self, encoder: Encoder, images: Tensor) -> dict[str, Tensor]:
        return streams(encoder, images, parse_layers(self.layers, encoder.depth))


@dataclass(slots=True, kw_only=True)
class AttentiveProbe:
    """All learning rates x weight decays on all streams of `layers`, in one pass over the training images.

    The trunk is frozen and run no further than the last layer needed, in fp32. As published it is with mode=online, and
    with select_on=test; kept features are not augmented, and a note says so.
    """

    name: ClassVar[str] = "attentive_probe"
    layers: str = "output"  # as `parse_layers`
    lrs: tuple[float, ...] = (5e-5, 1e-4, 2e-4, 3e-4, 5e-4, 1e-3, 2e-3)
    weight_decays: tuple[float, ...] = (0.05, 0.1)
    epochs: int = 100
    warmup_epochs: float = 5.0
    min_lr: float = 1e-5
    batch_size: int = 1024  # over all ranks; the paper has 512 for the smaller datasets
    clip: float = 3.0  # largest norm of a head's gradient
    heads: int | None = None  # of the attention; None: the encoder's
    mode: str = "auto"  # online: augmented anew in each epoch; cached: the same features; auto: cached if they fit
    most_cached: int = 4 << 30  # bytes of features that fit, for auto
    select_on: str = "held_out"  # test: as the paper does
    held_out: float = 0.1  # of the training set, to choose on
    head: str | None = None  # the file of a head to be evaluated as it is, without training
    seed: int = 0  # of the weights, the order, the augmentation and what is held out

    def __post_init__(self):
        check_settings(self)
        decays = self.weight_decays
        require(bool(decays) and all(0 <= decay < np.inf for decay in decays), "0 or more", weight_decays=decays)
        require(0 <= self.min_lr < np.inf, "0 or more", min_lr=self.min_lr)
        require(self.clip > 0, "a positive number", clip=self.clip)
        require(self.heads is None or self.heads >= 1, "1 or more, or None for the encoder's", heads=self.heads)
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(
                f"warmup_epochs {self.warmup_epochs} of {self.epochs} epochs: expected fewer of warm-up than in all"
            )

    def run(self, encoder: Encoder, data: Dataset, session: Session) -> Outcome:
        """Images of the test set that can't be read are wrong; of the training set, left out.

        Raises:
            ValueError: no classes, no training set; a width that the attention heads don't divide; a `head` of another
                shape; online, without timm; as `run_probe`.
        """
        require_classes(data, "an attentive probe", train=self.head is None)
        view = PatchStreams(self.layers)
        widths = {name: shape[-1] for name, shape in feature_shapes(encoder, view, session).items()}
        if self.head is not None:
            return self._evaluate_head(widths, encoder, data, view, session)
        settings = [{"lr": lr, "weight_decay": decay} for lr, decay in itertools.product(self.lrs, self.weight_decays)]
        sweeps = {name: self._sweep(settings, width, encoder, data, session) for name, width in widths.items()}
        return run_probe(
            self,
            encoder,
            data,
            view,
            session,
            augmentation=augmented,
            sweeps=lambda batch_size: sweeps,
            steps=lambda batches: self.epochs * batches,
            published="AIMv2's",
        )

    def _evaluate_head(
        self, widths: dict[str, int], encoder: Encoder, data: Dataset, view: PatchStreams, session: Session
    ) -> Outcome:
        if len(widths) > 1:
            raise ValueError(f"layers {self.layers!r} are several: expected one, for the head of {self.head}")
        ((stream, width),) = widths.items()
        sweep = self._sweep([{"lr": 0.0, "weight_decay": 0.0}], width, encoder, data, session)
        head = load_head(self.head, heads=sweep.heads[0].heads, width=width, classes=len(data.classes))
        sweep.heads[0].load_state_dict(head.state_dict())
        sweep.settings = [{"head": str(self.head)}]
        choice = Choice(
            sweeps={stream: sweep},
            losses={stream: np.zeros((0, 1))},
            source=OnlineFeatures(encoder, data, view, session),
            data=data,
            held_out=None,
            key=identify(self, encoder, data, session, weights=weights_digest(head)),
        )
        outcome = choice.outcome({"mode": "published head", "notes": []}, np.zeros(0, bool))
        outcome.details["selection"] = {"on": "nothing", "stream": stream, "head": str(self.head)}
        return outcome

    def _sweep(
        self, settings: list[dict], width: int, encoder: Encoder, data: Dataset, session: Session
    ) -> AttentiveSweep:
        return AttentiveSweep(
            settings,
            width=width,
            heads=self.heads or encoder.heads,
            classes=len(data.classes),
            warmup=self.warmup_epochs / self.epochs,
            min_lr=self.min_lr,
            clip=self.clip,
            seed=self.seed,
            device=session.device,
        )
