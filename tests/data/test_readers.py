"""Other readers read our shards, and we read theirs: webdataset's, open_clip's, img2dataset's and plain tar's."""

import functools
import http.server
import inspect
import io
import json
import shutil
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hostile_images import made, picture
from PIL import Image

from aimv2.data.shapes import ShapesRecipe, write_shards
from aimv2.data.shard_writer import RawSample, write_tar
from aimv2.data.shards import Sample, Shards, ensure_indices, expand_shards


def read(pattern: str) -> list[Sample]:
    shards = expand_shards(pattern)
    ensure_indices(shards)
    return list(Shards(shards))


def webdataset_reads(paths: list[Path]) -> list[Sample]:
    dataset = webdataset.WebDataset(list(map(str, paths)), shardshuffle=False, empty_check=False)
    samples = []
    for sample in dataset:
        image = next((sample[e] for e in ("jpg", "png", "webp") if e in sample), None)
        samples.append(Sample(sample["__key__"], image, sample.get("txt"), sample.get("json")))
    return samples


# --- ours, read by others -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    return write_shards(
        ShapesRecipe(difficulty="quick", folder=str(folder), train=25, validation=5, samples_per_shard=10)
    )


def test_webdataset_reads_the_shapes_shards(shapes):
    paths = sorted(shapes.glob("*.tar"))
    assert webdataset_reads(paths) == read(f"{shapes}/*.tar")
    assert len(read(f"{shapes}/*.tar")) == 30
    decoded = next(iter(webdataset.WebDataset(str(paths[0]), shardshuffle=False).decode("pil")))
    assert decoded["jpg"].size == (decoded["json"]["image_size"],) * 2
    assert decoded["txt"] == decoded["json"]["captions"][0]


def test_webdataset_reads_what_the_shard_writer_writes(tmp_path):
    names = ["00000", "some/folder/1", "ünï/日本語", "x" * 90, "g" * 90 + "/" + "h" * 60, "a b", "%41"]
    samples = [
        RawSample(name, {kind: made(kind.upper()), "txt": f"caption {i}".encode(), "json": b"{}"})
        for i, name in enumerate(names)
        for kind in ["png" if i % 2 else "webp"]
    ]
    write_tar(tmp_path / "a.tar", samples)
    theirs = webdataset_reads([tmp_path / "a.tar"])
    assert [s.key for s in theirs] == names
    assert theirs == read(f"{tmp_path}/a.tar")


def test_open_clips_pipeline_reads_the_shapes_shards(shapes, monkeypatch):
    """The pipeline of open_clip's `get_wds_dataset`: the same pairs, decoded, as ours in the order of the tars."""
    data = pytest.importorskip("open_clip_train.data", reason="open_clip's training code is not installed")
    if "eof_value" in inspect.signature(data.tar_file_expander).parameters:
        # A later webdataset marks the end of each shard, which open_clip 3.3 takes for a member.
        monkeypatch.setattr(data, "tar_file_expander", functools.partial(data.tar_file_expander, eof_value=None))
    paths = sorted(map(str, shapes.glob("train-*.tar")))
    pipeline = webdataset.DataPipeline(
        webdataset.SimpleShardList(paths),
        data.tarfile_to_samples_nothrow,
        webdataset.select(data.filter_no_caption_or_no_image),
        webdataset.decode("pilrgb"),
        webdataset.rename(image="jpg;png;jpeg;webp", text="txt"),
        webdataset.to_tuple("image", "text"),
    )
    theirs = list(pipeline)
    ours = read(f"{shapes}/train-*.tar")
    assert [text for _, text in theirs] == [s.text.decode() for s in ours]
    for (image, _), sample in zip(theirs, ours, strict=True):
        assert np.array_equal(np.asarray(image), np.asarray(Image.open(io.BytesIO(sample.image)).convert("RGB")))


@pytest.mark.skipif(shutil.which("tar") is None, reason="no tar")
def test_tar_lists_and_extracts_the_shapes_shards(shapes, tmp_path):
    path = shapes / "train-000000.tar"
    subprocess.run(["tar", "-xf", path, "-C", tmp_path], check=True)
    for sample in read(str(path)):
        assert (tmp_path / f"{sample.key}.jpg").read_bytes() == sample.image
        assert (tmp_path / f"{sample.key}.json").read_bytes() == sample.json


# --- others', read by us --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compressed", [False, True])
def test_reads_webdatasets_writers(tmp_path, compressed):
    """Encoded from objects as users give them; a compressed shard is refused, not inflated."""
    name = "a.tar.gz" if compressed else "a.tar"
    with webdataset.TarWriter(str(tmp_path / name), encoder=True) as writer:
        for i in range(5):
            sample = {"png": np.asarray(picture()), "txt": f"ein Bär {i}", "json": {"index": i}, "cls": i}
            writer.write({"__key__": f"{i:04d}", **sample})
    if compressed:
        shutil.move(tmp_path / name, tmp_path / "a.tar")
        with pytest.raises(ValueError, match="byte 0: a damaged header"):
            read(f"{tmp_path}/a.tar")
        return
    found = read(f"{tmp_path}/a.tar")
    assert found == webdataset_reads([tmp_path / "a.tar"])
    assert [json.loads(s.json)["index"] for s in found] == list(range(5))
    assert found[3].text.decode() == "ein Bär 3"


