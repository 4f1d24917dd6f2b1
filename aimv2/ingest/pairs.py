"""An image and its captions as a source has them, to the members of a sample: bytes as they are, captions raw.

`KEY.jpg` (or what the image is, whatever its file was called), `KEY.txt` with the first usable caption, and `KEY.json`
with "source" (where the sample comes from), "captions" (all usable ones) and whatever else the source says. Captions
are cleaned when they are read; here one counts as usable if cleaning would leave something of it.
"""

import json
import math
import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aimv2.data.images import image_format
from aimv2.data.shard_writer import RawSample
from aimv2.data.tokenizer import clean_caption

MOST_TEXT_BYTES = 1 << 20  # of a sidecar
SAMPLES_PER_SHARD = 10_000
CAPTION_KEYS = ("captions", "caption", "text")  # of a JSON sidecar or a line of metadata.jsonl; the first there is

_EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp"}


class Unusable(ValueError):
    """A sample that cannot be written. The message is a reason of a few words, without numbers."""


@dataclass(slots=True, kw_only=True)
class Packing:
    """How samples are packed, whatever their source."""

    samples_per_shard: int = SAMPLES_PER_SHARD  # candidates; fewer are left
    allow_no_caption: bool = False

    def __post_init__(self):
        if self.samples_per_shard < 1:
            raise ValueError(f"samples_per_shard is {self.samples_per_shard}, expected at least 1")


def pack_pair(
    key: str, source: str, image: bytes, captions: Sequence[str | bytes], other: dict[str, Any], packing: Packing
) -> RawSample:
    """The members of one sample.

    Args:
        other: goes into the JSON. What JSON has no form for becomes a string, NaN and infinity null; an own "source"
            or "captions" is called "original_source" or "original_captions".

    Raises:
        BadImage: the header is not of an image that training would use.
        Unusable: no caption is left, and one is needed; or `other` is nested too deeply.
    """
    extension = _EXTENSIONS[image_format(image)]
    texts = {c.decode("utf-8", "replace") if isinstance(c, bytes) else c: c for c in reversed(captions)}
    usable = [text for text in reversed(texts) if clean_caption(text)]
    if not usable and not packing.allow_no_caption:
        raise Unusable("no caption" if not captions else "no caption after cleaning")
    members = {extension: image}
    if usable:
        first = texts[usable[0]]
        members["txt"] = first if isinstance(first, bytes) else first.encode("utf-8", "surrogatepass")
    ours = {"source": source, "captions": usable}
    theirs = {f"original_{name}" if name in ours else name: value for name, value in other.items()}
    try:
        members["json"] = json.dumps(_plain(ours | theirs), separators=(",", ":")).encode()
    except RecursionError:
        raise Unusable("what the source says is nested too deeply") from None
    notes = ("a caption that cleaning empties, beside others",) if 0 < len(usable) < len(texts) else ()
    return RawSample(key, members, notes)


def read_inside(root: Path, relative: str, most_bytes: int, what: str) -> bytes:
    """A file of a folder, never one outside it.

    Args:
        root: the folder, resolved.
        what: what to call it in a reason: "image".

    Raises:
        Unusable: the path is absolute or a URL, leaves the folder by ".." or a symlink, or is no file that can be read.
    """
    if "://" in relative:
        raise Unusable(f"the {what} is a URL: nothing is downloaded (img2dataset does that)")
    try:
        path = os.path.realpath(os.path.join(root, relative.replace("\0", "?")))
    except UnicodeEncodeError:  # a lone surrogate
        raise Unusable(f"the {what} has a name that no file can have") from None
    if os.path.isabs(relative) or not path.startswith(os.path.join(root, "")):
        raise Unusable(f"the {what} is outside the folder")
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # a pipe would wait for ever
    except FileNotFoundError:
        raise Unusable(f"no such {what}") from None
    except OSError as error:
        raise Unusable(f"the {what} cannot be opened ({error.strerror})") from None
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise Unusable(f"the {what} is not a file")
        if status.st_size > most_bytes:
            raise Unusable(f"the {what} has over {most_bytes >> 20} MiB")
        with open(file, "rb", closefd=False) as opened:
            return opened.read()
    finally:
        os.close(file)


def as_captions(value: Any) -> list[str | bytes]:
    """What a field says: nothing, a caption or a list of them. Other kinds of values are no captions."""
    values = value if isinstance(value, list | tuple) else [value]
    return [v for v in values if isinstance(v, str | bytes) and v]


def split_captions(record: dict[str, Any]) -> tuple[list[str | bytes], dict[str, Any]]:
    """The captions of a JSON record, by the first of CAPTION_KEYS it has, and the rest of it."""
    for name in CAPTION_KEYS:
        if captions := as_captions(record.get(name)):
            return captions, {key: value for key, value in record.items() if key != name}
    return [], record


def shard_name(first: int, samples_per_shard: int) -> str:
    return f"{first // samples_per_shard:06d}"


def chunks(items: Iterable, size: int) -> Iterable[tuple[int, list]]:
    """(number of the first, items) of at most `size` each."""
    chunk, first = [], 0
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield first, chunk
            first += size
            chunk = []
    if chunk:
        yield first, chunk


def _plain(value: Any) -> Any:
    """As JSON can say it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, str | int):
        return value
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
