"""LiT models for transformers: AutoModel and AutoProcessor give our logits; and whose tokens they are."""

import json
import runpy
import string
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_models import LIT, NATIVE, V2, random_encoder, random_lit

from aimv2.clip_tokens import CLIP, EOS, VOCABULARY, are_clips
from aimv2.data.tokenizer import open_tokenizer
from aimv2.decoder import DecoderConfig
from aimv2.evals.text_image import open_text_image
from aimv2.exports import export_model, read_export_config
from aimv2.objectives.aimv2 import AIMv2Config
from aimv2.preprocessing import ProcessorConfig
from aimv2.pretrained import load_encoder, load_model
from aimv2.text_encoder import TextConfig
from aimv2.weights import ModelError

transformers, open_clip = pytest.importorskip("transformers"), pytest.importorskip("open_clip")

SCRIPT = Path(__file__).parents[1] / "scripts" / "export.py"
PROCESSING = ProcessorConfig(image_size=56, patch_size=14, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
CLIP_LIT = replace(LIT, text=replace(LIT.text, vocab_size=VOCABULARY, eos=EOS, context_length=12))
PADDED = ["a photo of a cat", "two DOGS, in 3 cafés", "one two three four five six seven eight nine ten eleven twelve"]
UNPADDED = ["a b", "c d"]
# Unit vectors that agree to a few 1e-7, scaled by 1 / 0.07 = 14.
CLOSE = {"rtol": 0, "atol": 2e-5}
SETTINGS = {"config": CLIP_LIT, "processing": PROCESSING}


def pictures(count: int = 3) -> list[Image.Image]:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 6, 5, 3), dtype=np.uint8)
    return [Image.fromarray(each).resize((80, 91), Image.Resampling.BILINEAR) for each in pixels]


@pytest.fixture(scope="module")
def lit():
    model = random_lit(CLIP_LIT)
    with torch.no_grad():
        model.pool.query.normal_(std=2.0)  # else it looks at all patches alike
        model.log_scale.fill_(3.0)
    return model


@pytest.fixture(scope="module")
def folder(lit, tmp_path_factory) -> Path:
    return export_model(lit, tmp_path_factory.mktemp("lit") / "lit", format="transformers", **SETTINGS)


# -- The same logits ---------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("texts", [PADDED, UNPADDED])
def test_model_and_processor_give_our_logits(folder, lit, texts):
    """From the same pictures and texts, each prepared by its own library; nothing is said about attention."""
    model = transformers.AutoModel.from_pretrained(folder).eval()
    processor = transformers.AutoProcessor.from_pretrained(folder, backend="pil")
    assert (type(model).__name__, type(processor).__name__) == ("Aimv2Model", "CLIPProcessor")
    inputs = processor(text=texts, images=pictures(), padding=True, truncation=True, return_tensors="pt")
    pixels = load_encoder(folder).processor(pictures()).pixel_values
    assert torch.equal(inputs["pixel_values"], pixels)
    ids = open_clip.tokenizer.SimpleTokenizer(context_length=12)(texts)  # padded with 0, theirs with EOS
    expected, per_text = lit.get_logits(pixels, ids)
    found = model(**inputs)
    torch.testing.assert_close(found.logits_per_image, expected, **CLOSE)
    torch.testing.assert_close(found.logits_per_text, per_text, **CLOSE)
    assert expected.std() > 100 * CLOSE["atol"]  # they tell pictures and texts apart


@torch.no_grad()
def test_any_padding_is_the_same(folder, lit):
    model = transformers.AutoModel.from_pretrained(folder).eval()
    processor = transformers.AutoProcessor.from_pretrained(folder)
    shown = {"images": pictures(), "return_tensors": "pt", "truncation": True}
    alone = [model(**processor(text=[text], padding=True, **shown)).logits_per_image for text in PADDED]
    for padding in (True, "max_length"):
        together = model(**processor(text=PADDED, padding=padding, **shown)).logits_per_image
        torch.testing.assert_close(together, torch.cat(alone, dim=1), **CLOSE)


@torch.no_grad()
def test_torchvision_prepares_images_nearly_as_we_do(folder, lit):
    """transformers' default; on smooth images, one of 255 levels here and there, which a logit hardly notices."""
    pixels = load_encoder(folder).processor(pictures()).pixel_values
    processor = transformers.AutoProcessor.from_pretrained(folder)
    theirs = processor(images=pictures(), return_tensors="pt")["pixel_values"]
    assert (pixels - theirs).abs().max() < 2.5 / 255 / 0.2  # two levels, over the smallest std
    ids = open_clip.tokenizer.SimpleTokenizer(context_length=12)(PADDED)
    logits, others = lit.get_logits(pixels, ids)[0], lit.get_logits(theirs, ids)[0]
    assert (logits - others).abs().max() < 0.05 * logits.std()


