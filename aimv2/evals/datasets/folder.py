"""Classes as folders, as torchvision's ImageFolder has them: PATH/train/CLASS/..., PATH/val/CLASS/..."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from aimv2.evals.datasets.files import file_set, find_images, is_folder
from aimv2.evals.datasets.interface import Dataset, ImageSet, Texts
from aimv2.evals.datasets.labels import check_seen

TEST_NAMES = ("val", "valid", "validation", "test")
_OUTSIDE = "outside the classes' folders"


def open_folder(where: str | Path, spec: str, test: str | None = None) -> Dataset:
    """`PATH[@SPLIT]`: trained on PATH/train, tested on PATH/SPLIT; without SPLIT, on the one of TEST_NAMES there is.

    Without train, for zero-shot evaluation only. Classes, labels and the order of images are ImageFolder's on
    PATH/train, except that hidden files and folders are left out. Links are followed, but not round in circles. Whether
    an image can be read shows when it is read; those of formats that we don't read (TIFF, PPM) can't. A copy of the
    folder is the same set if it has kept the times of the files.

    Args:
        test: SPLIT, where the path has none.

    Raises:
        ValueError: no such folder, no or several test folders, no images, or a class to test that train has not.
    """
    root, test = _parse(str(where), test)
    found = [name for name in TEST_NAMES if (root / name).is_dir()]
    if test is None:
        if len(found) != 1:
            choice = f": folder:PATH@{found[0]} takes {found[0]}, for example" if found else ""
            raise ValueError(
                f"{root}: found {', '.join(found) or 'none'} of {', '.join(TEST_NAMES)}: expected exactly one{choice}"
            )
        test = found[0]
    elif test == "train" or not (root / test).is_dir():
        raise ValueError(f"{root}: no folder {test} to test on: found {', '.join(found) or 'none'}")
    splits = ("train", test) if (root / "train").is_dir() else (test,)
    listings = {split: _Listing(root, split) for split in splits}
    classes = listings[splits[0]].classes
    check_seen(spec, set(listings[test].classes), classes)
    name = root.resolve().name
    sets = {split: listing.image_set(name, classes) for split, listing in listings.items()}
    left_out = {split: dict(sorted(listing.left_out.items())) for split, listing in listings.items()}
    return Dataset(
        spec=spec,
        name=name,
        classes=tuple(classes),
        train=sets.get("train"),
        test=sets[test],
        report={"left_out": left_out, "unused": [each for each in found if each != test]},
    )


def _parse(where: str, test: str | None) -> tuple[Path, str | None]:
    """The folder, and the split after the last @, unless that is a part of the folder's name."""
    path, at, split = where.rpartition("@")
    if at and split and "/" not in split and not Path(where).expanduser().is_dir():
        where, test = path, split
    root = Path(where).expanduser()
    if not root.is_dir():
        raise ValueError(f"{root}: not a folder")
    return root, test


@dataclass
class _Listing:
    """The images of one split, and what else is there."""

    root: Path
    split: str
    classes: list[str] = field(init=False)
    left_out: Counter[str] = field(default_factory=Counter)
    counts: list[int] = field(default_factory=list)  # images of each class
    paths: Texts = field(init=False)  # from the root, "/" between their parts

    def __post_init__(self):
        self.classes = self._find_classes()
        self.paths = Texts(self._find_images())
        if not len(self.paths):
            where, outside = self.root / self.split, self.left_out[_OUTSIDE]
            raise ValueError(
                f"{where}: no images in folders of classes, {outside} files beside these: expected CLASS/IMAGE"
            )

    def image_set(self, name: str, classes: Sequence[str]) -> ImageSet:
        numbers = {each: number for number, each in enumerate(classes)}
        labels = np.repeat([numbers[each] for each in self.classes], self.counts).astype(np.int64)
        return file_set(name, self.split, self.root, self.paths, labels=labels)

    def _find_classes(self) -> list[str]:
        classes = []
        for entry in os.scandir(self.root / self.split):
            if entry.name.startswith("."):
                self.left_out["hidden"] += 1
            elif is_folder(entry):
                classes.append(entry.name)
            else:
                self.left_out[_OUTSIDE] += 1
        return sorted(classes)

    def _find_images(self) -> Iterator[str]:
        """In the order of ImageFolder, by class; notes how many there are of each."""
        for each in self.classes:
            paths = list(find_images(self.root, f"{self.split}/{each}", self.left_out))
            self.counts.append(len(paths))
            yield from paths
