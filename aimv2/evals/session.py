"""Where an evaluation runs: device, ranks, and where it keeps what it computes."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from aimv2.ranks import sum_over_ranks


@dataclass(slots=True, kw_only=True)
class Session:
    """Passed to every protocol.

    folder: on a file system that all ranks share; features and states of training are kept there, so that an evaluation
    that was stopped goes on. None: in memory only.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rank: int = 0
    world_size: int = 1
    folder: Path | None = None
    batch_size: int = 64  # images per forward pass and rank
    workers: int = 0  # processes per rank that decode images; 0: this one
    quiet: bool = False  # no progress bars
    # By the identity of a split that was extracted: (n,) which images could be read, and (n,) digests of their pixels.
    seen: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self):
        if self.batch_size < 1 or self.workers < 0:
            raise ValueError(f"batch_size {self.batch_size}, workers {self.workers}: expected 1 and 0 or more")

    def progress(self, total: int, unit: str, description: str) -> AbstractContextManager:
        """A bar with rate and ETA, on rank 0: `with session.progress(...) as bar: bar.update(n)`."""
        from tqdm import tqdm

        silent = self.quiet or self.rank > 0
        return tqdm(total=total, unit=unit, desc=description, disable=silent, dynamic_ncols=True)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, on the device it came from; one rank's own tensor unchanged."""
        if self.world_size == 1:
            return tensor
        return sum_over_ranks(tensor.to(self.device, copy=True)).to(tensor.device)

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.world_size > 1:
            dist.barrier()


@contextmanager
def launched_session(device: str | torch.device | None = None, **settings) -> Iterator[Session]:
    """The session of this process, as `torchrun` started it or alone; `settings` are Session's.

    `device`: None is this rank's GPU where there is one, else the CPU. Raises ValueError for one that isn't there.
    """
    world_size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if device is None:
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device}: {str(error).splitlines()[0]}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # the patch embedding is a convolution, and final numbers are fp32's
    if world_size > 1:
        # Ranks wait for one that downloads, or has the longer share: a launcher ends them if it fails.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=7))
    try:
        yield Session(device=device, rank=rank, world_size=world_size, **settings)
    finally:
        if world_size > 1:
            dist.destroy_process_group()
