"""Texts -> the token ids of a LiT model: CLIP's byte pairs, or a sentencepiece model's.

T token positions.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from aimv2.clip_tokens import CLIP, EOS, VOCABULARY, are_clips
from aimv2.evals.encoders.packages import optional
from aimv2.exports import TOKENIZER
from aimv2.text_encoder import TextConfig


def lit_tokenizer(
    config: TextConfig, spec: str, model_file: str | Path | None = None
) -> tuple[Callable[[Sequence[str]], Tensor], dict]:
    """The tokenizer of a text tower and its description: `model_file`'s, or CLIP's byte pairs.

    Raises:
        ValueError: neither has the tower's vocabulary.
    """
    if model_file not in (None, CLIP):
        tokens = SentencepieceTokens(model_file, config, spec)
        return tokens, {"kind": "sentencepiece", "sha256": tokens.fingerprint, "context": config.context_length}
    if not are_clips(config):
        raise ValueError(
            f"{spec} has {config.vocab_size} tokens and EOS {config.eos}, not CLIP's {VOCABULARY} and {EOS}: "
            f"expected a {TOKENIZER} beside its weights"
        )
    return _clip_tokens(config.context_length), {"kind": "CLIP byte pairs", "context": config.context_length}


def _clip_tokens(context_length: int) -> Callable[[Sequence[str]], Tensor]:
    return optional("open_clip").tokenizer.SimpleTokenizer(context_length=context_length)


class SentencepieceTokens:
    """Texts -> ids (B, T) that end with the first EOS. A text without any usable character is EOS alone.

    Raises:
        ValueError: the sentencepiece model is another vocabulary's.
    """

    def __init__(self, model_file: str | Path, config: TextConfig, spec: str):
        from aimv2.data.tokenizer import Tokenizer

        self._tokenizer, self._config = Tokenizer(model_file), config
        self.fingerprint = self._tokenizer.fingerprint
        found = (self._tokenizer.vocab_size, self._tokenizer.eos_id)
        if found != (config.vocab_size, config.eos):
            raise ValueError(
                f"{model_file} has {found[0]} tokens and EOS {found[1]}: "
                f"expected {config.vocab_size} and {config.eos}, as {spec} has"
            )

    def __call__(self, texts: Sequence[str]) -> Tensor:
        c = self._config
        ids = torch.full((len(texts), c.context_length), c.eos)
        for row, text in zip(ids, texts, strict=True):
            found = self._tokenizer.encode(text, c.context_length)
            row[: len(found)] = torch.tensor(found, dtype=torch.int64)
        return ids
