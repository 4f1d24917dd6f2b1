import io
import json
import os

import pytest
from PIL import Image

from aimv2.data.shard_writer import write_shards
from aimv2.data.shards import Shards
from aimv2.ingest.folders import ImageFolder
from aimv2.ingest.pairs import Packing


def encode(kind: str = "JPEG", colour: int = 0, size: tuple[int, int] = (64, 48)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (colour, 0, 0)).save(buffer, kind)
    return buffer.getvalue()


def fill(root, files: dict[str, bytes | str]):
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    return root


def written(tmp_path, root, **packing):
    """(key, image, text, record) of every sample, and what became of all."""
    out = tmp_path / "out"
    result = write_shards(out, ImageFolder(root, Packing(**packing)))
    samples = Shards(sorted(out.glob("*.tar")))
    return [(s.key, s.image, s.text, json.loads(s.json)) for s in samples], result


def test_images_at_any_depth_with_their_sidecars(tmp_path):
    root = fill(
        tmp_path / "in",
        {
            "b.jpg": encode(colour=1),
            "b.txt": "a &amp;#39;dog\n",
            "a/x.y.PNG": encode("PNG", 2),
            "a/x.y.json": json.dumps({"caption": "a cat", "url": "u", "width": 64}),
            "a/z.jpeg": encode("WEBP", 3),  # not what it is called
            "a/z.txt": b"caf\xe9",
            "a/z.json": json.dumps({"captions": ["caf\ufffd", "a bar"], "text": "other"}),
            "c/list.gif": encode("GIF", 4),
            "c/list.json": json.dumps(["one fish", "two fish"]),
        },
    )
    samples, result = written(tmp_path, root)
    assert samples == [
        ("000000000", encode(colour=1), b"a &amp;#39;dog\n", {"source": "b.jpg", "captions": ["a &amp;#39;dog\n"]}),
        (
            "000000001",
            encode("PNG", 2),
            b"a cat",
            {"source": "a/x.y.PNG", "captions": ["a cat"], "url": "u", "width": 64},
        ),
        (
            "000000002",
            encode("WEBP", 3),
            b"caf\xe9",
            {"source": "a/z.jpeg", "captions": ["caf\ufffd", "a bar"], "text": "other"},
        ),
        ("000000003", encode("GIF", 4), b"one fish", {"source": "c/list.gif", "captions": ["one fish", "two fish"]}),
    ]
    assert result.kept == 4 and not result.dropped and not result.notes


def test_metadata_jsonl_as_imagefolder_has_it(tmp_path):
    lines = [
        {"file_name": "a.png", "text": "a dog", "label": 3},
        {"file_name": "sub/b.png", "text": "a cat"},
        {"file_name": "missing.png", "text": "nothing"},
        {"file_name": "../outside.png", "text": "a secret"},
    ]
    root = fill(
        tmp_path / "in",
        {
            "metadata.jsonl": "\n".join(map(json.dumps, lines)),
            "a.png": encode("PNG"),
            "sub/b.png": encode("PNG"),
            "sub/c.png": encode("PNG"),
        },
    )
    fill(tmp_path, {"outside.png": encode("PNG")})
    samples, result = written(tmp_path, root)
    assert [(text, record) for _, _, text, record in samples] == [
        (b"a dog", {"source": "a.png", "captions": ["a dog"], "file_name": "a.png", "label": 3}),
        (b"a cat", {"source": "sub/b.png", "captions": ["a cat"], "file_name": "sub/b.png"}),
    ]
    assert result.examples == {
        "no caption": ["sub/c.png"],
        "no such image": ["missing.png"],
        "the image is outside the folder": ["../outside.png"],
    }


