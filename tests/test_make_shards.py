import importlib.util
import json
import os
import subprocess
import sys

import pytest
from made_coyo import make_coyo
from PIL import Image

pytest.importorskip("tqdm")

from aimv2.data.shapes import ShapesRecipe, is_written
from aimv2.data.shards import Shards, expand_shards


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


@pytest.fixture
def pictures(tmp_path):
    """Three images with captions in a folder, of which the last cannot be used."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, colour, size in (("a", "red", (64, 48)), ("b", "blue", (64, 48)), ("c", "red", (20, 20))):
        Image.effect_noise(size, 50).convert("RGB").save(folder / f"{name}.jpg")
        (folder / f"{name}.txt").write_text(f"a {colour} picture")
    return folder


def captions(folder):
    return [sample.text for sample in Shards(expand_shards(f"{folder}/shards.list"))]


def test_a_folder_to_shards_that_training_reads(make_shards, pictures):
    command = ("folder", "pictures", "--out", "made", "--workers", "1")
    code, said = make_shards(*command)
    assert code is None
    assert "kept 2 of 3 samples\n  dropped 1: a side under 32 pixels (such as c.jpg)\n" in said
    assert "made/written/report.json" in said and "made/prepared/report.md" in said
    assert captions(pictures.parent / "made") == [b"a red picture", b"a blue picture"]


def test_the_same_command_again_changes_nothing_not_even_the_filters(make_shards, pictures, tmp_path):
    command = ("folder", "pictures", "--out", "made", "--workers", "1")
    make_shards(*command)
    make_shards("prepare", "made", "--keep", "caption_characters > 13", "--workers", "1")
    assert captions(tmp_path / "made") == [b"a blue picture"]
    code, said = make_shards(*command)
    assert code is None and "kept 2 of 3 samples" in said and "made/shards.list is as it was" in said
    assert captions(tmp_path / "made") == [b"a blue picture"]


def test_a_shard_that_is_written_again_does_not_lose_the_filters_unseen(make_shards, pictures, tmp_path):
    command = ("folder", "pictures", "--out", "made", "--workers", "1", "--samples-per-shard", "1")
    make_shards(*command)
    filtered = ("prepare", "made", "--keep", "caption_characters > 13", "--workers", "1")
    make_shards(*filtered)
    (tmp_path / "made" / "000000.tar").unlink()
    for _ in range(2):  # also if the first time was killed
        error, _ = make_shards(*command)
        assert "new shards are not filtered as the others are" in error and "--keep 'caption_characters > 13'" in error
        assert not (tmp_path / "made" / "shards.list").exists()
    assert make_shards(*filtered)[0] is None and captions(tmp_path / "made") == [b"a blue picture"]


def test_a_shard_that_is_written_again_is_prepared_again(make_shards, pictures, tmp_path):
    command = ("folder", "pictures", "--out", "made", "--workers", "1", "--samples-per-shard", "1")
    make_shards(*command)
    (tmp_path / "made" / "000000.tar").unlink()
    code, said = make_shards(*command)
    assert code is None and "as it was" not in said
    assert captions(tmp_path / "made") == [b"a red picture", b"a blue picture"]


def test_shards_into_the_folder_of_their_images_are_refused(make_shards, pictures, tmp_path):
    for out in ("pictures", "pictures/made", "."):
        error, _ = make_shards("folder", "pictures", "--out", out, "--workers", "1")
        assert error.startswith("make_shards: ") and "shards cannot go into the folder of their images" in error
    assert len(list(tmp_path.rglob("*"))) == 7  # nothing was written


def test_a_reader_that_has_seen_enough(request, tmp_path):
    """As in `| head`: no message."""
    root = request.config.rootpath
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, str(root / "scripts" / "make_shards.py"), *SHAPES, "--workers", "1"]
    options = {"cwd": tmp_path, "env": {"PYTHONPATH": str(root)}, "stdout": writer, "stderr": subprocess.PIPE}
    done = subprocess.run(command, **options, text=True)
    os.close(writer)
    assert done.returncode == 1 and "roken" not in done.stderr and "Traceback" not in done.stderr


def test_images_without_captions_stay_if_they_may(make_shards, pictures, tmp_path):
    (pictures / "b.txt").unlink()
    code, said = make_shards("folder", "pictures", "--out", "made", "--workers", "1", "--allow-no-caption")
    assert code is None, said
    assert captions(tmp_path / "made") == [b"a red picture", None]


def test_a_table_to_shards(make_shards, pictures, tmp_path):
    (tmp_path / "table.csv").write_text("path,alt,more\na.jpg,a,a long caption\nb.jpg,a short one,\n../x.jpg,a,b\n")
    columns = ("--image-column", "path", "--caption-column", "alt", "--caption-column", "more")
    code, said = make_shards("table", "table.csv", "--images", "pictures", "--out", "made", "--workers", "1", *columns)
    assert code is None and "dropped 1: the image is outside the folder (such as table.csv: line 4)" in said
    assert captions(tmp_path / "made") == [b"a long caption", b"a short one"]


def test_a_set_of_hugging_face_to_shards(make_shards, pictures, tmp_path):
    datasets = pytest.importorskip("datasets")
    images = [{"bytes": (pictures / f"{name}.jpg").read_bytes(), "path": None} for name in "ab"]
    rows = datasets.Dataset.from_dict({"picture": images, "text": ["a red one", "a blue one"]})
    rows.cast_column("picture", datasets.Image()).save_to_disk(tmp_path / "set")
    code, _ = make_shards("huggingface", "set", "--out", "made", "--workers", "1")
    assert code is None and captions(tmp_path / "made") == [b"a red one", b"a blue one"]


def test_coyo_from_the_download_to_what_training_reads(make_shards, tmp_path):
    made = make_coyo(tmp_path, samples=120)
    code, said = make_shards("coyo", "--metadata", "coyo-metadata", "--images", "coyo", "--workers", "1")
    assert code is None
    samples = sum(map(len, made.shards.values()))
    assert f"{samples} of {samples} samples in 7 shards" in said and "coyo/prepared/coyo_report.json" in said
    keep = ("--keep", "clip_similarity_vitl14 >= quantile:0.5", "--no-decode", "--no-phash")
    assert make_shards("prepare", "coyo", "--workers", "1", *keep)[0] is None
    scores = sorted(made.rows[i]["clip_similarity_vitl14"] for ids in made.shards.values() for i in ids)
    kept = [json.loads(sample.json) for sample in Shards(expand_shards("coyo/shards.list"))]
    assert abs(len(kept) - samples / 2) <= 1  # a median of one's own
    assert min(record["clip_similarity_vitl14"] for record in kept) >= scores[samples // 2 - 1]


def test_what_cannot_be_made_is_one_line(make_shards, pictures, tmp_path):
    (tmp_path / "table.csv").write_text("path,alt\nhttps://host/a.jpg,far away\n")
    to = ("--out", "made", "--workers", "1")
    columns = ("--image-column", "path", "--caption-column", "alt")
    for arguments, message in (
        (("folder", "nowhere", *to), "nowhere: not a folder"),
        (("folder", "pictures", *to, "--samples-per-shard", "0"), "samples_per_shard is 0"),
        (("table", "table.csv", "--images", "pictures", *columns, *to), "1 the image is a URL: nothing is downloaded"),
        (("table", "table.csv", "--images", "pictures", *columns, *to, "--image-column", "x"), "no column 'x'"),
        (("coyo", "--metadata", "pictures", "--images", "pictures"), "pictures: no .parquet file"),
    ):
        error, _ = make_shards(*arguments)
        assert error.startswith("make_shards: ") and message in error and "\n" not in error, error


def test_ctrl_c_says_how_to_go_on(make_shards, pictures, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("aimv2.data.shard_writer.run_jobs", interrupt)
    assert make_shards("folder", "pictures", "--out", "made")[0] == "make_shards: interrupted; the same command goes on"


def test_what_there_is_to_make(make_shards):
    code, said = make_shards("--help")
    assert code == 0 and all(name in said for name in ("shapes", "folder", "table", "huggingface", "coyo"))
    code, said = make_shards("shapes", "--help")
    assert code == 0 and "--samples-per-shard" in said
    assert make_shards()[0] == 2
