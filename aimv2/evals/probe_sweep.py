"""One loop that trains the heads of many sweeps, and goes on where it was stopped.

A sweep is the heads of one stream of features, which differ in their settings. All sweeps see the same batches.

B images, S heads of a sweep, C classes, n images of a split.
"""

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from aimv2.evals.datasets import held_out
from aimv2.evals.feature_store import fingerprint
from aimv2.evals.probe_features import Anew, Kept
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


@dataclass(slots=True, kw_only=True)
class Training:
    """The loop, in which all sweeps take the same `steps` steps.

    In each epoch the rows come in another order, and what does not fill a batch is left out; fewer rows than a batch
    are one. Nothing depends on ranks or on where an earlier run stopped, but for the rounding of sums over ranks.

    rows: of the training split. identity: all that decides the result, as JSON, so that no other state is gone on from.
    """

    sweeps: dict[str, Sweep]
    source: Kept | Anew
    labels: np.ndarray
    rows: np.ndarray
    batch_size: int
    steps: int
    seed: int
    session: Session
    identity: dict
    losses: dict[str, Tensor] = field(default_factory=dict, init=False)  # (CURVE_POINTS, S) sums of this rank
    unread: Tensor = field(init=False)  # (n,) of the training split, above 0 where this rank could not read an image

    def run(self) -> dict[str, np.ndarray]:
        """Train, and return for each sweep the mean loss of every head over hundredths of the training, (points, S)."""
        points = min(CURVE_POINTS, self.steps)
        device = self.session.device
        self.losses = {
            name: torch.zeros(points, len(sweep.settings), device=device) for name, sweep in self.sweeps.items()
        }
        self.unread = torch.zeros(len(self.labels))
        length = batches_per_epoch(len(self.rows), self.batch_size)
        first, saved = self._restore(), time.monotonic()
        with self.session.progress(self.steps, "step", "probe") as bar:
            bar.update(first * length)
            for epoch in range(first, math.ceil(self.steps / length)):
                self._epoch(epoch, length, bar)
                late = self.session.rank == 0 and time.monotonic() - saved >= SAVE_SECONDS
                if self.session.sum(torch.tensor(float(late))):  # all ranks save together
                    self._save(epoch + 1)
                    saved = time.monotonic()
        self._save(math.ceil(self.steps / length))
        counts = np.bincount(np.arange(self.steps) * points // self.steps)[:, None]
        return {name: self.session.sum(sums).cpu().numpy() / counts for name, sums in self.losses.items()}

    def _epoch(self, epoch: int, length: int, bar) -> None:
        start = epoch * length
        order = np.random.default_rng([self.seed, epoch]).permutation(self.rows)
        count, size = min(length, self.steps - start), self.batch_size
        batches = [np.sort(order[i * size : (i + 1) * size]) for i in range(count)]  # rising, as they lie on disk
        for step, (rows, features) in enumerate(self.source.batches(batches, epoch), start):
            own = batches[step - start][self.session.rank :: self.session.world_size]
            self.unread[np.setdiff1d(own, rows, assume_unique=True)] = 1
            labels = torch.from_numpy(self.labels[rows]).to(self.session.device)
            for name, sweep in self.sweeps.items():
                with torch.enable_grad():
                    loss = sweep.step(features[name], labels, step, self.steps, self.session)
                self.losses[name][step * len(self.losses[name]) // self.steps] += loss
            bar.update(1)

    def _path(self) -> Path | None:
        folder = self.session.folder
        return None if folder is None else folder / "probes" / f"{fingerprint(self.identity)}.pt"

    def _save(self, epochs: int) -> None:
        path = self._path()
        if path is None:
            return
        losses = {name: self.session.sum(sums) for name, sums in self.losses.items()}
        unread = self.session.sum(self.unread)
        if self.session.rank == 0:
            sweeps = {name: sweep.state_dict() for name, sweep in self.sweeps.items()}
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as temporary:
                torch.save({"epochs": epochs, "sweeps": sweeps, "losses": losses, "unread": unread}, temporary)

    def _restore(self) -> int:
        """Epochs done."""
        path = self._path()
        if path is None or not path.exists():
            return 0
        state = torch.load(path, map_location=self.session.device, weights_only=True)
        for name, sweep in self.sweeps.items():
            sweep.load_state_dict(state["sweeps"][name])
        if self.session.rank == 0:
            self.losses, self.unread = state["losses"], state["unread"].cpu()
        return state["epochs"]


def unreadable_keys(training: Training) -> list[str]:
    """Of the training images that were left out: what was known before, and what the training found."""
    known = ~training.source.readable("train")
    found = training.session.sum(training.unread).numpy() > 0
    return [training.source.data.train.keys[int(row)] for row in np.flatnonzero(known | found)]


def batches_per_epoch(rows: int, batch_size: int) -> int:
    return max(1, rows // batch_size)
