"""Logistic regression on frozen features, on a few images of each class and on all of them.

n test images, D length of a feature, C classes; the regression's own C, the inverse of its penalty, is the "strength".
Source: DINOv2 (arXiv 2304.07193) and its official code: L-BFGS, 45 strengths from 1e-6 to 1e5, the best on a held-out
tenth of the training set, then a fit on all of it. There cuML fits, here scikit-learn, with DINOv2's tolerance: at
scikit-learn's own of 1e-4 where a fit ends depends on the scale of the features.
"""

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from aimv2.evals.checks import all_positive, require, require_classes, require_split
from aimv2.evals.datasets import Dataset, held_out
from aimv2.evals.encoders import Encoder
from aimv2.evals.encoders.packages import optional
from aimv2.evals.extraction import extract, feature_shapes
from aimv2.evals.feature_store import fingerprint
from aimv2.evals.pooled_streams import PooledStreams
from aimv2.evals.results import Metric, Outcome, classification_metrics, classification_samples, per_class, share
from aimv2.evals.session import Session
from aimv2.whole_files import whole_file

Samples = Callable[[], tuple[np.ndarray, np.ndarray]]  # features (m, D) in float64 and labels (m,)

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
    tolerance: float = 1e-12  # of the gradient
    seed: int = 0

    def __post_init__(self):
        require(self.draws >= 1, "1 or more", draws=self.draws)
        require(self.steps >= 1, "1 or more", steps=self.steps)
        different = len(set(self.shots)) == len(self.shots) and all(shots >= 1 for shots in self.shots)
        require(different, "different numbers, 1 or more", shots=self.shots)
        require(all_positive(self.strengths), "positive numbers", strengths=self.strengths)
        require(all_positive([self.tolerance]), "a positive number", tolerance=self.tolerance)
        require_split(self.held_out, self.seed)

    def run(self, encoder: Encoder, data: Dataset, session: Session) -> Outcome:
        """Images of the test set that can't be read are wrong; of the training set, left out. Ranks share the fits.

        Raises:
            ValueError: no classes, no training set, one of a single class or without images to hold out, several
                streams, or no scikit-learn.
        """
        require_classes(data, "logistic regression")
        view = PooledStreams(self.layers)
        streams = list(feature_shapes(encoder, view, session))
        if len(streams) > 1:
            raise ValueError(f"layers {self.layers!r} are {len(streams)} streams: expected one")
        train, test = (extract(encoder, images, view, session) for images in (data.train, data.test))
        labels, rows = data.train.labels, np.flatnonzero(train.readable)
        fitting, held = (rows[part] for part in held_out(labels[rows], self.held_out, self.seed))
        if not len(held) or len(np.unique(labels[fitting])) < 2:
            raise ValueError(f"{len(rows)} training images: expected some of two classes, and some to hold out")
        jobs = [Job(0, 0, fitting, rows)]  # the longest first
        for shots in self.shots:
            for draw in range(self.draws):
                drawn = draw_shots(fitting, labels, shots, np.random.default_rng((self.seed, shots, draw)))
                jobs.append(Job(shots, draw, drawn, drawn))
        fits = _Fits(
            settings=self,
            features=train.arrays[streams[0]],
            labels=labels,
            held=held,
            test=test.arrays[streams[0]],
            readable=test.readable,
            classes=len(data.classes),
            session=session,
            folder=self._folder(encoder, data, session),
        )
        return self._outcome(fits.all(jobs), data, len(held))

    def _folder(self, encoder: Encoder, data: Dataset, session: Session) -> Path | None:
        """Where the fits are kept, with all that decides them in its name."""
        if session.folder is None:
            return None
        splits = {"train": data.train.identity, "test": data.test.identity}
        key = fingerprint({"protocol": self.name, **asdict(self), "encoder": encoder.describe(), **splits})
        return session.folder / "few_shot" / key

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
                "C": self.strengths[best],
                "held_out": float(fitted.accuracies[number, best]),
                "unconverged": int(fitted.unconverged[number].sum()),
                **asdict(metric),
            }
            for number, (job, metric, best) in enumerate(zip(fitted.jobs, top1, fitted.best.tolist(), strict=True))
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

    accuracies: (jobs, strengths) on what was held out. best: (jobs,) the strength chosen. unconverged: (jobs,
    strengths + 1) bool, the fits with each strength, then the one whose scores these are.
    """

    jobs: list[Job]
    scores: np.ndarray
    predictions: np.ndarray
    accuracies: np.ndarray
    best: np.ndarray
    unconverged: np.ndarray


def draw_shots(rows: np.ndarray, labels: np.ndarray, shots: int, rng: np.random.Generator) -> np.ndarray:
    """As many of `rows` of each class, ascending; of a class with fewer, all."""
    order = rng.permutation(rows)
    of_class = labels[order]
    drawn = [order[of_class == number][:shots] for number in np.unique(of_class)]
    return np.sort(np.concatenate(drawn))


def over_draws(draws: list[Metric]) -> Metric:
    """The mean over draws, which share their n test samples: sqrt(variance over draws / draws + mean of p (1 - p) / n).

    With one draw nothing is known of other draws: it is the second part alone. Where draws err on different samples, it
    is somewhat too large, since the mean over draws varies less with the samples than each does.
    """
    values = [metric.value for metric in draws]
    of_draws = np.var(values, ddof=1) / len(values) if len(values) > 1 else 0.0
    of_samples = np.mean([metric.stderr**2 for metric in draws])
    return Metric(float(np.mean(values)), float(np.sqrt(of_draws + of_samples)), draws[0].n, draws[0].chance)


def logistic_scores(
    features: np.ndarray,
    labels: np.ndarray,
    test: np.ndarray,
    strength: float,
    classes: int,
    steps: int,
    tolerance: float,
) -> tuple[np.ndarray, bool]:
    """A fit's log-probabilities (n, C) of `test` (n, D), -inf for a class without training images, and whether it
    converged before its last step.
    """
    linear_model, exceptions = optional("sklearn.linear_model"), optional("sklearn.exceptions")
    regression = linear_model.LogisticRegression(C=strength, max_iter=steps, tol=tolerance, solver="lbfgs")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", exceptions.ConvergenceWarning)  # said too of a loss as exact as float64 is
        regression.fit(features, labels)
    scores = np.full((len(test), classes), -np.inf)
    if len(test):
        scores[:, regression.classes_] = regression.predict_log_proba(test)
    return scores, bool(regression.n_iter_.max() < steps)


@dataclass(slots=True, kw_only=True)
class _Fits:
    """The fits of all jobs, which ranks take in turn and keep in the folder; what is there is not done again."""

    settings: FewShot
    features: np.ndarray
    labels: np.ndarray
    held: np.ndarray
    test: np.ndarray
    readable: np.ndarray
    classes: int
    session: Session
    folder: Path | None

    def all(self, jobs: list[Job]) -> Fitted:
        rank, world_size, n = self.session.rank, self.session.world_size, len(self.readable)
        strengths = len(self.settings.strengths)
        accuracies = torch.zeros(len(jobs), strengths, dtype=torch.float64)
        unconverged = torch.zeros(len(jobs), strengths + 1, dtype=torch.int32)
        scores = torch.zeros(n, self.classes, dtype=torch.float64)
        predictions = torch.zeros(len(jobs), n, dtype=torch.int64)
        held = cache(partial(self._of, self.held))
        with self.session.progress(len(jobs) * (strengths + 1), "fit", "few-shot") as bar:
            for number, job in enumerate(jobs):
                fitting = cache(partial(self._of, job.search_rows))  # in float64 once, and only if need be
                for place in range((rank - number * strengths) % world_size, strengths, world_size):
                    search = partial(self._search, fitting, held, place)
                    accuracies[number, place], unconverged[number, place] = self._kept(f"{number}-{place}", search)
                    bar.update(world_size)
            accuracies = self.session.sum(accuracies).numpy()
            best = accuracies.argmax(axis=1)  # of equals the first: the strongest penalty
            for number in range(rank, len(jobs), world_size):
                final = partial(self._final, jobs[number].rows, int(best[number]))
                found, unconverged[number, -1] = self._kept(f"{number}-test", final)
                predictions[number] = torch.from_numpy(np.where(self.readable, found.argmax(axis=1), -1))
                if number == 0:
                    scores[:] = torch.from_numpy(found)
                bar.update(world_size)
        scores, predictions, unconverged = (
            self.session.sum(part).numpy() for part in (scores, predictions, unconverged)
        )
        return Fitted(jobs, scores, predictions, accuracies, best, unconverged > 0)

    def _search(self, fitting: Samples, held: Samples, place: int) -> tuple[np.ndarray, bool]:
        """The accuracy of a strength on what is held out, and whether its fit did not converge."""
        features, labels = held()
        scores, converged = self._scores(*fitting(), features, place)
        return np.mean(scores.argmax(axis=1) == labels), not converged

    def _final(self, rows: np.ndarray, place: int) -> tuple[np.ndarray, bool]:
        """Scores of the test images (n, C), NaN where they could not be read, and whether the fit did not converge."""
        scores = np.full((len(self.readable), self.classes), np.nan)
        test = self.test[self.readable].astype(np.float64)
        scores[self.readable], converged = self._scores(*self._of(rows), test, place)
        return scores, not converged

    def _scores(
        self, features: np.ndarray, labels: np.ndarray, test: np.ndarray, place: int
    ) -> tuple[np.ndarray, bool]:
        s = self.settings
        return logistic_scores(features, labels, test, s.strengths[place], self.classes, s.steps, s.tolerance)

    def _kept(self, name: str, compute: Callable[[], tuple[np.ndarray, bool]]) -> tuple[np.ndarray, bool]:
        """What `compute` finds, or found before this process began."""
        path = None if self.folder is None else self.folder / f"{name}.npz"
        if path is not None and path.exists():
            with np.load(path) as kept:
                return kept["found"][()], bool(kept["unconverged"])
        found, unconverged = compute()
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as temporary, open(temporary, "wb") as file:
                np.savez(file, found=found, unconverged=unconverged)
        return found, unconverged

    def _of(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.features[rows].astype(np.float64), self.labels[rows]
