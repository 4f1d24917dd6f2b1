"""What the processes of one run say to each other, beside gradients."""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class PeerError(ValueError):
    """What another rank could not do; the message names it."""


def is_distributed() -> bool:
    """Whether there are other ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gather_objects(mine: T) -> list[T]:
    """What every rank has, in the order of the ranks. All call it."""
    if not is_distributed():
        return [mine]
    objects: list = [None] * dist.get_world_size()
    dist.all_gather_object(objects, mine)
    return objects


def together(work: Callable[[], T] | None) -> list[T | None]:
    """Run `work`, if this rank has any, and gather the results of all ranks. All call it.

    An error is raised on all, so that no rank goes on alone: a rank's own as it is, that of another as PeerError.
    """
    result, error = None, None
    try:
        result = work() if work is not None else None
    except Exception as e:
        error = e
    outcomes = gather_objects((result, None if error is None else str(error) or type(error).__name__))
    if error is not None:
        raise error
    for rank, (_, said) in enumerate(outcomes):
        if said is not None:
            raise PeerError(f"rank {rank}: {said}")
    return [result for result, _ in outcomes]


def on_rank_zero(work: Callable[[], T]) -> T:
    """Run `work` on rank 0 while the others wait, and give its result to all. Errors are as `together` raises them."""
    return together(work if not is_distributed() or dist.get_rank() == 0 else None)[0]


def sum_over_ranks(sums: Tensor) -> Tensor:
    """The sum of every rank's tensor, in one reduction; the tensor itself if nothing is distributed."""
    if is_distributed():
        dist.all_reduce(sums)
    return sums


def gather_rows(rows: Tensor) -> tuple[Tensor, int]:
    """All ranks' rows in the order of the ranks, and at which of them this rank's own begin. Ranks may have any number.

    rows (n, ...). No gradient passes; `rows` itself if nothing is distributed.
    """
    if not is_distributed():
        return rows, 0
    number = torch.tensor([len(rows)], device=rows.device)
    numbers = [torch.empty_like(number) for _ in range(dist.get_world_size())]
    dist.all_gather(numbers, number)
    numbers = torch.cat(numbers).tolist()
    padded = rows.new_zeros(max(numbers), *rows.shape[1:])  # all must be of one size
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in numbers]
    dist.all_gather(gathered, padded)
    whole = torch.cat([part[:n] for part, n in zip(gathered, numbers, strict=True)])
    return whole, sum(numbers[: dist.get_rank()])


def lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank is gone or hangs."""
    return isinstance(error, dist.DistError) or "by peer" in str(error) or "Timed out waiting" in str(error)
