"""Each mistake of a user ends the run with exit status 1 and one line that names the value and what was expected."""

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ROOT, SCRIPT, TINY_RUN, finish, nothing, start, train

from aimv2.config import load_config
from aimv2.data.shapes import captions, scene
from aimv2.data.tokenizer import Tokenizer, train_tokenizer
from aimv2.exports import export_model
from aimv2.preprocessing import ProcessorConfig


def run(arguments, tmp_path, ranks=1, sabotage=nothing):
    """Exit codes, and the lines on the terminal but for those of torch's C++, which misses a rank that ended first."""
    log = tmp_path / "terminal.log"
    log.unlink(missing_ok=True)
    codes = finish(start(train, arguments, sabotage, ranks=ranks, log=log), seconds=60)
    return codes, [line for line in log.read_text().splitlines() if not re.match(r"\[[EWI]\d{4} ", line)]


MISTAKES = {
    "unknown key": (["optim.peaklr=1"], "unknown key optim.peaklr: did you mean optim.peak_lr?"),
    "wrong type": (["steps=ten"], "steps: expected int, got 'ten'"),
    "wrong choice": (["engine.zero_stage=0"], "engine.zero_stage: expected 1 | 2 | 3, got '0'"),
    "no steps": (["steps=0"], "steps 0: expected 1 or more"),
    "one checkpoint": (["keep=1"], "keep 1: expected 2 or more"),
    "no images": (["engine.micro_batch=0"], "engine: micro_batch 0: expected 1 or more"),
    "patch": (["objective.vision.image_size=50"], "objective.vision: image_size 50 is not a multiple of patch_size 16"),
    "positions": (
        ["data.transform.image_size=64"],
        "data.transform.image_size 64 is not objective.vision.image_size 48, which the positions are made for",
    ),
    "context": (["data.context_length=40"], "data.context_length 40 is more than objective.decoder.context_length 32"),
    "batch": (
        ["engine.batch_size=10"],
        "engine.batch_size 10 is not a multiple of engine.micro_batch 4 x 1 ranks",
    ),
    "no shard": (["data.train.0.shards=nowhere/train-*.tar"], "nowhere/train-*.tar: no .tar file matches"),
    "one shard of a range": (["data.train.0.shards=nowhere/{00..03}.tar"], "nowhere/00.tar: no such file"),
    "other data": (["data.made_by.train=300"], "train = 200, the recipe says 300"),
    "no tokenizer": (["data.tokenizer=tokenizers/klingon"], "no tokenizer at tokenizers/klingon: expected"),
    "vocabulary": (
        ["objective.decoder.vocab_size=100"],
        "data.tokenizer tokenizers/shapes has 128 pieces, but the objective's vocab_size is 100",
    ),
    "validation": (
        ["data.validation=none"],
        "data.validation is None, but evals need it: expected a source, or no evals",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake(tiny_run, tmp_path, mistake):
    changes, words = MISTAKES[mistake]
    codes, lines = run(tiny_run(tmp_path / "run", *changes), tmp_path)
    assert codes == [1]
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    assert words in lines[0]


@pytest.mark.parametrize("mistake", ["batch", "no shard"])
def test_mistake_on_two_ranks(tiny_run, tmp_path, mistake):
    """No rank hangs. The others let rank 0 speak, and would be ended by a launcher meanwhile."""
    changes, words = MISTAKES[mistake]
    codes, lines = run(tiny_run(tmp_path / "run", *changes), tmp_path, ranks=2)
    assert codes == [1, 1]
    assert [line.partition(":")[0] for line in lines] == ["error", "error on rank 1"]
    assert words.replace("1 ranks", "2 ranks") in lines[0]


@pytest.mark.slow
def test_mistake_under_torchrun(tiny_run, tmp_path):
    """Our line comes first, whatever the launcher adds. On a slow machine a second rank may still repeat it."""
    changes, words = MISTAKES["no tokenizer"]
    command = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *tiny_run(tmp_path / "run", *changes)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert lines[0].startswith("error"), done.stderr
    assert all(words in line for line in lines if line.startswith("error")), done.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "does not exist"),
        ("def config(:", "line 1"),
        ("configuration = 1", "config"),
        ("def config():\n    return 1", "expected a dataclass instance"),
    ],
)
def test_config_file(tmp_path, text, words):
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_text(text)
    codes, lines = run(["--config", str(path)], tmp_path)
    assert codes == [1]
    assert len(lines) == 1 and lines[0].startswith("error: ") and str(path) in lines[0], lines
    assert words in lines[0].lower()


