"""What scripts/benchmark.py compares, and what it makes of its times; never how long anything takes."""

import argparse
import importlib
import io
import json
import math
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from aimv2.flops import encoder_flops


@pytest.fixture(scope="module")
def scripts(request):
    """The script's modules by name, found as when it runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(request.config.rootpath / "scripts")
        yield importlib.import_module


@pytest.fixture
def models(scripts):
    return scripts("benchmark_models")


@pytest.fixture
def data(scripts):
    return scripts("benchmark_data")


@pytest.fixture
def run(request, tmp_path):
    """Run the script on tiny images: the finished process, and its JSON."""
    root = request.config.rootpath

    def run(*arguments):
        out = tmp_path / "out.json"
        options = ("--image-size", "28", "--batch", "2", "--rounds", "2", "--json", str(out))
        command = [sys.executable, str(root / "scripts" / "benchmark.py"), *arguments, *options]
        done = subprocess.run(command, env={"PYTHONPATH": str(root)}, capture_output=True, text=True)
        return done, json.loads(out.read_text()) if out.exists() else None

    return run


ON_CPU = ("--device", "cpu", "--threads", "1", "--peak-tflops", "0.1")
NUMBERS = ("seconds", "images_per_second", "ratio", "flops_per_second", "memory_bytes", "peak_flops", "mfu")


@pytest.mark.parametrize(
    ("what", "tasks", "models"),
    [("encoder", ["forward", "fwd+bwd"], ["ours", "transformers", "timm"]), ("train", ["train step"], ["ours"])],
)
def test_table_and_json(run, what, tasks, models):
    if what == "encoder":
        pytest.importorskip("transformers")
        pytest.importorskip("timm")
    done, report = run(what, "--size", "tiny", *ON_CPU)
    assert done.returncode == 0, done.stderr
    expected = [(task, dtype, model) for dtype in ("fp32", "bf16") for task in tasks for model in models]
    results = report["results"]
    assert [(r["task"], r["dtype"], r["model"]) for r in results] == expected
    for result in results:
        assert all(math.isfinite(result[name]) and result[name] > 0 for name in NUMBERS)
        assert result["peak_source"] == "given" and len(result["rounds"]) == 2
        assert result["ratio"] == 1.0 or result["model"] != "ours"
        low, high = result["ratio_quartiles"]
        assert low <= result["ratio"] <= high
    assert report["environment"]["threads"] == 1 and report["environment"]["torch"] == torch.__version__

    place, title, *lines, peaks = done.stdout.splitlines()
    assert f"torch {torch.__version__}" in place
    assert title.split()[:3] == ["task", "dtype", "model"] and peaks.startswith("MFU against")
    column = title.index("model")
    for line, (task, dtype, model) in zip(lines, expected, strict=True):
        assert line.startswith(task) and dtype in line and line[column:].split()[0] == model


def test_an_unknown_size_is_one_line(run):
    done, report = run("encoder", "--size", "giant", *ON_CPU)
    assert done.returncode == 1 and report is None
    assert done.stderr.count("\n") == 1 and "giant" in done.stderr and "base, large" in done.stderr


@pytest.mark.parametrize("maker", ["ours", "transformers", "timm"])
def test_encoders_do_the_same_work(models, maker):
    """torch's own counter of operations sees exactly those of our configuration."""
    if maker != "ours":
        pytest.importorskip(maker)
    model, forward = getattr(models, maker)(models.TINY)
    model.requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        features = forward(torch.randn(1, 3, 224, 224))
    assert counter.get_total_flops() == encoder_flops(models.TINY)
    assert features.shape == (1, models.TINY.num_patches, models.TINY.width)
    attention = getattr(model.config, "_attn_implementation", None) if maker == "transformers" else "sdpa"
    assert attention == "sdpa"


def test_encoders_of_another_shape_are_refused(models, monkeypatch):
    arguments = argparse.Namespace(batch=1, device="cpu", compile=False)
    larger = models.replace(models.TINY, depth=3)
    ours = models.ours
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: name == "timm")

    def timm(config):
        return ours(larger)

    monkeypatch.setattr(models, "timm", timm)
    with pytest.raises(ValueError, match=r"differ.*'ours'.*'timm'"):
        models.encoder_subjects(models.TINY, "fp32", False, arguments)


