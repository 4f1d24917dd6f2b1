"""100,000 random captions (5,000 in CI) through the tokenizer: no exception, and ids as they must be.

`pytest -s` prints how many were unusable, the rate and the slowest.
"""

import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from aimv2.data.tokenizer import MOST_CHARACTERS, Tokenizer, clean_caption

TOKENIZER = Path(__file__).parents[2] / "tokenizers" / "shapes"

PIECES = [
    "</s>", "<s>", "<pad>", "<unk>", "</S>", "< /s>", "&lt;/s&gt;", "&amp;lt;/s&amp;gt;", "&amp;amp;#39;",
    "&#x110000;", "&#xD800;", "&#0;", "&nbsp", "&notit;", "<b>", "</b", "<br/>", "<!--", "-->",
    "<script>alert(1)</script>", "<![CDATA[", "\x00", "\x07", "\x1b[31m", "\ud83d", "\ude00", "\u202e", "\u2066",
    "\u200b", "\ufeff", "\xad", "\ufffe", "\U0010ffff", "ำ", "ﷺ", "Å", "\u0300" * 20,
    "\U0001f3f3\ufe0f\u200d\U0001f308", "\U0001f469\u200d\U0001f469\u200d\U0001f467", "Ã©", "â€™", "ï»¿", "schÃ¶n",
    " ", "\u3000", "\u2028", "\r\n", "\t", "▁", "a red circle", "%s%n", "{0}", "\\u0041", "../../", "' OR 1=1",
    "[INST]", "<0x0A>", "1" * 50, "ﬁ", "ß", "İ", "中" * 30, "�",
]  # fmt: skip


def random_caption(rng: np.random.Generator) -> str | bytes:
    """Anything: every plane, lone surrogates, bytes, pieces that mean something somewhere, and long runs of one."""
    kind, length = int(rng.integers(8)), int(rng.integers(0, 40))
    if kind == 0:
        return rng.bytes(length * 3)
    if kind == 1:
        return "".join(map(chr, rng.integers(0, 0x110000, length).tolist()))
    if kind == 2:
        return "".join(map(chr, rng.integers(0, 0x3000, length).tolist()))
    if kind == 3:
        return "".join(map(chr, rng.integers(0xD700, 0xE100, length).tolist()))
    if kind == 4:
        return PIECES[int(rng.integers(len(PIECES)))] * int(rng.integers(1, 300))
    text = "".join(PIECES[i] for i in rng.integers(0, len(PIECES), length).tolist())
    if kind == 5:
        return text.encode("utf-8", "surrogatepass")[int(rng.integers(2)) :]
    if kind == 6:
        return text.encode("utf-16", "surrogatepass")
    return text


def check_captions(count: int) -> None:
    """0 exceptions; at most `limit` ids, the last of them EOS, no EOS or padding before; clean text on one line."""
    tokenizer, rng = Tokenizer(TOKENIZER), np.random.default_rng(0)
    control = {tokenizer.eos_id, tokenizer.pad_id}
    spent, slowest, unstable, empty = 0.0, 0.0, 0, 0
    for number in range(count):
        caption, limit = random_caption(rng), int(rng.integers(1, 78))
        begin = time.process_time()
        ids = tokenizer.encode(caption, limit)
        took = time.process_time() - begin
        spent, slowest = spent + took, max(slowest, took)
        if ids:
            assert len(ids) <= limit and ids[-1] == tokenizer.eos_id and not control & set(ids[:-1]), repr(caption)
        empty += not ids
        if number % 10 == 0:
            text = clean_caption(caption)
            assert len(text) <= MOST_CHARACTERS and text == " ".join(text.split()) and text.encode() is not None
            unstable += clean_caption(text) != text
    print(f"\n{count} random captions: 0 exceptions, {empty} unusable, {count / spent:.0f} a second")
    print(f"  slowest {1000 * slowest:.1f} ms; {unstable} of {count // 10} change when cleaned again")
    assert 0 < empty < count // 2


def test_5000_random_captions():
    check_captions(5000)


@pytest.mark.slow
def test_100_000_random_captions():
    check_captions(100_000)


@pytest.mark.parametrize("piece", ["<!--", "&amp;", "</a", "a\u0300", "Ã", "\x1b["])
def test_a_caption_of_32_mib_takes_no_more_than_a_short_one(piece):
    """It is cut before it is decoded or cleaned: memory, which is what grows, stays under a MiB."""
    tokenizer = Tokenizer(TOKENIZER)
    text = piece * (4 * MOST_CHARACTERS // len(piece) + 1)
    expected = tokenizer.encode(text.encode(), 77)
    long = piece.encode() * ((32 << 20) // len(piece.encode()))
    tracemalloc.start()
    try:
        found = tokenizer.encode(long, 77)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found == expected
    assert peak < 1 << 20
