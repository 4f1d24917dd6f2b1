import os
import pickle
import struct
import zlib

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


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_grey_masks_of_few_bits(root, bits):
    """Pillow itself writes and reads such numbers as shades; the file is made by hand."""
    numbers = (np.arange(32).reshape(4, 8) * 7 % 2**bits).astype(np.uint8)
    rows = [b"\0" + int("".join(f"{n:0{bits}b}" for n in row), 2).to_bytes(bits, "big") for row in numbers.tolist()]
    header = struct.pack(">IIBBBBB", 8, 4, bits, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for kind, content in ((b"IHDR", header), (b"IDAT", zlib.compress(b"".join(rows))), (b"IEND", b"")):
        data += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    write(root, "val", "y.png", np.zeros((4, 8), np.uint8))
    (root / "masks/val/y.png").write_bytes(data)
    assert np.array_equal(np.asarray(open_dataset(f"masks:{root}").test.mask(0)), numbers)


def test_masks_of_another_shape(root):
    """Half the size is fine, to a pixel; what is turned by the image's EXIF, or cut, is not."""
    write(root, "val", "y.png", np.zeros((3, 4), np.uint8))
    Image.new("RGB", (9, 7)).save(root / "images/val/y.png")
    assert open_dataset(f"masks:{root}").test.mask(0).size == (4, 3)
    write(root, "val", "turned.jpg", np.zeros((20, 40), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(root / "images/val/turned.jpg", exif=exif)
    with pytest.raises(ValueError, match=r"images/val/turned.jpg: 20 x 40 pixels, upright, and its mask 40 x 20"):
        open_dataset(f"masks:{root}")


def test_links_are_followed_and_what_is_left_out_is_counted(root):
    write(root, "other", "city/k.png", np.zeros((4, 4), np.uint8))
    for part in ("images", "masks"):
        os.symlink(root / part / "other" / "city", root / part / "train" / "city")
    os.symlink(root / "images" / "train", root / "images" / "train" / "a" / "up")
    (root / "images" / "train" / "notes.txt").touch()
    data = open_dataset(f"masks:{root}")
    assert list(data.train.keys) == [f"images/train/{name}" for name in ("a/c.PNG", "b.jpg", "city/k.png")]
    assert data.report["left_out"] == {
        "train": {"links to a folder that they are in": 1, "no image by its extension: .txt": 1},
        "val": {},
    }


def test_identity_follows_the_masks(root):
    before = open_dataset(f"masks:{root}").test.identity
    os.utime(root / "masks/val/z.png", ns=(0, 0))  # as a write of as many bytes would
    assert open_dataset(f"masks:{root}").test.identity != before


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
