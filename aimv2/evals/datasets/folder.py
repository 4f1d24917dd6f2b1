"""Classes as folders, as torchvision's ImageFolder has them: PATH/train/CLASS/..., PATH/val/CLASS/..."""

import errno
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import numpy as np

from aimv2.data.images import MOST_BYTES, BadImage
from aimv2.evals.datasets.interface import Dataset, ImageSet, Texts
from aimv2.evals.datasets.labels import check_seen

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # ImageFolder's
TEST_NAMES = ("val", "test", "validation")


class Files(Sequence[bytes]):
    """The bytes of files below a folder, by row."""

    def __init__(self, root: Path | str, paths: Sequence[str]):
        self.root, self.paths = str(root), paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> bytes:
        """Raises BadImage for a file that is not there or not to be read; OSError if the disk fails."""
        return read_file(os.path.join(self.root, self.paths[row]))


def read_file(path: str | Path) -> bytes:
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would wait for ever
    except (FileNotFoundError, NotADirectoryError):
        raise BadImage("no such file") from None
    except PermissionError:
        raise BadImage("no permission to read it") from None
    except OSError as error:
        if error.errno == errno.ELOOP:  # links in a circle
            raise BadImage("no such file") from None
        raise
    with open(file, "rb") as opened:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise BadImage("not a file")
        return opened.read(MOST_BYTES + 1)  # the decoder refuses more


def open_folder(path: str | Path, spec: str) -> Dataset:
    """PATH/train and one of PATH/val, PATH/test and PATH/validation; without train, for zero-shot evaluation only.

    Classes, labels and the order of images are ImageFolder's on PATH/train, except that hidden files and folders are
    left out. Links are followed, but not round in circles. Whether an image can be read shows when it is read; those of
    formats that we don't read (TIFF, PPM) can't.

    Raises:
        ValueError: no such folder, no or several test folders, no images, or a class to test that train has not.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        raise ValueError(f"{root}: not a folder")
    found = [name for name in TEST_NAMES if (root / name).is_dir()]
    if len(found) != 1:
        raise ValueError(f"{root}: found {', '.join(found) or 'none'} of {', '.join(TEST_NAMES)}: expected exactly one")
    test = _Listing(root, found[0])
    train = _Listing(root, "train") if (root / "train").is_dir() else None
    classes = (train or test).classes
    check_seen(spec, set(test.classes), classes)
    name = root.resolve().name
    listings = {"train": train, found[0]: test} if train else {found[0]: test}
    return Dataset(
        spec=spec,
        name=name,
        classes=tuple(classes),
        train=train and train.image_set(name, classes),
        test=test.image_set(name, classes),
        report={"left_out": {split: dict(sorted(listing.left_out.items())) for split, listing in listings.items()}},
    )


@dataclass
class _Listing:
    """The images of one split, and what else is there."""

    root: Path
    split: str
    classes: list[str] = field(init=False)
    left_out: Counter[str] = field(default_factory=Counter)
    counts: list[int] = field(default_factory=list)  # images of each class
    sizes: list[np.ndarray] = field(default_factory=list)  # in bytes, of each class's images
    paths: Texts = field(init=False)  # from the root, "/" between their parts

    def __post_init__(self):
        self.classes = self._find_classes()
        self.paths = Texts(self._find_images())

    def image_set(self, name: str, classes: Sequence[str]) -> ImageSet:
        numbers = {each: number for number, each in enumerate(classes)}
        sizes = np.concatenate([*self.sizes, np.empty(0, np.int64)])
        return ImageSet(
            name=name,
            split=self.split,
            images=Files(self.root, self.paths),
            keys=self.paths,
            digest=sha256(self.paths.digest.encode() + sizes.tobytes()).hexdigest(),
            labels=np.repeat([numbers[each] for each in self.classes], self.counts).astype(np.int64),
        )

    def _find_classes(self) -> list[str]:
        classes = []
        for entry in os.scandir(self.root / self.split):
            if entry.name.startswith("."):
                self.left_out["hidden"] += 1
            elif _is_folder(entry):
                classes.append(entry.name)
            else:
                self.left_out["outside the classes' folders"] += 1
        return sorted(classes)

    def _find_images(self) -> Iterator[str]:
        """Paths in the order of ImageFolder: by class, folder and name. Notes how many and how large they are."""
        top = (self.root / self.split).resolve()
        above = tuple(_identity(folder) for folder in (top, *top.parents))
        for each in self.classes:
            folders: list[tuple[str, list[tuple[str, int]]]] = []
            self._walk(f"{self.split}/{each}", above, folders)
            self.sizes.append(np.array([size for _, files in sorted(folders) for _, size in files], np.int64))
            self.counts.append(len(self.sizes[-1]))
            for folder, files in sorted(folders):
                for name, _ in files:
                    yield f"{folder}/{name}"

    def _walk(self, folder: str, above: tuple[tuple[int, int], ...], folders: list) -> None:
        """Add (folder, its (image, size) sorted) of a folder and of those below it."""
        here = _identity(self.root / folder)
        if here in above:
            self.left_out["links to a folder that they are in"] += 1
            return
        images = []
        for entry in os.scandir(self.root / folder):
            if entry.name.startswith("."):
                self.left_out["hidden"] += 1
            elif _is_folder(entry):
                self._walk(f"{folder}/{entry.name}", (*above, here), folders)
            elif entry.name.lower().endswith(IMAGE_EXTENSIONS):
                images.append((entry.name, _size(entry)))
            else:
                extension = os.path.splitext(entry.name)[1].lower()
                self.left_out[f"no image by its extension: {extension or 'none'}"] += 1
        folders.append((folder, sorted(images)))


def _identity(folder: Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _is_folder(entry: os.DirEntry) -> bool:
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()  # a link to itself raises in `is_dir`


def _size(entry: os.DirEntry) -> int:
    try:
        return entry.stat().st_size
    except OSError:  # a link to nowhere: an image that can't be read
        return -1
