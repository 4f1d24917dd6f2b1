"""CLIP_benchmark runs on our LiT: its own functions and its command line, on data made here.

What is right is told by transformers' Aimv2Model, from the same weights, with its own image processor and tokenizer's
ids: images are labelled by what it predicts, so that CLIP_benchmark has to find an accuracy of exactly 1.
"""

import io
import json
import pickle
import re
import runpy
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lit_settings import CLASSES, CONFIG, PROCESSING, TEMPLATES
from PIL import Image
from tiny_models import NATIVE, V2, random_encoder, random_lit
from torch.utils.data import DataLoader

from aimv2.evals.text_image import open_text_image
from aimv2.exports import export_model
from aimv2.harnesses.clip_benchmark import accuracy, load_lit, register_clip_benchmark
from aimv2.text_encoder import TextConfig

pytest.importorskip("clip_benchmark")

DOOR = Path(__file__).parents[2] / "eval" / "clip_benchmark_lit.py"
CAPTIONS = ["a red circle", "two squares below a star", "a heart", "the cross, blue and large", "nothing", "a triangle"]


@pytest.fixture(scope="module")
def harness(lit_exports):
    register_clip_benchmark()
    from clip_benchmark.models import load_clip

    source = str(lit_exports / "ours")
    return load_clip(model_type="aimv2", model_name="tiny", pretrained=source, cache_dir=None, device="cpu")


class Listed(torch.utils.data.Dataset):
    classes = CLASSES

    def __init__(self, images, targets, transform):
        self.images, self.targets, self.transform = images, targets, transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.transform(self.images[index]), self.targets[index]


def zero_shot(harness, pictures, labels, **settings):
    from clip_benchmark.metrics.zeroshot_classification import evaluate

    model, transform, tokenizer = harness
    loader = DataLoader(Listed(pictures, labels, transform), batch_size=5)
    return evaluate(model, loader, tokenizer, CLASSES, TEMPLATES, "cpu", **settings)


# -- Its functions -----------------------------------------------------------------------------------------------------


def test_zero_shot_classification_finds_what_transformers_predicts(harness, pictures, labels):
    found = zero_shot(harness, pictures, labels, amp=False)
    assert found == {"acc1": 1.0, "acc5": 1.0, "mean_per_class_recall": 1.0}
    wrong = (labels + 1) % len(CLASSES)
    assert zero_shot(harness, pictures, wrong, amp=False)["acc1"] == 0.0


def test_features_are_transformers(harness, pictures, reference):
    model, transform, tokenizer = harness
    with torch.no_grad():
        images = model.encode_image(torch.stack([transform(image) for image in pictures]))
        texts = model.encode_text(tokenizer(CAPTIONS))
    # Unit vectors in fp32 from two implementations.
    torch.testing.assert_close(images, reference(pictures), rtol=0, atol=3e-6)
    torch.testing.assert_close(texts, reference(texts=CAPTIONS), rtol=0, atol=3e-6)


def test_amp_as_the_harness_does_it(harness, pictures, labels):
    """bf16 on a CPU. Its classifier and logits are rounded to 2^-9: what is right changes only where classes are near
    each other, here for few of 24 images."""
    model, transform, tokenizer = harness
    pixels = torch.stack([transform(image) for image in pictures])
    with torch.no_grad():
        exact = model.encode_image(pixels)
        with torch.autocast("cpu"):
            rounded, text = model.encode_image(pixels), model.encode_text(tokenizer(CAPTIONS))
    assert rounded.dtype == text.dtype == torch.float32
    assert not torch.equal(rounded, exact)  # bf16 was there
    # Some 25 roundings of 2^-9 in a row of three blocks and the head: 1e-2 or so, of vectors of length 1.
    assert (rounded - exact).norm(dim=1).max() < 4e-2
    assert zero_shot(harness, pictures, labels, amp=True)["acc1"] >= 0.8


