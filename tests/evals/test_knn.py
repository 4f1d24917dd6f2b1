"""kNN against a plain loop in float64 and scikit-learn, and what it says of encoders that know all or nothing."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from known_features import KnownEncoder, dataset, within_chance

from aimv2.evals import knn
from aimv2.evals.knn import KNN, Rows, largest, metrics_of_votes, nearest, votes
from aimv2.evals.pooled_streams import PooledStreams
from aimv2.evals.session import Session

QUIET = Session(quiet=True)
SMALL = {"k": (1, 5, 20), "layers": "pooled"}


def rows(array: np.ndarray) -> Rows:
    return Rows(array, np.arange(len(array)))


def by_loop(queries, gallery, labels, k, most, temperature, classes) -> np.ndarray:
    """Scores as the paper and DINOv2's code say, one query after the other."""
    scores = np.zeros((len(queries), classes))
    for row, query in enumerate(queries.astype(np.float64)):
        unit = gallery.astype(np.float64) / np.linalg.norm(gallery.astype(np.float64), axis=1, keepdims=True)
        similarities = unit @ (query / np.linalg.norm(query))
        order = sorted(range(len(gallery)), key=lambda i: (-similarities[i], i))[:most]
        weights = np.exp(similarities[order] / temperature)
        weights /= weights.sum()
        for neighbour, weight in list(zip(order, weights, strict=True))[:k]:
            scores[row, labels[neighbour]] += weight
    return scores


@pytest.fixture
def features():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 7, 300)
    centres = rng.normal(size=(7, 12)) * 0.5
    gallery = (centres[labels] + rng.normal(size=(300, 12))).astype(np.float32)
    return rng.normal(size=(50, 12)).astype(np.float32), gallery, labels


@pytest.mark.parametrize("k", [1, 10, 100])
def test_scores_are_those_of_a_plain_loop(features, k):
    queries, gallery, labels = features
    similarities, positions = nearest(rows(queries), rows(gallery), 100, QUIET)
    found = votes(similarities, labels[positions], k, 0.07, 7)
    expected = by_loop(queries, gallery, labels, k, 100, 0.07, 7)
    # fp32 similarities are off by 1e-7, and e to the power of that over 0.07 by 2e-6
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
    assert (found.argmax(axis=1) == expected.argmax(axis=1)).all()


@pytest.mark.parametrize("k", [1, 10, 20, 200])
def test_predictions_are_scikit_learns(features, k):
    neighbors = pytest.importorskip("sklearn.neighbors")
    queries, gallery, labels = features
    reference = neighbors.KNeighborsClassifier(
        n_neighbors=k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
    ).fit(gallery, labels)
    similarities, positions = nearest(rows(queries), rows(gallery), 200, QUIET)
    assert (votes(similarities, labels[positions], k, 0.07, 7).argmax(axis=1) == reference.predict(queries)).all()


def test_the_search_does_not_depend_on_how_it_is_cut_up(features, monkeypatch):
    queries, gallery, _ = features
    whole = nearest(rows(queries), rows(gallery), 30, QUIET)
    monkeypatch.setattr(knn, "QUERIES", 7)
    monkeypatch.setattr(knn, "MOST_VALUES", 12 * 31)  # 31 rows of the gallery at a time, the last 21
    similarities, positions = nearest(rows(queries), rows(gallery), 30, QUIET)
    assert (positions == whole[1]).all()
    np.testing.assert_allclose(similarities, whole[0], rtol=0, atol=1e-6)  # other kernels for other shapes


def test_rows_of_an_array_are_searched_alone(features):
    queries, gallery, _ = features
    numbers = np.arange(5, 300, 7)
    some = nearest(Rows(queries, np.array([3, 4])), Rows(gallery, numbers), 4, QUIET)
    cut_out = nearest(rows(queries[3:5].copy()), rows(gallery[numbers].copy()), 4, QUIET)
    assert all((a == b).all() for a, b in zip(some, cut_out, strict=True))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_of_equals_the_first_are_taken(data):
    width = data.draw(st.integers(1, 12))
    line = st.lists(st.integers(-2, 2), min_size=width, max_size=width)
    values = torch.tensor(data.draw(st.lists(line, min_size=1, max_size=4)), dtype=torch.float32)
    k = data.draw(st.integers(1, width))
    found, columns = largest(values, k)
    for row, some, of_row in zip(values.tolist(), found.tolist(), columns.tolist(), strict=True):
        assert of_row == sorted(range(width), key=lambda i: (-row[i], i))[:k]
        assert some == [row[i] for i in of_row]


