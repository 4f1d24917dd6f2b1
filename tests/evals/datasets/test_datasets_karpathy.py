import json
import os
import shutil

import pytest
from PIL import Image

from aimv2.data.images import BadImage
from aimv2.evals.datasets import open_dataset

RECORDS = [
    {"filepath": "val2014", "filename": "COCO_1.png", "split": "test", "texts": [" A dog .", "b", "c", "d", "e", "f"]},
    {"filepath": "train2014", "filename": "COCO_2.png", "split": "restval", "texts": ["no"]},
    {"filepath": "val2014", "filename": "COCO_3.png", "split": "test", "texts": ["A cat", "two\n", "3", "4"]},
    {"filepath": "val2014", "filename": "COCO_4.png", "split": "val", "texts": ["no"]},
]


def write(root, name, images, records=RECORDS):
    """In the words of Karpathy's files; `images` is the folder of the images."""
    listed = [
        {k: v for k, v in r.items() if k not in ("texts", *(["filepath"] if name == "flickr30k" else []))}
        | {"sentences": [{"raw": text, "tokens": text.split()} for text in r["texts"]]}
        for r in records
    ]
    root.mkdir(exist_ok=True)
    (root / f"dataset_{name}.json").write_text(json.dumps({"images": listed, "dataset": name}))
    for number, record in enumerate(records[:1]):
        folder = root / images.format(record["filepath"])
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 7), (number, 0, 0)).save(folder / record["filename"])
    return root


@pytest.mark.parametrize(
    ("name", "images"),
    [
        ("coco", "{}"),
        ("coco", "images/{}"),
        ("coco", "."),
        ("flickr30k", "flickr30k-images"),
        ("flickr30k", "flickr30k_images"),
        ("flickr30k", "images"),
        ("flickr30k", "."),
    ],
)
def test_the_test_split_and_its_first_five_captions(tmp_path, name, images):
    data = open_dataset(f"{name}:{write(tmp_path, name, images)}")
    folder = "" if images == "." else images.format("val2014") + "/"
    assert list(data.test.keys) == [f"{folder}COCO_1.png", f"{folder}COCO_3.png"]
    assert list(data.test.captions) == [["A dog .", "b", "c", "d", "e"], ["A cat", "two", "3", "4"]]
    assert data.train is None and data.classes == () and data.test.labels is None and data.name == name
    assert data.report == {
        "images_expected": {"coco": 5000, "flickr30k": 1000}[name],
        "captions_left_out": 1,
        "images_with_fewer_captions": 1,
    }
    assert data.test.image(0).size == (9, 7)
    with pytest.raises(BadImage, match="no such file"):
        data.test.image(1)


def test_captions_are_part_of_the_identity(tmp_path):
    first = open_dataset(f"coco:{write(tmp_path / 'a', 'coco', '{}')}").test.identity
    records = [RECORDS[0] | {"texts": ["other"]}, *RECORDS[1:]]
    assert open_dataset(f"coco:{write(tmp_path / 'b', 'coco', '{}', records)}").test.identity != first
    moved = shutil.copytree(tmp_path / "a", tmp_path / "c")  # with the times
    assert open_dataset(f"coco:{moved}").test.identity == first
    os.utime(moved / "val2014" / "COCO_1.png", ns=(0, 0))
    assert open_dataset(f"coco:{moved}").test.identity != first


def test_files_that_are_refused(tmp_path):
    def opened(record=None, text=None):
        write(tmp_path, "coco", "{}", [RECORDS[0] | (record or {})])
        if text is not None:
            (tmp_path / "dataset_coco.json").write_text(text)
        return open_dataset(f"coco:{tmp_path}")

    with pytest.raises(ValueError, match=r"dataset_coco.json: no such file: it is in Karpathy's caption_datasets.zip"):
        open_dataset(f"coco:{tmp_path}")
    for text in ("{", "[]", '{"images": [{"split": "test"}]}', '{"images": [1]}', '{"images": {"a": 1}}'):
        with pytest.raises(ValueError, match="not a set of images and sentences"):
            opened(text=text)
    with pytest.raises(ValueError, match=r"not a set of images and sentences .*5 is no name"):
        opened(text='{"images": [{"split": "test", "filename": 5, "sentences": []}]}')
    with pytest.raises(ValueError, match="no image of the split 'test'"):
        opened({"split": "val"})
    with pytest.raises(ValueError, match=r"COCO_1.png has no caption"):
        opened({"texts": []})
    (tmp_path / "val2014" / "COCO_1.png").unlink()
    (tmp_path / "dataset_coco.json").unlink()
    write(tmp_path, "coco", "elsewhere")
    with pytest.raises(
        ValueError, match=r"the first image is none of val2014/COCO_1.png, images/val2014/COCO_1.png, COCO_1.png"
    ):
        open_dataset(f"coco:{tmp_path}")


@pytest.mark.parametrize("place", [("..", "a.png"), ("/etc", "a.png"), ("val2014", "../../a.png")])
def test_no_image_is_outside_the_folder(tmp_path, place):
    record = RECORDS[0] | dict(zip(("filepath", "filename"), place, strict=True))
    image = {key: value for key, value in record.items() if key != "texts"} | {"sentences": [{"raw": "a"}]}
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": [image]}))
    with pytest.raises(ValueError, match="is outside the folder"):
        open_dataset(f"coco:{tmp_path}")