def test_retrieval(harness, pictures, reference):
    """Image i comes with captions i and i + 1 of CAPTIONS; recall is counted here by hand."""
    from clip_benchmark.metrics.zeroshot_retrieval import evaluate

    model, transform, tokenizer = harness
    pictures, n = pictures[:6], 6
    texts = [[CAPTIONS[number], CAPTIONS[(number + 1) % n]] for number in range(n)]

    def stack(samples):
        return torch.stack([image for image, _ in samples]), [captions for _, captions in samples]

    loader = DataLoader(Listed(pictures, texts, transform), batch_size=4, collate_fn=stack)
    found = evaluate(model, loader, tokenizer, "cpu", amp=False, recall_k_list=[1, 2])
    scores = reference(texts=[text for two in texts for text in two]) @ reference(pictures).T  # (2 n, n)
    expected = {}
    for k in (1, 2):
        images = scores.topk(k).indices == torch.arange(2 * n)[:, None] // 2
        captions = scores.T.topk(k).indices // 2 == torch.arange(n)[:, None]
        expected[f"image_retrieval_recall@{k}"] = images.any(dim=1).float().mean().item()
        expected[f"text_retrieval_recall@{k}"] = captions.any(dim=1).float().mean().item()
    assert found == pytest.approx(expected) and len(set(expected.values())) > 1


def test_accuracy_is_theirs():
    """Theirs fails with numpy 2.4 in turning an array of one number into a float, and nowhere else: that is mended."""
    generator = torch.Generator().manual_seed(0)
    output, target = torch.randn(50, 7, generator=generator), torch.randint(7, (50,), generator=generator)
    pred = output.topk(5).indices.t()  # as theirs, up to that conversion
    correct = pred.eq(target.view(1, -1).expand_as(pred))
    expected = [correct[:k].sum().item() / 50 for k in (1, 5)]
    assert accuracy(output, target, topk=(1, 5)) == expected and 0 < expected[0] < expected[1] < 1
    from clip_benchmark.metrics import linear_probe, zeroshot_classification

    register_clip_benchmark()
    for module in (linear_probe, zeroshot_classification):  # whichever it now is
        assert module.accuracy(output, target.float(), topk=(1, 5)) == expected


# -- Its command line --------------------------------------------------------------------------------------------------


