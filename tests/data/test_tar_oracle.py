"""1,000 random tars (100 in CI) against a naive reader: the same samples, or an error that names shard, key and place.

`pytest -s` prints how many were read and how many refused, by reason.
"""

import io
import re
import tarfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aimv2.data.shards import Sample, ShardError, Shards, ensure_indices

FIELDS = {"txt": "text", "json": "json"} | dict.fromkeys(("jpg", "jpeg", "png", "webp", "gif", "bmp"), "image")


class Refused(NamedTuple):
    """What the naive reader cannot make samples of."""

    reason: str
    offset: int | None = None
    name: str = ""


def naive(path: Path) -> list[Sample] | Refused:
    """The definition, by the standard library: neighbours with the same path up to the first dot of its last part."""
    samples: list[Sample] = []
    seen: dict[str, set[str]] = {}
    current = None
    with tarfile.open(path, errors="surrogateescape") as tar:
        for member in tar:
            if member.isdir():
                continue
            if not member.isreg():
                return Refused("has type", member.offset, member.name)
            folder, slash, name = member.name.rpartition("/")
            stem, dot, extension = name.partition(".")
            meta = re.match(r"__[^/]*__($|/)", member.name)
            if meta or not (stem and dot):
                continue
            key, extension = folder + slash + stem, extension.lower()
            if key != current and key in seen:
                return Refused("comes back", member.offset, key)
            if extension in seen.get(key, ()):
                return Refused("second time", member.offset, key)
            seen.setdefault(key, set()).add(extension)
            current = key
            if extension not in FIELDS:
                continue
            printed = key.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
            if not samples or samples[-1].key != printed:
                samples.append(Sample(printed))
            if getattr(samples[-1], FIELDS[extension]) is None:
                setattr(samples[-1], FIELDS[extension], tar.extractfile(member).read())
    return samples or Refused("no sample")


# --- tars -----------------------------------------------------------------------------------------------------------

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
PARTS = ["a", "b", "B", "00001", "é", "日本語", "🦜", "e\u0301", "a b", "%s", "\n", "\\", "-rf", "\udcff", "n" * 60]
LONG = ["x" * 101, "y" * 254, "z" * 300, "ü" * 160]
FOLDERS = ["", "", "", "f/", "f.v1/", "./", "../", "/", "../../etc/", "f//", "__f__/", "g" * 90 + "/", "h" * 200 + "/"]
EXTENSIONS = [
    "jpg",
    "JPG",
    "Jpeg",
    "png",
    "webp",
    "txt",
    "TXT",
    "json",
    "cls",
    "seg.png",
    "txt.gz",
    "pickle",
    "jpg~",
    "",
]

stems = st.one_of(
    st.sampled_from(PARTS), st.sampled_from(LONG), st.text(st.characters(exclude_characters="/\0"), max_size=5)
)
contents = st.one_of(st.binary(max_size=40), st.sampled_from([b"", b"x" * 511, b"x" * 512, b"y" * 513, b"z" * 70_000]))
members = st.lists(st.tuples(st.sampled_from(EXTENSIONS), contents), max_size=4, unique_by=lambda m: m[0].lower())
samples = st.tuples(st.sampled_from(FOLDERS), stems, members).map(
    lambda s: [(f"{s[0]}{s[1]}.{extension}", tarfile.REGTYPE, data) for extension, data in s[2]]
)
odd = st.sampled_from(
    [
        ("folder", tarfile.DIRTYPE, b""),
        ("folder.jpg", tarfile.DIRTYPE, b""),
        (".jpg", tarfile.REGTYPE, b"hidden"),
        ("f/._a.jpg", tarfile.REGTYPE, b"a resource fork"),
        ("__meta__.json", tarfile.REGTYPE, b"{}"),
        ("no extension", tarfile.REGTYPE, b"x"),
        ("a.jpg", tarfile.REGTYPE, b"perhaps again"),
        ("a.jpg", tarfile.SYMTYPE, b""),
        ("l.txt", tarfile.LNKTYPE, b""),
    ]
)
# One odd member in eight, or nearly every tar would be refused.
groups = st.one_of(*[samples] * 7, odd.map(lambda member: [member]))
tars = st.tuples(st.lists(groups, max_size=8), st.sampled_from(FORMATS), st.booleans())


def write(path: Path, files, tar_format: int, with_global_header: bool) -> None:
    with_global_header = with_global_header and files and tar_format == tarfile.PAX_FORMAT  # tarfile reads none alone
    headers = {"comment": "of all members"} if with_global_header else None
    with tarfile.open(path, "w", format=tar_format, pax_headers=headers, errors="surrogateescape") as tar:
        for number, (name, kind, data) in enumerate(files):
            member = tarfile.TarInfo(name)
            member.type, member.size, member.mtime = kind, len(data), number / 4
            member.linkname = "/etc/passwd" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
            tar.addfile(member, io.BytesIO(data))


