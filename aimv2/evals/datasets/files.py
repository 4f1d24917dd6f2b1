"""Image files below a folder: which there are, their bytes, and what stands for their contents. n files."""

import errno
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from aimv2.data.images import MOST_BYTES, BadImage
from aimv2.evals.datasets.interface import ImageSet, Texts

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # ImageFolder's


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
    except OSError as error:
        if reason := why_unreadable(error):
            raise BadImage(reason) from None
        raise
    with open(file, "rb") as opened:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise BadImage("not a file")
        return opened.read(MOST_BYTES + 1)  # the decoder refuses more


def why_unreadable(error: OSError) -> str | None:
    """What is wrong with the file; None if it is the disk that fails."""
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):  # links in a circle
        return "no such file"
    return "no permission to read it" if error.errno in (errno.EACCES, errno.EPERM) else None


def find_images(root: Path, folder: str, left_out: Counter[str]) -> Iterator[str]:
    """Paths from the root of the images in a folder and below, in the order of ImageFolder: by folder, then by name.

    Links are followed, but not round in circles. What is not taken is counted in `left_out`.
    """
    parent = (root / folder).parent.resolve()
    found: list[tuple[str, list[str]]] = []
    _walk(root, folder, tuple(map(_inode, (parent, *parent.parents))), found, left_out)
    for here, names in sorted(found):
        for name in sorted(names):
            yield f"{here}/{name}"


def _walk(root: Path, folder: str, above: tuple[tuple[int, int], ...], found: list, left_out: Counter[str]) -> None:
    """Add (folder, its images) of a folder and of those below it."""
    here = _inode(root / folder)
    if here in above:
        left_out["links to a folder that they are in"] += 1
        return
    images = []
    for entry in os.scandir(root / folder):
        if entry.name.startswith("."):
            left_out["hidden"] += 1
        elif is_folder(entry):
            _walk(root, f"{folder}/{entry.name}", (*above, here), found, left_out)
        elif entry.name.lower().endswith(IMAGE_EXTENSIONS):
            images.append(entry.name)
        else:
            extension = os.path.splitext(entry.name)[1].lower()
            left_out[f"no image by its extension: {extension or 'none'}"] += 1
    found.append((folder, images))


def _inode(folder: Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def is_folder(entry: os.DirEntry) -> bool:
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()  # a link to itself raises in `is_dir`


def stamps(root: Path | str, paths: Sequence[str]) -> np.ndarray:
    """(n, 2) int64: bytes, and ns of the last change, of files below the root; -1 for one that is not there.

    They stand for the contents, for to read these would take hours. A copy that has lost the times counts as changed.
    """
    found = np.full((len(paths), 2), -1, "<i8")
    for row, path in enumerate(paths):
        try:
            status = os.stat(os.path.join(root, path))
        except OSError:  # an image that can't be read
            continue
        found[row] = status.st_size, status.st_mtime_ns
    return found


def file_set(name: str, split: str, root: Path | str, keys: Texts, beside: bytes = b"", **columns: Any) -> ImageSet:
    """The images in the files `keys` below the root; their `stamps` are part of its identity.

    Args:
        beside: what else stands for the contents of the set.
        columns: what else ImageSet takes.

    Raises:
        ValueError: none of the files is there.
    """
    found = stamps(root, keys)
    if len(keys) and (found < 0).all():
        raise ValueError(f"{name} {split}: none of {len(keys)} images is there, from {os.path.join(root, keys[0])} on")
    return ImageSet(
        name=name,
        split=split,
        images=Files(root, keys),
        keys=keys,
        digest=sha256(keys.digest.encode() + found.tobytes() + beside).hexdigest(),
        **columns,
    )
