"""Zero-shot against CLIP_benchmark's functions, and what it says of models that know all or nothing."""

import re
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from known_features import KnownPair, dataset, within_chance

from aimv2.data.shapes_language import parse_caption
from aimv2.data.shapes_world import COLOURS, SHAPES, WORLDS, world
from aimv2.evals.datasets.shards import shapes_templates
from aimv2.evals.session import Session
from aimv2.evals.zero_shot import ZeroShot

open_clip = pytest.importorskip("open_clip")
QUIET = Session(quiet=True)


def labels_of(count: int, classes: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).permutation(np.arange(count) % classes)


def by_its_letters(text: str) -> np.ndarray:
    """Random features of a text."""
    return np.random.default_rng(zlib.crc32(text.encode())).normal(size=16)


def knows(classes: int):
    """Features of a text that names its class as "class N"."""
    return lambda text: np.eye(classes)[int(text.split("class ")[1].split()[0].rstrip("."))]


def test_scores_are_those_of_clip_benchmark():
    theirs = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification")
    rng, labels = np.random.default_rng(0), labels_of(80, 7)
    data = dataset(1, 79, labels)
    data.templates = ("a {}", "the {} of {}s", 'it says "{}"')
    model = KnownPair(rng.normal(size=(80, 16)), by_its_letters)
    outcome = ZeroShot().run(model, data, QUIET)

    templates = [template.replace("{}", "{c}") for template in data.templates]
    classifier = theirs.zero_shot_classifier(model, model.tokenizer, list(data.classes), templates, "cpu", amp=False)
    torch.testing.assert_close(outcome.tensors["classifier"], classifier, rtol=0, atol=1e-6)  # unit vectors in fp32
    numbers = torch.arange(1, 80)
    logits = torch.nn.functional.normalize(model.images[numbers], dim=1) @ classifier
    truth = torch.from_numpy(data.test.labels)
    assert [sample["prediction"] for sample in outcome.samples] == logits.argmax(dim=1).tolist()
    top5 = (logits.topk(5, dim=1).indices == truth[:, None]).any(dim=1).double().mean().item()
    assert outcome.metrics["top5"].value == pytest.approx(top5)
    from sklearn.metrics import balanced_accuracy_score

    expected = balanced_accuracy_score(truth, logits.argmax(dim=1))
    assert outcome.metrics["mean_per_class"].value == pytest.approx(expected)


def test_every_class_is_said_in_every_template():
    data = dataset(1, 9, labels_of(10, 3))
    data.templates = ("a {}.", "{}")
    model = KnownPair(np.eye(10), lambda text: np.ones(10))
    outcome = ZeroShot().run(model, data, QUIET)
    assert model.texts == [text for name in data.classes for text in (f"a {name}.", name)]
    assert outcome.details["templates"] == 2
    assert outcome.details["class_names"] == ["class 0", "class 1", "class 2"]


def test_long_lists_of_templates_are_encoded_in_parts(monkeypatch):
    data = dataset(1, 23, labels_of(24, 8))
    data.templates = tuple(f"{number} {{}}" for number in range(300))
    model = KnownPair(np.zeros((24, 16)), by_its_letters)
    whole = ZeroShot().run(model, data, QUIET).tensors["classifier"]
    assert max(model.calls) == 300
    assert len(model.calls) == 8
    monkeypatch.setattr("aimv2.evals.zero_shot.TEXTS", 10**6)
    torch.testing.assert_close(ZeroShot().run(model, data, QUIET).tensors["classifier"], whole, rtol=0, atol=0)


@pytest.mark.parametrize(("templates", "count"), [("imagenet", 80), ("simple", 7), ("none", 1)])
def test_templates_of_clip(templates, count):
    model = KnownPair(np.eye(10), knows(10))
    outcome = ZeroShot(templates=templates).run(model, dataset(1, 9, labels_of(10, 3)), QUIET)
    assert outcome.details["templates"] == count
    assert len(model.texts) == 3 * count
    assert ("itap of a class 0." in model.texts) == (count > 1)
    assert ("class 0" in model.texts) == (count == 1)


def test_templates_and_names_of_files(tmp_path):
    (tmp_path / "templates.txt").write_text("ein {}\n\n  das {} hier  \n")
    (tmp_path / "names.txt").write_text("Hund\nKatze\nMaus\n")
    model = KnownPair(np.eye(10), lambda text: np.ones(10))
    settings = {"templates": str(tmp_path / "templates.txt"), "classes": str(tmp_path / "names.txt")}
    ZeroShot(**settings).run(model, dataset(1, 9, labels_of(10, 3)), QUIET)
    expected = ["ein Hund", "das Hund hier", "ein Katze", "das Katze hier", "ein Maus", "das Maus hier"]
    assert model.texts == expected


def test_a_mark_of_byte_order_is_no_part_of_a_template(tmp_path):
    (tmp_path / "templates.txt").write_text("a {}\n", encoding="utf-8-sig")
    model = KnownPair(np.eye(10), lambda text: np.ones(10))
    ZeroShot(templates=str(tmp_path / "templates.txt")).run(model, dataset(1, 9, labels_of(10, 3)), QUIET)
    assert model.texts == ["a class 0", "a class 1", "a class 2"]


