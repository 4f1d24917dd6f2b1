"""Image-text retrieval: for each image its captions among all captions, for each caption its image among all images.

n images, M captions, E length of a feature; Q queries and G things to be found, which are the one or the other.
Source: the recall of CLIP (arXiv 2103.00020) and its predecessors: R@k is the share of queries with anything of
theirs among the first k. Equal similarities, as of one caption of two images, count as if they came in random order:
R@k is then the expectation. (COCO's 5,000 test images of Karpathy's split have 5 captions each, Flickr30k's 1,000 too.)
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from aimv2.evals.checks import require
from aimv2.evals.datasets import Dataset
from aimv2.evals.extraction import extract
from aimv2.evals.results import Metric, Outcome
from aimv2.evals.session import Session
from aimv2.evals.text_image import ImageFeatures, TextImageModel

TEXTS = 256  # in a forward pass
MOST_VALUES = 1 << 24  # similarities in memory at a time: 64 MB
TIE = 1e-6  # similarities this near are equal: sums of fp32 in another order differ by less


@dataclass(slots=True, kw_only=True)
class Retrieval:
    """Of equal similarities each order is as likely: a model that gives all the same is at chance."""

    name: ClassVar[str] = "retrieval"
    trains: ClassVar[bool] = False
    k: tuple[int, ...] = (1, 5, 10)

    def __post_init__(self):
        different = bool(self.k) and len(set(self.k)) == len(self.k) and all(k >= 1 and k == int(k) for k in self.k)
        require(different, "different whole numbers, 1 or more", k=self.k)

    def run(self, model: TextImageModel, data: Dataset, session: Session) -> Outcome:
        """Images may have different numbers of captions. Those that can't be read are never found, and find nothing.

        Raises:
            ValueError: no captions.
        """
        if data.test.captions is None:
            raise ValueError(f"{data.spec} has no captions: retrieval needs them")
        captions = [list(captions) for captions in data.test.captions]
        texts = [caption for of_image in captions for caption in of_image]
        owners = np.repeat(np.arange(len(captions)), list(map(len, captions)))  # (M,)
        if not texts:
            raise ValueError(f"{data.spec} has no captions: retrieval needs them")
        found = extract(model, data.test, ImageFeatures(), session)
        images = torch.from_numpy(np.array(found.arrays["image"]))  # (n, E)
        described = embed_texts(model, texts, session)  # (M, E)
        readable = np.flatnonzero(found.readable)
        of_images = Ranks(*np.zeros((3, len(captions)), np.int64))
        for whole, part in zip(of_images, ranks(images[readable], described, readable, owners, session), strict=True):
            whole[readable] = part
        of_texts = ranks(described, images[readable], owners, readable, session)
        return self._outcome(data, owners, of_images, of_texts, captions)

    def _outcome(
        self,
        data: Dataset,
        owners: np.ndarray,
        of_images: "Ranks",
        of_texts: "Ranks",
        captions: Sequence[Sequence[str]],
    ) -> Outcome:
        n, texts = len(captions), len(owners)
        counts = np.bincount(owners, minlength=n)
        described = counts > 0
        metrics = {}
        for k in sorted(self.k):
            chance = float(np.mean(chance_of_any(counts[described], texts, k)))
            metrics[f"image_to_text_r{k}"] = recall(of_images.within(k)[described], np.flatnonzero(described), chance)
        for k in sorted(self.k):
            metrics[f"text_to_image_r{k}"] = recall(of_texts.within(k), owners, min(k / n, 1))
        first, image_ranks = of_images.within(1).tolist(), of_images.expected()
        caption_ranks = np.split(np.array(of_texts.expected(), object), np.cumsum(counts)[:-1])
        samples = [
            {
                "sample": data.test.keys[i],
                "correct": bool(first[i]) if first[i] in (0, 1) else first[i],
                "rank": image_ranks[i],
                "caption_ranks": caption_ranks[i].tolist(),
            }
            for i in np.flatnonzero(described).tolist()
        ]
        owners_of = Counter(caption for of_image in captions for caption in set(of_image))
        shared = sum(count > 1 for count in owners_of.values())
        notes = [f"{n - int(described.sum())} images have no captions: they can only be mistaken for others"] * (
            not described.all()
        )
        if shared:
            notes.append(f"{shared} captions belong to several images, of which the others count as wrong")
        details = {"images": n, "captions": texts, "notes": notes}
        return Outcome(metrics=metrics, samples=samples, details=details)


def embed_texts(model: TextImageModel, texts: Sequence[str], session: Session) -> Tensor:
    """Unit vectors (M, E) on every rank; each encodes every world-th batch."""
    starts = range(session.rank * TEXTS, len(texts), session.world_size * TEXTS)
    width = model.encode_text(model.tokenizer(texts[:1])).shape[1]
    features = torch.zeros(len(texts), width)
    with session.progress(len(texts), "text", "texts") as bar:
        for start in starts:
            batch = texts[start : start + TEXTS]
            features[start : start + TEXTS] = model.encode_text(model.tokenizer(batch)).cpu()
            bar.update(len(batch) * session.world_size)
    return session.sum(features)


class Ranks(NamedTuple):
    """Where the first right thing of each query (Q,) comes: behind `ahead` wrong ones that are more similar, among
    `wrong` and `right` ones as similar as it, in random order. No `right`: nowhere.
    """

    ahead: np.ndarray
    wrong: np.ndarray
    right: np.ndarray

    def within(self, k: int) -> np.ndarray:
        """The probability (Q,) that it is among the first k."""
        return chance_of_any(self.right, self.wrong + self.right, k - self.ahead)

    def expected(self) -> list[float | int | None]:
        """Its rank (Q,) from 1, on average over the orders; None for nowhere."""
        found = self.ahead + 1 + self.wrong / (self.right + 1)
        return [
            None if not right else int(rank) if rank == int(rank) else rank
            for rank, right in zip(found.tolist(), self.right.tolist(), strict=True)
        ]


def ranks(queries: Tensor, gallery: Tensor, query_owners: np.ndarray, owners: np.ndarray, session: Session) -> Ranks:
    """Where each query finds the first thing of its own.

    queries (Q, E) and gallery (G, E) are unit vectors; right are those of one owner, (Q,) and (G,). As similar as the
    best right one is what is within TIE of it.
    """
    found = torch.zeros(3, len(queries), dtype=torch.int64)
    step = max(1, MOST_VALUES // max(1, len(gallery)))
    gallery = gallery.to(session.device)
    owners = torch.from_numpy(owners).to(session.device)
    query_owners = torch.from_numpy(query_owners).to(session.device)
    for start in range(session.rank * step, len(queries) if len(gallery) else 0, session.world_size * step):
        similarities = queries[start : start + step].to(session.device) @ gallery.T  # (q, G)
        right = query_owners[start : start + step, None] == owners
        best = similarities.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
        ahead, tied = similarities > best + TIE, (similarities - best).abs() <= TIE
        counts = torch.stack([part.sum(dim=1) for part in (ahead, tied & ~right, tied & right)])
        found[:, start : start + step] = torch.where(right.any(dim=1), counts, 0).cpu()
    return Ranks(*session.sum(found).numpy())


def recall(hits: np.ndarray, clusters: np.ndarray, chance: float) -> Metric:
    """The mean of hits, which are true, false or a probability. The standard error takes queries of one cluster,
    captions of one image, as dependent.
    """
    value = float(np.mean(hits))
    residuals = np.bincount(clusters, weights=hits - value)
    return Metric(value, float(np.sqrt(np.sum(residuals**2))) / len(hits), len(hits), chance)


def chance_of_any(counts: np.ndarray, total: np.ndarray | int, k: np.ndarray | int) -> np.ndarray:
    """That any of `counts` (n,) is among the first k of `total` in random order: 1 - C(total - c, k) / C(total, k)."""
    counts, total, k = np.broadcast_arrays(counts, total, np.minimum(k, total))
    missed = np.ones(len(counts))
    for drawn in range(k.max(initial=0)):
        left = np.maximum(total - counts - drawn, 0) / np.maximum(total - drawn, 1)
        missed *= np.where(drawn < k, left, 1)
    return 1 - missed
