"""The distilled student's losses against their equations, and what must hold for any split of a batch.

B samples, N patches, T text positions, S prefix length, P patch side.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_aimv2 import CONFIG, PREFIX_LENGTH, TEXT_LENGTH, VISION, N, counts_of, random_batch
from tiny_distill import FEATURES, TEACHER, built, data_for, part_of, vector, write_teacher
from torch import Tensor

from aimv2 import losses
from aimv2.data.batch import Batch, Counts, count_targets
from aimv2.flops import decoder_flops, encoder_flops
from aimv2.objectives import distill
from aimv2.objectives.aimv2 import AIMv2, AIMv2Config
from aimv2.objectives.distill import Distill, DistillConfig
from aimv2.objectives.teacher import open_teacher
from aimv2.pretrained import load_model

# --- the equations, in float64, one sample, one patch, one token at a time


def mask_of(s: int) -> Tensor:
    return torch.tensor([[k <= q or k < s for k in range(N)] for q in range(N)])


def normalised(x: np.ndarray) -> np.ndarray:
    return (x - x.mean()) / math.sqrt(x.var() + 1e-5)


def log_softmax(x: np.ndarray) -> np.ndarray:
    return x - math.log(np.exp(x).sum())


@torch.no_grad()
def equations(objective: Distill, batch: Batch, features: str) -> dict[str, float]:
    """Losses with loops; models are only asked for their outputs, one sample at a time."""
    teacher, student = load_model(objective.settings.teacher, dtype=torch.float64), objective.student
    matrix, bias = objective.projection.weight.numpy(), objective.projection.bias.numpy()
    of_features, of_pixels, of_tokens = [], [], []
    for b in range(len(batch)):
        image, s, length = batch.image[b : b + 1], PREFIX_LENGTH[b], TEXT_LENGTH[b]
        text = batch.text[b : b + 1, : max(length, 1)]
        (pixels, logits), (their_pixels, their_logits) = (
            [x[0].numpy() for x in model.decoder(model.encoder(image, mask_of(s)), text)]
            for model in (student, teacher)
        )
        of_pixels += [((pixels[i - 1] - their_pixels[i - 1]) ** 2).mean() for i in range(s, N)]
        for t in range(length):
            p, q = log_softmax(their_logits[t]), log_softmax(logits[t])
            of_tokens.append((np.exp(p) * (p - q)).sum())
        mask = mask_of(s) if features == "prefix" else None
        ours, theirs = (model.encoder(image, mask)[0].numpy() for model in (student, teacher))
        errors = [((matrix @ x + bias - normalised(y)) ** 2).mean() for x, y in zip(ours, theirs, strict=True)]
        of_features.append(np.mean(errors))
    return {
        "feature_loss": np.mean(of_features),
        "teacher_pixel_loss": np.mean(of_pixels),
        "teacher_caption_loss": np.mean(of_tokens),
    }


@pytest.mark.parametrize("features", FEATURES)
@torch.no_grad()
def test_losses_equal_the_equations(teacher, features):
    objective = built(teacher, features=features, feature_weight=0.7, prediction_weight=1.3)
    batch = random_batch()
    found = objective(batch, counts_of(batch))
    expected = equations(objective, batch, features)
    for name, value in expected.items():
        # float64 on both sides: some hundred roundings of 1e-16
        assert found[name].item() == pytest.approx(value, rel=1e-10), name
    alone = objective.student(batch, counts_of(batch))
    assert found["pixel_loss"] == alone["pixel_loss"] and found["caption_loss"] == alone["caption_loss"]
    predictions = expected["teacher_caption_loss"] + CONFIG.pixel_weight * expected["teacher_pixel_loss"]
    total = alone["loss"].item() + 0.7 * expected["feature_loss"] + 1.3 * predictions
    assert found["loss"].item() == pytest.approx(total, rel=1e-10)


def test_losses_by_hand():
    target = torch.tensor([[[0.0, 2.0], [9.0, 1.0], [5.0, 5.0]]])  # normalised: (-1, 1), (1, -1), (0, 0)
    predicted = torch.tensor([[[1.0, 1.0], [1.0, 1.0], [3.0, 1.0]]])
    # means over D: 4/2, 4/2, 10/2. 1e-5 beside variances of 1 and 16 moves a target by 5e-6, an error by twice that
    assert losses.features(predicted, target).item() == pytest.approx(9 / 3, abs=1e-4)
    assert losses.features(predicted, target, torch.tensor([2])).item() == pytest.approx(4 / 2, abs=1e-4)

    ours = torch.tensor([[[1.0, 0.0], [0.0, 0.0], [7.0, 7.0]]])
    theirs = torch.tensor([[[0.0, 1.0], [0.0, 4.0], [5.0, 5.0]]])
    # the prediction of patch 1 is off by (1, -1), that of patch 2 by (0, -4); the last position predicts nothing
    assert losses.teacher_pixel(ours, theirs, torch.tensor([1])) == 1 + 8
    assert losses.teacher_pixel(ours, theirs, torch.tensor([2])) == 8
    assert losses.teacher_pixel(ours, theirs, torch.tensor([1]), torch.tensor([2])) == 1

    even, odd = [0.0, 0.0], [math.log(3), 0.0]  # probabilities (1/2, 1/2) and (3/4, 1/4)
    student, teacher = torch.tensor([[even, odd, odd]]), torch.tensor([[odd, even, odd]])
    first = 3 / 4 * math.log(3 / 2) + 1 / 4 * math.log(1 / 2)
    second = 1 / 2 * math.log(2 / 3) + 1 / 2 * math.log(2)
    for length, expected in enumerate([0, first, first + second, first + second]):
        found = losses.teacher_caption(student, teacher, torch.tensor([length]))
        assert found.item() == pytest.approx(expected, abs=1e-6)  # fp32


def test_nothing_is_left_to_learn_from_oneself(tmp_path):
    """A student with its teacher's weights has their predictions, and their features but for the projection."""
    source = write_teacher(tmp_path / "export", CONFIG)
    batch = random_batch()
    for features in FEATURES:
        objective = built(source, features=features, prediction_weight=1.0)
        objective.student.load_state_dict(load_model(source).state_dict())
        found = objective(batch, counts_of(batch))
        assert found["teacher_pixel_loss"] == 0
        assert abs(found["teacher_caption_loss"]) < 1e-15  # log_softmax once more
        assert found["feature_loss"] > 0.1


