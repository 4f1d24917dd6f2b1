"""A run that is killed at any moment, and started again by the same command, ends as if nothing had happened.

The whole matrix of ZeRO stages, ranks and precisions is `slow`; the rest is a sample of it.
"""

import hashlib
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
from processes import TINY_RUN, finish, nothing, start, train

from aimv2.logger import TIMINGS

STEPS = 10


def run(arguments, tmp_path, *sabotage, ranks=1):
    """Exit codes, and what was said."""
    log = tmp_path / "terminal.log"
    log.unlink(missing_ok=True)
    codes = finish(start(train, arguments, *(sabotage or (nothing,)), ranks=ranks, log=log))
    return codes, log.read_text()


def record(out: Path):
    """All that must not depend on interruptions: every logged number but times, and the exported weights."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    metrics = [{name: value for name, value in line.items() if name not in TIMINGS} for line in lines]
    return metrics, hashlib.sha256((out / "export" / "model.safetensors").read_bytes()).hexdigest()


def settings(zero, precision):
    return f"engine.zero_stage={zero}", f"engine.precision={precision}"


@pytest.fixture(scope="module")
def undisturbed(tiny_run, tmp_path_factory):
    """(ZeRO stage, ranks, precision) -> the record of a run that nobody kills; each is made once."""
    records = {}

    def get(zero, ranks, precision):
        key = zero, ranks, precision
        if key not in records:
            out = tmp_path_factory.mktemp("undisturbed")
            codes, said = run(tiny_run(out, *settings(zero, precision)), out, ranks=ranks)
            assert codes == [0] * ranks, said
            records[key] = record(out)
            assert [line["step"] for line in records[key][0] if "eval" not in line] == [*range(1, STEPS + 1)]
        return records[key]

    return get


# -- Ways to disturb a run, in its own processes ----------------------------------------------------------------------


def at_step(number, action):
    """Make every rank call `action` right after that step."""
    from aimv2.logger import Logger

    whole = Logger.step

    def step(self, step, **scalars):
        whole(self, step, **scalars)
        if step == number:
            action()

    Logger.step = step


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def killed_after_step(number, seconds):
    """Each rank names its workers; `seconds` later it is gone, wherever it is then."""

    def action():
        print("workers", *(child.pid for child in multiprocessing.active_children()), flush=True)
        threading.Timer(seconds, die).start()

    at_step(number, action)


def killed_inside_save(number, moment):
    """Rank 0 dies in the middle of its `number`-th save: "before manifest" or "after manifest"."""
    from aimv2 import manifest

    whole, saves = manifest.write, []

    def write(*args, **kwargs):
        saves.append(1)
        if len(saves) == number and moment == "before manifest":
            die()
        whole(*args, **kwargs)
        if len(saves) == number and moment == "after manifest":
            die()

    manifest.write = write


def told_to_stop(number, rank, numbers, pause):
    """One rank gets these signals, so many seconds apart."""

    def tell():
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(pause)

    def action():
        if os.environ["RANK"] == str(rank):
            threading.Thread(target=tell).start()
            time.sleep(0.05)  # so that the first is seen in this step

    at_step(number, action)


def told_to_stop_in_a_long_save(number, twice):
    from aimv2 import manifest

    manifest.write = lambda *args, **kwargs: time.sleep(60)
    told_to_stop(number, 0, [twice, twice], 2.0)


# -- The tests ---------------------------------------------------------------------------------------------------------

MATRIX = itertools.product((1, 2, 3), (1, 2), ("fp32", "bf16"), ("at random", "before manifest", "after manifest"))
QUICK = [
    (1, 2, "fp32", "at random"),
    (1, 2, "fp32", "before manifest"),
    (3, 1, "bf16", "at random"),
    (3, 1, "bf16", "after manifest"),
]


@pytest.mark.parametrize(
    ("zero", "ranks", "precision", "moment"),
    [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in MATRIX],
)
def test_killed(tiny_run, tmp_path, undisturbed, zero, ranks, precision, moment):
    expected = undisturbed(zero, ranks, precision)
    command = tiny_run(tmp_path / "run", *settings(zero, precision))
    if moment == "at random":
        dice = random.Random(f"{zero} {ranks} {precision}")
        step = dice.randint(1, 7)
        sabotage = killed_after_step, step, dice.random() / 20
    else:
        sabotage = killed_inside_save, 2, moment
    codes, said = run(command, tmp_path, *sabotage, ranks=ranks)
    assert codes[0] == -signal.SIGKILL, said
    assert 0 not in codes, said  # the other rank was killed, too, or ended when it lost the first
    assert not (tmp_path / "run" / "export").exists()
    saved = sorted(path.name for path in tmp_path.glob("run/checkpoints/step_*"))
    assert moment == "at random" or saved == ["step_00000003"]

    codes, said = run(command, tmp_path, ranks=ranks)
    assert codes == [0] * ranks, said
    begins = [line for line in said.splitlines() if line.startswith("going on from")]
    assert begins == [f"going on from {tmp_path}/run/checkpoints/{name}" for name in saved[-1:]]
    assert record(tmp_path / "run") == expected


def test_workers_do_not_outlive_a_killed_run(tiny_run, tmp_path):
    codes, said = run(tiny_run(tmp_path / "run", "data.workers=2"), tmp_path, killed_after_step, 2, 0.0)
    assert codes == [-signal.SIGKILL]
    workers = next(line for line in said.splitlines() if line.startswith("workers")).split()[1:]
    assert len(workers) == 2
    deadline = time.monotonic() + 30
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, workers))  # they look for their parent every 5 s


def alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_told_to_stop(tiny_run, tmp_path, undisturbed):
    """SIGTERM to one of two ranks: both save and end well, and the same command ends as if nothing had happened."""
    command = tiny_run(tmp_path / "run")
    codes, said = run(command, tmp_path, told_to_stop, 4, 1, [signal.SIGTERM], 0, ranks=2)
    assert codes == [0, 0], said
    assert said.splitlines()[-1] == "told to stop after step 4; the same command goes on from the last checkpoint"
    assert (tmp_path / "run" / "checkpoints" / "step_00000004").is_dir()
    assert not (tmp_path / "run" / "export").exists()

    codes, said = run([*command, "data.workers=0"], tmp_path, ranks=2)  # which may change
    assert codes == [0, 0], said
    assert record(tmp_path / "run") == undisturbed(1, 2, "fp32")


def test_told_twice_at_once(tiny_run, tmp_path):
    """What Ctrl-C is under a launcher."""
    signals = [signal.SIGINT, signal.SIGINT, signal.SIGTERM]
    codes, said = run(tiny_run(tmp_path / "run"), tmp_path, told_to_stop, 4, 0, signals, 0.1)
    assert codes == [0], said
    assert (tmp_path / "run" / "checkpoints" / "step_00000004").is_dir()


def test_told_again(tiny_run, tmp_path):
    """The first signal waits for a save that takes long; the second one does not."""
    command = tiny_run(tmp_path / "run")
    codes, said = run(command, tmp_path, told_to_stop_in_a_long_save, 2, signal.SIGTERM)
    assert codes == [-signal.SIGTERM], said
    assert not list(tmp_path.glob("run/checkpoints/step_*"))


def test_the_command_of_a_finished_run(tiny_run, tmp_path, undisturbed):
    """Started again it changes nothing; with more steps it goes on."""
    command = tiny_run(tmp_path / "run", *settings(1, "fp32"), "steps=6")
    assert run(command, tmp_path)[0] == [0]
    before = record(tmp_path / "run")
    assert run(command, tmp_path)[0] == [0]
    assert record(tmp_path / "run") == before

    assert run([*command, "steps=8"], tmp_path)[0] == [0]
    metrics, _ = record(tmp_path / "run")
    assert [line["step"] for line in metrics if "eval" not in line] == [*range(1, 9)]


TWO_SOURCES = """
from aimv2.config import load_config
from aimv2.data.mixture import MixtureChange, Source


