"""The training loop from the outside: the ways to start a run, what it leaves behind, and gradients gone bad."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import ROOT, SCRIPT, arguments, finish, free_port, nothing, start, train

from aimv2.config import from_json, load_config, to_json
from aimv2.logger import TIMINGS
from aimv2.train import TrainConfig, due

BIN = Path(sys.executable).parent
WAYS = {
    "python": [sys.executable],
    "torchrun": [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "1"],
    "deepspeed": [str(BIN / "deepspeed"), "--master_port", str(free_port())],  # its own default may be taken
}


def run(arguments, tmp_path, *sabotage, ranks=1, seconds=180):
    """Exit codes, and what was said."""
    log = tmp_path / "terminal.log"
    log.unlink(missing_ok=True)
    codes = finish(start(train, arguments, *(sabotage or (nothing,)), ranks=ranks, log=log), seconds)
    return codes, log.read_text()


def metrics(out: Path) -> list[dict]:
    """The training lines of metrics.jsonl, without times."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines if "eval" not in line]


@pytest.fixture
def bare(tmp_path) -> dict[str, str]:
    """The environment of a shell without a compiler, or any program but Python, and without a launcher's variables."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for program in ("python", "python3"):
        (folder / program).symlink_to(sys.executable)
    assert not any(shutil.which(name, path=str(folder)) for name in ("gcc", "g++", "cc", "c++", "ninja", "nvcc"))
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "DS_ACCELERATOR")}
    extensions = str(tmp_path / "extensions")
    return kept | {
        "PATH": str(folder),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "TORCH_EXTENSIONS_DIR": extensions,
    }


# -- Whole runs, as a user starts them ---------------------------------------------------------------------------------


def test_python_torchrun_and_deepspeed_end_with_the_same_weights(bare, tmp_path):
    """From nothing and without a compiler. The first writes the data; the others run at the same time, to save some."""
    said = {}
    for ways in (["python"], ["torchrun", "deepspeed"]):
        begun = {}
        for way in ways:
            command = [*WAYS[way], str(SCRIPT), *arguments(tmp_path / "data", tmp_path / way, "steps=6")]
            begun[way] = subprocess.Popen(
                command, cwd=ROOT, env=bare, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        for way, process in begun.items():
            try:
                said[way] = process.communicate(timeout=300)[0]
            finally:
                process.terminate()
            assert process.returncode == 0, said[way]
    weights = {(tmp_path / way / "export" / "model.safetensors").read_bytes() for way in WAYS}
    assert len(weights) == 1
    assert not (tmp_path / "extensions").exists()  # nothing was compiled

    # What a user reads: it says that it writes the data, then only its own lines.
    written, *bars, indexed = said["python"].splitlines()[: said["python"].splitlines().index("indexed 5 shards") + 1]
    assert written == f"{tmp_path}/data: no data there, so writing 220 images first"
    assert all("image/s" in line or not line for line in bars)
    assert indexed == "indexed 5 shards"
    lines = said["torchrun"].splitlines()
    patterns = [rf"step {n}/6, .*images/s, loss .* left" for n in range(1, 6)]
    patterns += ["step 5 validation: .*", "step 6/6, .*", "step 6 validation: .*", "exported to .*", "drew .*"]
    assert len(lines) == len(patterns), said["torchrun"]
    assert all(re.fullmatch(pattern, line) for pattern, line in zip(patterns, lines, strict=True)), said["torchrun"]

    out = tmp_path / "python"
    assert sorted(path.name for path in out.iterdir()) == [
        *("checkpoints", "config.json", "export", "loss.png", "metrics.jsonl", "predictions.png"),
        *("tensorboard", "train.log"),
    ]
    assert sorted(path.name for path in out.glob("checkpoints/*")) == ["step_00000003", "step_00000006"]
    config = from_json(TrainConfig, json.loads((out / "config.json").read_text()))
    assert config == load_config(*(lambda a: (a[1], a[2:]))(arguments(tmp_path / "data", out, "steps=6")))
    assert [line["step"] for line in metrics(out)] == [1, 2, 3, 4, 5, 6]
    assert set(metrics(out)[0]) == {"step", "loss", "pixel_loss", "caption_loss", "lr", "grad_norm"}
    assert "step 6 validation" in (out / "train.log").read_text()


@pytest.mark.slow
def test_time_to_the_first_step(tiny_data, bare, tmp_path, record_property, capsys):
    """Of `python scripts/train_aimv2.py`, without a compiler. It depends on the machine, so it is only printed."""
    command = [*WAYS["python"], str(SCRIPT), *arguments(tiny_data, tmp_path / "run")]
    begun = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, env=bare, stderr=subprocess.PIPE, text=True)
    times = [time.monotonic() - begun for line in process.stderr if line.startswith("step 1/")]
    assert process.wait() == 0
    record_property("seconds to the first step", times[0])
    with capsys.disabled():
        sys.stdout.write(f"\nfirst step {times[0]:.1f} s after the start\n")


# -- The loop ----------------------------------------------------------------------------------------------------------


def test_due():
    assert [step for step in range(1, 11) if due(step, 4, 10)] == [4, 8, 10]
    assert [step for step in range(1, 11) if due(step, 0, 10)] == [10]


@pytest.mark.parametrize(("ranks", "micro"), [(1, 2), (2, 2), (2, 4)])
def test_accumulation_and_ranks_change_nothing(tiny_run, tmp_path, ranks, micro):
    """8 images at once, 4 x 2, 2 ranks x 2 x 2 and 2 ranks x 4: the same losses."""
    changes = "engine.batch_size=8", "optim.peak_lr=0.001"
    for name, count, size in (("whole", 1, 8), ("split", ranks, micro)):
        command = tiny_run(tmp_path / name, *changes, f"engine.micro_batch={size}")
        codes, said = run(command, tmp_path, ranks=count)
        assert codes == [0] * count, said
    for whole, split in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "split"), strict=True):
        # fp32 sums in another order differ by 1e-7 of their size, a little more with each step of Adam.
        assert split == {name: pytest.approx(value, rel=1e-5) for name, value in whole.items()}


MEMORY = {
    "checkpointing": (["objective.vision.checkpointing=true", "objective.decoder.checkpointing=true"], 0),
    "offload": (["engine.offload=true"], 1e-5),  # the optimizer's sums are in another order
}


def test_saving_memory_changes_nothing(tiny_run, tmp_path):
    """Recomputed activations give the same numbers bit for bit; an optimizer in CPU memory all but does."""
    for name, (changes, _) in {"plain": ([], 0), **MEMORY}.items():
        codes, said = run(tiny_run(tmp_path / name, "engine.precision=bf16", "steps=5", *changes), tmp_path)
        assert codes == [0], said
    plain = metrics(tmp_path / "plain")
    for name, (_, tolerance) in MEMORY.items():
        for expected, line in zip(plain, metrics(tmp_path / name), strict=True):
            assert line == {key: pytest.approx(value, rel=tolerance, abs=0) for key, value in expected.items()}


@pytest.mark.slow
def test_compiled(tiny_run, tmp_path):
    """torch.compile (which needs a compiler on a CPU) changes the speed only."""
    changes = "data.pad_text_to_context=true", "steps=3", "optim.peak_lr=0.001"
    for name in ("false", "true"):
        command = tiny_run(tmp_path / name, *changes, f"engine.compile={name}")
        codes, said = run(command, tmp_path, seconds=500)
        assert codes == [0], said
    for plain, compiled in zip(metrics(tmp_path / "false"), metrics(tmp_path / "true"), strict=True):
        assert compiled == {name: pytest.approx(value, rel=1e-4) for name, value in plain.items()}  # fused kernels


def spoil_gradients(steps):
    """A gradient of NaN on the last rank in these steps, from one of its micro-batches."""
    from aimv2.logger import Logger
    from aimv2.objectives.aimv2 import AIMv2

    if os.environ["RANK"] != str(int(os.environ["WORLD_SIZE"]) - 1):
        return
    forward, step, done = AIMv2.forward, Logger.step, [0]

    def spoiled(self, batch, counts):
        losses = forward(self, batch, counts)
        bad = self.training and done[0] + 1 in steps
        return {name: loss * float("nan") if bad else loss for name, loss in losses.items()}

    def count(self, step_number, **scalars):
        done[0] = step_number
        step(self, step_number, **scalars)

    AIMv2.forward, Logger.step = spoiled, count


def test_a_bad_gradient_is_skipped_and_counted(tiny_run, tmp_path):
    """On one of two ranks, in steps 3 and 7 of 10."""
    out = tmp_path / "run"
    codes, said = run(tiny_run(out, "log_every=2"), tmp_path, spoil_gradients, (3, 7), ranks=2)
    assert codes == [0, 0], said
    assert [line.get("skipped") for line in metrics(out)] == [None, 1, 1, 2, 2]
    assert all(line["loss"] is not None for line in metrics(out))  # the mean of the steps that were taken
    assert "step 3 skipped, its gradient is not finite; this rank's samples: [16, 17, 18, 19]" in said
    assert "rank 1: step 3 skipped, its gradient is not finite; this rank's samples: [20, 21, 22, 23]" in said


def test_five_bad_gradients_in_a_row_end_the_run(tiny_run, tmp_path):
    out = tmp_path / "run"
    codes, said = run(tiny_run(out), tmp_path, spoil_gradients, range(4, 11))
    assert codes == [1]
    assert said.splitlines()[-1] == "error: 5 steps in a row, up to 8, had no finite gradient"
    assert "CRITICAL ended by TrainingError: 5 steps in a row" in (out / "train.log").read_text()
    assert [line["step"] for line in metrics(out)] == [*range(1, 8)]
    assert sorted(path.name for path in out.glob("checkpoints/*")) == ["step_00000003", "step_00000006"]


def break_pictures():
    import aimv2.train

    def draw_run(*args, **kwargs):
        raise OSError("no font")

    aimv2.train.draw_run = draw_run


def test_a_run_outlives_its_pictures(tiny_run, tmp_path):
    """The model is exported and the run has ended well; what failed is said with its traceback."""
    out = tmp_path / "run"
    codes, said = run(tiny_run(out, "steps=1"), tmp_path, break_pictures)
    assert codes == [0], said
    assert f"no pictures; once it is mended, scripts/show_predictions.py {out} draws them\nTraceback " in said
    assert (out / "export" / "model.safetensors").exists()
    assert "OSError: no font" in (out / "train.log").read_text()


def test_config_of_a_run_survives_json(tiny_run, tmp_path):
    _, path, *changes = tiny_run(tmp_path)
    config = load_config(path, changes)
    assert from_json(TrainConfig, json.loads(json.dumps(to_json(config)))) == config
