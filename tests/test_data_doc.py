"""docs/data.md is true: its commands run in order on a small made COYO, its Python runs, its report is what is said."""

import csv
import inspect
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from made_coyo import make_coyo
from PIL import Image

from aimv2.data.loader import DataConfig
from aimv2.data.mixture import Source
from aimv2.data.shapes import captions, render, scene

ROOT = Path(__file__).parents[1]
DOC = ROOT / "docs" / "data.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", DOC.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
COMMANDS = {"python": f'exec {sys.executable} "$@"', "img2dataset": "mv downloaded data/coyo"}


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder like the repository's, with the metadata and the pictures that the document begins with."""
    for name in ("scripts", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "tokenizers" / "shapes", tmp_path / "tokenizers" / "shapes")
    made = make_coyo(tmp_path / "data")
    made.images.rename(tmp_path / "downloaded")
    for folder in ("photos", "pairs"):
        (tmp_path / folder).mkdir()
    with (
        open(tmp_path / "captions.csv", "w", newline="") as table,
        open(tmp_path / "pairs/metadata.jsonl", "w") as lines,
    ):
        rows = csv.writer(table)
        rows.writerow(["file", "caption"])
        for i in range(12):
            picture = scene(0, "test", i, "quick")
            jpeg = io.BytesIO()
            render(picture).resize((64, 64), Image.Resampling.BICUBIC).save(jpeg, "JPEG")
            for folder in ("photos", "pairs"):
                (tmp_path / folder / f"{i}.jpg").write_bytes(jpeg.getvalue())
            caption = captions(picture)[0]
            (tmp_path / "photos" / f"{i}.txt").write_text(caption)
            rows.writerow([f"{i}.jpg", caption])
            lines.write(json.dumps({"file_name": f"{i}.jpg", "text": caption}) + "\n")
    (tmp_path / "bin").mkdir()
    for name, does in COMMANDS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def test_every_block_does_what_it_says(place):
    environment = os.environ | {
        "PATH": f"{place}/bin:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_HOME": f"{place}/hub",
        "HF_HUB_OFFLINE": "1",
    }
    said, names = "", {}
    for language, text in BLOCKS:
        if language == "sh":
            done = subprocess.run(["bash", "-ec", text], cwd=place, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr[-3000:]}"
            said = done.stdout
        elif language == "python" and (name := re.match(r"# (\w+\.py)\n", text)):
            (place / name[1]).write_text(text)
        elif language == "python":
            exec(compile(text, str(DOC), "exec"), names)
        else:
            assert language == "text" and text in said, said
    shapes = "tokenizers/shapes"
    DataConfig(train=names["train"], changes=names["changes"], remote=names["remote"], tokenizer=shapes)
    assert (place / "runs" / "coyo-small" / "export" / "model.safetensors").is_file()
    assert json.loads((place / "runs/coyo-small/metrics.jsonl").read_text().splitlines()[-1])["step"] == 10
    for written in ("photos", "captions", "pairs"):
        assert Source(name="x", shards=f"data/{written}/shards.list")
        assert (place / "data" / written / "shards.list").is_file()


def test_img2dataset_has_these_options():
    img2dataset = pytest.importorskip("img2dataset")
    (command,) = [text for _, text in BLOCKS if text.startswith("img2dataset")]
    known = inspect.signature(img2dataset.download).parameters
    assert set(re.findall(r"--(\w+)", command)) <= known.keys()


def test_pictures_and_paths_exist_and_lines_fit():
    text = DOC.read_text(encoding="utf-8")
    for path in re.findall(r"\]\(([\w/]+\.png)\)", text):
        assert (DOC.parent / path).is_file(), path
    for path in re.findall(r"(?<![\w/])(?:scripts|aimv2|configs)/[\w/]+\.py", text):
        assert (ROOT / path).is_file(), path
    assert not [line for _, block in BLOCKS for line in block.splitlines() if len(line) > 120]
