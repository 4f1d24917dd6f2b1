import json

import numpy as np
import pytest
import torch
from PIL import Image
from shapes_run import ROOT
from strips import image_batch, random_images, strip_batch

from aimv2.data.tokenizer import Tokenizer
from aimv2.data.transforms import TransformConfig
from aimv2.decoder import DecoderConfig
from aimv2.encoder import VisionConfig
from aimv2.evals.curves import draw_losses, running_mean
from aimv2.evals.predictions import Prediction, draw_predictions, draw_run, hide_rest, next_patches, predict, to_rgb
from aimv2.objectives.aimv2 import AIMv2Config
from aimv2.patches import normalize_patches, patchify


def oracle(image, patch_size):
    """What a perfect model says: position i holds patch i+1; the last position has nothing to say."""
    target = normalize_patches(patchify(image, patch_size))
    return torch.cat([target[:, 1:], torch.full_like(target[:, :1], torch.nan)], dim=1)


@pytest.mark.parametrize("prefix", [1, 4, 7])
def test_a_perfect_prediction_is_the_original(prefix):
    image = torch.randn(2, 3, 8, 16, generator=torch.Generator().manual_seed(0))
    drawn = next_patches(oracle(image, 4), image, torch.full((2,), prefix), 4)
    # Out by mean and deviation and back: a few roundings of fp32 at values around 1.
    torch.testing.assert_close(drawn, image, rtol=0, atol=1e-5)


def test_the_mean_is_drawn_where_nothing_is_predicted_and_the_prefix_is_kept():
    image = torch.arange(2 * 3 * 8 * 8, dtype=torch.float32).view(2, 3, 8, 8)
    drawn = next_patches(torch.zeros(2, 4, 48), image, torch.tensor([1, 3]), 4)
    assert torch.equal(drawn[0, :, :4, :4], image[0, :, :4, :4])
    assert torch.allclose(drawn[0, :, :4, 4:], image[0, :, :4, 4:].mean())  # one mean over the channels, too
    assert torch.equal(drawn[1, :, :4], image[1, :, :4]) and torch.equal(drawn[1, :, 4:, :4], image[1, :, 4:, :4])
    assert torch.allclose(drawn[1, :, 4:, 4:], image[1, :, 4:, 4:].mean())


@torch.no_grad()
def test_native_images_are_drawn_as_one_by_one(tmp_path):
    """Of different sizes as strips: pictures in their own grids, each with its own share as prefix."""
    grids, texts = [(3, 3), (2, 5), (1, 2)], [[3, 4, 1], [1], [5, 1]]
    torch.manual_seed(0)
    images = random_images(grids, 4, torch.float32)
    batch = strip_batch(images, texts, [1, 1, 1], 4, n=12, padding=9.0)
    vision = VisionConfig(width=16, depth=1, heads=2, mlp_hidden=16, image_size=12, patch_size=4, positions="sincos")
    decoder = DecoderConfig(width=16, depth=1, heads=2, mlp_hidden=16, vocab_size=60, context_length=5)
    model, tokenizer = AIMv2Config(vision=vision, decoder=decoder).build(), Tokenizer(ROOT / "tokenizers" / "shapes")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)  # at their initial values every image would have the same caption
    transform = TransformConfig(image_size=12)
    found = predict(model, batch, tokenizer, transform, difficulty=None)
    assert [p.prefix_length for p in found] == [4, 4, 1]  # 45 % of 9, 10 and 2
    assert len({p.caption for p in found}) == 3
    for one, image, text, (h, w) in zip(found, images, texts, grids, strict=True):
        assert one.original.shape == (4 * h, 4 * w, 3)
        (alone,) = predict(model, image_batch(image, text, 1, 4), tokenizer, transform, difficulty=None)
        for name in ("original", "given", "continued", "from_first"):
            np.testing.assert_allclose(getattr(one, name), getattr(alone, name), rtol=0, atol=1e-5)  # fp32, up to 1
        assert (one.caption, one.true_caption) == (alone.caption, alone.true_caption)
    assert size_of(draw_predictions(found, tmp_path / "predictions.png")) == (1100, 625)


def test_rgb_undoes_the_normalisation():
    transform = TransformConfig(image_size=4)
    pixels = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor(transform.mean).view(3, 1, 1), torch.tensor(transform.std).view(3, 1, 1)
    rgb = to_rgb((pixels - mean) / std, transform)
    np.testing.assert_allclose(rgb[0], pixels[0].permute(1, 2, 0).numpy(), atol=1e-6)
    assert to_rgb(torch.full((1, 3, 4, 4), 99.0), transform).max() == 1.0


