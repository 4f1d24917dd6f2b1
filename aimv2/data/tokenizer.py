"""Captions to token ids: cleaning, a sentencepiece model or CLIP's byte pairs, and training the former."""

import gzip
import hashlib
import html
import io
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

try:
    import ftfy
    import sentencepiece
except ImportError as error:
    raise ImportError('tokenizers need ftfy and sentencepiece: pip install "aimv2[train]"') from error

from aimv2.clip_tokens import CLIP
from aimv2.whole_files import whole_file

MOST_CHARACTERS = 1000  # of a clean caption
FEWEST_ALPHANUMERICS = 3
MODEL_FILE = "tokenizer.model"
MOST_WORDS = 2**18  # that CLIP's tokenizer remembers

# Real tags only: "a < b > c" is text.
TAG = re.compile(r"<!--.*?-->|</?[a-zA-Z][^<>]*>", re.DOTALL)
_FIXES = ftfy.TextFixerConfig(unescape_html=False, uncurl_quotes=False, normalization="NFC")
INVISIBLE = ("Cc", "Cf", "Cs")  # control; zero-width and bidirectional format; lone surrogates


def clean_caption(raw: str | bytes) -> str:
    """The caption as the tokenizer sees it: decoded, unescaped, without tags and invisible characters, on one line.

    Never raises on any content. Case and punctuation are kept. "" if fewer than three alphanumerics are left.
    """
    text = raw[: 16 * MOST_CHARACTERS].decode("utf-8", "replace") if isinstance(raw, bytes) else raw
    text = text[: 4 * MOST_CHARACTERS]
    if not text.isascii() or any(sign in text for sign in "&<\x1b"):  # else nothing to repair, which is quick
        text = html.unescape(html.unescape(text))  # web captions are often escaped twice
        text = TAG.sub(" ", text)
        text = ftfy.fix_text(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), _FIXES)
    text = "".join(c for c in text if c.isspace() or unicodedata.category(c) not in INVISIBLE)
    text = " ".join(text.split())[:MOST_CHARACTERS].rstrip()
    return text if sum(map(str.isalnum, text)) >= FEWEST_ALPHANUMERICS else ""


class Tokenizer:
    """A sentencepiece model that ends every caption with EOS.

    Args:
        path: a folder `tokenizers/<name>` that holds tokenizer.model, or a model file, for example SigLIP's
            spiece.model. There padding is EOS (both 1); lengths, not ids, tell them apart.

    Raises:
        FileNotFoundError: no model at `path`.
        ValueError: the file is no sentencepiece model, or has no EOS.
    """

    def __init__(self, path: str | Path):
        file = Path(path)
        file = file / MODEL_FILE if file.is_dir() else file
        if not file.is_file():
            raise FileNotFoundError(f"no tokenizer at {file}: expected a sentencepiece model, or a folder with one")
        model = file.read_bytes()
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(model)
        except RuntimeError:
            raise ValueError(f"{file} is not a sentencepiece model") from None
        self.path = file
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self.vocab_size = self._model.get_piece_size()
        self.eos_id = self._model.eos_id()
        self.unk_id = self._model.unk_id()
        if self.eos_id < 0:
            raise ValueError(f"the sentencepiece model {file} has no end-of-sentence piece (eos_id is {self.eos_id})")
        self.pad_id = self._model.pad_id() if self._model.pad_id() >= 0 else self.eos_id

    def encode(self, caption: str | bytes, limit: int) -> list[int]:
        """At most limit - 1 ids of the cleaned caption, then EOS; [] if the caption is not usable.

        Text that spells a control piece ("</s>") is text, never that piece's id.
        """
        if limit < 1:
            raise ValueError(f"limit is {limit}, expected at least 1 token (EOS)")
        text = clean_caption(caption)
        if not text:
            return []
        ids = [i for i in self._model.encode(text) if i not in (self.eos_id, self.pad_id)]
        return [*ids[: limit - 1], self.eos_id]

    def decode(self, ids: Sequence[int]) -> str:
        """The text up to the first EOS, without padding and unknown pieces."""
        ids = [int(i) for i in ids]
        if self.eos_id in ids:
            ids = ids[: ids.index(self.eos_id)]
        return self._model.decode([i for i in ids if i not in (self.pad_id, self.unk_id)])


