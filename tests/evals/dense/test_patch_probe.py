"""The probe on patches whose class, or nothing at all, is in their features."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import finish, start
from torch import Tensor, nn

from aimv2.data.images import BadImage
from aimv2.evals.datasets import Dataset, ImageSet
from aimv2.evals.dense.patch_probe import PatchGrid, PatchHeads, PatchProbe
from aimv2.evals.encoders import BlockOutput, Encoder
from aimv2.evals.session import Session, launched_session
from aimv2.preprocessing import ProcessorConfig

SIDE, PATCH, CLASSES = 16, 4, ("floor", "cup", "plate")
PLAIN = ProcessorConfig(image_size=SIDE, patch_size=PATCH, mean=(0.0,) * 3, std=(1.0,) * 3)
QUIET = Session(quiet=True)
FEW = {"grid": 0, "epochs": 4, "batch": 8, "lrs": (1e-2, 1e-1)}


class Pictures(list):
    bad: tuple[int, ...] = ()

    def __getitem__(self, row: int) -> Image.Image:
        if row in self.bad:
            raise BadImage("cut off")
        return super().__getitem__(row)


def image_set(n: int, seed: int, split: str, shuffled: bool = False, bad: tuple[int, ...] = ()) -> ImageSet:
    """4 x 4 patches, 6 of 10 of class 0; a patch's red is 40 times its class, green and blue are noise."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(3, (n, 4, 4), p=[0.6, 0.25, 0.15]).astype(np.uint8)
    pixels = rng.integers(0, 256, (n, 4, 4, 3), np.uint8)
    pixels[..., 0] = 40 * labels
    large = pixels.repeat(PATCH, axis=1).repeat(PATCH, axis=2)
    images = Pictures(Image.fromarray(image) for image in large)
    images.bad = bad
    said = rng.permutation(labels.ravel()).reshape(labels.shape) if shuffled else labels
    return ImageSet(
        name="made",
        split=split,
        images=images,
        keys=[f"{row:04d}" for row in range(n)],
        digest=f"{n} {seed} {bad}",
        masks=[Image.fromarray(mask) for mask in said],
    )


def dataset(train: int = 60, test: int = 101, **changes) -> Dataset:
    sets = {"train": image_set(train, 1, "train", **changes), "test": image_set(test, 2, "test", **changes)}
    return Dataset(spec="made", name="made", classes=CLASSES, **sets)


class Patches(Encoder):
    """Features (B, N, D) of patches by their mean colours (B, N, 3)."""

    def __init__(self, *functions):
        self.functions = functions
        width = functions[-1](torch.zeros(1, 16, 3)).shape[-1]
        described = {"spec": "made", "name": "made", "source": "test", "width": width, "heads": 1, "grid": (4, 4)}
        super().__init__(nn.Identity(), PLAIN, depth=len(functions), **described)

    def _pass(self, images: Tensor, numbers: Sequence[int], output: bool) -> tuple[list[BlockOutput], BlockOutput]:
        colours = nn.functional.avg_pool2d(images, PATCH).flatten(2).transpose(1, 2)  # (B, N, 3)
        found = [BlockOutput(function(colours), None) for function in self.functions]
        return [found[number] for number in numbers], found[-1]

    def _pooled(self, images: Tensor) -> Tensor:
        return self.output(images).patches.mean(dim=1)

    def norm(self, x: Tensor) -> Tensor:
        return x


def oracle(colours: Tensor) -> Tensor:
    """The class, one-hot."""
    return nn.functional.one_hot((colours[..., 0] * 255 / 40).round().long(), 3).float()


def noise(colours: Tensor) -> Tensor:
    """Green and blue, which say nothing."""
    return colours[..., 1:]


def constant(colours: Tensor) -> Tensor:
    return torch.ones(*colours.shape[:2], 4)


