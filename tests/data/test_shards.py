import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from aimv2.data import shards as shards_module
from aimv2.data.images import FORMATS
from aimv2.data.shard_index import EXTENSIONS, IMAGE_EXTENSIONS, NO_FORMAT, index_path, read_index, select_rows
from aimv2.data.shard_list import write_shard_list
from aimv2.data.shard_scan import build_index
from aimv2.data.shards import DamagedMember, Sample, Shards, ensure_indices, expand_shards
from aimv2.data.tar import ShardError

Files = list[tuple[str, bytes]]


def write_tar(path: Path, files: Files, tar_format: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def numbered(count: int) -> Files:
    rng = np.random.default_rng(0)
    return [
        (f"{i:05d}.{ext}", rng.bytes(rng.integers(1, 2000))) for i in range(count) for ext in ("jpg", "txt", "json")
    ]


def read_all(path: Path) -> list[Sample]:
    build_index(path)
    return list(Shards([path]))


def naive(path: Path) -> list[Sample]:
    """The definition, by tarfile: group by the path up to the first dot of its last part."""
    samples: list[Sample] = []
    with tarfile.open(path) as tar:
        for member in tar:
            folder, _, name = member.name.rpartition("/")
            stem, dot, extension = name.partition(".")
            if not (member.isreg() and dot and stem) or extension.lower() not in EXTENSIONS:
                continue
            key = f"{folder}/{stem}" if "/" in member.name else stem
            if not samples or samples[-1].key != key:
                samples.append(Sample(key))
            field = {"txt": "text", "json": "json"}.get(extension.lower(), "image")
            if getattr(samples[-1], field) is None:
                setattr(samples[-1], field, tar.extractfile(member).read())
    return samples


def test_reads_what_webdataset_reads_in_its_order(tmp_path):
    rng = np.random.default_rng(0)
    with webdataset.ShardWriter(f"{tmp_path}/%03d.tar", maxcount=7, verbose=0) as writer:
        for i in range(20):
            members = {"png" if i % 3 else "jpg": rng.bytes(600), "txt": b"a caption", "json": b"{}", "cls": b"1"}
            writer.write({"__key__": f"some/folder.v1/{i:04d}", **members})
    paths = expand_shards(f"{tmp_path}/*.tar")
    assert ensure_indices(paths) == 3
    dataset = webdataset.WebDataset([str(p) for p in paths], shardshuffle=False, empty_check=False)
    theirs = [(s["__key__"], s.get("jpg", s.get("png")), s["txt"], s["json"]) for s in dataset]
    assert len(theirs) == 20
    assert [(s.key, s.image, s.text, s.json) for s in Shards(paths)] == theirs


names = st.text("ab.é/_-", min_size=1, max_size=8).filter(lambda s: "//" not in s and s.strip("./"))
extensions = st.sampled_from(["jpg", "JPEG", "png", "txt", "json", "cls", "npy", "seg.png", "pickle"])
long_names = st.text("abcdefgh", min_size=90, max_size=300)


@settings(max_examples=120, deadline=None)
@given(
    keys=st.lists(st.one_of(names, long_names), min_size=1, max_size=6, unique_by=lambda k: naive_key(k)),
    members=st.lists(st.tuples(extensions, st.binary(max_size=1500)), min_size=1, max_size=4, unique_by=lambda m: m[0]),
    tar_format=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_random_tars_read_as_tarfile_reads_them(tmp_path_factory, keys, members, tar_format):
    files = [(f"{key}.{extension}", data) for key in keys for extension, data in members]
    path = write_tar(tmp_path_factory.mktemp("tar") / "a.tar", files, tar_format)
    expected = naive(path)
    if expected:
        assert read_all(path) == expected
    else:
        with pytest.raises(ShardError, match="no sample"):
            build_index(path)


def naive_key(key: str) -> str:
    folder, slash, name = key.rpartition("/")
    return folder + slash + name.partition(".")[0]


def test_members_that_are_not_allowed_are_counted_and_never_read(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    bomb = pickle.dumps(Bomb())
    files = [("0.jpg", b"image"), ("0.pkl", bomb), ("0.pyd", bomb), ("0.txt.gz", bomb), ("__meta__", b"")]
    files += [("1.pth", bomb), ("../../2.png", b"outside"), ("../../._2.png", b"a resource fork")]
    path = write_tar(tmp_path / "a.tar", files)
    assert [(s.key, s.image) for s in read_all(path)] == [("0", b"image"), ("../../2", b"outside")]
    assert read_index(path).ignored == {"": 2, "pkl": 1, "pth": 1, "pyd": 1, "txt.gz": 1}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar", "a.tar.idx"]


def test_only_the_members_asked_for_are_read(tmp_path):
    path = write_tar(tmp_path / "a.tar", numbered(2))
    build_index(path)
    sample = Shards([path], IMAGE_EXTENSIONS)[1]
    assert sample.image and sample.text is None and sample.json is None


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_and_offsets_beyond_8_gib(tmp_path, tar_format):
    """The size no longer fits its octal field; the file is sparse, so it takes no room."""
    path = write_tar(tmp_path / "a.tar", [("0.jpg", b"first")], tar_format)
    large = tarfile.TarInfo("0.bin")
    large.size = 9 << 30
    with open(path, "r+b") as file:
        file.seek(1024)
        file.write(large.tobuf(tar_format))
        file.seek(large.size, os.SEEK_CUR)
        file.write(write_tar(tmp_path / "b.tar", [("1.jpg", b"second")]).read_bytes())
    assert [s.image for s in read_all(path)] == [b"first", b"second"]


# --- damage ---------------------------------------------------------------------------------------------------------


def damaged(tmp_path: Path, data: bytes) -> str:
    path = tmp_path / "damaged.tar"
    path.write_bytes(data)
    with pytest.raises(ShardError) as error:
        build_index(path)
    assert not index_path(path).exists()
    assert str(error.value).startswith(f"{path}: byte ")
    return str(error.value).removeprefix(f"{path}: byte ")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[bytes, list[int], int]:
    """A tar's bytes, where its headers begin, and where its end is marked."""
    path = write_tar(tmp_path_factory.mktemp("whole") / "a.tar", numbered(20))
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    end = members[-1].offset_data + -(-members[-1].size // 512) * 512
    return path.read_bytes(), [m.offset for m in members], end


PLACES = range(0, 60, 3)


@pytest.mark.parametrize("place", PLACES)
def test_a_flipped_bit_in_a_header(tmp_path, whole, place):
    data, headers, _ = whole
    changed = bytearray(data)
    changed[headers[place] + (place * 37) % 512] ^= 1 << place % 8
    assert damaged(tmp_path, bytes(changed)).startswith(f"{headers[place]}: a damaged header")


@pytest.mark.parametrize("place", PLACES)
def test_a_cut_inside_a_member(tmp_path, whole, place):
    data, headers, _ = whole
    assert damaged(tmp_path, data[: headers[place] + 513]).startswith(f"{headers[place]}: a member of ")


@pytest.mark.parametrize("place", PLACES)
def test_a_cut_between_members_or_a_missing_end(tmp_path, whole, place):
    data, headers, end = whole
    cut = headers[place] if place else end
    assert damaged(tmp_path, data[:cut]).startswith(f"{cut}: the file ends without an end-of-archive")
    assert damaged(tmp_path, data[:cut] + bytes(512)).startswith(f"{cut}: the file ends without an end-of-archive")


@pytest.mark.parametrize("place", PLACES)
def test_bytes_after_the_end(tmp_path, whole, place):
    data, headers, end = whole
    assert damaged(tmp_path, data + b"\0\0x").startswith(f"{len(data) + 2}: bytes after the end")
    zeroed = data[: headers[place]] + bytes(1024) + data[headers[place] + 1024 :]
    found = int(damaged(tmp_path, zeroed).partition(": bytes after the end")[0])
    assert headers[place] + 1024 <= found < end


@pytest.mark.parametrize("place", PLACES)
def test_a_key_that_comes_back_and_a_member_that_comes_twice(tmp_path, whole, place):
    _, headers, end = whole
    files = numbered(20)
    key = files[place][0].partition(".")[0]
    again = write_tar(tmp_path / "a.tar", [*files, ("zzz.jpg", b""), (f"{key}.png", b"late")]).read_bytes()
    assert damaged(tmp_path, again).startswith(f"{end + 512}: sample b'{key}' comes back")
    ignored = write_tar(tmp_path / "a.tar", [*files, ("zzz.jpg", b""), (f"{key}.cls", b"late")]).read_bytes()
    assert damaged(tmp_path, ignored).startswith(f"{end + 512}: sample b'{key}' comes back")
    twice = write_tar(tmp_path / "a.tar", [*files[: place + 1], files[place]]).read_bytes()
    expected = headers[place + 1] if place + 1 < len(headers) else end
    assert damaged(tmp_path, twice).startswith(f"{expected}: member b'{files[place][0]}' for the second time")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(tmp_path, kind):
    path = write_tar(tmp_path / "a.tar", [("0.jpg", b"x")])
    with tarfile.open(path, "a") as tar:
        member = tarfile.TarInfo("1.jpg")
        member.type, member.linkname = kind, "/etc/passwd"
        tar.addfile(member)
    assert damaged(tmp_path, path.read_bytes()).startswith("1024: member b'1.jpg' has type")


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_overwritten_bytes_give_a_shard_error_or_an_index(tmp_path_factory, data):
    """No damage to a tar with long names makes anything but a ShardError."""
    folder = tmp_path_factory.mktemp("tar")
    files = [("long" * 60 + f"{i}.jpg", b"x" * 700) for i in range(3)]
    whole = write_tar(folder / "a.tar", files, data.draw(st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])))
    content = bytearray(whole.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        new = data.draw(st.binary(min_size=1, max_size=16))
        content[at : at + len(new)] = new
        block = at // 512 * 512
        if data.draw(st.booleans()):  # a header that is wrong but whose checksum is right
            header = content[block : block + 512]
            content[block + 148 : block + 156] = b"%06o\0 " % (sum(header) - sum(header[148:156]) + 256)
    whole.write_bytes(content)
    try:
        build_index(whole)
    except ShardError as error:
        assert str(error).startswith(str(whole))
    else:
        list(Shards([whole]))


# --- the index ------------------------------------------------------------------------------------------------------


@pytest.fixture
def shard(tmp_path) -> Path:
    path = write_tar(tmp_path / "a.tar", numbered(30))
    build_index(path)
    return path


def test_other_bytes_than_were_indexed_are_a_bad_sample(shard):
    """A disk that flips a bit changes neither size nor time."""
    stat, sample = shard.stat(), Shards([shard])[3]
    data = bytearray(shard.read_bytes())
    data[data.index(sample.image) + len(sample.image) // 2] ^= 1
    shard.write_bytes(data)
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    shards = Shards([shard])
    with pytest.raises(DamagedMember):
        shards[3]
    assert shards.describe(3) == f"{shard}: sample 00003"
    assert shards[4].text is not None


def test_a_copied_shard_is_stale_until_its_index_is_renewed(shard):
    os.utime(shard, ns=(0, 12345))
    with pytest.raises(ShardError, match="its index is stale"):
        Shards([shard])
    assert ensure_indices([shard]) == 0
    assert len(Shards([shard])) == 30


def test_a_shard_with_other_contents_is_refused(shard):
    write_tar(shard, [(name, data[::-1]) for name, data in numbered(30)])
    os.utime(shard, (0, 0))  # whole seconds tell, for copies keep no more
    with pytest.raises(ShardError, match=r"its contents changed; if that was meant, delete a\.tar\.idx"):
        ensure_indices([shard])
    index_path(shard).unlink()
    assert ensure_indices([shard]) == 1


def test_a_shard_with_more_zeros_at_its_end_is_the_same(shard):
    shard.write_bytes(shard.read_bytes() + bytes(10240))
    with pytest.raises(ShardError, match="its index is stale"):
        Shards([shard])
    for _ in range(2):
        assert ensure_indices([shard]) == 0
        assert len(Shards([shard])) == 30


def test_a_copy_may_lose_what_is_less_than_a_second(shard):
    os.utime(shard, ns=(0, shard.stat().st_mtime_ns // 10**9 * 10**9))
    assert len(Shards([shard])) == 30


def test_a_list_that_is_older_than_its_indices_is_found_at_the_start(shard):
    path = write_shard_list(shard.parent, [shard.name])
    select_rows(shard, np.arange(5))
    with pytest.raises(ShardError, match=r"a\.tar: its index is another than the list of shards says"):
        ensure_indices(expand_shards(str(path)))


def test_many_shards_without_an_index_are_left_to_prepare(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "MOST_TO_INDEX", 2)
    paths = [write_tar(tmp_path / f"{i}.tar", numbered(1)) for i in range(3)]
    with pytest.raises(ShardError, match=r"0\.tar and 2 more have no index: `make_shards.py prepare FOLDER` builds"):
        ensure_indices(paths)
    assert ensure_indices(paths[:2]) == 2


def test_a_file_system_that_gives_less_than_was_asked_for(shard, monkeypatch):
    expected, pread = list(Shards([shard])), os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, offset: pread(fd, min(size, 100), offset))
    assert list(Shards([shard])) == expected


def test_a_shard_replaced_while_it_is_in_use_is_refused(shard):
    shards = Shards([shard])
    write_tar(shard, numbered(40))
    with pytest.raises(ShardError, match="its index is stale"):
        shards[0]


def test_a_missing_index(tmp_path):
    with pytest.raises(ShardError, match=r"a\.tar: no index \(a\.tar\.idx\)"):
        Shards([write_tar(tmp_path / "a.tar", numbered(1))])


@pytest.mark.parametrize("damage", [b"", b"\xff" * 100, b"short", None])
def test_an_index_that_is_none(shard, damage):
    path = index_path(shard)
    path.write_bytes(path.read_bytes()[:-900] if damage is None else damage)
    with pytest.raises(ShardError, match="not a usable index"):
        Shards([shard])[0]


def test_the_index_takes_under_100_bytes_a_sample(tmp_path):
    """Three members and a key of nine characters, as img2dataset writes them."""
    files = [(f"{i:09d}.{e}", b"x") for i in range(2000) for e in ("jpg", "txt", "json")]
    path = write_tar(tmp_path / "a.tar", files)
    build_index(path)
    assert index_path(path).stat().st_size < 69 * 2000


def test_few_shards_are_open_at_a_time_and_all_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "OPEN_SHARDS", 2)
    files = numbered(12)
    paths = [write_tar(tmp_path / f"{i}.tar", files[i * 9 : i * 9 + 9]) for i in range(4)]
    ensure_indices(paths)
    shards = Shards(paths)
    order = np.random.default_rng(0).permutation(12).tolist() * 2
    open_before = len(os.listdir("/proc/self/fd"))
    assert [shards[i].key for i in order] == [f"{i:05d}" for i in order]
    assert len(os.listdir("/proc/self/fd")) - open_before <= 4  # a shard and its index each
    assert pickle.loads(pickle.dumps(shards))[7] == shards[7]
    with pytest.raises(IndexError, match="sample 12 of 12"):
        shards[12]


# --- rows kept ------------------------------------------------------------------------------------------------------


def test_only_rows_kept_are_served_until_all_are_again(tmp_path):
    files = numbered(12)
    paths = [write_tar(tmp_path / f"{i}.tar", files[i * 18 : i * 18 + 18]) for i in range(2)]
    ensure_indices(paths)
    whole, unopened = list(Shards(paths)), Shards(paths)
    rows = [np.array([1, 4, 5]), np.array([], int)]
    for path, kept in zip(paths, rows, strict=True):
        index = select_rows(path, kept, "because")
        assert (index.samples, len(index), index.reason) == (len(kept), 6, "because")
    shards = Shards(paths)
    assert list(shards) == [whole[1], whole[4], whole[5]]
    assert shards.describe(1) == f"{paths[0]}: sample 00004"
    assert shards.digests[0] != unopened.digests[0]
    with pytest.raises(ShardError, match="its index is another than when this began"):
        unopened[5]
    os.utime(paths[0], ns=(0, 12345))  # copied: the index is renewed, and keeps what it kept
    ensure_indices(paths)
    assert [sample.key for sample in Shards(paths)] == ["00001", "00004", "00005"]
    for path in paths:
        select_rows(path, None)
    assert list(Shards(paths)) == whole and Shards(paths).digests == unopened.digests


@pytest.mark.parametrize("rows", [[3, 2], [1, 1], [-1, 2], [0, 30]])
def test_rows_that_cannot_be_kept(shard, rows):
    with pytest.raises(ValueError, match=r"a\.tar: rows .*: expected ascending ones below 30"):
        select_rows(shard, np.array(rows))
    assert len(Shards([shard])) == 30


def test_no_sample_left(shard):
    select_rows(shard, np.array([], int))
    with pytest.raises(ShardError, match="no sample is left after filtering"):
        Shards([shard])


def test_a_list_of_shards(tmp_path):
    """Nothing but the list is opened before a sample is asked for."""
    files = numbered(12)
    paths = [write_tar(tmp_path / f"{i}.tar", files[i * 9 : i * 9 + 9]) for i in range(4)]
    ensure_indices(paths)
    select_rows(paths[1], np.array([], int))
    select_rows(paths[2], np.array([2]))
    (tmp_path / "unlisted.tar").touch()
    path = write_shard_list(tmp_path, ["2.tar", "0.tar", "1.tar"])
    assert path == tmp_path / "shards.list"
    entries = expand_shards(str(path))
    assert [(e.location, e.samples) for e in entries] == [(paths[2], 1), (paths[0], 3)]
    assert ensure_indices(entries) == 0
    shards = Shards(entries)
    assert [sample.key for sample in shards] == ["00008", "00000", "00001", "00002"]
    select_rows(paths[2], np.array([1]))
    with pytest.raises(ShardError, match="its index is another than when this began; was it prepared again"):
        Shards(entries)[0]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "[" * 100_000,
        "{}",
        '{"format": "aimv2 shards 9", "shards": []}',
        *(
            f'{{"format": "aimv2 shards 1", "shards": [{{"name": "{name}", "samples": {samples}, "digest": "x"}}]}}'
            for name, samples in (
                ("../a.tar", 1),
                ("/a.tar", 1),
                ("b/a.tar", 1),
                ("http://host/a.tar", 1),
                ("pipe:cat", 1),
                ("a.tar", -1),
                ("a.tar", '"x"'),
                ("a.tar", 0),
            )
        ),
    ],
)
def test_lists_that_are_refused(tmp_path, text):
    (tmp_path / "shards.list").write_text(text)
    with pytest.raises(ShardError, match=r"shards\.list: (not a usable list of shards|no sample is left)"):
        expand_shards(f"{tmp_path}/shards.list")
    with pytest.raises(ShardError, match="no such file"):
        expand_shards(f"{tmp_path}/other.list")


# --- headers --------------------------------------------------------------------------------------------------------


def test_the_index_knows_the_headers(tmp_path):
    files = []
    for i, (kind, size) in enumerate([("JPEG", (40, 30)), ("PNG", (70_000, 2)), ("WEBP", (33, 55)), ("TIFF", (9, 9))]):
        image = io.BytesIO()
        Image.new("RGB", size).save(image, kind)
        files += [(f"{i}.jpg", image.getvalue()), (f"{i}.txt", b"x" * (10 + i))]
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (800, 700, 3), np.uint8)
    Image.fromarray(noise).save(buffer, "WEBP", lossless=True, quality=0)
    assert len(buffer.getvalue()) > 1 << 20  # more than is looked at first
    files += [("9.webp", buffer.getvalue())]
    files += [("4.jpg", b""), ("4.png", files[0][1]), ("5.txt", b"y" * 70_000)]
    path = write_tar(tmp_path / "a.tar", files)
    columns = build_index(path).columns
    assert columns["width"].tolist() == [40, 65_535, 33, 0, 700, 0, 0]
    assert columns["height"].tolist() == [30, 2, 55, 0, 800, 0, 0]
    known = [FORMATS.index(kind) for kind in ("JPEG", "PNG", "WEBP")]
    assert columns["image_format"].tolist() == [*known, NO_FORMAT, known[2], NO_FORMAT, NO_FORMAT]
    assert columns["caption_bytes"].tolist() == [10, 11, 12, 13, 0, 0, 65_535]


# --- patterns -------------------------------------------------------------------------------------------------------


def test_patterns(tmp_path):
    for name in ("a-08.tar", "a-09.tar", "a-10.tar", "b.tar", "b.tar.idx", "c.txt"):
        (tmp_path / name).touch()
    assert [p.name for p in expand_shards(f"{tmp_path}/a-{{08..10}}.tar")] == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert [p.name for p in expand_shards(f"{tmp_path}/a-*.tar")] == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert [p.name for p in expand_shards(f"{tmp_path}/*")] == ["a-08.tar", "a-09.tar", "a-10.tar", "b.tar"]
    assert [p.name for p in expand_shards(f"{tmp_path}/b.tar")] == ["b.tar"]
    with pytest.raises(ShardError, match=r"a-11\.tar: no such file"):
        expand_shards(f"{tmp_path}/a-{{08..11}}.tar")
    with pytest.raises(ShardError, match=r"x-\*\.tar: no \.tar file matches"):
        expand_shards(f"{tmp_path}/x-*.tar")
    with pytest.raises(ShardError, match="empty"):
        expand_shards(f"{tmp_path}/a-{{11..08}}.tar")


@pytest.mark.parametrize("pattern", ["pipe:cat a.tar", "http://host/a.tar", "s3://b/a.tar", "file::a.tar"])
def test_only_local_paths(pattern):
    with pytest.raises(ShardError, match="not a local path"):
        expand_shards(pattern)
