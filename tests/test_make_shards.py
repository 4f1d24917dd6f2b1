import importlib.util
import subprocess
import sys

import pytest

pytest.importorskip("tqdm")

from aimv2.data.shapes import ShapesRecipe, is_written


@pytest.fixture
def make_shards(request, tmp_path, monkeypatch, capsys):
    """Run the script in this process, in an empty folder: its exit (None is success) and what it printed."""
    path = request.config.rootpath / "scripts" / "make_shards.py"
    spec = importlib.util.spec_from_file_location("make_shards", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [str(path), *arguments])
        try:
            return script.main(), capsys.readouterr().out
        except SystemExit as stop:
            return stop.code, capsys.readouterr().out

    return run


SHAPES = ("shapes", "--difficulty", "quick", "--out", "made", "--train", "12", "--validation", "3")


def test_as_typed_with_workers(request, tmp_path):
    root = request.config.rootpath
    command = [sys.executable, str(root / "scripts" / "make_shards.py"), *SHAPES, "--workers", "2"]
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(root)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "12 training and 3 validation samples in made" in done.stdout


def test_writes_shapes_and_goes_on_from_what_is_there(make_shards, tmp_path):
    for _ in range(2):
        code, said = make_shards(*SHAPES, "--samples-per-shard", "6", "--workers", "1")
        assert code is None and "12 training and 3 validation samples in made" in said
        recipe = ShapesRecipe(
            difficulty="quick", folder=str(tmp_path / "made"), train=12, validation=3, samples_per_shard=6
        )
        assert is_written(recipe)
        written = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "made").iterdir()}
        assert sorted(written) == [
            "recipe.json",
            "train-000000.tar",
            "train-000001.tar",
            "validation-000000.tar",
        ]
    assert written == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "made").iterdir()}


def test_errors_are_one_line(make_shards):
    assert make_shards(*SHAPES, "--workers", "1")[0] is None
    for change, message in (
        (("--seed", "1"), "seed = 0, the recipe says 1"),
        (("--out", "/dev/null/x"), "/dev/null/x"),
        (("--train", "0"), "train=0"),
        (("--workers", "0"), "workers is 0"),
    ):
        error, _ = make_shards(*SHAPES, "--workers", "1", *change)
        assert error.startswith("make_shards: ") and message in error and "\n" not in error


def test_what_there_is_to_make(make_shards):
    code, said = make_shards("--help")
    assert code == 0 and "shapes" in said
    code, said = make_shards("shapes", "--help")
    assert code == 0 and "--samples-per-shard" in said
    assert make_shards()[0] == 2
