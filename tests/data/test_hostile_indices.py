"""An index or a list of shards that says what is not so: a ShardError or a bad sample, never other bytes or an end."""

import copy
import json
import os
import resource
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from test_shards import numbered, write_tar

from aimv2.data.shard_index import index_path, select_rows
from aimv2.data.shards import DamagedMember, Sample, ShardError, Shards, ensure_indices, expand_shards

COUNT = 12
PER_ROW = ("key_end", "member_end")
PER_MEMBER = ("extension", "block", "size", "crc32")


@pytest.fixture
def shard(tmp_path) -> Path:
    path = write_tar(tmp_path / "a.tar", numbered(COUNT))
    ensure_indices([path])
    return path


def parts(shard: Path) -> tuple[dict, bytes]:
    """The header and the columns of an index."""
    data = index_path(shard).read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def put(shard: Path, header: dict | list | str | bytes, columns: bytes, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else header.encode() if isinstance(header, str) else None
    text = json.dumps(header).encode() if text is None else text
    length = len(text) if length is None else length
    index_path(shard).write_bytes((length % 2**64).to_bytes(8, "little") + text + columns)


def read_everything(shard: Path) -> list[Sample | None]:
    """Each sample, None for one whose bytes are not those that were indexed; by number, so that none is left out."""
    shards = Shards([shard])
    found: list[Sample | None] = []
    for number in range(len(shards)):
        try:
            found.append(shards[number])
        except DamagedMember:
            found.append(None)
    return found


def check(shard: Path, good: list[Sample]) -> str:
    """A ShardError that names the file, or each sample as it is or a bad one; and little memory for it."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        found = read_everything(shard)
    except ShardError as error:
        assert str(shard) in str(error) and len(str(error)) < len(str(shard)) + 500
        return "error"
    finally:
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10
    assert len(found) == len(good) and all(
        sample in (None, expected) for sample, expected in zip(found, good, strict=True)
    )
    return "read"


HEADERS: dict[str, Callable[[dict], object]] = {
    "no object": lambda h: [h],
    "a word": lambda h: "null",
    "not JSON": lambda h: json.dumps(h)[:-1],
    "not UTF-8": lambda h: b"\xff" * 100,
    "nested": lambda h: b'{"__metadata__":' + b"[" * 500_000,
    "a long number": lambda h: b'{"__metadata__":' + b"9" * 5000 + b"}",
    "nothing about it": lambda h: {k: v for k, v in h.items() if k != "__metadata__"},
    "a list about it": lambda h: h | {"__metadata__": []},
    "no column": lambda h: {"__metadata__": h["__metadata__"]},
    "a column that is a word": lambda h: h | {"keys": "U8"},
}

META = {
    "format": ["aimv2 shard index 999", "", None],
    "samples": ["-1", "0", "1000", "1e3", "9" * 5000, "9" * 30, "nan", None],
    "rows": ["-1", "0", "1000"],
    "source_size": ["-1", "x"],
    "source_mtime_ns": ["0.5"],
    "ignored": ["", "[" * 100_000],
}

COLUMN = {
    "offsets before the file": {"data_offsets": [-64, -16]},
    "offsets beyond the file": {"data_offsets": [2**40, 2**40 + 48]},
    "offsets of 2^70": {"data_offsets": [2**70, 2**70 + 48]},
    "offsets backwards": {"data_offsets": [48, 0]},
    "offsets of words": {"data_offsets": ["0", "48"]},
    "one offset": {"data_offsets": [0]},
    "the offsets of another": {"data_offsets": [0, 48]},
    "a shape of none": {"shape": []},
    "a shape of -1": {"shape": [-1]},
    "a shape of -2": {"shape": [-2]},
    "a shape of 0": {"shape": [0]},
    "a shape of 1": {"shape": [1]},
    "a shape of 2^62": {"shape": [2**62]},
    "a shape of 2^70": {"shape": [2**70]},
    "two dimensions": {"shape": [2, 6]},
    "a shape of words": {"shape": ["12"]},
    "smaller numbers": {"dtype": "U8"},
    "larger numbers": {"dtype": "U32"},
    "floats": {"dtype": "F32"},
    "objects": {"dtype": "O"},
    "code": {"dtype": "__import__('os')"},
    "a list of types": {"dtype": ["U8"]},
}


def test_a_header_that_is_none(shard):
    good, (header, columns) = read_everything(shard), parts(shard)
    for name, change in HEADERS.items():
        put(shard, change(copy.deepcopy(header)), columns)
        assert check(shard, good) == "error", name
    for length in (2**64 - 1, 2**63, 2**40, 1 << 20, 8, 1, 0):
        put(shard, header, columns, length)
        assert check(shard, good) == "error", length


def test_metadata_that_is_not_so(shard):
    good, (header, columns) = read_everything(shard), parts(shard)
    for key, values in META.items():
        for value in values:
            changed = copy.deepcopy(header)
            changed["__metadata__"][key] = value
            put(shard, changed, columns)
            assert check(shard, good) == "error", (key, value)
        del changed["__metadata__"][key]
        put(shard, changed, columns)
        assert check(shard, good) == "error", key


def test_columns_that_are_not_there(shard):
    good, (header, columns) = read_everything(shard), parts(shard)
    for name in [*PER_ROW, *PER_MEMBER, "keys"]:
        put(shard, {k: v for k, v in header.items() if k != name}, columns)
        assert check(shard, good) == "error", name
        for change in COLUMN.values():
            changed = copy.deepcopy(header)
            changed[name] |= change
            put(shard, changed, columns)
            check(shard, good)


def test_numbers_that_are_not_so(shard):
    """Every number of the columns that say where something is, made 0, one more, and the largest there is."""
    good, (header, columns) = read_everything(shard), parts(shard)
    outcomes = []
    for name in [*PER_ROW, *PER_MEMBER, "keys"]:
        begin, end = header[name]["data_offsets"]
        kind = {"U8": np.uint8, "U16": np.uint16, "U32": np.uint32}[header[name]["dtype"]]
        for row in (0, 5, -1):
            for value in (0, "more", np.iinfo(kind).max):
                numbers = np.frombuffer(columns[begin:end], kind).copy()
                numbers[row] = numbers[row] + 1 if value == "more" else value
                put(shard, header, columns[:begin] + numbers.tobytes() + columns[end:])
                outcomes.append(check(shard, good))
    assert len(outcomes) == 63


def test_any_bit_of_an_index_may_flip(shard):
    """An image with the caption of its neighbour would be trained on and never be seen."""
    good, data, outcomes = read_everything(shard), index_path(shard).read_bytes(), Counter()
    for bit in range(3, 8 * len(data), 29):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        index_path(shard).write_bytes(changed)
        outcomes[check(shard, good)] += 1
    assert outcomes.keys() == {"error", "read"} and outcomes["error"] > outcomes["read"]  # nothing else came of any
    print(f"\nbits flipped in an index: {outcomes.total()}, of which {outcomes['error']} were an error")


@pytest.mark.parametrize("kept", [[0, 2, COUNT], [2**32 - 1, 0, 1], [0, 2], []])
def test_rows_kept_that_are_not_there(shard, kept):
    """Of three that the index says it keeps."""
    select_rows(shard, np.array([0, 2, 5]))
    assert len(read_everything(shard)) == 3
    header, columns = parts(shard)
    begin, end = header["kept"]["data_offsets"]
    assert end - begin == 12
    data = np.array(kept, np.uint32).tobytes().ljust(12, b"\0")
    header["kept"]["shape"] = [len(kept)]
    put(shard, header, columns[:begin] + data + columns[end:])
    with pytest.raises(ShardError):
        Shards([shard])[0]


def test_the_samples_of_a_short_index_do_not_end_early(shard):
    """An IndexError would be the end of `for sample in shards`, and of what is trained on."""
    header, columns = parts(shard)
    header["key_end"]["shape"] = [COUNT // 2]
    put(shard, header, columns)
    with pytest.raises(ShardError):
        list(Shards([shard]))


def test_an_index_that_is_no_file(shard):
    index_path(shard).unlink()
    index_path(shard).mkdir()
    with pytest.raises(ShardError):
        Shards([shard])


def test_a_cut_index_is_an_error_wherever_it_is_cut(shard):
    """And not only when the samples that it has lost are read: a run must not end in the middle."""
    data = index_path(shard).read_bytes()
    for length in range(0, len(data), 7):
        index_path(shard).write_bytes(data[:length])
        with pytest.raises(ShardError):
            Shards([shard])[0]


# --- a list of shards -----------------------------------------------------------------------------------------------

GOOD = {"name": "a.tar", "samples": 3, "digest": "x"}
ENTRIES = {
    "a parent": {"name": "../a.tar"},
    "a parent in the middle": {"name": "x/../../a.tar"},
    "a folder": {"name": "x/a.tar"},
    "an absolute path": {"name": "/etc/passwd.tar"},
    "backslashes": {"name": "..\\a.tar"},
    "a null": {"name": "a\0.tar"},
    "no tar": {"name": "/etc/passwd"},
    "an index": {"name": "a.tar.idx"},
    "nothing": {"name": ""},
    "a url": {"name": "http://127.0.0.1:9/a.tar"},
    "a command": {"name": "pipe:cat /etc/passwd"},
    "a number": {"name": 3},
    "a list": {"name": ["a.tar"]},
    "no name": {"name": None},
    "fewer than none": {"samples": -1},
    "words": {"samples": "many"},
    "infinitely many": {"samples": float("inf")},
    "not a number": {"samples": float("nan")},
    "10^30": {"samples": 10**30},
    "no count": {"samples": None},
    "a list of counts": {"samples": [3]},
}
LISTS = {
    "nothing": b"",
    "not JSON": b"a.tar\n",
    "nested": b'{"format": "aimv2 shards 1", "shards": ' + b"[" * 500_000,
    "a long number": b'{"format": "aimv2 shards 1", "shards": ' + b"9" * 5000 + b"}",
    "a list": b"[]",
    "a word": b'"a.tar"',
    "no format": b'{"shards": []}',
    "another format": b'{"format": "aimv2 shards 2", "shards": []}',
    "no shards": b'{"format": "aimv2 shards 1"}',
    "no shard": b'{"format": "aimv2 shards 1", "shards": []}',
    "shards of a word": b'{"format": "aimv2 shards 1", "shards": "a.tar"}',
    "shards of words": b'{"format": "aimv2 shards 1", "shards": ["a.tar"]}',
    "a number of shards": b'{"format": "aimv2 shards 1", "shards": 1}',
    "yaml": b"!!python/object/apply:os.mkdir ['CANARY']",
}


@pytest.mark.parametrize("name", ENTRIES)
def test_a_list_with_a_hostile_entry(shard, name):
    path = shard.with_name("shards.list")
    shards = [GOOD, GOOD | {"name": "b.tar"} | ENTRIES[name]]
    path.write_text(json.dumps({"format": "aimv2 shards 1", "shards": shards}))
    with pytest.raises(ShardError, match=r"shards\.list"):
        Shards(expand_shards(str(path)))


@pytest.mark.parametrize("name", LISTS)
def test_a_list_that_is_none(shard, name):
    path = shard.with_name("shards.list")
    path.write_bytes(LISTS[name])
    with pytest.raises(ShardError, match=r"shards\.list"):
        expand_shards(str(path))


def test_a_list_that_lies(shard):
    """About the digest, the number of samples, or a shard that is not there: found when it is read, not believed."""
    path = shard.with_name("shards.list")
    identity = Shards([shard]).digests[0]
    for change in ({"digest": "x"}, {"digest": identity, "samples": 1000}, {"name": "b.tar"}):
        path.write_text(json.dumps({"format": "aimv2 shards 1", "shards": [GOOD | change]}))
        shards = Shards(expand_shards(str(path)))
        with pytest.raises(ShardError):
            for number in range(len(shards)):
                shards[number]
    assert not os.path.exists("CANARY")