def test_an_oracle_is_always_right():
    found = PatchProbe(**FEW).run(Patches(oracle), dataset(), QUIET)
    assert [metric.value for metric in found.metrics.values()] == [1.0, 1.0]
    assert list(found.metrics) == ["miou", "patch_accuracy"]
    assert all(sample["correct"] == 1 for sample in found.samples)
    assert len(found.samples) == 101
    assert {name: entry["value"] for name, entry in found.details["per_class"].items()} == dict.fromkeys(CLASSES, 1.0)


def test_a_constant_is_the_most_common_class_everywhere():
    found = PatchProbe(**FEW).run(Patches(constant), dataset(), QUIET)
    for metric in found.metrics.values():
        assert metric.value == pytest.approx(metric.chance, abs=1e-12)
    labels = np.stack([np.asarray(mask) for mask in (dataset().test.mask(row) for row in range(101))])
    assert found.metrics["patch_accuracy"].chance == pytest.approx((labels == 0).mean())
    assert found.metrics["miou"].chance == pytest.approx((labels == 0).mean() / 3)


@pytest.mark.parametrize(("encoder", "shuffled"), [(Patches(noise), False), (Patches(oracle), True)])
def test_without_anything_to_know_it_is_no_better_than_that(encoder, shuffled):
    found = PatchProbe(**FEW).run(encoder, dataset(shuffled=shuffled), QUIET).metrics["patch_accuracy"]
    assert abs(found.value - found.chance) < 4 * found.stderr


def test_the_layer_is_chosen_on_training_images_and_the_others_are_reported():
    found = PatchProbe(layers="0,1,output", **FEW).run(Patches(noise, oracle, constant), dataset(), QUIET)
    assert found.details["selection"]["stream"] == "block_01"
    assert found.details["selection"]["on"] == "6 held-out training images"
    assert found.metrics["miou"].value == found.metrics["miou@block_01"].value == 1
    assert found.metrics["miou@block_00"].value < 0.5
    assert found.metrics["miou@output"].value == pytest.approx(found.metrics["miou@output"].chance)
    assert len(found.details["sweep"]) == 6
    json.dumps([found.details, found.samples])


def test_images_that_can_not_be_read():
    data = dataset(train=20, test=10)
    data.train = image_set(20, 1, "train", bad=(3, 4))
    data.test = image_set(10, 2, "test", bad=(0,))
    found = PatchProbe(**FEW).run(Patches(oracle), data, QUIET)
    assert found.metrics["patch_accuracy"].value == pytest.approx(0.9)  # one image of ten, all of its patches
    assert [sample["correct"] for sample in found.samples] == [0.0] + [1.0] * 9


def test_images_whose_masks_can_not_be_read_are_noted():
    """2 of 20 training masks are damaged, a third labels nothing; so is one of 10 test masks."""
    data = dataset()
    data.train, data.test = image_set(20, 1, "train"), image_set(10, 2, "test")
    for images, bad in ((data.train, (5, 7)), (data.test, (1,))):
        masks = Pictures(images.mask(row) for row in range(len(images)))
        masks.bad = bad
        images._whole["masks"] = masks
    data.train._whole["masks"][9] = Image.new("L", (4, 4), 255)
    found = PatchProbe(**FEW).run(Patches(oracle), data, QUIET)
    assert found.details["notes"][1:] == [
        "3 train images left out, whose mask can't be read or labels no patch: 0005, 0007, 0009",
        "1 test images left out, whose mask can't be read or labels no patch: 0001",
    ]
    assert [sample["sample"] for sample in found.samples] == [f"{row:04d}" for row in (0, *range(2, 10))]


def test_the_kept_head_gives_the_samples():
    data, encoder = dataset(), Patches(noise, oracle)
    found = PatchProbe(layers="1", **FEW).run(encoder, data, QUIET)
    head = PatchHeads.of(found.tensors)
    images = encoder.processor([data.test.image(row) for row in range(101)]).pixel_values
    features = PatchGrid("1", 0)(encoder, images)["block_01"]
    guesses = head.predict(features.numpy(), np.arange(101), QUIET)[0]
    labels = np.stack([np.asarray(data.test.mask(row)).ravel() for row in range(101)])
    assert (guesses == labels).mean() == found.metrics["patch_accuracy"].value


