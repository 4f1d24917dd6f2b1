import io
import os
import pickle
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from aimv2.data.images import BadImage
from aimv2.evals.datasets import open_dataset

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def encode(colour: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (colour, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def rows(labels, first=0, names=("cat", "dog", "fish"), **columns):
    images = [{"bytes": encode(first + i), "path": None} for i in range(len(labels))]
    found = datasets.Dataset.from_dict({"image": images, "label": labels, **columns})
    found = found.cast_column("image", datasets.Image())
    return found.cast_column("label", datasets.ClassLabel(names=list(names))) if names else found


def save(folder, kind="saved", **splits):
    if kind == "saved":
        datasets.DatasetDict(splits).save_to_disk(folder)
        return folder
    folder.mkdir()
    for name, split in splits.items():
        split.to_parquet(folder / f"{name}-00000-of-00001.parquet")
    return folder


@pytest.mark.parametrize("kind", ["saved", "parquet"])
def test_images_and_labels_are_the_rows(tmp_path, kind):
    train, test = rows([2, 0, 2, 0]), rows([0, 1], first=9)
    data = open_dataset(f"hf:{save(tmp_path / 'set', kind, train=train, test=test)}")
    assert data.classes == ("cat", "dog", "fish") and data.name == "set"
    assert data.train.labels.tolist() == [2, 0, 2, 0] and data.test.labels.tolist() == [0, 1]
    assert data.report == {
        "splits": {"train": "train", "test": "test", "unused": []},
        "columns": ["image", "label"],
        "classes_without_training_images": ["dog"],
        "classes_without_test_images": ["fish"],
    }
    assert list(data.test.keys) == ["test/00000000", "test/00000001"]
    part = pickle.loads(pickle.dumps(data.train.subset([3, 1])))
    assert [part.image(i).getpixel((0, 0))[0] for i in range(2)] == [3, 1]
    with pytest.raises(IndexError):
        data.test.image(2)


@pytest.mark.parametrize("kind", ["saved", "parquet", "images"])
def test_identity_is_of_the_images_not_of_where_they_are(tmp_path, kind):
    def identity(folder):
        return open_dataset(f"hf:{folder}").train.identity

    if kind == "images":
        for path in ("train/ant/a.png", "train/bee/b.png", "test/ant/c.png", "test/bee/d.png"):
            (tmp_path / "set" / path).parent.mkdir(parents=True)
            (tmp_path / "set" / path).write_bytes(encode(1))
    else:
        save(tmp_path / "set", kind, train=rows([2, 0]), test=rows([0]))
    first = identity(tmp_path / "set")
    moved = shutil.copytree(tmp_path / "set", tmp_path / "moved")  # with the times
    assert identity(moved) == first
    file = max(path for path in moved.rglob("train*" if kind == "parquet" else "train/**/*") if path.is_file())
    os.utime(file, ns=(0, 0))  # as a write of as many bytes would
    assert identity(moved) != first


def test_identity_is_of_the_sizes_of_the_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("aimv2.evals.datasets.huggingface._folder_stamps", lambda folder: b"")
    same = rows([2, 0])
    other = datasets.Dataset.from_dict({"image": [encode(0) + b"\0", encode(1)], "label": [2, 0]}, same.features)
    found = [
        open_dataset(f"hf:{save(tmp_path / name, kind, train=train, test=rows([0]))}").train.identity
        for name, kind, train in (
            ("a", "saved", same),
            ("b", "parquet", same),
            ("c", "saved", rows([2, 1])),
            ("d", "saved", other),
        )
    ]
    assert found[0] == found[1] and len(set(found)) == 3


def test_classes_that_are_numbered_otherwise_in_another_split(tmp_path):
    for name, names, message in (
        ("order", ("dog", "cat", "fish"), "class 0 is 'cat' in train and 'dog' in test"),
        ("more", ("cat", "dog", "fish", "owl"), "class 3 is None in train and 'owl' in test"),
    ):
        folder = save(tmp_path / name, train=rows([0, 1]), test=rows([0, 1], names=names))
        with pytest.raises(ValueError, match=message):
            open_dataset(f"hf:{folder}")


def test_splits_of_other_columns(tmp_path):
    plain, other = rows([0, 1]), rows([0, 1]).rename_column("image", "photo")
    folder = save(tmp_path / "a", train=plain, test=plain.remove_columns("label"), validation=plain)
    assert open_dataset(f"hf:{folder}").report["splits"] == {"train": "train", "test": "validation", "unused": ["test"]}
    with pytest.raises(ValueError, match=r"test has no column 'image', but \['photo', 'label'\]"):
        open_dataset(f"hf:{save(tmp_path / 'b', train=plain, test=other)}")


def test_damage_is_said_in_one_line(tmp_path):
    parquet = save(tmp_path / "a", "parquet", train=rows([0, 1]), test=rows([0]))
    (parquet / "test-00000-of-00001.parquet").write_bytes(b"no parquet")
    arrow = save(tmp_path / "b", train=rows([0, 1]), test=rows([0]))
    file = next((arrow / "test").glob("*.arrow"))
    file.write_bytes(file.read_bytes()[:100])
    state = save(tmp_path / "c", train=rows([0, 1]), test=rows([0]))
    (state / "test" / "state.json").write_text("{}")
    for folder, message in ((parquet, "Parquet magic bytes not found"), (arrow, "metadata"), (state, "missing '_data")):
        with pytest.raises(ValueError, match=f"^{folder}: .*{message}") as error:
            open_dataset(f"hf:{folder}")
        assert "\n" not in str(error.value)


def test_a_folder_with_an_at(tmp_path):
    folder = save(tmp_path / "set@v2", train=rows([0, 1]), test=rows([0]))
    for spec in (f"hf:{folder}", f"hf:{folder}@label"):
        assert open_dataset(spec).report["columns"] == ["image", "label"]


def test_an_imagefolder(tmp_path):
    for split, label, colour in (("train", "ant", 1), ("train", "bee", 2), ("test", "bee", 3)):
        path = tmp_path / "set" / split / label / f"{colour}.png"
        path.parent.mkdir(parents=True)
        path.write_bytes(encode(colour))
    (tmp_path / "set" / "test" / "bee" / "4.png").write_bytes(b"404 not found")
    data = open_dataset(f"hf:{tmp_path / 'set'}")
    assert data.classes == ("ant", "bee") and data.test.labels.tolist() == [1, 1]
    assert data.test.image(0).getpixel((0, 0)) == (3, 0, 0)
    with pytest.raises(BadImage, match="not a JPEG"):
        data.test.image(1)
    (tmp_path / "set" / "test" / "bee" / "3.png").unlink()
    with pytest.raises(BadImage, match="no such file"):
        data.test.image(0)


def test_rows_without_an_image_are_bad_images(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a"])})
    test = datasets.Dataset.from_dict({"image": [None, {"bytes": b"", "path": None}], "label": [0, 0]}, features)
    data = open_dataset(f"hf:{save(tmp_path / 'set', test=test)}")
    assert data.train is None and len(data.test) == 2
    for row in range(2):
        with pytest.raises(BadImage):
            data.test.image(row)


def test_which_split_is_tested(tmp_path):
    """ImageNet's test split has no labels."""
    splits = {"train": rows([0, 1]), "validation": rows([1]), "test": rows([-1, -1])}
    data = open_dataset(f"hf:{save(tmp_path / 'a', **splits)}")
    assert data.report["splits"] == {"train": "train", "test": "validation", "unused": ["test"]}
    data = open_dataset(f"hf:{save(tmp_path / 'b', **splits | {'test': rows([0])})}")
    assert data.report["splits"] == {"train": "train", "test": "test", "unused": ["validation"]}
    with pytest.raises(ValueError, match="no split to test on with labels: found train, expected"):
        open_dataset(f"hf:{save(tmp_path / 'c', train=rows([0]))}")
    with pytest.raises(ValueError, match="test row 1 and 0 more have no 'label'"):
        open_dataset(f"hf:{save(tmp_path / 'd', train=rows([0]), test=rows([0, -1]))}")


@pytest.mark.parametrize(("labels", "classes"), [(["b", "a", "b"], ("a", "b")), ([10, 9, 10], ("9", "10"))])
def test_a_column_of_texts_or_integers(tmp_path, labels, classes):
    data = open_dataset(
        f"hf:{save(tmp_path / 'set', train=rows(labels, names=()), test=rows(labels[1:], names=()))}@label"
    )
    assert data.classes == classes and data.train.labels.tolist() == [1, 0, 1] and data.test.labels.tolist() == [0, 1]
    other = save(tmp_path / "other", train=rows(labels[:1], names=()), test=rows(labels, names=()))
    with pytest.raises(ValueError, match=f"class {labels[1]!r} is to be tested, but the training split has no such"):
        open_dataset(f"hf:{other}@label")


def test_sets_that_are_refused(tmp_path, monkeypatch):
    two = rows([0, 1], coarse=[1, 0]).cast_column("coarse", datasets.ClassLabel(names=["x", "y"]))
    folder = save(tmp_path / "set", train=two, test=two)
    assert open_dataset(f"hf:{folder}@coarse").classes == ("x", "y")
    numbers = rows([0, 1], score=[0.5, 0.25])
    other = save(tmp_path / "other", train=numbers, test=numbers)
    for spec, message in (
        (f"{folder}", r"columns of class labels \['label', 'coarse'\]: say which by @COLUMN"),
        (f"{folder}@fine", "no column 'fine', expected one of"),
        (f"{other}@score", r"'score' is Value\('float64'\), expected class labels, integers or texts"),
        (f"{other}@image", "'image' is Image"),
        (f"{tmp_path}/nowhere", "no such folder: for a set on the hub check its name and the network"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            open_dataset(f"hf:{spec}")
        assert "\n" not in str(error.value)
    rows([0]).save_to_disk(tmp_path / "one")
    with pytest.raises(ValueError, match="saved without splits, expected a DatasetDict of train and test"):
        open_dataset(f"hf:{tmp_path / 'one'}")
    monkeypatch.setattr(datasets, "__version__", "3.6.0")
    with pytest.raises(ImportError, match="may run a set's code"):
        open_dataset(f"hf:{folder}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'pip install "aimv2\[huggingface\]"'):
        open_dataset(f"hf:{folder}")


def test_no_image_is_decoded_to_read_the_labels(tmp_path, monkeypatch):
    folder = save(tmp_path / "set", train=rows([0, 1]), test=rows([1]))
    monkeypatch.setattr(datasets.Image, "decode_example", None)
    assert np.asarray(open_dataset(f"hf:{folder}").test.image(0)).shape == (6, 8, 3)
