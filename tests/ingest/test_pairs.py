import io
import json
import math
import os
from datetime import date

import pytest
from PIL import Image

from aimv2.data.images import BadImage, decode_image
from aimv2.ingest.pairs import Packing, Unusable, as_captions, chunks, pack_pair, read_inside


def extension_of(data: bytes) -> str:
    """What the image is called in a shard."""
    return next(iter(pack_pair("0", "here", data, ["a caption"], {}, Packing()).members))


def encode(kind: str = "JPEG", size: tuple[int, int] = (64, 48), mode: str = "RGB", **options) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, "red" if mode in ("RGB", "P") else 0).save(buffer, kind, **options)
    return buffer.getvalue()


def pack(captions, other=None, image=None, **packing):
    return pack_pair("0", "a/b.png", image or encode(), captions, other or {}, Packing(**packing))


@pytest.mark.parametrize(
    ("kind", "extension"),
    [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("GIF", "gif"), ("BMP", "bmp"), ("MPO", "jpg")],
)
def test_the_extension_is_that_of_the_true_format(kind, extension):
    options = {"save_all": True, "append_images": [Image.new("RGB", (64, 48))]} if kind == "MPO" else {}
    data = encode(kind, **options)
    assert extension_of(data) == extension
    assert decode_image(data).size == (64, 48)
    assert list(pack(["a caption"], image=data).members) == [extension, "txt", "json"]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not an image",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n",
        encode()[:20],
        encode("PNG")[:20],
        encode("TIFF"),
        encode("PNG", (31, 400)),
        encode("PNG", (1, 1)),
        encode("PNG", (40, 401)),
        encode("PNG", (8000, 6251), "1"),
        encode("PNG", (20000, 20000), "1"),
        b"\xff\xd8\xff" + bytes(32 << 20),
    ],
    ids=["empty", "text", "eps", "cut_jpeg", "cut_png", "tiff", "small", "one", "long", "large", "bomb", "bytes"],
)
def test_a_header_is_refused_as_the_decoder_would(data):
    """The decoder is what training uses: what is written must not be refused there for its header."""
    with pytest.raises(BadImage) as ours:
        extension_of(data)
    with pytest.raises(BadImage) as theirs:
        decode_image(data)
    assert str(ours.value) == str(theirs.value)


def test_the_limits_themselves_are_allowed():
    for size in ((32, 320), (40, 400)):
        data = encode("PNG", size)
        assert extension_of(data) == "png" and decode_image(data).size == size


def test_bytes_are_stored_as_they_are():
    image = encode(quality=30, progressive=True)
    sample = pack([b"caf\xe9 &amp;#39;", "a dog"], {"url": "u"}, image)
    assert sample.members["jpg"] == image
    assert sample.members["txt"] == b"caf\xe9 &amp;#39;"  # raw: cleaned when it is read
    assert json.loads(sample.members["json"]) == {
        "source": "a/b.png",
        "captions": ["caf\ufffd &amp;#39;", "a dog"],
        "url": "u",
    }
    assert sample.notes == ()


def test_the_first_usable_caption_is_the_text():
    sample = pack(["★★★", "a dog", "", "a dog", "a cat"])
    assert sample.members["txt"] == b"a dog"
    assert json.loads(sample.members["json"])["captions"] == ["a dog", "a cat"]
    assert len(sample.notes) == 1 and "cleaning empties" in sample.notes[0]
    assert pack(["\ud800 dog"]).members["txt"] == b"\xed\xa0\x80 dog"  # cleaned on reading, too


def test_without_a_caption():
    for captions, reason in (([], "no caption"), (["★★★", " "], "no caption after cleaning")):
        with pytest.raises(Unusable, match=f"^{reason}$"):
            pack(captions)
        sample = pack(captions, allow_no_caption=True)
        assert list(sample.members) == ["jpg", "json"]
        assert json.loads(sample.members["json"])["captions"] == []


def test_whatever_a_source_says_becomes_json():
    other = {"n": math.nan, "i": math.inf, "d": date(2024, 2, 3), "b": b"\xff", "l": ({1: None},), "source": "theirs"}
    record = json.loads(pack(["a dog"], other).members["json"])
    assert record == {
        "source": "a/b.png",
        "captions": ["a dog"],
        "n": None,
        "i": None,
        "d": "2024-02-03",
        "b": "\ufffd",
        "l": [{"1": None}],
        "original_source": "theirs",
    }


def test_what_is_nested_too_deeply():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(Unusable, match="nested too deeply"):
        pack(["a dog"], {"deep": deep})


def test_captions_are_texts_and_lists_of_them():
    assert as_captions("a") == ["a"] and as_captions(["a", "b"]) == ["a", "b"]
    assert as_captions(None) == as_captions("") == as_captions(7) == as_captions([1, None]) == as_captions({}) == []


def test_chunks():
    assert list(chunks("abcde", 2)) == [(0, ["a", "b"]), (2, ["c", "d"]), (4, ["e"])]
    assert list(chunks("", 2)) == []


def test_packing_errors():
    with pytest.raises(ValueError, match="samples_per_shard is 0"):
        Packing(samples_per_shard=0)


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "a.jpg").write_bytes(b"inside")
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "root2").mkdir()
    (tmp_path / "root2" / "a.jpg").write_bytes(b"secret")
    (root / "in").symlink_to(root / "sub" / "a.jpg")
    (root / "out").symlink_to(tmp_path / "secret")
    (root / "outer").symlink_to(tmp_path)
    (root / "loop").symlink_to(root / "loop")
    os.mkfifo(root / "pipe")
    return root


@pytest.mark.parametrize("path", ["sub/a.jpg", "./sub/../sub/a.jpg", "in"])
def test_files_of_a_folder_are_read(root, path):
    assert read_inside(root, path, 10, "image") == b"inside"


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("../secret", "the image is outside the folder"),
        ("sub/../../secret", "the image is outside the folder"),
        ("../root2/a.jpg", "the image is outside the folder"),
        ("{root}/sub/a.jpg", "the image is outside the folder"),  # absolute: it would stop working when moved
        ("/etc/passwd", "the image is outside the folder"),
        ("out", "the image is outside the folder"),
        ("outer/secret", "the image is outside the folder"),
        ("sub/a.jpg\0.png", "no such image"),
        ("nothing", "no such image"),
        ("\ud800.jpg", "a name that no file can have"),
        ("loop", "the image cannot be opened"),
        ("sub", "the image is not a file"),
        ("pipe", "the image is not a file"),
        ("", "the image is outside the folder"),
        ("https://host/a.jpg", "the image is a URL"),
        ("file:///etc/passwd", "the image is a URL"),
    ],
)
def test_nothing_else_is_read(root, path, reason):
    with pytest.raises(Unusable, match=reason):
        read_inside(root, path.replace("{root}", str(root)), 10, "image")


def test_a_file_that_is_too_large_is_not_read(root):
    with pytest.raises(Unusable, match="the image has over 0 MiB"):
        read_inside(root, "sub/a.jpg", 5, "image")
