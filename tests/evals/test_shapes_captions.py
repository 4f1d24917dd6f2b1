from types import SimpleNamespace

import pytest
import torch

from aimv2.data.loader import validation_loader
from aimv2.data.shapes import scene
from aimv2.data.tokenizer import Tokenizer
from aimv2.evals.shapes_captions import ShapesCaptions, count_right, read_truth, score

PLACE = {"patch_size": 16, "seed": 0, "rank": 0, "world_size": 1, "device": torch.device("cpu")}
RED = ("circle", "red", "big", "top left")
BLUE = ("star", "blue", "small", "bottom right")


class Captioner(torch.nn.Module):
    """Says a prepared caption for each image, recognised by its pixels."""

    def __init__(self, captions: dict[bytes, list[int]]):
        super().__init__()
        self.captions = captions
        self.encoder = lambda image, grid: image
        self.decoder = SimpleNamespace(generate=self.generate)

    def generate(self, features, *, real, eos_id, max_tokens):
        return [self.captions[image.numpy().tobytes()] for image in features]


def read(data, samples):
    """(pixels, caption ids without EOS) of validation samples."""
    loader = validation_loader(data, patch_size=16, micro_batch=64, seed=0, rank=0, world_size=1, limit=samples)
    return [
        (image.numpy().tobytes(), text[: length - 1].tolist())
        for batch in loader
        for image, text, length in zip(batch.image, batch.text, batch.text_length, strict=True)
    ]


def run(data, captions, samples=150, **place):
    return ShapesCaptions(samples=samples, batch_size=32).build(data, **PLACE | place)(Captioner(captions))


def test_the_true_captions_are_all_right(shapes):
    metrics = run(shapes, dict(read(shapes, 150)))
    assert metrics == dict.fromkeys(
        ("exact_set", "object_colour", "object_place", "object_shape", "object_size", "parsed"), 1.0
    )


def test_a_constant_caption_has_its_known_value(shapes):
    ids = Tokenizer(shapes.tokenizer).encode("a big red circle at top left", 40)[:-1]
    metrics = run(shapes, {pixels: ids for pixels, _ in read(shapes, 150)})
    scenes = [scene(0, "validation", i, "quick").objects for i in range(150)]
    objects = [thing for things in scenes for thing in things]
    there = [thing for thing in objects if thing.place == "top left"]
    assert metrics["parsed"] == 1.0
    assert metrics["exact_set"] == sum([o.attributes for o in things] == [RED] for things in scenes) / 150
    assert metrics["object_place"] == len(there) / len(objects)  # one claim never exceeds the objects there are
    assert metrics["object_colour"] == sum(thing.colour == "red" for thing in there) / len(objects)
    assert metrics["object_size"] == sum(thing.size == "big" for thing in there) / len(objects)


def test_captions_of_other_images_are_near_chance(shapes):
    pairs = read(shapes, 150)
    metrics = run(shapes, {pixels: pairs[i - 1][1] for i, (pixels, _) in enumerate(pairs)})
    # Places: of n = 1 or 2 true ones, m = 1 or 2 stated, m n / 4 agree by chance, over max(m, n) claims on average 7/4:
    # (9/4 / 4) / (7/4) = 0.32. Four standard errors of a share of ~260 claims: 0.12.
    assert metrics["object_place"] == pytest.approx(0.32, abs=0.12)
    matched = 0.5625 / 1.5  # of true objects: 9/16 a match on average over 3/2 objects
    # Given the place, shape and colour are right by 1 in 6, size by 1 in 2; 225 objects.
    assert metrics["object_shape"] == pytest.approx(matched / 6, abs=0.07)
    assert metrics["object_colour"] == pytest.approx(matched / 6, abs=0.07)
    assert metrics["object_size"] == pytest.approx(matched / 2, abs=0.11)
    assert metrics["exact_set"] <= 4 / 150 and metrics["parsed"] == 1.0


def test_nonsense_does_not_parse(shapes):
    metrics = run(shapes, {pixels: [] for pixels, _ in read(shapes, 20)}, samples=20)
    assert set(metrics.values()) == {0.0}


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({RED, BLUE}, [1, 1, 1, 2, 2, 2, 2, 2, 2]),
        ({RED}, [1, 1, 0, 2, 2, 1, 1, 1, 1]),  # one object missing
        ({RED, ("star", "green", "big", "bottom right")}, [1, 1, 0, 2, 2, 2, 1, 1, 2]),
        ({(*RED[:3], "top right"), BLUE}, [1, 1, 0, 2, 2, 1, 1, 1, 1]),  # right thing, wrong place
        ({RED, BLUE, ("ring", "red", "big", "top right")}, [1, 1, 0, 2, 3, 2, 2, 2, 2]),  # one too many
        (None, [1, 0, 0, 2, 2, 0, 0, 0, 0]),
    ],
)
def test_counting(stated, expected):
    assert count_right(stated, frozenset({RED, BLUE})).tolist() == expected


def test_no_image_is_finite():
    assert set(score([0.0] * 9).values()) == {0.0}


def test_two_ranks_count_what_one_does(shapes, monkeypatch):
    captions = dict(read(shapes, 150))
    images = list(captions)
    captions[images[3]], captions[images[4]] = captions[images[4]], captions[images[3]]
    captions[images[7]] = []
    whole = run(shapes, captions, samples=41)
    parts = []
    monkeypatch.setattr("aimv2.evals.shapes_captions.sum_over_ranks", lambda counts: parts.append(counts) or counts)
    for rank in (0, 1):
        run(shapes, captions, samples=41, rank=rank, world_size=2)
    assert score((parts[0] + parts[1]).tolist()) == whole and whole["exact_set"] < 1


def test_data_of_another_world_are_refused():
    with pytest.raises(ValueError, match="not the json of a shapes sample, without 'objects'"):
        read_truth(b'{"url": "x"}')
    with pytest.raises(ValueError, match="not the json"):
        read_truth(None)
