"""A folder of blocks of bounded size, shared by the processes of one machine; the least recently used go first.

An entry is its data followed by the crc32 of each PAGE of them, little-endian: what a disk damages is found, at the
price of reading a page. Every file that is going to exist is added to a total, at its full size and under a lock,
before it does, so the sizes of all files together never exceed the limit, however many processes write. (A file that
is open or mapped when it is evicted keeps its room until it is closed.) Entries become visible by a rename, so no
reader sees half of one. Locks are of flock: the folder must be on a local disk.
"""

import fcntl
import logging
import os
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from aimv2.data.tar import ShardError

logger = logging.getLogger(__name__)

PAGE = 1 << 16
LOCKS = 256  # files that names are hashed onto
PATIENCE = 60  # seconds to wait for a lock
_DIGITS = 20


class BlockCache:
    """Named bytes on disk.

    Args:
        folder: made if missing; nothing else may be kept in it.
        limit: bytes of all files. Where it would be exceeded, entries go until a tenth of it is free.

    Raises:
        ShardError: the folder can't be written.
    """

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = folder, limit
        self._locks = folder / "locks"
        try:
            self._locks.mkdir(parents=True, exist_ok=True)
            with open(self._locks / "total", "ab"):
                pass
        except OSError as error:
            raise ShardError(f"{folder}: not usable as a cache: {error.strerror}") from error

    def read(self, name: str, length: int, begin: int = 0, end: int | None = None) -> bytes | None:
        """Bytes begin:end of an entry of `length` bytes; None if it is not there, or damaged where it was read."""
        end = length if end is None else end
        first, last = begin // PAGE, -(-end // PAGE)
        try:
            with open(self.folder / name, "rb", buffering=0) as file:
                os.utime(file.fileno())  # this is the time of use
                found = os.fstat(file.fileno()).st_size
                data = os.pread(file.fileno(), min(last * PAGE, length) - first * PAGE, first * PAGE)
                crcs = os.pread(file.fileno(), 4 * (last - first), length + 4 * first)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ShardError(f"{self.folder}: cannot be used as a cache: {error.strerror}") from error
        if found != length + 4 * -(-length // PAGE) or crcs != _page_crcs(data):
            logger.warning("%s: damaged, so it is fetched anew", self.folder / name)
            return None
        return data[begin - first * PAGE : end - first * PAGE]

    def write(self, name: str, data: bytes) -> None:
        """Add or replace an entry.

        Raises:
            ShardError: it is larger than the cache, or the disk is full or fails.
        """
        if not self._place(name, data, _page_crcs(data)):
            logger.warning("%s: too small: an entry was evicted while it was written", self.folder)

    def read_copy(self, name: str) -> Path | None:
        """Where the file of `write_copy` is; None if it is not there, or damaged."""
        path, crc = self.folder / name, self.read(f"{name}.crc32", 4)
        try:
            if crc is not None and struct.pack("<I", zlib.crc32(path.read_bytes())) == crc:
                os.utime(path)
                return path
        except FileNotFoundError:
            return None
        return None

    def write_copy(self, name: str, data: bytes) -> Path:
        """Add a file of just these bytes, to be mapped into memory; errors as in `write`."""
        self.write(f"{name}.crc32", struct.pack("<I", zlib.crc32(data)))
        if not self._place(name, data):
            raise ShardError(f"{self.folder}: too small: a file was evicted while it was written")
        return self.folder / name

    def fetching(self, name: str) -> AbstractContextManager:
        """A context in which only one process fetches an entry; few names share it with others."""
        return _lock(self._locks / str(zlib.crc32(name.encode()) % LOCKS))

    def _place(self, name: str, *parts: bytes) -> bool:
        """Whether it is there then: where the cache is hardly larger than what is being written, that may go too."""
        size = sum(len(part) for part in parts)
        if size > self.limit:
            raise ShardError(f"{self.folder}: {size} bytes are more than all that this cache may hold, {self.limit}")
        temporary = self.folder / f"{name}.{os.getpid()}.{threading.get_ident()}.tmp"
        try:
            with self._reserve(temporary, size) as file:
                file.writelines(parts)
            with _lock(self._locks / "total"):  # no rename during a scan, which could miss it
                os.replace(temporary, self.folder / name)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise ShardError(f"{self.folder}: cannot cache {size} bytes: {error.strerror}") from error
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def _reserve(self, path: Path, size: int) -> BinaryIO:
        """A new file that has its final size from the beginning."""
        with _lock(self._locks / "total") as counter:
            counter.seek(0)
            digits = counter.read()
            total = int(digits) if len(digits) == _DIGITS and digits.isdigit() else self.limit
            if total + size > self.limit:
                total = self._evict(self.limit * 9 // 10 - size)
            counter.truncate(0)
            counter.write(f"{total + size:0{_DIGITS}}".encode())
            counter.flush()
            file = open(path, "wb")  # noqa: SIM115 (the caller closes it)
            try:
                file.truncate(size)
            except OSError:
                file.close()
                raise
        return file

    def _evict(self, target: int) -> int:
        """Remove files, least recently used first, until `target` bytes are left; returns how many are."""
        found = []  # (time of use, size, path)
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # who fails to write takes its temporary file away
                    stat = entry.stat()
                    found += [(stat.st_mtime_ns, stat.st_size, entry.path)] if entry.is_file() else []
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= target:
                break
            Path(path).unlink(missing_ok=True)
            total -= size
        return total


@contextmanager
def _lock(path: Path) -> Iterator[BinaryIO]:
    """Hold a lock file, which the end of a process frees.

    After PATIENCE it goes on without: a process that was stopped must not stop all. Then a block may be fetched twice,
    or the cache be one block too large until it is scanned next.
    """
    deadline, wait = time.monotonic() + PATIENCE, 0.001
    with open(path, "a+b") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    logger.warning("%s: held by another process for %d s, going on without", path, PATIENCE)
                    break
            time.sleep(wait)
            wait = min(2 * wait, 0.005)
        yield file


def _page_crcs(data: bytes) -> bytes:
    """4 bytes for each page."""
    view = memoryview(data)
    return b"".join(struct.pack("<I", zlib.crc32(view[at : at + PAGE])) for at in range(0, len(data), PAGE))