class ClipTokenizer:
    """CLIP's byte pairs, from open_clip, which has the vocabulary: the same ids, SOT first and EOS last.

    Lower case, 49,408 tokens. Padding is 0 as there, which is a token too: lengths, not ids, tell them apart.

    Raises:
        ImportError: open_clip is not installed.
    """

    def __init__(self):
        try:
            from open_clip import tokenizer
        except ImportError as error:
            raise ImportError('CLIP\'s tokens need open_clip: pip install "aimv2[eval]"') from error
        self._model = tokenizer.SimpleTokenizer()
        cache = getattr(self._model, "cache", None)  # {word: its pieces}, in the versions that have it
        self._unsplit = dict(cache) if isinstance(cache, dict) else None  # SOT and EOS
        self.fingerprint = hashlib.sha256(gzip.decompress(Path(tokenizer.default_bpe()).read_bytes())).hexdigest()
        self.vocab_size = self._model.vocab_size
        self.sot_id, self.eos_id = self._model.sot_token_id, self._model.eot_token_id
        self.pad_id = 0

    def __reduce__(self):
        return ClipTokenizer, ()  # a process that gets it makes its own

    def encode(self, caption: str | bytes, limit: int) -> list[int]:
        """SOT, ids of the cleaned caption and EOS, at most `limit` in all; [] if the caption is not usable.

        Text that spells SOT or EOS ("<end_of_text>") never is their id.
        """
        if limit < 1:
            raise ValueError(f"limit is {limit}, expected at least 1 token (EOS)")
        text = clean_caption(caption)
        if not text:
            return []
        ids = [i for i in self._model.encode(text) if i not in (self.sot_id, self.eos_id)]
        # It would keep every word of billions of captions.
        if self._unsplit is not None and len(self._model.cache) > MOST_WORDS:
            self._model.cache = dict(self._unsplit)
        return [*[self.sot_id, *ids][: limit - 1], self.eos_id]

    def decode(self, ids: Sequence[int]) -> str:
        """The text up to the first EOS, in lower case and with a space around each sign."""
        ids = [int(i) for i in ids]
        if self.eos_id in ids:
            ids = ids[: ids.index(self.eos_id)]
        return self._model.decode([i for i in ids if i != self.sot_id]).strip()


def open_tokenizer(name: str | Path) -> Tokenizer | ClipTokenizer:
    """The tokenizer of a run: "clip", or the path of a sentencepiece model as `Tokenizer` takes it.

    A folder of that name is "./clip".
    """
    return ClipTokenizer() if name == CLIP else Tokenizer(name)


def train_tokenizer(
    captions: Iterable[str | bytes],
    out: Path,
    vocab_size: int,
    *,
    source: str,
    licence: str,
    model_type: str = "unigram",
    command: str = "",
    force: bool = False,
) -> Path:
    """Train a sentencepiece model and write `out`/tokenizer.model and `out`/README.md.

    The same captions in the same order give the same bytes. Ids: 0 padding, 1 EOS, 2 unknown; BOS is no piece, the
    decoder has a learned vector for it. Text is not normalised beyond `clean_caption`.

    Args:
        captions: raw captions; cleaned here, those that are not usable are skipped.
        vocab_size: the most pieces; fewer if the captions do not give as many. From 1024 on, 256 of them are bytes,
            so that no character is unknown.
        source: where the captions come from, in words, for the README.
        licence: theirs.
        model_type: "unigram", or "bpe", which also makes whole words of a vocabulary of a few dozen words (unigram
            never proposes a piece that occurs in one distinct word only).
        command: what was typed, for the README.
        force: replace a model that is there.

    Returns:
        The model file.

    Raises:
        FileExistsError: `out` has a model and `force` is False.
        ValueError: no usable caption, an unknown model type, or a vocabulary too small for the characters.
    """
    if model_type not in ("unigram", "bpe"):
        raise ValueError(f"model_type is {model_type!r}, expected unigram or bpe")
    model_file = Path(out) / MODEL_FILE
    if model_file.exists() and not force:
        raise FileExistsError(f"{model_file} exists: choose another folder, or force to replace it")
    used = _Reading(text for text in map(clean_caption, captions) if text)
    model = _train(used, vocab_size, model_type)
    model_file.parent.mkdir(parents=True, exist_ok=True)
    readme = _README.format(
        name=model_file.parent.name,
        model_type=model_type,
        pieces=sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size(),
        count=used.count,
        source=source,
        licence=licence,
        sha256=hashlib.sha256(model).hexdigest(),
        version=sentencepiece.__version__,
        command=f"\n```sh\n{command}\n```\n" if command else "",
    )
    with whole_file(model_file.with_name("README.md")) as temporary:
        temporary.write_text(readme, encoding="utf-8")
    with whole_file(model_file) as temporary:
        temporary.write_bytes(model)
    return model_file


_README = """# {name}

Sentencepiece {model_type} model, {pieces} pieces: 0 padding, 1 end of caption, 2 unknown.

| | |
|---|---|
| source | {source} |
| captions | {count:,} |
| licence | {licence} |
| sha256 of tokenizer.model | `{sha256}` |
| trained with | sentencepiece {version} |
{command}"""


class _Reading:
    """An iterator that counts what it has given and keeps the error that ended it, which sentencepiece would wrap."""

    def __init__(self, items: Iterable[str]):
        self._items, self.count, self.error = iter(items), 0, None

    def __iter__(self):
        return self

    def __next__(self) -> str:
        try:
            item = next(self._items)
        except Exception as error:
            self.error = None if isinstance(error, StopIteration) else error
            raise
        self.count += 1
        return item


def _train(captions: _Reading, vocab_size: int, model_type: str) -> bytes:
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=captions,
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            byte_fallback=vocab_size >= 1024,
            normalization_rule_name="identity",
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
    except Exception as error:  # sentencepiece has no class of its own for its errors
        if captions.error is not None:
            raise captions.error from None
        if not captions.count:
            raise ValueError("no usable caption to train a tokenizer on") from None
        reason = str(error).rpartition("] ")[2]  # without the place in its source
        raise ValueError(
            f"sentencepiece cannot make {vocab_size} pieces of {captions.count} captions: {reason}"
        ) from None
    return model.getvalue()
