"""COCO and Flickr30k for retrieval, as Karpathy split them: `dataset_coco.json` and `dataset_flickr30k.json`."""

import json
from pathlib import Path

from aimv2.evals.datasets.files import file_set
from aimv2.evals.datasets.interface import Dataset, Texts

CAPTIONS = 5  # of an image; what is beyond is left out, as in published figures
FOLDERS = {  # where images may be, below the folder of the json; {} stands for what the json says of the image
    "coco": ("{}", "images/{}", ""),
    "flickr30k": ("flickr30k-images", "flickr30k_images", "images", ""),
}
TEST_IMAGES = {"coco": 5000, "flickr30k": 1000}


def open_coco(where: str, spec: str) -> Dataset:
    """`FOLDER` with dataset_coco.json and val2014/: 5000 images of the test split, 5 captions each."""
    return _open("coco", Path(where).expanduser(), spec)


def open_flickr30k(where: str, spec: str) -> Dataset:
    """`FOLDER` with dataset_flickr30k.json and flickr30k-images/: 1000 images of the test split, 5 captions each."""
    return _open("flickr30k", Path(where).expanduser(), spec)


def _open(name: str, root: Path, spec: str) -> Dataset:
    """There is nothing to train on.

    Raises:
        ValueError: the json is missing or another one, an image has no caption, or no folder has the first image.
    """
    path = root / f"dataset_{name}.json"
    try:
        with open(path, encoding="utf-8") as file:
            images = [image for image in json.load(file)["images"] if image["split"] == "test"]
        paths = [(image.get("filepath", ""), image["filename"]) for image in images]
        for part in (part for path in paths for part in path):
            if not isinstance(part, str):
                raise TypeError(f"{part!r} is no name")
        captions = [[sentence["raw"].strip() for sentence in image["sentences"]] for image in images]
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file: it is in Karpathy's caption_datasets.zip") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: not a set of images and sentences ({type(error).__name__}: {error})") from None
    if not images:
        raise ValueError(f"{path}: no image of the split 'test'")
    for (_, file), texts in zip(paths, captions, strict=True):
        if not texts:
            raise ValueError(f"{path}: {file} has no caption")
    keys = _keys(name, root, paths)
    counts = [len(texts) for texts in captions]
    return Dataset(
        spec=spec,
        name=name,
        classes=(),
        train=None,
        test=file_set(
            name,
            "test",
            root,
            keys,
            json.dumps(captions).encode(),
            captions=[texts[:CAPTIONS] for texts in captions],
        ),
        report={
            "images_expected": TEST_IMAGES[name],
            "captions_left_out": sum(max(0, count - CAPTIONS) for count in counts),
            "images_with_fewer_captions": sum(count < CAPTIONS for count in counts),
        },
    )


def _keys(name: str, root: Path, paths: list[tuple[str, str]]) -> Texts:
    """Paths of the images below the root."""
    for folder, file in paths:
        if "/" in file or ".." in Path(folder).parts or Path(folder).is_absolute():
            raise ValueError(f"{root}: image {folder}/{file} is outside the folder")
    tried = []
    for pattern in FOLDERS[name]:
        keys = Texts(str(Path(pattern.format(folder), file)) for folder, file in paths)
        if (root / keys[0]).is_file():
            return keys
        tried.append(keys[0])
    raise ValueError(f"{root}: the first image is none of {', '.join(tried)}")
