"""Where the features of a split go as they are computed: into files that outlive the process, or into memory.

n images of a split.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from aimv2.evals.session import Session
from aimv2.whole_files import whole_file

CHUNK = 256  # images that are done or not done; a rank takes every world-th chunk
VERSION = 1  # goes up when the same description would give other features

Shapes = dict[str, tuple[int, ...]]  # of one image's features, by name

_DONE = np.dtype([("readable", "?"), ("digest", "<u8")])


@dataclass(slots=True)
class Extracted:
    """Features of a whole split, on every rank.

    arrays: (n, ...) float32 by the view's names, perhaps on disk; rows of images that could not be read are 0.
    readable: (n,) bool. digests: (n,) uint64 of the prepared pixels; equal ones are the same picture to the encoder.
    """

    arrays: dict[str, np.ndarray]
    readable: np.ndarray
    digests: np.ndarray


class MemoryStore:
    """Whole arrays on every rank."""

    def __init__(self, shapes: Shapes, count: int, session: Session):
        self.session = session
        self.arrays = {name: np.zeros((count, *shape), np.float32) for name, shape in shapes.items()}
        self.done = np.zeros(count, _DONE)

    def is_done(self, chunk: range) -> bool:
        """Never before the process began."""
        return False

    def put(
        self, chunk: range, features: dict[str, np.ndarray], readable: Sequence[bool], digests: Sequence[int]
    ) -> None:
        rows = slice(chunk.start, chunk.stop)
        for name, array in features.items():
            self.arrays[name][rows] = array
        self.done["readable"][rows], self.done["digest"][rows] = readable, digests

    def finish(self, chunks: Sequence[range]) -> Extracted:
        """What all ranks have put."""
        arrays = {name: self.session.sum(torch.from_numpy(array)).numpy() for name, array in self.arrays.items()}
        done = self.session.sum(torch.from_numpy(self.done.view(np.uint8))).numpy().view(_DONE)
        return Extracted(arrays, done["readable"].copy(), done["digest"].copy())


class FileStore:
    """Arrays and marks of what is done in `folder`, shared by ranks and by whatever else has the same description.

    The names of arrays and marks have the number of the arrays' creation in them: should the arrays be deleted, or two
    processes create them at once, no mark is taken for that of another array. Chunks are written with ordinary calls,
    which on network file systems leave the neighbours of a row alone, and fail when the disk is full.
    """

    def __init__(self, folder: Path, description: dict, shapes: Shapes, count: int, session: Session):
        self.folder, self.shapes, self.count, self.session = folder, shapes, count, session
        if session.rank == 0:
            self._create(description)
        session.wait()
        self.creation = self._created()

    def is_done(self, chunk: range) -> bool:
        """Whether these rows are there already."""
        return self._mark(chunk).exists()

    def put(
        self, chunk: range, features: dict[str, np.ndarray], readable: Sequence[bool], digests: Sequence[int]
    ) -> None:
        """Whole chunks; the mark comes last."""
        for name, array in features.items():
            with open(self._array(name), "r+b") as file:
                file.seek(-(self.count - chunk.start) * array[0].nbytes, os.SEEK_END)
                file.write(np.ascontiguousarray(array, np.float32))
                file.flush()
                os.fsync(file.fileno())
        done = np.zeros(len(chunk), _DONE)
        done["readable"], done["digest"] = readable, digests
        with whole_file(self._mark(chunk)) as path:
            path.write_bytes(done.tobytes())

    def finish(self, chunks: Sequence[range]) -> Extracted:
        """What all ranks have put."""
        self.session.wait()
        done = np.concatenate([np.frombuffer(self._mark(chunk).read_bytes(), _DONE) for chunk in chunks])
        arrays = {name: np.load(self._array(name), mmap_mode="r") for name in self.shapes}
        return Extracted(arrays, done["readable"].copy(), done["digest"].copy())

    def _create(self, description: dict) -> None:
        """Unless somebody has; what misses an array is begun anew."""
        self.folder.mkdir(parents=True, exist_ok=True)
        found = self._created()
        if found is not None:
            self.creation = found
            if all(self._array(name).exists() for name in self.shapes):
                return
            self._record.unlink()
        self.creation = uuid.uuid4().hex[:12]
        for name, shape in self.shapes.items():
            with open(self._array(name), "wb") as file:
                header = {"descr": "<f4", "fortran_order": False, "shape": (self.count, *shape)}
                np.lib.format.write_array_header_1_0(file, header)
                file.truncate(file.tell() + 4 * self.count * int(np.prod(shape)))
        temporary = self.folder / f".{self.creation}.tmp"
        temporary.write_text(json.dumps({"creation": self.creation, **description}, indent=2))
        try:
            os.link(temporary, self._record)
        except FileExistsError:  # another process was faster
            for name in self.shapes:
                self._array(name).unlink()
        finally:
            temporary.unlink()

    def _created(self) -> str | None:
        return json.loads(self._record.read_text())["creation"] if self._record.exists() else None

    @property
    def _record(self) -> Path:
        return self.folder / "description.json"

    def _array(self, name: str) -> Path:
        return self.folder / f"{name}.{self.creation}.npy"

    def _mark(self, chunk: range) -> Path:
        return self.folder / f"done.{self.creation}.{chunk.start:09d}"


def fingerprint(description: dict | list) -> str:
    """16 hexadecimal digits that tell JSON apart."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]
