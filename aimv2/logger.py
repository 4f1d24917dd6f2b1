"""What a run says: a progress bar or plain lines, train.log, metrics.jsonl, TensorBoard and, on request, wandb.

Losses stay on the device as running sums. Once per `every` steps they are reduced over the ranks and read; a logged
loss is the mean of the steps since the line before, a step's loss the sum over its micro-batches and ranks (each is
already divided by global counts). Only rank 0 writes, but every rank must make the same calls: the reduction is
collective.

metrics.jsonl holds floats with all their digits, so two runs can be compared bit for bit; what depends on the clock is
listed in `TIMINGS`.
"""

import contextlib
import hashlib
import importlib.util
import json
import logging
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from aimv2.whole_files import whole_file

TIMINGS = frozenset({"time", "images_per_second", "data_wait", "data_wait_rank", "mfu", "memory_gib"})
PACKAGE = logging.getLogger("aimv2")


class Logger:
    """Writes into the run folder `folder`, with lines for people by way of `logging_to`.

    On resume pass the step reached (`start`) and what `pending` gave there.

    steps, batch_size: of the whole run and of one optimizer step over all ranks, for the ETA and images/s.
    tensorboard: skipped with a message where the package is missing. wandb: a project name; a missing package is an
    error. flops_per_image and peak_flops (of all devices together, FLOP/s) add the MFU.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        steps: int,
        batch_size: int,
        every: int = 10,
        tensorboard: bool = True,
        wandb: str | None = None,
        rank: int = 0,
        flops_per_image: float | None = None,
        peak_flops: float | None = None,
        start: int = 0,
        pending: dict[str, float] | None = None,
    ):
        if every < 1:
            raise ValueError(f"every {every}: expected at least 1 step between lines")
        self.folder, self.steps, self.batch_size, self.every, self.rank = Path(folder), steps, batch_size, every, rank
        self.flops_per_image, self.peak_flops = flops_per_image, peak_flops
        self._sums: dict[str, Tensor] = {}  # over the window's finished steps, this rank, float64 on the device
        self._step: dict[str, Tensor] = {}  # over the micro-batches of the step under way
        self._carried = dict(pending or {})  # the window's steps before the resume, all ranks
        self._losses = 0  # steps in `_sums`
        self._begun = self._window = time.monotonic()
        self._origin: tuple[int, float] | None = None  # step and time from which the ETA is reckoned
        self._timed, self._paused, self._waited = 0, 0.0, 0.0  # steps and seconds since the last line
        self._images = 0  # since then
        self._replaced = 0  # samples since then
        self._shares: dict[str, tuple[int, int]] = {}  # part and whole since the last line, this rank
        if wandb and importlib.util.find_spec("wandb") is None:
            raise ValueError(f"wandb={wandb!r} needs the package wandb, which is not installed")
        self._closers = contextlib.ExitStack()
        self._bar = self._metrics = self._tensorboard = self._wandb = None
        if rank == 0:
            self._open(start, tensorboard, wandb)

    def _open(self, start: int, tensorboard: bool, wandb: str | None) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._metrics = self._closers.enter_context(_open_metrics(self.folder / "metrics.jsonl", start))
        if tensorboard and (writer := _open_tensorboard(self.folder / "tensorboard", start)):
            self._tensorboard = self._closers.enter_context(writer)
        if wandb:
            self._wandb = self._closers.enter_context(_open_wandb(wandb, self.folder))
        if sys.stderr.isatty():
            bar = tqdm(total=self.steps, initial=start, unit="step", dynamic_ncols=True)
            self._bar = self._closers.enter_context(bar)

    def add(self, losses: dict[str, Tensor]) -> None:
        """One micro-batch's scalar losses; kept on the device, no synchronisation."""
        for name, value in losses.items():
            # float64: sums of float32 losses are then exact, whatever the order of steps, ranks and restarts.
            value = value.detach().double()
            self._step[name] = self._step[name] + value if name in self._step else value

    def discard(self) -> None:
        """Forgets the losses of the step under way, which was skipped on all ranks."""
        self._step = {}

    def step(self, step: int, *, images: int | None = None, **scalars: float | Tensor | None) -> None:
        """Ends optimizer step number `step` (from 1); on every `every`-th one and the last, writes a line.

        images: those of the step over all ranks, where they are not `batch_size`.
        scalars (lr, grad_norm, skipped, ...) are logged as they are at that step, without reduction; None is left out.
        """
        for name, value in self._step.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._losses += bool(self._step)
        self._step, self._timed = {}, self._timed + 1
        self._images += self.batch_size if images is None else images
        if self._origin is None:  # after the first step, which compiles and warms up
            self._origin = step, time.monotonic()
        if self._bar is not None:
            self._bar.update(1)
        if step % self.every == 0 or step == self.steps:
            self._report(step, scalars)

    def evaluation(self, step: int, name: str, metrics: dict[str, float]) -> None:
        """One evaluation's numbers, already equal on all ranks."""
        if self.rank == 0:
            values = {key: float(value) for key, value in metrics.items()}
            self._write({"step": step, "eval": name, **values}, {f"{name}/{key}": v for key, v in values.items()})
            self.message(f"step {step} {name}: " + ", ".join(f"{key} {value:.4g}" for key, value in values.items()))

    def message(self, text: str) -> None:
        """A line for people, from rank 0, to the terminal and train.log."""
        if self.rank == 0:
            PACKAGE.info(text)

    def pending(self) -> dict[str, float]:
        """The unfinished window, for the checkpoint: sums over steps and ranks, and "steps"; {} if none. Collective.

        Of a share NAME there are the sums "NAME/part" and "NAME/whole".
        """
        return self._read()[0]

    def replaced(self, samples: int) -> None:
        """So many of this rank's samples could not be used, and others took their places."""
        self._replaced += samples

    def share(self, name: str, part: int, whole: int) -> None:
        """So much of this rank's `whole`; a line has the share over the steps since the one before and all ranks.

        Of a whole of 0 there is none, and no line has it.
        """
        if not whole:
            return
        parts, wholes = self._shares.get(name, (0, 0))
        self._shares[name] = parts + part, wholes + whole

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around `next(batches)`: the time counts as waiting for data."""
        begun = time.monotonic()
        yield
        self._waited += time.monotonic() - begun

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around evaluations and checkpoints: the time does not count in images/s."""
        begun = time.monotonic()
        yield
        self._paused += time.monotonic() - begun

    def close(self) -> None:
        """Flushes and closes everything; to be called at the end of the run, also after an error."""
        self._closers.close()

    def _read(self) -> tuple[dict[str, float], list[float], int]:
        """The window's sums over steps and ranks, the seconds each rank waited for data, and all samples replaced.

        One reduction, and the one place that waits for the device.
        """
        on_cuda = dist.is_initialized() and dist.get_backend() == "nccl"
        device = next((value.device for value in self._sums.values()), torch.device("cuda" if on_cuda else "cpu"))
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        shares = {}
        for name, (part, whole) in self._shares.items():
            shares |= {f"{name}/part": part, f"{name}/whole": whole}
        counts = torch.tensor([*shares.values(), *[0.0] * (world + 1)], dtype=torch.float64)
        counts[len(shares) + rank], counts[-1] = self._waited, self._replaced
        values = torch.cat([*(value.reshape(1) for value in self._sums.values()), counts.to(device)])
        if dist.is_initialized():
            dist.all_reduce(values)
        sums = dict(zip([*self._sums, *shares], values.tolist(), strict=False))
        totals = {name: self._carried.get(name, 0.0) + sums.get(name, 0.0) for name in self._carried | sums}
        totals["steps"] = self._carried.get("steps", 0) + self._losses
        totals = totals if totals["steps"] else {}
        *waits, replaced = values.tolist()[len(sums) :]
        return totals, waits, round(replaced)

    def _report(self, step: int, scalars: dict[str, float | Tensor | None]) -> None:
        totals, waits, replaced = self._read()
        now = time.monotonic()
        elapsed = max(now - self._window - self._paused, 1e-9)
        count = totals.pop("steps", 0)
        line: dict[str, Any] = {"step": step, "time": now - self._begun}
        shares = [name.removesuffix("/part") for name in totals if name.endswith("/part")]
        shares = {name: totals.pop(f"{name}/part") / max(totals.pop(f"{name}/whole"), 1) for name in shares}
        line |= {name: total / count for name, total in totals.items()} | shares
        line |= {k: v if isinstance(v, int) else float(v) for k, v in scalars.items() if v is not None}
        line |= {"replaced": replaced} if replaced else {}
        line |= {"images_per_second": self._images / elapsed, "data_wait": max(waits) / elapsed}
        if len(waits) > 1:
            line["data_wait_rank"] = waits.index(max(waits))
        if self.flops_per_image and self.peak_flops:
            line["mfu"] = self._timed * self.batch_size * self.flops_per_image / elapsed / self.peak_flops
        if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
            line["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if self.rank == 0:
            self._write(line, {f"train/{name}": value for name, value in line.items() if name != "step"})
            self._show(line)
        self._sums, self._carried, self._losses, self._shares = {}, {}, 0, {}
        self._window, self._timed, self._paused, self._waited = time.monotonic(), 0, 0.0, 0.0
        self._images = self._replaced = 0

    def _write(self, line: dict[str, Any], scalars: dict[str, float]) -> None:
        # JSON has no NaN; null says that there was a value and it was not finite.
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        try:
            self._metrics.write(json.dumps(plain, allow_nan=False) + "\n")
            self._metrics.flush()
            if self._tensorboard is not None:
                for name, value in scalars.items():
                    self._tensorboard.add_scalar(name, value, line["step"])
        except OSError as error:  # a full disk must not end the run
            PACKAGE.error("step %d could not be logged: %s", line["step"], error)
        if self._wandb is not None:
            self._wandb.log(scalars, step=line["step"])

    def _show(self, line: dict[str, Any]) -> None:
        """The line for people: on the bar where there is a terminal, and in train.log."""
        fields = [f"{line['images_per_second']:.1f} images/s"]
        fields += [f"{name} {value:.4g}" for name, value in line.items() if name not in TIMINGS | {"step"}]
        fields += [f"data wait {line['data_wait']:.0%}"]
        fields += [f"mfu {line['mfu']:.1%}"] if "mfu" in line else []
        fields += [f"{line['memory_gib']:.1f} GiB"] if "memory_gib" in line else []
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(fields))
        origin, begun = self._origin
        left = (time.monotonic() - begun) / max(line["step"] - origin, 1) * (self.steps - line["step"])
        text = f"step {line['step']}/{self.steps}, {', '.join(fields)}, {tqdm.format_interval(left)} left"
        PACKAGE.info(text, extra={"in_file_only": self._bar is not None})


