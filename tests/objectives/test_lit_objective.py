"""LiT's objective against its equations and open_clip's losses, and what must hold for any split of a batch.

n captioned pairs, E projection.
"""

import copy
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_aimv2 import part_of
from tiny_lit_objective import (
    CONFIG,
    CONTEXT,
    EOS,
    GRID,
    LIT,
    TEXT,
    TEXT_LENGTH,
    VISION,
    P,
    gradients,
    random_batch,
    random_objective,
)
from torch import Tensor

from aimv2.config import load_config
from aimv2.data.batch import Batch, Counts, count_targets
from aimv2.data.loader import DataConfig
from aimv2.data.mixture import Source
from aimv2.data.native import NativeConfig
from aimv2.data.transforms import TransformConfig
from aimv2.objectives.lit import LiTObjective, LiTObjectiveConfig
from aimv2.objectives.patch_cache import digests_of

LOSSES = ("softmax", "sigmoid")
CAPTIONED = [i for i, length in enumerate(TEXT_LENGTH) if length]
ONE = Counts.of(torch.ones(4, dtype=torch.float64))


def objective_with(loss: str, **changes) -> LiTObjective:
    objective = random_objective(replace(CONFIG, loss=loss, **changes))
    if loss == "sigmoid":
        torch.nn.init.constant_(objective.bias, -0.7)
    return objective


def plain_loss(objective: LiTObjective, batch: Batch, rows: list[int]) -> Tensor:
    """The equations of CLIP and SigLIP with loops, on one graph of the model."""
    images = objective.model.encode_image(batch.image[rows])
    texts = objective.model.encode_text(batch.text[rows])
    scale = objective.model.log_scale.exp()
    n, total = len(rows), torch.zeros((), dtype=torch.float64)
    score = [[scale * (images[i] * texts[j]).sum() for j in range(n)] for i in range(n)]
    for i in range(n):
        if objective.config.loss == "softmax":
            total = total - score[i][i] + torch.stack(score[i]).exp().sum().log() / 2
            total = total + torch.stack([row[i] for row in score]).exp().sum().log() / 2
        else:
            for j in range(n):
                logit = score[i][j] + objective.bias
                total = total + torch.log1p(torch.exp(-logit if i == j else logit))
    return total / n


def step(objective: LiTObjective, parts: list[Batch]) -> tuple[dict[str, float], dict[str, Tensor]]:
    """An optimizer step as the loop takes it: summed losses and gradients."""
    counts = Counts.of(count_targets(parts))
    objective.zero_grad()
    objective.look_ahead(parts, counts)
    sums: dict[str, float] = {}
    for part in parts:
        losses = objective(part, counts)
        losses["loss"].backward()
        sums = {name: sums.get(name, 0.0) + value.item() for name, value in losses.items()}
    return sums, gradients(objective)


def split(batch: Batch, sizes: list[int]) -> list[Batch]:
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [part_of(batch, slice(end - size, end)) for size, end in zip(sizes, ends, strict=True)]


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    # float64, other orders of some hundred sums; relative to the largest gradient of the model
    largest = max(value.abs().max() for value in expected.values())
    for name, value in expected.items():
        assert (found[name] - value).abs().max() < 1e-12 * largest, name


# --- the equations


