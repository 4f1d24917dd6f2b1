"""Which samples stay: `clip_similarity_vitl14 >= quantile:0.5`, each filter a column, an operator and a threshold."""

import operator
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np

from aimv2.data.processes import run_jobs
from aimv2.ingest.shard_columns import ShardColumns

OPERATORS = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
    "==": operator.eq,
    "!=": operator.ne,
}
_FILTER = re.compile(r"\s*(\S+?)\s*(>=|<=|==|!=|>|<)\s*(quantile:)?(\S+)\s*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """Keeps the samples whose value compares so with the threshold; those without one if `missing_passes`."""

    column: str
    operator: str
    threshold: float | None  # None: a quantile that is not known yet
    quantile: float | None = None
    missing_passes: bool = False

    @classmethod
    def parse(cls, text: str) -> Self:
        """`COLUMN OPERATOR NUMBER` or `COLUMN OPERATOR quantile:NUMBER`.

        Raises:
            ValueError: it is something else.
        """
        match = _FILTER.fullmatch(text)
        expected = f"filter {text!r}: expected COLUMN {' | '.join(OPERATORS)} NUMBER or quantile:NUMBER"
        if match is None:
            raise ValueError(expected)
        column, sign, quantile, number = match.groups()
        try:
            value = float(number)
        except ValueError:
            raise ValueError(expected) from None
        if value != value or (quantile and not 0 <= value <= 1):
            raise ValueError(f"{expected}, the quantile from 0 to 1")
        return cls(
            column=column,
            operator=sign,
            **({"threshold": None, "quantile": value} if quantile else {"threshold": value}),
        )

    def __str__(self) -> str:
        shown = f"{self.threshold:.6g}" if self.quantile is None else f"quantile:{self.quantile:g}"
        return f"{self.column} {self.operator} {shown}"

    def passes(self, values: np.ndarray) -> np.ndarray:
        """(n,) bool; False for NaN."""
        return OPERATORS[self.operator](values, self.threshold) & ~np.isnan(values)


def check_columns(filters: Iterable[Filter], names: Iterable[str]) -> None:
    """Raises ValueError, with the columns that there are, for a filter of one that no shard has."""
    names = sorted(names)
    for f in filters:
        if f.column not in names:
            raise ValueError(f"filter {str(f)!r}: no column {f.column!r}; there are {', '.join(names)}")


def find_thresholds(filters: Sequence[Filter], shards: Sequence[Path], samples: int, workers: int = 1) -> list[Filter]:
    """The filters with the values of their quantiles, as numpy.quantile gives them over all samples that have a value.

    Samples that are dropped for other reasons count too. One column at a time, 8 bytes a sample.

    Raises:
        ValueError: no sample has a value.
    """
    found = {}
    for column in dict.fromkeys(f.column for f in filters if f.quantile is not None):
        values, end = np.empty(samples), 0
        for chunk in run_jobs(partial(_present, column), shards, workers):
            values[end : end + len(chunk)] = chunk
            end += len(chunk)
        if not end:
            raise ValueError(f"no sample has a value of {column}, so it has no quantiles")
        quantiles = sorted({f.quantile for f in filters if f.column == column and f.quantile is not None})
        thresholds = np.quantile(values[:end], quantiles, overwrite_input=True)
        found |= {(column, q): float(threshold) for q, threshold in zip(quantiles, thresholds, strict=True)}
    return [f if f.quantile is None else replace(f, threshold=found[f.column, f.quantile]) for f in filters]


def _present(column: str, shard: Path) -> np.ndarray:
    values = ShardColumns(shard)[column]
    return values[~np.isnan(values)]
