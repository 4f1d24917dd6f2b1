"""Retrieval against CLIP_benchmark's recall and a plain sort, and what it says of models that know all or nothing."""

import math
from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from known_features import KnownPair, numbered, within_chance

from aimv2.evals import retrieval
from aimv2.evals.datasets import Dataset
from aimv2.evals.retrieval import Retrieval, chance_of_any, embed_texts, ranks, recall
from aimv2.evals.session import Session

QUIET = Session(quiet=True)


def data_of(captions: list[list[str]], bad: tuple[int, ...] = ()) -> Dataset:
    test = numbered(range(len(captions)), None, bad, captions=captions)
    return Dataset(spec="known", name="known", classes=(), train=None, test=test)


def uneven(images: int, seed: int = 0) -> list[list[str]]:
    """1 to 6 captions an image, "IMAGE NUMBER"."""
    counts = np.random.default_rng(seed).integers(1, 7, images)
    return [[f"{image} {number}" for number in range(count)] for image, count in enumerate(counts.tolist())]


def image_of(text: str) -> int:
    return int(text.split()[0])


def random_pair(captions: list[list[str]], signal: float, seed: int = 0, width: int = 24) -> KnownPair:
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(len(captions), width))
    texts = {text: signal * images[image_of(text)] + rng.normal(size=width) for own in captions for text in own}
    return KnownPair(images, texts.__getitem__)


@pytest.mark.parametrize("signal", [0.0, 0.3, 1.0])
def test_recalls_are_those_of_clip_benchmark(signal):
    theirs = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval")
    captions = uneven(61)
    model = random_pair(captions, signal)
    metrics = Retrieval().run(model, data_of(captions), QUIET).metrics
    texts = [text for own in captions for text in own]
    images = torch.nn.functional.normalize(model.images, dim=1)
    scores = embed_texts(model, texts, QUIET) @ images.T
    positive = torch.tensor([[image_of(text) == image for image in range(61)] for text in texts])
    for k in (1, 5, 10):
        to_image = (theirs.recall_at_k(scores, positive, k) > 0).double().mean().item()
        to_text = (theirs.recall_at_k(scores.T, positive.T, k) > 0).double().mean().item()
        assert metrics[f"text_to_image_r{k}"].value == pytest.approx(to_image)
        assert metrics[f"image_to_text_r{k}"].value == pytest.approx(to_text)


def test_samples_tell_the_rank_of_the_first_right_one():
    captions = uneven(40)
    model = random_pair(captions, 0.5)
    outcome = Retrieval().run(model, data_of(captions), QUIET)
    texts = [text for own in captions for text in own]
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)  # noqa: E731
    similarities = unit(model.images.numpy().astype(np.float64)) @ unit(np.stack([model.text(t) for t in texts])).T
    for image, sample in enumerate(outcome.samples):
        ranked = [image_of(texts[i]) for i in np.argsort(-similarities[image])]
        assert sample["rank"] == ranked.index(image) + 1
        assert sample["correct"] == (sample["rank"] == 1)
        for rank, text in zip(sample["caption_ranks"], captions[image], strict=True):
            assert rank == np.argsort(-similarities[:, texts.index(text)]).tolist().index(image) + 1
    assert outcome.metrics["image_to_text_r1"].value == np.mean([sample["correct"] for sample in outcome.samples])
    assert outcome.details["captions"] == len(texts)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_equal_ones_count_in_every_order(data):
    """Small whole similarities are the same in fp32, and most are tied: counted over all orders of the things, each
    sorted by similarity.
    """
    queries, things = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    values = st.lists(st.integers(0, 2), min_size=things, max_size=things)
    similarities = np.array(data.draw(st.lists(values, min_size=queries, max_size=queries)))
    owners = np.array(data.draw(st.lists(st.integers(0, 3), min_size=things, max_size=things)))
    found = ranks(torch.from_numpy(similarities).float(), torch.eye(things), np.arange(queries), owners, QUIET)
    for query in range(queries):
        places = []
        for order in permutations(range(things)):
            ranked = [owners[i] for i in sorted(order, key=lambda i: -similarities[query][i])]
            places.append(ranked.index(query) + 1 if query in ranked else None)
        for k in (1, 2, 3, 7):
            expected = np.mean([place is not None and place <= k for place in places])
            assert found.within(k)[query] == pytest.approx(expected, abs=1e-12)
        expected = None if None in places else pytest.approx(np.mean(places))
        assert found.expected()[query] == expected


