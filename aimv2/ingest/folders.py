"""Images in a folder, at any depth, with captions beside them, to jobs for the shard writer.

`a/b.jpg` has its captions in `a/b.txt` (one) and in `a/b.json` ("captions", "caption" or "text"; the rest is kept) or,
without the latter, in the line of a `metadata.jsonl` whose "file_name" leads to it, as Hugging Face's imagefolder has
it; several lines of one image are several captions. What img2dataset writes with --output_format files is such a
folder. Extensions match in either case, names in either form of Unicode (macOS decomposes them), and `b.jpg.txt` is
taken where there is no `b.txt`.
"""

import hashlib
import json
import os
import unicodedata
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
    """An image, and what there is beside it; paths are relative to the folder."""

    path: str
    txt: str | None = None
    json: str | None = None
    lines: str | None = None  # of metadata.jsonl
    stamps: tuple[int, ...] = ()  # size and time of the image, the txt and the json, to see that they are others


@dataclass(slots=True)
class ImageFolder:
    """The images below a folder, sorted: those of a folder before those of the folders in it.

    Args:
        out: where the shards go: neither in the folder nor around it.

    Raises:
        ValueError: it is no folder, or has no image; a metadata.jsonl is a symlink out of it, or has a line that is not
            an object with "file_name".
    """

    root: Path
    packing: Packing
    out: Path | None = None
    images: list[_Found] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)  # files and folders that are left alone, by kind

    def __post_init__(self):
        if not self.root.is_dir():
            raise ValueError(f"{self.root}: not a folder")
        _check_apart(self.root, self.out)
        self.root = self.root.resolve()
        lines: dict[str, tuple[str, str]] = {}  # what every metadata.jsonl so far says, by `_form` of the path
        self._walk("", lines)
        self.images += [_Found(path, lines=text) for _, (path, text) in sorted(lines.items())]  # which say they miss
        if not self.images:
            extensions = ", ".join(IMAGE_EXTENSIONS)
            raise ValueError(f"{self.root}: no file whose extension is one of {extensions}")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def opaque(self) -> dict[str, str]:
        return {"listing": f"the files of {self.root} are others"}

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

    def _walk(self, folder: str, lines: dict[str, tuple[str, str]]) -> None:
        files: dict[str, tuple[int, int]] = {}  # name -> size and time
        folders = []
        with os.scandir(self.root / folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    self.notes["hidden files and folders"] += 1
                elif entry.is_dir(follow_symlinks=False):
                    folders.append(entry.name)
                elif entry.is_symlink() and os.path.isdir(entry.path):  # False for a loop, where the entry's own raises
                    self.notes["symlinks to folders"] += 1
                else:
                    files[entry.name] = _stamp(entry)
        if METADATA in files:
            _add_metadata_lines(lines, self.root, folder)
        used = self._add_images(folder, files, lines)
        for name in files.keys() - used - {METADATA}:
            self.notes[f"other files (.{name.rpartition('.')[2]})" if "." in name else "other files"] += 1
        for name in sorted(folders):
            self._walk(os.path.join(folder, name), lines)

    def _add_images(self, folder: str, files: dict[str, tuple[int, int]], lines: dict[str, tuple[str, str]]) -> set:
        """Take the images of one folder, and return the names of what was used."""
        kinds = {"txt": {}, "json": {}}  # name of a sidecar by the `_form` of what precedes its extension
        for name in sorted(files):
            stem, _, extension = name.rpartition(".")
            if stem and extension.lower() in kinds:
                kinds[extension.lower()][_form(stem)] = name
        used, shared = set(), 0
        for name in sorted(files):
            stem, _, extension = name.rpartition(".")
            if not stem or extension.lower() not in IMAGE_EXTENSIONS:
                continue
            beside = [by.get(_form(stem), by.get(_form(name))) for by in kinds.values()]
            there = {each for each in beside if each}
            shared += not used.isdisjoint(there)
            used |= {name, *there}
            stamps = [n for each in (name, *beside) for n in files.get(each, ())]
            path = os.path.join(folder, name)
            line = lines.pop(_form(path), (path, None))[1]
            paths = (each and os.path.join(folder, each) for each in beside)
            self.images.append(_Found(path, *paths, line, tuple(stamps)))
        if shared:
            self.notes["images that share a txt or json with another"] += shared
        return used


def _check_apart(root: Path, out: Path | None) -> None:
    if out is None:
        return
    inner, outer = root.resolve(), out.resolve()
    if inner == outer or inner in outer.parents or outer in inner.parents:
        raise ValueError(f"{out}: shards cannot go into the folder of their images or one around it, {root}")


def _form(name: str) -> str:
    """One form for names that differ in how Unicode composes their letters only."""
    return unicodedata.normalize("NFC", name)


def _stamp(entry: os.DirEntry) -> tuple[int, int]:
    try:
        status = entry.stat()
    except OSError:  # a symlink to nowhere
        return 0, 0
    return status.st_size, status.st_mtime_ns


def _add_metadata_lines(lines: dict[str, tuple[str, str]], root: Path, folder: str) -> None:
    """Add a folder's metadata.jsonl to {form of an image's path from the root: (that path, its lines)}."""
    path = root / folder / METADATA
    if not path.resolve().is_relative_to(root):
        raise ValueError(f"{path}: a symlink out of {root}")
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                image = os.path.normpath(os.path.join(folder, json.loads(line)["file_name"]))
            except (ValueError, KeyError, TypeError, RecursionError):
                raise ValueError(f'{path}: line {number} is not an object with "file_name"') from None
            text = lines.get(_form(image), (image, ""))[1] + line.rstrip("\n") + "\n"
            lines[_form(image)] = image, text


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
    captions, other = [], {}
    if found.json is not None:
        texts = [read_inside(root, found.json, MOST_TEXT_BYTES, "json sidecar")]
    else:
        texts = found.lines.split("\n")[:-1] if found.lines else []
    for text in texts:
        try:
            record = json.loads(text)
        except (ValueError, RecursionError):
            raise Unusable("a json sidecar that is damaged") from None
        more, rest = split_captions(record if isinstance(record, dict) else {"captions": record})
        captions, other = captions + more, other | rest
    if found.txt is not None:
        captions.insert(0, read_inside(root, found.txt, MOST_TEXT_BYTES, "txt sidecar"))
    return captions, other