@pytest.mark.parametrize("sizes", [[6], [3, 3], [2, 4], [1, 1, 1, 1, 1, 1]], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_loss_and_gradients_equal_the_whole_batch_on_one_graph(loss, sizes):
    objective, batch = objective_with(loss), random_batch()
    expected = plain_loss(objective, batch, CAPTIONED)
    expected.backward()
    by_graph = gradients(objective)
    found, by_parts = step(objective, split(batch, sizes))
    assert found["loss"] == pytest.approx(expected.item(), rel=1e-12)
    assert_same(by_parts, by_graph)
    assert by_graph["model.log_scale"] != 0 and all(value.abs().max() > 0 for value in by_graph.values())


@pytest.mark.parametrize("loss", LOSSES)
def test_negatives_of_a_micro_batch_alone_would_be_seen(loss):
    """That the test above can fail: the same with each part's own negatives."""
    objective, batch = objective_with(loss), random_batch()
    _, expected = step(objective, [batch])
    parts = split(batch, [3, 3])
    objective.zero_grad()
    for part in parts:
        counts = Counts.of(count_targets([part]))
        objective.look_ahead([part], counts)
        (objective(part, counts)["loss"] / 2).backward()
    with pytest.raises(AssertionError):
        assert_same(gradients(objective), expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_open_clips_losses(loss):
    open_clip_losses = pytest.importorskip("open_clip.loss")
    objective, batch = objective_with(loss), random_batch([3, 4, 6, 2])
    images, texts, scale = objective.model(batch.image, batch.text)
    if loss == "softmax":
        expected = open_clip_losses.ClipLoss()(images, texts, scale)
    else:
        expected = open_clip_losses.SigLipLoss()(images, texts, scale, objective.bias)
    expected.backward()
    by_graph = gradients(objective)
    found, ours = step(objective, split(batch, [1, 3]))
    assert found["loss"] == pytest.approx(expected.item(), rel=1e-12)
    assert_same(ours, by_graph)


def test_sigmoid_begins_as_published():
    objective = replace(CONFIG, loss="sigmoid").build()
    assert objective.model.scale.item() == pytest.approx(10, rel=1e-6) and objective.bias.item() == -10
    assert CONFIG.build().bias is None


def test_accuracy_is_the_share_of_images_that_find_their_caption():
    objective, batch = objective_with("softmax"), random_batch()
    images, texts, _ = objective.model(batch.image[CAPTIONED], batch.text[CAPTIONED])
    best = (images @ texts.T).argmax(dim=1).tolist()
    expected = sum(i == j for i, j in enumerate(best)) / len(CAPTIONED)
    for sizes in ([6], [2, 4]):
        assert step(objective, split(batch, sizes))[0]["accuracy"] == pytest.approx(expected)
    # and captions that are those of the images: what is found by construction
    clear = copy.deepcopy(objective)
    clear.model.forward = lambda *_, **__: (torch.eye(6), torch.eye(6), torch.tensor(2.0, requires_grad=True))
    clear.look_ahead([batch], ONE)
    assert clear(batch, ONE)["accuracy"] == 1


@pytest.mark.parametrize("sizes", [[2], [1, 1]], ids=str)
@pytest.mark.parametrize("log_scale", [4.7, -0.1])
def test_a_scale_beyond_its_bound_can_come_back(log_scale, sizes):
    """Momentum carries it over. What would take it farther is dropped: of the whole batch's gradient, not of parts'."""
    objective, at_bound = objective_with("softmax"), objective_with("softmax")
    torch.nn.init.constant_(objective.model.log_scale, log_scale)
    torch.nn.init.constant_(at_bound.model.log_scale, min(max(log_scale, 0.0), math.log(100)))
    returns = []
    for seed in range(12):
        batch = random_batch([3, 4], seed=seed)
        at_bound.zero_grad()
        plain_loss(at_bound, batch, [0, 1]).backward()
        expected = at_bound.model.log_scale.grad.item()
        returns.append(expected * log_scale > 0)  # for it goes against the gradient
        found = step(objective, split(batch, sizes))[1]["model.log_scale"].item()
        assert found == pytest.approx(expected if returns[-1] else 0.0, rel=1e-9)
    assert {True, False} == set(returns)


# --- pairs without a caption, and padding


@pytest.mark.parametrize("loss", LOSSES)
def test_pairs_without_a_caption_are_as_if_they_were_not_there(loss):
    objective, batch = objective_with(loss), random_batch()
    found, ours = step(objective, split(batch, [2, 2, 2]))
    without = replace(
        batch,
        **{
            name: getattr(batch, name)[CAPTIONED]
            for name in ("image", "text", "text_length", "prefix_length", "sample")
        },
    )
    expected, theirs = step(objective, [without])
    assert found == pytest.approx(expected, rel=1e-12)
    assert_same(ours, theirs)


@pytest.mark.parametrize("sizes", [[2], [1, 1]], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_no_caption_at_all_is_zero(loss, sizes):
    objective, batch = objective_with(loss), random_batch([0, 0])
    found, ours = step(objective, split(batch, sizes))
    assert found == {"loss": 0, "accuracy": 0}
    # every parameter has a gradient, even with no caption: ranks reduce the same tensors
    assert all((value == 0).all() for value in ours.values())
    with torch.no_grad():
        assert objective(batch, ONE) == {"loss": 0, "accuracy": 0}


def test_what_padding_is_does_not_matter():
    objective, results = objective_with("softmax"), []
    for pad, longer in ((0, 0), (EOS, 0), (7, 0), (0, 1)):
        batch = random_batch([3, 2, 5], pad=pad)
        batch = replace(batch, text=F.pad(batch.text, (0, longer), value=pad))
        results.append(step(objective, [batch]))
    for found, ours in results[1:]:
        assert found["loss"] == pytest.approx(results[0][0]["loss"], rel=1e-13)
        assert_same(ours, results[0][1])


# --- the locked tower


@pytest.mark.parametrize("sizes", [[6], [2, 4]], ids=str)
def test_the_tower_stays_as_it_is_bit_for_bit(sizes):
    objective, batch = objective_with("softmax"), random_batch()
    before = copy.deepcopy(objective.state_dict())
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    for _ in range(2):
        objective.train()
        step(objective, split(batch, sizes))
        optimizer.step()
    for name, value in objective.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("model.encoder."), name
    assert all(p.grad is None for p in objective.encoder.parameters())
    assert not objective.encoder.training and objective.model.training


def test_the_tower_runs_once_a_micro_batch():
    objective, batch = objective_with("softmax"), random_batch()
    seen = []
    objective.encoder.register_forward_hook(lambda _module, inputs, out: seen.append(out.requires_grad))
    step(objective, split(batch, [2, 2, 2]))
    assert seen == [False] * 3


def test_both_towers_are_exported_and_the_bias_is_not():
    objective = objective_with("sigmoid")
    assert objective.exported is objective.model and objective.exported.config == LIT
    assert objective.encoder is objective.model.encoder
    assert set(objective.state_dict()) - {f"model.{name}" for name in objective.exported.state_dict()} == {"bias"}


# --- a cache of what the tower saw


def strips(batch: Batch) -> Batch:
    """The batch's images, of which the second and third lose a row or two, as strips."""
    rows = torch.tensor([3, 2, 1, 3, 3, 3])
    columns = torch.full_like(rows, GRID)
    image = batch.image.unflatten(2, (GRID, P)).unflatten(4, (GRID, P))  # (B, 3, rows, P, columns, P)
    image = image.permute(0, 1, 3, 2, 4, 5).flatten(3)  # (B, 3, P, N P)
    for strip, n in zip(image, (rows * columns).tolist(), strict=True):
        strip[..., n * P :] = 0
    return replace(batch, image=image, grid=torch.stack([rows, columns], dim=1))


@pytest.mark.parametrize("native", [False, True], ids=["square", "strips"])
@pytest.mark.parametrize("sizes", [[6], [2, 4]], ids=str)
def test_cached_equals_uncached(sizes, native):
    changes = {"model": replace(LIT, vision=replace(VISION, positions="sincos"))}
    plain, cached = (objective_with("softmax", **changes, feature_cache=gib) for gib in (0, 1.0))
    batch = strips(random_batch()) if native else random_batch()
    ran = []
    cached.encoder.register_forward_hook(lambda _module, inputs, out: ran.append(len(out)))
    parts = split_strips(batch, sizes) if native else split(batch, sizes)
    expected, by_plain = step(plain, parts)
    for _ in range(2):
        found, by_cached = step(cached, parts)
        assert found == pytest.approx(expected, rel=1e-12)
        assert_same(by_cached, by_plain)
    assert sum(ran) == 6  # nothing twice


def test_evaluation_leaves_the_cache_to_training():
    cached, plain, batch = objective_with("softmax", feature_cache=1.0), objective_with("softmax"), random_batch()
    with torch.no_grad():
        assert cached.eval()(batch, ONE)["loss"].item() == plain.eval()(batch, ONE)["loss"].item()
    assert len(cached._cache) == 0


def test_strips_are_as_their_images_one_by_one():
    objective = objective_with("softmax", model=replace(LIT, vision=replace(VISION, positions="sincos")))
    batch = random_batch([3, 4, 6, 2, 5, 4])
    padded = strips(batch)
    images = [
        objective.model.encode_image(image[None, :, : P * rows])
        for image, (rows, _) in zip(batch.image, padded.grid.tolist(), strict=True)
    ]
    logits = objective.model.scale * torch.cat(images) @ objective.model.encode_text(batch.text).T
    own = torch.arange(6)
    expected = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    assert step(objective, [padded])[0]["loss"] == pytest.approx(expected.item(), rel=1e-12)


def test_every_pixel_counts_in_a_digest():
    images = torch.zeros(1, 3, P, 4)
    found = set(digests_of(images, None))
    for place in range(images.numel()):
        other = images.flatten().clone()
        other[place] = 1
        found.update(digests_of(other.view_as(images), None))
    assert len(found) == 1 + images.numel()


def test_strips_of_the_same_patches_in_other_grids_are_other_images():
    grids = [torch.tensor([grid]) for grid in ([2, 3], [3, 2], [1, 6], [6, 1], [1, 5])]
    strip = torch.ones(1, 3, P, 6 * P)
    assert len({digests_of(strip, grid)[0] for grid in grids}) == len(grids)
    # and their features, if both are known: positions are those of the grid
    changes = {"model": replace(LIT, vision=replace(VISION, positions="sincos"))}
    plain, cached = (objective_with("softmax", **changes, feature_cache=gib) for gib in (0, 1.0))
    batch = replace(random_batch([3, 4]), image=strip.double().expand(2, -1, -1, -1), num_patches=6)
    batch = replace(batch, grid=torch.cat(grids[:2]))
    assert step(cached, [batch])[0] == pytest.approx(step(plain, [batch])[0], rel=1e-12)
    assert step(cached, [batch])[0] == pytest.approx(step(plain, [batch])[0], rel=1e-12)


def test_a_strip_is_known_by_all_its_patches_and_no_padding():
    cached = objective_with("softmax", feature_cache=1.0)
    batch = strips(random_batch())
    expected = cached._digests(batch)
    for b, n in enumerate(batch.patch_counts().tolist()):
        within, behind = batch.image.clone(), batch.image.clone()
        within[b, ..., n * P - 1] += 1
        behind[b, ..., n * P :] += 1
        assert cached._digests(replace(batch, image=within))[b] != expected[b]
        assert cached._digests(replace(batch, image=behind)) == expected


def split_strips(batch: Batch, sizes: list[int]) -> list[Batch]:
    parts, first = [], 0
    for part, size in zip(split(batch, sizes), sizes, strict=True):
        parts.append(replace(part, grid=batch.grid[first : first + size]))
        first += size
    return parts


def test_a_full_cache_computes_the_rest():
    one = random_objective().encoder(random_batch([1]).image).numel() * 8
    cached = objective_with("softmax", feature_cache=2.5 * one / 2**30)
    ran = []
    cached.encoder.register_forward_hook(lambda _module, inputs, out: ran.append(len(out)))
    batch = random_batch()
    expected = step(objective_with("softmax"), [batch])
    for _ in range(3):
        found = step(cached, [batch])
        assert found[0] == pytest.approx(expected[0], rel=1e-12)
        assert_same(found[1], expected[1])
    assert ran == [6, 4, 4]


# --- stale negatives


def test_stale_negatives_are_refused():
    objective, batch = objective_with("softmax"), random_batch()
    parts = split(batch, [2, 2, 2])
    stale = re.escape("its negatives would be stale")
    with pytest.raises(ValueError, match=f"samples 0 to 5, .* nothing is left.*{stale}"):
        objective(batch, ONE)  # never shown
    objective.look_ahead(parts, ONE)
    objective(parts[0], ONE)
    with pytest.raises(ValueError, match=f"samples 0 to 1, .* the next is 2 to 3: {stale}"):
        objective(parts[0], ONE)  # twice
    with pytest.raises(ValueError, match="nothing is left"):
        objective(parts[1], ONE)  # after an error nothing of that step goes on
    objective.look_ahead(parts, ONE)
    with pytest.raises(ValueError, match=f"samples 2 to 3, .* the next is 0 to 1: {stale}"):
        objective(parts[1], ONE)  # out of order
    objective.look_ahead([batch], ONE)
    objective(batch, ONE)
    with pytest.raises(ValueError, match="nothing is left"):
        objective(batch, ONE)
    objective.look_ahead(parts, ONE)  # a step that broke off, and a new one
    step(objective, [batch])


# --- evaluation


@pytest.mark.parametrize("loss", LOSSES)
def test_evaluation_compares_within_the_micro_batch(loss):
    objective, batch = objective_with(loss), random_batch()
    counts = Counts.of(count_targets([batch]))
    with torch.no_grad():
        found = objective.eval()(batch, counts)
    expected = plain_loss(objective, batch, CAPTIONED)
    assert found["loss"].item() == pytest.approx(expected.item(), rel=1e-12) and not found["loss"].requires_grad
    objective.train()
    training, _ = step(objective, [batch])
    assert training["loss"] == pytest.approx(found["loss"].item(), rel=1e-12)
    assert training["accuracy"] == pytest.approx(found["accuracy"].item())


def test_evaluation_between_look_ahead_and_forward_disturbs_nothing():
    objective, batch = objective_with("softmax"), random_batch()
    expected = step(objective, split(batch, [3, 3]))
    counts, parts = Counts.of(count_targets([batch])), split(batch, [3, 3])
    objective.zero_grad()
    objective.look_ahead(parts, counts)
    with torch.no_grad():
        objective(random_batch(seed=3), counts)
    for part in parts:
        objective(part, counts)["loss"].backward()
    assert_same(gradients(objective), expected[1])


# --- the config


def data_config(**changes) -> DataConfig:
    settings = {"train": [Source(name="a", shards="a.tar")], "tokenizer": "clip", "context_length": CONTEXT}
    return DataConfig(**settings | {"transform": TransformConfig(image_size=P * GRID)} | changes)


def test_the_config_says_what_it_is():
    assert LiTObjectiveConfig.needs_weights and CONFIG.vision is VISION and CONFIG.text is TEXT
    assert CONFIG.vocab_size == TEXT.vocab_size
    assert CONFIG.check(data_config()) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transform": TransformConfig(image_size=8)}, "image_size 8 is not objective.model.vision.image_size 6"),
        (
            {"native": NativeConfig(), "transform": TransformConfig(image_size=P * GRID, crop_scale=None)},
            "positions 'learned' with data.native",
        ),
        ({"context_length": 7}, "context_length 7 is more than objective.model.text.context_length 6"),
    ],
)
def test_data_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        CONFIG.check(data_config(**changes))


def test_a_cache_of_what_never_comes_twice():
    with pytest.raises(ValueError, match="feature_cache 1 with random crops"):
        replace(CONFIG, feature_cache=1.0).check(data_config())
    whole = TransformConfig(image_size=P * GRID, crop_scale=None)
    assert replace(CONFIG, feature_cache=1.0).check(data_config(transform=whole)) is None


def test_runs_that_cannot_work():
    """Under ZeRO-3 the tower's weights are gathered wherever it runs: a rank that knows its images would stay away."""
    run = load_config(Path(__file__).parents[1] / "tiny_lit.py")
    run.data.transform.crop_scale = None
    engine, cached = replace(run.engine, zero_stage=3), replace(run.objective, feature_cache=1.0)
    assert replace(run, engine=engine) and replace(run, objective=cached)
    with pytest.raises(ValueError, match=r"feature_cache 1 with engine\.zero_stage 3"):
        replace(run, engine=engine, objective=cached)
    with pytest.raises(ValueError, match=r"engine\.batch_size 1: expected 2 or more"):
        replace(run, engine=replace(run.engine, batch_size=1, micro_batch=1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "hinge"}, "loss 'hinge': expected softmax or sigmoid"),
        ({"feature_cache": -1.0}, "feature_cache -1.0"),
        ({"feature_cache": math.nan}, "feature_cache nan"),
    ],
)
def test_impossible_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **changes)


