import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from shapes_run import write_run, write_shapes

SCRIPT = Path(__file__).parents[1] / "scripts" / "show_predictions.py"


@pytest.fixture
def run(tmp_path) -> Path:
    return write_run(tmp_path / "run", write_shapes(tmp_path / "data"))


@pytest.fixture
def show(monkeypatch):
    """Run the script in this process; returns its exit status."""

    def show(*arguments) -> int:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return stop.value.code

    return show


def test_draws_and_prints(run):
    done = subprocess.run([sys.executable, SCRIPT, run, "--samples", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:2] == [str(run / "loss.png"), str(run / "predictions.png")]
    for path in lines[:2]:
        with Image.open(path) as image:
            image.verify()
    assert sum(line.startswith("  true ") for line in lines) == 2
    assert sum(line.startswith("  generated ") and line.endswith(" (wrong)") for line in lines) == 2


def test_a_run_without_validation_data_has_curves_only(run, show, capsys):
    config = json.loads((run / "config.json").read_text())
    config["data"]["validation"] = None
    (run / "config.json").write_text(json.dumps(config))
    assert show(run) == 0 and "no predictions.png" in capsys.readouterr().out
    assert (run / "loss.png").exists() and not (run / "predictions.png").exists()


def test_what_is_missing_is_one_line(run, show, tmp_path, capsys):
    (run / "export" / "model.safetensors").unlink()
    for folder, named in ((tmp_path / "nowhere", "nowhere/config.json"), (run, "export: expected model.safetensors")):
        assert show(folder) == 1
        error = capsys.readouterr().err
        assert named in error and len(error.splitlines()) == 1
