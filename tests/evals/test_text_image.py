"""Models of images and text: the same features and token ids as each library's own, whatever the layout."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import LIT, NATIVE, V2, random_encoder, random_lit
from torch import nn

from aimv2.data.tokenizer import Tokenizer
from aimv2.evals.text_image import open_text_image, text_image_of
from aimv2.exports import export_model
from aimv2.lit import unit
from aimv2.preprocessing import ProcessorConfig
from aimv2.pretrained import load_encoder

PROCESSING = ProcessorConfig(image_size=56, patch_size=14, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), crop_pct=0.875)
SHAPES = Path(__file__).parents[2] / "tokenizers" / "shapes"
CLIP_TEXT = replace(LIT.text, vocab_size=49408, eos=49407, context_length=12)
CLIP_LIT = replace(LIT, text=CLIP_TEXT)
TEXTS = ["a photo of a cat", "dogs, and 3 CATS! in a café", "one two three four five six seven eight nine ten"]
IMAGES = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
CLOSE = {"rtol": 0, "atol": 2e-6}  # unit vectors; other kernels, and q, k, v one by one
CLIP_32 = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 32},
    "crop_size": {"height": 32, "width": 32},
}


@pytest.fixture(scope="module")
def lit():
    return random_lit(CLIP_LIT)


@pytest.fixture(scope="module")
def clip_tokenizer():
    """transformers' own, of the vocabulary that open_clip carries."""
    transformers, open_clip = pytest.importorskip("transformers"), pytest.importorskip("open_clip")
    theirs = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    tokens = open_clip.tokenizer.SimpleTokenizer()
    vocabulary = {theirs.get(token, token): number for token, number in tokens.encoder.items()}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=[merge for merge in tokens.bpe_ranks if len(merge) == 2])


@pytest.fixture(scope="module")
def folders(lit, clip_tokenizer, tmp_path_factory) -> dict[str, Path]:
    """A LiT model in each layout that has one."""
    root = tmp_path_factory.mktemp("lit")
    for layout in ("ours", "apple", "transformers"):
        export_model(lit, root / layout, config=CLIP_LIT, processing=PROCESSING, format=layout)
    clip_tokenizer.save_pretrained(root / "transformers")
    return {layout: root / layout for layout in ("ours", "apple", "transformers")}


@pytest.mark.parametrize("layout", ["ours", "apple", "transformers"])
def test_lit_of_every_layout_gives_the_models_own_features(folders, lit, layout):
    model = open_text_image(f"aimv2:{folders[layout]}")
    ids = model.tokenizer(TEXTS)
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(IMAGES), lit.encode_image(IMAGES), **CLOSE)
        torch.testing.assert_close(model.encode_text(ids), lit.encode_text(ids), **CLOSE)
        raw = lit.encode_text(ids, normalize=False)
    torch.testing.assert_close(model.encode_text(ids, normalize=False), raw, rtol=1e-5, atol=1e-5)
    assert model.processor.config.mean == PROCESSING.mean
    assert model.processor.config.resize_size == PROCESSING.resize_size


def test_transformers_own_model_gives_the_same(folders, lit):
    """Its text tower is causal with eager attention and a mask only: without either, features differ by 0.5."""
    model = open_text_image(f"hf:{folders['transformers']}")
    assert type(model.model).__name__ == "Aimv2Model"
    ids = model.tokenizer(TEXTS)
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(IMAGES), lit.encode_image(IMAGES), **CLOSE)
        torch.testing.assert_close(model.encode_text(ids), lit.encode_text(ids), **CLOSE)
        torch.testing.assert_close(model.encode_text(ids[:1, :7]), lit.encode_text(ids[:1]), **CLOSE)


def test_ids_are_those_of_transformers_clip_tokenizer(folders, clip_tokenizer):
    """Up to EOS: behind it open_clip pads with 0, transformers with EOS."""
    found = open_text_image(f"aimv2:{folders['ours']}").tokenizer(TEXTS)
    expected = clip_tokenizer(TEXTS, padding="max_length", max_length=12, truncation=True, return_tensors="pt")
    assert found.shape == (3, 12)
    for row, other in zip(found, expected.input_ids, strict=True):
        end = row.tolist().index(49407) + 1
        assert row[:end].tolist() == other[:end].tolist()
        assert row.max() == 49407
    assert found[2, -1] == 49407  # cut off, and ended all the same


