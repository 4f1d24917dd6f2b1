"""Logistic regression on frozen features, on a few images of each class and on all of them.

n test images, D length of a feature, C classes; the regression's own C, the inverse of its penalty, is the "strength".
Source: DINOv2 (arXiv 2304.07193) and its official code: L-BFGS, 45 strengths from 1e-6 to 1e5, the best on a held-out
tenth of the training set, then a fit on all of it. There cuML fits, here scikit-learn, with its own tolerance.
"""

import warnings
from dataclasses import asdict, dataclass, field
from typing import ClassVar

import numpy as np
import torch

from aimv2.evals.datasets import Dataset, held_out
from aimv2.evals.encoders import Encoder
from aimv2.evals.encoders.packages import optional
from aimv2.evals.extraction import extract
from aimv2.evals.knn import PooledStreams
from aimv2.evals.results import Metric, Outcome, classification_metrics, classification_samples, per_class, share
from aimv2.evals.session import Session

STRENGTHS = tuple((10 ** np.linspace(-6, 5, 45)).tolist())


@dataclass(slots=True, kw_only=True)
class FewShot:
    """The strength is chosen for each draw of shots, on a tenth of the training set from which no shot is drawn: more
    labels are seen than those of the shots. With all images, the fit is repeated with that tenth.

    The number to quote is that of all images. That of the shots is a mean over draws, with the standard error of
    `over_draws`.
    """

    name: ClassVar[str] = "few_shot"
    shots: tuple[int, ...] = (1, 2, 4, 8, 16)  # images of each class
    draws: int = 5  # of the shots
    layers: str = "pooled"  # one stream, as `PooledStreams`
    held_out: float = 0.1  # of the training set, to choose the strength on
    strengths: tuple[float, ...] = STRENGTHS
    steps: int = 1000  # of L-BFGS, at most
    seed: int = 0

    def __post_init__(self):
        if self.draws < 1 or self.steps < 1 or any(shots < 1 for shots in self.shots):
            raise ValueError(f"draws {self.draws}, steps {self.steps}, shots {self.shots}: expected 1 or more")
        if not self.strengths or min(self.strengths) <= 0:
            raise ValueError(f"strengths {self.strengths}: expected positive numbers")

    def run(self, encoder: Encoder, data: Dataset, session: Session) -> Outcome:
        """Images of the test set that can't be read are wrong; of the training set, left out. Ranks share the fits.

        Raises:
            ValueError: no training set, one of a single class or without images to hold out, several streams, or no
                scikit-learn.
        """
        if data.train is None or data.train.labels is None:
            raise ValueError(f"{data.spec} has no training set with classes: logistic regression needs one")
        view = PooledStreams(self.layers)
        train, test = (extract(encoder, images, view, session) for images in (data.train, data.test))
        if len(train.arrays) > 1:
            raise ValueError(f"layers {self.layers!r} are {len(train.arrays)} streams: expected one")
        (stream,) = train.arrays
        labels, rows = data.train.labels, np.flatnonzero(train.readable)
        fitting, held = (rows[part] for part in held_out(labels[rows], self.held_out, self.seed))
        if not len(held) or len(np.unique(labels[fitting])) < 2:
            raise ValueError(f"{len(rows)} training images: expected some of two classes, and some to hold out")
        jobs = [Job(0, 0, fitting, rows)]  # the longest first
        for shots in self.shots:
            for draw in range(self.draws):
                drawn = draw_shots(fitting, labels, shots, np.random.default_rng((self.seed, shots, draw)))
                jobs.append(Job(shots, draw, drawn, drawn))
        fit = _Fit(self, train.arrays[stream], labels, held, test.arrays[stream], test.readable, len(data.classes))
        return self._outcome(fit.all(jobs, session), data, len(held))

    def _outcome(self, fitted: "Fitted", data: Dataset, held: int) -> Outcome:
        labels, chance = data.test.labels, 1 / len(data.classes)
        top1 = [share(predictions == labels, chance) for predictions in fitted.predictions]
        metrics = classification_metrics(fitted.scores, labels)
        for shots in self.shots:
            of_draws = [metric for metric, job in zip(top1, fitted.jobs, strict=True) if job.shots == shots]
            metrics[f"top1_{shots}_shot"] = over_draws(of_draws)
        sweep = [
            {
                "shots": job.shots or "all",
                "draw": job.draw,
                "images": len(job.rows),
                "C": self.strengths[int(best)],
                "held_out": accuracy,
                "unconverged": int(late),
                **asdict(metric),
            }
            for job, metric, (best, accuracy, late) in zip(fitted.jobs, top1, fitted.facts.tolist(), strict=True)
        ]
        chosen = {key: sweep[0][key] for key in ("C", "held_out")}
        details = {
            "selection": {"on": f"{held} held-out training images", **chosen},
            "sweep": sweep,
            "per_class": per_class(fitted.scores, labels, data.classes),
            "notes": self._notes(sweep, len(data.classes)),
        }
        samples = classification_samples(fitted.scores, labels, data.test.keys)
        return Outcome(metrics=metrics, samples=samples, details=details)

    def _notes(self, sweep: list[dict], classes: int) -> list[str]:
        notes = []
        if unconverged := sum(row["unconverged"] for row in sweep):
            fits = len(sweep) * (len(self.strengths) + 1)
            notes.append(f"{unconverged} of {fits} fits had not converged after {self.steps} steps")
        for row in sweep:
            if row["shots"] != "all" and row["draw"] == 0 and row["images"] < row["shots"] * classes:
                notes.append(f"{row['shots']} shots: {row['images']} images, as not every class has that many")
        return notes