def test_text_longer_than_the_context():
    objective, batch = objective_with("softmax"), random_batch([3, 2])
    batch = replace(batch, text=F.pad(batch.text, (0, CONTEXT), value=5))
    objective.look_ahead([batch], ONE)
    with pytest.raises(ValueError, match=f"text of {batch.text.shape[1]} tokens, but the context holds {CONTEXT}"):
        objective(batch, ONE)


def test_captions_of_another_tokenizer_without_the_towers_eos():
    objective, batch = objective_with("softmax"), random_batch([3, 2])
    batch = replace(batch, text=batch.text.masked_fill(batch.text == EOS, 4))
    objective.look_ahead([batch], ONE)
    with pytest.raises(ValueError, match="row 0 of the text has no EOS: end it with token id 1"):
        objective(batch, ONE)


def test_flops_are_those_of_the_matrix_products():
    from torch.utils.flop_counter import FlopCounterMode

    objective, batch = random_objective(dtype=torch.float32), random_batch([CONTEXT], torch.float32)
    with FlopCounterMode(display=False) as counter:
        with torch.no_grad():
            objective.encoder(batch.image)
        forward = counter.get_total_flops()
    patches = objective.encoder(batch.image).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        objective.model(None, batch.text, patches=patches)
    # Backward is twice the forward; torch counts attention in full as we do, but for kernels that it doesn't know.
    assert CONFIG.training_flops(CONTEXT) == pytest.approx(forward + 3 * counter.get_total_flops(), rel=0.05)