def test_the_tokenizer_of_an_export_is_used(tmp_path):
    config = replace(LIT, text=replace(LIT.text, vocab_size=Tokenizer(SHAPES).vocab_size, eos=Tokenizer(SHAPES).eos_id))
    lit = random_lit(config)
    export_model(lit, tmp_path / "lit", config=config, processing=PROCESSING, tokenizer=SHAPES)
    model = open_text_image(f"aimv2:{tmp_path / 'lit'}")
    texts = ["a big red circle at the top", "", "a small blue square"]
    ids = model.tokenizer(texts)
    assert ids.shape == (3, config.text.context_length)
    for row, text in zip(ids.tolist(), texts, strict=True):
        own = Tokenizer(SHAPES).encode(text, config.text.context_length) or [config.text.eos]
        assert row == own + [config.text.eos] * (len(row) - len(own))
    torch.testing.assert_close(model.encode_text(ids), lit.encode_text(ids).detach(), **CLOSE)
    assert model.describe()["tokenizer"]["sha256"] == Tokenizer(SHAPES).fingerprint


def test_another_vocabulary_without_its_tokenizer_is_refused(tmp_path):
    export_model(random_lit(), tmp_path / "lit", config=LIT, processing=PROCESSING)
    with pytest.raises(ValueError, match=r"60 tokens and EOS 59, not CLIP's.*expected a tokenizer\.model"):
        open_text_image(f"aimv2:{tmp_path / 'lit'}")
    with pytest.raises(ValueError, match="expected 60 and 59"):
        text_image_of(random_lit(), PROCESSING, SHAPES)


def test_transformers_has_no_tokenizer_of_another_vocabulary(tmp_path):
    pytest.importorskip("transformers")
    export_model(random_lit(), tmp_path / "lit", config=LIT, processing=PROCESSING, format="transformers")
    with pytest.raises(ValueError, match=r"lit has no tokenizer, .* expected aimv2:PATH, of the export") as caught:
        open_text_image(f"hf:{tmp_path / 'lit'}")
    assert "\n" not in str(caught.value)


def test_a_model_without_text_is_refused_by_what_it_is(tmp_path):
    export_model(random_encoder(V2), tmp_path / "encoder", config=V2, processing=PROCESSING)
    export_model(random_encoder(V2), tmp_path / "hf", config=V2, processing=PROCESSING, format="transformers")
    for spec in (f"aimv2:{tmp_path / 'encoder'}", f"aimv2:{tmp_path / 'hf'}", f"hf:{tmp_path / 'hf'}"):
        with pytest.raises(ValueError, match="without a text tower") as caught:
            open_text_image(spec)
        assert spec in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="model is VisionEncoder, without a text tower"):
        text_image_of(random_encoder(V2), PROCESSING)


@pytest.mark.parametrize("spec", ["aimv2:", "timm:vit", "clip", "pixels"])
def test_other_specs_are_refused(spec):
    with pytest.raises(ValueError, match=r"expected aimv2:PATH, open_clip:NAME\[,WEIGHTS\] or hf:NAME-OR-FOLDER"):
        open_text_image(spec)


def test_a_model_in_training_keeps_its_mode_and_its_gradients():
    class Objective(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = random_lit(CLIP_LIT)

    objective = Objective().train()
    model = text_image_of(objective, PROCESSING)
    ids = model.tokenizer(TEXTS)
    assert not model.encode_text(ids).requires_grad
    assert not model.encode_image(IMAGES).requires_grad
    assert all(module.training for module in objective.modules())
    assert all(parameter.requires_grad for parameter in objective.parameters())
    half = text_image_of(Objective().bfloat16(), PROCESSING)
    assert half.encode_text(ids).dtype == torch.float32


def test_both_ways_of_calling_are_open_clips(folders):
    """open_clip 3.3 calls `encode_text(text, normalize=True)`, its main branch `model(text=text)[1]`."""
    model = open_text_image(f"aimv2:{folders['ours']}")
    ids = model.tokenizer(TEXTS)
    image, text, scale = model(text=ids)
    assert image is None
    assert torch.equal(text, model.encode_text(ids, normalize=True))
    torch.testing.assert_close(text.norm(dim=1), torch.ones(3))
    assert torch.equal(model(IMAGES, ids)[0], model.encode_image(IMAGES))
    assert scale.item() == pytest.approx(1 / 0.07)


def test_a_description_tells_weights_and_preprocessing(folders, tmp_path):
    described = open_text_image(f"aimv2:{folders['ours']}").describe()
    assert json.loads(json.dumps(described)) == described
    other = random_lit(CLIP_LIT, seed=1)
    export_model(other, tmp_path / "other", config=CLIP_LIT, processing=replace(PROCESSING, crop_pct=1.0))
    changed = open_text_image(f"aimv2:{tmp_path / 'other'}").describe()
    assert changed["weights"] != described["weights"]
    assert changed["preprocessing_hash"] != described["preprocessing_hash"]
    assert described["parameters"] == sum(parameter.numel() for parameter in other.parameters())


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_models_of_transformers_are_called_as_their_own_code_does(kind, clip_tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    text = {"vocab_size": 49408, "max_position_embeddings": 10, "bos_token_id": 49406, "eos_token_id": 49407}
    settings = {"projection_dim": 24} if kind == "CLIP" else {}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vision_config={**sizes, "image_size": 32, "patch_size": 8}, text_config={**sizes, **text}, **settings
    )
    own = getattr(transformers, f"{kind}Model")(config).eval()
    own.save_pretrained(tmp_path)
    clip_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(CLIP_32))
    model = open_text_image(f"hf:{tmp_path}")
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ids = clip_tokenizer(TEXTS, padding="max_length", max_length=10, truncation=True, return_tensors="pt").input_ids
        expected = own(input_ids=ids, pixel_values=images)
    assert torch.equal(model.tokenizer(TEXTS), ids)
    torch.testing.assert_close(model.encode_image(images), expected.image_embeds, **CLOSE)
    torch.testing.assert_close(model.encode_text(ids), expected.text_embeds, **CLOSE)


