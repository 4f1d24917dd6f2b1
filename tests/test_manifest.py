import hashlib
import random

import pytest

from aimv2 import manifest


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "weights.pt").write_bytes(random.Random(0).randbytes(200))
    (tmp_path / "rng.pt").write_bytes(b"\x00" * 64)
    (tmp_path / "empty").write_bytes(b"")
    manifest.write(tmp_path, {"state": {"step": 3}, "lr": 0.1 + 0.2}, {})
    return tmp_path


def test_it_lists_what_sha256sum_would(folder):
    contents = manifest.read(folder)
    assert contents["state"] == {"step": 3} and contents["lr"] == 0.1 + 0.2
    assert contents["files"] == {
        name: {"size": size, "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest()}
        for name, size in {"empty": 0, "engine/weights.pt": 200, "rng.pt": 64}.items()
    }


def test_a_flip_of_any_byte_is_found(folder):
    rng = random.Random(1)
    for path in (folder / manifest.NAME, folder / "engine" / "weights.pt", folder / "rng.pt"):
        whole = path.read_bytes()
        for place in range(len(whole)):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << rng.randrange(8)
            path.write_bytes(damaged)
            with pytest.raises(manifest.DamagedError):
                manifest.read(folder)
        path.write_bytes(whole)
        manifest.read(folder)


def test_a_cut_at_any_place_is_found(folder):
    for path in (folder / manifest.NAME, folder / "engine" / "weights.pt", folder / "rng.pt"):
        whole = path.read_bytes()
        for length in range(len(whole)):
            path.write_bytes(whole[:length])
            with pytest.raises(manifest.DamagedError):
                manifest.read(folder)
        path.write_bytes(whole)


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", '{"files": []}', "[" * 100_000, '{"sha256": 1}'])
def test_any_other_json_is_damage(folder, text):
    (folder / manifest.NAME).write_text(text)
    with pytest.raises(manifest.DamagedError):
        manifest.read(folder)


@pytest.mark.parametrize("name", [manifest.NAME, "engine/weights.pt", "empty"])
def test_a_missing_file_is_found(folder, name):
    (folder / name).unlink()
    with pytest.raises(manifest.DamagedError, match=name):
        manifest.read(folder)


def test_more_bytes_are_found_but_more_files_are_not_our_business(folder):
    (folder / "notes.txt").write_text("mine")
    manifest.read(folder)
    with open(folder / "empty", "ab") as file:
        file.write(b"x")
    with pytest.raises(manifest.DamagedError, match="empty: expected size 0, got 1"):
        manifest.read(folder)


def test_files_that_another_rank_sealed_are_believed_but_must_be_here(folder):
    record = manifest.seal(folder / "rng.pt")
    (folder / manifest.NAME).unlink()
    manifest.write(folder, {}, {"rng.pt": record})
    assert manifest.read(folder)["files"]["rng.pt"] == record
    for files in ({"rng.pt": {**record, "size": 63}}, {"rng_00001.pt": record}):
        with pytest.raises(OSError, match="do all ranks share this folder"):
            manifest.write(folder, {}, files)
