"""Which head of a probe's sweeps is the one to quote, and what is said of the others.

B images, S heads of a sweep, C classes, n images.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from aimv2.evals.datasets import Dataset
from aimv2.evals.probe_features import Anew, Features, Kept
from aimv2.evals.probe_sweep import Sweep
from aimv2.evals.results import Outcome, classification_metrics, classification_samples, per_class, share

SELECT_ON = ("held_out", "test")


@dataclass(slots=True, kw_only=True)
class Choice:
    """The best head of each stream, and of those the best; of equals the first.

    held_out: rows of the training split to choose on; None: the test split, as the papers do it. key: of what is looked
    at, in the session's folder.
    """

    sweeps: dict[str, Sweep]
    source: Kept | Anew
    data: Dataset
    held_out: np.ndarray | None
    key: str

    def outcome(self, losses: dict[str, np.ndarray], details: dict) -> Outcome:
        """Metrics of the chosen head first, then top1 of each stream's best.

        losses: of each sweep, (points, S). details: to be added to.
        """
        on_test = self.held_out is None
        split, rows = ("test", np.arange(len(self.data.test))) if on_test else ("train", self.held_out)
        if on_test and sum(len(sweep.settings) for sweep in self.sweeps.values()) == 1:  # nothing to choose
            stream, best = next(iter(self.sweeps)), dict.fromkeys(self.sweeps, 0)
            correct, scores = self._test(stream, 0)
            accuracy = {stream: correct[stream].mean(axis=0)}
        else:
            accuracy = self._accuracy(split, rows)
            best = {stream: int(values.argmax()) for stream, values in accuracy.items()}
            stream = max(best, key=lambda name: accuracy[name][best[name]])
            correct, scores = self._test(stream, best[stream])
        labels, classes = self.data.test.labels, self.data.classes
        metrics = classification_metrics(scores, labels)
        of_streams = {name: share(correct[name][:, number], 1 / len(classes)) for name, number in best.items()}
        if len(best) > 1:
            metrics |= {f"top1@{name}": metric for name, metric in of_streams.items()}
        on = "test" if on_test else f"{len(rows)} held-out training images"
        chosen = {"stream": stream, **self.sweeps[stream].settings[best[stream]]}
        name = "test" if on_test else "held_out"
        details = details | {
            "selection": {"on": on, **chosen, name: float(accuracy[stream][best[stream]])},
            "sweep": [
                {"stream": name, **setting, **({} if on_test else {"held_out": float(accuracy[name][number])})}
                | {"top1": float(correct[name][:, number].mean()), "loss": _numbers(losses[name][:, number])}
                for name, sweep in self.sweeps.items()
                for number, setting in enumerate(sweep.settings)
            ],
            "layers": {
                name: {**asdict(metric), **self.sweeps[name].settings[best[name]]}
                | ({} if on_test else {"held_out": float(accuracy[name][best[name]])})
                for name, metric in of_streams.items()
            },
            "per_class": per_class(scores, labels, classes),
        }
        samples = classification_samples(scores, labels, self.data.test.keys)
        tensors = self.sweeps[stream].tensors(best[stream])
        return Outcome(metrics=metrics, samples=samples, details=details, tensors=tensors)

    def _accuracy(self, split: str, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Of each head (S,): the share of the rows that it gets right; of training images those that can be read."""
        found = self.source.look(split, rows, self._predictions(), f"{self.key} predictions")
        counted = found.readable if split == "train" else np.ones(len(rows), bool)
        if not counted.any():
            raise ValueError(f"{self.data.spec}: none of {len(rows)} images to choose on can be read")
        right = self._right(found.arrays, found.readable, getattr(self.data, split).labels[rows])
        return {stream: of_stream[counted].mean(axis=0) for stream, of_stream in right.items()}

    def _test(self, stream: str, number: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """What each head gets right, (n, S) of each stream, and the chosen one's scores (n, C), NaN if unreadable."""
        rows = np.arange(len(self.data.test))
        found = self.source.look("test", rows, self._predictions((stream, number)), f"{self.key} {stream} {number}")
        scores = found.arrays.pop(_SCORES).astype(np.float64)
        scores[~found.readable] = np.nan
        return self._right(found.arrays, found.readable, self.data.test.labels), scores

    def _right(self, arrays: dict[str, np.ndarray], readable: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
        return {stream: (array == labels[:, None]) & readable[:, None] for stream, array in arrays.items()}

    def _predictions(self, with_scores: tuple[str, int] | None = None) -> Callable[[Features], Features]:
        """{stream: the class that each head predicts, (B, S)}, and the scores (B, C) of one head."""

        def look(features: Features) -> Features:
            found: dict[str, Tensor] = {}
            for stream, sweep in self.sweeps.items():
                scores = sweep.scores(features[stream])  # (S, B, C)
                wrong = scores.isnan().any(dim=-1)  # a head that diverged
                found[stream] = scores.argmax(dim=-1).masked_fill(wrong, -1).T.float()
                if with_scores and with_scores[0] == stream:
                    found[_SCORES] = scores[with_scores[1]]
            return found

        return torch.no_grad()(look)


_SCORES = "scores"


def _numbers(losses: np.ndarray) -> list[float | None]:
    """For JSON, which has no NaN."""
    return [float(f"{loss:.6g}") if math.isfinite(loss) else None for loss in losses.tolist()]