@torch.no_grad()
def test_sdpa_is_wrong_without_padding(folder, lit):
    """As the card says, of transformers 5.23. Once this fails, config.json need not ask for eager attention."""
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="sdpa").eval()
    processor = transformers.AutoProcessor.from_pretrained(folder, backend="pil")
    for texts, wrong in ((PADDED, False), (UNPADDED, True)):
        inputs = processor(text=texts, images=pictures(), padding=True, truncation=True, return_tensors="pt")
        expected = lit.get_logits(inputs["pixel_values"], inputs["input_ids"])[0]
        assert ((model(**inputs).logits_per_image - expected).abs().max() > 0.1) == wrong


@torch.no_grad()
def test_a_native_model_takes_any_size(tmp_path):
    config = replace(CLIP_LIT, vision=NATIVE)
    processing = replace(PROCESSING, image_size=None, resize="native")
    model = random_lit(config)
    folder = export_model(model, tmp_path / "lit", config=config, processing=processing, format="transformers")
    wide = [picture.resize((84, 28)) for picture in pictures()]  # of whole patches: left as they are
    processor = transformers.AutoProcessor.from_pretrained(folder, backend="pil")
    inputs = processor(text=PADDED, images=wide, padding=True, truncation=True, return_tensors="pt")
    assert inputs["pixel_values"].shape == (3, 3, 28, 84)
    found = transformers.AutoModel.from_pretrained(folder).eval()(**inputs).logits_per_image
    expected = model.get_logits(inputs["pixel_values"], inputs["input_ids"])[0]
    torch.testing.assert_close(found, expected, **CLOSE)


# -- Tokens ------------------------------------------------------------------------------------------------------------

# What both clean alike: without "&" and "<", which open_clip takes for HTML.
_LETTERS = "".join(sign for sign in string.ascii_letters + string.digits + string.punctuation if sign not in "&<")


@pytest.fixture(scope="module")
def tokenizers(folder):
    return transformers.AutoTokenizer.from_pretrained(folder), open_clip.tokenizer.SimpleTokenizer(context_length=12)


@settings(deadline=None, max_examples=200)
@given(text=st.text(alphabet=_LETTERS + " éüñßжя中文", max_size=60))
def test_ids_are_open_clips(tokenizers, text):
    theirs, ours = tokenizers
    ids = theirs(text, padding="max_length", truncation=True)["input_ids"]
    expected = ours([text])[0].tolist()
    end = expected.index(EOS) + 1
    assert len(ids) == 12  # the context, known from the export
    assert ids[:end] == expected[:end] and set(ids[end:]) <= {EOS}


def test_the_vocabulary_is_whole(tokenizers, folder):
    tokenizer, _ = tokenizers
    assert (len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id) == (VOCABULARY, EOS - 1, EOS)
    assert tokenizer.decode(tokenizer("a café, twice").input_ids, skip_special_tokens=True) == "a café , twice"
    assert are_clips(TextConfig()) and not are_clips(LIT.text)


def test_other_tokens_have_no_tokenizer_there(tmp_path):
    """Without a word about it transformers opens a tokenizer of two words, whose ids mean nothing."""
    folders = [export_model(random_lit(), tmp_path / "60", config=LIT, processing=PROCESSING, format="transformers")]
    spelled = tmp_path / "tokenizer.model"  # as if of as many pieces as CLIP has
    spelled.write_bytes(b"pieces")
    folders += [
        export_model(random_lit(CLIP_LIT), tmp_path / "file", format="transformers", tokenizer=spelled, **SETTINGS)
    ]
    for folder, tokens in zip(folders, (60, VOCABULARY), strict=True):
        for auto in (transformers.AutoProcessor, transformers.AutoTokenizer):
            with pytest.raises((ValueError, OSError)):
                auto.from_pretrained(folder)
        processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
        assert processor(pictures(), return_tensors="pt")["pixel_values"].shape == (3, 3, 56, 56)
        assert f"has {tokens} tokens of its own" in (folder / "README.md").read_text()
        assert not (folder / "vocab.json").exists()


