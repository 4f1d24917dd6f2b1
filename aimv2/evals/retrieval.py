"""Image-text retrieval: for each image its captions among all captions, for each caption its image among all images.

n images, M captions, E length of a feature; Q queries and G things to be found, which are the one or the other.
Source: the recall of CLIP (arXiv 2103.00020) and its predecessors: R@k is the share of queries with anything of
theirs among the first k. (COCO's 5,000 test images of Karpathy's split have 5 captions each, Flickr30k's 1,000 too.)
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from aimv2.evals.datasets import Dataset
from aimv2.evals.extraction import extract
from aimv2.evals.results import Metric, Outcome
from aimv2.evals.session import Session
from aimv2.evals.text_image import ImageFeatures, TextImageModel

TEXTS = 256  # in a forward pass
MOST_VALUES = 1 << 24  # similarities in memory at a time: 64 MB
NEVER = np.iinfo(np.int64).max
TIE = 1e-6  # similarities this near are equal: sums of fp32 in another order differ by less


@dataclass(slots=True, kw_only=True)
class Retrieval:
    """Of equal similarities the wrong ones come first: a model that gives all the same has found nothing."""

    name: ClassVar[str] = "retrieval"
    trains: ClassVar[bool] = False
    k: tuple[int, ...] = (1, 5, 10)

    def __post_init__(self):
        if not self.k or min(self.k) < 1 or len(set(self.k)) < len(self.k):
            raise ValueError(f"k {self.k}: expected different numbers, 1 or more")

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
        of_images = np.full(len(captions), NEVER)
        of_images[readable] = wrong_before(images[readable], described, readable, owners, session)
        of_texts = wrong_before(described, images[readable], owners, readable, session)
        return self._outcome(data, owners, of_images, of_texts, captions)

    def _outcome(
        self,
        data: Dataset,
        owners: np.ndarray,
        of_images: np.ndarray,
        of_texts: np.ndarray,
        captions: Sequence[Sequence[str]],
    ) -> Outcome:
        n, texts = len(captions), len(owners)
        counts = np.bincount(owners, minlength=n)
        described = counts > 0
        metrics = {}
        for k in sorted(self.k):
            chance = float(np.mean(chance_of_any(counts[described], texts, k)))
            metrics[f"image_to_text_r{k}"] = recall(of_images[described] < k, np.flatnonzero(described), chance)
        for k in sorted(self.k):
            metrics[f"text_to_image_r{k}"] = recall(of_texts < k, owners, min(k / n, 1))
        of_captions = np.split(of_texts, np.cumsum(counts)[:-1])
        samples = [
            {
                "sample": data.test.keys[i],
                "correct": bool(of_images[i] < 1),
                "rank": _rank(of_images[i]),
                "caption_ranks": [_rank(before) for before in of_captions[i]],
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


def wrong_before(
    queries: Tensor, gallery: Tensor, query_owners: np.ndarray, owners: np.ndarray, session: Session
) -> np.ndarray:
    """How many wrong things (Q,) come before the first right one; NEVER where there is none.

    queries (Q, E) and gallery (G, E) are unit vectors; right are those of one owner, (Q,) and (G,). A wrong one that is
    as similar as the best right one, within TIE, comes before it.
    """
    if not len(gallery):
        return np.full(len(queries), NEVER)
    step = max(1, MOST_VALUES // len(gallery))
    gallery = gallery.to(session.device)
    owners = torch.from_numpy(owners).to(session.device)
    query_owners = torch.from_numpy(query_owners).to(session.device)
    before = torch.zeros(len(queries), dtype=torch.int64)
    for start in range(session.rank * step, len(queries), session.world_size * step):
        similarities = queries[start : start + step].to(session.device) @ gallery.T  # (q, G)
        right = query_owners[start : start + step, None] == owners
        best = similarities.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
        ahead = (similarities >= best - TIE) & ~right
        before[start : start + step] = torch.where(right.any(dim=1), ahead.sum(dim=1), NEVER).cpu()
    return session.sum(before).numpy()


def recall(hits: np.ndarray, clusters: np.ndarray, chance: float) -> Metric:
    """The share of hits. The standard error takes queries of one cluster, captions of one image, as dependent."""
    value = float(np.mean(hits))
    residuals = np.bincount(clusters, weights=hits - value)
    return Metric(value, float(np.sqrt(np.sum(residuals**2))) / len(hits), len(hits), chance)


def chance_of_any(counts: np.ndarray, total: int, k: int) -> np.ndarray:
    """That any of `counts` (n,) is among the first k of `total` in random order: 1 - C(total - c, k) / C(total, k)."""
    drawn = np.arange(min(k, total))
    missed = (total - counts[:, None] - drawn) / (total - drawn)  # (n, k); below 0 only behind a 0
    return 1 - missed.prod(axis=1)


def _rank(before: np.int64) -> int | None:
    """From 1."""
    return None if before == NEVER else int(before) + 1
