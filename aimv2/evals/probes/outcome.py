"""A probe from its features to its outcome: the heads are trained, the one to quote is chosen, of the others is told.

B images, S heads of a sweep, C classes, n images.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from aimv2.evals.checks import all_positive, require, require_split
from aimv2.evals.datasets import Dataset
from aimv2.evals.encoders import Encoder
from aimv2.evals.extraction import View
from aimv2.evals.feature_store import fingerprint
from aimv2.evals.probes.features import MODES, CachedFeatures, Features, OnlineFeatures, source_of
from aimv2.evals.probes.training import Sweep, Training, batches_per_epoch, split_rows
from aimv2.evals.results import MOST_KEYS, Outcome, classification_metrics, classification_samples, per_class, share
from aimv2.evals.session import Session

SELECT_ON = ("held_out", "test")

_SCORES = "scores"


class ProbeSettings(Protocol):
    """What the attentive and the linear probe share; they are dataclasses."""

    name: str
    lrs: tuple[float, ...]
    batch_size: int
    mode: str
    most_cached: int
    select_on: str
    held_out: float
    seed: int


def check_settings(settings: ProbeSettings) -> None:
    """Raises ValueError by name."""
    require(settings.mode in MODES, f"one of {', '.join(MODES)}", mode=settings.mode)
    require(settings.select_on in SELECT_ON, f"one of {', '.join(SELECT_ON)}", select_on=settings.select_on)
    require(all_positive(settings.lrs), "positive numbers", lrs=settings.lrs)
    require(settings.batch_size >= 1, "1 or more", batch_size=settings.batch_size)
    require(settings.most_cached >= 0, "0 or more", most_cached=settings.most_cached)
    require_split(settings.held_out, settings.seed)


def identify(settings: ProbeSettings, encoder: Encoder, data: Dataset, session: Session, **others) -> str:
    """Of all that decides the result, to name files in the session's folder. Without a folder "": it takes a digest of
    the encoder's weights.
    """
    if session.folder is None:
        return ""
    splits = {"train": data.train and data.train.identity, "test": data.test.identity}
    return fingerprint(
        {"protocol": settings.name, **asdict(settings), "encoder": encoder.describe(), **splits, **others}
    )


def run_probe(
    settings: ProbeSettings,
    encoder: Encoder,
    data: Dataset,
    view: View,
    session: Session,
    *,
    augmentation: Callable[[Encoder], Callable[[Image.Image], Tensor]],
    sweeps: Callable[[int], dict[str, Sweep]],
    steps: Callable[[int], int],
    published: str,
) -> Outcome:
    """Train all sweeps on the training split and choose a head.

    Args:
        sweeps: of a batch's size, the heads for each stream of the view.
        steps: of the number of batches in an epoch, how many there are in all.
        published: whose protocol mode=online is, for a note.

    Raises:
        ValueError: no training image, or none to choose on, can be read; all heads diverged.
    """
    source = source_of(
        settings.mode,
        encoder,
        data,
        view,
        session,
        most_cached=settings.most_cached,
        augmentation=augmentation,
        seed=settings.seed,
    )
    key = identify(settings, encoder, data, session, mode=source.mode)
    readable = source.readable("train")
    rows, held = split_rows(data.train.labels, readable, settings.select_on, settings.held_out, settings.seed)
    batch_size = min(settings.batch_size, len(rows))
    training = Training(
        sweeps=sweeps(batch_size),
        source=source,
        labels=data.train.labels,
        rows=rows,
        batch_size=batch_size,
        steps=steps(batches_per_epoch(len(rows), batch_size)),
        seed=settings.seed,
        session=session,
        path=session.folder and session.folder / "probes" / f"{key}.pt",
    )
    losses, used, unreadable = training.run()
    notes = []
    if source.mode == "cached":
        notes.append(f"trained without augmentation, on features that were kept; mode=online is {published}")
    if len(rows) < settings.batch_size:
        notes.append(f"{len(rows)} training images are fewer than a batch of {settings.batch_size}: a step is an epoch")
    details = {"mode": source.mode, "steps": training.steps, "trained_on": int(used.sum()), "notes": notes}
    choice = Choice(sweeps=training.sweeps, losses=losses, source=source, data=data, held_out=held, key=key)
    return choice.outcome(details, unreadable | ~readable)


@dataclass(slots=True, kw_only=True)
class Choice:
    """The best head of each stream, and of those the best; of equals the first. A head that diverged is never it.

    losses: of each sweep, (points, S). held_out: rows of the training split to choose on; None: the test split, as the
    papers do it. key: of what is found, in the session's folder.
    """

    sweeps: dict[str, Sweep]
    losses: dict[str, np.ndarray]
    source: CachedFeatures | OnlineFeatures
    data: Dataset
    held_out: np.ndarray | None
    key: str

    def outcome(self, details: dict, unreadable: np.ndarray) -> Outcome:
        """Metrics of the chosen head first, then top1 of each stream's best.

        details: to be added to. unreadable: (n,) bool, training images that are known to be so; none to train: (0,).
        """
        on_test = self.held_out is None
        split, rows = ("test", np.arange(len(self.data.test))) if on_test else ("train", self.held_out)
        diverged = {name: ~np.isfinite(losses[-1:]).all(axis=0) for name, losses in self.losses.items()}  # each (S,)
        of_all = np.concatenate(list(diverged.values()))
        if of_all.all():
            raise ValueError(f"all {len(of_all)} heads diverged: expected lower learning rates, or finite features")
        notes = list(details["notes"])
        if of_all.any():
            notes.append(f"{of_all.sum()} of {len(of_all)} heads diverged: their last losses are not finite")
        if on_test and len(of_all) == 1:  # nothing to choose
            stream, best = next(iter(self.sweeps)), dict.fromkeys(self.sweeps, 0)
            correct, scores = self._test(stream, 0)
            accuracy = {stream: correct[stream].mean(axis=0)}
        else:
            accuracy, readable = self._accuracy(split, rows)
            if not on_test:
                unreadable[rows[~readable]] = True
            chances = {name: np.where(diverged[name], -1, values) for name, values in accuracy.items()}
            best = {name: int(values.argmax()) for name, values in chances.items()}
            stream = max(best, key=lambda name: chances[name][best[name]])
            correct, scores = self._test(stream, best[stream])
        labels, classes = self.data.test.labels, self.data.classes
        metrics = classification_metrics(scores, labels)
        of_streams = {name: share(correct[name][:, number], 1 / len(classes)) for name, number in best.items()}
        if len(best) > 1:
            metrics |= {f"top1@{name}": metric for name, metric in of_streams.items()}
        details = details | self._told(stream, best, accuracy, correct) | {"notes": notes}
        if len(unreadable):
            lost = [self.data.train.keys[int(row)] for row in np.flatnonzero(unreadable)]
            details |= {"unreadable": len(lost), "unreadable_keys": lost[:MOST_KEYS]}
        details["layers"] = {name: asdict(metric) | details["layers"][name] for name, metric in of_streams.items()}
        details["per_class"] = per_class(scores, labels, classes)
        samples = classification_samples(scores, labels, self.data.test.keys)
        tensors = self.sweeps[stream].tensors(best[stream])
        return Outcome(metrics=metrics, samples=samples, details=details, tensors=tensors)

    def _told(
        self, stream: str, best: dict[str, int], accuracy: dict[str, np.ndarray], correct: dict[str, np.ndarray]
    ) -> dict:
        """The details: what was chosen on what, every head of the sweep, and each stream's best."""
        on_test = self.held_out is None

        def head(name: str, number: int) -> dict:
            found = {} if on_test else {"held_out": float(accuracy[name][number])}
            return self.sweeps[name].settings[number] | found

        chosen = {"stream": stream, **self.sweeps[stream].settings[best[stream]]}
        on, name = ("test", "test") if on_test else (f"{len(self.held_out)} held-out training images", "held_out")
        return {
            "selection": {"on": on, **chosen, name: float(accuracy[stream][best[stream]])},
            "sweep": [
                {"stream": name, **head(name, number), "top1": float(correct[name][:, number].mean())}
                | {"loss": _numbers(self.losses[name][:, number])}
                for name, sweep in self.sweeps.items()
                for number in range(len(sweep.settings))
            ],
            "layers": {name: head(name, number) for name, number in best.items()},
        }

    def _accuracy(self, split: str, rows: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Of each head (S,) the share of the rows that it gets right, of training images those that can be read; and
        which can be, (rows,) bool.
        """
        found = self.source.apply(split, rows, self._predictions(), f"{self.key} predictions")
        counted = found.readable if split == "train" else np.ones(len(rows), bool)
        if not counted.any():
            raise ValueError(f"{self.data.spec}: none of {len(rows)} images to choose on can be read")
        right = self._right(found.arrays, found.readable, getattr(self.data, split).labels[rows])
        return {stream: of_stream[counted].mean(axis=0) for stream, of_stream in right.items()}, found.readable

    def _test(self, stream: str, number: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """What each head gets right, (n, S) of each stream, and the chosen one's scores (n, C), NaN if unreadable."""
        rows = np.arange(len(self.data.test))
        found = self.source.apply("test", rows, self._predictions((stream, number)), f"{self.key} {stream} {number}")
        scores = found.arrays.pop(_SCORES).astype(np.float64)
        scores[~found.readable] = np.nan
        return self._right(found.arrays, found.readable, self.data.test.labels), scores

    def _right(self, arrays: dict[str, np.ndarray], readable: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
        return {stream: (array == labels[:, None]) & readable[:, None] for stream, array in arrays.items()}

    def _predictions(self, with_scores: tuple[str, int] | None = None) -> Callable[[Features], Features]:
        """{stream: the class that each head predicts, (B, S)}, and the scores (B, C) of one head."""

        def predict(features: Features) -> Features:
            found: dict[str, Tensor] = {}
            for stream, sweep in self.sweeps.items():
                scores = sweep.scores(features[stream])  # (S, B, C)
                wrong = scores.isnan().any(dim=-1)  # a head that diverged
                found[stream] = scores.argmax(dim=-1).masked_fill(wrong, -1).T.float()
                if with_scores and with_scores[0] == stream:
                    found[_SCORES] = scores[with_scores[1]]
            return found

        return torch.no_grad()(predict)


def _numbers(losses: np.ndarray) -> list[float | None]:
    """For JSON, which has no NaN."""
    return [float(f"{loss:.6g}") if math.isfinite(loss) else None for loss in losses.tolist()]