def test_reads_what_tar_writes(tmp_path):
    """`tar --sort=name -cf`, as most shards by hand are made: with folders, owners and times."""
    if shutil.which("tar") is None:
        pytest.skip("no tar")
    folder = tmp_path / "images"
    (folder / "deep").mkdir(parents=True)
    for i in range(6):
        stem = folder / ("deep" if i % 2 else "") / f"{i:03d}"
        stem.with_suffix(".jpg").write_bytes(made("JPEG"))
        stem.with_suffix(".txt").write_text(f"caption {i}")
    for option in ("--format=gnu", "--format=ustar", "--format=pax"):
        path = tmp_path / f"{option[9:]}.tar"
        subprocess.run(["tar", "--sort=name", option, "-cf", path, "-C", tmp_path, "images"], check=True)
        found = read(str(path))
        assert sorted(s.text.decode() for s in found) == [f"caption {i}" for i in range(6)]
        assert found == webdataset_reads([path])


def test_reads_open_clips_convention(tmp_path):
    """KEY.jpg|png|jpeg|webp and KEY.txt; members of other names and samples without one of the two are among them."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i, extension in enumerate(["jpg", "png", "jpeg", "webp", None, "jpg"]):
            members = {} if extension is None else {extension: made({"jpg": "JPEG"}.get(extension, extension.upper()))}
            members |= {"txt": f"caption {i}".encode()} if i < 5 else {}
            for name, data in (members | {"json": b"{}", "npy": b"x", "cls": b"1"}).items():
                member = tarfile.TarInfo(f"{i:09d}.{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    found = read(f"{tmp_path}/a.tar")
    assert [(s.image is not None, s.text is not None) for s in found] == [(True, True)] * 4 + [
        (False, True),
        (True, False),
    ]


DOWNLOAD = """
import sys
from img2dataset import download
if __name__ == "__main__":
    download(
        url_list=sys.argv[1], output_folder=sys.argv[2], input_format="parquet", output_format="webdataset",
        url_col="url", caption_col="text", save_additional_columns=["id", "clip_similarity_vitl14"],
        processes_count=1, thread_count=4, image_size=64, resize_mode="keep_ratio", number_sample_per_shard=8,
        enable_wandb=False, timeout=5, retries=0, disallowed_header_directives=[],
    )
"""


@pytest.mark.slow
def test_reads_what_img2dataset_downloads(tmp_path):
    """A real run of it against a server of this process: 20 images, of which some are missing or are none."""
    pytest.importorskip("img2dataset")
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    site = tmp_path / "site"
    site.mkdir()
    for i in range(20):
        mode, name = ("CMYK", "JPEG") if i == 3 else ("RGBA", "PNG") if i == 4 else ("RGB", "JPEG")
        data = b"<html>404</html>" if i == 5 else made(name, 100, 80, mode)
        if i != 6:
            (site / f"{i}.jpg").write_bytes(data)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(site))
    handler.func.log_message = lambda *_: None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port = server.server_address[1]
    table = {
        "url": [f"http://127.0.0.1:{port}/{i}.jpg" for i in range(20)],
        "text": [f"caption {i} &amp;amp;#39;" for i in range(20)],
        "id": list(range(100, 120)),
        "clip_similarity_vitl14": [i / 20 for i in range(20)],
    }
    parquet.write_table(pyarrow.table(table), tmp_path / "urls.parquet")
    (tmp_path / "download.py").write_text(DOWNLOAD)
    try:
        done = subprocess.run(
            [sys.executable, "download.py", "urls.parquet", "out"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
            env={"NO_ALBUMENTATIONS_UPDATE": "1", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        )
    finally:
        server.shutdown()
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(p.name for p in (tmp_path / "out").glob("*.tar")) == ["00000.tar", "00001.tar", "00002.tar"]
    found = read(f"{tmp_path}/out/*.tar")
    assert found == webdataset_reads(sorted((tmp_path / "out").glob("*.tar")))
    assert len(found) == 18  # without the one that is missing and the one that is none
    for sample in found:
        record = json.loads(sample.json)
        assert record["caption"] == sample.text.decode() == f"caption {record['id'] - 100} &amp;amp;#39;"
        assert (record["key"], record["status"]) == (sample.key, "success")
        assert Image.open(io.BytesIO(sample.image)).size == (record["width"], record["height"])
    print(f"\nimg2dataset: {len(found)} of 20 downloaded, all read; columns {sorted(json.loads(found[0].json))}")