def test_of_equals_the_first_are_taken_across_parts(monkeypatch):
    monkeypatch.setattr(knn, "MOST_VALUES", 8)
    gallery = np.eye(4, dtype=np.float32)[[0, 1, 2, 0, 1, 0, 0, 3]]  # one-hot: sums are exact
    similarities, positions = nearest(rows(np.eye(4, dtype=np.float32)[:1]), rows(gallery), 6, QUIET)
    assert positions.tolist() == [[0, 3, 5, 6, 1, 2]]
    assert similarities.tolist() == [[1, 1, 1, 1, 0, 0]]


def test_a_k_that_is_no_part_of_the_gallery_is_refused(features):
    queries, gallery, _ = features
    with pytest.raises(ValueError, match="k 301: expected 1 to 300"):
        nearest(rows(queries), rows(gallery), 301, QUIET)


def test_similarities_in_memory_are_bounded_where_features_are_short(monkeypatch):
    """A gallery of one value an image is still taken in parts."""
    monkeypatch.setattr(knn, "QUERIES", 8)
    monkeypatch.setattr(knn, "MOST_VALUES", 80)
    sizes, take = [], knn.largest
    monkeypatch.setattr(knn, "largest", lambda values, k: sizes.append(values.numel()) or take(values, k))
    gallery = np.random.default_rng(0).normal(size=(95, 1)).astype(np.float32)
    similarities, _ = nearest(rows(gallery[:20]), rows(gallery), 3, QUIET)
    assert (similarities > 0.999).all()
    assert max(sizes) == 80


def test_classes_that_nobody_votes_for_are_never_among_five():
    """Two of eight classes have votes: which numbers the classes have makes no difference."""
    similarities = np.array([[0.9, 0.8, 0.7]] * 8)
    neighbours, labels = np.tile([6, 6, 2], (8, 1)), np.arange(8)
    for renumbering in (np.arange(8), np.arange(8)[::-1], np.random.default_rng(0).permutation(8)):
        scores = votes(similarities, renumbering[neighbours], 3, 0.07, 8)
        metrics = metrics_of_votes(scores, renumbering[labels])
        assert metrics["top1"].value == 1 / 8
        assert (metrics["top5"].value, metrics["top5"].chance) == (2 / 8, 5 / 8)
    assert "top5" not in metrics_of_votes(np.ones((2, 5)), np.array([0, 4]))


# What it says of encoders


def labels_of(count: int, classes: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).permutation(np.arange(count) % classes)


def test_an_encoder_that_knows_the_class_is_always_right():
    labels = labels_of(241, 6)
    outcome = KNN(**SMALL).run(KnownEncoder(np.eye(6)[labels]), dataset(200, 41, labels), QUIET)
    assert {name: metric.value for name, metric in outcome.metrics.items()} == dict.fromkeys(
        ("top1", "top5", "mean_per_class", "top1_k1", "top1_k5", "top1_k20"), 1.0
    )
    assert all(sample["correct"] for sample in outcome.samples)
    assert outcome.details["selection"]["held_out"] == 1.0


def test_random_features_and_shuffled_labels_are_at_chance():
    rng, labels = np.random.default_rng(1), labels_of(900, 4)
    data = dataset(500, 400, labels)
    for features in (rng.normal(size=(900, 8)), np.eye(4)[rng.permutation(labels)]):
        metrics = KNN(**SMALL).run(KnownEncoder(features), data, QUIET).metrics
        assert all(within_chance(metric) for metric in metrics.values())


def test_an_encoder_that_gives_all_the_same_says_one_class():
    """Neighbours are then the first k of the training set, whose most frequent class all images get."""
    labels = labels_of(160, 4)
    outcome = KNN(k=(5,)).run(KnownEncoder(np.ones((160, 3))), dataset(100, 60, labels), QUIET)
    said = int(np.bincount(labels[:5], minlength=4).argmax())
    assert {sample["prediction"] for sample in outcome.samples} == {said}
    assert outcome.metrics["top1"].value == np.mean(labels[100:] == said)