def write_shards(folder: Path, samples: list[dict[str, bytes]], texts: dict[str, str]) -> None:
    (folder / "test").mkdir(parents=True)
    (folder / "test" / "nshards.txt").write_text("1")
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
    with tarfile.open(folder / "test" / "0.tar", "w") as tar:
        for number, sample in enumerate(samples):
            for suffix, data in sample.items():
                info = tarfile.TarInfo(f"{number:03}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def run_door(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", [str(DOOR), *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(DOOR), run_name="__main__")
    return ended.value.code


def test_command_line(lit_exports, pictures, labels, tmp_path, monkeypatch):
    samples = [
        {"png": png(image), "cls": str(label).encode()} for image, label in zip(pictures, labels.tolist(), strict=True)
    ]
    write_shards(
        tmp_path / "shapes",
        samples,
        {"classnames": "\n".join(CLASSES), "zeroshot_classification_templates": "\n".join(TEMPLATES)},
    )
    monkeypatch.chdir(tmp_path)
    common = ("--num_workers", "0", "--no_amp", "--quiet", "--pretrained", str(lit_exports / "ours"))
    data = ("--dataset", "wds/shapes", "--dataset_root", str(tmp_path / "shapes"))
    assert run_door(monkeypatch, "eval", *data, *common) == 0
    name = str(lit_exports / "ours").strip("/").replace("/", "_")
    result = json.loads((tmp_path / f"shapes_{name}_aimv2_en_zeroshot_classification.json").read_text())
    assert result["metrics"] == {"acc1": 1.0, "acc5": 1.0, "mean_per_class_recall": 1.0}
    assert (result["model"], result["pretrained"]) == ("aimv2", str(lit_exports / "ours"))

    captioned = [{"png": png(image), "txt": CAPTIONS[i].encode()} for i, image in enumerate(pictures[:6])]
    write_shards(tmp_path / "captions", captioned, {"dataset_type": "retrieval"})
    data = ("--dataset", "wds/captions", "--dataset_root", str(tmp_path / "captions"), "--output", "found.json")
    task = ("--task", "zeroshot_retrieval", "--recall_k", "1", "6")
    assert run_door(monkeypatch, "eval", *data, *task, *common) == 0
    metrics = json.loads((tmp_path / "found.json").read_text())["metrics"]
    assert metrics["image_retrieval_recall@6"] == metrics["text_retrieval_recall@6"] == 1.0
    assert metrics["image_retrieval_recall@1"] < 1.0


def test_each_of_several_models_has_a_result_of_its_own(lit_exports, pictures, tmp_path, monkeypatch):
    (tmp_path / "a{0}").mkdir()  # as a file's name is not a format
    for name, source in (("a{0}/b", "ours"), ("c", "transformers")):
        (tmp_path / name).symlink_to(lit_exports / source)
    samples = [{"png": png(image), "txt": text.encode()} for image, text in zip(pictures[:2], CAPTIONS, strict=False)]
    write_shards(tmp_path / "data", samples, {"dataset_type": "retrieval"})
    monkeypatch.chdir(tmp_path)
    data = ("--dataset", "wds/data", "--dataset_root", "data", "--task", "zeroshot_retrieval", "--recall_k", "1")
    common = ("--num_workers", "0", "--no_amp", "--quiet", "--pretrained", "a{0}/b", "./c/")
    assert run_door(monkeypatch, "eval", *data, *common) == 0
    assert run_door(monkeypatch, "eval", *data, *common, "--output", "{pretrained_full_path}-{pretrained}.json") == 0
    found = {path.name: json.loads(path.read_text())["pretrained"] for path in tmp_path.glob("*.json")}
    assert found == {
        "data_a{0}_b_aimv2_en_zeroshot_retrieval.json": "a{0}/b",
        "data_._c_aimv2_en_zeroshot_retrieval.json": "./c/",
        "a{0}_b-a{0}_b.json": "a{0}/b",
        "._c-._c.json": "./c/",
    }


@pytest.mark.parametrize("workers", ["0", "1"])
def test_an_image_that_cannot_be_prepared_ends_it(lit_exports, pictures, tmp_path, monkeypatch, capsys, workers):
    images = [*pictures[:2], Image.new("RGB", (1, 300))]
    samples = [{"png": png(image), "txt": b"a star"} for image in images]
    write_shards(tmp_path / "data", samples, {"dataset_type": "retrieval"})
    monkeypatch.chdir(tmp_path)
    data = ("--dataset", "wds/data", "--dataset_root", "data", "--task", "zeroshot_retrieval")
    common = ("--num_workers", workers, "--no_amp", "--quiet", "--pretrained", str(lit_exports / "ours"))
    assert run_door(monkeypatch, "eval", *data, *common) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"error: (ValueError: )?300x1 pixels: an aspect ratio over 200", said)
    assert not list(tmp_path.glob("*.json"))


def test_what_is_missing_is_one_line(lit_exports, tmp_path, monkeypatch, capsys):
    def said(*arguments: str) -> str:
        assert run_door(monkeypatch, "eval", *arguments, "--quiet", "--num_workers", "0") == 1
        return capsys.readouterr().err

    assert "no: no such file or folder" in said("--pretrained", str(tmp_path / "no"), "--dataset", "cifar10")
    model = ("--pretrained", str(lit_exports / "ours"))
    found = said(*model, "--dataset", "wds/mine", "--dataset_root", str(tmp_path / "no"))
    assert found.endswith("no/test/nshards.txt'\n") and found.count("error: ") == len(found.splitlines()) == 1
    monkeypatch.setitem(sys.modules, "clip_benchmark", None)
    found = said(*model, "--dataset", "cifar10")
    assert found.startswith("error: CLIP_benchmark can't be imported: pip install clip_benchmark (")
    assert len(found.splitlines()) == 1


