import json

import numpy as np
import pytest
from made_results import entry, result, write_result
from scipy import stats

from aimv2.evals.reports.comparison import compare, paired


def draw(rng: np.random.Generator, n: int, only_a: float, only_b: float) -> tuple[np.ndarray, np.ndarray]:
    """Two correlated rows of booleans."""
    u = rng.random(n)
    both = u > 0.6
    return both | (u < only_a), both | ((only_a <= u) & (u < only_a + only_b))


@pytest.mark.parametrize("truth", [(0.15, 0.15), (0.25, 0.1)])
def test_the_interval_covers_the_truth_95_times_in_100(truth):
    rng, trials = np.random.default_rng(0), 800
    covered = []
    for seed in range(trials):
        found = paired(*draw(rng, 300, *truth), resamples=1000, seed=seed)
        covered.append(found.low <= truth[0] - truth[1] <= found.high)
    # Binomial, 4 sigma of 800 trials: 0.031. A percentile interval of 300 samples covers about half a per cent less
    # than it says, which is within it.
    assert abs(np.mean(covered) - 0.95) < 4 * (0.95 * 0.05 / trials) ** 0.5


def test_p_values_are_uniform_under_no_difference():
    rng, trials = np.random.default_rng(1), 800
    p = [paired(*draw(rng, 300, 0.2, 0.2), resamples=500, seed=seed).p_value for seed in range(trials)]
    for level in (0.05, 0.2, 0.5):
        assert abs(np.mean(np.array(p) <= level) - level) < 4 * (level * (1 - level) / trials) ** 0.5 + 0.01


def test_equals_the_bootstrap_that_draws_rows():
    """numpy's own way: rows drawn with replacement. 20,000 draws know a quantile to about 2 % of the interval."""
    rng = np.random.default_rng(2)
    a, b = rng.random(50), rng.random(50)  # shares, as of an image's patches
    means = (a - b)[rng.integers(0, 50, (20_000, 50))].mean(axis=1)
    found = paired(a, b, resamples=20_000)
    width = found.high - found.low
    np.testing.assert_allclose([found.low, found.high], np.quantile(means, (0.025, 0.975)), atol=0.03 * width)
    assert found.mcnemar is None
    assert found.difference == pytest.approx(float(np.mean(a - b)))


def test_mcnemar_by_hand():
    """8 samples for a, 1 for b: two-sided, 2 (1 + 9) / 2^9 = 0.0390625."""
    a, b = np.ones(20, bool), np.ones(20, bool)
    b[:8], a[8] = False, False
    found = paired(a, b)
    assert (found.only_a, found.only_b) == (8, 1)
    assert found.mcnemar == pytest.approx(0.0390625)
    assert found.difference == pytest.approx(7 / 20)


def test_bootstrap_and_mcnemar_agree_roughly():
    """On many samples both are the normal approximation's."""
    a, b = draw(np.random.default_rng(3), 5000, 0.2, 0.18)
    found = paired(a, b)
    z = (found.only_a - found.only_b) / (found.only_a + found.only_b) ** 0.5
    assert found.p_value == pytest.approx(2 * stats.norm.sf(abs(z)), abs=0.03)
    assert found.mcnemar == pytest.approx(found.p_value, abs=0.03)


def test_equal_results_do_not_differ():
    a = np.arange(10) % 2 == 0
    found = paired(a, a)
    assert (found.difference, found.low, found.high, found.p_value, found.mcnemar) == (0, 0, 0, 1, 1)


def test_swapping_turns_the_sign():
    a, b = draw(np.random.default_rng(4), 400, 0.2, 0.1)
    there, back = paired(a, b), paired(b, a)
    assert (there.difference, there.only_a, there.mcnemar) == (-back.difference, back.only_b, back.mcnemar)
    assert there.low == pytest.approx(-back.high, abs=0.01)  # other draws: the bootstrap's own noise


