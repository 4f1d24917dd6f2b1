"""The folder that is being prepared: one process at a time, no leftovers, errors that name what cannot be written."""

import errno
import fcntl
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FOLDER = "prepared"  # what is known of the shards beside it
COLUMNS, MEASURES = ".columns.parquet", ".measures.parquet"

_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS)
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # some file systems of clusters
_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{12}\.tmp")  # of `whole_file`
_OURS = re.compile(r".+\.tar\.idx|.+\.measures\.parquet|report\.(json|md)|(samples|histograms)\.png|shards\.list")
_OLD = 3600  # seconds after which another command's temporary file is nobody's


class WriteError(OSError):
    """A file cannot be written: no damage of the data, and nothing else could be either."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Errors of the system in here are a `WriteError` of this path."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:  # pyarrow's has a number, and a text of two lines
        raise WriteError(f"{path}: cannot be written: {os.strerror(error.errno) if error.errno else error}") from error


def is_of_writing(error: OSError, read: Path) -> bool:
    """Whether an error came up in writing, where only this file was read."""
    return error.errno in _FULL or (error.filename is not None and os.fspath(error.filename) != os.fspath(read))


@contextmanager
def lock_folder(folder: Path) -> Iterator[bool]:
    """Nobody else prepares the folder meanwhile. False where the file system has no locks.

    Raises:
        ValueError: another process has the lock.
        WriteError: the folder cannot be written.
    """
    path = folder / FOLDER / ".lock"
    with writing(path):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    with open(path, "rb") as file:
        locked = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another prepare is at work here") from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            locked = False
        yield locked


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes have left half written. Only for who has the lock."""
    for place in (folder, folder / FOLDER):
        for entry in os.scandir(place):
            match = _TEMPORARY.fullmatch(entry.name)
            if match and (_OURS.fullmatch(match[1]) or time.time() - entry.stat().st_mtime > _OLD):
                Path(entry).unlink(missing_ok=True)


def find_orphans(folder: Path) -> list[str]:
    """Indices and measures whose tar is gone, relative to the folder."""
    names = set(os.listdir(folder))
    indices = [name for name in names if name.endswith(".tar.idx") and name.removesuffix(".idx") not in names]
    prepared = [name for name in os.listdir(folder / FOLDER) if name.endswith(MEASURES)]
    measures = [f"{FOLDER}/{name}" for name in prepared if f"{name.removesuffix(MEASURES)}.tar" not in names]
    return sorted(n for n in (*indices, *measures) if not Path(n).name.startswith("."))


def shards_with_columns(folder: Path) -> set[str]:
    """The names of the shards that `make_shards.py coyo` wrote columns of."""
    return {name.removesuffix(COLUMNS) + ".tar" for name in os.listdir(folder / FOLDER) if name.endswith(COLUMNS)}
