import io
import json
import os
import pickle
import shutil

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from aimv2.data.images import BadImage
from aimv2.evals.datasets import open_dataset
from aimv2.evals.datasets.files import IMAGE_EXTENSIONS
from aimv2.evals.encoders import open_encoder
from aimv2.evals.knn import KNN
from aimv2.evals.run import evaluate
from aimv2.evals.session import Session

SESSION = Session(quiet=True)


def picture(seed: int, mode: str = "RGB", kind: str = "JPEG", size=(12, 10)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(data, kind)
    return data.getvalue()


def write(root, files):
    for path, data in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    return root


@pytest.fixture
def tree(tmp_path):
    """What people have: all that the issue names, and what a mac and a careless copy leave."""
    same = picture(1)
    files = {
        "train/cat/b.JPG": same,
        "train/cat/a.jpg": same,
        "train/cat/grey.png": picture(2, "L", "PNG"),
        "train/cat/more/x.jpeg": picture(3),
        "train/cat/more-still/x.jpeg": picture(4),
        "train/cat/more/deep/x.jpeg": picture(5),
        "train/dog/cut.jpg": picture(6)[:200],
        "train/dog/empty.jpg": b"",
        "train/dog/text.jpg": b"404 not found",
        "train/dog/good.webp": picture(7, kind="WEBP"),
        "train/dog/notes.txt": b"my dogs",
        "train/dog/Thumbs.db": b"?",
        "train/dog/moving.gif": picture(8, kind="GIF"),
        "train/dog/README": b"",
        "train/README.md": b"",
        "val/cat/1.jpg": same,
        "val/cat/2.jpg": picture(9)[:300],
        "val/dog/1.png": picture(10, "RGBA", "PNG"),
        "val/empty/1.png": picture(11, "LA", "PNG"),
    }
    write(tmp_path, files)
    (tmp_path / "train" / "empty").mkdir()
    return tmp_path


def readable(images):
    def good(i):
        try:
            images.image(i)
        except BadImage:
            return False
        return True

    return [good(i) for i in range(len(images))]


def test_a_careless_folder_is_counted_reported_or_refused(tree):
    data = open_dataset(f"folder:{tree}")
    assert data.classes == ("cat", "dog", "empty") and data.name == tree.name and data.templates is None
    assert data.report == {
        "left_out": {
            "train": {
                "no image by its extension: .db": 1,
                "no image by its extension: .gif": 1,
                "no image by its extension: .txt": 1,
                "no image by its extension: none": 1,
                "outside the classes' folders": 1,
            },
            "val": {},
        },
        "unused": [],
        "classes_without_training_images": ["empty"],
        "classes_without_test_images": [],
    }
    train = dict(zip(data.train.keys, readable(data.train), strict=True))
    assert [key for key, good in train.items() if not good] == [
        "train/dog/cut.jpg",
        "train/dog/empty.jpg",
        "train/dog/text.jpg",
    ]
    assert readable(data.test) == [True, False, True, True] and data.test.split == "val"
    grey = np.asarray(data.train.image(list(train).index("train/cat/grey.png")))
    assert grey.shape == (10, 12, 3) and (grey[..., :1] == grey).all()
    same = [np.asarray(images.image(0)).tobytes() for images in (data.train, data.test)]
    assert same[0] == same[1]  # duplicates are left for whoever sees the pixels
    write(tree, {"val/fish/1.png": picture(12), "val/bird/1.png": picture(12)})
    with pytest.raises(ValueError, match="class 'bird', 'fish' is to be tested, but the training split has no such"):
        open_dataset(f"folder:{tree}")


def test_the_number_of_test_images_never_shrinks(tree):
    """Through a whole evaluation: what can't be read is left out of training, and wrong in the test."""
    result_path = evaluate(KNN(k=(1,)), open_encoder("pixels:8"), open_dataset(f"folder:{tree}"), tree / "out", SESSION)
    result = json.loads(result_path.read_text())
    train, test = result["data"]["train"], result["data"]["test"]
    assert (train["n"], train["unreadable"], train["duplicates"]) == (10, 3, 1)
    assert (test["n"], test["unreadable"], test["unreadable_keys"]) == (4, 1, ["val/cat/2.jpg"])
    assert result["data"]["across_duplicates"] == 1
    samples = [json.loads(line) for line in result_path.with_suffix(".samples.jsonl").read_text().splitlines()]
    assert [sample["sample"] for sample in samples] == [
        "val/cat/1.jpg",
        "val/cat/2.jpg",
        "val/dog/1.png",
        "val/empty/1.png",
    ]
    # The duplicate is its own nearest neighbour; nothing was trained to say "empty".
    assert samples[0]["correct"] and not samples[1]["correct"] and not samples[3]["correct"]
    assert result["metrics"]["top1"]["n"] == 4


def test_samples_are_those_of_torchvision(tree):
    """In its order, which is no file system's."""
    data = open_dataset(f"folder:{tree}")
    for images, expected in (
        (data.train, ImageFolder(str(tree / "train"), allow_empty=True)),
        (data.test, ImageFolder(str(tree / "val"))),
    ):
        ours = [(str(tree / key), label) for key, label in zip(images.keys, images.labels.tolist(), strict=True)]
        assert ours == expected.samples
        assert list(data.classes) == expected.classes


def test_extensions_are_those_of_torchvision():
    from torchvision.datasets.folder import IMG_EXTENSIONS

    assert sorted(IMAGE_EXTENSIONS) == sorted(IMG_EXTENSIONS)


def test_hidden_files_links_and_pipes(tree):
    write(tree, {"train/cat/._a.jpg": b"\0", "train/.ipynb_checkpoints/a.jpg": picture(1), "train/.DS_Store": b"\0"})
    shutil.copytree(tree / "train" / "cat", tree / "elsewhere")
    os.symlink(tree / "elsewhere", tree / "train" / "linked")
    os.symlink(tree / "train", tree / "train" / "cat" / "more" / "up")
    os.symlink(tree / "train" / "cat", tree / "train" / "cat" / "round")
    os.symlink("self.jpg", tree / "train" / "cat" / "self.jpg")
    os.symlink(tree / "nowhere.jpg", tree / "train" / "cat" / "lost.jpg")
    os.mkfifo(tree / "train" / "cat" / "pipe.jpg")
    (tree / "train" / "cat" / "folder.jpg").mkdir()
    data = open_dataset(f"folder:{tree}")
    assert data.classes == ("cat", "dog", "empty", "linked")
    assert data.report["left_out"]["train"]["links to a folder that they are in"] == 2
    assert data.report["left_out"]["train"]["hidden"] == 4
    assert sum(key.startswith("train/linked/") for key in data.train.keys) == 6
    for name, reason in (("self", "no such file"), ("lost", "no such file"), ("pipe", "not a file")):
        with pytest.raises(BadImage, match=reason):
            data.train.image(list(data.train.keys).index(f"train/cat/{name}.jpg"))


def test_identity_is_of_keys_labels_sizes_and_times(tree):
    def identity():
        return open_dataset(f"folder:{tree}").train.identity

    first = identity()
    assert identity() == first
    moved = shutil.copytree(tree, tree.with_name("moved"))  # with the times
    assert open_dataset(f"folder:{moved}").train.identity == first
    status = (moved / "train/cat/a.jpg").stat()
    os.utime(moved / "train/cat/a.jpg", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    changed = open_dataset(f"folder:{moved}")
    assert changed.train.identity != first and changed.train.pictures != open_dataset(f"folder:{tree}").train.pictures
    (tree / "train/cat/a.jpg").write_bytes(picture(1) + b"\0")
    second = identity()
    (tree / "train/cat/a.jpg").rename(tree / "train/cat/aa.jpg")
    third = identity()
    (tree / "train/ant").mkdir()  # now cats are number 1
    assert len({first, second, third, identity()}) == 4


def test_a_name_that_is_not_unicode(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    data = open_dataset(f"folder:{write(tmp_path, {f'test/a/{name}': picture(0, kind='PNG')})}")
    assert list(data.test.keys) == [f"test/a/{name}"] and data.test.image(0).size == (12, 10)
    assert data.train is None and data.classes == ("a",)


def test_other_processes_read_it(tree):
    data = open_dataset(f"folder:{tree}")
    rows = data.train.subset([0, 2])
    again = pickle.loads(pickle.dumps(rows))
    expected = [np.asarray(rows.image(i)).tobytes() for i in range(2)]
    assert [np.asarray(again.image(i)).tobytes() for i in range(2)] == expected
    loader = DataLoader(_Pixels(rows), batch_size=None, num_workers=1)
    assert list(loader) == expected


class _Pixels:
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return np.asarray(self.images.image(i)).tobytes()


def test_folders_that_are_refused(tmp_path):
    with pytest.raises(ValueError, match="nowhere: not a folder"):
        open_dataset(f"folder:{tmp_path / 'nowhere'}")
    write(tmp_path, {"train/a/1.png": picture(0)})
    with pytest.raises(ValueError, match=r"found none of val, valid, validation, test: expected exactly one$"):
        open_dataset(f"folder:{tmp_path}")
    (tmp_path / "val" / "a").mkdir(parents=True)
    write(tmp_path, {"val/1.png": picture(0), "val/2.png": picture(1)})
    with pytest.raises(ValueError, match="val: no images in folders of classes, 2 files beside these: expected CLASS"):
        open_dataset(f"folder:{tmp_path}")
    write(tmp_path, {"test/a/1.png": picture(0)})
    message = "found val, test of val, valid, validation, test: expected exactly one: folder:PATH@val takes val"
    with pytest.raises(ValueError, match=message):
        open_dataset(f"folder:{tmp_path}")
    for split in ("train", "nothing"):
        with pytest.raises(ValueError, match=f"no folder {split} to test on: found val, test"):
            open_dataset(f"folder:{tmp_path}@{split}")
    (tmp_path / "train/a/1.png").unlink()
    with pytest.raises(ValueError, match="train: no images in folders of classes, 0 files beside"):
        open_dataset(f"folder:{tmp_path}@test")
    (tmp_path / "train").rename(tmp_path / "trained")
    (tmp_path / "test/a/1.png").unlink()
    (tmp_path / "test/a/1.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(ValueError, match=r"test: none of 1 images is there, from .*test/a/1.png on"):
        open_dataset(f"folder:{tmp_path}@test")


def test_which_split_is_tested(tmp_path):
    """Train, val and test together is what many have; the path itself may have an @."""
    root = write(tmp_path / "set@v2", {f"{split}/a/{split}.png": picture(0) for split in ("train", "val", "test", "q")})
    for split, unused in (("val", ["test"]), ("test", ["val"]), ("q", ["val", "test"])):
        data = open_dataset(f"folder:{root}@{split}")
        assert list(data.train.keys) == ["train/a/train.png"] and list(data.test.keys) == [f"{split}/a/{split}.png"]
        assert data.report["unused"] == unused and data.name == "set@v2"
    (root / "val").rename(root / "valid")
    (root / "test").rename(root / "other")
    assert open_dataset(f"folder:{root}").test.split == "valid"