# --- the teacher


@pytest.mark.parametrize("features", FEATURES)
def test_the_teacher_is_no_part_of_the_objective(teacher, features):
    objective, batch = (
        built(teacher, torch.float32, features=features, prediction_weight=1.0),
        random_batch(dtype=torch.float32),
    )
    before = load_model(teacher).state_dict()
    optimizer = torch.optim.AdamW(objective.parameters(), lr=0.1)
    objective.train()
    for _ in range(3):
        objective(batch, counts_of(batch))["loss"].backward()
        optimizer.step()
    after = {
        **{f"encoder.{name}": value for name, value in objective.teacher().encoder.state_dict().items()},
        **{f"decoder.{name}": value for name, value in objective.teacher().decoder.state_dict().items()},
    }
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    parts = (objective.teacher().encoder, objective.teacher().decoder)
    assert all(p.grad is None and not p.requires_grad for part in parts for p in part.parameters())
    assert not any(module.training for part in parts for module in part.modules())
    own = {f"student.{name}" for name in CONFIG.build().state_dict()} | {"projection.weight", "projection.bias"}
    assert set(objective.state_dict()) == own
    theirs = {id(module) for part in parts for module in part.modules()}
    assert not theirs & {id(module) for module in objective.modules()}
    assert {id(p) for p in objective.parameters()}.isdisjoint(id(p) for part in parts for p in part.parameters())