def two(tmp_path, a=(1, 1, 0, 1), b=(1, 0, 0, 1), **changes):
    return (
        write_result(tmp_path / "a", result("timm:a"), np.array(a)),
        write_result(tmp_path / "b", result("timm:b", **changes), np.array(b)),
    )


def rewrite(path, change) -> None:
    path = path.with_suffix(".samples.jsonl")
    lines = change([json.loads(line) for line in path.read_text().splitlines()])
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_files_are_matched_by_key_not_by_order(tmp_path):
    a, b = two(tmp_path)
    rewrite(b, lambda lines: lines[::-1])
    found = compare(a, b).comparison
    assert (found.a, found.b, found.n) == (0.75, 0.5, 4)
    assert (found.only_a, found.only_b) == (1, 0)
    assert compare(a, b).comparison == found  # the same seed


def test_what_is_compared_is_said(tmp_path):
    """The headline only where the samples' mean is that."""
    right = write_result(tmp_path / "a", result("timm:a", 0.75), np.array([1, 1, 0, 1]))
    other = write_result(tmp_path / "b", result("timm:b", 0.5), np.array([1, 1, 0, 1]))
    assert compare(right, other).quantities == (
        "top1",
        "share of samples that are right (the result's top1 is 50.00 %)",
    )
    patches = result("timm:c", metrics={"miou": entry(0.3), "patch_accuracy": entry(0.6)})
    path = write_result(tmp_path / "c", patches, np.array([1, 1, 0, 1]))
    rewrite(path, lambda lines: [line | {"patches": 16} for line in lines])
    said = "mean share of an image's patches that are right (the result's miou is 30.00 %)"
    assert compare(path, path).quantities == (said, said)


def test_patches_of_other_sizes_are_not_compared(tmp_path):
    a, b = two(tmp_path)
    for path, patches in ((a, 16), (b, 64)):
        rewrite(path, lambda lines, patches=patches: [line | {"patches": patches} for line in lines])
    with pytest.raises(ValueError, match="sample '00000' has patches 16 and 64: expected the same"):
        compare(a, b)


def test_what_differs_beside_the_encoder_is_said(tmp_path):
    assert compare(*two(tmp_path / "same")).differences == []
    few = {"data": {"train": {"n": 50, "identity": "fewfewfew"}}, "protocol": {"k": [5]}}
    assert compare(*two(tmp_path / "few", **few)).differences == [
        "training images: 2000 (shapes@s) and 50 (fewfewfe)",
        "k: [10, 20] and [5]",
    ]
    other = {"protocol": {"name": "zero_shot"}, "data": {"train": None}}
    assert compare(*two(tmp_path / "other", **other)).differences == [
        "training images: 2000 (shapes@s) and none",
        "protocol: knn and zero_shot",
    ]


def test_other_test_sets_are_refused(tmp_path):
    a, b = two(tmp_path, data={"test": {"n": 4, "identity": "another"}})
    with pytest.raises(ValueError, match=r"test sets .*another.*: expected the same"):
        compare(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[1:], "1 samples are in one of the two only, as '00000'"),
        (lambda lines: [lines[0] | {"label": 5}, *lines[1:]], "sample '00000' has label 0 and 5"),
        (lambda lines: [*lines, lines[0]], "line 5: sample '00000' is there twice"),
        (lambda lines: [{"sample": "x"}], "line 1: .*expected an object with sample and correct"),
        (lambda lines: [3], "line 1: '3', expected an object"),
        (lambda lines: [], "no samples, expected at least one"),
    ],
)
def test_samples_that_do_not_match_are_refused(tmp_path, change, message):
    a, b = two(tmp_path)
    rewrite(b, change)
    with pytest.raises(ValueError, match=message):
        compare(a, b)


def test_missing_samples_are_named(tmp_path):
    a, b = two(tmp_path)
    b.with_suffix(".samples.jsonl").unlink()
    with pytest.raises(ValueError, match="expected the samples of"):
        compare(a, b)
    with pytest.raises(ValueError, match=r"none.json: No such file"):
        compare(a, tmp_path / "none.json")
