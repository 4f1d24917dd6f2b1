"""Our models in mteb: its own evaluators, on data made here."""

from dataclasses import replace

import pytest
import torch
from lit_settings import CLASSES, CONFIG, PROCESSING
from PIL import Image
from tiny_models import NATIVE, V2, random_encoder, random_lit

from aimv2.exports import export_model
from aimv2.pretrained import load_encoder

mteb = pytest.importorskip("mteb")

import datasets  # noqa: E402
from mteb.abstasks.classification import AbsTaskClassification  # noqa: E402
from mteb.abstasks.task_metadata import TaskMetadata  # noqa: E402
from mteb.abstasks.zeroshot_classification import AbsTaskZeroShotClassification  # noqa: E402

from aimv2.harnesses.mteb_models import MtebEncoder  # noqa: E402

PROMPTS = [f"a photo of a {name}." for name in CLASSES]


def metadata(kind: str, modalities: list[str]) -> TaskMetadata:
    return TaskMetadata(
        name=f"Tiny{kind}",
        description="images made here",
        reference=None,
        dataset={"path": "none/here", "revision": "0"},
        type=kind,
        category="i2t" if len(modalities) == 2 else "i2c",
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score="accuracy",
        modalities=modalities,
    )


def given(task_class: type, images: dict[str, list], labels: dict[str, list[int]]):
    """A task whose data are here and not on the hub."""
    task, features = task_class(), datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    task.dataset = datasets.DatasetDict(
        {
            split: datasets.Dataset.from_dict({"image": images[split], "label": labels[split]}, features=features)
            for split in images
        }
    )
    task.data_loaded = True
    return task


class TinyZeroShot(AbsTaskZeroShotClassification):
    metadata = metadata("ZeroShotClassification", ["image", "text"])

    def get_candidate_labels(self) -> list[str]:
        return PROMPTS


class TinyClassification(AbsTaskClassification):
    metadata = metadata("ImageClassification", ["image"])
    input_column_name = "image"
    samples_per_label = 8
    n_experiments = 2


def evaluated(model, task) -> dict:
    found = mteb.evaluate(model, task, cache=None, co2_tracker=False, show_progress_bar=False)
    return found.task_results[0].scores["test"][0]


def test_zero_shot_finds_what_transformers_predicts(lit_exports, pictures, reference):
    labels = (reference(pictures) @ reference(texts=PROMPTS).T).argmax(dim=1).tolist()
    assert len(set(labels)) >= 3
    model = MtebEncoder(lit_exports / "ours")
    images = [image.convert("RGB") for image in pictures]
    assert evaluated(model, given(TinyZeroShot, {"test": images}, {"test": labels}))["accuracy"] == 1.0
    wrong = [(label + 1) % len(CLASSES) for label in labels]
    assert evaluated(model, given(TinyZeroShot, {"test": images}, {"test": wrong}))["accuracy"] == 0.0