def test_what_is_exported_is_the_student(teacher):
    objective = built(teacher)
    assert isinstance(objective.exported, AIMv2) and objective.exported is objective.student
    assert objective.config == CONFIG
    assert objective.encoder is objective.student.encoder and objective.decoder is objective.student.decoder
    config = objective.settings
    assert (config.features, config.prediction_weight) == ("prefix", 0)  # docs/post-training.md compares them
    assert (config.vision, config.decoder, config.vocab_size) == (VISION, CONFIG.decoder, CONFIG.vocab_size)


def test_the_teacher_follows_the_student(teacher):
    objective, batch = built(teacher, torch.float32, prediction_weight=1.0), random_batch(dtype=torch.float32)
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        objective.to(dtype)
        assert objective(batch, counts_of(batch))["loss"].isfinite()
        assert {p.dtype for p in objective.teacher().encoder.parameters()} == {dtype}
        assert {p.dtype for p in objective.teacher().decoder.parameters()} == {dtype}
    # rounded to bf16 in between, it would not be the same
    assert torch.equal(objective.teacher().encoder.patch_embed.weight, load_model(teacher).encoder.patch_embed.weight)


def test_a_whole_copy_shares_the_teacher(teacher):
    objective, copied = built(teacher), built(teacher)
    assert copied.teacher() is objective.teacher()
    opened = open_teacher(teacher, False, VISION.image_size, torch.float64, torch.device("cpu"))
    assert opened is objective.teacher() and opened.decoder is None


def test_the_teachers_size_is_free_of_the_students(teacher):
    """Another width, depth and number of heads; the student's and the projection's initial weights don't follow."""
    torch.manual_seed(3)
    objective = DistillConfig(student=CONFIG, teacher=teacher).build()
    assert objective.projection.weight.shape == (TEACHER.vision.width, VISION.width)
    torch.manual_seed(3)
    alone = CONFIG.build().state_dict()
    assert all(torch.equal(objective.student.state_dict()[name], value) for name, value in alone.items())


def test_fingerprints_are_those_of_the_weights_and_of_what_they_do_not_show(teacher, tmp_path):
    def fingerprints(config: AIMv2Config) -> dict[str, str]:
        torch.manual_seed(0)
        return built(write_teacher(tmp_path / str(len(list(tmp_path.iterdir()))), config)).fingerprints()

    vision = TEACHER.vision
    assert built(teacher).fingerprints() == fingerprints(TEACHER)
    others = [replace(vision, depth=1), replace(vision, heads=1), replace(vision, norm_eps=1e-2)]
    found = [fingerprints(replace(TEACHER, vision=other))["teacher"] for other in [vision, *others]]
    assert len(set(found)) == len(found)


def test_the_teacher_is_there_before_the_first_batch(teacher, monkeypatch):
    objective = built(teacher, prediction_weight=1.0)
    objective.prepare(data_for())
    monkeypatch.setattr(distill, "open_teacher", lambda *arguments: pytest.fail("opened again"))
    batch = random_batch()
    assert objective(batch, counts_of(batch))["loss"].isfinite()


def test_work_is_counted(teacher):
    alone, again = CONFIG.training_flops(5), 3 * encoder_flops(VISION)
    seen, predicted = encoder_flops(TEACHER.vision), decoder_flops(TEACHER.vision, TEACHER.decoder, 5)
    counted = [DistillConfig(student=CONFIG, teacher=teacher, **kind).training_flops(5) for kind in KINDS]
    # Features in full are a second pass of the student's encoder, forward and backward, and one of the teacher's.
    assert counted == [
        alone + seen + predicted,
        alone + again + 2 * seen + predicted,
        alone + seen + predicted,
        alone + seen,
        alone + again + seen,
    ]


# --- any split of a batch gives the gradient of the whole