def check(path: Path, drawn, counts: Counter) -> None:
    files, tar_format, with_global_header = drawn
    files = [member for group in files for member in group]
    try:
        write(path, files, tar_format, with_global_header)
    except ValueError:  # ustar has no room for the name
        write(path, files, tarfile.GNU_FORMAT, with_global_header)
    expected = naive(path)
    if isinstance(expected, list):
        ensure_indices([path])
        assert list(Shards([path])) == expected
        counts["read"] += 1
        return
    with pytest.raises(ShardError) as caught:
        ensure_indices([path])
    message = str(caught.value)
    counts[expected.reason] += 1
    assert expected.reason in message and "\n" not in message
    if expected.offset is None:
        assert message.startswith(f"{path}: ")
    else:
        assert message.startswith(f"{path}: byte {expected.offset}: ")
        assert repr(expected.name.encode("utf-8", "surrogateescape"))[2:-1] in message
    assert not path.with_name("a.tar.idx").exists()


def run(factory, count: int) -> Counter:
    counts: Counter = Counter()
    slow_but_right = [HealthCheck.too_slow, HealthCheck.data_too_large]

    @settings(max_examples=count, deadline=None, suppress_health_check=slow_but_right, database=None)
    @given(tars)
    def examples(drawn):
        check(factory.mktemp("tar") / "a.tar", drawn, counts)

    examples()
    print(f"\n{sum(counts.values())} random tars: {dict(counts.most_common())}")
    return counts


def test_100_random_tars(tmp_path_factory):
    counts = run(tmp_path_factory, 100)
    assert counts["read"] >= 5 and len(counts) >= 3  # both outcomes are tested


@pytest.mark.slow
def test_1000_random_tars(tmp_path_factory):
    counts = run(tmp_path_factory, 1000)
    assert counts["read"] >= 200 and len(counts) == 5


# --- what tarfile does not write ------------------------------------------------------------------------------------


def header(name: bytes, size: int, kind: bytes) -> bytes:
    block = bytearray(tarfile.TarInfo("x").tobuf(tarfile.USTAR_FORMAT))
    block[:100], block[124:136], block[156:157] = name.ljust(100, b"\0"), b"%011o\0" % size, kind
    block[148:156] = b"        "
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def member(name: bytes, data: bytes, kind: bytes = b"0") -> bytes:
    return header(name, len(data), kind) + data + bytes(-len(data) % 512)


def record(key: bytes, value: bytes) -> bytes:
    body = b" " + key + b"=" + value + b"\n"
    length = len(body) + 1
    while length != len(str(length)) + len(body):
        length += 1
    return str(length).encode() + body


GOOD = member(b"0.jpg", b"image")
END = bytes(1024)

HEADERS = {
    "a size of 5000 digits": member(b"p", record(b"size", b"9" * 5000), b"x"),
    "a size of 300 digits": member(b"p", record(b"size", b"9" * 300), b"x"),
    "a negative size": member(b"p", record(b"size", b"-1"), b"x"),
    "a size in words": member(b"p", record(b"size", b"\xc2\xb2"), b"x"),
    "a size for all members": member(b"p", record(b"size", b"1"), b"g"),
    "a path for all members": member(b"p", record(b"path", b"1"), b"g"),
    "a sparse file": member(b"p", record(b"GNU.sparse.size", b"1"), b"x"),
    "a record of 5000 digits": member(b"p", b"9" * 5000 + b" path=x\n", b"x"),
    "a record without a key": member(b"p", b"8 abcde\n", b"x"),
    "a record of no length": member(b"p", b"0 path=x\n", b"x"),
    "a record that is too long": member(b"p", b"99 path=x\n", b"x"),
    "two megabytes of header": member(b"p", record(b"path", b"x" * (2 << 20)), b"x"),
    "two megabytes of name": member(b"p", b"x" * (2 << 20), b"L"),
    "a size below zero in base 256": member(b"1.jpg", b"")[:124] + b"\xff" * 12 + member(b"1.jpg", b"")[136:],
    "a block device": member(b"1.jpg", b"", b"4"),
    "a GNU sparse file": member(b"1.jpg", b"", b"S"),
    "a multi-volume part": member(b"1.jpg", b"", b"M"),
    "a folder with contents": member(b"f/", b"x", b"5"),
    "an unknown kind": member(b"1.jpg", b"", b"Z"),
}


def test_the_hand_made_headers_are_right(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(member(b"p", record(b"path", b"long.jpg"), b"x") + member(b"short", b"1") + GOOD + END)
    ensure_indices([path])
    assert [(s.key, s.image) for s in Shards([path])] == [("long", b"1"), ("0", b"image")]


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_no_shard_needs_is_an_error_with_its_place(tmp_path, name):
    path = tmp_path / "a.tar"
    path.write_bytes(GOOD + HEADERS[name] + member(b"1.jpg", b"image") + END)
    with pytest.raises(ShardError) as caught:
        ensure_indices([path])
    message = str(caught.value)
    assert 1024 <= int(re.match(re.escape(f"{path}: byte ") + r"(\d+): ", message).group(1)) < path.stat().st_size
    assert len(message) < len(str(path)) + 1000
