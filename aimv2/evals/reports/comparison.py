"""Which of two results on the same test set is better, sample by sample.

n samples, S resamplings, K different values of a sample's difference.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from aimv2.evals.reports.files import Result, read_result

RESAMPLES = 10_000
SAME = ("label", "patches")  # what a sample must have in common in both results
_MOST_DRAWN = 10_000_000  # numbers in memory at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """a - b over the n test samples that both have.

    low, high: 95 % of a paired bootstrap over the samples. p_value: of the same, two-sided, for no difference.
    only_a, only_b: samples that just one has right. mcnemar: the exact two-sided p-value of these two counts. They are
    None where a sample can be right in part.
    """

    a: float
    b: float
    difference: float
    low: float
    high: float
    p_value: float
    n: int
    only_a: int | None
    only_b: int | None
    mcnemar: float | None


@dataclass(frozen=True, slots=True)
class Pair:
    """Two results and their comparison.

    quantities: what is compared of each. differences: a line for each respect, besides the encoder, in which they are
    not alike.
    """

    results: tuple[Result, Result]
    quantities: tuple[str, str]
    differences: list[str]
    comparison: Comparison


def compare(a: str | Path, b: str | Path, *, resamples: int = RESAMPLES, seed: int = 0) -> Pair:
    """Compare two result files by the samples beside them, which are matched by their key.

    Compared is the mean of "correct": top1, recall at 1, or the share of an image's patches. The seeds of training are
    not drawn again: it is about these two sets of weights.

    Raises:
        ValueError: no samples; other test sets, keys, labels or numbers of patches; a key that is there twice.
    """
    results = [read_result(path) for path in (a, b)]
    if results[0].test != results[1].test:
        shown = " and ".join(f"{r.data['name']} {r.test[:12]} ({r.path.name})" for r in results)
        raise ValueError(f"test sets {shown}: expected the same")
    samples = [read_samples(result) for result in results]
    differing = samples[0].keys() ^ samples[1].keys()
    if differing:
        raise ValueError(f"{len(differing):,} samples are in one of the two only, as {min(differing)!r}: expected none")
    for key, sample in samples[0].items():
        for name in SAME:
            values = [each.get(name) for each in (sample, samples[1][key])]
            if values[0] != values[1]:
                raise ValueError(f"sample {key!r} has {name} {values[0]} and {values[1]}: expected the same")
    first, second = (np.array([float(part[key]["correct"]) for key in samples[0]]) for part in samples)
    comparison = paired(first, second, resamples=resamples, seed=seed)
    quantities = (_quantity(results[0], samples[0], comparison.a), _quantity(results[1], samples[1], comparison.b))
    return Pair((results[0], results[1]), quantities, _differences(*results), comparison)


def paired(a: np.ndarray, b: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0) -> Comparison:
    """The same of two arrays (n,), in the same order, of how far each sample is right, from 0 to 1."""
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(f"shapes {a.shape} and {b.shape}: expected (n,) for both, n at least 1")
    if resamples < 1:
        raise ValueError(f"resamples {resamples}: expected 1 or more")
    a, b = a.astype(np.float64), b.astype(np.float64)
    difference = float(np.mean(a - b))
    means = _resampled_means(a - b, resamples, seed)
    low, high = np.quantile(means, (0.025, 0.975))
    # Around no difference the resampled means would scatter as they do around this one.
    as_far = np.abs(means - difference) >= abs(difference) - 1e-12
    counts = (None, None, None)
    if np.isin([a, b], (0, 1)).all():
        counts = _mcnemar(int(np.sum(a > b)), int(np.sum(b > a)))
    return Comparison(
        a=float(a.mean()),
        b=float(b.mean()),
        difference=difference,
        low=float(low),
        high=float(high),
        p_value=float((1 + as_far.sum()) / (1 + resamples)),
        n=len(a),
        only_a=counts[0],
        only_b=counts[1],
        mcnemar=counts[2],
    )


def read_samples(result: Result) -> dict[str, dict]:
    """The samples of a result by their key, in their order. Raises ValueError naming the file and line."""
    samples: dict[str, dict] = {}
    try:
        lines = result.samples_path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"{result.samples_path}: {error.strerror}, expected the samples of {result.path}") from error
    for number, line in enumerate(lines, 1):
        where = f"{result.samples_path}, line {number}"
        try:
            sample = json.loads(line)
            key, _ = sample["sample"], float(sample["correct"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{where}: {line[:80]!r}, expected an object with sample and correct") from error
        if key in samples:
            raise ValueError(f"{where}: sample {key!r} is there twice, expected once")
        samples[key] = sample
    if not samples:
        raise ValueError(f"{result.samples_path}: no samples, expected at least one")
    return samples


def _quantity(result: Result, samples: dict[str, dict], mean: float) -> str:
    """The headline, if the samples' mean is that; else what it is, and what the result quotes."""
    quoted = result.metrics[result.headline].value
    if math.isclose(mean, quoted, abs_tol=1e-6):
        return result.headline
    of_patches = all("patches" in sample for sample in samples.values())
    what = "mean share of an image's patches that are right" if of_patches else "share of samples that are right"
    return f"{what} (the result's {result.headline} is {100 * quoted:.2f} %)"


def _differences(a: Result, b: Result) -> list[str]:
    found = []
    if a.train != b.train:
        found.append(f"training images: {_training(a)} and {_training(b)}")
    if a.protocol["name"] != b.protocol["name"]:
        return [*found, f"protocol: {a.protocol['name']} and {b.protocol['name']}"]
    for name in a.settings | b.settings:
        if a.settings.get(name) != b.settings.get(name):
            found.append(f"{name}: {a.settings.get(name)} and {b.settings.get(name)}")
    return found


def _training(result: Result) -> str:
    return "none" if result.train is None else f"{result.data['train'].get('n')} ({result.train[:8]})"


def _resampled_means(differences: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Means (S,) of n of the differences (n,) drawn with replacement.

    How often each of the K values is drawn is multinomial, so that of right and wrong only three numbers are drawn.
    """
    values, counts = np.unique(differences, return_counts=True)  # (K,)
    rng, n = np.random.default_rng(seed), len(differences)
    step = max(1, _MOST_DRAWN // len(values))
    parts = [rng.multinomial(n, counts / n, min(step, resamples - i)) @ values for i in range(0, resamples, step)]
    return np.concatenate(parts) / n


def _mcnemar(only_a: int, only_b: int) -> tuple[int, int, float]:
    """Under no difference each of the samples that one alone has right is either's with probability 1/2."""
    try:
        from scipy.stats import binomtest
    except ImportError as error:
        raise ImportError("McNemar's test is scipy's: pip install \"aimv2[eval]\"") from error
    if not only_a + only_b:
        return 0, 0, 1.0
    return only_a, only_b, float(binomtest(only_a, only_a + only_b, 0.5).pvalue)
