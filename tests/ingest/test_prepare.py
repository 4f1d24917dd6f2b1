"""`make_shards.py prepare` and `img2dataset`, as typed, and what they leave behind."""

import errno
import importlib.util
import json
import os
import resource
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_coyo import make_coyo
from made_tars import picture, write_samples
from PIL import Image

pytest.importorskip("tqdm")
pytest.importorskip("sentencepiece")
pytest.importorskip("matplotlib")

from aimv2.data.shard_index import index_path, read_index
from aimv2.data.shards import Shards, ensure_indices, expand_shards
from aimv2.data.tar import BLOCK
from aimv2.ingest import prepare as prepare_module
from aimv2.ingest.measures import MeasureConfig
from aimv2.ingest.prepare import NSFW, PrepareConfig, prepare
from aimv2.ingest.prepared_folder import WriteError, lock_folder
from aimv2.ingest.shard_measures import measures_path

IMAGE = picture(0)
BLOCKS = 1 + -(-len(IMAGE) // BLOCK)  # of the member with the image: header and contents


def plain(folder, shards=3, samples=4):
    """Tars of samples 000000.jpg, 000000.txt ... with different images."""
    for number in range(shards):
        contents = [
            {"jpg": picture(10 * number + i), "txt": f"sample {i} of {number}".encode()} for i in range(samples)
        ]
        write_samples(folder / f"{number}.tar", contents)
    return folder


@pytest.fixture
def make_shards(request, monkeypatch, capsys):
    """Run the script in this process: its exit (None is success) and what it printed."""
    path = request.config.rootpath / "scripts" / "make_shards.py"
    spec = importlib.util.spec_from_file_location("make_shards", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        try:
            return script.main(), capsys.readouterr().out
        except SystemExit as stop:
            return stop.code, capsys.readouterr().out

    return run


@pytest.fixture
def no_pictures(monkeypatch):
    monkeypatch.setattr(prepare_module, "draw_samples", lambda *_: "")
    monkeypatch.setattr(prepare_module, "draw_histograms", lambda *_: None)


def keys(folder) -> list[str]:
    """What training would read."""
    return [sample.key for sample in Shards(expand_shards(str(folder / "shards.list")))]


def state(folder) -> dict:
    """What the indices and the list say."""
    indices = [read_index(idx.with_suffix(""), columns=False) for idx in sorted(folder.glob("*.idx"))]
    return {"indices": [(i.identity, i.reason) for i in indices], "list": (folder / "shards.list").read_text()}


def report_of(folder) -> dict:
    return json.loads((folder / "prepared" / "report.json").read_text())


@pytest.fixture(scope="module")
def coyo(tmp_path_factory):
    return make_coyo(tmp_path_factory.mktemp("coyo"), samples=200)


def test_coyo_as_typed(request, coyo):
    root, folder = request.config.rootpath, coyo.images
    ensure_indices(folder / f"{name}.tar" for name in coyo.shards)
    before = {path.name: path.read_bytes() for path in folder.glob("*.tar")}
    command = [sys.executable, str(root / "scripts" / "make_shards.py"), "prepare", str(folder), "--workers", "2"]
    command += [
        "--keep",
        "clip_similarity_vitl14 >= quantile:0.5",
        "--keep",
        "min_side >= 120",
        "--duplicates",
        "phash",
    ]
    command += ["--tokenizer", str(root / "tokenizers" / "shapes")]
    done = subprocess.run(command, env={"PYTHONPATH": str(root)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "1 unfinished" in done.stdout and str(folder / "prepared" / "report.md") in done.stdout
    assert {path.name: path.read_bytes() for path in folder.glob("*.tar")} == before

    # The threshold and the kept rows, from img2dataset's own files.
    scores = {}
    for name in coyo.shards:
        table = pq.read_table(folder / f"{name}.parquet").to_pylist()
        scores |= {row["key"]: row["clip_similarity_vitl14"] for row in table if row["status"] == "success"}
    contents = report_of(folder)
    threshold = np.quantile(list(scores.values()), 0.5)
    (found,) = [f for f in contents["thresholds"] if f["column"] == "clip_similarity_vitl14"]
    assert (found["threshold"], found["quantile"], found["filter"]) == (
        threshold,
        0.5,
        "clip_similarity_vitl14 >= quantile:0.5",
    )
    kept = keys(folder)
    assert 0 < len(kept) == contents["kept"] and all(scores[key] >= threshold for key in kept)
    measured = [row for name in coyo.shards for row in pq.read_table(measures_path(folder / f"{name}.tar")).to_pylist()]
    assert contents["samples"] == len(measured) == len(scores) == sum(map(len, coyo.shards.values()))
    assert all(row["unusable"] is None and row["caption_tokens"] is not None for row in measured)
    small = {row["key"] for row in measured if min(row["width"], row["height"]) < 120}
    assert small and not small & set(kept)
    assert read_index(folder / "00000.tar", columns=False).reason == (
        "usable; with a caption in txt; nsfw_score_opennsfw2 <= 0.5 or missing; "
        "nsfw_score_gantman <= 0.5 or missing; "
        f"clip_similarity_vitl14 >= {threshold:.6g}; min_side >= 120; no duplicate (phash)"
    )
    hashes = {row["key"]: row["phash"] for row in measured}
    assert len({hashes[key] for key in kept}) == len(kept)
    _check_numbers(contents)


def _check_numbers(contents):
    """Every row is accounted for."""
    left = contents["samples"]
    for entry in contents["dropped"]:
        assert 0 <= entry["dropped"] <= entry["alone"] <= contents["samples"]
        left -= entry["dropped"]
        assert entry["left"] == left
    assert left == contents["kept"]


def test_img2dataset_sums_up_and_prepares(make_shards, no_pictures, coyo):
    (coyo.images / "shards.list").unlink(missing_ok=True)
    code, said = make_shards("img2dataset", coyo.images, "--workers", 1)
    successes = sum(map(len, coyo.shards.values()))
    assert code is None and "Unfinished: 00007.tar" in said and "Numbers without a shard: 00002" in said
    assert "HTTP Error 404: Not Found" in said
    contents = report_of(coyo.images)
    assert contents["download"]["successes"] == contents["samples"] == contents["kept"] == successes
    assert contents["shards"] == {"found": 8, "prepared": 7, "unfinished": ["00007.tar"]}
    assert sorted(json.loads((coyo.images / "shards.list").read_text())["shards"], key=lambda s: s["name"]) == [
        {"name": f"{name}.tar", "samples": len(ids), "digest": read_index(coyo.images / f"{name}.tar").identity}
        for name, ids in sorted(coyo.shards.items())
    ]
    filters = {f["column"]: f["threshold"] for f in contents["thresholds"]}
    assert filters == {"nsfw_score_opennsfw2": 0.5, "nsfw_score_gantman": 0.5}
    error, _ = make_shards("img2dataset", coyo.metadata)
    assert "_stats.json" in error and "\n" not in error


def test_img2dataset_leaves_a_selection(make_shards, no_pictures, coyo):
    arguments = ("--workers", 1, "--keep", "clip_similarity_vitl14 >= quantile:0.5")
    assert make_shards("prepare", coyo.images, *arguments)[0] is None
    before, report = state(coyo.images), report_of(coyo.images)
    code, said = make_shards("img2dataset", coyo.images, "--workers", 1)
    assert code is None and "finished shards of img2dataset" in said
    assert f"{coyo.images / 'shards.list'} is as it was; prepare changes it" in said
    assert state(coyo.images) == before and report_of(coyo.images) == report


def test_pictures_show_something_and_are_the_same_every_time(tmp_path):
    folder = plain(tmp_path, shards=2, samples=8)
    pictures = []
    for _ in range(2):
        prepare(folder, PrepareConfig(keep=("aspect < 2",)))
        pictures.append([np.asarray(Image.open(folder / "prepared" / f"{n}.png")) for n in ("samples", "histograms")])
    for first, second in zip(*pictures, strict=True):
        assert np.array_equal(first, second)
        assert min(first.shape[:2]) > 400 and first[..., :3].std() > 10
    colours = {tuple(pixel) for pixel in pictures[0][0][::7, ::7, :3].reshape(-1, 3).tolist()}
    assert len(colours) > 500  # photographs, not only text on white


def cut_in_a_member(data):
    return data[: (2 * BLOCKS + 1) * BLOCK + 20], (BLOCKS + 2) * BLOCK


def cut_at_a_header(data):
    return data[: (BLOCKS + 2) * BLOCK], (BLOCKS + 2) * BLOCK


def flip_a_header(data):
    place = (BLOCKS + 2) * BLOCK
    return data[: place + 3] + b"\xff" + data[place + 4 :], place


def bytes_after_the_end(data):
    return data + b"more", len(data)


def a_key_comes_back(data):
    end = (2 * BLOCKS + 4) * BLOCK
    return data[:end] + data[: BLOCKS * BLOCK] + data[end:], end


@pytest.mark.parametrize(
    "damage", [cut_in_a_member, cut_at_a_header, flip_a_header, bytes_after_the_end, a_key_comes_back]
)
def test_damage_is_a_line_with_its_place_and_the_others_go_on(make_shards, no_pictures, tmp_path, damage):
    for name in ("0", "1", "2"):
        # One image everywhere: then all members lie at the same places.
        write_samples(tmp_path / f"{name}.tar", [{"jpg": IMAGE, "txt": b"a dog"} for _ in range(4)])
    data, place = damage((tmp_path / "1.tar").read_bytes())
    (tmp_path / "1.tar").write_bytes(data)
    code, said = make_shards("prepare", tmp_path, "--workers", 1)
    assert code == 1
    lines = [line for line in said.splitlines() if line.startswith(str(tmp_path)) and ".tar:" in line]
    assert len(lines) == 1 and lines[0].startswith(f"{tmp_path / '1.tar'}: byte {place}: ")
    assert "2 of 3 shards, 1 left out as damaged" in said
    assert keys(tmp_path) == [f"{i:06d}" for i in range(4)] * 2
    assert report_of(tmp_path)["damage"] == lines and lines[0] in (tmp_path / "prepared" / "report.md").read_text()
    assert not index_path(tmp_path / "1.tar").exists()


def test_a_shard_that_was_changed_is_damage(make_shards, no_pictures, tmp_path):
    plain(tmp_path)
    assert make_shards("prepare", tmp_path, "--workers", 1)[0] is None
    write_samples(tmp_path / "2.tar", [{"jpg": IMAGE, "txt": b"another"}])
    code, said = make_shards("prepare", tmp_path, "--workers", 1)
    assert code == 1 and f"{tmp_path / '2.tar'}: its contents changed" in said
    assert len(keys(tmp_path)) == 8
    index_path(tmp_path / "2.tar").write_bytes(b"nothing")
    code, said = make_shards("prepare", tmp_path, "--workers", 1)
    assert code == 1 and "not a usable index" in said
    index_path(tmp_path / "2.tar").write_bytes(index_path(tmp_path / "1.tar").read_bytes()[:-30])
    code, said = make_shards("prepare", tmp_path, "--workers", 1)
    assert code == 1 and f"{tmp_path / '2.tar'}" in said and len(keys(tmp_path)) == 8
    index_path(tmp_path / "2.tar").unlink()
    assert make_shards("prepare", tmp_path, "--workers", 1)[0] is None and len(keys(tmp_path)) == 9


def test_columns_of_other_samples_are_damage(make_shards, no_pictures, tmp_path):
    plain(tmp_path)
    (tmp_path / "prepared").mkdir()
    for number in range(3):
        wrong = {"key": [f"{i:06d}" for i in range(4 - number // 2)], "score": [0.5] * (4 - number // 2)}
        pq.write_table(pa.table(wrong), tmp_path / "prepared" / f"{number}.columns.parquet")
    code, said = make_shards("prepare", tmp_path, "--workers", 1, "--keep", "score < 1")
    assert code == 1 and f"{tmp_path / '2.tar'}: " in said and "is of other samples; make it again" in said
    assert len(keys(tmp_path)) == 8


def test_nothing_but_damage(make_shards, tmp_path):
    (tmp_path / "a.tar").write_bytes(b"no tar")
    code, said = make_shards("prepare", tmp_path, "--workers", 1, "--keep", "aspect < quantile:0.5")
    assert "no sample is left" in code and f"{tmp_path / 'a.tar'}: byte 0: " in said
    assert not (tmp_path / "shards.list").exists()


def test_bytes_that_rot_are_found_when_asked_for_and_stay_dropped(make_shards, no_pictures, tmp_path):
    shard = plain(tmp_path) / "1.tar"
    assert make_shards("prepare", tmp_path, "--workers", 1)[0] is None
    place, stat = read_index(shard).members(2)[0][1] + 30, shard.stat()
    data = bytearray(shard.read_bytes())
    data[place] ^= 4
    shard.write_bytes(data)
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert make_shards("prepare", tmp_path, "--workers", 1)[0] is None and report_of(tmp_path)["kept"] == 12
    code, said = make_shards("prepare", tmp_path, "--workers", 1, "--verify")
    line = f"{shard}: byte {place - 30}: sample 000002: its jpg has other bytes than were indexed"
    assert code == 1 and said.splitlines().count(line) == 1
    for _ in range(2):
        assert len(keys(tmp_path)) == 11 and read_index(shard).kept.tolist() == [0, 1, 3]
        code, said = make_shards("prepare", tmp_path, "--workers", 1)
        assert code is None and "unusable: other bytes than were indexed" in said


def test_other_filters_measure_nothing_again_and_all_brings_everything_back(no_pictures, monkeypatch, tmp_path):
    plain(tmp_path)
    done = []
    prepare(tmp_path, PrepareConfig(), progress=lambda what, now, of: done.append((what, now, of)))
    assert sum(now for what, now, _ in done if what == "measure") == 12
    assert {of for what, _, of in done if what == "index"} == {sum(p.stat().st_size for p in tmp_path.glob("*.tar"))}
    first = state(tmp_path)
    monkeypatch.setattr("aimv2.ingest.shard_measures.measure_image", None)  # whoever calls it now fails
    written = []
    for _ in range(2):
        report = prepare(tmp_path, PrepareConfig(keep=("image_bytes > quantile:0.5",)))
        assert report.selection.kept == len(keys(tmp_path)) == 6
        written.append([path.stat().st_mtime_ns for path in sorted(tmp_path.glob("*.idx"))])
    assert written[0] == written[1]  # what would not change is not written
    assert (
        prepare(tmp_path, PrepareConfig(keep=("image_bytes > 1e9", "aspect < 9"), keep_all=True)).selection.kept == 12
    )
    assert len(keys(tmp_path)) == 12
    prepare(tmp_path, PrepareConfig())
    assert state(tmp_path) == first


def test_more_measures_are_taken_when_they_are_asked_for(no_pictures, tmp_path, pytestconfig):
    plain(tmp_path)
    prepare(tmp_path, PrepareConfig(measure=MeasureConfig(decode=False)))
    before = measures_path(tmp_path / "0.tar").stat().st_mtime_ns
    report = prepare(
        tmp_path, PrepareConfig(measure=MeasureConfig(tokenizer=str(pytestconfig.rootpath / "tokenizers/shapes")))
    )
    assert measures_path(tmp_path / "0.tar").stat().st_mtime_ns > before
    assert report.columns["caption_tokens"]["share"] == 1


class Crash(BaseException):
    pass


def test_a_crash_at_any_write_leaves_whole_indices_and_no_wrong_list(no_pictures, monkeypatch, tmp_path):
    config = PrepareConfig(keep=("image_bytes >= quantile:0.5",))
    plain(tmp_path, shards=2)
    expected = prepare(tmp_path, config).selection.kept
    whole = state(tmp_path)
    replace, writes = os.replace, 0
    while True:
        for path in (tmp_path / "prepared").iterdir():
            path.unlink()
        prepare(tmp_path, PrepareConfig())
        for path in (tmp_path / "prepared").iterdir():
            path.unlink()
        left = writes

        def crash(*names):
            nonlocal left
            if left == 0:
                raise Crash
            left -= 1
            replace(*names)

        monkeypatch.setattr(os, "replace", crash)
        try:
            prepare(tmp_path, config)
            break
        except Crash:
            writes += 1
        finally:
            monkeypatch.setattr(os, "replace", replace)
        kept = [read_index(tmp_path / f"{n}.tar").samples for n in range(2)]
        if (tmp_path / "shards.list").exists():
            assert kept == [4, 4] and len(keys(tmp_path)) == 8  # nothing has been changed yet
        assert prepare(tmp_path, config).selection.kept == expected
        assert state(tmp_path) == whole
    assert writes == 2 + 2 + 2 + 1  # measures, indices, the report's two files, the list
    assert len(keys(tmp_path)) == expected


def test_captions_elsewhere_and_nowhere(make_shards, no_pictures, tmp_path):
    samples = [
        {"jpg": picture(i), "json": json.dumps({"long": "a long caption"} if i % 2 else {}).encode()} for i in range(6)
    ]
    write_samples(tmp_path / "0.tar", samples)
    code, said = make_shards("prepare", tmp_path, "--workers", 1)
    assert "no sample is left" in code and "no caption" in said
    assert not (tmp_path / "shards.list").exists() and read_index(tmp_path / "0.tar").kept is None
    assert make_shards("prepare", tmp_path, "--workers", 1, "--captions", "json:long", "--captions", "txt")[0] is None
    assert keys(tmp_path) == ["000001", "000003", "000005"]
    assert report_of(tmp_path)["captions"] == {"json:long": 3, "txt": 0}
    assert make_shards("prepare", tmp_path, "--workers", 1, "--captions", "none")[0] is None
    assert len(keys(tmp_path)) == 6


def test_errors_are_one_line(make_shards, tmp_path):
    plain(tmp_path / "data", shards=1)
    plain(tmp_path / "unhashed", shards=1)
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        (("data", "--keep", "colour >= 3"), "no column 'colour'; there are aspect, "),
        (("data", "--keep", "aspect"), "filter 'aspect': expected COLUMN"),
        (("data", "--nsfw", "low"), "--nsfw low: expected a number or none"),
        (("data", "--workers", "0"), "workers is 0"),
        (("data", "--tokenizer", "nowhere"), "no tokenizer at nowhere"),
        (("unhashed", "--no-phash", "--duplicates", "phash"), "no image is hashed: leave out --no-phash"),
        (("data", "--captions", "caption"), "captions 'caption': expected txt or json:KEY"),
        (("empty",), "empty: no .tar file"),
        (("nowhere",), "nowhere: no .tar file"),
    ):
        error, _ = make_shards("prepare", tmp_path / arguments[0], "--workers", "1", *arguments[1:])
        assert error.startswith("make_shards: ") and message in error and "\n" not in error
    assert not (tmp_path / "data" / "shards.list").exists()


@contextmanager
def at_most(size):
    """No file may grow beyond so many bytes: a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_is_full_is_no_damage(make_shards, no_pictures, tmp_path):
    """Each of the three kinds of files that are written for a shard; a tar that cannot be read stays a line."""
    plain(tmp_path, shards=2, samples=40)
    for size, name in ((100, "0.tar.idx"), (4000, "prepared/0.measures.parquet")):
        with at_most(size):
            error, said = make_shards("prepare", tmp_path, "--workers", 1)
        assert error == f"make_shards: {tmp_path / name}: cannot be written: File too large" and said == ""
    assert make_shards("prepare", tmp_path, "--workers", 1)[0] is None
    with at_most(100):
        error, _ = make_shards("prepare", tmp_path, "--workers", 1, "--keep", "image_bytes > quantile:0.5")
    assert error == f"make_shards: {tmp_path / '0.tar.idx'}: cannot be written: File too large"
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_errors_of_writing_and_of_reading(monkeypatch, tmp_path, number):
    plain(tmp_path, shards=1)
    path = tmp_path / "0.tar"

    def fail(shards):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(prepare_module, "ensure_indices", fail)
    with pytest.raises(WriteError, match=f"idx: cannot be written: {os.strerror(number)}"):
        prepare(tmp_path, PrepareConfig())
    number = errno.EACCES  # of a file beside the tar
    monkeypatch.setattr(
        prepare_module, "ensure_indices", lambda _: (tmp_path / "no" / "folder").write_bytes(b"a read-only folder")
    )
    with pytest.raises(WriteError, match="idx: cannot be written"):
        prepare(tmp_path, PrepareConfig())
    for error in (OSError(errno.EIO, "Input/output error"), PermissionError(errno.EACCES, "Permission denied", path)):

        def fail_to_read(shards, error=error):
            raise error

        monkeypatch.setattr(prepare_module, "ensure_indices", fail_to_read)
        assert prepare(tmp_path, PrepareConfig()).damage == [f"{path}: {error}"]


def scored(folder, columns_of=(0, 1, 2)):
    """Shards with COYO's score where there are `columns_of` them: of the first sample none, of the last a high one."""
    plain(folder)
    (folder / "prepared").mkdir()
    for number in columns_of:
        columns = {"key": [f"{i:06d}" for i in range(4)], NSFW[0]: [None, 0.1, 0.2, 0.9]}
        pq.write_table(pa.table(columns), folder / "prepared" / f"{number}.columns.parquet")


def test_a_sample_without_a_score_is_dropped_only_if_the_filter_was_typed(make_shards, no_pictures, tmp_path):
    scored(tmp_path, columns_of=(0, 1))
    code, said = make_shards("prepare", tmp_path, "--workers", 1)
    assert code is None and len(keys(tmp_path)) == 2 * 3 + 4
    assert "1 shards have no columns of COYO: run `make_shards.py coyo` again" in said
    entries = {entry["reason"]: entry for entry in report_of(tmp_path)["dropped"]}
    entry = entries[f"{NSFW[0]} missing, which passes"]
    assert (entry["alone"], entry["dropped"]) == (2 + 4, 0) and f"{NSFW[0]} missing, which passes" in said
    assert make_shards("prepare", tmp_path, "--workers", 1, "--keep", f"{NSFW[0]} <= 0.5")[0] is None
    assert len(keys(tmp_path)) == 2 * 2


def test_hashes_that_nobody_makes_are_missed_before_anything_is_measured(make_shards, no_pictures, tmp_path):
    plain(tmp_path)
    for option in ("--no-decode", "--no-phash"):
        error, _ = make_shards("prepare", tmp_path, "--workers", 1, option, "--duplicates", "phash")
        assert error == f"make_shards: duplicates by phash, but no image is hashed: leave out {option}"
    assert not list(tmp_path.glob("*.idx"))
    (tmp_path / "prepared").mkdir()
    columns = {"key": [f"{i:06d}" for i in range(4)], "image_phash": ["0" * 16] * 4}
    for number in range(3):
        pq.write_table(pa.table(columns), tmp_path / "prepared" / f"{number}.columns.parquet")
    assert make_shards("prepare", tmp_path, "--workers", 1, "--no-decode", "--duplicates", "phash")[0] is None
    assert len(keys(tmp_path)) == 1  # COYO's own hashes will do


def test_captions_that_are_elsewhere_are_pointed_at(make_shards, tmp_path):
    contents = json.dumps({"n": 3, "long": "a dog", "all": ["a", "b"], "url\n": "x"}).encode()
    write_samples(tmp_path / "0.tar", [{"jpg": IMAGE, "json": b"{}"}, {"jpg": IMAGE, "json": contents}])
    error, said = make_shards("prepare", tmp_path, "--workers", 1)
    assert "no sample is left" in error
    assert "Captions may be in --captions json:KEY; the json members have: long, all, 'url\\n'\n" in said


def test_members_that_are_not_read_are_counted(make_shards, no_pictures, tmp_path):
    samples = [{"jpg": picture(0), "txt": b"a dog", "v1.jpg": IMAGE}, {"jpg": picture(1), "txt": b"", "pyd": b"3"}]
    for number in range(2):
        write_samples(tmp_path / f"{number}.tar", samples)
    for _ in range(2):  # also when nothing is indexed anew
        code, said = make_shards("prepare", tmp_path, "--workers", 1)
        assert code is None and "Members not read: 2 .pyd, 2 .v1.jpg\n" in said
    assert report_of(tmp_path)["ignored"] == {"v1.jpg": 2, "pyd": 2}


def test_one_prepares_at_a_time(make_shards, no_pictures, tmp_path):
    plain(tmp_path)
    (tmp_path / "0_stats.json").write_text("{}")
    with lock_folder(tmp_path) as locked:
        assert locked
        for door in ("prepare", "img2dataset"):
            error, _ = make_shards(door, tmp_path, "--workers", 1)
            assert error == f"make_shards: {tmp_path}: another prepare is at work here"
    (tmp_path / "0_stats.json").unlink()
    assert make_shards("prepare", tmp_path, "--workers", 1)[0] is None


def test_leftovers_go_and_files_without_a_tar_are_named(make_shards, no_pictures, tmp_path, monkeypatch):
    plain(tmp_path)
    assert make_shards("prepare", tmp_path, "--workers", 1)[0] is None
    (tmp_path / "2.tar").unlink()
    hexadecimal = "0123456789ab"
    old, new = tmp_path / f".7.tar.{hexadecimal}.tmp", tmp_path / f".8.tar.{hexadecimal}.tmp"
    gone = [tmp_path / f".0.tar.idx.{hexadecimal}.tmp", tmp_path / "prepared" / f".report.md.{hexadecimal}.tmp", old]
    stay = [new, tmp_path / ".notes.tmp"]  # somebody else may be writing it; not ours
    for path in gone + stay:
        path.write_bytes(b"half")
    os.utime(old, (1e9, 1e9))
    monkeypatch.chdir(tmp_path)
    code, said = make_shards("prepare", ".", "--workers", 1)
    assert code is None and "Without a tar: 2.tar.idx, prepared/2.measures.parquet\n" in said
    assert not any(path.exists() for path in gone) and all(path.exists() for path in stay)
    assert (tmp_path / "prepared" / "report.md").read_text().startswith(f"# {tmp_path.name}\n")


def test_every_step_is_told_and_processes_change_nothing(no_pictures, monkeypatch, tmp_path):
    plain(tmp_path)
    prepare(tmp_path, PrepareConfig(keep=("image_bytes > quantile:0.5",)))
    expected = state(tmp_path)
    prepare(tmp_path, PrepareConfig())
    monkeypatch.setattr(prepare_module, "QUICK_SHARDS", 1)
    done = Counter()
    config = PrepareConfig(keep=("image_bytes > quantile:0.5",), workers=2)
    prepare(tmp_path, config, progress=lambda what, now, of: done.update({(what, of): now}))
    assert {what: n for (what, of), n in done.items() if what != "index" and n == of} == {
        "measure": 12,
        "select": 12,
        "apply": 3,
    }
    assert state(tmp_path) == expected
