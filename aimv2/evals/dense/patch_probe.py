"""Segmentation by patches: a linear classifier on each patch's frozen features, several learning rates at once.

n images, h x w patches of the common grid, N = h*w, D width, K classes, R learning rates.
The head is DINOv2's for segmentation (arXiv 2304.07193, section 7.4), a BatchNorm without parameters and a linear
layer, judged by patches and not by pixels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aimv2.evals.datasets import Dataset, ImageSet, held_out
from aimv2.evals.dense.patch_labels import BACKGROUND, IGNORED, patch_classes, patch_labels
from aimv2.evals.dense.segmentation import Counts, class_table, segmentation_metrics
from aimv2.evals.encoders import Encoder, parse_layers, streams
from aimv2.evals.extraction import extract
from aimv2.evals.results import Outcome
from aimv2.evals.session import Session

EPS = 1e-6  # of the BatchNorm, as the attentive probe's
HEADLINE = "miou"
MOST_NAMED = 5  # images in a note
NOT_READ = -1  # the prediction for patches of an image that can't be read


@dataclass(frozen=True, slots=True)
class PatchGrid:
    """A view of the patches of some layers, resized to grid x grid; 0: as they are.

    layers: as `parse_layers` reads it.
    """

    layers: str = "output"
    grid: int = 16

    @property
    def key(self) -> str:
        return f"patches {self.layers.replace(' ', '')} {self.grid or 'as they are'}"

    def __call__(self, encoder: Encoder, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, S, S) -> {stream: (B, N, D)}.

        Raises ValueError for a layer whose patches are no grid.
        """
        found = streams(encoder, images, parse_layers(self.layers, encoder.depth))
        return {name: self._resize(name, patches, encoder) for name, patches in found.items()}

    def sides(self, encoder: Encoder) -> tuple[int, int]:
        """(h, w)"""
        return (self.grid, self.grid) if self.grid else encoder.grid

    def _resize(self, name: str, patches: Tensor, encoder: Encoder) -> Tensor:
        h, w = encoder.grid
        if patches.shape[1] != h * w:  # a stage of a convnet
            h = w = math.isqrt(patches.shape[1])
            if h * w != patches.shape[1]:
                raise ValueError(f"{encoder.spec}: {patches.shape[1]} patches of {name} are no square")
        sides = self.sides(encoder)
        if (h, w) == sides:
            return patches
        patches = patches.transpose(1, 2).unflatten(2, (h, w))  # (B, D, h, w)
        patches = F.interpolate(patches, sides, mode="bilinear", antialias=True)
        return patches.flatten(2).transpose(1, 2)