@dataclass(slots=True)
class Job:
    """A strength to be chosen with fits on `search_rows`, then a fit on `rows`. No shots: all images."""

    shots: int
    draw: int
    search_rows: np.ndarray
    rows: np.ndarray


@dataclass(slots=True)
class Fitted:
    """What came of the jobs, on every rank. scores: (n, C) of the first. predictions: (jobs, n), -1: not readable.

    facts: (jobs, 3): which strength, its accuracy on what was held out, and how many fits did not converge.
    """

    jobs: list[Job]
    scores: np.ndarray
    predictions: np.ndarray
    facts: np.ndarray


def draw_shots(rows: np.ndarray, labels: np.ndarray, shots: int, rng: np.random.Generator) -> np.ndarray:
    """As many of `rows` of each class, ascending; of a class with fewer, all."""
    order = rng.permutation(rows)
    of_class = labels[order]
    drawn = [order[of_class == number][:shots] for number in np.unique(of_class)]
    return np.sort(np.concatenate(drawn))


def over_draws(draws: list[Metric]) -> Metric:
    """The mean over draws, which share their n test samples: sqrt(variance over draws / draws + mean of p (1 - p) / n).

    With one draw nothing is known of other draws: it is the second part alone.
    """
    values = [metric.value for metric in draws]
    of_draws = np.var(values, ddof=1) / len(values) if len(values) > 1 else 0.0
    of_samples = np.mean([metric.stderr**2 for metric in draws])
    return Metric(float(np.mean(values)), float(np.sqrt(of_draws + of_samples)), draws[0].n, draws[0].chance)


def logistic_scores(
    features: np.ndarray, labels: np.ndarray, test: np.ndarray, strength: float, classes: int, steps: int
) -> tuple[np.ndarray, bool]:
    """A fit's log-probabilities (n, C) of `test` (n, D), -inf for a class without training images, and whether it ended
    without converging.
    """
    linear_model, exceptions = optional("sklearn.linear_model"), optional("sklearn.exceptions")
    regression = linear_model.LogisticRegression(C=strength, max_iter=steps, solver="lbfgs")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        regression.fit(features, labels)
    late = [warning for warning in caught if issubclass(warning.category, exceptions.ConvergenceWarning)]
    for warning in caught:
        if warning not in late:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    scores = np.full((len(test), classes), -np.inf)
    if len(test):
        scores[:, regression.classes_] = regression.predict_log_proba(test)
    return scores, bool(late)


@dataclass(slots=True)
class _Fit:
    settings: FewShot
    features: np.ndarray
    labels: np.ndarray
    held: np.ndarray
    test: np.ndarray
    readable: np.ndarray
    classes: int
    queries: np.ndarray = field(init=False)

    def __post_init__(self):
        self.queries = np.flatnonzero(self.readable)
        self.test = self.test[self.queries].astype(np.float64)

    def all(self, jobs: list[Job], session: Session) -> Fitted:
        """Every rank does every world-th job and gets what came of all."""
        scores = torch.zeros(len(self.readable), self.classes, dtype=torch.float64)
        predictions = torch.zeros(len(jobs), len(self.readable), dtype=torch.int64)
        facts = torch.zeros(len(jobs), 3, dtype=torch.float64)
        own = range(session.rank, len(jobs), session.world_size)
        with session.progress(len(own), "regression", "few-shot") as bar:
            for number in own:
                found, facts[number] = self.one(jobs[number])
                predictions[number] = -1
                predictions[number, self.queries] = torch.from_numpy(found.argmax(axis=1))
                if number == 0:
                    scores.fill_(torch.nan)
                    scores[self.queries] = torch.from_numpy(found)
                bar.update(1)
        parts = (session.sum(part).numpy() for part in (scores, predictions, facts))
        return Fitted(jobs, *parts)

    def one(self, job: Job) -> tuple[np.ndarray, torch.Tensor]:
        """Scores of the test images that could be read, and the three facts of `Fitted`."""
        held, held_labels = self._of(self.held)
        s, accuracies, unconverged = self.settings, [], 0
        for strength in s.strengths:
            scores, late = logistic_scores(*self._of(job.search_rows), held, strength, self.classes, s.steps)
            accuracies.append(np.mean(scores.argmax(axis=1) == held_labels))
            unconverged += late
        best = int(np.argmax(accuracies))  # of equals the first: the strongest penalty
        scores, late = logistic_scores(*self._of(job.rows), self.test, s.strengths[best], self.classes, s.steps)
        return scores, torch.tensor([best, accuracies[best], unconverged + late], dtype=torch.float64)

    def _of(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.features[rows].astype(np.float64), self.labels[rows]
