import importlib.util
import io
import json
import subprocess
import sys
import tarfile

import numpy as np
import pytest

pytest.importorskip("sentencepiece")
from aimv2.data.shard_index import select_rows
from aimv2.data.shard_list import write_shard_list
from aimv2.data.shard_scan import build_index
from aimv2.data.tokenizer import Tokenizer

CAPTIONS = [
    f"a {size} {colour} ball number {n}" for size in ("big", "small") for colour in ("red", "blue") for n in range(9)
]


ABOUT = ("--vocab-size", "40", "--out", "tokenizers/balls", "--source", "made up", "--licence", "CC0-1.0")


@pytest.fixture
def train(request, tmp_path, monkeypatch, capsys):
    """Run the script in this process, in an empty folder: its exit (None is success) and what it printed."""
    path = request.config.rootpath / "scripts" / "train_tokenizer.py"
    spec = importlib.util.spec_from_file_location("train_tokenizer", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [str(path), *ABOUT, *arguments])
        try:
            return script.main(), capsys.readouterr().out
        except SystemExit as stop:
            return stop.code, capsys.readouterr().out

    return run


def write_tar(path, captions):
    with tarfile.open(path, "w") as tar:
        for index, caption in enumerate(captions):
            members = {
                "jpg": b"never read",
                "txt": caption.encode(),
                "json": json.dumps({"captions": [caption, f"{caption}!"], "caption": caption, "none": None}).encode(),
            }
            for extension, data in members.items():
                member = tarfile.TarInfo(f"{index:05d}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def write_parquet(path):
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    parquet.write_table(pyarrow.table({"caption": [*CAPTIONS, None], "id": range(len(CAPTIONS) + 1)}), path)


def test_as_typed(request, tmp_path):
    root = request.config.rootpath
    (tmp_path / "a.txt").write_text("\n".join(CAPTIONS))
    command = [sys.executable, str(root / "scripts" / "train_tokenizer.py"), *ABOUT, "--captions", "a.txt"]
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(root)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert " pieces in tokenizers/balls/tokenizer.model" in done.stdout


def test_every_kind_of_input_gives_the_same_tokenizer(train, tmp_path):
    half = len(CAPTIONS) // 2
    write_tar(tmp_path / "a-0.tar", CAPTIONS[:half])
    write_tar(tmp_path / "a-1.tar", CAPTIONS[half:])
    (tmp_path / "a.txt").write_text("\n".join(CAPTIONS) + "\n")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"caption": [c], "id": 1}) + "\n" for c in CAPTIONS) + "\n")
    write_parquet(tmp_path / "a.parquet")
    write_tar(tmp_path / "b.tar", [*CAPTIONS[:half], "filtered out", *CAPTIONS[half:]])
    build_index(tmp_path / "b.tar")
    select_rows(tmp_path / "b.tar", np.delete(np.arange(len(CAPTIONS) + 1), half))
    write_shard_list(tmp_path, ["b.tar"])
    models = []
    for arguments in (
        ("--captions", "a-*.tar"),
        ("--captions", "a-0.tar", "a-1.tar", "--column", "caption"),
        ("--captions", "shards.list"),
        ("--captions", "shards.list", "--column", "caption"),
        ("--captions", "a.txt"),
        ("--captions", "a.jsonl", "--column", "caption"),
        ("--captions", "a.parquet", "--column", "caption"),
    ):
        code, said = train(*arguments, "--force")
        assert code is None and " pieces in tokenizers/balls/tokenizer.model" in said
        models.append((tmp_path / "tokenizers/balls/tokenizer.model").read_bytes())
    assert len(set(models)) == 1
    tokenizer = Tokenizer(tmp_path / "tokenizers/balls")
    assert tokenizer.decode(tokenizer.encode(CAPTIONS[0], 77)) == CAPTIONS[0]
    readme = (tmp_path / "tokenizers/balls/README.md").read_text()
    for part in ("made up", "CC0-1.0", tokenizer.fingerprint, f"| {len(CAPTIONS)} |", "--captions a.parquet --column"):
        assert part in readme


def test_a_list_of_captions_counts_each_and_the_limit_holds(train, tmp_path):
    write_tar(tmp_path / "a.tar", CAPTIONS)
    readme = tmp_path / "tokenizers/balls/README.md"
    assert train("--captions", "a.tar", "--column", "captions")[0] is None
    assert f"| {2 * len(CAPTIONS)} |" in readme.read_text()
    assert train("--captions", "a.tar", "--limit", "20", "--force")[0] is None
    assert "| 20 |" in readme.read_text()


def test_errors_are_one_line_and_name_the_value(train, tmp_path):
    write_tar(tmp_path / "a.tar", CAPTIONS)
    write_parquet(tmp_path / "a.parquet")
    (tmp_path / "cut.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:1000])
    (tmp_path / "bad.jsonl").write_text('{"caption": "fine"}\n{"caption": \n')
    (tmp_path / "list.jsonl").write_text('["caption"]\n')
    (tmp_path / "a.csv").write_text("caption\n")
    (tmp_path / "bad.parquet").write_bytes(b"nothing")
    assert train("--captions", "a.tar")[0] is None
    for arguments, message in (
        (("--captions", "a.tar"), "balls/tokenizer.model exists"),
        (("--captions", "none-*.tar", "--force"), "no file matches none-*.tar"),
        (("--captions", "a.csv", "--force"), "a.csv"),
        (("--captions", "cut.tar", "--force"), "cut.tar"),
        (("--captions", "bad.jsonl", "--column", "caption", "--force"), "bad.jsonl: line 2 is not JSON"),
        (("--captions", "list.jsonl", "--column", "caption", "--force"), "list.jsonl: line 1 is list"),
        (("--captions", "bad.parquet", "--column", "caption", "--force"), "bad.parquet"),
        (("--captions", "a.parquet", "--column", "text", "--force"), "caption, id; --column is text"),
        (("--captions", "a.tar", "--column", "text", "--force"), "00000.json has the fields captions, caption, none"),
        (("--captions", "a.tar", "--column", "none", "--force"), "no usable caption"),
        (("--captions", "a.tar", "--vocab-size", "4", "--force"), "cannot make 4 pieces"),
    ):
        error, _ = train(*arguments)
        assert error.startswith("train_tokenizer: ") and message in error and "\n" not in error
