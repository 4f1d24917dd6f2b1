import hashlib
import io
import pickle
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aimv2.data.shapes import WORLDS, captions, scene

sentencepiece = pytest.importorskip("sentencepiece")
from aimv2.data.tokenizer import MOST_CHARACTERS, Tokenizer, clean_caption, train_tokenizer  # noqa: E402

SHAPES_TOKENIZER = "tokenizers/shapes"
WORLD_CAPTIONS = [text for d in WORLDS for i in range(300) for text in captions(scene(1, "validation", i, d))]
ENGLISH = [
    f"the {a} {b} number {i} on a {c}!" for i, (a, b, c) in enumerate(zip(*[iter("abcdefghij" * 60)] * 3, strict=True))
]


@pytest.fixture(scope="module")
def shapes(request) -> Tokenizer:
    return Tokenizer(request.config.rootpath / SHAPES_TOKENIZER)


@pytest.fixture(scope="module")
def siglip_layout(tmp_path_factory) -> Tokenizer:
    """A model with SigLIP's ids: padding and EOS are both 1, unknown is 2, no BOS."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(ENGLISH + ["</s> <s> <pad> spelt out"] * 5),
        model_writer=model,
        vocab_size=60,
        hard_vocab_limit=False,
        pad_id=0,  # the trainer refuses two pieces with one id: the copy below is changed afterwards
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
    proto.trainer_spec.pad_id = 1
    proto.trainer_spec.pad_piece = "</s>"
    path = tmp_path_factory.mktemp("siglip") / "spiece.model"
    path.write_bytes(proto.SerializeToString())
    return Tokenizer(path)


# The tokenizer of the embedded data


def test_world_captions_are_one_token_a_word_and_come_back(shapes):
    for text in WORLD_CAPTIONS:
        ids = shapes.encode(text, limit=77)
        assert len(ids) == len(re.findall(r"\w+|[^\w\s]", text)) + 1
        assert ids[-1] == shapes.eos_id and ids.count(shapes.eos_id) == 1
        assert shapes.unk_id not in ids
        assert shapes.decode(ids) == text


def test_shapes_tokenizer_layout_and_readme(shapes):
    assert (shapes.pad_id, shapes.eos_id, shapes.unk_id, shapes.vocab_size) == (0, 1, 2, 128)
    assert shapes.fingerprint == hashlib.sha256(shapes.path.read_bytes()).hexdigest()
    assert shapes.fingerprint in shapes.path.with_name("README.md").read_text()


@pytest.mark.slow
def test_shapes_tokenizer_is_what_its_readme_says(shapes, tmp_path):
    if f"sentencepiece {sentencepiece.__version__} |" not in shapes.path.with_name("README.md").read_text():
        pytest.skip("made by another version of sentencepiece")
    corpus = [text for d in ("quick", "full") for i in range(2000) for text in captions(scene(0, "train", i, d))]
    made = train_tokenizer(corpus, tmp_path, 128, source="", licence="", model_type="bpe")
    assert made.read_bytes() == shapes.path.read_bytes()


# Encoding


def test_eos_is_appended_and_truncation_keeps_it(shapes):
    text = WORLD_CAPTIONS[0]
    whole = shapes.encode(text, limit=77)
    for limit in range(1, len(whole) + 2):
        ids = shapes.encode(text, limit)
        assert ids == [*whole[:-1][: limit - 1], shapes.eos_id]
    with pytest.raises(ValueError, match="limit is 0"):
        shapes.encode(text, 0)


@pytest.mark.parametrize(
    "caption", ["", "  ", "ab", "?!... &amp;", "<br/>", b"\xff\xfe", "abc\N{ZERO WIDTH SPACE}"[2:]]
)
def test_unusable_captions_have_no_tokens(shapes, caption):
    assert shapes.encode(caption, limit=77) == []


def test_siglip_layout_by_path(siglip_layout):
    assert (siglip_layout.eos_id, siglip_layout.pad_id, siglip_layout.unk_id) == (1, 1, 2)
    ids = siglip_layout.encode("the a b number 3", limit=77)
    assert ids[-1] == 1 and ids.count(1) == 1 and len(ids) > 2
    assert siglip_layout.decode(ids) == siglip_layout.decode([*ids, 1, 1, 1]) == "the a b number 3"


def test_spelling_a_control_piece_does_not_make_its_id(shapes, siglip_layout):
    # As a tag it is stripped; escaped so often that it survives the cleaning, it is text.
    for text in ("a </s> spelt out", "a < /s> b </ s> c", "the &amp;amp;lt;/s&amp;amp;gt; number", "x<pad>abc<unk>"):
        for tokenizer in (shapes, siglip_layout):
            ids = tokenizer.encode(text, limit=77)
            assert ids[-1] == tokenizer.eos_id
            assert not {tokenizer.eos_id, tokenizer.pad_id} & set(ids[:-1])
    raw = siglip_layout._model.encode("</s> <pad>")  # without the cleaning in front of it
    assert 1 not in raw and 0 not in raw


def test_decode_stops_at_eos_and_drops_special_pieces(shapes):
    ids = shapes.encode("a big red circle", limit=77)
    assert shapes.decode([shapes.pad_id, ids[0], shapes.unk_id, *ids[1:], *ids]) == "a big red circle"
    assert shapes.decode([]) == shapes.decode([shapes.eos_id, *ids]) == ""


def test_a_tokenizer_survives_pickling(shapes):
    copy = pickle.loads(pickle.dumps(shapes))
    assert copy.encode(WORLD_CAPTIONS[0], 77) == shapes.encode(WORLD_CAPTIONS[0], 77)
    assert copy.fingerprint == shapes.fingerprint


def test_errors_name_the_path(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "nowhere"))):
        Tokenizer(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path))):
        Tokenizer(tmp_path)
    for content in (b"", b"not a model", b"PK\x03\x04" * 100):
        (tmp_path / "wrong.model").write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(str(tmp_path / "wrong.model"))):
            Tokenizer(tmp_path / "wrong.model")


# Cleaning


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("  Two   dogs,\n one\tcat. ", "Two dogs, one cat."),
        (b"caf\xc3\xa9 table", "café table"),
        (b"bad \xff byte", "bad \N{REPLACEMENT CHARACTER} byte"),
        ("Tom &amp;amp; Jerry&amp;#39;s", "Tom & Jerry's"),
        ("a <b>bold</b> move<br/>here", "a bold move here"),
        ("before <!-- hidden --> after", "before after"),
        ("a < b > c", "a < b > c"),
        ("schÃ¶n wÃ¤re es", "schön wäre es"),
        ("cafe\N{COMBINING ACUTE ACCENT}", "café"),
        ("in\N{ZERO WIDTH SPACE}vis\N{RIGHT-TO-LEFT OVERRIDE}ible\x00\x07", "invisible"),
        ("lone \ud800 surrogate", "lone \N{REPLACEMENT CHARACTER} surrogate"),
        ("\x1b[31mred\x1b[0m text", "red text"),
        ("“Quoted” … kept", "“Quoted” … kept"),
        ("東京タワー", "東京タワー"),
        ("a1", ""),
        ("...!?", ""),
    ],
)
def test_clean_caption(raw, clean):
    assert clean_caption(raw) == clean


def test_clean_caption_is_bounded():
    assert len(clean_caption("word " * 10_000)) <= MOST_CHARACTERS
    assert clean_caption("<" * 100_000) == ""


# Any code point at all, surrogates included, and what captions are damaged with.
anything = st.text(st.characters(codec=None), max_size=60) | st.lists(
    st.sampled_from(
        [
            "</s>",
            "&amp;",
            "&#xD800;",
            "<b",
            ">",
            "\ud83d",
            "\ude00",
            "\N{RIGHT-TO-LEFT OVERRIDE}",
            "a1b",
            " ",
            "Ã©",
            "<!--",
        ]
    )
).map("".join)


@settings(max_examples=400, deadline=None)
@given(raw=anything | st.binary(max_size=60), limit=st.integers(1, 20))
def test_no_content_raises(shapes, siglip_layout, raw, limit):
    text = clean_caption(raw)
    text.encode()  # no surrogates are left
    assert text == " ".join(text.split()) and len(text) <= MOST_CHARACTERS
    for tokenizer in (shapes, siglip_layout):
        ids = tokenizer.encode(raw, limit)
        assert (ids == []) == (text == "")
        if ids:
            assert len(ids) <= limit and ids[-1] == tokenizer.eos_id and ids.count(tokenizer.eos_id) == 1
        tokenizer.decode(ids)


# Training


def test_training_is_deterministic_and_refuses_to_replace(tmp_path):
    options = {"source": "made up", "licence": "CC0-1.0", "command": "python train"}
    first = train_tokenizer(iter(ENGLISH), tmp_path / "one", 60, **options)
    second = train_tokenizer(iter(ENGLISH), tmp_path / "two", 60, **options)
    assert first.read_bytes() == second.read_bytes()
    readme = (tmp_path / "one" / "README.md").read_text()
    for part in ("# one", "made up", "CC0-1.0", "python train", Tokenizer(first).fingerprint, f"{len(ENGLISH)}"):
        assert part in readme
    with pytest.raises(FileExistsError, match=re.escape(str(first))):
        train_tokenizer(iter(ENGLISH), tmp_path / "one", 60, **options)
    train_tokenizer(iter(ENGLISH), tmp_path / "one", 50, **options, force=True)
    assert Tokenizer(first).vocab_size < Tokenizer(second).vocab_size
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == ["README.md", "tokenizer.model"]


def test_a_large_vocabulary_knows_every_character(tmp_path):
    tokenizer = Tokenizer(train_tokenizer(ENGLISH, tmp_path / "bytes", 1024, source="", licence=""))
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id) == (0, 1, 2)
    for text in ("東京 Straße ½ 🦜", "a\N{REPLACEMENT CHARACTER}bc"):
        ids = tokenizer.encode(text, 77)
        assert tokenizer.unk_id not in ids and tokenizer.decode(ids) == text


def test_training_errors(tmp_path):
    with pytest.raises(ValueError, match="no usable caption"):
        train_tokenizer(["", "?"], tmp_path / "none", 100, source="", licence="")
    with pytest.raises(ValueError, match="cannot make 5 pieces"):
        train_tokenizer(ENGLISH, tmp_path / "small", 5, source="", licence="")
    with pytest.raises(ValueError, match="'word'"):
        train_tokenizer(ENGLISH, tmp_path / "kind", 100, source="", licence="", model_type="word")
    assert list(tmp_path.iterdir()) == []