def test_images_that_can_not_be_read_are_wrong_to_test_and_left_out_to_train():
    labels = np.tile([0, 1], 40)
    data = dataset(60, 20, labels, bad_train=tuple(range(0, 60, 3)), bad_test=(1, 18))
    outcome = KNN(k=(1, 5)).run(KnownEncoder(np.eye(2)[labels]), data, QUIET)
    assert outcome.metrics["top1"].value == 18 / 20
    wrong = [sample for sample in outcome.samples if not sample["correct"]]
    assert [(sample["sample"], sample["prediction"]) for sample in wrong] == [("00061", None), ("00078", None)]
    chosen = {"on": "4 held-out training images", "stream": "pooled", "k": 1, "held_out": 1.0}
    assert outcome.details["selection"] == chosen


def test_what_was_held_out_to_choose_votes_in_the_end():
    """Every test image is the same as one training image and like no other."""
    labels = labels_of(80, 4)
    labels[40:] = labels[:40]
    features = np.tile(np.eye(40), (2, 1))
    outcome = KNN(k=(1,)).run(KnownEncoder(features), dataset(40, 40, labels), QUIET)
    assert outcome.metrics["top1"].value == 1.0


def test_a_k_beyond_the_training_set_is_left_out_and_noted():
    labels = labels_of(60, 2)
    outcome = KNN().run(KnownEncoder(np.eye(2)[labels]), dataset(50, 10, labels), QUIET)
    assert [name for name in outcome.metrics if "_k" in name] == ["top1_k10", "top1_k20"]
    assert outcome.details["notes"] == ["k 100, 200 left out: 45 training images besides those held out"]
    with pytest.raises(ValueError, match=r"k \(100, 200\): expected one of at most 45"):
        KNN(k=(100, 200)).run(KnownEncoder(np.eye(2)[labels]), dataset(50, 10, labels), QUIET)


def test_a_sweep_over_layers_chooses_on_what_was_held_out():
    rng, labels = np.random.default_rng(2), labels_of(300, 5)
    known, noise = np.eye(5)[labels] + rng.normal(size=(300, 5)) * 0.1, rng.normal(size=(300, 5))
    encoder = KnownEncoder(noise, known, rng.normal(size=(300, 5)))
    outcome = KNN(k=(5, 10), layers="all, pooled").run(encoder, dataset(240, 60, labels), QUIET)
    details = outcome.details
    assert details["selection"]["stream"] == "block_01"
    assert set(details["layers"]) == {"pooled", "block_00", "block_01", "block_02", "output"}
    assert len(details["sweep"]) == 10
    assert outcome.metrics["top1"] == outcome.metrics["top1@block_01"]
    assert outcome.metrics["top1"].value == 1.0
    assert outcome.metrics["top1@block_02"].value == outcome.metrics["top1@output"].value < 0.5


def test_choosing_never_looks_at_the_test_set():
    """Stream 0 is right in training and wrong in the test set, stream 1 the other way round."""
    labels = labels_of(120, 2)
    right, wrong = np.eye(2)[labels], np.eye(2)[np.random.default_rng(0).permutation(labels)]
    first, second = np.concatenate([right[:100], wrong[100:]]), np.concatenate([wrong[:100], right[100:]])
    outcome = KNN(k=(5,), layers="0,1").run(KnownEncoder(first, second), dataset(100, 20, labels), QUIET)
    assert outcome.details["selection"]["stream"] == "block_00"
    assert outcome.metrics["top1"].value < 1


def test_views_of_other_layers_have_other_keys():
    assert PooledStreams("all").key != PooledStreams("pooled").key
    assert PooledStreams("all, 2").key == PooledStreams("all,2").key


def test_refusals():
    labels = labels_of(60, 2)
    data = dataset(50, 10, labels)
    data.train = None
    with pytest.raises(ValueError, match="no training set"):
        KNN().run(KnownEncoder(np.eye(2)[labels]), data, QUIET)
    wrong = {"k": [(), (5, 5), (0,), (1.5,)], "temperature": [0, np.nan], "held_out": [0, 1, np.nan], "seed": [-1]}
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(ValueError, match=f"^{name} .*: expected"):
                KNN(**{name: value})
    for layers in ("", "pooled,", "pooled,,all"):
        with pytest.raises(ValueError, match=r"layers .*expected a stream"):
            PooledStreams(layers)