KINDS = [
    {"prediction_weight": 1.0},
    {"features": "full", "prediction_weight": 1.0},
    {"feature_weight": 0.0, "prediction_weight": 1.0},
    {},
    {"features": "full"},
]


@pytest.mark.parametrize("settings", KINDS)
def test_accumulation_and_ranks_equal_the_full_batch(teacher, settings):
    objective, batch = built(teacher, **settings), random_batch()
    whole = objective(batch, counts_of(batch))
    whole["loss"].backward()
    expected = vector(objective)
    for ranks in ([[1, 1, 1, 1, 1]], [[4, 1]], [[1, 2], [2]]):  # the first sample has no caption
        sizes = [size for own in ranks for size in own]
        ends = np.cumsum(sizes).tolist()
        parts = [part_of(batch, slice(end - size, end)) for size, end in zip(sizes, ends, strict=True)]
        counts = Counts.of(sum(count_targets([part]) for part in parts))
        found = [copy.deepcopy(objective) for _ in ranks]
        sums: dict[str, float] = {}
        for replica, own in zip(found, ranks, strict=True):
            replica.zero_grad()
            for _ in own:
                for name, value in (part_losses := replica(parts.pop(0), counts)).items():
                    sums[name] = sums.get(name, 0.0) + value.item()
                part_losses["loss"].backward()
        total = sum(map(vector, found))
        assert (total - expected).norm() / expected.norm() < 1e-12  # float64
        assert sums == pytest.approx({name: value.item() for name, value in whole.items()}, rel=1e-12)


@pytest.mark.parametrize("settings", KINDS)
def test_a_weight_of_0_leaves_its_part_out(teacher, settings):
    objective, batch = built(teacher, **settings), random_batch()
    found = objective(batch, counts_of(batch))
    expected = {"loss", "pixel_loss", "caption_loss"}
    expected |= {"feature_loss"} if objective.settings.feature_weight else set()
    expected |= {"teacher_pixel_loss", "teacher_caption_loss"} if objective.settings.prediction_weight else set()
    assert set(found) == expected
    assert all(not value.requires_grad for name, value in found.items() if name != "loss")
    found["loss"].backward()
    assert all(p.grad is not None for p in objective.parameters())  # ranks reduce the same tensors
    assert (objective.teacher().decoder is None) == (objective.settings.prediction_weight == 0)


def test_no_caption_at_all_is_finite(teacher):
    objective, batch = built(teacher, prediction_weight=1.0), random_batch([0, 0], [1, N - 1])
    found = objective(batch, counts_of(batch))
    found["loss"].backward()
    assert found["caption_loss"] == found["teacher_caption_loss"] == 0
    assert vector(objective).isfinite().all()


@torch.no_grad()
def test_evaluation_equals_training(teacher):
    objective, batch = built(teacher, prediction_weight=1.0), random_batch()
    assert objective.eval()(batch, counts_of(batch)) == objective.train()(batch, counts_of(batch))


# --- how it runs


@pytest.mark.slow
def test_compiled_and_recomputed_it_is_the_same(teacher):
    def gradient_of(run: Callable, objective: Distill) -> tuple[float, Tensor]:
        loss = run(batch, counts_of(batch))["loss"]
        loss.backward()
        return loss.item(), vector(objective)

    batch = random_batch()
    objective = built(teacher, features="full", prediction_weight=1.0)
    expected, gradient = gradient_of(objective, objective)
    student = replace(CONFIG, vision=replace(VISION, checkpointing=True))
    recomputed = replace(objective.settings, student=student).build().double()
    recomputed.load_state_dict(objective.state_dict())
    compiled = copy.deepcopy(objective)
    torch._dynamo.reset()
    for run, other in ((recomputed, recomputed), (torch.compile(compiled, backend="eager"), compiled)):
        other.zero_grad()
        loss, found = gradient_of(run, other)
        assert loss == expected and torch.equal(found, gradient)
