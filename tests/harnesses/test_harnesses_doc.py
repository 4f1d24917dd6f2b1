"""docs/harnesses.md is true: its Python and its commands run, unchanged and in order, on tiny weights by its names."""

import io
import json
import re
import runpy
import shlex
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import V2, random_encoder, random_lit

from aimv2.exports import export_model
from aimv2.lit import LiTConfig
from aimv2.preprocessing import ProcessorConfig
from aimv2.text_encoder import TextConfig

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "harnesses.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[re.Match]:
    return list(re.finditer(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with the models, the image and the shards that the document names."""
    text = TextConfig(width=64, depth=1, heads=1, mlp_hidden=64)
    lit = LiTConfig(vision=replace(V2, image_size=224), text=text, projection=32, pool_heads=2)
    deep = replace(V2, width=32, depth=24, mlp_hidden=48, image_size=336)
    models = {"224-lit": (random_lit(lit), lit, 224), "336": (random_encoder(deep), deep, 336)}
    for name, (model, config, side) in models.items():
        processing = ProcessorConfig(image_size=side, patch_size=14, mean=(0.5,) * 3, std=(0.5,) * 3)
        folder = tmp_path / "apple" / f"aimv2-large-patch14-{name}"
        export_model(model, folder, config=config, processing=processing, format="transformers")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))
    picture.save(tmp_path / "cat.jpg")
    shards = tmp_path / "shards"
    (shards / "test").mkdir(parents=True)
    (shards / "dataset_type.txt").write_text("retrieval")
    (shards / "test" / "nshards.txt").write_text("1")
    with tarfile.open(shards / "test" / "0.tar", "w") as tar:
        for number in range(12):
            for suffix, data in (("jpg", (tmp_path / "cat.jpg").read_bytes()), ("txt", f"cat {number}".encode())):
                info = tarfile.TarInfo(f"{number}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    monkeypatch.chdir(tmp_path)
    return tmp_path


class TinyCifar(torch.utils.data.Dataset):
    """CIFAR-10 of four images, by torchvision's arguments."""

    classes = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

    def __init__(self, root, train, transform, download, **kwargs):
        self.transform = transform

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return self.transform(Image.new("RGB", (32, 32), (60 * index, 0, 0))), index


def run_blocks(*libraries: str) -> dict:
    """The names that the snippets of these libraries leave, run in order; each has to have one."""
    names, found = {"__name__": "snippets"}, set()
    for block in blocks("python"):
        mine = {library for library in libraries if re.search(rf"^(?:from|import) {library}\b", block[1], re.MULTILINE)}
        if mine:
            above = TEXT.count("\n", 0, block.start(1))  # so that a traceback has the document's lines
            exec(compile("\n" * above + block[1], "docs/harnesses.md", "exec"), names)
            found |= mine
    assert found == set(libraries)
    return names


def test_every_snippet_runs(place):
    pytest.importorskip("clip_benchmark")
    pytest.importorskip("timm")
    names = run_blocks("clip_benchmark", "timm", "transformers")
    assert names["texts"].shape == (2, 32) and names["logits"].shape == (1, 10)
    assert [each.shape for each in names["maps"]] == [(1, 32, 24, 24)] * 2
    assert names["backbone"].feature_info.reduction() == [14, 14]


def test_mteb_snippet_runs(place, monkeypatch):
    mteb = pytest.importorskip("mteb")
    import datasets

    def load_data(task, **kwargs):
        features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=TinyCifar.classes)})
        images = [Image.new("RGB", (32, 32), (60 * index, 0, 0)) for index in range(4)]
        rows = datasets.Dataset.from_dict({"img": images, "label": [0, 1, 2, 3]}, features=features)
        task.dataset, task.data_loaded = datasets.DatasetDict(test=rows), True

    monkeypatch.setattr(mteb.get_task("CIFAR10ZeroShot").__class__, "load_data", load_data)
    found = run_blocks("mteb")["results"].task_results[0]
    assert found.task_name == "CIFAR10ZeroShot" and 0 <= found.scores["test"][0]["accuracy"] <= 1
    assert list(place.glob("mteb/**/CIFAR10ZeroShot.json"))


def test_every_command_runs(place, monkeypatch):
    pytest.importorskip("clip_benchmark")
    from clip_benchmark.datasets import builder

    monkeypatch.setattr(builder, "CIFAR10", TinyCifar)
    lines = [line for block in blocks("sh") for line in block[1].replace("\\\n", "").splitlines()]
    assert len(lines) == 3
    for line in lines:
        words = shlex.split(line)
        assert words[0] == "python"
        words = words[:-3] + sorted(map(str, place.glob(words[-3]))) + words[-2:] if "*" in line else words
        monkeypatch.setattr(sys, "argv", words[1:])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / words[1]), run_name="__main__")
        assert ended.value.code == 0
    found = {path.name: json.loads(path.read_text())["metrics"] for path in place.glob("*.json")}
    assert set(found["cifar10_aimv2_en_zeroshot_classification.json"]) == {"acc1", "acc5", "mean_per_class_recall"}
    retrieval = found["mine_aimv2_en_zeroshot_retrieval.json"]
    assert len(retrieval) == 6 and retrieval["image_retrieval_recall@10"] > 0.5
    assert len((place / "all.csv").read_text().splitlines()) == 3


def test_paths_exist_and_lines_fit():
    for path in re.findall(r"(?:scripts|aimv2|eval)/\w+\.py", TEXT):
        assert (ROOT / path).is_file(), path
    assert not [line for line in TEXT.splitlines() if len(line) > 120]
