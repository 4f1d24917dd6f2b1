"""Caption accuracy at several sizes: exports that were never trained, and captions put into their mouths."""

import json
import math
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from aimv2.data.loader import validation_loader
from aimv2.data.native import area_grid
from aimv2.data.shapes import ShapesRecipe, scene, write_shards
from aimv2.data.shards import ensure_indices, expand_shards
from aimv2.data.tokenizer import Tokenizer
from aimv2.decoder import DecoderConfig
from aimv2.encoder import VisionConfig
from aimv2.evals.caption_sizes import Captioner, CaptionSizes
from aimv2.evals.datasets import open_dataset
from aimv2.evals.harness import at_rest
from aimv2.evals.reports.caption_sizes import draw_sizes
from aimv2.evals.reports.files import read_result
from aimv2.evals.run import evaluate
from aimv2.evals.session import Session
from aimv2.evals.shapes_captions import ShapesCaptions, caption_ids, score, score_with_errors
from aimv2.exports import export_model
from aimv2.objectives.aimv2 import AIMv2Config
from aimv2.preprocessing import ProcessorConfig

ROOT = Path(__file__).parents[2]
TOKENIZER = str(ROOT / "tokenizers" / "shapes")
SCRIPT = ROOT / "eval" / "shapes_captions.py"
IMAGES, P = 40, 8
QUIET = {"batch_size": 16, "quiet": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mixed")
    write_shards(ShapesRecipe(difficulty="mixed", folder=str(folder), train=1, validation=IMAGES, samples_per_shard=25))
    ensure_indices(expand_shards(f"{folder}/*.tar"))
    return folder


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> dict[str, str]:
    """Exports of 48 px, or 36 patches: "fixed" with learned positions, "native", and an encoder alone."""
    torch.manual_seed(0)
    folder, found = tmp_path_factory.mktemp("exports"), {}
    known = {"patch_size": P, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    squares = ProcessorConfig(image_size=48, resize="squash", **known)
    native = ProcessorConfig(image_size=None, resize="native", min_patches=16, max_patches=144, **known)
    vocab_size = Tokenizer(TOKENIZER).vocab_size
    for name, positions, processing in (("fixed", "learned", squares), ("native", "sincos", native)):
        vision = VisionConfig(
            width=16, depth=1, heads=2, mlp_hidden=16, image_size=48, patch_size=P, positions=positions
        )
        decoder = DecoderConfig(width=16, depth=1, heads=2, mlp_hidden=16, vocab_size=vocab_size, context_length=30)
        config = AIMv2Config(vision=vision, decoder=decoder)
        model = config.build()
        with torch.no_grad():  # so that what is written depends on the image
            model.decoder.projection.weight.mul_(30)
            model.decoder.text_head.weight.mul_(30)
            model.decoder.pixel_head.weight.mul_(30)
        for made, of, tokenizer in ((name, config, TOKENIZER), (f"{name}_encoder", vision, None)):
            weights = model if of is config else model.encoder
            export_model(weights, folder / made, config=of, processing=processing, tokenizer=tokenizer)
            found[made] = str(folder / made)
    return found


@pytest.fixture
def truthful(monkeypatch):
    """Captions are the true ones but for images that `lies` says; their batches are kept."""
    seen, tokenizer = [], Tokenizer(TOKENIZER)

    def make(lies=lambda drawn: False):
        def written(model, batch, eos_id, max_tokens):
            seen.append(batch)
            drawn = [scene(0, "validation", g, "mixed") for g in batch.sample.tolist()]
            true = [ids[: n - 1].tolist() for ids, n in zip(batch.text, batch.text_length, strict=True)]
            lie = tokenizer.encode("a big red ring at top left", 30)[:-1]
            return [lie if lies(d) else ids for d, ids in zip(drawn, true, strict=True)]

        monkeypatch.setattr("aimv2.evals.caption_sizes.caption_ids", written)
        return seen

    return make


def run(spec, folder, session=None, **settings):
    data = open_dataset(f"shapes:{folder}")
    return CaptionSizes(**settings).run(Captioner(spec), data, session or Session(**QUIET))


def test_true_captions_are_right_and_lies_wrong_where_they_are(exports, folder, truthful):
    seen = truthful(lies=lambda drawn: drawn.canvas[1] > 1.5 * drawn.canvas[0])
    outcome = run(exports["native"], folder, patches=36)
    scenes = [scene(0, "validation", g, "mixed") for g in range(IMAGES)]
    aspects = np.array([width / height for width, height in (drawn.canvas for drawn in scenes)])
    tall = aspects < 2 ** (-1 / 3)
    metrics = outcome.metrics
    assert next(iter(metrics)) == "exact_set"
    assert (metrics["exact_set_squarish"].value, metrics["exact_set_wide"].value) == (1.0, 1.0)
    lies = (aspects < 1 / 1.5).sum()
    assert 0 < lies < tall.sum()
    assert metrics["exact_set_tall"].value == pytest.approx(1 - lies / tall.sum())
    assert metrics["exact_set_tall"].n == tall.sum()
    p = 1 - lies / IMAGES
    assert metrics["exact_set"].value == pytest.approx(p)
    assert metrics["exact_set"].stderr == pytest.approx(math.sqrt(p * (1 - p) / IMAGES))
    assert [sample["correct"] for sample in outcome.samples] == (aspects >= 1 / 1.5).tolist()
    assert outcome.samples[26]["sample"] == "validation-000001.tar/000000026"
    # Aspects are kept: every strip has the grid that its scene asks for.
    for batch in seen:
        expected = [area_grid(*reversed(scenes[g].canvas), 36) for g in batch.sample.tolist()]
        assert list(map(tuple, batch.grid.tolist())) == expected
    patches = [math.prod(area_grid(*reversed(drawn.canvas), 36)) for drawn in scenes]
    assert outcome.details == {"patches": 36, "mean_patches": np.mean(patches), "trained_patches": None}


def test_other_models_see_squares_unless_they_are_asked_not_to(exports, folder, truthful):
    seen = truthful()
    outcome = run(exports["fixed"], folder, patches=81)
    assert all(batch.grid is None and batch.image.shape[1:] == (3, 72, 72) for batch in seen)
    assert outcome.details == {"patches": 81, "mean_patches": 81.0, "trained_patches": 36}
    assert all(metric.value == 1 for metric in outcome.metrics.values())
    seen.clear()
    run(exports["fixed"] + "@native", folder, patches=80)
    assert all(batch.grid is not None for batch in seen)
    seen.clear()
    assert run(exports["fixed"], folder, samples=7).metrics["exact_set"].n == 7  # at its own size
    assert all(batch.image.shape[1:] == (3, 48, 48) for batch in seen)


@pytest.mark.parametrize("spec", ["fixed", "native", "fixed@native"])
def test_the_same_numbers_as_in_training(exports, folder, spec):
    """ShapesCaptions of a run with the same data. Untrained captions don't parse, but they are the same ones."""
    name, _, kept = spec.partition("@")
    captioner = Captioner(exports[name] + ("@native" if kept else ""))
    data = captioner.data(f"{folder}/validation-*.tar", 49, 0)
    model = captioner.at(49)
    area = 49 if captioner.keeps_aspect else None
    place = {"patch_size": P, "seed": 0, "rank": 0, "world_size": 1}
    in_loop = ShapesCaptions(samples=IMAGES, batch_size=16, area=area).build(data, device=torch.device("cpu"), **place)
    outcome = run(captioner.spec, folder, patches=49)
    assert in_loop(model) == {name: metric.value for name, metric in outcome.metrics.items() if "set_" not in name}
    tokenizer, found = Tokenizer(TOKENIZER), {}
    for batch in validation_loader(data, micro_batch=16, area=area, **place):
        with at_rest(model):
            ids = caption_ids(model, batch, tokenizer.eos_id, 30)
        found |= zip(batch.sample.tolist(), map(tokenizer.decode, ids), strict=True)
    assert [sample["prediction"] for sample in outcome.samples] == [found[g] for g in range(IMAGES)]
    assert len(set(found.values())) > IMAGES / 4


@pytest.mark.parametrize("spec", ["native", "fixed@native"])
def test_captions_of_a_mixed_batch_are_those_of_each_image_alone(exports, folder, spec):
    """In float64, where the order of sums decides no token; whatever stands in the padding."""
    name, _, kept = spec.partition("@")
    captioner = Captioner(exports[name] + ("@native" if kept else ""))
    data, model = captioner.data(f"{folder}/validation-*.tar", 55, 0), captioner.at(55).double()
    place = {"patch_size": P, "seed": 0, "rank": 0, "world_size": 1, "area": 55}
    (together,) = validation_loader(data, micro_batch=IMAGES, **place)
    assert len(set(together.patch_counts().tolist())) > 2
    alone = list(validation_loader(data, micro_batch=1, **place))
    padding = ~together.real_patches().repeat_interleave(P, dim=1)[:, None, None]  # (B, 1, 1, N P)
    together.image.masked_fill_(padding, 50.0)
    with at_rest(model):
        captions = caption_ids(model, together, 1, 30)
        assert captions == [caption_ids(model, batch, 1, 30)[0] for batch in alone]
        # The test can fail: looking at the padding, other captions are written.
        everywhere = torch.ones(1, 1, 1, together.num_patches, dtype=torch.bool)
        seen = model.encoder(together.image, everywhere, grid=together.grid)
        assert model.decoder.generate(seen, eos_id=1, max_tokens=30) != captions


def test_two_ranks_write_what_one_does(exports, folder):
    """What each would put into the sum."""
    whole = run(exports["native"], folder, patches=36, samples=21)
    parts = []

    class Rank(Session):
        def sum(self, tensor):
            parts.append(tensor)
            return tensor

    for rank in (0, 1):
        run(exports["native"], folder, Rank(rank=rank, world_size=2, **QUIET), patches=36, samples=21)
    tokens, lengths = parts[0] + parts[2], parts[1] + parts[3]
    tokenizer = Tokenizer(TOKENIZER)
    captions = [tokenizer.decode([i - 1 for i in row if i]) for row in tokens.tolist()]
    assert captions == [sample["prediction"] for sample in whole.samples]
    assert lengths.double().mean().item() == whole.details["mean_patches"]


def test_an_unreadable_image_is_wrong(exports, folder, truthful, monkeypatch):
    """The loader puts another image in its place, whose caption must not count."""
    seen = truthful()

    def broken(loader):
        for batch in loader:
            yield replace(batch, replaced=[type("Replaced", (), {"sample": 3})()] if 3 in batch.sample else [])

    original = validation_loader
    monkeypatch.setattr("aimv2.evals.caption_sizes.validation_loader", lambda *a, **k: broken(original(*a, **k)))
    outcome = run(exports["native"], folder, patches=36)
    assert [i for i, sample in enumerate(outcome.samples) if not sample["correct"]] == [3] and seen
    assert outcome.samples[3]["prediction"] == ""
    assert outcome.metrics["parsed"].value == 1 - 1 / IMAGES


def test_errors_of_ratios():
    """Oracle: the bootstrap over images. 1 of 1000 resamples' deviation is known to 2 %: 5 standard errors."""
    rng = np.random.default_rng(0)
    objects = rng.integers(1, 3, 400)
    hits = rng.binomial(objects, 0.7)
    counts = torch.zeros(400, 9, dtype=torch.float64)
    counts[:, 0] = 1
    counts[:, 2] = torch.tensor(rng.random(400) < 0.6)
    counts[:, 3] = counts[:, 4] = torch.tensor(objects)
    counts[:, 5] = torch.tensor(hits)
    found = score_with_errors(counts)
    assert {name: metric.value for name, metric in found.items()} == pytest.approx(score(counts.sum(0).tolist()))
    drawn = rng.integers(400, size=(1000, 400))
    deviation = (hits[drawn].sum(1) / objects[drawn].sum(1)).std()
    assert found["object_shape"].stderr == pytest.approx(deviation, rel=0.1)
    p = found["exact_set"].value
    assert found["exact_set"].stderr == pytest.approx(math.sqrt(p * (1 - p) / 400))


def test_what_can_not_be_asked(exports, folder, tmp_path):
    with pytest.raises(ValueError, match=r"fixed takes square images, expected a square number.*@native"):
        run(exports["fixed"], folder, patches=40)
    with pytest.raises(ValueError, match=r"image size 50: .*fixed has patches of 8 pixels"):
        Captioner(exports["fixed"]).patches(50)
    with pytest.raises(ValueError, match=r"native_encoder.* expected an AIMv2 of ours"):
        Captioner(exports["native_encoder"])
    with pytest.raises(ValueError, match="nowhere"):
        Captioner(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="patches 1: expected 2 or more"):
        CaptionSizes(patches=1)
    config = json.loads((Path(exports["fixed"]) / "config.json").read_text())
    mute = tmp_path / "mute"
    mute.mkdir()
    for file in Path(exports["fixed"]).iterdir():
        (mute / file.name).symlink_to(file)
    (mute / "config.json").unlink()
    (mute / "config.json").write_text(json.dumps(config | {"tokenizer": None}))
    with pytest.raises(ValueError, match="mute has no tokenizer"):
        Captioner(str(mute))


def test_quick_images_are_all_of_one_aspect(exports, tmp_path, monkeypatch):
    write_shards(ShapesRecipe(difficulty="quick", folder=str(tmp_path), train=1, validation=5))
    outcome = run(exports["fixed"], tmp_path)
    assert not any("set_" in name for name in outcome.metrics)


@pytest.fixture
def script(monkeypatch, capsys, tmp_path):
    """`script(*arguments)` -> (exit code, what was printed, errors); it writes into tmp_path/out."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    monkeypatch.delitem(sys.modules, "arguments", raising=False)

    def start(*arguments):
        place = ["--out", tmp_path / "out", "--device", "cpu", "--workers", 0]
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, (*arguments, *place))])
        return runpy.run_path(str(SCRIPT))["main"](), *capsys.readouterr()

    return start


def test_the_script_writes_results_and_a_picture(script, exports, folder, tmp_path):
    models = ["--model", exports["fixed"], exports["fixed"] + "@native", exports["native"]]
    code, said, _ = script(*models, "--data", folder, "--image-size", 32, 48, 64, "--samples", 12)
    assert code == 0
    results = [read_result(path) for path in sorted((tmp_path / "out").glob("*.json"))]
    assert len(results) == 9
    assert {r.details["patches"] for r in results} == {16, 36, 64}
    assert {r.encoder["name"] for r in results} == {"fixed", "fixed@native", "native"}
    weights = {
        name: {r.encoder["weights"] for r in results if r.encoder["name"] == name} for name in ("fixed", "native")
    }
    assert all(len(digests) == 1 for digests in weights.values()) and weights["fixed"] != weights["native"]
    assert f"{tmp_path / 'out' / 'shapes_captions.png'}" in said
    with Image.open(tmp_path / "out" / "shapes_captions.png") as picture:
        assert picture.width > 1000  # all and three aspects
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.json")}
    assert script(*models, "--data", folder, "--area", 16, 36, "--samples", 12)[0] == 0  # the same ones
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.json")} == before


def test_script_errors_are_one_line(script, exports, folder, tmp_path):
    for arguments, words in (
        (["--model", exports["fixed"], "--data", folder, "--area", 40], "takes square images"),
        (["--model", exports["fixed_encoder"], "--data", folder], "expected an AIMv2 of ours"),
        (["--model", exports["fixed"], "--data", tmp_path / "none"], "no .tar file matches"),
    ):
        code, _, errors = script(*arguments)
        assert code == 1
        (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert words in line
    code, _, _ = script("--model", exports["fixed"], "--data", folder, "--samples", 0)
    assert code == 1


def test_results_draw_and_stand_in_the_report(exports, folder, truthful, tmp_path):
    """The lines hold the results' numbers."""
    truthful(lies=lambda drawn: drawn.index % 3 == 0)
    data, paths = open_dataset(f"shapes:{folder}"), []
    for spec in (exports["fixed"], exports["native"]):
        paths += [
            evaluate(CaptionSizes(patches=n), Captioner(spec), data, tmp_path, Session(**QUIET)) for n in (36, 64)
        ]
    results = [read_result(path) for path in paths]
    assert draw_sizes(results, tmp_path / "a.png").stat().st_size > 10_000
    from aimv2.evals.reports.table import build_table

    table = build_table(results)
    assert sorted(table.rows) == ["fixed", "native"]
    assert [column.protocol for column in table.headlines] == ["captions (patches 36)", "captions (patches 64)"]