def test_heads_of_a_sweep_are_those_trained_alone():
    """To the bit: each has its own weights, moments and rate; what they share has no weights."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(20, 16, 6)).astype(np.float32)
    labels, rows = rng.integers(-1, 3, (20, 16)), np.arange(20)
    together = PatchProbe(**FEW).train(features, labels, rows, 3, QUIET)
    for number, lr in enumerate(FEW["lrs"]):
        alone = PatchProbe(**FEW | {"lrs": (lr,)}).train(features, labels, rows, 3, QUIET)
        for name, value in together.tensors(number).items():
            assert torch.equal(value, alone.tensors(0)[name])
    assert not torch.equal(together.linears[0].weight, together.linears[1].weight)


def test_the_head_learns_what_scikit_learn_does():
    """Many small steps end near the optimum of the same convex loss; compared by what they predict."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, (40, 16))
    features = (rng.normal(size=(3, 5))[labels] + rng.normal(size=(40, 16, 5))).astype(np.float32)
    probe = PatchProbe(grid=0, epochs=60, batch=10, lrs=(3e-2,), weight_decay=0.0)
    heads = probe.train(features, labels, np.arange(40), 3, QUIET)
    ours = heads.predict(features, np.arange(40), QUIET)[0].ravel()
    flat = features.reshape(-1, 5)
    reference = linear_model.LogisticRegression(C=1e6).fit((flat - flat.mean(0)) / flat.std(0), labels.ravel())
    theirs = reference.predict((flat - flat.mean(0)) / flat.std(0))
    assert (ours == theirs).mean() > 0.97  # the running statistics of the BatchNorm are not exactly the set's


def test_features_are_resized_to_a_common_grid():
    """A linear ramp stays one: cells of a coarser or finer grid have the value at their centres."""
    ramp = lambda colours: torch.arange(16.0).expand(len(colours), 16)[..., None] // 4  # the row of a patch  # noqa: E731
    images = torch.zeros(2, 3, SIDE, SIDE)
    assert PatchGrid(grid=0)(Patches(ramp), images)["output"].shape == (2, 16, 1)
    coarse = PatchGrid(grid=2)(Patches(ramp), images)["output"].reshape(2, 2, 2)
    # Antialiased: the mean over two cells and, with less weight, their neighbours; symmetric about the middle, 1.5.
    assert coarse[0, 0, 0] < 1
    torch.testing.assert_close(coarse[0, 0] + coarse[0, 1], torch.full((2,), 3.0))
    fine = PatchGrid(grid=8)(Patches(ramp), images)["output"].reshape(2, 8, 8)
    torch.testing.assert_close(fine[0, 1:7, 0], torch.arange(0.25, 3, 0.5))


def test_what_can_not_be_probed_is_refused():
    data = dataset()
    data.train = None
    with pytest.raises(ValueError, match="made has no training set"):
        PatchProbe(**FEW).run(Patches(oracle), data, QUIET)
    for change in ({"lrs": ()}, {"lrs": (0.0,)}, {"epochs": 0}, {"grid": -1}):
        with pytest.raises(ValueError, match="lrs, epochs and batch"):
            PatchProbe(**change)


def run_on_ranks(out: Path) -> None:
    with launched_session("cpu", quiet=True, batch_size=3) as session:
        found = PatchProbe(**FEW).run(Patches(noise, noise), dataset(15, 11), session)
        text = json.dumps([{n: [m.value, m.stderr] for n, m in found.metrics.items()}, found.samples])
        (out / f"{session.rank}.json").write_text(text)


def test_two_ranks_find_what_one_does(tmp_path):
    for ranks in (1, 2):
        (tmp_path / str(ranks)).mkdir()
        codes = finish(start(run_on_ranks, tmp_path / str(ranks), ranks=ranks, log=tmp_path / "log"))
        assert codes == [0] * ranks, (tmp_path / "log").read_text()
    alone = (tmp_path / "1" / "0.json").read_text()
    assert (tmp_path / "2" / "0.json").read_text() == (tmp_path / "2" / "1.json").read_text() == alone
