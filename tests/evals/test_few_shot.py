"""Logistic regression against its own definition in torch, and what it says of encoders that know all or nothing."""

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from known_features import KnownEncoder, dataset, within_chance

from aimv2.evals import few_shot
from aimv2.evals.datasets import held_out
from aimv2.evals.few_shot import STRENGTHS, FewShot, draw_shots, logistic_scores, over_draws
from aimv2.evals.results import share
from aimv2.evals.session import Session

pytest.importorskip("sklearn")
QUIET = Session(quiet=True)
QUICK = {"shots": (1, 4), "draws": 2, "strengths": (0.01, 1.0, 100.0)}


def labels_of(count: int, classes: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).permutation(np.arange(count) % classes)


def test_the_strengths_are_dinov2s():
    assert len(STRENGTHS) == 45
    assert STRENGTHS[0] == pytest.approx(1e-6)
    assert STRENGTHS[-1] == pytest.approx(1e5)
    ratios = np.array(STRENGTHS[1:]) / np.array(STRENGTHS[:-1])
    assert ratios == pytest.approx(np.full(44, 10**0.25))


@pytest.mark.parametrize("strength", [0.01, 1.0])
def test_scores_minimise_strength_times_loss_plus_half_the_squares(strength):
    rng = np.random.default_rng(0)
    labels = labels_of(60, 4)
    features, test = np.eye(4)[labels] + rng.normal(size=(60, 4)), rng.normal(size=(9, 4))
    weight, bias = (torch.zeros(shape, dtype=torch.float64, requires_grad=True) for shape in ((4, 4), (4,)))
    x, y = torch.from_numpy(features), torch.from_numpy(labels)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=500, tolerance_grad=1e-10, tolerance_change=1e-14)

    def objective():
        optimiser.zero_grad()
        loss = strength * F.cross_entropy(x @ weight.T + bias, y, reduction="sum") + weight.square().sum() / 2
        loss.backward()
        return loss

    optimiser.step(objective)
    expected = (torch.from_numpy(test) @ weight.T + bias).log_softmax(dim=1).detach().numpy()
    scores, converged = logistic_scores(features, labels, test, strength, 4, 1000, 1e-12)
    assert converged
    # scikit-learn stops where a step changes the loss by 1e-14 of it. Parameters are then off by the root of that over
    # the root of the curvature, of which the penalty alone is 1 / 60, and there are 5 to a score, of numbers of up to 3
    np.testing.assert_allclose(scores, expected, atol=2e-5)


def test_a_class_without_training_images_is_never_said():
    features, labels = np.random.default_rng(0).normal(size=(20, 3)), np.tile([0, 3], 10)
    scores, _ = logistic_scores(features, labels, features, 1.0, 5, 100, 1e-12)
    assert np.isneginf(scores[:, [1, 2, 4]]).all()
    assert np.isfinite(scores[:, [0, 3]]).all()


