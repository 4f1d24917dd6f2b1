import io
import json
import os
import pickle
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image as Picture

from aimv2.data.shard_writer import write_shards
from aimv2.data.shards import Shards
from aimv2.ingest.huggingface import ImageSet
from aimv2.ingest.pairs import Packing

datasets = pytest.importorskip("datasets")


def encode(kind: str = "JPEG", colour: int = 0, size: tuple[int, int] = (64, 48)) -> bytes:
    buffer = io.BytesIO()
    Picture.new("RGB", size, (colour, 0, 0)).save(buffer, kind)
    return buffer.getvalue()


ROWS = [
    {"image": {"bytes": encode(colour=1), "path": "x.jpg"}, "caption": "a &amp;#39;dog", "n": 1, "raw": b"x"},
    {"image": {"bytes": encode("PNG", 2), "path": None}, "caption": "a cat", "n": 2, "raw": b"x"},
    {"image": {"bytes": encode("WEBP", 3), "path": "x.jpg"}, "caption": "★★★", "n": 3, "raw": b"x"},
    {"image": None, "caption": "nothing", "n": 4, "raw": b"x"},
    {"image": {"bytes": encode(size=(20, 20)), "path": None}, "caption": "a mouse", "n": 5, "raw": b"x"},
]


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


@pytest.fixture
def rows():
    return datasets.Dataset.from_list(ROWS).cast_column("image", datasets.Image())


def open_set(name, split="train", image_column="", caption_columns=(), **packing):
    return ImageSet(
        name=str(name),
        split=split,
        image_column=image_column,
        caption_columns=caption_columns,
        packing=Packing(**packing),
    )


def written(out, source):
    result = write_shards(out, source)
    return list(Shards(sorted(out.glob("*.tar")))), result


def save(kind, rows, folder):
    if kind == "saved":
        rows.save_to_disk(folder)
    elif kind == "saved splits":
        datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(folder)
    else:
        folder.mkdir()
        rows.to_parquet(folder / "train-00000-of-00001.parquet")
    return folder


@pytest.mark.parametrize("kind", ["saved", "saved splits", "parquet"])
def test_bytes_are_taken_as_the_set_has_them(tmp_path, rows, kind):
    source = open_set(save(kind, rows, tmp_path / "set"))
    assert len(source) == 5
    samples, result = written(tmp_path / "out", source)
    assert [(s.key, s.image, s.text, json.loads(s.json)) for s in samples] == [
        (
            "000000000",
            encode(colour=1),
            b"a &amp;#39;dog",
            {"source": "train: row 0", "captions": ["a &amp;#39;dog"], "n": 1},
        ),
        ("000000001", encode("PNG", 2), b"a cat", {"source": "train: row 1", "captions": ["a cat"], "n": 2}),
    ]
    assert result.examples == {
        "no caption after cleaning": ["train: row 2"],
        "no image": ["train: row 3"],
        "a side under 32 pixels": ["train: row 4"],
    }
    assert result.notes == {"column 'raw' left out, JSON has no form for it": 5}


PRINT_RECIPE = """
import json, sys
from aimv2.ingest.huggingface import ImageSet
from aimv2.ingest.pairs import Packing
source = ImageSet(name=sys.argv[1], split="train", packing=Packing(samples_per_shard=2))
print(json.dumps(source.recipe))
"""


def test_a_run_goes_on_in_another_process(tmp_path, rows):
    """It opens the set anew, and must find the same; its workers get the rows."""
    folder = save("parquet", rows, tmp_path / "set")
    source = open_set(folder, samples_per_shard=2)
    _, result = written(tmp_path / "out", source)
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "other"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", PRINT_RECIPE, folder], env=environment, capture_output=True, text=True)
    assert json.loads(done.stdout) == source.recipe, done.stderr
    for job in source.jobs():
        assert list(pickle.loads(pickle.dumps(job)).read()) == list(job.read())
    assert written(tmp_path / "out", open_set(folder, samples_per_shard=2))[1] == result
    with pytest.raises(ValueError, match="samples_per_shard = 2, the recipe says 3"):
        written(tmp_path / "out", open_set(folder, samples_per_shard=3))


