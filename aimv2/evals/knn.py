"""Weighted k-nearest-neighbour classification of frozen features, as DINOv2 does it.

n queries, m images of the training set, D length of a feature, K the largest k, C classes.
Source: DINOv2 (arXiv 2304.07193) and its official code: unit vectors, T = 0.07, votes weighted by a softmax over the
similarities of the nearest K.
"""

from dataclasses import asdict, dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from aimv2.evals.checks import require, require_classes, require_split
from aimv2.evals.datasets import Dataset, held_out
from aimv2.evals.encoders import Encoder
from aimv2.evals.extraction import extract
from aimv2.evals.pooled_streams import PooledStreams
from aimv2.evals.results import (
    Metric,
    Outcome,
    classification_metrics,
    classification_samples,
    per_class,
    ranks_of,
    share,
)
from aimv2.evals.session import Session

QUERIES = 256  # in one matrix product; a rank takes every world-th block, so that a product does not depend on ranks
MOST_VALUES = 1 << 25  # of the training set, and of similarities, in memory at a time: 128 MB each


@dataclass(slots=True, kw_only=True)
class KNN:
    """The stream and the k to quote are chosen on a held-out share of the training set; all others are reported too.

    The training set is prepared as the test set is, without augmentation.
    """

    name: ClassVar[str] = "knn"
    k: tuple[int, ...] = (10, 20, 100, 200)
    temperature: float = 0.07
    layers: str = "pooled"  # as `PooledStreams`
    held_out: float = 0.1  # of the training set, to choose on
    seed: int = 0  # of that choice of images

    def __post_init__(self):
        different = bool(self.k) and len(set(self.k)) == len(self.k) and all(k >= 1 and k == int(k) for k in self.k)
        require(different, "different whole numbers of neighbours, 1 or more", k=self.k)
        require(self.temperature > 0, "a positive number", temperature=self.temperature)
        require_split(self.held_out, self.seed)

    def run(self, encoder: Encoder, data: Dataset, session: Session) -> Outcome:
        """Images of the test set that can't be read are wrong; of the training set, left out.

        Raises:
            ValueError: no classes, no training set, or one too small for any k.
        """
        require_classes(data, "kNN")
        view = PooledStreams(self.layers)
        train, test = (extract(encoder, images, view, session) for images in (data.train, data.test))
        rows = np.flatnonzero(train.readable)
        fitting, held = (rows[part] for part in held_out(data.train.labels[rows], self.held_out, self.seed))
        ks, notes = self._fitting_ks(len(fitting), len(held))
        queries, labels, classes = np.flatnonzero(test.readable), data.train.labels, len(data.classes)
        sweep, best, scores = [], None, None
        for stream, features in train.arrays.items():
            of_held = nearest(Rows(features, held), Rows(features, fitting), max(ks), session)
            of_test = nearest(Rows(test.arrays[stream], queries), Rows(features, rows), max(ks), session)
            for k in ks:
                said = votes(of_held[0], labels[fitting[of_held[1]]], k, self.temperature, classes).argmax(axis=1)
                held_out_top1 = float(np.mean(said == labels[held]))
                of_all = np.full((len(data.test), classes), np.nan)
                of_all[queries] = votes(of_test[0], labels[rows[of_test[1]]], k, self.temperature, classes)
                top1 = classification_metrics(of_all, data.test.labels)["top1"]
                sweep.append({"stream": stream, "k": k, "held_out": held_out_top1, "top1": top1})
                if best is None or held_out_top1 > best["held_out"]:  # of equals the first: the smaller k
                    best, scores = sweep[-1], of_all
        return self._outcome(sweep, best, scores, data, len(held), notes)

    def _fitting_ks(self, fitting: int, held: int) -> tuple[list[int], list[str]]:
        ks = sorted(k for k in self.k if k <= fitting)
        if not ks:
            raise ValueError(
                f"k {self.k}: expected one of at most {fitting}, the training images besides {held} held out"
            )
        left_out = sorted(set(self.k) - set(ks))
        note = f"k {', '.join(map(str, left_out))} left out: {fitting} training images besides those held out"
        return ks, [note] if left_out else []

    def _outcome(
        self, sweep: list[dict], best: dict, scores: np.ndarray, data: Dataset, held: int, notes: list[str]
    ) -> Outcome:
        of_stream: dict[str, dict] = {}
        for row in sweep:
            if row["stream"] not in of_stream or row["held_out"] > of_stream[row["stream"]]["held_out"]:
                of_stream[row["stream"]] = row
        metrics = metrics_of_votes(scores, data.test.labels)
        if len(of_stream) == 1:
            metrics |= {f"top1_k{row['k']}": row["top1"] for row in sweep}
        else:
            metrics |= {f"top1@{stream}": row["top1"] for stream, row in of_stream.items()}
        chosen = {key: best[key] for key in ("stream", "k", "held_out")}
        details = {
            "selection": {"on": f"{held} held-out training images", **chosen},
            "sweep": [{**row, "top1": row["top1"].value} for row in sweep],
            "layers": {
                stream: {**asdict(row["top1"]), "k": row["k"], "held_out": row["held_out"]}
                for stream, row in of_stream.items()
            },
            "per_class": per_class(scores, data.test.labels, data.classes),
            "notes": notes,
        }
        samples = classification_samples(scores, data.test.labels, data.test.keys)
        return Outcome(metrics=metrics, samples=samples, details=details)


