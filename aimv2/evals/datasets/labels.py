"""Labels as datasets write them to numbers of classes."""

from collections.abc import Mapping, Sequence

import numpy as np

_NAMED = 5  # in a message


def number_labels(
    spec: str, labels: Mapping[str, Sequence[str | int]]
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """({split: (n,) int64}, classes): the classes are what is found in "train", or in "test" if there is no such split.

    Raises:
        ValueError: texts and integers are mixed, or a split has a class that "train" has not.
    """
    kinds = {type(label) for column in labels.values() for label in column}
    if len(kinds) > 1:
        raise ValueError(f"{spec}: labels are {' and '.join(sorted(k.__name__ for k in kinds))}, expected one of them")
    known = sorted(set(labels.get("train", labels["test"])))
    numbers = {label: number for number, label in enumerate(known)}
    check_seen(spec, set(labels["test"]), known)
    return {s: np.array([numbers[label] for label in column], np.int64) for s, column in labels.items()}, tuple(
        map(str, known)
    )


def first_line(error: Exception) -> str:
    """What an error of a library says, without the rest, and without a full stop."""
    if isinstance(error, KeyError) and error.args:
        return f"missing {error.args[0]!r}"
    said = (str(error).strip().splitlines() or [""])[0].rstrip(".") or type(error).__name__
    cause = first_line(error.__cause__) if error.__cause__ else ""
    return said if cause in said else f"{said} ({cause})"


def check_seen(spec: str, tested: set, known: Sequence) -> None:
    """Raises ValueError naming the classes to test that training has not."""
    if unseen := sorted(tested - set(known)):
        more = f" and {len(unseen) - _NAMED} more" if len(unseen) > _NAMED else ""
        named = ", ".join(map(repr, unseen[:_NAMED]))
        raise ValueError(f"{spec}: class {named}{more} is to be tested, but the training split has no such class")
