import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from made_results import result, write_result

SCRIPT = Path(__file__).parents[3] / "eval" / "report.py"


@pytest.fixture
def report(monkeypatch, capsys):
    """`report(*arguments)` -> (exit code, what was printed, errors)."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        code = runpy.run_path(str(SCRIPT))["main"]()
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def files(tmp_path) -> list[Path]:
    rng = np.random.default_rng(0)
    rows = (rng.random(200) < 0.9, rng.random(200) < 0.5)
    return [
        write_result(tmp_path / name, result(f"timm:{name}", float(right.mean()), n=200), right)
        for name, right in zip("ab", rows, strict=True)
    ]


def test_table(report, files, tmp_path):
    code, out, errors = report("table", files[0].parent, files[1].parent, "--out", tmp_path / "out")
    assert (code, errors) == (0, "")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"report.md", "report.html", "encoders.png"}
    assert "2 results, 0 JSON files left out" in out


def test_compare(report, files):
    code, out, errors = report("compare", *files)
    assert (code, errors) == (0, "")
    assert "knn of timm:a: top1" in out
    assert "on shapes@shape, 200 test samples" in out
    assert "not alike" not in out
    assert "95 % interval +" in out  # 0.9 and 0.5 of 200 are far apart
    assert "exact McNemar p" in out


def test_any_terminal_will_do(files, monkeypatch):
    """A name that it has no letters for."""
    content = json.loads(files[0].read_text())
    content["encoder"]["spec"] = "aimv2:läufe/名前"
    files[0].write_text(json.dumps(content))
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    command = [sys.executable, SCRIPT, "compare", *files, "--resamples", "10"]
    done = subprocess.run(command, capture_output=True, env=os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])})
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"aimv2:l?ufe/??" in done.stdout


def test_no_resamples_are_refused_by_name(report, files):
    code, _, errors = report("compare", *files, "--resamples", 0)
    assert (code, errors) == (1, "error: resamples 0: expected 1 or more\n")


def test_errors_are_one_line(report, files, tmp_path):
    missing = tmp_path / "none"
    expected = f"error: {missing}: expected a folder of results\n"
    assert report("table", missing, "--out", tmp_path / "out") == (1, "", expected)
    files[1].with_suffix(".samples.jsonl").write_text("{}\n")
    code, _, errors = report("compare", *files)
    assert code == 1
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1


def test_what_was_not_read_is_told(report, files, tmp_path):
    (files[0].parent / "broken.json").write_text("{")
    code, out, errors = report("table", files[0].parent, "--out", tmp_path / "out")
    assert code == 0
    assert "1 results, 1 JSON files left out" in out
    assert errors.startswith(f"left out: {files[0].parent / 'broken.json'}: not JSON")
