"""Images with a class for each pixel: PATH/images/train/..., PATH/masks/train/... and the same for val."""

import os
from collections import Counter
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from aimv2.data.images import MOST_PIXELS, BadImage, EncodedImage
from aimv2.evals.datasets.files import Files, file_set, find_images, stamps
from aimv2.evals.datasets.interface import Dataset, ImageSet, Texts

IGNORED = 255  # a class number: the pixel doesn't count
CLASSES = "classes.txt"

_BITS = 24  # where a PNG says how many a sample has


class _Masks(Sequence[Image.Image]):
    """PNG files of class numbers, grey or with a palette, by row, each for the image of its row."""

    def __init__(self, masks: Files, images: Files):
        self.masks, self.images = masks, images

    def __len__(self) -> int:
        return len(self.masks)

    def __getitem__(self, row: int) -> Image.Image:
        """Mode "L". Raises BadImage for what is no such file; ValueError if its shape is not that of the image."""
        data = self.masks[row]
        try:
            image = Image.open(BytesIO(data), formats=("PNG",))
            if image.mode not in ("L", "P", "1"):
                raise BadImage(f"a mask of mode {image.mode}: expected a number of 8 bits for each pixel")
            if image.width * image.height > MOST_PIXELS:
                raise BadImage("a mask over 50 megapixels")
            image.load()
        except BadImage:
            raise
        except Exception as error:  # Pillow raises whatever the damage leads to
            raise BadImage(f"a mask that is undecodable ({type(error).__name__})") from None
        numbers = np.asarray(image).astype(np.uint8)
        if image.mode == "L" and data[_BITS] < 8:  # Pillow has made light of them: 3 of 2 bits is 255
            numbers //= 255 // (2 ** data[_BITS] - 1)
        self._check_shape(row, *image.size)
        return Image.fromarray(numbers)

    def _check_shape(self, row: int, width: int, height: int) -> None:
        """A mask may be smaller or larger, not turned or cut: patches would get the classes of others."""
        try:
            across, down = EncodedImage(self.images[row], min_size=1).size
        except BadImage:  # found again, and counted, by whoever reads it
            return
        if abs(across * height - down * width) > across + down:  # sides are rounded by less than a pixel
            raise ValueError(
                f"{self.images.paths[row]}: {across} x {down} pixels, upright, and its mask {width} x {height}"
            )


def open_masks(where: str, spec: str) -> Dataset:
    """`PATH`: the mask of images/train/a/b.jpg is masks/train/a/b.png, 255 where a pixel doesn't count.

    Classes are the lines of PATH/classes.txt; without it numbers up to the highest in any mask, which are all read. A
    copy of the folder is the same set if it has kept the times of the files.

    Raises:
        ValueError: a folder is missing or has no images, an image has no mask, or one of another shape.
    """
    root = Path(where).expanduser()
    name = root.resolve().name
    left_out: dict[str, Counter[str]] = {"train": Counter(), "val": Counter()}
    train, test = (_split(root, name, split, counts) for split, counts in left_out.items())
    if (root / CLASSES).is_file():
        text = (root / CLASSES).read_text(encoding="utf-8")
        classes, noticed = tuple(line.strip() for line in text.splitlines() if line.strip()), CLASSES
    else:
        classes, noticed = tuple(map(str, range(_highest((train, test)) + 1))), "counted in the masks"
    report = {"classes": noticed, "left_out": {split: dict(sorted(c.items())) for split, c in left_out.items()}}
    return Dataset(spec=spec, name=name, classes=classes, train=train, test=test, report=report)


def _split(root: Path, name: str, split: str, left_out: Counter[str]) -> ImageSet:
    folder = root / "images" / split
    if not folder.is_dir():
        raise ValueError(f"{folder}: not a folder")
    found = sorted(find_images(root, f"images/{split}", left_out))
    masks = [f"masks{os.path.splitext(path)[0].removeprefix('images')}.png" for path in found]
    for path, mask in zip(found, masks, strict=True):
        if not (root / mask).is_file():
            raise ValueError(f"{root / path}: no mask {root / mask}")
    keys, beside = Texts(found), stamps(root, masks).tobytes()
    return file_set(name, split, root, keys, beside, masks=_Masks(Files(root, Texts(masks)), Files(root, keys)))


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