def test_ours_keeps_the_name_of_clips_tokenizer(lit, tmp_path, monkeypatch, capsys):
    """Through scripts/export.py, too, and from there to transformers."""
    first = export_model(lit, tmp_path / "first", tokenizer=CLIP, **SETTINGS)
    named = {"name": "clip", "sha256": open_tokenizer("clip").fingerprint}
    assert read_export_config(first)["tokenizer"] == named
    for source, out, format in ((first, "again", "ours"), (tmp_path / "again", "theirs", "transformers")):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(source), str(tmp_path / out), "--format", format])
        with pytest.raises(SystemExit) as exit:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        assert exit.value.code == 0, capsys.readouterr().err
    assert read_export_config(tmp_path / "again")["tokenizer"] == named
    assert sorted(path.name for path in (tmp_path / "theirs").iterdir()) == [
        "README.md",
        "config.json",
        "merges.txt",
        "model.safetensors",
        "preprocessor_config.json",
        "tokenizer_config.json",
        "vocab.json",
    ]
    texts = ["a big red circle", "a small blue star at top left"]
    features = [open_text_image(f"{kind}:{tmp_path / name}") for kind, name in (("aimv2", "again"), ("hf", "theirs"))]
    one, two = (model.encode_text(model.tokenizer(texts)) for model in features)
    torch.testing.assert_close(one, two, rtol=0, atol=2e-6)  # unit vectors


def test_aimv2_may_have_clips_tokens_too(tmp_path):
    """A caption decoder of any vocabulary; only a LiT model's own sizes say whether they are CLIP's."""
    config = AIMv2Config(
        vision=V2, decoder=DecoderConfig(width=8, depth=1, heads=2, mlp_hidden=16, vocab_size=VOCABULARY)
    )
    folder = export_model(config.build(), tmp_path / "out", config=config, processing=PROCESSING, tokenizer=CLIP)
    assert read_export_config(folder)["tokenizer"]["name"] == "clip"


# -- What can't be -----------------------------------------------------------------------------------------------------


def test_clips_tokenizer_for_another_vocabulary_is_refused(tmp_path):
    for format in ("ours", "transformers"):
        with pytest.raises(ModelError, match="60 tokens and EOS 59, expected CLIP's 49408 and 49407"):
            export_model(
                random_lit(), tmp_path / "out", config=LIT, processing=PROCESSING, tokenizer=CLIP, format=format
            )
    assert list(tmp_path.iterdir()) == []


def test_what_transformers_has_no_place_for(tmp_path):
    where = {"folder": tmp_path / "out", "processing": PROCESSING}
    heads = replace(CLIP_LIT, pool_heads=4)
    with pytest.raises(ModelError, match="pool_heads 4: transformers has as many as the encoder, 2"):
        export_model(random_lit(heads), config=heads, format="transformers", **where)
    scaled = replace(NATIVE, position_scale=0.5)
    for format in ("apple", "transformers"):
        with pytest.raises(ModelError, match=rf"{format} has sincos positions of scale 1 only, not 0\.5"):
            export_model(random_encoder(scaled), config=scaled, format=format, **where)
    assert list(tmp_path.iterdir()) == []


def test_without_open_clip(lit, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip.tokenizer", None)
    with pytest.raises(ModelError, match=r"comes from open_clip .*: pip install \"aimv2\[eval\]\""):
        export_model(lit, tmp_path / "out", format="transformers", **SETTINGS)
    assert list(tmp_path.iterdir()) == []
    export_model(lit, tmp_path / "ours", **SETTINGS)


# -- The card ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_cards_code_runs(folder, lit):
    """As it stands but for the place; and what it warns of is said."""
    card = (folder / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace("FOLDER", str(folder))
    names = {"transformers": transformers, "image": pictures()[0]}
    exec(code, names)
    assert names["logits"].shape == (1, 2)
    pixels = load_encoder(folder).processor(pictures()[0]).pixel_values
    ids = open_clip.tokenizer.SimpleTokenizer(context_length=12)(names["texts"])
    torch.testing.assert_close(names["logits"], lit.get_logits(pixels, ids)[0], **CLOSE)
    assert "pipeline_tag: zero-shot-image-classification" in card
    assert "With sdpa the text tower of transformers (5.23) is not causal" in card
    assert f"2 causal blocks of width 128, 1 heads, {VOCABULARY} tokens, at most 12 with EOS {EOS}" in card


def test_our_own_card_opens_the_whole_model(lit, tmp_path):
    card = (export_model(lit, tmp_path / "ours", **SETTINGS) / "README.md").read_text()
    assert 'aimv2.load_model("FOLDER")' in card and "sdpa" not in card
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["tokenizer"] is None
    assert load_model(tmp_path / "ours").config == CLIP_LIT