# --- precision and compiling


@pytest.mark.parametrize("loss", LOSSES)
def test_bf16_is_close_to_fp32(loss):
    objective = random_objective(replace(CONFIG, loss=loss), torch.float32)
    batch = random_batch(dtype=torch.float32)
    expected, by_fp32 = step(objective, split(batch, [2, 4]))
    found, by_bf16 = step(copy.deepcopy(objective).bfloat16(), split(batch, [2, 4]))
    # bf16 is off by 2^-9 relative; some 40 roundings on the way, times a scale of 4.5 in the logits
    assert found["loss"] == pytest.approx(expected["loss"], rel=0.02)
    ours, theirs = (torch.cat([g.float().flatten() for g in gradient.values()]) for gradient in (by_bf16, by_fp32))
    assert (ours - theirs).norm() / theirs.norm() < 0.1


@pytest.mark.slow
def test_compiled_equals_eager():
    """Graphs break where micro-batches are told apart; what is computed is the same."""
    objective, batch = objective_with("softmax"), random_batch()
    expected = [step(objective, split(batch, sizes)) for sizes in ([6], [3, 3])]
    torch._dynamo.reset()
    objective.compile(backend="eager")
    for sizes, (losses, by_eager) in zip(([6], [3, 3]), expected, strict=True):
        found, by_compiled = step(objective, split(batch, sizes))
        assert found == pytest.approx(losses, rel=1e-12)
        assert_same(by_compiled, by_eager)
