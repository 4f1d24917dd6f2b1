"""What comes after pre-training runs in the same loop: native resolution, distillation and LiT, each from an export.

Each must end, killed and started again, as if nothing had happened: frozen weights are in no checkpoint, teachers are
read again and other sources aren't, and native micro-batches differ in their number of samples.
"""

import itertools
import json
import os
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from processes import finish, nothing, start, train
from safetensors.torch import load_file, save_file
from test_resume import killed_after_step, record

ROOT = Path(__file__).parent
STAGES = {  # the run, and the setting that names what it starts from
    "native": (ROOT / "tiny_native.py", "init_from.source"),
    "distilled": (ROOT / "tiny_distilled.py", "objective.teacher"),
    "lit": (ROOT / "tiny_lit.py", "init_from.source"),
}
MATRIX = list(itertools.product(STAGES, (1, 2, 3), (1, 2), ("fp32", "bf16")))
QUICK = [("native", 1, 2, "fp32"), ("distilled", 1, 1, "bf16"), ("lit", 1, 2, "fp32")]


def run(command, tmp_path, *sabotage, ranks=1):
    log = tmp_path / "terminal.log"
    log.unlink(missing_ok=True)
    codes = finish(start(train, command, *(sabotage or (nothing,)), ranks=ranks, log=log))
    return codes, log.read_text()


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "export" / "model.safetensors")


@pytest.fixture(scope="module")
def source(tiny_run, tmp_path_factory) -> Path:
    """The export of a run of two steps."""
    out = tmp_path_factory.mktemp("source")
    codes, said = run(tiny_run(out, "steps=2", "evals=[]"), out)
    assert codes == [0], said
    return out / "export"


@pytest.fixture
def stage(tiny_run, source):
    def command(name: str, out: Path, *changes: str) -> list[str]:
        config, key = STAGES[name]
        return tiny_run(out, f"{key}={source}", *changes, config=config)

    return command


@pytest.mark.parametrize(
    ("name", "zero", "ranks", "precision"),
    [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in MATRIX],
)
def test_killed(stage, tmp_path, name, zero, ranks, precision):
    settings = f"engine.zero_stage={zero}", f"engine.precision={precision}"
    codes, said = run(stage(name, tmp_path / "whole", *settings), tmp_path, ranks=ranks)
    assert codes == [0] * ranks, said
    expected = record(tmp_path / "whole")
    losses = [line["loss"] for line in expected[0] if "eval" not in line]
    assert len(losses) == 10
    assert losses[-1] < losses[0]

    command = stage(name, tmp_path / "run", *settings)
    step = random.Random(f"{name} {zero} {ranks} {precision}").randint(4, 8)
    codes, said = run(command, tmp_path, killed_after_step, step, 0.0, ranks=ranks)
    assert codes[0] == -signal.SIGKILL, said
    codes, said = run(command, tmp_path, ranks=ranks)
    assert codes == [0] * ranks, said
    assert "going on from" in said
    assert record(tmp_path / "run") == expected


@pytest.mark.parametrize("name", ["native", "lit"])
def test_ranks_share_one_order_of_samples_and_one_gradient(stage, tmp_path, name):
    """fp32 sums in another order: 1e-3 of a loss after ten steps of Adam, which makes much of small gradients."""
    ends = []
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        codes, said = run(stage(name, out, "evals=[]"), tmp_path, ranks=ranks)
        assert codes == [0] * ranks, said
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        state = json.loads(next(out.glob("checkpoints/step_00000010/MANIFEST.json")).read_text())["state"]
        ends.append(([line["loss"] for line in lines], state["sample"]))
    assert ends[0][1] == ends[1][1]
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_locked_tower_is_exported_as_it_came(stage, source, tmp_path, precision):
    """To the bit, whatever it ran in."""
    codes, said = run(stage("lit", tmp_path / "run", "steps=2", f"engine.precision={precision}"), tmp_path)
    assert codes == [0], said
    before, after = load_file(source / "model.safetensors"), weights(tmp_path / "run")
    tower = [name for name in before if name.startswith("encoder.")]
    assert tower
    assert all(torch.equal(before[name], after[name]) for name in tower)