# -- Edges -------------------------------------------------------------------------------------------------------------


def test_registering_again_changes_nothing():
    from clip_benchmark.models import MODEL_TYPES, TYPE2FUNC

    register_clip_benchmark()
    register_clip_benchmark()
    assert MODEL_TYPES.count("aimv2") == 1 and TYPE2FUNC["aimv2"] is load_lit and "open_clip" in MODEL_TYPES


def test_transform_goes_to_workers(harness, pictures):
    _, transform, tokenizer = harness
    again = pickle.loads(pickle.dumps(transform))
    assert torch.equal(again(pictures[7]), transform(pictures[7]))
    assert torch.equal(pickle.loads(pickle.dumps(tokenizer))("a star"), tokenizer("a star"))


def test_the_exports_own_tokenizer(tmp_path):
    from aimv2.data.tokenizer import Tokenizer, train_tokenizer

    file = train_tokenizer(iter(CAPTIONS * 3), tmp_path / "words", 60, source="here", licence="none")
    words = Tokenizer(file)
    config = replace(CONFIG, text=TextConfig(width=64, depth=1, heads=1, vocab_size=words.vocab_size, eos=words.eos_id))
    model = random_lit(config)
    folder = export_model(model, tmp_path / "lit", config=config, processing=PROCESSING, tokenizer=file)
    ids = load_lit("tiny", str(folder))[2](["a star", "two squares"])
    assert ids.shape == (2, 77) and [words.decode(row) for row in ids.tolist()] == ["a star", "two squares"]


def test_weights_of_few_bits_are_evaluated_in_fp32(tmp_path, pictures):
    """As eval/zero_shot.py does, whatever the export's dtype."""
    model = random_lit(CONFIG).to(torch.bfloat16)
    folder = export_model(model, tmp_path / "lit", config=CONFIG, processing=PROCESSING)
    found, transform, tokenizer = load_lit("tiny", str(folder))
    assert {parameter.dtype for parameter in found.parameters()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in found.parameters()) and not found.training
    other, images = open_text_image(f"aimv2:{folder}"), torch.stack([transform(image) for image in pictures[:3]])
    assert torch.equal(found.encode_image(images), other.encode_image(images))
    assert torch.equal(found.encode_text(tokenizer(CAPTIONS)), other.encode_text(other.tokenizer(CAPTIONS)))


def test_a_native_model_is_given_squares(tmp_path, pictures):
    """Its harness stacks them."""
    config = replace(CONFIG, vision=NATIVE)
    processing = replace(PROCESSING, image_size=None, resize="native")
    folder = export_model(random_lit(config), tmp_path / "lit", config=config, processing=processing)
    _, transform, _ = load_lit("tiny", str(folder))
    assert {transform(image).shape for image in pictures[:3]} == {(3, 224, 224)}


def test_what_is_no_lit_model(lit_exports, tmp_path):
    folder = export_model(random_encoder(V2), tmp_path / "encoder", config=V2, processing=PROCESSING)
    with pytest.raises(ValueError, match="encoder is Vision, without a text tower"):
        load_lit("tiny", str(folder))
    with pytest.raises(ValueError, match=r"cache_dir '/x': expected none, set HF_HOME"):
        load_lit("tiny", str(lit_exports / "ours"), cache_dir="/x")
    small = export_model(random_lit(), tmp_path / "small", config=random_lit().config, processing=PROCESSING)
    with pytest.raises(
        ValueError, match=r"small has 60 tokens and EOS 59, not CLIP's .* expected a tokenizer\.model beside"
    ):
        load_lit("tiny", str(small))