def test_a_fit_that_ran_out_of_steps_is_told_without_a_warning():
    features, labels = np.random.default_rng(0).normal(size=(50, 20)), labels_of(50, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not logistic_scores(features, labels, features, 1e5, 3, 2, 1e-12)[1]
        assert logistic_scores(features, labels, features, 0.01, 3, 1000, 1e-12)[1]


@pytest.mark.parametrize("strength", [1e-6, 1.0, 1e3])
def test_the_end_of_a_fit_does_not_depend_on_the_scale_of_the_features(strength):
    """A hundredth of the features and ten thousand times the strength is the same problem."""
    rng = np.random.default_rng(0)
    labels = labels_of(60, 4)
    features, test = np.eye(4)[labels] + rng.normal(size=(60, 4)), rng.normal(size=(9, 4))
    large, _ = logistic_scores(features, labels, test, strength, 4, 10_000, FewShot().tolerance)
    small, _ = logistic_scores(features / 100, labels, test / 100, strength * 1e4, 4, 10_000, FewShot().tolerance)
    np.testing.assert_allclose(small, large, atol=1e-3)  # log-probabilities; at 1e-4 they differ by 0.05


def test_shots_are_as_many_of_each_class_and_differ_by_draw():
    labels = np.array([0] * 10 + [1] * 3 + [2] * 10)
    rows = np.arange(1, 23)
    drawn = draw_shots(rows, labels, 4, np.random.default_rng(0))
    assert np.bincount(labels[drawn]).tolist() == [4, 3, 4]
    assert set(drawn) <= set(rows)
    assert (np.diff(drawn) > 0).all()
    assert (drawn == draw_shots(rows, labels, 4, np.random.default_rng(0))).all()
    assert (drawn != draw_shots(rows, labels, 4, np.random.default_rng(1))).any()


def test_the_mean_over_draws_has_the_standard_error_of_draws_and_of_test_samples():
    """Variance over the draws 0.04; p (1 - p) / n with n 40 is 0.25, 0.21 and 0.09 over 40, together 0.55 / 120."""
    draws = [share(np.arange(40) < hits, 0.1) for hits in (20, 28, 36)]
    metric = over_draws(draws)
    assert metric.value == pytest.approx(0.7)
    assert metric.stderr == pytest.approx((0.04 / 3 + 0.55 / 120) ** 0.5)
    assert (metric.n, metric.chance) == (40, 0.1)
    equal = over_draws(draws[:1] * 5)  # that draws agree says nothing of other test samples
    assert equal.stderr == pytest.approx(draws[0].stderr)
    one = over_draws(draws[:1])
    assert (one.value, one.stderr) == pytest.approx((draws[0].value, draws[0].stderr))


def test_the_standard_error_covers_new_test_samples():
    """Draws differ by 0.02, test sets of 100 samples by sqrt(0.94 * 0.06 / 100) = 0.024."""
    rng, found = np.random.default_rng(0), []
    for _ in range(2000):
        hard = rng.random(100)  # samples are right where the draw's quality is above; shared by the draws
        found.append(over_draws([share(hard < rng.normal(0.94, 0.02)) for _ in range(5)]))
    values, errors = (np.array([getattr(metric, name) for metric in found]) for name in ("value", "stderr"))
    # Never too small, to which 2000 trials know it to 1.6 %; too large by what draws average out of the test samples.
    assert 0.95 < np.sqrt(np.mean(errors**2)) / values.std() < 1.2


# What it says of encoders


def test_an_encoder_that_knows_the_class_is_always_right():
    labels = labels_of(241, 6)
    outcome = FewShot(**QUICK).run(KnownEncoder(np.eye(6)[labels]), dataset(200, 41, labels), QUIET)
    assert list(outcome.metrics) == ["top1", "top5", "mean_per_class", "top1_1_shot", "top1_4_shot"]
    assert {metric.value for metric in outcome.metrics.values()} == {1.0}
    assert all(sample["correct"] for sample in outcome.samples)
    assert len(outcome.details["sweep"]) == 1 + 2 * 2
    assert [row["images"] for row in outcome.details["sweep"]] == [200, 6, 6, 24, 24]


def test_random_features_and_shuffled_labels_are_at_chance():
    rng, labels = np.random.default_rng(1), labels_of(900, 4)
    data = dataset(500, 400, labels)
    for features in (rng.normal(size=(900, 8)), np.eye(4)[rng.permutation(labels)]):
        metrics = FewShot(**QUICK).run(KnownEncoder(features), data, QUIET).metrics
        assert all(within_chance(metric) for metric in metrics.values())


def test_an_encoder_that_gives_all_the_same_says_one_class():
    """Only the bias is left, which says the most frequent class of the training set."""
    labels = np.concatenate([np.repeat([0, 1, 2], [20, 50, 30]), labels_of(60, 3)])
    outcome = FewShot(**QUICK).run(KnownEncoder(np.ones((160, 3))), dataset(100, 60, labels), QUIET)
    assert {sample["prediction"] for sample in outcome.samples} == {1}
    assert outcome.metrics["top1"].value == 1 / 3


def test_the_quoted_fit_is_scikit_learns_on_the_whole_training_set():
    from sklearn.linear_model import LogisticRegression

    rng, labels = np.random.default_rng(2), labels_of(230, 4)
    features = (np.eye(4)[labels] + rng.normal(size=(230, 4))).astype(np.float32)
    outcome = FewShot(**QUICK | {"shots": ()}).run(KnownEncoder(features), dataset(150, 80, labels), QUIET)
    chosen = outcome.details["selection"]["C"]
    reference = LogisticRegression(C=chosen, max_iter=1000).fit(features[:150].astype(np.float64), labels[:150])
    predictions = reference.predict(features[150:].astype(np.float64))
    assert [sample["prediction"] for sample in outcome.samples] == predictions.tolist()
    assert outcome.metrics["top1"].value == np.mean(predictions == labels[150:])


def test_the_strength_is_the_best_on_what_was_held_out():
    """With hardly any strength only the bias is left, which says the most frequent class."""
    labels = np.concatenate([np.repeat([0, 1, 2], [80, 60, 60]), labels_of(30, 3)])
    settings = {"strengths": (1e-9, 1.0), "shots": ()}
    outcome = FewShot(**settings).run(KnownEncoder(np.eye(3)[labels]), dataset(200, 30, labels), QUIET)
    assert outcome.details["selection"] == {"on": "20 held-out training images", "C": 1.0, "held_out": 1.0}


def test_no_shot_is_among_the_images_to_choose_on(monkeypatch):
    labels = labels_of(100, 2)
    data = dataset(60, 40, labels, bad_train=(0, 1, 2))
    drawn_from, draw = [], few_shot.draw_shots
    monkeypatch.setattr(few_shot, "draw_shots", lambda rows, *rest: drawn_from.append(rows) or draw(rows, *rest))
    FewShot(**QUICK).run(KnownEncoder(np.eye(2)[labels]), data, QUIET)
    readable = np.arange(3, 60)
    fitting, held = held_out(labels[readable])
    assert len(held) == 6
    for rows in drawn_from:
        assert rows.tolist() == readable[fitting].tolist()


def test_the_strength_is_not_chosen_on_what_it_was_fitted_to(monkeypatch):
    """Of the shots and of all images alike; then the last fit has everything."""
    rng, labels = np.random.default_rng(0), labels_of(100, 2)
    features, fits, score = rng.normal(size=(100, 2)), [], few_shot.logistic_scores

    def spied(fitted, labels, scored, *rest):
        fits.append(tuple({tuple(row) for row in rows.tolist()} for rows in (fitted, scored)))
        return score(fitted, labels, scored, *rest)

    monkeypatch.setattr(few_shot, "logistic_scores", spied)
    FewShot(**QUICK).run(KnownEncoder(features), dataset(60, 40, labels), QUIET)
    searches = [(fitted, scored) for fitted, scored in fits if len(scored) == 6]
    assert len(searches) == 5 * 3 and len(fits) == 5 * 3 + 5
    assert not any(fitted & scored for fitted, scored in searches)
    assert {len(fitted) for fitted, _ in searches} == {54, 2, 8}
    assert [len(fitted) for fitted, scored in fits if len(scored) == 40] == [60, 2, 2, 8, 8]


def test_a_stopped_one_goes_on_fit_by_fit(tmp_path, monkeypatch):
    labels = labels_of(100, 2)
    encoder = KnownEncoder(np.eye(2)[labels] + np.random.default_rng(0).normal(size=(100, 2)))
    protocol, data = FewShot(**QUICK), dataset(60, 40, labels, bad_test=(3,))
    whole, calls, score = protocol.run(encoder, data, QUIET), [], few_shot.logistic_scores

    def stopping(*arguments):
        calls.append(arguments)
        if len(calls) == 17:  # of 15 to search and 5 to the end
            raise KeyboardInterrupt
        return score(*arguments)

    monkeypatch.setattr(few_shot, "logistic_scores", stopping)
    with pytest.raises(KeyboardInterrupt):
        protocol.run(encoder, data, Session(folder=tmp_path, quiet=True))
    again = protocol.run(encoder, data, Session(folder=tmp_path, quiet=True))
    assert len(calls) == 17 + 4
    assert (again.metrics, again.samples, again.details) == (whole.metrics, whole.samples, whole.details)
    FewShot(**QUICK | {"steps": 999}).run(encoder, data, Session(folder=tmp_path, quiet=True))
    assert len(calls) == 17 + 4 + 20


def test_images_that_can_not_be_read_are_wrong_to_test_and_left_out_to_train():
    labels = np.tile([0, 1], 40)
    features = np.eye(2)[labels]
    data = dataset(60, 20, labels, bad_train=tuple(range(0, 60, 3)), bad_test=(1, 18))
    outcome = FewShot(**QUICK).run(KnownEncoder(features), data, QUIET)
    assert {metric.value for metric in outcome.metrics.values()} == {18 / 20}
    wrong = [sample for sample in outcome.samples if not sample["correct"]]
    assert [(sample["sample"], sample["prediction"]) for sample in wrong] == [("00061", None), ("00078", None)]
    assert outcome.details["sweep"][0]["images"] == 40


def test_what_falls_short_is_noted():
    labels = np.concatenate([np.zeros(30, np.int64), np.ones(4, np.int64), labels_of(20, 2)])
    features = np.random.default_rng(0).normal(size=(54, 30))
    outcome = FewShot(**QUICK | {"shots": (8,), "steps": 1}).run(KnownEncoder(features), dataset(34, 20, labels), QUIET)
    assert outcome.details["notes"] == [
        "12 of 12 fits had not converged after 1 steps",
        "8 shots: 12 images, as not every class has that many",
    ]


def test_refusals():
    labels = labels_of(60, 2)
    encoder, data = KnownEncoder(np.eye(2)[labels]), dataset(50, 10, labels)
    with pytest.raises(ValueError, match="'all' are 2 streams: expected one"):
        FewShot(layers="all").run(encoder, data, QUIET)
    one_class = dataset(20, 10, np.repeat([0, 1], [25, 5]))
    with pytest.raises(ValueError, match="expected some of two classes"):
        FewShot().run(encoder, one_class, QUIET)
    data.train = None
    with pytest.raises(ValueError, match="no training set"):
        FewShot().run(encoder, data, QUIET)
    wrong = {
        "draws": [0],
        "shots": [(0,), (1, 1)],
        "strengths": [(), (0.0,), (np.nan,)],
        "steps": [0],
        "tolerance": [0.0, np.nan],
        "held_out": [0.0, 1.0],
        "seed": [-1],
    }
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(ValueError, match=f"^{name} .*: expected"):
                FewShot(**{name: value})