def test_a_near_tie_is_a_tie():
    """As much as rounding moves a sum of fp32 is not what a model has found."""
    gallery = torch.tensor([[1.0], [1.0 + 5e-7], [1.0 - 5e-7], [0.99]])
    found = ranks(torch.ones(3, 1), gallery, np.array([0, 1, 3]), np.arange(4), QUIET)
    assert [part.tolist() for part in found] == [[0, 0, 3], [2, 2, 0], [1, 1, 1]]


def test_captions_that_are_copies_lose_what_chance_takes_from_them():
    """Of two images with one caption and no other, each is found half of the time."""
    captions = [["0 same"], ["0 same"], ["2 own"], ["3 own"]]
    model = KnownPair(np.eye(4), lambda text: np.eye(4)[image_of(text)] + np.eye(4)[1] * (text == "0 same"))
    outcome = Retrieval(k=(1, 2)).run(model, data_of(captions), QUIET)
    assert {name: metric.value for name, metric in outcome.metrics.items()} == {
        "image_to_text_r1": 3 / 4,
        "image_to_text_r2": 1,
        "text_to_image_r1": 3 / 4,
        "text_to_image_r2": 1,
    }
    assert [sample["correct"] for sample in outcome.samples] == [0.5, 0.5, True, True]
    assert [sample["rank"] for sample in outcome.samples] == [1.5, 1.5, 1, 1]
    assert [sample["caption_ranks"] for sample in outcome.samples] == [[1.5], [1.5], [1], [1]]


def test_the_search_does_not_depend_on_how_it_is_cut_up(monkeypatch):
    captions = uneven(30)
    model, data = random_pair(captions, 0.5), data_of(captions)
    whole = Retrieval().run(model, data, QUIET)
    monkeypatch.setattr(retrieval, "MOST_VALUES", 300)
    monkeypatch.setattr(retrieval, "TEXTS", 7)
    parts = Retrieval().run(model, data, QUIET)
    assert parts.metrics == whole.metrics
    assert parts.samples == whole.samples


# Chance and standard error


@pytest.mark.parametrize(("total", "k"), [(6, 1), (6, 2), (7, 5), (5, 5), (4, 10)])
def test_chance_is_that_of_all_orders(total, k):
    """Counted over every set of k that may come first."""
    sets = list(combinations(range(total), min(k, total)))
    for count in range(1, total + 1):
        expected = np.mean([min(chosen) < count for chosen in sets])
        assert chance_of_any(np.array([count]), total, k)[0] == pytest.approx(expected)
    assert chance_of_any(np.array([0]), total, k)[0] == pytest.approx(0)


def test_chance_of_a_large_set_is_exact():
    found = chance_of_any(np.array([5]), 25000, 10)[0]
    assert found == pytest.approx(1 - math.comb(24995, 10) / math.comb(25000, 10), rel=1e-9)


def test_chance_is_stated_for_both_ways():
    captions = uneven(30)
    metrics = Retrieval(k=(1, 40)).run(random_pair(captions, 0.5), data_of(captions), QUIET).metrics
    counts, total = [len(own) for own in captions], sum(map(len, captions))
    assert metrics["image_to_text_r1"].chance == pytest.approx(np.mean(counts) / total)
    assert metrics["text_to_image_r1"].chance == pytest.approx(1 / 30)
    assert metrics["text_to_image_r40"].chance == 1
    assert metrics["text_to_image_r40"].value == 1


def test_the_standard_error_takes_the_captions_of_an_image_together():
    hits = np.random.default_rng(0).integers(0, 2, 50)
    alone = recall(hits, np.arange(50), 0.1)
    assert alone.stderr == pytest.approx((alone.value * (1 - alone.value) / 50) ** 0.5)
    together = recall(np.repeat(hits, 5), np.repeat(np.arange(50), 5), 0.1)  # five times the same says nothing more
    assert (together.value, together.stderr) == pytest.approx((alone.value, alone.stderr))
    assert together.n == 250


