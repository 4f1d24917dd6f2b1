"""Images with a class for each pixel: PATH/images/train/..., PATH/masks/train/... and the same for val."""

import os
from collections.abc import Sequence
from hashlib import sha256
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from aimv2.data.images import MOST_PIXELS, BadImage
from aimv2.evals.datasets.folder import IMAGE_EXTENSIONS, Files
from aimv2.evals.datasets.interface import Dataset, ImageSet, Texts

IGNORED = 255  # a class number: the pixel doesn't count
CLASSES = "classes.txt"


class _Masks(Sequence[Image.Image]):
    """PNG files of class numbers, grey or with a palette, by row."""

    def __init__(self, files: Files):
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> Image.Image:
        """Mode "L". Raises BadImage for what is no such file."""
        data = self.files[row]
        try:
            image = Image.open(BytesIO(data), formats=("PNG",))
            if image.mode not in ("L", "P", "1"):
                raise BadImage(f"a mask of mode {image.mode}: expected a number of 8 bits for each pixel")
            if image.width * image.height > MOST_PIXELS:
                raise BadImage("a mask over 50 megapixels")
            image.load()
            return Image.fromarray(np.asarray(image).astype(np.uint8))
        except BadImage:
            raise
        except Exception as error:  # Pillow raises whatever the damage leads to
            raise BadImage(f"a mask that is undecodable ({type(error).__name__})") from None


def open_masks(where: str, spec: str) -> Dataset:
    """`PATH`: the mask of images/train/a/b.jpg is masks/train/a/b.png, 255 where a pixel doesn't count.

    Classes are the lines of PATH/classes.txt; without it numbers up to the highest in any mask, which are all read.

    Raises:
        ValueError: a folder is missing or has no images, or an image has no mask.
    """
    root = Path(where).expanduser()
    name = root.resolve().name
    train, test = (_split(root, name, split) for split in ("train", "val"))
    if (root / CLASSES).is_file():
        text = (root / CLASSES).read_text(encoding="utf-8")
        classes, noticed = tuple(line.strip() for line in text.splitlines() if line.strip()), CLASSES
    else:
        classes, noticed = tuple(map(str, range(_highest((train, test)) + 1))), "counted in the masks"
    return Dataset(spec=spec, name=name, classes=classes, train=train, test=test, report={"classes": noticed})


def _split(root: Path, name: str, split: str) -> ImageSet:
    folder = root / "images" / split
    if not folder.is_dir():
        raise ValueError(f"{folder}: not a folder")
    found = []
    for here, folders, files in os.walk(folder):
        folders[:] = [each for each in folders if not each.startswith(".")]
        inside = os.path.relpath(here, folder)
        wanted = (file for file in files if file.lower().endswith(IMAGE_EXTENSIONS) and not file.startswith("."))
        found += [os.path.normpath(os.path.join(inside, file)) for file in wanted]
    found.sort()
    masks = [os.path.join("masks", split, os.path.splitext(path)[0] + ".png") for path in found]
    sizes = []
    for path, mask in zip(found, masks, strict=True):
        if not (root / mask).is_file():
            raise ValueError(f"{folder / path}: no mask {root / mask}")
        sizes += [os.path.getsize(folder / path), os.path.getsize(root / mask)]
    keys = Texts(os.path.join("images", split, path) for path in found)
    return ImageSet(
        name=name,
        split=split,
        images=Files(root, keys),
        keys=keys,
        digest=sha256(keys.digest.encode() + np.array(sizes, "<i8").tobytes()).hexdigest(),
        masks=_Masks(Files(root, Texts(masks))),
    )


def _highest(splits: tuple[ImageSet, ImageSet]) -> int:
    highest = 0
    for images in splits:
        for i in range(len(images)):
            try:
                pixels = np.asarray(images.mask(i))
            except BadImage:  # found again, and counted, by whoever reads it
                continue
            highest = max(highest, int(pixels[pixels != IGNORED].max(initial=0)))
    return highest
