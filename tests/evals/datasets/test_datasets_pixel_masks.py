import pickle

import numpy as np
import pytest
from PIL import Image

from aimv2.data.images import BadImage
from aimv2.evals.datasets import open_dataset


def write(root, split, name, mask, mode="L"):
    """An image and its mask, an array of class numbers."""
    for what, image, path in (
        ("images", Image.new("RGB", mask.shape[::-1]), name),
        ("masks", Image.fromarray(mask), name.rpartition(".")[0] + ".png"),
    ):
        file = root / what / split / path
        file.parent.mkdir(parents=True, exist_ok=True)
        if what == "masks" and mode == "P":
            image.putpalette([7, 8, 9] * 256)  # colours are not classes
        elif what == "masks":
            image = image.convert(mode)
        image.save(file)


@pytest.fixture
def root(tmp_path):
    rng = np.random.default_rng(0)
    for split, names in (("train", ["b.jpg", "a/c.PNG"]), ("val", ["z.jpg"])):
        for name in names:
            write(tmp_path, split, name, rng.integers(0, 5, (6, 9), dtype=np.uint8), mode="P" if "a/" in name else "L")
    return tmp_path


def test_masks_are_the_numbers_in_the_files(root):
    data = open_dataset(f"masks:{root}")
    assert data.classes == tuple("01234") and data.report["classes"] == "counted in the masks"
    assert list(data.train.keys) == ["images/train/a/c.PNG", "images/train/b.jpg"] and data.test.split == "val"
    rng = np.random.default_rng(0)
    expected = [rng.integers(0, 5, (6, 9), dtype=np.uint8) for _ in range(3)]
    for images, row, mask in ((data.train, 1, 0), (data.train, 0, 1), (data.test, 0, 2)):
        found = pickle.loads(pickle.dumps(images)).mask(row)
        assert found.mode == "L" and np.array_equal(np.asarray(found), expected[mask])
        assert images.image(row).size == found.size
    assert data.train.has_masks and np.asarray(data.train.subset([1]).mask(0)).tolist() == expected[0].tolist()


def test_255_is_no_class_and_names_come_from_a_file(root):
    write(root, "val", "y.png", np.array([[255, 6]], np.uint8))
    assert open_dataset(f"masks:{root}").classes == tuple("0123456")
    (root / "classes.txt").write_text("sky\nsea \n\n")
    data = open_dataset(f"masks:{root}")
    assert data.classes == ("sky", "sea") and data.report["classes"] == "classes.txt"


def test_masks_that_are_refused(root):
    write(root, "val", "rgb.png", np.zeros((4, 4), np.uint8), mode="RGB")
    write(root, "val", "cut.png", np.zeros((4, 4), np.uint8))
    (root / "masks/val/cut.png").write_bytes((root / "masks/val/cut.png").read_bytes()[:45])
    data = open_dataset(f"masks:{root}")
    rows = {key.rpartition("/")[2]: i for i, key in enumerate(data.test.keys)}
    for name, reason in (("rgb.png", "a mask of mode RGB"), ("cut.png", "undecodable")):
        with pytest.raises(BadImage, match=reason):
            data.test.mask(rows[name])
    (root / "masks/val/z.png").unlink()
    with pytest.raises(ValueError, match=r"z.jpg: no mask"):
        open_dataset(f"masks:{root}")
    with pytest.raises(ValueError, match="images/train: not a folder"):
        open_dataset(f"masks:{root}/masks")