def test_weights_that_are_not_all_there_are_refused(clip_tokenizer, folders, tmp_path):
    for file in folders["transformers"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lack text_projection\.weight"):
        open_text_image(f"hf:{tmp_path}")


CLIP_MODEL = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2},
    "text_cfg": {"context_length": 10, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    """A small model as open_clip saves its own."""
    open_clip = pytest.importorskip("open_clip")
    folder = tmp_path_factory.mktemp("open_clip")
    preprocessing = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "resize_mode": "squash"}
    config = {"model_cfg": CLIP_MODEL, "preprocess_cfg": preprocessing}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    save_file(open_clip.CLIP(**CLIP_MODEL).state_dict(), folder / "open_clip_model.safetensors")
    return folder


def test_models_of_open_clip_are_called_as_its_own_code_does(clip_folder):
    import open_clip

    own, _, _ = open_clip.create_model_and_transforms(f"local-dir:{clip_folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{clip_folder}")
    model = open_text_image(f"open_clip:local-dir:{clip_folder}")
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.tokenizer(TEXTS), tokenizer(TEXTS))
    assert model.tokenizer(TEXTS).shape == (3, 10)
    with torch.no_grad():
        image, text, _ = own.eval()(images, tokenizer(TEXTS))
    torch.testing.assert_close(model.encode_image(images), image, **CLOSE)
    torch.testing.assert_close(model.encode_text(tokenizer(TEXTS)), text, **CLOSE)
    assert (model.processor.config.resize, model.processor.config.mean) == ("squash", (0.5, 0.5, 0.5))


def test_open_clips_names_are_taken_with_and_without_weights(clip_folder, tmp_path):
    import open_clip

    (tmp_path / "tiny-pair.json").write_text(json.dumps(CLIP_MODEL))
    open_clip.add_model_config(tmp_path / "tiny-pair.json")
    untrained, again = (open_text_image("open_clip:tiny-pair") for _ in range(2))
    assert untrained.describe() == again.describe()
    assert (untrained.trained, untrained.name) == (False, "random-tiny-pair")
    weights = clip_folder / "open_clip_model.safetensors"
    trained = open_text_image(f"open_clip:tiny-pair,{weights}")
    assert trained.trained
    whole = open_text_image(f"open_clip:local-dir:{clip_folder}")
    assert torch.equal(trained.encode_text(trained.tokenizer(TEXTS)), whole.encode_text(whole.tokenizer(TEXTS)))
    with pytest.raises(ValueError, match="'nothing' is not one of"):
        open_text_image("open_clip:nothing")
    with pytest.raises(ValueError, match=r"weights '/nowhere\.pt': no such file"):
        open_text_image("open_clip:tiny-pair,/nowhere.pt")


def test_models_of_any_image_size_are_refused(lit):
    native = replace(PROCESSING, image_size=None, resize="native", crop_pct=1.0)
    with pytest.raises(ValueError, match="images of any size"):
        text_image_of(lit, native)


