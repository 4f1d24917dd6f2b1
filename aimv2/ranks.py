"""What the processes of one run say to each other."""

import torch.distributed as dist
from torch import Tensor


def sum_over_ranks(sums: Tensor) -> Tensor:
    """The sum of every rank's tensor, in one reduction; the tensor itself if nothing is distributed."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(sums)
    return sums


def lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank is gone or hangs."""
    return isinstance(error, dist.DistError) or "by peer" in str(error) or "Timed out waiting" in str(error)