def read_metrics(path: str | Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(training lines, evaluation lines) of a metrics.jsonl, in order.

    A half-written last line, left by a kill, is passed over; ValueError naming the line if any other is damaged.
    """
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    steps: list[dict[str, Any]] = []
    evaluations: list[dict[str, Any]] = []
    for number, text in enumerate(lines[:-1], start=1):  # what follows the last newline is empty or half a line
        try:
            line = json.loads(text)
            (evaluations if "eval" in line else steps).append(line)
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: expected a JSON object, got {text[:80]!r}") from error
    return steps, evaluations


class _Terminal(logging.Handler):
    """Lines above the progress bar; without a terminal, plain lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        if not getattr(record, "in_file_only", False):
            tqdm.write(self.format(record), file=sys.stderr)


@contextlib.contextmanager
def logging_to(folder: str | Path, rank: int = 0) -> Iterator[None]:
    """Sends the package's log records to the terminal and, from rank 0, to train.log in `folder`.

    An error that ends the run goes into train.log with its traceback; the terminal is the caller's affair.
    """
    handlers: list[logging.Handler] = [_Terminal(logging.INFO if rank == 0 else logging.WARNING)]
    handlers[0].setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"rank {rank}: %(message)s"))
    if rank == 0:
        Path(folder).mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(Path(folder) / "train.log", encoding="utf-8"))
        handlers[1].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    level = PACKAGE.level
    PACKAGE.setLevel(logging.INFO)
    for handler in handlers:
        PACKAGE.addHandler(handler)
    try:
        yield
    except BaseException as error:
        PACKAGE.critical("ended by %s: %s", type(error).__name__, error, exc_info=True, extra={"in_file_only": True})
        raise
    finally:
        PACKAGE.setLevel(level)
        for handler in handlers:
            PACKAGE.removeHandler(handler)
            handler.close()


def _open_metrics(path: Path, start: int) -> TextIO:
    """Opens the file for appending after dropping, atomically, the lines that a resume from `start` writes again."""
    kept = []
    for text in path.read_text(encoding="utf-8").splitlines() if start and path.exists() else []:
        try:
            if json.loads(text)["step"] <= start:
                kept.append(text + "\n")
        except (json.JSONDecodeError, KeyError, TypeError):
            PACKAGE.warning("%s: dropped a damaged line: %.80r", path, text)
    with whole_file(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")
    return path.open("a", encoding="utf-8")


def _open_tensorboard(folder: Path, start: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        PACKAGE.info("no TensorBoard files: the package tensorboard is not installed")
        return None
    return SummaryWriter(str(folder), purge_step=start + 1)  # hides what a resume writes again


def _open_wandb(project: str, folder: Path) -> Any:
    import wandb

    # The same folder is the same run, so a resume continues its curves.
    identity = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    return wandb.init(project=project, name=folder.name, id=identity, resume="allow", dir=str(folder))