@dataclass(slots=True, kw_only=True)
class PatchProbe:
    """Layer and learning rate are chosen by the mean IoU on a held-out share of the training images.

    All encoders are compared on the same grid over what they see, to which their features are resized. A patch is what
    most of its mask is, or what the box around its centre is, or background. Training images are not augmented.
    """

    name: ClassVar[str] = "patch_probe"
    layers: str = "output"  # as `parse_layers` reads it
    grid: int = 16  # cells a side; 0: the encoder's own patches
    lrs: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    weight_decay: float = 1e-4
    epochs: int = 20
    batch: int = 32  # images
    held_out: float = 0.1  # of the training images, to choose on
    seed: int = 0  # of that choice, of the order of images, and of the bootstrap

    def __post_init__(self):
        if not self.lrs or min(self.lrs) <= 0 or self.epochs < 1 or self.batch < 1 or self.grid < 0:
            raise ValueError(f"lrs, epochs and batch must be positive, grid 0 or more: got {self}")

    def run(self, encoder: Encoder, data: Dataset, session: Session) -> Outcome:
        """Patches of test images that can't be read are wrong; training images that can't be read are left out.

        Raises:
            ValueError: no training set, neither masks nor boxes, or no patches that count.
        """
        if data.train is None:
            raise ValueError(f"{data.spec} has no training set: a patch probe needs one")
        names, view = patch_classes(data), PatchGrid(self.layers, self.grid)
        sides, config = view.sides(encoder), encoder.processor.config
        labels, test_labels = (
            patch_labels(images, config, sides, len(names), session) for images in (data.train, data.test)
        )
        train, test = (extract(encoder, images, view, session) for images in (data.train, data.test))
        labelled = (labels != IGNORED).any(axis=1)
        rows = np.flatnonzero(train.readable & labelled)
        if len(rows) < 2:
            raise ValueError(f"{data.spec}: {len(rows)} training images with labelled patches, expected at least 2")
        fitting, held = (rows[part] for part in held_out(np.zeros(len(rows)), self.held_out, self.seed))
        common = np.bincount(labels[rows][labels[rows] != IGNORED], minlength=len(names))
        found = []
        for stream, features in train.arrays.items():
            heads = self.train(features, labels, fitting, len(names), session, stream)
            ious = [
                float(_mean_iou(Counts.of(predicted, labels[held], len(names))))
                for predicted in heads.predict(features, held, session)
            ]
            found.append(_Stream(stream, heads, ious))
        for one in found:
            one.test(test.arrays[one.name], test.readable, test_labels, len(names), session)
        outcome = self._outcome(found, names, common, data.test.keys)
        outcome.details["selection"]["on"] = f"{len(held)} held-out training images"
        outcome.details["grid"] = list(sides)
        for images, has in ((data.train, labelled), (data.test, (test_labels != IGNORED).any(axis=1))):
            outcome.details["notes"] += _left_out(images, has)
        return outcome

    def train(
        self,
        features: np.ndarray,
        labels: np.ndarray,
        rows: np.ndarray,
        classes: int,
        session: Session,
        name: str = "patches",
    ) -> "PatchHeads":
        """Heads of all learning rates on some rows of features (n, N, D) and labels (n, N).

        Every rank does the same: it is the features that take time.
        """
        heads = PatchHeads(features.shape[-1], classes, len(self.lrs)).to(session.device)
        groups = [{"params": list(h.parameters()), "lr": lr} for h, lr in zip(heads.linears, self.lrs, strict=True)]
        optimizer = torch.optim.AdamW(groups, weight_decay=self.weight_decay)
        rng, number = np.random.default_rng(self.seed), -(-len(rows) // self.batch)
        steps, step = number * self.epochs, 0
        with session.progress(steps, "step", f"patch probe: {name}") as bar:
            for _ in range(self.epochs):
                for batch in np.array_split(rng.permutation(rows), number):
                    batch = np.sort(batch)  # as they lie on the disk
                    for group, lr in zip(optimizer.param_groups, self.lrs, strict=True):
                        group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
                    target = torch.from_numpy(labels[batch]).to(session.device).flatten()  # (BN,)
                    losses = heads.losses(_read(features, batch, session).flatten(0, 1), target)
                    optimizer.zero_grad()
                    losses.sum().backward()
                    optimizer.step()
                    step += 1
                    bar.update(1)
        return heads.eval()

    def _outcome(
        self, found: list["_Stream"], names: tuple[str, ...], common: np.ndarray, keys: Sequence[str]
    ) -> Outcome:
        """Of the best stream, and each one's headline."""
        background = 0 if names[0] == BACKGROUND else None
        metrics = {one.name: segmentation_metrics(one.counts, common, background, self.seed) for one in found}
        best = max(found, key=lambda one: max(one.ious))  # of equals the first
        quoted = dict(metrics[best.name])
        if len(found) > 1:
            quoted |= {f"{HEADLINE}@{name}": of_stream[HEADLINE] for name, of_stream in metrics.items()}
        chosen = {one.name: {"lr": self.lrs[one.chosen], "held_out": max(one.ious)} for one in found}
        counts = best.counts
        details = {
            "selection": {"stream": best.name, **chosen[best.name]},
            "sweep": [
                {"stream": one.name, "lr": rate, "held_out": iou}
                for one in found
                for rate, iou in zip(self.lrs, one.ious, strict=True)
            ],
            "layers": chosen,
            "per_class": class_table(counts, names),
            "classes": list(names),
            "patches": int(counts.labelled.sum()),
            "notes": [f"chance is {names[int(common.argmax())]} everywhere, the most common class of training patches"],
        }
        samples = [
            {"sample": key, "patches": int(n), "correct": float(hits / n)}
            for key, n, hits in zip(keys, counts.labelled.sum(1), counts.hits.sum(1), strict=True)
            if n
        ]
        return Outcome(metrics=quoted, samples=samples, details=details, tensors=best.heads.tensors(best.chosen))


class PatchHeads(nn.Module):
    """R linear layers, which share one BatchNorm: its statistics depend on no weight. All begin at zero."""

    def __init__(self, width: int, classes: int, number: int):
        super().__init__()
        self.bn = nn.BatchNorm1d(width, affine=False, eps=EPS)
        self.linears = nn.ModuleList(nn.Linear(width, classes) for _ in range(number))
        for linear in self.linears:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def losses(self, patches: Tensor, labels: Tensor) -> Tensor:
        """(BN, D) and (BN,) -> (R,), each the mean over patches that count; 0 if there are none."""
        x, counted = self.bn(patches), labels != IGNORED
        x, labels = x[counted], labels[counted]
        sums = [F.cross_entropy(linear(x), labels, reduction="sum") for linear in self.linears]
        return torch.stack(sums) / max(1, len(labels))

    @torch.no_grad()
    def predict(self, features: np.ndarray, rows: np.ndarray, session: Session) -> np.ndarray:
        """Some rows of (n, N, D) -> (R, rows, N), the classes; of equal scores the lowest."""
        found = np.empty((len(self.linears), len(rows), features.shape[1]), np.int64)
        for start in range(0, len(rows), session.batch_size):
            x = self.bn(_read(features, rows[start : start + session.batch_size], session).flatten(0, 1))
            for number, linear in enumerate(self.linears):
                guesses = linear(x).cpu().numpy().argmax(axis=1)
                found[number, start : start + session.batch_size] = guesses.reshape(-1, features.shape[1])
        return found

    def tensors(self, number: int) -> dict[str, Tensor]:
        """One head: "bn.running_mean", "bn.running_var" (D,), "linear.weight" (K, D), "linear.bias" (K,)."""
        linear = self.linears[number]
        return {
            "bn.running_mean": self.bn.running_mean,
            "bn.running_var": self.bn.running_var,
            "linear.weight": linear.weight.detach(),
            "linear.bias": linear.bias.detach(),
        }

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> "PatchHeads":
        """The inverse of `tensors`: one head, ready to predict."""
        classes, width = tensors["linear.weight"].shape
        heads = cls(width, classes, 1).eval()
        state = {name.replace("linear.", "linears.0."): value for name, value in tensors.items()}
        heads.load_state_dict(state | {"bn.num_batches_tracked": torch.tensor(0)})
        return heads


@dataclass(slots=True)
class _Stream:
    """The heads of a layer, the mean IoU of each on the held-out images, and what the best of them says of the test."""

    name: str
    heads: PatchHeads
    ious: list[float]
    counts: Counts = field(init=False)

    @property
    def chosen(self) -> int:
        return int(np.argmax(self.ious))

    def test(
        self, features: np.ndarray, readable: np.ndarray, labels: np.ndarray, classes: int, session: Session
    ) -> None:
        """Features (n, N, D), readable (n,), labels (n, N)."""
        rows = np.flatnonzero(readable)
        predictions = np.full(labels.shape, NOT_READ)
        predictions[rows] = self.heads.predict(features, rows, session)[self.chosen]
        self.counts = Counts.of(predictions, labels, classes)


def _left_out(images: ImageSet, labelled: np.ndarray) -> list[str]:
    """A note, if there are images without labelled patches; labelled: (n,) bool."""
    without = [images.keys[int(row)] for row in np.flatnonzero(~labelled)]
    if not without:
        return []
    shown = ", ".join(without[:MOST_NAMED]) + (", ..." if len(without) > MOST_NAMED else "")
    return [f"{len(without)} {images.split} images left out, whose mask can't be read or labels no patch: {shown}"]


def _read(features: np.ndarray, rows: np.ndarray, session: Session) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(features[rows], dtype=np.float32)).to(session.device)


def _mean_iou(counts: Counts) -> float:
    labelled, guessed, hits = (part.sum(axis=0) for part in (counts.labelled, counts.guessed, counts.hits))
    union = labelled + guessed - hits
    return float((hits[union > 0] / union[union > 0]).mean())
