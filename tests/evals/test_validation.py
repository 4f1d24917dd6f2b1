import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from aimv2.data.batch import Batch
from aimv2.data.loader import validation_loader
from aimv2.data.tokenizer import Tokenizer
from aimv2.decoder import DecoderConfig
from aimv2.encoder import VisionConfig
from aimv2.evals.validation import ValidationLoss
from aimv2.objectives.aimv2 import AIMv2Config

PLACE = {"patch_size": 16, "seed": 0, "rank": 0, "world_size": 1, "device": torch.device("cpu")}
DATA = SimpleNamespace(validation=object(), made_by=None)


class Known(torch.nn.Module):
    """Its summed losses are read off the batch: 10 + g a supervised patch, 1 + g a token."""

    def forward(self, batch, counts):
        patches = batch.num_patches - batch.prefix_length
        pixel = ((10 + batch.sample) * patches).sum() / counts.patches
        caption = ((1 + batch.sample) * batch.text_length).sum() / counts.tokens
        return {"loss": caption + 0.4 * pixel, "pixel_loss": pixel, "caption_loss": caption}


def batch(samples, prefix_lengths, text_lengths) -> Batch:
    n = len(samples)
    return Batch(
        image=torch.zeros(n, 3, 4, 4),
        text=torch.zeros(n, 5, dtype=torch.int64),
        text_length=torch.tensor(text_lengths),
        prefix_length=torch.tensor(prefix_lengths),
        sample=torch.tensor(samples),
        num_patches=4,
    )


def evaluate(monkeypatch, batches, objective=None, **place):
    monkeypatch.setattr("aimv2.evals.validation.validation_loader", lambda *_, **__: batches)
    return ValidationLoss().build(DATA, **PLACE | place)(objective or Known())


def test_means_over_targets_of_uneven_batches(monkeypatch):
    # Supervised patches 3, 1, 2; tokens 5, 0, 1: by hand,
    # pixel (10*3 + 11*1 + 12*2) / 6 = 65/6, caption (1*5 + 2*0 + 3*1) / 6 = 8/6. A mean of batch means would differ.
    metrics = evaluate(monkeypatch, [batch([0, 1], [1, 3], [5, 0]), batch([2], [2], [1])])
    assert metrics == pytest.approx({"loss": 8 / 6 + 0.4 * 65 / 6, "pixel_loss": 65 / 6, "caption_loss": 8 / 6})


def test_ranks_add_up(monkeypatch):
    """Each rank's own part plus the other's is the whole: the reduction is played by hand."""
    parts = [[batch([0, 1], [1, 3], [5, 0])], [batch([2], [2], [1])]]
    whole = evaluate(monkeypatch, parts[0] + parts[1])
    sent: list[list[torch.Tensor]] = [[], []]

    def first_rank(sums):  # rank 0 only records what it would send; rank 1 adds it to its own
        sent[0].append(sums.clone())
        return sums

    def second_rank(sums):
        sent[1].append(sums)
        return sums + sent[0][len(sent[1]) - 1]

    # The counts are reduced first and must be the global ones before any loss is divided by them.
    totals = torch.tensor([6.0, 6.0, 2.0, 3.0], dtype=torch.float64)
    monkeypatch.setattr("aimv2.evals.validation.sum_over_ranks", lambda s: totals if len(s) == 4 else first_rank(s))
    evaluate(monkeypatch, parts[0], world_size=2)
    monkeypatch.setattr("aimv2.evals.validation.sum_over_ranks", lambda s: totals if len(s) == 4 else second_rank(s))
    assert evaluate(monkeypatch, parts[1], world_size=2, rank=1) == pytest.approx(whole)


def test_empty_captions_are_finite(monkeypatch):
    metrics = evaluate(monkeypatch, [batch([0, 1], [1, 3], [0, 0])])
    assert metrics["caption_loss"] == 0 and all(map(math.isfinite, metrics.values()))


def test_fewer_samples_than_ranks_is_an_error(monkeypatch):
    with pytest.raises(ValueError, match="1 validation samples for 2 ranks"):
        evaluate(monkeypatch, [batch([0], [1], [1])], world_size=2)


def test_the_model_is_at_rest_and_gets_its_modes_back(monkeypatch):
    class Watching(Known):
        def __init__(self):
            super().__init__()
            self.frozen, self.trained = torch.nn.Dropout(), torch.nn.Dropout()
            self.frozen.eval()

        def forward(self, batch, counts):
            assert not torch.is_grad_enabled() and not any(module.training for module in self.modules())
            return super().forward(batch, counts)

    model = Watching()
    evaluate(monkeypatch, [batch([0], [1], [1])], model)
    assert model.training and model.trained.training and not model.frozen.training and torch.is_grad_enabled()


def test_real_objective_on_real_shards_against_a_loop(shapes):
    torch.manual_seed(0)
    model = AIMv2Config(
        vision=VisionConfig(width=16, depth=1, heads=2, mlp_hidden=16, image_size=48, patch_size=16),
        decoder=DecoderConfig(
            width=16,
            depth=1,
            heads=2,
            mlp_hidden=16,
            vocab_size=Tokenizer(shapes.tokenizer).vocab_size,
            context_length=40,
        ),
    ).build()
    metrics = ValidationLoss(samples=23, batch_size=8).build(shapes, **PLACE)(model)

    nats, tokens, errors, captions = 0.0, 0, [], 0
    loader = validation_loader(shapes, patch_size=16, micro_batch=1, seed=0, rank=0, world_size=1, limit=23)
    with torch.no_grad():
        for one in loader:
            s, length = int(one.prefix_length), int(one.text_length)
            query, key = torch.meshgrid(torch.arange(9), torch.arange(9), indexing="ij")
            pixels, logits = model.decoder(model.encoder(one.image, ((key <= query) | (key < s))[None, None]), one.text)
            nats += F.cross_entropy(logits[0, :length], one.text[0, :length], reduction="sum").item()
            tokens, captions = tokens + length, captions + 1
            for i in range(s, 9):
                top, left = 16 * (i // 3), 16 * (i % 3)
                values = one.image[0, :, top : top + 16, left : left + 16].permute(1, 2, 0).flatten()
                target = (values - values.mean()) / (values.var() + 1e-6).sqrt()
                errors.append((pixels[0, i - 1] - target).square().mean().item())
    # 1e-5: fp32 sums in another order, over batches of another size.
    assert metrics["caption_loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert metrics["pixel_loss"] == pytest.approx(sum(errors) / len(errors), rel=1e-5)
    assert metrics["loss"] == pytest.approx(metrics["caption_loss"] + 0.4 * metrics["pixel_loss"], rel=1e-5)
    # Quick world: three forms, and the order of two objects in half of the images.
    assert metrics["caption_entropy"] == pytest.approx((math.log(3) + math.log(2) / 2) * captions / tokens, rel=1e-6)


def test_calls_agree_and_data_of_unknown_origin_have_no_entropy(shapes):
    model = Known()
    eval_ = ValidationLoss(samples=9, batch_size=4).build(dataclasses.replace(shapes, made_by=None), **PLACE)
    first = eval_(model)
    assert first == eval_(model) and "caption_entropy" not in first