def test_every_image_that_is_left_out_has_a_reason(tmp_path):
    root = fill(
        tmp_path / "in",
        {
            "good.jpg": encode(),
            "good.txt": "a dog",
            "alone.jpg": encode(),
            "stars.jpg": encode(),
            "stars.txt": "★★★",
            "broken.jpg": b"<html>not found</html>",
            "broken.txt": "a dog",
            "small.png": encode("PNG", size=(20, 100)),
            "small.txt": "a dog",
            "damaged.jpg": encode(),
            "damaged.json": "{",
            "nested.jpg": encode(),
            "nested.json": "[" * 100_000,
            ".hidden.jpg": encode(),
            ".git/a.jpg": encode(),
            "notes.md": "hello",
            "Makefile": "all:",
            "orphan.txt": "no image",
        },
    )
    fill(tmp_path, {"secret.txt": "the password", "secret.jpg": encode()})
    os.symlink(tmp_path / "secret.jpg", root / "link.jpg")
    os.symlink(root / "good.jpg", root / "same.jpg")
    os.symlink(root / "good.txt", root / "same.txt")
    fill(root, {"leak.jpg": encode()})
    os.symlink(tmp_path / "secret.txt", root / "leak.txt")
    os.symlink(tmp_path, root / "up")
    os.symlink("loop.jpg", root / "loop.jpg")
    os.mkfifo(root / "pipe.jpg")
    samples, result = written(tmp_path, root)
    assert [record["source"] for _, _, _, record in samples] == ["good.jpg", "same.jpg"]
    assert result.examples == {
        "a json sidecar that is damaged": ["damaged.jpg", "nested.jpg"],
        "a side under 32 pixels": ["small.png"],
        "no caption": ["alone.jpg"],
        "no caption after cleaning": ["stars.jpg"],
        "not a JPEG, PNG, WEBP, GIF, BMP": ["broken.jpg"],
        "the image cannot be opened (Too many levels of symbolic links)": ["loop.jpg"],
        "the image is not a file": ["pipe.jpg"],
        "the image is outside the folder": ["link.jpg"],
        "the txt sidecar is outside the folder": ["leak.jpg"],
    }
    assert result.notes == {
        "hidden files and folders": 2,
        "other files": 1,
        "other files (.md)": 1,
        "other files (.txt)": 1,
        "symlinks to folders": 1,
    }
    out = [path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert not any(b"the password" in data for data in out)


def test_images_without_captions_if_they_are_wanted(tmp_path):
    root = fill(tmp_path / "in", {"a.jpg": encode(), "b.jpg": encode(), "b.txt": "★★★"})
    samples, _ = written(tmp_path, root, allow_no_caption=True)
    assert [(text, record["captions"]) for _, _, text, record in samples] == [(None, []), (None, [])]


def test_keys_are_numbers_of_the_listing_whatever_is_dropped(tmp_path):
    files = {f"{i:02d}.jpg": encode() for i in range(25)} | {f"{i:02d}.txt": f"dog number {i}" for i in range(1, 25, 2)}
    root = fill(tmp_path / "in", files)
    samples, result = written(tmp_path, root, samples_per_shard=10)
    assert [key for key, *_ in samples] == [f"{i:09d}" for i in range(1, 25, 2)]
    assert sorted(p.name for p in (tmp_path / "out").glob("*.tar")) == ["000000.tar", "000001.tar", "000002.tar"]
    assert result.dropped == {"no caption": 13}


def test_a_folder_that_changed_is_refused(tmp_path):
    root = fill(tmp_path / "in", {"a.jpg": encode(), "a.txt": "a dog"})
    written(tmp_path, root)
    assert written(tmp_path, root)[1].kept == 1
    root.rename(tmp_path / "moved")
    assert written(tmp_path, tmp_path / "moved")[1].kept == 1  # but it may be moved
    fill(tmp_path / "moved", {"b.jpg": encode()})
    with pytest.raises(ValueError, match="images = 1, the recipe says 2"):
        written(tmp_path, tmp_path / "moved")


@pytest.mark.parametrize("name", ["a.jpg", "a.txt", "b.json", "metadata.jsonl"])
def test_an_edited_file_is_seen(tmp_path, name):
    lines = '{"file_name": "c.jpg", "text": "a cat"}'
    files = {"a.jpg": encode(), "a.txt": "a dog", "b.jpg": encode(), "b.json": '"a bat"', "c.jpg": encode()}
    root = fill(tmp_path / "in", files | {"metadata.jsonl": lines})
    written(tmp_path, root)
    path, message = root / name, rf"the files of {root} are others than when {tmp_path}/out was written: write to"
    if name == "metadata.jsonl":
        path.write_text(lines.replace("cat", "rat"))
    else:
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    with pytest.raises(ValueError, match=message):
        written(tmp_path, root)


def test_names_that_match_whatever_their_case_and_form(tmp_path):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    root = fill(
        tmp_path / "in",
        {
            "B.JPG": encode(),
            "B.TXT": "a dog",
            f"{decomposed}.jpg": encode(),
            f"{composed}.txt": "a bar",
            "k.jpg": encode(),
            "k.jpg.txt": "a cat",
            f"l{decomposed}.png": encode("PNG"),
            "metadata.jsonl": json.dumps({"file_name": f"l{composed}.png", "text": "a table"}),
        },
    )
    samples, result = written(tmp_path, root)
    assert [text for _, _, text, _ in samples] == [b"a dog", b"a bar", b"a cat", b"a table"]
    assert not result.dropped and not result.notes


def test_images_that_share_a_txt_are_noted(tmp_path):
    root = fill(tmp_path / "in", {"dup.jpg": encode(), "dup.png": encode("PNG"), "dup.txt": "a dog", "x.gif": encode()})
    samples, result = written(tmp_path, root)
    assert len(samples) == 2 and result.notes == {"images that share a txt or json with another": 1}


def test_several_lines_of_one_image_are_several_captions(tmp_path):
    lines = [{"file_name": "a.jpg", "text": "a dog", "n": 1}, {"file_name": "./a.jpg", "text": "the\u2028dog", "n": 2}]
    root = fill(tmp_path / "in", {"a.jpg": encode(), "metadata.jsonl": "\n".join(map(json.dumps, lines))})
    samples, _ = written(tmp_path, root)
    assert samples[0][2] == b"a dog"
    assert samples[0][3]["captions"] == ["a dog", "the\u2028dog"] and samples[0][3]["n"] == 2


@pytest.mark.parametrize(("source", "out"), [("in", "in"), ("in", "in/made"), ("in", "."), ("in", "in/../in")])
def test_shards_and_images_are_kept_apart(tmp_path, source, out):
    fill(tmp_path / "in", {"a.jpg": encode(), "a.txt": "a dog"})
    with pytest.raises(ValueError, match="shards cannot go into the folder of their images or one around it"):
        ImageFolder(tmp_path / source, Packing(), tmp_path / out)
    ImageFolder(tmp_path / source, Packing(), tmp_path / "inside out")


def test_folder_errors(tmp_path):
    with pytest.raises(ValueError, match="nowhere: not a folder"):
        ImageFolder(tmp_path / "nowhere", Packing())
    with pytest.raises(ValueError, match="no file whose extension is one of jpg"):
        ImageFolder(fill(tmp_path / "in", {"a.tiff": b""}), Packing())
    (tmp_path / "in" / "metadata.jsonl").symlink_to(fill(tmp_path, {"secret": '{"file_name": "a"}'}) / "secret")
    with pytest.raises(ValueError, match=r"metadata\.jsonl: a symlink out of"):
        ImageFolder(tmp_path / "in", Packing())
    (tmp_path / "in" / "metadata.jsonl").unlink()
    with pytest.raises(ValueError, match=r'metadata.jsonl: line 2 is not an object with "file_name"'):
        ImageFolder(fill(tmp_path / "in", {"metadata.jsonl": '{"file_name": "a"}\n{"name": "b"}'}), Packing())
