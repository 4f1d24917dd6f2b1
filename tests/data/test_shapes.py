import io
import json
import tarfile
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, JpegImagePlugin

from aimv2.data.shapes import SHAPES, ShapesRecipe, captions, is_written, render, scene, write_shards


@pytest.fixture
def recipe(tmp_path):
    return ShapesRecipe(
        difficulty="quick", folder=str(tmp_path / "data"), train=25, validation=7, seed=2, samples_per_shard=10
    )


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_shards_hold_the_samples(recipe):
    done = []
    assert not is_written(recipe)
    folder = write_shards(recipe, progress=done.append)
    assert is_written(recipe)
    assert done == [10, 10, 5, 7]
    assert sorted(contents(folder)) == [
        "recipe.json",
        *(f"train-{i:06d}.tar" for i in range(3)),
        "validation-000000.tar",
    ]
    with tarfile.open(folder / "train-000002.tar") as tar:
        members = tar.getmembers()
        assert [m.name for m in members[:4]] == ["000000020.jpg", "000000020.txt", "000000020.json", "000000021.jpg"]
        assert {m.mtime for m in members} == {0}


def test_webdataset_reads_them(recipe):
    webdataset = pytest.importorskip("webdataset")
    folder = write_shards(recipe)
    for split, count in (("train", 25), ("validation", 7)):
        urls = sorted(str(path) for path in folder.glob(f"{split}-*.tar"))
        samples = list(webdataset.WebDataset(urls, shardshuffle=False))
        assert [s["__key__"] for s in samples] == [f"{i:09d}" for i in range(count)]
        for index, sample in enumerate(samples):
            drawn = scene(2, split, index, "quick")
            record = json.loads(sample["json"])
            assert sample["txt"].decode() == record["captions"][0] == captions(drawn)[0]
            assert record["captions"] == captions(drawn)
            assert [tuple(thing["box"]) for thing in record["objects"]] == [thing.box for thing in drawn.objects]
            assert record["labels"]["shape"] == SHAPES.index(drawn.objects[0].shape)
            assert record["labels"]["count"] == len(record["objects"])
            assert len(record["questions"]) >= 5
            assert (record["seed"], record["split"], record["index"]) == (2, split, index)
            picture = Image.open(io.BytesIO(sample["jpg"]))
            assert JpegImagePlugin.get_sampling(picture) == 0  # 4:4:4
            error = np.abs(np.asarray(picture).astype(int) - np.asarray(render(drawn)))
            assert error.mean() < 4  # of 255; quality 92


def test_bytes_do_not_depend_on_the_workers(recipe, tmp_path):
    one = write_shards(recipe)
    two = write_shards(replace(recipe, folder=str(tmp_path / "two")), workers=2)
    assert contents(one) == contents(two)


def test_an_interrupted_run_goes_on(recipe, tmp_path):
    whole = contents(write_shards(replace(recipe, folder=str(tmp_path / "whole"))))

    class Killed(Exception):
        pass

    def kill(count):
        raise Killed

    with pytest.raises(Killed):
        write_shards(recipe, progress=kill)
    folder = tmp_path / "data"
    assert sorted(contents(folder)) == ["recipe.unfinished.json", "train-000000.tar"]
    assert not is_written(recipe)
    with pytest.raises(ValueError, match="seed = 2, the recipe says 3"):
        write_shards(replace(recipe, seed=3))
    before = (folder / "train-000000.tar").stat()
    assert contents(write_shards(recipe)) == whole
    after = (folder / "train-000000.tar").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)

    (folder / "train-000001.tar").unlink()
    assert not is_written(recipe)
    assert contents(write_shards(recipe)) == whole and is_written(recipe)


def test_the_data_of_another_recipe_are_refused(recipe, tmp_path):
    write_shards(recipe)
    moved = tmp_path / "moved"
    (tmp_path / "data").rename(moved)
    assert is_written(replace(recipe, folder=str(moved)))
    for change, message in (
        ({"seed": 9}, "seed = 2, the recipe says 9"),
        ({"difficulty": "full"}, "difficulty = 'quick', the recipe says 'full'"),
        ({"train": 26}, "train = 25, the recipe says 26"),
    ):
        for check in (is_written, write_shards):
            with pytest.raises(ValueError, match=message):
                check(replace(recipe, folder=str(moved), **change))


def test_shards_of_someone_else_are_not_taken_for_ours(recipe, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-000000.tar").write_bytes(b"precious")
    with pytest.raises(ValueError, match=r"train-000000.tar but no recipe.json"):
        write_shards(recipe)
    assert contents(tmp_path / "data") == {"train-000000.tar": b"precious"}


def test_recipe_errors(tmp_path):
    with pytest.raises(ValueError, match="'hard'"):
        ShapesRecipe(difficulty="hard", folder=str(tmp_path), train=1, validation=1)
    with pytest.raises(ValueError, match="train=0"):
        ShapesRecipe(difficulty="quick", folder=str(tmp_path), train=0, validation=1)
    with pytest.raises(ValueError, match="workers is 0"):
        write_shards(ShapesRecipe(difficulty="quick", folder=str(tmp_path), train=1, validation=1), workers=0)