def config():
    run = load_config({tiny_run!r})
    run.data.train = [Source(name="a", shards="a.tar", weight=0.75), Source(name="b", shards="b.tar", weight=0.25)]
    run.data.changes, run.evals = {changes}, []
    return run
"""


def test_a_mixture_that_changes_in_mid_run(tiny_run, tiny_data, tmp_path):
    """A change after the checkpoint gives the run that had it from the start; one before it is refused."""

    def go_on(out, changes):
        path = tmp_path / "config.py"
        path.write_text(TWO_SOURCES.format(tiny_run=str(TINY_RUN), changes=changes))
        _, _, *changed = tiny_run(tmp_path / out, "steps=6")
        shards = sorted(tiny_data.glob("train-*.tar"))
        sources = [f"data.train.{i}.shards={shards[i]}" for i in range(2)]
        return run(["--config", str(path), *changed, *sources], tmp_path)

    change = "[MixtureChange(sample=32, weights={'a': 0.0})]"
    assert go_on("whole", change)[0] == [0]
    assert go_on("run", "[]")[0] == [0]
    unchanged = record(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000006")  # as if killed after step 3, of 24 samples
    codes, said = go_on("run", change.replace("32", "16"))
    assert codes == [1]
    words = "the data.mixture changed: saved from 0: a 0.75, b 0.25, now from 0: a 0.75, b 0.25; from 16: a 0, b 0.25"
    assert words in said
    assert go_on("run", change)[0] == [0]
    assert record(tmp_path / "run") == record(tmp_path / "whole") != unchanged
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["data"]["changes"] == [{"sample": 32, "weights": {"a": 0.0}}]
