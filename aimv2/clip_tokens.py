"""CLIP's byte pairs, which the published text tower reads: which towers have them, and transformers' files of them."""

import json
from pathlib import Path

from aimv2.text_encoder import TextConfig
from aimv2.weights import ModelError

CLIP = "clip"  # what settings call this tokenizer
VOCABULARY, EOS = 49408, 49407
NO_TOKENIZER = "NoTokenizer"  # the class that a folder without one names
_START, _END = "<|startoftext|>", "<|endoftext|>"
_NAMES = {"<start_of_text>": _START, "<end_of_text>": _END}  # open_clip's and transformers'


def are_clips(text: TextConfig) -> bool:
    """Whether a text tower has as many tokens as CLIP, and its EOS."""
    return (text.vocab_size, text.eos) == (VOCABULARY, EOS)


def write_tokenizer(folder: Path, context_length: int | None) -> None:
    """The files of transformers' CLIPTokenizer, for AutoProcessor: vocab.json, merges.txt and tokenizer_config.json.

    None: the last alone, for a text tower of other tokens. With it transformers raises; without, it would open a
    tokenizer of two words and say nothing.

    Raises:
        ModelError: without open_clip, whose vocabulary it is.
    """
    if context_length is None:
        _write_json(folder / "tokenizer_config.json", {"tokenizer_class": NO_TOKENIZER})
        return
    try:
        from open_clip.tokenizer import SimpleTokenizer
    except ImportError as error:
        raise ModelError(f'CLIP\'s tokenizer comes from open_clip ({error}): pip install "aimv2[eval]"') from error
    clip = SimpleTokenizer()
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "processor_class": "CLIPProcessor",
        "model_max_length": context_length,
        "bos_token": _START,
        "eos_token": _END,
        "unk_token": _END,
        "pad_token": _END,
    }
    merges = "".join(f"{first} {second}\n" for first, second in clip.bpe_ranks)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
    _write_json(folder / "vocab.json", {_NAMES.get(token, token): number for token, number in clip.encoder.items()})
    _write_json(folder / "tokenizer_config.json", settings)


def _write_json(path: Path, contents: dict) -> None:
    path.write_text(json.dumps(contents, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