def test_turns_and_ratios(models, scripts, monkeypatch):
    """Three subjects whose passes take known times, the slow one twice as long in the last round."""
    rounds = scripts("benchmark_rounds")
    clock = {"ours": [9, 9, 2.0, 4.0, 2.0], "slow": [9, 9, 4.0, 4.0, 8.0], "fast": [9, 9, 1.0, 1.0, 1.0]}
    left = {name: iter(times) for name, times in clock.items()}
    order = []

    def seconds_of(run, device):
        order.append(run())
        return next(left[order[-1]])

    monkeypatch.setattr(rounds, "seconds_of", seconds_of)
    monkeypatch.setattr(models, "memory", lambda subject, device: 7)
    subjects = {name: models.Subject(run=lambda name=name: name, tensors=list) for name in clock}
    arguments = argparse.Namespace(device="cpu", rounds=3, batch=6)
    ours, slow, fast = models.measure("forward", "fp32", subjects, 10.0, arguments)

    turns = [order[i : i + 3] for i in range(0, len(order), 3)]
    assert len(turns) == rounds.WARM_UP + 3 and all(sorted(turn) == sorted(clock) for turn in turns)
    assert {turn[0] for turn in turns[2:]} == set(clock)  # each begins once
    assert ours["rounds"] == [2.0, 4.0, 2.0] and ours["seconds"] == 2.0
    assert ours["images_per_second"] == 3.0 and ours["flops_per_second"] == 30.0
    assert (ours["ratio"], slow["ratio"], fast["ratio"]) == (1.0, 2.0, 0.5)  # of 1; of 2, 1, 4; of 1/2, 1/4, 1/2
    assert slow["ratio_quartiles"] == [1.5, 3.0]


def test_memory_is_what_stays_and_the_highest_moment(models):
    def run():
        a = torch.empty(1000)
        b = torch.empty(2000)
        del a
        return torch.empty(500) + b[:500]

    subject = models.Subject(run=run, tensors=lambda: [torch.empty(10)])
    # The sum and its operand come after the first tensor has gone: 2000 + 500 + 500 values are alive at once.
    slack = 256  # bytes: the allocator's own rounding
    assert 0 <= models.memory(subject, torch.device("cpu")) - 4 * (3000 + 10) <= slack


def test_loaders_and_readers(run, tmp_path):
    pytest.importorskip("open_clip")
    pytest.importorskip("webdataset")
    options = ("--samples", "8", "--batches", "1", "--data", str(tmp_path / "photos"))
    done, report = run("data", *options)
    assert done.returncode == 0, done.stderr
    expected = [("load", "ours"), ("load", "open_clip"), ("read", "ours"), ("read", "webdataset")]
    results = report["results"]
    assert [(r["task"], r["loader"]) for r in results] == expected
    for result in results:
        assert result["samples_per_second"] * result["seconds"] == pytest.approx(2)  # a batch of two
        assert (result["ratio"] == 1.0) == (result["loader"] == "ours")
    assert report["environment"]["threads"] == 1 and "webdataset" in report["environment"]
    place, title, *lines = done.stdout.splitlines()
    assert "open_clip" in place and title.split()[:2] == ["task", "loader"]
    assert [tuple(line.split()[:2]) for line in lines[:4]] == expected and lines[4].startswith("load:")


def test_without_open_clip_it_is_asked_for(data, monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip_train", None)
    with pytest.raises(ValueError, match="pip install open_clip_torch"):
        next(data.results(argparse.Namespace()))


def test_made_photos_cost_a_decoder_what_photographs_do(data, tmp_path):
    """As many bits a pixel: the photographs of scikit-image and scikit-learn of this size have 1.4 to 2.8."""
    pixels = bits = 0
    for shard in data.made_shards(tmp_path / "photos", 8):
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith(".jpg"):
                    content = tar.extractfile(member).read()
                    image = Image.open(io.BytesIO(content))
                    assert min(image.size) >= 384 and max(image.size) <= 512
                    assert image.mode == "RGB" and image.layer[0][1:3] == (2, 2)  # 4:2:0
                    pixels, bits = pixels + image.width * image.height, bits + 8 * len(content)
    assert 1.5 < bits / pixels < 2.8
    with pytest.raises(ValueError, match="photos = 8"):
        data.made_shards(tmp_path / "photos", 9)
    again, other = (data.photo(np.random.default_rng(seed), 400, 390) for seed in (0, 1))
    assert again == data.photo(np.random.default_rng(0), 400, 390) != other


@pytest.mark.slow
def test_probes_and_neighbours(run):
    done, report = run("probe", "--size", "base", "--gallery", "500", "--device", "cpu", "--threads", "1")
    assert done.returncode == 0, done.stderr
    subjects = {"cached": ["ours", "one by one", "published"], "knn": ["ours", "scikit-learn"]}
    subjects["online"] = subjects["cached"]
    assert {mode: [r["subject"] for r in report["results"] if r["mode"] == mode] for mode in subjects} == subjects