# -- After pre-training ------------------------------------------------------------------------------------------------

NATIVE, DISTILLED, LIT = (Path(__file__).with_name(f"tiny_{name}.py") for name in ("native", "distilled", "lit"))
ON_A_MODEL = {  # EXPORT is one of the tiny run's model, COARSE one of larger patches
    "learned positions in a native run": (
        NATIVE,
        ["init_from.source=EXPORT", "init_from.positions=interpolate"],
        "has learned positions, for 48 px, but the run's are fixed ('sincos'): init_from.positions=replace drops",
    ),
    "a locked tower of new positions": (
        LIT,
        ["init_from.source=EXPORT", "init_from.positions=replace"],
        "init_from.positions=replace: a locked tower would never learn the new ones",
    ),
    "images normalised otherwise": (
        LIT,
        ["init_from.source=EXPORT", "data.transform.mean=[0.5,0.5,0.5]"],
        "expected data.transform.mean=[0.485,0.456,0.406] data.transform.std=[0.229,0.224,0.225]",
    ),
    "no tower": (LIT, ["init_from=none"], "trains on top of a trained image tower: expected init_from.source"),
    "a run's folder": (LIT, ["init_from.source=RUN"], "RUN: expected model.safetensors"),
    "text": (
        LIT,
        ["init_from.source=EXPORT", "objective.model.text.context_length=20"],
        "data.context_length 32 is more than objective.model.text.context_length 20",
    ),
    "a teacher's patches": (
        DISTILLED,
        [
            "objective.teacher=COARSE",
            "objective.features=prefix",
            "objective.teacher_image_size=48",
            "data.transform.image_size=48",
        ],
        "sees 2x2 patches in 48 px, the student 3x3, but objective.features=prefix compares them one by one",
    ),
    "no teacher": (DISTILLED, ["objective.teacher=/nowhere"], "/nowhere: no such file or folder"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """Placeholder -> folder."""
    out = tmp_path_factory.mktemp("models")
    for name, patch_size in (("EXPORT", 16), ("COARSE", 24)):
        config = load_config(TINY_RUN, [f"objective.vision.patch_size={patch_size}"])
        processing = ProcessorConfig.of_training(config.data, 48, patch_size)
        model = config.objective.build()
        tokenizer = ROOT / "tokenizers" / "shapes"
        export_model(model, out / name / "export", config=model.config, processing=processing, tokenizer=tokenizer)
    return {"EXPORT": f"{out}/EXPORT/export", "COARSE": f"{out}/COARSE/export", "RUN": f"{out}/EXPORT"}


@pytest.mark.parametrize(
    ("mistake", "ranks"), [*((mistake, 1) for mistake in ON_A_MODEL), ("learned positions in a native run", 2)]
)
def test_mistake_on_a_model(tiny_run, models, tmp_path, mistake, ranks):
    config, changes, words = ON_A_MODEL[mistake]
    for placeholder, folder in models.items():
        changes = [change.replace(placeholder, folder) for change in changes]
        words = words.replace(placeholder, folder)
    codes, lines = run(tiny_run(tmp_path / "run", *changes, config=config), tmp_path, ranks=ranks)
    assert codes == [1] * ranks
    assert len(lines) == ranks and lines[0].startswith("error: "), lines
    assert words in lines[0]
    assert not (tmp_path / "run").exists()


# -- Going on from what does not fit -----------------------------------------------------------------------------------


@pytest.fixture
def begun(tiny_run, tmp_path):
    """The folder of a run of one step with a tokenizer of its own."""
    shutil.copytree(ROOT / "tokenizers" / "shapes", tmp_path / "tokenizer")
    codes, lines = run(tiny_run(tmp_path / "run", "steps=1", f"data.tokenizer={tmp_path}/tokenizer"), tmp_path)
    assert codes == [0], lines
    return tmp_path


def test_folder_of_another_run(tiny_run, tmp_path, begun):
    codes, lines = run(tiny_run(begun / "run", "seed=1", f"data.tokenizer={begun}/tokenizer"), tmp_path)
    assert codes == [1]
    assert lines == [f"error: {begun}/run is the folder of another run: seed: saved 0, now 1"]


def test_another_number_of_ranks(tiny_run, tmp_path, begun):
    codes, lines = run(tiny_run(begun / "run", f"data.tokenizer={begun}/tokenizer"), tmp_path, ranks=2)
    assert codes == [1, 1]
    assert lines[0].startswith("error: step_00000001 was written by 1 ranks and this run has 2: ")
    assert [line.partition(":")[0] for line in lines] == ["error", "error on rank 1"]


def test_another_tokenizer_than_the_checkpoint_s(tiny_run, tmp_path, begun):
    """The path is the same, and so is the number of pieces: only its contents tell."""
    texts = [caption for index in range(300) for caption in captions(scene(0, "test", index, "full"))]
    path = begun / "tokenizer"
    train_tokenizer(texts, path, 128, source="a test", licence="Apache-2.0", model_type="bpe", force=True)
    assert Tokenizer(path).vocab_size == 128
    codes, lines = run(tiny_run(begun / "run", f"data.tokenizer={path}"), tmp_path)
    assert codes == [1]
    assert len(lines) == 1
    assert lines[0].startswith("error: step_00000001: the tokenizer changed: saved ")


def test_a_run_that_came_to_nothing_gives_up_its_folder(tiny_run, tmp_path):
    out = tmp_path / "run"
    assert run(tiny_run(out, "data.train.0.shards=nowhere/*.tar"), tmp_path)[0] == [1]
    codes, lines = run(tiny_run(out, "steps=1"), tmp_path)
    assert codes == [0], lines


# -- A rank that fails alone -------------------------------------------------------------------------------------------


def take_port():
    """What this process was told to meet the others at is in use: a launcher's default, with two runs on a machine."""
    socket.create_server(("127.0.0.1", int(os.environ["MASTER_PORT"]))).detach()


def test_port_in_use(tiny_run, tmp_path):
    codes, lines = run(tiny_run(tmp_path / "run"), tmp_path, sabotage=take_port)
    assert codes == [1]
    lines = [line for line in lines if line.startswith("error")]
    assert re.match(r"error: the ranks can't meet at 127\.0\.0\.1:\d+, a port that must be free for this run", lines[0])


def one_rank_has_no_tokenizer():
    import aimv2.train

    def load_tokenizer(config):
        raise FileNotFoundError("no tokenizer on this node")

    if os.environ["RANK"] == "1":
        aimv2.train.load_tokenizer = load_tokenizer


def test_one_rank_fails(tiny_run, tmp_path):
    """The other one waits for it in vain, and says so instead of hanging."""
    codes, lines = run(tiny_run(tmp_path / "run"), tmp_path, ranks=2, sabotage=one_rank_has_no_tokenizer)
    assert codes == [1, 1]
    assert sorted(lines) == [
        "error on rank 1: no tokenizer on this node",
        "error: another rank ended or hangs; look for its own error",
    ]


OWN_DATA = """
import os
from aimv2.config import load_config


def config():
    run = load_config({tiny_run!r})
    run.seed = int(os.environ["RANK"])
    return run
"""


def test_ranks_that_differ(tiny_run, tmp_path):
    """Each with its own data or settings they would train together, and nothing would look wrong."""
    (tmp_path / "own.py").write_text(OWN_DATA.format(tiny_run=str(TINY_RUN)))
    arguments = ["--config", str(tmp_path / "own.py"), *tiny_run(tmp_path / "run")[2:]]
    codes, lines = run(arguments, tmp_path, ranks=2)
    assert codes == [1, 1]
    assert lines[0] == "error: rank 1 has another config than rank 0: expected the same on all"