def test_what_follows_the_prefix_is_hidden():
    hidden = hide_rest(np.zeros((4, 6, 3), np.float32), 4, 2)[..., 0] > 0  # 2 x 3 patches, 4 given
    assert hidden.tolist() == [[False] * 6] * 2 + [[False] * 2 + [True] * 4] * 2


def prediction(**changes) -> Prediction:
    picture = np.full((8, 8, 3), 0.5)
    values = {
        "original": picture,
        "given": picture,
        "continued": picture,
        "from_first": picture,
        "prefix_length": 2,
        "patch_size": 4,
        "true_caption": "a $cat$ on the mat",  # no formula
        "caption": "",
        "right": None,
    }
    return Prediction(**values | changes)


def size_of(path) -> tuple[int, int]:
    with Image.open(path) as image:
        image.verify()
        assert image.format == "PNG"
        return image.size


@pytest.mark.parametrize("count", [1, 3])
def test_predictions_are_a_png_of_one_row_each(count, tmp_path):
    rows = [prediction(), prediction(caption="word " * 100, right=False), prediction(caption="x" * 200, right=True)]
    path = draw_predictions(rows[:count], tmp_path / "predictions.png")
    assert size_of(path) == (1100, 100 + 175 * count)
    assert [p.name for p in tmp_path.iterdir()] == ["predictions.png"]


def write_metrics(path, steps, evaluations=()):
    lines = [{"step": s, "loss": 1.0, "pixel_loss": 1 / s, "caption_loss": None if s == 2 else 5 / s} for s in steps]
    lines += [{"step": s, "eval": "validation", "pixel_loss": 0.5, "caption_loss": 0.4, **e} for s, e in evaluations]
    lines.append({"step": 1, "eval": "captions", "exact_set": 0.5})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("steps", "evaluations"),
    [
        ((), ()),
        ((1,), ()),
        ((1, 2, 3), ((3, {"caption_entropy": 0.12}),)),
        (range(1, 10_001), [(s, {}) for s in range(100, 10_001, 100)]),
    ],
)
def test_losses_of_short_and_long_runs(steps, evaluations, tmp_path):
    metrics = write_metrics(tmp_path / "metrics.jsonl", steps, evaluations)
    assert size_of(draw_losses(metrics, tmp_path / "loss.png")) == (1200, 480)


def test_running_mean():
    values = np.array([8.0, 4.0, 0.0, 4.0, 6.0, 2.0])
    # 8; (8+4+0)/3; (8+4+0+4+6)/5; five again; (0+4+6+2)/4, the right side cut short; (4+6+2)/3
    expected = [8, 4, 22 / 5, 16 / 5, (4 + 0 + 6 + 2) / 4, (4 + 6 + 2) / 3]
    np.testing.assert_allclose(running_mean(values, 2), expected)
    np.testing.assert_array_equal(running_mean(values, 0), values)
    assert running_mean(np.array([]), 3).size == 0


def test_drawing_a_run(shapes, run, tmp_path):
    predictions = draw_run(run, shapes, samples=3)
    assert size_of(run / "loss.png") == (1200, 480) and size_of(run / "predictions.png") == (1100, 625)
    assert len(predictions) == 3 and all(p.right is False for p in predictions)
    first = predictions[0]
    assert first.true_caption and first.original.shape == (48, 48, 3) and first.prefix_length == 4  # of 9
    # The third row of patches is predicted, the first is given, and so it is in the picture of the prefix.
    assert np.array_equal(first.given[:16], first.original[:16]) and np.ptp(first.given[32:]) == 0
    np.testing.assert_array_equal(first.continued[:16], first.original[:16])
    assert not np.allclose(first.continued[32:], first.original[32:], atol=1 / 255)
    elsewhere = tmp_path / "elsewhere"
    sampled = draw_run(run, shapes, samples=3, temperature=1.0, seed=0, out=elsewhere)
    assert [p.caption for p in sampled] != [p.caption for p in predictions]
    assert sorted(p.name for p in elsewhere.iterdir()) == ["loss.png", "predictions.png"]


def test_a_run_without_samples_is_refused(shapes, run):
    with pytest.raises(ValueError, match="samples 0: expected at least 1"):
        draw_run(run, shapes, samples=0)
