"""A folder that can prove it is whole: MANIFEST.json lists the size and sha256 of every file in it, and its own."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

NAME = "MANIFEST.json"
Files = dict[str, dict[str, Any]]  # path below the folder, with "/" -> {"size": bytes, "sha256": hex}


class DamagedError(ValueError):
    """The folder is not as its manifest says; the message names the file."""


def seal(path: Path) -> dict[str, Any]:
    """Forces a file to the disk; returns its {"size", "sha256"}."""
    sync(path)
    return _measure(path)


def write(folder: Path, contents: dict[str, Any], files: Files) -> None:
    """Seals the files in `folder` that are not in `files` yet, then writes `contents` and all of them as the manifest.

    On return everything is on the disk, folders included. `contents` is JSON data without "files" and "sha256".
    Raises OSError, also if a file in `files` is missing here or has another size.
    """
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    for name, record in files.items():
        if name not in paths or paths[name].stat().st_size != record["size"]:
            raise OSError(f"{folder / name} is not as the rank that wrote it saw it; do all ranks share this folder?")
    files = {name: files.get(name) or seal(path) for name, path in paths.items()}
    with open(folder / NAME, "w", encoding="utf-8") as file:
        file.write(_render({**contents, "files": files}))
    sync(folder / NAME)
    for path in [*folder.rglob("*"), folder]:
        if path.is_dir():
            sync(path)


def read(folder: Path) -> dict[str, Any]:
    """The manifest's contents, after checking every file against it; DamagedError if anything is amiss.

    Files that the manifest does not know are passed over.
    """
    try:
        text = (folder / NAME).read_bytes().decode()
        manifest = json.loads(text)
        manifest.pop("sha256")
        if _render(manifest) != text:
            raise DamagedError(f"{NAME} was changed")
        with ThreadPoolExecutor(8) as pool:  # sha256 releases the interpreter lock
            found = dict(
                zip(manifest["files"], pool.map(_measure, map(folder.joinpath, manifest["files"])), strict=True)
            )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise error if isinstance(error, DamagedError) else DamagedError(f"{type(error).__name__}: {error}") from error
    for name, record in manifest["files"].items():
        for what in ("size", "sha256"):
            if found[name][what] != record[what]:
                raise DamagedError(f"{name}: expected {what} {record[what]}, got {found[name][what]}")
    return manifest


def sync(path: Path) -> None:
    """fsync of a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _measure(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}


def _render(manifest: dict[str, Any]) -> str:
    """The one text of a manifest, with the sha256 of itself, so that a change of any byte shows."""
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return json.dumps({**manifest, "sha256": digest}, sort_keys=True, indent=1) + "\n"
