import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from aimv2.whole_files import whole_file, write_json


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_takes_the_place_of_the_old_one(tmp_path):
    path = tmp_path / "a.json"
    for value in (1, {"b": [None, "é"]}):
        write_json(path, value)
        assert json.loads(path.read_bytes()) == value and names(tmp_path) == ["a.json"]


def test_after_an_error_or_a_second_thought_the_old_one_stays(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(OSError, match="full"), whole_file(path) as temporary:
        temporary.write_text("half")
        raise OSError("the disk is full")
    with whole_file(path) as temporary:
        temporary.write_text("unwanted")
        temporary.unlink()
    assert path.read_text() == "old" and names(tmp_path) == ["a"]


def test_a_kill_leaves_the_old_one(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    code = f"""
import os, pathlib
from aimv2.whole_files import whole_file
with whole_file(pathlib.Path({str(path)!r})) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), 9)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == -9
    assert path.read_text() == "old" and len(names(tmp_path)) == 2
