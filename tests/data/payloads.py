"""What would run code if it were unpickled, parsed or passed to a shell, and what shows that it was not.

Every payload makes one folder, the canary.
"""

import os
import pickle
import stat
from pathlib import Path


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def fires(canary: Path) -> bool:
    """Whether it has, and it is put back."""
    fired = canary.exists()
    if fired:
        canary.rmdir()
    return fired


def shell(canary: Path) -> str:
    return f"mkdir {canary}"


def yaml(canary: Path) -> str:
    return f"!!python/object/apply:os.mkdir ['{canary}']"


def snapshot(folder: Path) -> dict[str, tuple]:
    found = {}
    for path in sorted(folder.rglob("*")):
        info = path.lstat()
        contents = path.read_bytes() if stat.S_ISREG(info.st_mode) else b""
        found[str(path.relative_to(folder))] = (info.st_mode, contents)
    return found


JSONS = {
    "nested": b'{"caption":' + b"[" * 100_000,
    "nested objects": b'{"caption":' * 50_000,
    "a number of a million digits": b'{"caption":' + b"9" * 1_000_000 + b"}",
    "a number": b'{"caption": 1e999}',
    "not a number": b'{"caption": NaN}',
    "null": b'{"caption": null}',
    "an object": b'{"caption": {"__class__": "os.mkdir"}}',
    "an empty list": b'{"caption": []}',
    "a list of numbers": b'{"caption": ["a red circle", 1]}',
    "a list": b'["caption"]',
    "a string": b'"caption"',
    "nothing": b"",
    "zeros": bytes(1000),
    "not utf-8": b'{"caption": "\xff\xfe"}',
    "cut off": b'{"caption": "a red',
    "a pickle": pickle.dumps({"caption": "a red circle"}),
    "yaml": b"caption: !!python/object/apply:os.getcwd []",
}
