"""What modules put out while the model they belong to runs, and an end to it where no more is needed."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor, nn

T = TypeVar("T")


class _Enough(Exception):
    """All that was asked for is there."""


def tap(
    run: Callable[[], T], modules: Sequence[nn.Module], numbers: Sequence[int], *, stop: bool = False
) -> tuple[list[Tensor], T | None]:
    """The outputs of modules[n] for n of `numbers`, and what `run()` returns.

    With `stop`, `run` is left as soon as all are there, so that no later module is called; then it returns None.
    """
    found: dict[int, Tensor] = {}

    def keep(number: int):
        def hook(module, inputs, output):
            found[number] = output[0] if isinstance(output, tuple) else output
            if stop and len(found) == len(numbers):
                raise _Enough

        return hook

    handles = [modules[number].register_forward_hook(keep(number)) for number in numbers]
    try:
        result = run()
    except _Enough:
        result = None
    finally:
        for handle in handles:
            handle.remove()
    return [found[number] for number in numbers], result
