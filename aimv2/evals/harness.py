"""What every eval needs: a model at rest.

Ranks hold different samples, so they may call the model a different number of times: it must be whole on each rank.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """In eval mode and without gradients; every module gets its own mode back afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():  # inference_mode would leave tensors behind that training can't use
            yield
    finally:
        for module in training:
            module.training = True
