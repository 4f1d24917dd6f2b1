"""docs/harnesses.md is true: its Python and its commands run, unchanged and in order, on tiny weights by its names."""

import io
import json
import re
import runpy
import shlex
import shutil
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from lit_settings import transformers_features
from PIL import Image
from tiny_models import V2, random_encoder, random_lit

from aimv2.exports import export_model
from aimv2.harnesses.clip_benchmark import load_lit
from aimv2.lit import LiTConfig
from aimv2.preprocessing import ProcessorConfig
from aimv2.pretrained import load_encoder
from aimv2.text_encoder import TextConfig

builder = pytest.importorskip("clip_benchmark.datasets.builder")

CAPTIONS = [f"{number} cats" for number in range(12)]
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
    with torch.no_grad():
        models["224-lit"][0].pool.query.normal_(std=2.0)  # else it looks at all patches alike
    for name, (model, config, side) in models.items():
        processing = ProcessorConfig(image_size=side, patch_size=14, mean=(0.5,) * 3, std=(0.5,) * 3)
        folder = tmp_path / "apple" / f"aimv2-large-patch14-{name}"
        export_model(model, folder, config=config, processing=processing, format="transformers")
    shutil.copytree(tmp_path / "apple" / "aimv2-large-patch14-224-lit", tmp_path / "lit-hf")
    processing = replace(processing, image_size=224)
    ours = tmp_path / "runs" / "shapes_lit" / "export"
    export_model(models["224-lit"][0], ours, config=lit, processing=processing, tokenizer="clip")
    pictures()[0].save(tmp_path / "cat.jpg")
    shards = tmp_path / "shards"
    (shards / "test").mkdir(parents=True)
    (shards / "dataset_type.txt").write_text("retrieval")
    (shards / "test" / "nshards.txt").write_text("1")
    with tarfile.open(shards / "test" / "0.tar", "w") as tar:
        for number, picture in enumerate(pictures()):
            file = io.BytesIO()
            picture.save(file, "png")
            for suffix, data in (("png", file.getvalue()), ("txt", CAPTIONS[number].encode())):
                info = tarfile.TarInfo(f"{number}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pictures() -> list[Image.Image]:
    """12 with large differences."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 5, 4, 3), dtype=np.uint8)
    return [Image.fromarray(each).resize((80, 60), Image.Resampling.BILINEAR) for each in pixels]


class TinyCifar(torch.utils.data.Dataset):
    """CIFAR-10 of twelve images, by torchvision's arguments."""

    labels: ClassVar[list[int]] = [*range(10), 0, 1]
    classes = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

    def __init__(self, root, train, transform, download, **kwargs):
        self.transform = transform

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return self.transform(pictures()[index]), self.labels[index]


def half_right(predictions: list[int]) -> list[int]:
    """Labels by which every other prediction is right."""
    return [(prediction + index % 2) % 10 for index, prediction in enumerate(predictions)]


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
    pytest.importorskip("timm")
    names = run_blocks("clip_benchmark", "timm", "transformers")
    assert names["texts"].shape == (2, 32) and names["logits"].shape == (1, 10)
    assert [each.shape for each in names["maps"]] == [(1, 32, 24, 24)] * 2
    assert names["scores"].shape == (1, 2)
    assert names["backbone"].feature_info.reduction() == [14, 14]
    again = load_encoder(place / "tuned")
    prepared = again.processor(place / "cat.jpg").pixel_values
    assert torch.equal(prepared, names["pixels"]) and again(prepared).shape == (1, 24 * 24, 32)


def test_mteb_snippet_runs(place, monkeypatch):
    mteb = pytest.importorskip("mteb")
    import datasets

    def load_data(task, **kwargs):
        features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=TinyCifar.classes)})
        reference = transformers_features(place / "apple" / "aimv2-large-patch14-224-lit")
        scores = reference(pictures()) @ reference(texts=[f"a photo of a {name}." for name in TinyCifar.classes]).T
        best = scores.topk(2).values
        assert (best[:, 0] - best[:, 1]).min() > 1e-5  # fp32 of two libraries
        labels = half_right(scores.argmax(dim=1).tolist())
        rows = datasets.Dataset.from_dict({"img": pictures(), "label": labels}, features=features)
        task.dataset, task.data_loaded = datasets.DatasetDict(test=rows), True

    monkeypatch.setattr(mteb.get_task("CIFAR10ZeroShot").__class__, "load_data", load_data)
    found = run_blocks("mteb")["results"].task_results[0]
    assert found.task_name == "CIFAR10ZeroShot" and found.scores["test"][0]["accuracy"] == 0.5
    assert list(place.glob("mteb/**/CIFAR10ZeroShot.json"))


def counted_by_hand() -> tuple[list[int], dict[str, float]]:
    """Predicted classes of the pictures, and recalls, in bf16 as the commands do it."""
    model, transform, tokenizer = load_lit(pretrained="apple/aimv2-large-patch14-224-lit")
    templates = builder.build_dataset("cifar10", root="data").templates
    with torch.no_grad(), torch.autocast("cpu"):
        images = model.encode_image(torch.stack([transform(picture) for picture in pictures()]))  # (n, E)
        texts = model.encode_text(tokenizer(CAPTIONS))
        prompts = [[form.format(c=name) for form in templates] for name in TinyCifar.classes]
        classifier = torch.stack([model.encode_text(tokenizer(each)).mean(dim=0) for each in prompts])
        predictions = images @ (classifier / classifier.norm(dim=1, keepdim=True)).T
    scores, recalls, n = texts @ images.T, {}, len(images)
    for k in (1, 5, 10):
        for name, table in (("image", scores), ("text", scores.T)):
            found = sum(row in table[row].argsort(descending=True)[:k] for row in range(n))
            recalls[f"{name}_retrieval_recall@{k}"] = found / n
    return predictions.argmax(dim=1).tolist(), recalls


def test_every_command_runs(place, monkeypatch):
    monkeypatch.setattr(builder, "CIFAR10", TinyCifar)
    predictions, recalls = counted_by_hand()
    monkeypatch.setattr(TinyCifar, "labels", half_right(predictions))
    lines = [line for block in blocks("sh") for line in block[1].replace("\\\n", "").splitlines()]
    assert len(lines) == 4
    for line in lines:
        words = shlex.split(line)
        assert words[0] == "python"
        words = words[:-3] + sorted(map(str, place.glob(words[-3]))) + words[-2:] if "*" in line else words
        monkeypatch.setattr(sys, "argv", words[1:])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / words[1]), run_name="__main__")
        assert ended.value.code == 0
    found = {path.name: json.loads(path.read_text())["metrics"] for path in place.glob("*.json")}
    assert len(found) == 2
    classification = found["cifar10_apple_aimv2-large-patch14-224-lit_aimv2_en_zeroshot_classification.json"]
    assert set(classification) == {"acc1", "acc5", "mean_per_class_recall"} and classification["acc1"] == 0.5
    retrieval = found["mine_apple_aimv2-large-patch14-224-lit_aimv2_en_zeroshot_retrieval.json"]
    assert retrieval == pytest.approx(recalls)
    assert 0 < recalls["image_retrieval_recall@1"] < recalls["image_retrieval_recall@10"] < 1
    assert len((place / "all.csv").read_text().splitlines()) == 3


def test_paths_exist_and_lines_fit():
    for path in re.findall(r"(?:scripts|aimv2|eval)/\w+\.py", TEXT):
        assert (ROOT / path).is_file(), path
    assert not [line for line in TEXT.splitlines() if len(line) > 120]
