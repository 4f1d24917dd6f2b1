"""The scripts of eval/ as a user starts them, on digits and a small export."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
from processes import ROOT, finish, start
from shapes_run import write_shapes
from tiny_models import LIT, V2, random_encoder

from aimv2.exports import export_model
from aimv2.preprocessing import ProcessorConfig
from aimv2.text_encoder import TextConfig

SHORT = {
    "knn": [],
    "attentive_probe": ["--layers", "all", "--set", "epochs=2", "warmup_epochs=1", "lrs=1e-3", "weight_decays=0.1"],
    "linear_probe": ["--select-on", "test", "--set", "steps=3"],
    "zero_shot": [],
}


def script(name: str, arguments: list[str]) -> None:
    """What `python eval/NAME.py ARGUMENTS` does."""
    sys.argv = [name, *arguments]
    sys.path.insert(0, str(ROOT / "eval"))
    runpy.run_path(str(ROOT / "eval" / f"{name}.py"), run_name="__main__")


def run(name: str, *arguments, log: Path, ranks: int = 1) -> tuple[list[int], str]:
    log.unlink(missing_ok=True)
    codes = finish(start(script, name, list(map(str, arguments)), ranks=ranks, log=log))
    return codes, log.read_text()


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """An encoder, and a LiT model with CLIP's vocabulary."""
    folder = tmp_path_factory.mktemp("models")
    processing = ProcessorConfig(image_size=56, patch_size=14, mean=(0.5,) * 3, std=(0.25,) * 3)
    text = TextConfig(width=128, depth=1, heads=1, mlp_hidden=64)
    lit = type(LIT)(vision=V2, text=text, projection=32, pool_heads=2)
    export_model(random_encoder(V2), folder / "encoder", config=V2, processing=processing)
    export_model(lit.build(), folder / "lit", config=lit, processing=processing, tokenizer="clip")
    return {"encoder": folder / "encoder", "lit": folder / "lit"}


@pytest.mark.parametrize("name", SHORT)
def test_each_script_says_and_writes_its_result(name, models, tmp_path):
    model = models["lit" if name == "zero_shot" else "encoder"]
    images = ["--train-images", 60, "--test-images", 40, "--workers", 0]
    asked = ["--encoder", f"aimv2:{model}", "--data", "digits", "--out", tmp_path / "out", *images, *SHORT[name]]
    codes, said = run(name, *asked, log=tmp_path / "log")
    assert codes == [0], said
    (path,) = (tmp_path / "out").glob("*.json")
    result = json.loads(path.read_text())
    top1 = result["metrics"]["top1"]
    assert (top1["n"], top1["chance"]) == (40, 0.1)
    line = f"  {'top1':24} {100 * top1['value']:6.2f} ± {100 * top1['stderr']:.2f}  n 40  chance 10.00"
    assert line in said.splitlines()
    assert len(path.with_suffix(".samples.jsonl").read_text().splitlines()) == 40
    again, said = run(name, *asked, log=tmp_path / "log")
    assert again == [0]
    assert f"{path} is there already" in said


def test_several_encoders_and_datasets_make_a_table(models, tmp_path):
    asked = [
        "--encoder",
        f"aimv2:{models['encoder']}",
        f"random:{models['encoder']}",
        "pixels",
        "--out",
        tmp_path / "out",
    ]
    asked += ["--data", "digits", "faces", "--train-images", 60, "--test-images", 40, "--workers", 0]
    codes, said = run("knn", *asked, "--set", "k=1,5", log=tmp_path / "log")
    assert codes == [0], said
    assert len(list((tmp_path / "out").glob("*.json"))) == 6
    codes, said = run("report", "table", tmp_path / "out", "--out", tmp_path / "report", log=tmp_path / "log")
    assert codes == [0], said
    table = (tmp_path / "report" / "report.md").read_text()
    assert re.search(r"\|.*pixels.*\|", table)
    one, other = sorted((tmp_path / "out").glob("knn-digits-*.json"))[:2]
    codes, said = run("report", "compare", one, other, log=tmp_path / "log")
    assert codes == [0], said


def test_ranks_share_the_work(models, tmp_path):
    asked = ["--encoder", f"aimv2:{models['encoder']}", "--data", "digits", "--train-images", 61, "--test-images", 41]
    asked += ["--workers", 0, "--device", "cpu"]
    for ranks in (1, 2):
        codes, said = run("knn", *asked, "--out", tmp_path / str(ranks), log=tmp_path / "log", ranks=ranks)
        assert codes == [0] * ranks, said
    one, two = (json.loads(next((tmp_path / n).glob("*.json")).read_text()) for n in "12")
    assert one["metrics"] == two["metrics"]
    assert one["hash"] == two["hash"]


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("knn", ["--data", "klingon"], "klingon"),
        ("knn", ["--data", "digits", "--set", "neighbours=3"], "unknown key neighbours"),
        ("knn", ["--data", "digits", "--layers", "7"], "'7' is not within blocks 0 to 2"),
        ("retrieval", ["--data", "digits"], "without a text tower"),
        ("knn", ["--data", "digits", "--device", "foo"], "device foo"),
    ],
)
def test_mistakes_are_one_line(name, changes, words, models, tmp_path):
    asked = ["--encoder", f"aimv2:{models['encoder']}", "--out", tmp_path / "out", "--workers", 0, *changes]
    codes, said = run(name, *asked, log=tmp_path / "log")
    assert codes == [1], said
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert words in line
    assert "Traceback" not in said
    assert not list((tmp_path / "out").glob("*.json"))


def test_an_error_of_all_ranks_is_one_line(models, tmp_path):
    asked = ["--encoder", f"aimv2:{models['encoder']}", "--out", tmp_path / "out", "--data", "klingon"]
    codes, said = run("knn", *asked, "--device", "cpu", log=tmp_path / "log", ranks=2)
    assert codes == [1, 1]
    assert "Traceback" not in said
    assert sum(line.startswith("error: no dataset 'klingon'") for line in said.splitlines()) == 1


def test_options_given_twice_add_up(models, tmp_path):
    asked = ["--encoder", f"aimv2:{models['encoder']}", "--encoder", "pixels", "--data", "faces", "--workers", 0]
    codes, said = run("knn", *asked, "--out", tmp_path, "--set", "k=5", "--set", "seed=3", log=tmp_path / "log")
    assert codes == [0], said
    results = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert [(r["protocol"]["k"], r["protocol"]["seed"]) for r in results] == [([5], 3)] * 2


def test_pairs_at_another_size_and_with_other_templates(models, tmp_path):
    """A LiT model with CLIP's tokens on the shapes world."""
    data = Path(write_shapes(tmp_path / "shapes").made_by.folder)
    asked = ["--encoder", f"aimv2:{models['lit']}", "--workers", 0, "--test-images", 40, "--image-size", 84]
    unseen = ["--data", f"shapes:{data}@shape_colour", "--templates", ROOT / "eval" / "templates" / "shapes_unseen.txt"]
    for name, own in (("zero_shot", unseen), ("retrieval", ["--data", f"shapes:{data}"])):
        codes, said = run(name, *asked, *own, "--out", tmp_path / name, log=tmp_path / "log")
        assert codes == [0], said
        result = json.loads(next((tmp_path / name).glob("*.json")).read_text())
        assert result["encoder"]["preprocessing"]["image_size"] == 84
        if name == "zero_shot":
            assert result["details"]["templates"] == 7
            assert result["metrics"]["top1"]["n"] == 40 and result["metrics"]["top1"]["chance"] == 1 / 36
        else:
            assert result["metrics"]["image_to_text_r1"]["n"] == 40
