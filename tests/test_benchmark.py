"""What scripts/benchmark.py compares, and what it makes of its times; never how long anything takes."""

import argparse
import importlib.util
import json
import math
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from aimv2.flops import encoder_flops


@pytest.fixture(scope="module")
def benchmark(request):
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("benchmark", request.config.rootpath / "scripts" / "benchmark.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmark"] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["benchmark"]


@pytest.fixture
def run(request, tmp_path):
    """Run the script on tiny models: the finished process, and its JSON."""
    root = request.config.rootpath

    def run(*arguments):
        out = tmp_path / "out.json"
        options = ("--image-size", "28", "--batch", "2", "--rounds", "2", "--threads", "1", "--peak-tflops", "0.1")
        command = [sys.executable, str(root / "scripts" / "benchmark.py"), *options, "--json", str(out), *arguments]
        done = subprocess.run(command, env={"PYTHONPATH": str(root)}, capture_output=True, text=True)
        return done, json.loads(out.read_text()) if out.exists() else None

    return run


NUMBERS = ("seconds", "images_per_second", "ratio", "flops_per_second", "memory_bytes", "peak_flops", "mfu")


@pytest.mark.parametrize(
    ("what", "tasks", "models"),
    [("encoder", ["forward", "fwd+bwd"], ["ours", "transformers", "timm"]), ("train", ["train step"], ["ours"])],
)
def test_table_and_json(run, what, tasks, models):
    if what == "encoder":
        pytest.importorskip("transformers")
        pytest.importorskip("timm")
    done, report = run(what, "--size", "tiny", "--device", "cpu")
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
    done, report = run("encoder", "--size", "giant")
    assert done.returncode == 1 and report is None
    assert done.stderr.count("\n") == 1 and "giant" in done.stderr and "base, large" in done.stderr


@pytest.mark.parametrize("maker", ["ours", "transformers", "timm"])
def test_encoders_do_the_same_work(benchmark, maker):
    """torch's own counter of operations sees exactly those of our configuration."""
    if maker != "ours":
        pytest.importorskip(maker)
    model, forward = getattr(benchmark, maker)(benchmark.TINY)
    model.requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        features = forward(torch.randn(1, 3, 224, 224))
    assert counter.get_total_flops() == encoder_flops(benchmark.TINY)
    assert features.shape == (1, benchmark.TINY.num_patches, benchmark.TINY.width)
    attention = getattr(model.config, "_attn_implementation", None) if maker == "transformers" else "sdpa"
    assert attention == "sdpa"


def test_encoders_of_another_shape_are_refused(benchmark, monkeypatch):
    arguments = argparse.Namespace(batch=1, device="cpu", compile=False)
    larger = benchmark.replace(benchmark.TINY, depth=3)
    ours = benchmark.ours
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: name == "timm")

    def timm(config):
        return ours(larger)

    monkeypatch.setattr(benchmark, "timm", timm)
    with pytest.raises(ValueError, match=r"differ.*'ours'.*'timm'"):
        benchmark.encoder_subjects(benchmark.TINY, "fp32", False, arguments)


def test_turns_and_ratios(benchmark, monkeypatch):
    """Three subjects whose passes take known times, the slow one twice as long in the last round."""
    clock = {"ours": [9, 9, 2.0, 4.0, 2.0], "slow": [9, 9, 4.0, 4.0, 8.0], "fast": [9, 9, 1.0, 1.0, 1.0]}
    left = {name: iter(times) for name, times in clock.items()}
    order = []

    def seconds_of(run, device):
        order.append(run())
        return next(left[order[-1]])

    monkeypatch.setattr(benchmark, "seconds_of", seconds_of)
    monkeypatch.setattr(benchmark, "memory", lambda subject, device: 7)
    subjects = {name: benchmark.Subject(run=lambda name=name: name, tensors=list) for name in clock}
    arguments = argparse.Namespace(device="cpu", rounds=3, batch=6)
    ours, slow, fast = benchmark.measure("forward", "fp32", subjects, 10.0, arguments)

    rounds = [order[i : i + 3] for i in range(0, len(order), 3)]
    assert len(rounds) == benchmark.WARM_UP + 3 and all(sorted(r) == sorted(clock) for r in rounds)
    assert {r[0] for r in rounds[2:]} == set(clock)  # each begins once
    assert ours["rounds"] == [2.0, 4.0, 2.0] and ours["seconds"] == 2.0
    assert ours["images_per_second"] == 3.0 and ours["flops_per_second"] == 30.0
    assert (ours["ratio"], slow["ratio"], fast["ratio"]) == (1.0, 2.0, 0.5)  # of 1; of 2, 1, 4; of 1/2, 1/4, 1/2
    assert slow["ratio_quartiles"] == [1.5, 3.0]


def test_memory_is_what_stays_and_the_highest_moment(benchmark):
    def run():
        a = torch.empty(1000)
        b = torch.empty(2000)
        del a
        return torch.empty(500) + b[:500]

    subject = benchmark.Subject(run=run, tensors=lambda: [torch.empty(10)])
    # The sum and its operand come after the first tensor has gone: 2000 + 500 + 500 values are alive at once.
    slack = 256  # bytes: the allocator's own rounding
    assert 0 <= benchmark.memory(subject, torch.device("cpu")) - 4 * (3000 + 10) <= slack