def test_the_same_weights_with_another_setting_are_another_model(lit, folders, tmp_path):
    other = replace(CLIP_LIT, pool_heads=1)
    export_model(lit.state_dict(), tmp_path / "ours", config=other, processing=PROCESSING)
    shutil.copytree(folders["transformers"], tmp_path / "transformers")
    config = json.loads((tmp_path / "transformers" / "config.json").read_text())
    config["vision_config"]["num_attention_heads"] = 1
    (tmp_path / "transformers" / "config.json").write_text(json.dumps(config))
    for source, layout in (("aimv2", "ours"), ("hf", "transformers")):
        one, two = (
            open_text_image(f"{source}:{folder / layout}").describe() for folder in (folders["ours"].parent, tmp_path)
        )
        assert one["weights"] == two["weights"]
        assert one["config"] != two["config"]


@torch.no_grad()
@pytest.mark.parametrize("layout", ["ours", "apple", "transformers"])
def test_another_size_is_that_of_load_encoder(folders, lit, layout):
    """Its interpolated positions, under the same pool and projection; text and preprocessing are not touched."""
    model = open_text_image(f"aimv2:{folders[layout]}", image_size=84)
    encoder = load_encoder(folders[layout], image_size=84)
    images = torch.randn(2, 3, 84, 84, generator=torch.Generator().manual_seed(0))
    expected = unit(lit.image_projection(lit.pool(encoder(images))))
    torch.testing.assert_close(model.encode_image(images), expected, **CLOSE)
    assert model.processor.config == encoder.processor.config
    ids = model.tokenizer(TEXTS)
    torch.testing.assert_close(model.encode_text(ids), lit.encode_text(ids), **CLOSE)
    assert model.describe()["config"] != open_text_image(f"aimv2:{folders[layout]}").describe()["config"]


def test_its_own_size_changes_nothing(folders):
    one, two = (open_text_image(f"aimv2:{folders['ours']}", image_size=size) for size in (None, 56))
    assert one.describe() == two.describe()


@pytest.mark.parametrize(("size", "words"), [("large", "expected pixels"), (0, "expected pixels"), (60, "14")])
def test_sizes_that_are_none(folders, size, words):
    with pytest.raises(ValueError, match=words):
        open_text_image(f"aimv2:{folders['ours']}", image_size=size)


def test_transformers_does_not_resize_aimv2(folders):
    with pytest.raises(ValueError, match="image_size 84: expected 56, transformers does not interpolate"):
        open_text_image(f"hf:{folders['transformers']}", image_size=84)


@torch.no_grad()
def test_transformers_resizes_clip(clip_tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    text = {"vocab_size": 49408, "max_position_embeddings": 10, "bos_token_id": 49406, "eos_token_id": 49407}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        vision_config={**sizes, "image_size": 32, "patch_size": 8}, text_config={**sizes, **text}, projection_dim=24
    )
    own = transformers.CLIPModel(config).eval()
    own.save_pretrained(tmp_path)
    clip_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(CLIP_32))
    model = open_text_image(f"hf:{tmp_path}", image_size=48)
    assert model.processor.config.image_size == 48
    images = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    expected = own.get_image_features(images, interpolate_pos_encoding=True).pooler_output
    torch.testing.assert_close(model.encode_image(images, normalize=False), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_open_clip_resizes(clip_folder):
    import open_clip

    model = open_text_image(f"open_clip:local-dir:{clip_folder}", image_size=48)
    own, _, _ = open_clip.create_model_and_transforms(f"local-dir:{clip_folder}", force_image_size=48)
    images = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.encode_image(images), own.eval().encode_image(images, normalize=True), **CLOSE)
    assert model.processor.config.image_size == 48


def test_a_native_model_sees_the_whole_image(tmp_path):
    """As a square: no side is cut off."""
    config = replace(CLIP_LIT, vision=NATIVE)
    native = replace(PROCESSING, image_size=None, resize="native", crop_pct=1.0)
    export_model(random_lit(config), tmp_path / "lit", config=config, processing=native)
    for size in (None, 84):
        found = open_text_image(f"aimv2:{tmp_path / 'lit'}", image_size=size).processor.config
        assert (found.image_size, found.resize, found.resize_size) == (size or 224, "squash", size or 224)


def test_clip_by_name(lit):
    """As a run's data.tokenizer says it."""
    named, unnamed = (text_image_of(lit, PROCESSING, tokenizer) for tokenizer in ("clip", None))
    assert torch.equal(named.tokenizer(TEXTS), unnamed.tokenizer(TEXTS))
    assert named.describe() == unnamed.describe()
    with pytest.raises(ValueError, match="model has 60 tokens and EOS 59, not CLIP's"):
        text_image_of(random_lit(), PROCESSING, "clip")