def test_a_teacher_leaves_no_trace(stage, source, tmp_path):
    codes, said = run(stage("distilled", tmp_path / "run", "steps=3"), tmp_path)
    assert codes == [0], said
    assert weights(tmp_path / "run").keys() == load_file(source / "model.safetensors").keys()


@pytest.mark.parametrize(("name", "key"), [("lit", "init_from"), ("distilled", "teacher")])
def test_another_source_is_another_run(stage, source, tmp_path, name, key):
    """What was frozen isn't in the checkpoint: one that changed meanwhile must not be taken for the old one."""
    frozen = tmp_path / "frozen"
    shutil.copytree(source, frozen)
    command = stage(name, tmp_path / "run", f"{STAGES[name][1]}={frozen}")
    codes, said = run([*command, "steps=3"], tmp_path)
    assert codes == [0], said
    changed = load_file(frozen / "model.safetensors")
    changed["encoder.patch_embed.bias"] += 1
    save_file(changed, frozen / "model.safetensors")
    codes, said = run(command, tmp_path)
    assert codes == [1]
    assert f"the {key} changed" in said


def test_a_source_that_is_gone(stage, source, tmp_path):
    """A checkpoint has all weights where none are frozen: a run goes on without what it began with."""
    moved = tmp_path / "moved"
    shutil.copytree(source, moved)
    command = stage("native", tmp_path / "run", f"init_from.source={moved}", "evals=[]")
    codes, said = run([*command, "steps=3"], tmp_path)
    assert codes == [0], said
    assert f"starting from the encoder and decoder of {moved}" in said
    shutil.rmtree(moved)
    codes, said = run([*command, "steps=6"], tmp_path)
    assert codes == [0], said
    assert "going on from" in said and "starting from" not in said
    manifests = [out / "MANIFEST.json" for out in sorted((tmp_path / "run" / "checkpoints").glob("step_*"))]
    assert [json.loads(path.read_text())["state"]["step"] for path in manifests] == [3, 6]
    assert len({json.loads(path.read_text())["fingerprints"]["init_from"] for path in manifests}) == 1


def only_rank_zero_reads():
    import aimv2.preparation

    def load_initial(*args, **kwargs):
        raise AssertionError("another rank than 0 read the source")

    if os.environ["RANK"] != "0":
        aimv2.preparation.load_initial = load_initial


@pytest.mark.parametrize(
    ("name", "zero"),
    [("lit", 3), *(pytest.param("lit", zero, marks=pytest.mark.slow) for zero in (1, 2))],
)
def test_rank_zero_reads_for_all(stage, source, tmp_path, name, zero):
    """The others get the weights from it, frozen ones too: the losses are those of a single rank."""
    losses = []
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        command = stage(name, out, "evals=[]", "steps=2", f"engine.zero_stage={zero}")
        codes, said = run(command, tmp_path, only_rank_zero_reads, ranks=ranks)
        assert codes == [0] * ranks, said
        losses.append([json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def one_rank_has_no_teacher():
    import aimv2.objectives.distill
    from aimv2.weights import ModelError

    def fingerprint(checkpoint):
        raise ModelError("not mounted here")

    if os.environ["RANK"] == "1":
        aimv2.objectives.distill.fingerprint = fingerprint


def test_one_rank_has_no_teacher(stage, tmp_path):
    """It ends at once, and says why on rank 0, which is heard."""
    codes, said = run(stage("distilled", tmp_path / "run"), tmp_path, one_rank_has_no_teacher, ranks=2)
    assert codes == [1, 1]
    assert said.splitlines()[-2:] == ["error: rank 1: not mounted here", "error on rank 1: not mounted here"]


def test_sources_are_opened_before_anything_is_written(stage, tmp_path):
    """Writing or indexing data may take hours."""
    for name in STAGES:
        data, out = tmp_path / f"{name}_data", tmp_path / name
        place = f"data.made_by.folder={data}", f"data.train.0.shards={data}/train-*.tar"
        codes, said = run(stage(name, out, f"{STAGES[name][1]}={tmp_path}/nowhere", *place), tmp_path)
        assert codes == [1]
        assert said.splitlines() == [f"error: {tmp_path}/nowhere: no such file or folder"]
        assert not data.exists() and not out.exists()