def test_classification_of_an_encoders_features(tmp_path, pictures):
    """mteb's own logistic regression: colours are told by any features, random labels by none."""
    folder = export_model(random_encoder(V2), tmp_path / "e", config=V2, processing=PROCESSING)
    model = MtebEncoder(folder, name="me/tiny")
    bright = [image.convert("RGB").point(lambda value: 128 + value // 2) for image in pictures]
    dark = [image.convert("RGB").point(lambda value: value // 2) for image in pictures]
    images = {"train": bright[:12] + dark[:12], "test": bright[12:] + dark[12:]}
    labels = {split: [0] * 12 + [1] * 12 for split in images}
    assert evaluated(model, given(TinyClassification, images, labels))["accuracy"] == 1.0


def test_an_encoders_embedding_is_the_mean_of_its_patches(tmp_path, pictures):
    folder = export_model(random_encoder(V2), tmp_path / "e", config=V2, processing=PROCESSING)
    encoder, model = load_encoder(folder), MtebEncoder(folder)
    found = model.encode([{"image": pictures[:5]}, {"image": pictures[5:7]}])
    expected = encoder(encoder.processor(pictures[:7]).pixel_values).mean(dim=1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)  # sums of 16 in another order
    with pytest.raises(ValueError, match="batch 0: aimv2/e: an encoder without a text tower"):
        model.encode([{"text": ["a star"]}])
    with pytest.raises(ValueError, match="batch 1: audio: expected image or text"):
        model.encode([{"image": pictures[:1]}, {"audio": [0]}])


def test_inputs_that_are_none(lit_exports, pictures):
    model = MtebEncoder(lit_exports / "ours")
    with pytest.raises(ValueError, match="no inputs: expected at least one batch"):
        model.encode([])
    with pytest.raises(ValueError, match="batch 0: text 1 is None: expected a string"):
        model.encode([{"text": ["a star", None]}])
    with pytest.raises(ValueError, match="batch 1: image 1: NoneType: expected a PIL image"):
        model.encode([{"image": pictures[:1]}, {"image": [pictures[1], None]}])


def test_an_image_that_cannot_be_prepared_ends_it(lit_exports, pictures):
    model, images = MtebEncoder(lit_exports / "ours"), [pictures[0].convert("RGB"), Image.new("RGB", (1, 300))]
    with pytest.raises(ValueError, match="batch 0: image 1: 300x1 pixels: an aspect ratio over 200"):
        evaluated(model, given(TinyZeroShot, {"test": images}, {"test": [0, 1]}))
    task = given(TinyZeroShot, {"test": images}, {"test": [0, 1]})
    found = mteb.evaluate(model, task, cache=None, co2_tracker=False, show_progress_bar=False, raise_error=False)
    assert not found.task_results and "an aspect ratio over 200" in found.exceptions[0].exception


def test_native_images_are_as_if_alone(tmp_path, pictures):
    processing = replace(PROCESSING, image_size=None, resize="native", min_patches=4, max_patches=64)
    folder = export_model(random_encoder(NATIVE), tmp_path / "e", config=NATIVE, processing=processing)
    model = MtebEncoder(folder)
    images = [pictures[0], pictures[1].resize((30, 120))]
    alone = torch.cat([model.encode([{"image": [image]}]) for image in images])
    torch.testing.assert_close(model.encode([{"image": images}]), alone, rtol=1e-4, atol=1e-5)


def test_text_and_images_are_of_one_space(lit_exports, pictures, reference):
    model = MtebEncoder(lit_exports / "ours")
    texts = model.encode([{"text": PROMPTS[:4]}, {"text": PROMPTS[4:]}])
    torch.testing.assert_close(texts, reference(texts=PROMPTS), rtol=0, atol=3e-6)
    similarity = model.similarity(model.encode([{"image": pictures}]), texts)
    torch.testing.assert_close(similarity, reference(pictures) @ reference(texts=PROMPTS).T, rtol=0, atol=1e-5)
    assert isinstance(model, mteb.models.EncoderProtocol) and model.mteb_model_meta.modalities == ["image", "text"]


def test_another_model_has_another_revision(tmp_path):
    """mteb skips what it has under a name and a revision."""
    revisions = set()
    for seed, processing in ((0, PROCESSING), (1, PROCESSING), (0, replace(PROCESSING, crop_pct=0.875))):
        folder = export_model(random_encoder(V2, seed), tmp_path / "e", config=V2, processing=processing)
        meta = MtebEncoder(folder).mteb_model_meta
        assert meta.name == "aimv2/e" and meta.embed_dim == 256
        revisions.add(meta.revision)
    assert len(revisions) == 3 and MtebEncoder(folder).mteb_model_meta.revision in revisions


def test_another_configuration_of_the_same_weights_is_another_revision(tmp_path):
    encoder, revisions = random_encoder(V2), set()
    for heads in (V2.heads, 1):
        config = replace(V2, heads=heads)
        folder = export_model(encoder.state_dict(), tmp_path / "model", config=config, processing=PROCESSING)
        revisions.add(MtebEncoder(folder).mteb_model_meta.revision)
    assert len(revisions) == 2 and len({revision.rpartition("-")[0] for revision in revisions}) == 1


def test_another_tokenizer_is_another_revision(tmp_path):
    from aimv2.data.tokenizer import Tokenizer, train_tokenizer

    revisions = set()
    for name, texts in (("one", ["a red circle", "two squares"]), ("other", ["elcric der a", "serauqs owt"])):
        file = train_tokenizer(iter(texts * 9), tmp_path / name, 40, source="here", licence="none")
        words = Tokenizer(file)
        text = replace(CONFIG.text, vocab_size=words.vocab_size, eos=words.eos_id)
        config = replace(CONFIG, text=text)
        folder = tmp_path / name / "lit"
        export_model(random_lit(config), folder, config=config, processing=PROCESSING, tokenizer=file)
        revisions.add(MtebEncoder(folder).mteb_model_meta.revision)
    assert len(revisions) == 2 and len({revision.rpartition("-")[0] for revision in revisions}) == 1


def test_name_of_the_folder_one_is_in(tmp_path, monkeypatch):
    folder = export_model(random_encoder(V2), tmp_path / "mine", config=V2, processing=PROCESSING)
    monkeypatch.chdir(folder)
    assert MtebEncoder(".").mteb_model_meta.name == MtebEncoder(folder).mteb_model_meta.name == "aimv2/mine"
    assert MtebEncoder(".", name="me/e").mteb_model_meta.name == "me/e"


def test_an_export_in_bf16_is_evaluated_in_fp32(tmp_path):
    folder = export_model(random_encoder(V2).to(torch.bfloat16), tmp_path / "e", config=V2, processing=PROCESSING)
    assert {parameter.dtype for parameter in MtebEncoder(folder).model.parameters()} == {torch.float32}