def test_imagenet_has_clips_names_and_templates(monkeypatch):
    """Whatever its folders are called; but not a part of it, and not what is asked for otherwise."""
    monkeypatch.setattr(open_clip, "OPENAI_IMAGENET_TEMPLATES", open_clip.OPENAI_IMAGENET_TEMPLATES[:2])  # of 80
    data = dataset(1, 9, np.arange(10))
    data.name, data.classes = "imagenet", tuple(f"n{number:08d}" for number in range(1000))
    asked = []
    model = KnownPair(np.eye(10), lambda text: asked.append(text) or np.ones(10))
    outcome = ZeroShot().run(model, data, QUIET)
    assert outcome.details["class_names"] == list(open_clip.IMAGENET_CLASSNAMES)
    assert outcome.details["notes"] == ["classes of one name can't be told apart: missile, sunglasses"]
    assert asked[:2] == [template("tench") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    assert len(asked) == 2000
    assert ZeroShot(templates="none").run(model, data, QUIET).details["templates"] == 1
    data.classes = data.classes[:100]
    part = ZeroShot().run(model, data, QUIET)
    assert part.details["class_names"] == list(data.classes) and part.details["templates"] == 7


def test_a_dataset_without_templates_gets_clips_best():
    outcome = ZeroShot().run(KnownPair(np.eye(10), knows(10)), dataset(1, 9, labels_of(10, 3)), QUIET)
    assert outcome.details["templates"] == 7
    assert outcome.details["notes"] == ["known has no templates: CLIP's best 7 are used"]


def test_names_that_are_twice_there_are_noted(tmp_path):
    (tmp_path / "names").write_text("crane\ncrane\nmouse\n")
    protocol = ZeroShot(templates="none", classes=str(tmp_path / "names"))
    outcome = protocol.run(KnownPair(np.ones((10, 16)), by_its_letters), dataset(1, 9, labels_of(10, 3)), QUIET)
    assert outcome.details["notes"] == ["classes of one name can't be told apart: crane"]


def test_refusals(tmp_path):
    data, model = dataset(1, 9, labels_of(10, 3)), KnownPair(np.eye(10), knows(10))
    with pytest.raises(ValueError, match="'imagenet': 1000 names, expected 3 as known"):
        ZeroShot(classes="imagenet").run(model, data, QUIET)
    (tmp_path / "bad").write_text("a photo\n")
    with pytest.raises(ValueError, match=r"template 'a photo': expected \{\}"):
        ZeroShot(templates=str(tmp_path / "bad")).run(model, data, QUIET)
    (tmp_path / "empty").write_text("\n")
    for name in ("nowhere", "empty"):
        with pytest.raises(ValueError, match=f"{name}.*expected"):
            ZeroShot(templates=str(tmp_path / name)).run(model, data, QUIET)
    data.test.labels = None
    with pytest.raises(ValueError, match="has no classes"):
        ZeroShot().run(model, data, QUIET)


# What it says of models


def test_a_model_that_knows_the_class_is_always_right():
    labels = labels_of(100, 6)
    outcome = ZeroShot().run(KnownPair(np.eye(6)[labels], knows(6)), dataset(1, 99, labels), QUIET)
    assert {name: metric.value for name, metric in outcome.metrics.items()} == dict.fromkeys(
        ("top1", "top5", "mean_per_class"), 1.0
    )
    assert {entry["value"] for entry in outcome.details["per_class"].values()} == {1.0}


def test_random_features_and_shuffled_labels_are_at_chance():
    rng, labels = np.random.default_rng(1), labels_of(801, 8)
    data = dataset(1, 800, labels)
    for model in (
        KnownPair(rng.normal(size=(801, 16)), by_its_letters),
        KnownPair(np.eye(8)[rng.permutation(labels)], knows(8)),
    ):
        metrics = ZeroShot().run(model, data, QUIET).metrics
        assert all(within_chance(metric) for metric in metrics.values())


def test_a_model_that_gives_all_the_same_says_the_first_class():
    labels = labels_of(100, 4)
    model = KnownPair(np.ones((100, 4)), lambda text: np.ones(4))
    outcome = ZeroShot().run(model, dataset(1, 99, labels), QUIET)
    assert outcome.metrics["top1"].value == np.mean(labels[1:] == 0)


def test_images_that_can_not_be_read_are_wrong():
    labels = labels_of(21, 2)
    data = dataset(1, 20, labels, bad_test=(3, 19))
    outcome = ZeroShot().run(KnownPair(np.eye(2)[labels], knows(2)), data, QUIET)
    assert outcome.metrics["top1"].value == 18 / 20
    assert [sample["sample"] for sample in outcome.samples if sample["prediction"] is None] == ["00004", "00020"]


UNSEEN = Path(__file__).parents[2] / "eval" / "templates" / "shapes_unseen.txt"


@pytest.mark.parametrize("difficulty", WORLDS)
def test_unseen_templates_are_no_captions_of_the_world(difficulty):
    """Of the words of its grammar, but with no caption's order of them; and they favour neither size."""
    templates = UNSEEN.read_text().splitlines()
    assert len(templates) == len(set(templates)) >= 5
    board = world(difficulty)
    grammar = {word for label in ("shape", "shape_colour") for word in " ".join(shapes_templates(label, board)).split()}
    for template in templates:
        assert template.count("{}") == 1
        assert set(template.split()) <= grammar
        for name in [*SHAPES, *(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)]:
            assert parse_caption(template.format(name), difficulty) is None
    words = Counter(re.findall("big|small", " ".join(templates)))
    assert words["big"] == words["small"]


def test_unseen_templates_are_taken():
    model = KnownPair(np.random.default_rng(0).normal(size=(10, 16)), by_its_letters)
    outcome = ZeroShot(templates=str(UNSEEN)).run(model, dataset(1, 9, labels_of(10, 3)), QUIET)
    assert outcome.details["templates"] == len(UNSEEN.read_text().splitlines())