def test_lists_of_captions_labels_and_bytes(tmp_path):
    features = datasets.Features(
        {
            "raw": datasets.Value("binary"),
            "captions": datasets.List(datasets.Value("string")),
            "label": datasets.ClassLabel(names=["dog", "cat"]),
            "boxes": datasets.List({"x": datasets.Value("float32")}),
        }
    )
    rows = {
        "raw": [encode(), encode()],
        "captions": [["a", "a dog", "the dog"], ["one cat"]],
        "label": [0, None],
        "boxes": [[{"x": 0.5}], []],
    }
    datasets.Dataset.from_dict(rows, features).save_to_disk(tmp_path / "set")
    samples, _ = written(tmp_path / "out", open_set(tmp_path / "set", image_column="raw"))
    assert samples[0].text == b"a dog"  # "a" is too short to be a caption
    assert [json.loads(s.json) for s in samples] == [
        {"source": "train: row 0", "captions": ["a dog", "the dog"], "label": "dog", "boxes": [{"x": 0.5}]},
        {"source": "train: row 1", "captions": ["one cat"], "label": None, "boxes": []},
    ]
    source = open_set(tmp_path / "set", image_column="raw", caption_columns=["label", "captions"])
    samples, _ = written(tmp_path / "labels", source)
    assert [s.text for s in samples] == [b"dog", b"one cat"]


def test_an_imagefolder(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    lines = [{"file_name": "a.jpg", "text": "a dog"}, {"file_name": "b.png", "text": "a cat"}]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "a.jpg").write_bytes(encode())
    (folder / "b.png").write_bytes(encode("PNG"))
    samples, _ = written(tmp_path / "out", open_set(folder))
    assert {s.text: s.image for s in samples} == {b"a dog": encode(), b"a cat": encode("PNG")}


def test_a_set_cannot_name_files_of_the_machine(tmp_path):
    (tmp_path / "private.jpg").write_bytes(encode(colour=9))
    paths = [str(tmp_path / "private.jpg"), "../private.jpg", "/dev/zero", "https://host/a.jpg", "x\0y"]
    images = [{"bytes": None, "path": path} for path in paths] + [{"bytes": encode(), "path": "/dev/zero"}]
    (tmp_path / "set").mkdir()
    table = pa.table({"image": images, "caption": ["a dog"] * len(images)})
    pq.write_table(table, tmp_path / "set" / "train.parquet")  # as the hub has them
    samples, result = written(tmp_path / "out", open_set(tmp_path / "set", image_column="image"))
    assert [s.image for s in samples] == [encode()]
    assert result.dropped == {"the image is outside the folder": len(paths)}


def test_the_code_of_a_set_is_not_run(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "set.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    with pytest.raises(ValueError, match=str(folder)) as error:
        open_set(folder)
    assert not os.path.exists(tmp_path / "ran") and "\n" not in str(error.value)


def test_a_set_without_splits_has_no_other_split(tmp_path, rows):
    folder = save("saved", rows, tmp_path / "set")
    assert len(open_set(folder, "all")) == len(open_set(folder)) == 5
    with pytest.raises(ValueError, match="no split 'test'; it was saved without splits: --split all takes all of it"):
        open_set(folder, "test")


def test_set_errors(tmp_path, rows, monkeypatch):
    folder = save("saved splits", rows, tmp_path / "set")
    for choice, message in (
        ({"split": "dev"}, "no split 'dev'; it has 'train', 'test'"),
        ({"image_column": "picture"}, "no column 'picture'; it has 'image', 'caption', 'n', 'raw'"),
        ({"image_column": "n"}, "column 'n' is Value('int64'), expected images"),
        ({"caption_columns": ["alt"]}, "no column 'alt'"),
    ):
        with pytest.raises(ValueError) as error:
            open_set(folder, **choice)
        assert message in str(error.value) and "\n" not in str(error.value)
    save("saved", rows.remove_columns("caption"), tmp_path / "no captions")
    with pytest.raises(ValueError, match="say by --caption-column which of 'image', 'n', 'raw' has the captions"):
        open_set(tmp_path / "no captions")
    save("saved", rows.remove_columns("image"), tmp_path / "no images")
    with pytest.raises(ValueError, match=r"0 columns of images \[\]: say which by --image-column"):
        open_set(tmp_path / "no images")
    with pytest.raises(
        ValueError, match=r"nowhere: .*; no such folder: for a set on the hub check its name and the network"
    ):
        open_set(tmp_path / "nowhere")
    monkeypatch.setattr(datasets, "__version__", "3.6.0")
    with pytest.raises(ImportError, match=r'run a set.s code: pip install "aimv2\[huggingface\]"'):
        open_set(folder)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'pip install "aimv2\[huggingface\]"'):
        open_set(folder)
