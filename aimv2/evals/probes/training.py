"""One loop that trains the heads of many sweeps, and goes on where it was stopped.

A sweep is the heads of one stream of features, which differ in their settings. All sweeps see the same batches.

B images, S heads of a sweep, C classes, n images of a split.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from aimv2.evals.datasets import held_out
from aimv2.evals.probes.features import CachedFeatures, Features, OnlineFeatures
from aimv2.evals.session import Session
from aimv2.whole_files import whole_file

CURVE_POINTS = 100
SAVE_SECONDS = 60.0  # between states of training, which are saved at the end of an epoch only


class Sweep(Protocol):
    """The heads of one stream."""

    settings: list[dict]  # of each head, as JSON

    def step(self, x: Tensor, labels: Tensor, step: int, steps: int, session: Session) -> Tensor:
        """Update all heads from this rank's part of a batch; its part of each head's mean loss (S,). B may be 0."""

    def scores(self, x: Tensor) -> Tensor:
        """(B, ...), which may be overwritten, -> (S, B, C)."""

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...

    def tensors(self, number: int) -> dict[str, Tensor]:
        """The weights of a head."""


def split_rows(
    labels: np.ndarray, readable: np.ndarray, select_on: str, share: float, seed: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """(rows to train on, rows to choose on).

    The split is of all rows, whether known to be readable or not, so that it is the same in each mode. None: the choice
    is made on the test set, and all is trained on. Raises ValueError if nothing can be read.
    """
    rows, held = (np.arange(len(labels)), None) if select_on == "test" else held_out(labels, share, seed)
    if not readable[rows].any():
        raise ValueError(f"none of {len(rows)} training images can be read")
    return rows[readable[rows]], held


class Trained(NamedTuple):
    """losses: of each sweep the mean loss of every head over hundredths of the training, (points, S).

    used, unreadable: (n,) bool, which training images have been trained on, and which could not be read.
    """

    losses: dict[str, np.ndarray]
    used: np.ndarray
    unreadable: np.ndarray


@dataclass(slots=True, kw_only=True)
class Training:
    """The loop, in which all sweeps take the same `steps` steps.

    In each epoch the rows come in another order, and what does not fill a batch is left out; fewer rows than a batch
    are one. Nothing depends on ranks or on where an earlier run stopped, but for the rounding of sums over ranks.

    rows: of the training split. path: of the state that is saved and gone on from, with all that decides the result in
    its name; None: nothing is saved.
    """

    sweeps: dict[str, Sweep]
    source: CachedFeatures | OnlineFeatures
    labels: np.ndarray
    rows: np.ndarray
    batch_size: int
    steps: int
    seed: int
    session: Session
    path: Path | None
    losses: dict[str, Tensor] = field(default_factory=dict, init=False)  # (CURVE_POINTS, S) sums of this rank
    counts: Tensor = field(init=False)  # (2, n) how often this rank has read an image, and failed to

    def run(self) -> Trained:
        """Raises ValueError if no image could be read."""
        points = min(CURVE_POINTS, self.steps)
        device = self.session.device
        self.losses = {
            name: torch.zeros(points, len(sweep.settings), device=device) for name, sweep in self.sweeps.items()
        }
        self.counts = torch.zeros(2, len(self.labels))
        length = batches_per_epoch(len(self.rows), self.batch_size)
        first, saved = self._restore(), time.monotonic()
        begin = min(first * length, self.steps)
        with self.session.progress(self.steps, "step", "probe") as bar:
            bar.update(begin)
            found = zip(self._batches(first), self.source.batches(self._batches(first)), strict=True)
            for step, ((epoch, batch), (rows, features)) in enumerate(found, begin):
                self._step(step, batch, rows, features)
                bar.update(1)
                if self.path is not None and (step + 1) % length == 0:
                    late = self.session.rank == 0 and time.monotonic() - saved >= SAVE_SECONDS
                    if self.session.sum(torch.tensor(float(late))):  # all ranks save together
                        self._save(epoch + 1)
                        saved = time.monotonic()
        self._save(math.ceil(self.steps / length))
        used, unreadable = self.session.sum(self.counts).numpy() > 0
        if not used.any():
            raise ValueError(f"none of {len(self.rows)} training images can be read")
        counts = np.bincount(np.arange(self.steps) * points // self.steps)[:, None]
        losses = {name: self.session.sum(sums).cpu().numpy() / counts for name, sums in self.losses.items()}
        return Trained(losses, used, unreadable)

    def _batches(self, first: int) -> Iterator[tuple[int, np.ndarray]]:
        """(epoch, rows) from the first epoch on, rows rising, as they lie on disk."""
        size, length = self.batch_size, batches_per_epoch(len(self.rows), self.batch_size)
        for epoch in range(first, math.ceil(self.steps / length)):
            order = np.random.default_rng([self.seed, epoch]).permutation(self.rows)
            for i in range(min(length, self.steps - epoch * length)):
                yield epoch, np.sort(order[i * size : (i + 1) * size])

    def _step(self, step: int, batch: np.ndarray, rows: np.ndarray, features: Features) -> None:
        """rows: those of this rank's part of the batch that could be read."""
        own = batch[self.session.rank :: self.session.world_size]
        self.counts[0, rows] += 1
        self.counts[1, np.setdiff1d(own, rows, assume_unique=True)] += 1
        labels = torch.from_numpy(self.labels[rows]).to(self.session.device)
        for name, sweep in self.sweeps.items():
            with torch.enable_grad():
                loss = sweep.step(features[name], labels, step, self.steps, self.session)
            self.losses[name][step * len(self.losses[name]) // self.steps] += loss

    def _save(self, epochs: int) -> None:
        if self.path is None:
            return
        losses = {name: self.session.sum(sums) for name, sums in self.losses.items()}
        counts = self.session.sum(self.counts)
        if self.session.rank == 0:
            sweeps = {name: sweep.state_dict() for name, sweep in self.sweeps.items()}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(self.path) as temporary:
                torch.save({"epochs": epochs, "sweeps": sweeps, "losses": losses, "counts": counts}, temporary)

    def _restore(self) -> int:
        """Epochs done."""
        if self.path is None or not self.path.exists():
            return 0
        state = torch.load(self.path, map_location=self.session.device, weights_only=True)
        for name, sweep in self.sweeps.items():
            sweep.load_state_dict(state["sweeps"][name])
        if self.session.rank == 0:  # the others add nothing to what all had then
            self.losses, self.counts = state["losses"], state["counts"].cpu()
        return state["epochs"]


def batches_per_epoch(rows: int, batch_size: int) -> int:
    return max(1, rows // batch_size)
