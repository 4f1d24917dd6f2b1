"""Images in a folder, at any depth, with captions beside them, to jobs for the shard writer.

`a/b.jpg` has its captions in `a/b.txt` (one) and in `a/b.json` ("captions", "caption" or "text"; the rest is kept) or,
without the latter, in the line of a `metadata.jsonl` whose "file_name" leads to it, as Hugging Face's imagefolder has
it. What img2dataset writes with --output_format files is such a folder.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

from aimv2.data.images import MOST_BYTES, BadImage
from aimv2.data.shard_index import IMAGE_EXTENSIONS
from aimv2.data.shard_writer import Dropped, RawSample, ShardJob
from aimv2.ingest.pairs import (
    MOST_TEXT_BYTES,
    Packing,
    Unusable,
    chunks,
    pack_pair,
    read_inside,
    shard_name,
    split_captions,
)

METADATA = "metadata.jsonl"


class _Found(NamedTuple):
    """An image, and what there is beside it."""

    path: str  # relative to the folder
    txt: bool
    json: bool
    line: str | None  # of metadata.jsonl


@dataclass(slots=True)
class ImageFolder:
    """The images below a folder, sorted: those of a folder before those of the folders in it.

    Raises:
        ValueError: it is no folder, or has no image; a metadata.jsonl is a symlink out of it, or has a line that is not
            an object with "file_name".
    """

    root: Path
    packing: Packing
    except_for: Path | None = None  # a folder that is not looked at: that of the shards, if it is inside
    images: list[_Found] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)  # files and folders that are left alone, by kind

    def __post_init__(self):
        if not self.root.is_dir():
            raise ValueError(f"{self.root}: not a folder")
        self.root = self.root.resolve()
        self.except_for = self.except_for and self.except_for.resolve()
        lines: dict[str, str] = {}  # of every metadata.jsonl so far, by the path of the image
        self._walk("", lines)
        self.images += [_Found(path, False, False, lines[path]) for path in sorted(lines)]  # which say that they miss
        if not self.images:
            extensions = ", ".join(IMAGE_EXTENSIONS)
            raise ValueError(f"{self.root}: no file whose extension is one of {extensions}")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def recipe(self) -> dict:
        listing = hashlib.sha256()
        for found in self.images:
            listing.update(repr(tuple(found)).encode("utf-8", "surrogateescape"))
        return {
            "source": "folder",
            "images": len(self.images),
            "listing": listing.hexdigest(),
            **asdict(self.packing),
        }

    def jobs(self) -> Iterator[ShardJob]:
        size = self.packing.samples_per_shard
        for first, found in chunks(self.images, size):
            read = partial(_read, self.root, found, first, self.packing)
            yield ShardJob(shard_name(first, size), len(found), read)

    def _walk(self, folder: str, lines: dict[str, str]) -> None:
        files, folders = set(), []
        with os.scandir(self.root / folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    self.notes["hidden files and folders"] += 1
                elif entry.is_dir(follow_symlinks=False):
                    if self.root / folder / entry.name != self.except_for:
                        folders.append(entry.name)
                elif entry.is_symlink() and os.path.isdir(entry.path):  # False for a loop, where the entry's own raises
                    self.notes["symlinks to folders"] += 1
                else:
                    files.add(entry.name)
        used = {METADATA} & files
        if used:
            lines |= _metadata_lines(self.root, folder)
        for name in sorted(files):
            stem, _, extension = name.rpartition(".")
            if stem and extension.lower() in IMAGE_EXTENSIONS:
                beside = {f"{stem}.{kind}" for kind in ("txt", "json")} & files
                used |= beside | {name}
                has = (f"{stem}.{kind}" in beside for kind in ("txt", "json"))
                path = os.path.join(folder, name)
                self.images.append(_Found(path, *has, lines.pop(path, None)))
        for name in files - used:
            self.notes[f"other files (.{name.rpartition('.')[2]})" if "." in name else "other files"] += 1
        for name in sorted(folders):
            self._walk(os.path.join(folder, name), lines)


def _metadata_lines(root: Path, folder: str) -> dict[str, str]:
    """The lines of a folder's metadata.jsonl by the path of their image from the root."""
    lines, path = {}, root / folder / METADATA
    if not path.resolve().is_relative_to(root):
        raise ValueError(f"{path}: a symlink out of {root}")
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                lines[os.path.normpath(os.path.join(folder, json.loads(line)["file_name"]))] = line
            except (ValueError, KeyError, TypeError, RecursionError):
                raise ValueError(f'{path}: line {number} is not an object with "file_name"') from None
    return lines


def _read(root: Path, images: list[_Found], first: int, packing: Packing) -> Iterator[RawSample | Dropped]:
    for number, found in enumerate(images, first):
        try:
            image = read_inside(root, found.path, MOST_BYTES, "image")
            captions, other = _beside(root, found)
            yield pack_pair(f"{number:09d}", found.path, image, captions, other, packing)
        except (BadImage, Unusable) as reason:
            yield Dropped(found.path, str(reason))


def _beside(root: Path, found: _Found) -> tuple[list[str | bytes], dict]:
    """The captions of an image, and what else its JSON says."""
    stem = found.path.rpartition(".")[0]
    captions, other = [], {}
    if found.json or found.line is not None:
        text = read_inside(root, f"{stem}.json", MOST_TEXT_BYTES, "json sidecar") if found.json else found.line
        try:
            record = json.loads(text)
        except (ValueError, RecursionError):
            raise Unusable("a json sidecar that is damaged") from None
        captions, other = split_captions(record if isinstance(record, dict) else {"captions": record})
    if found.txt:
        return [read_inside(root, f"{stem}.txt", MOST_TEXT_BYTES, "txt sidecar"), *captions], other
    return captions, other
