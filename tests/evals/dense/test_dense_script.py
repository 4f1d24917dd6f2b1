import json
import re
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image
from tiny_models import V2, random_encoder

from aimv2.data.shapes import ShapesRecipe, write_shards
from aimv2.exports import export_model
from aimv2.preprocessing import ProcessorConfig

SCRIPT = Path(__file__).parents[3] / "eval" / "dense.py"


@pytest.fixture
def dense(monkeypatch, capsys, tmp_path):
    """`dense(*arguments)` -> (exit code, what was printed, errors); it writes into tmp_path/out."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    monkeypatch.delitem(sys.modules, "arguments", raising=False)

    def run(*arguments) -> tuple[int, str, str]:
        place = ["--out", tmp_path / "out", "--device", "cpu", "--workers", 0]
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, (*arguments, *place))])
        return runpy.run_path(str(SCRIPT))["main"](), *capsys.readouterr()

    return run


def test_probe_and_pictures(dense, tmp_path):
    recipe = ShapesRecipe(difficulty="quick", folder=str(tmp_path / "shapes"), train=12, validation=5)
    write_shards(recipe)
    processing = ProcessorConfig(image_size=56, patch_size=14, mean=(0.5,) * 3, std=(0.5,) * 3)
    export = export_model(random_encoder(V2), tmp_path / "export", config=V2, processing=processing)
    settings = ("--set", "epochs=1", "lrs=0.001", "grid=4")
    code, out, _ = dense(
        "--encoder", f"aimv2:{export}", "pixels", "--data", f"shapes:{recipe.folder}", *settings, "--pictures", 2
    )
    assert code == 0
    results = [json.loads(path.read_text()) for path in sorted((tmp_path / "out").glob("*.json"))]
    assert [result["encoder"]["spec"] for result in results] == [f"aimv2:{export}", "pixels"]
    assert all(next(iter(result["metrics"])) == "miou" for result in results)
    pictures = sorted((tmp_path / "out").glob("*.png"))
    assert len(pictures) == 3  # the attention heads of pixels are not drawn
    for path in pictures:
        assert str(path) in out
        with Image.open(path) as image:
            assert image.height > 2 * 150  # two rows


def test_data_without_labels_of_patches_are_drawn(dense, tmp_path):
    pytest.importorskip("sklearn")
    code, out, _ = dense("--encoder", "pixels", "--data", "digits", "--pictures", 1)
    assert code == 0
    (first,) = (tmp_path / "out").glob("*.*")
    assert re.fullmatch(r"dense-digits-pixels-[0-9a-f]{8}\.png", first.name)
    assert str(first) in out
    assert dense("--encoder", "pixels", "--data", "digits", "--pictures", 1, "--image-size", 64)[0] == 0
    assert len(list((tmp_path / "out").glob("*.png"))) == 2  # pictures of another size beside them


def test_no_pictures(dense, tmp_path):
    pytest.importorskip("sklearn")
    assert dense("--encoder", "pixels", "--data", "digits", "--pictures", 0) == (0, "", "")
    assert not list(tmp_path.rglob("*.png"))
    code, out, errors = dense("--encoder", "pixels", "--data", "digits", "--pictures", -1)
    assert (code, out, errors) == (1, "", "error: --pictures -1: expected 0 or more\n")


def test_errors_are_one_line(dense):
    code, _, errors = dense("--encoder", "pixels", "--data", "digits", "--set", "epochs=0")
    assert code == 1
    assert errors.startswith("error: lrs, epochs and batch must be positive")
    assert errors.count("\n") == 1
