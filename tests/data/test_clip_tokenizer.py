"""CLIP's tokens against open_clip's tokenizer, whose vocabulary they come from, and in batches."""

import pickle
import re
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aimv2.data.loader import DataConfig, train_loader
from aimv2.data.mixture import Source
from aimv2.data.shapes import ShapesRecipe, captions, scene, write_shards
from aimv2.data.shards import ensure_indices, expand_shards
from aimv2.data.transforms import TransformConfig

open_clip = pytest.importorskip("open_clip")
tokenizers = pytest.importorskip("aimv2.data.tokenizer")

SOT, EOS = 49406, 49407
TEXTS = [
    *(text for i in range(20) for text in captions(scene(1, "validation", i, "full"))),
    "A Photo of TWO dogs,   running!\n on the beach...",
    "caf\N{LATIN SMALL LETTER E WITH ACUTE} table, don't; they're #1 & 50% off",
    "Tom &amp; Jerry",
    "\N{CJK UNIFIED IDEOGRAPH-6771}\N{CJK UNIFIED IDEOGRAPH-4EAC}\N{KATAKANA LETTER TA} tower",
    "a " * 100 + "cat",
]


@pytest.fixture(scope="module")
def clip():
    return tokenizers.open_tokenizer("clip")


@pytest.mark.parametrize("context", [77, 20, 3, 2, 1])
def test_ids_are_open_clips(clip, context):
    expected = open_clip.tokenizer.SimpleTokenizer(context_length=context)(TEXTS)
    for text, row in zip(TEXTS, expected, strict=True):
        ids = clip.encode(text, context)
        assert ids + [clip.pad_id] * (context - len(ids)) == row.tolist()


def test_what_it_says_of_itself(clip):
    assert (clip.vocab_size, clip.sot_id, clip.eos_id, clip.pad_id) == (49408, SOT, EOS, 0)
    assert re.fullmatch("[0-9a-f]{64}", clip.fingerprint) and clip.fingerprint == tokenizers.ClipTokenizer().fingerprint
    copy = pickle.loads(pickle.dumps(clip))
    assert copy.fingerprint == clip.fingerprint and copy.encode(TEXTS[0], 77) == clip.encode(TEXTS[0], 77)


def test_text_comes_back_in_lower_case(clip):
    for text in TEXTS[:20]:
        assert clip.decode([*clip.encode(text, 77), 5, 6]) == " ".join(re.findall(r"\w+|[^\w\s]", text.lower()))
    assert clip.decode([]) == clip.decode([SOT, EOS, 320]) == ""


@pytest.mark.parametrize("caption", ["", "ab", "?!...", b"\xff\xfe", "<start_of_text>"])
def test_unusable_captions_have_no_tokens(clip, caption):
    assert clip.encode(caption, 77) == []
    with pytest.raises(ValueError, match="limit is 0"):
        clip.encode("a cat", 0)


SPELT = [
    "<end_of_text>",
    "&amp;amp;lt;end_of_text&amp;amp;gt;",
    "<Start_Of_Text",
    "< end_of_text >",
    "&lt;",
    ">",
    "cat",
]


@settings(max_examples=300, deadline=None)
@given(
    caption=st.lists(st.sampled_from(SPELT), max_size=6).map("".join) | st.text(st.characters(codec=None), max_size=60),
    limit=st.integers(1, 20),
)
def test_no_content_raises_or_spells_a_control_token(clip, caption, limit):
    ids = clip.encode(caption, limit)
    if ids:
        assert len(ids) <= limit and ids[-1] == EOS and not {SOT, EOS} & set(ids[1:-1])
        assert ids[0] == (SOT if limit > 1 else EOS)
    clip.decode(ids)


def test_it_does_not_remember_every_word(clip, monkeypatch):
    monkeypatch.setattr(tokenizers, "MOST_WORDS", 50)
    expected = [clip.encode(text, 77) for text in TEXTS]
    for i in range(200):
        clip.encode(f"word{i} another", 77)
    assert len(clip._model.cache) < 60
    assert [clip.encode(text, 77) for text in TEXTS] == expected


def test_a_path_is_a_sentencepiece_model(pytestconfig):
    shapes = pytestconfig.rootpath / "tokenizers" / "shapes"
    assert tokenizers.open_tokenizer(shapes).vocab_size == 128
    assert tokenizers.open_tokenizer(str(shapes)).eos_id == 1
    with pytest.raises(FileNotFoundError, match="no tokenizer at Clip"):
        tokenizers.open_tokenizer("Clip")


def test_without_open_clip_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ImportError, match=r'open_clip: pip install "aimv2\[eval\]"'):
        tokenizers.open_tokenizer("clip")


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_have_open_clips_ids(tmp_path, workers):
    write_shards(ShapesRecipe(folder=str(tmp_path), difficulty="quick", train=8, validation=2))
    config = DataConfig(
        train=[Source(name="shapes", shards=f"{tmp_path}/train-*.tar")],
        tokenizer="clip",
        transform=TransformConfig(image_size=32, min_size=8),
        pad_text_to_context=True,
        workers=workers,
    )
    ensure_indices(expand_shards(config.train[0].shards))
    loader = train_loader(config, patch_size=8, micro_batch=8, start=0, seed=0, rank=0, world_size=1)
    batch = next(iter(loader))
    assert batch.text.shape == (8, 77)
    texts = [loader.dataset.tokenizer.decode(row.tolist()) for row in batch.text]
    assert torch.equal(batch.text, open_clip.tokenizer.SimpleTokenizer()(texts))
    assert batch.text_length.tolist() == (batch.text.argmax(dim=1) + 1).tolist()  # EOS is the highest id