# What it says of models


def test_a_model_that_knows_the_image_is_always_right():
    captions = uneven(43)
    model = KnownPair(np.eye(43), lambda text: np.eye(43)[image_of(text)])
    outcome = Retrieval().run(model, data_of(captions), QUIET)
    assert list(outcome.metrics) == [f"{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
    assert {metric.value for metric in outcome.metrics.values()} == {1.0}
    assert {metric.stderr for metric in outcome.metrics.values()} == {0.0}


def test_random_features_and_shuffled_captions_are_at_chance():
    captions = [[f"{image} {number}" for number in range(3)] for image in range(400)]
    order = np.random.default_rng(3).permutation(400)
    shuffled = KnownPair(np.eye(400)[order] + 1e-3 * np.random.default_rng(4).normal(size=(400, 400)), None)
    shuffled.text = lambda text: np.eye(400)[image_of(text)]
    for model in (random_pair(captions, 0.0), shuffled):
        metrics = Retrieval().run(model, data_of(captions), QUIET).metrics
        assert within_chance(metrics["image_to_text_r10"])
        for metric in metrics.values():  # captions of an image stand and fall together: 400 images, not 1200 captions
            assert abs(metric.value - metric.chance) < 4 * (metric.chance / 400) ** 0.5


def test_a_model_that_gives_all_the_same_is_at_chance():
    """Exactly."""
    captions = uneven(30)
    model = KnownPair(np.full((30, 9), 0.1), lambda text: np.full(9, 0.3))
    for data, k in ((data_of(captions), (1, 5, 10)), (data_of(captions[:2]), (1, 5))):
        for metric in Retrieval(k=k).run(model, data, QUIET).metrics.values():
            assert metric.value == pytest.approx(metric.chance)


def test_images_that_can_not_be_read_are_never_found_and_find_nothing():
    captions = uneven(12)
    model = KnownPair(np.eye(12), lambda text: np.eye(12)[image_of(text)])
    outcome = Retrieval(k=(1, 50)).run(model, data_of(captions, bad=(2, 11)), QUIET)
    texts, lost = sum(map(len, captions)), len(captions[2]) + len(captions[11])
    for k in (1, 50):  # however many are looked at
        assert outcome.metrics[f"image_to_text_r{k}"].value == pytest.approx(10 / 12)
        assert outcome.metrics[f"text_to_image_r{k}"].value == pytest.approx(1 - lost / texts)
    ranks = {sample["sample"]: (sample["rank"], *sample["caption_ranks"]) for sample in outcome.samples}
    assert set(ranks["00002"]) == set(ranks["00011"]) == {None}
    assert set(ranks["00003"]) == {1}
    with pytest.raises(ValueError, match="none of 12 images can be read"):
        Retrieval().run(model, data_of(captions, bad=tuple(range(12))), QUIET)


def test_images_without_captions_and_captions_of_several_images_are_noted():
    captions = [["0 same"], [], ["2 own"], ["0 same"]]
    model = KnownPair(np.eye(4), lambda text: np.eye(4)[image_of(text)])
    outcome = Retrieval(k=(1, 2)).run(model, data_of(captions), QUIET)
    assert outcome.details["notes"] == [
        "1 images have no captions: they can only be mistaken for others",
        "1 captions belong to several images, of which the others count as wrong",
    ]
    assert outcome.metrics["image_to_text_r1"].n == 3
    assert outcome.metrics["text_to_image_r1"].value == pytest.approx(2 / 3)
    assert [sample["sample"] for sample in outcome.samples] == ["00000", "00002", "00003"]


def test_refusals():
    model = random_pair(uneven(3), 1.0)
    for captions in ([[], [], []], None):
        data = data_of(uneven(3))
        data.test.captions = captions
        with pytest.raises(ValueError, match="has no captions"):
            Retrieval().run(model, data, QUIET)
    for k in ((), (0,), (5, 5), (1.5,)):
        with pytest.raises(ValueError, match=r"^k .*: expected"):
            Retrieval(k=k)
