"""AIM's attentive probe: frozen patches of one or several layers, a head that attends to them, a sweep of its settings.

Protocol: AIMv2 (arXiv 2411.14402), appendix. The encoder's output, or with `layers` the mean of raw block outputs, as
in AIM (arXiv 2401.08541): "last6", or "windows" for the best six.
"""

import itertools
from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from aimv2.evals.attentive_head import load_head
from aimv2.evals.attentive_sweep import AttentiveSweep
from aimv2.evals.datasets import Dataset
from aimv2.evals.encoders import Encoder, parse_layers, streams
from aimv2.evals.encoders.interface import weights_digest
from aimv2.evals.extraction import View, feature_shapes
from aimv2.evals.feature_store import fingerprint
from aimv2.evals.probe_features import MODES, Anew, augmented, source_of
from aimv2.evals.probe_outcome import SELECT_ON, Choice
from aimv2.evals.probe_sweep import Training, batches_per_epoch, split_rows, unreadable_keys
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

    The trunk is frozen and run no further than the last layer needed, in fp32.
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
    most_cached: int = 4 << 30  # bytes of features that fit
    select_on: str = "held_out"  # test: as the paper does
    held_out: float = 0.1  # of the training set, to choose on
    head: str | None = None  # the file of a head to be evaluated as it is, without training
    seed: int = 0  # of the weights, the order, the augmentation and what is held out

    def __post_init__(self):
        if self.mode not in MODES or self.select_on not in SELECT_ON:
            raise ValueError(
                f"mode {self.mode!r}, select_on {self.select_on!r}: "
                f"expected one of {', '.join(MODES)} and one of {', '.join(SELECT_ON)}"
            )
        if not self.lrs or min(self.lrs) <= 0 or not self.weight_decays or min(self.weight_decays) < 0:
            raise ValueError(f"lrs {self.lrs}, weight_decays {self.weight_decays}: expected positive numbers")
        if self.batch_size < 1 or not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(
                f"batch_size {self.batch_size}, warmup_epochs {self.warmup_epochs} of {self.epochs} epochs: "
                "expected a batch of 1 or more, and fewer epochs of warm-up than in all"
            )

    def run(self, encoder: Encoder, data: Dataset, session: Session) -> Outcome:
        """Images of the test set that can't be read are wrong; of the training set, left out.

        Raises:
            ValueError: no training set; a width that the attention heads don't divide; a `head` of another shape;
                online, without timm.
        """
        view = PatchStreams(self.layers)
        names = list(parse_layers(self.layers, encoder.depth))
        identity = {"protocol": self.name, **asdict(self), "encoder": encoder.describe(), "test": data.test.identity}
        if self.head is not None:
            return self._evaluate_head(names, encoder, data, view, session, identity)
        if data.train is None:
            raise ValueError(f"{data.spec} has no training set: an attentive probe needs one")
        source = source_of(
            self.mode,
            encoder,
            data,
            view,
            session,
            most_cached=self.most_cached,
            augmentation=augmented,
            seed=self.seed,
        )
        identity |= {"train": data.train.identity, "mode": source.mode}
        readable = source.readable("train")
        rows, held = split_rows(data.train.labels, readable, self.select_on, self.held_out, self.seed)
        settings = [{"lr": lr, "weight_decay": decay} for lr, decay in itertools.product(self.lrs, self.weight_decays)]
        shapes = feature_shapes(encoder, view, session)
        sweeps = {name: self._sweep(settings, shapes[name][-1], encoder, data, session) for name in names}
        steps = self.epochs * batches_per_epoch(len(rows), self.batch_size)
        training = Training(
            sweeps=sweeps,
            source=source,
            labels=data.train.labels,
            rows=rows,
            batch_size=self.batch_size,
            steps=steps,
            seed=self.seed,
            session=session,
            identity=identity,
        )
        losses = training.run()
        choice = Choice(sweeps=sweeps, source=source, data=data, held_out=held, key=fingerprint(identity))
        unreadable = unreadable_keys(training)
        details = {"mode": source.mode, "steps": steps, "trained_on": len(rows), "notes": []}
        return choice.outcome(losses, details | {"unreadable": len(unreadable), "unreadable_keys": unreadable[:100]})

    def _evaluate_head(
        self, names: list[str], encoder: Encoder, data: Dataset, view: View, session: Session, identity: dict
    ) -> Outcome:
        if len(names) > 1:
            raise ValueError(f"layers {self.layers!r} are several: expected one, for the head of {self.head}")
        width = feature_shapes(encoder, view, session)[names[0]][-1]
        sweep = self._sweep([{"lr": 0.0, "weight_decay": 0.0}], width, encoder, data, session)
        head = load_head(self.head, heads=sweep.heads[0].heads, width=width, classes=len(data.classes))
        sweep.heads[0].load_state_dict(head.state_dict())
        sweep.settings = [{"head": str(self.head)}]
        source = Anew(encoder, data, view, session, transform=_no_training, seed=self.seed)
        key = fingerprint(identity | {"weights": weights_digest(head)})
        choice = Choice(sweeps={names[0]: sweep}, source=source, data=data, held_out=None, key=key)
        outcome = choice.outcome({names[0]: np.zeros((0, 1))}, {"mode": "published head", "notes": []})
        outcome.details["selection"] = {"on": "nothing", "stream": names[0], "head": str(self.head)}
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


def _no_training(image) -> Tensor:
    raise AssertionError("a head that is evaluated as it is has no training images")