class Rows(NamedTuple):
    """Some rows of an array (N, D) that may lie on disk; nothing is copied."""

    array: np.ndarray
    numbers: np.ndarray

    def unit_vectors(self, start: int, stop: int, device: torch.device) -> Tensor:
        """(stop - start, D) of length 1; what is all 0 stays so."""
        block = np.ascontiguousarray(self.array[self.numbers[start:stop]], dtype=np.float32)
        return F.normalize(torch.from_numpy(block).to(device), dim=1)


def nearest(queries: Rows, gallery: Rows, k: int, session: Session) -> tuple[np.ndarray, np.ndarray]:
    """The k most similar of the gallery for each query: cosine similarities (n, k), falling, and positions (n, k).

    Exact. Of equally similar ones the first in the gallery comes first. The same on every rank. Memory: MOST_VALUES of
    the gallery or of similarities to it, this rank's queries, and its results; the gallery is read once.
    """
    n, m = len(queries.numbers), len(gallery.numbers)
    if not 1 <= k <= m:
        raise ValueError(f"k {k}: expected 1 to {m}, the size of the gallery")
    starts = range(session.rank * QUERIES, n, session.world_size * QUERIES)
    blocks = [queries.unit_vectors(start, min(start + QUERIES, n), session.device) for start in starts]
    empty = torch.empty(0, device=session.device)
    best = [(empty.expand(len(block), 0), empty.long().expand(len(block), 0)) for block in blocks]
    step = max(k, MOST_VALUES // max(gallery.array.shape[1], QUERIES))
    with session.progress(m, "image", "nearest neighbours") as bar:
        for start in range(0, m, step):
            part = gallery.unit_vectors(start, min(start + step, m), session.device)  # (M, D)
            for number, block in enumerate(blocks):
                similarities, columns = largest(block @ part.T, min(k, len(part)))  # (B, k)
                best[number] = _merge(best[number], (similarities, columns + start), k)
            bar.update(len(part))
    found = torch.zeros(n, k), torch.zeros(n, k, dtype=torch.int64)
    for start, of_block in zip(starts, best, strict=True):
        for whole, part in zip(found, of_block, strict=True):
            whole[start : start + QUERIES] = part.cpu()
    return session.sum(found[0]).numpy(), session.sum(found[1]).numpy()


def largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of (B, M), falling, and their columns (B, k); of equals the first columns.

    `topk` alone takes any of equals.
    """
    top, columns = values.topk(min(k + 1, values.shape[1]), dim=1)
    columns = columns[:, :k].sort(dim=1).values
    if k < values.shape[1]:
        tied = (top[:, k - 1] == top[:, k]).nonzero()[:, 0]  # rows where some equals are in and some are out
        if len(tied):
            rows, last = values[tied], top[tied, k - 1 : k]
            equal = rows == last
            room = k - (rows > last).sum(dim=1, keepdim=True)
            taken = (rows > last) | equal & (equal.cumsum(dim=1) <= room)
            columns[tied] = taken.nonzero()[:, 1].view(-1, k)
    values, order = values.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return values, columns.gather(1, order)


def _merge(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], k: int) -> tuple[Tensor, Tensor]:
    """Of two falling lists, the k largest; of equals those of the first."""
    similarities, numbers = (torch.cat(pair, dim=1) for pair in zip(first, second, strict=True))
    similarities, order = similarities.sort(dim=1, descending=True, stable=True)
    return similarities[:, :k], numbers.gather(1, order[:, :k])


def votes(similarities: np.ndarray, labels: np.ndarray, k: int, temperature: float, classes: int) -> np.ndarray:
    """Scores (n, C) float64 by the first k of the K nearest, whose similarities and labels are (n, K).

    Weights are a softmax over all K, as in DINOv2's code: that scales the scores of a query and no more.
    """
    weights = np.exp((similarities.astype(np.float64) - similarities[:, :1]) / temperature)  # (n, K)
    weights /= weights.sum(axis=1, keepdims=True)
    n = len(labels)
    cells = np.arange(n)[:, None] * classes + labels[:, :k]
    return np.bincount(cells.ravel(), weights[:, :k].ravel(), n * classes).reshape(n, classes)


def metrics_of_votes(scores: np.ndarray, labels: np.ndarray) -> dict[str, Metric]:
    """`classification_metrics`, but that a class without any vote is not among the first five, whatever its number."""
    metrics = classification_metrics(scores, labels)
    if "top5" in metrics:
        voted = scores[np.arange(len(labels)), labels] > 0
        metrics["top5"] = share(voted & (ranks_of(scores, labels) < 5), metrics["top5"].chance)
    return metrics
