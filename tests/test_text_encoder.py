import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import to_transformers

from aimv2.text_encoder import TextConfig, TextEncoder

CONFIG = TextConfig(width=96, depth=3, heads=3, mlp_hidden=256, vocab_size=50, context_length=16, eos=49)
EOS, CONTEXT = CONFIG.eos, CONFIG.context_length


def random_text_encoder(config: TextConfig = CONFIG, seed: int = 0) -> TextEncoder:
    """Random norms too, and embeddings large enough for attention to be far from uniform."""
    torch.manual_seed(seed)
    encoder = TextEncoder(config)
    for name, parameter in encoder.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    torch.nn.init.normal_(encoder.tokens.weight)
    torch.nn.init.normal_(encoder.positions)
    return encoder


def random_captions(lengths: list[int], seed: int = 0) -> list[torch.Tensor]:
    """Each of `lengths` ids, the last of them its only EOS."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.cat([torch.randint(0, EOS, (n - 1,), generator=generator), torch.tensor([EOS])]) for n in lengths]


def batch_of(captions: list[torch.Tensor], pad: int, length: int = CONTEXT) -> torch.Tensor:
    text = torch.full((len(captions), length), pad)
    for row, caption in zip(text, captions, strict=True):
        row[: len(caption)] = caption
    return text


# --- transformers


def peer_config(transformers, config: TextConfig):
    return transformers.Aimv2TextConfig(
        hidden_size=config.width,
        intermediate_size=config.mlp_hidden,
        num_hidden_layers=config.depth,
        num_attention_heads=config.heads,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.context_length,
        eos_token_id=config.eos,
    )


def peer_of(encoder: TextEncoder, attention: str):
    transformers = pytest.importorskip("transformers")
    peer = transformers.Aimv2TextModel(peer_config(transformers, encoder.config)).eval()
    peer.set_attn_implementation(attention)
    peer.load_state_dict(to_transformers(encoder.state_dict()))
    return peer


@torch.no_grad()
def test_against_transformers():
    """With eager attention and a mask, where it is causal (below): alone, padded, and with a mask of ones."""
    encoder = random_text_encoder()
    peer = peer_of(encoder, "eager")
    captions = random_captions([1, 2, 5, 9, CONTEXT])
    text = batch_of(captions, pad=0)
    mask = batch_of([torch.ones_like(c) for c in captions], pad=0)
    theirs = peer(text, attention_mask=mask).pooler_output
    # fp32 on both sides, other kernels and summation orders; the features are of size 1
    torch.testing.assert_close(encoder(text), theirs, rtol=0, atol=1e-5)
    theirs = peer(text, attention_mask=torch.ones_like(text)).pooler_output
    torch.testing.assert_close(encoder(text), theirs, rtol=0, atol=1e-5)
    for caption in captions:
        theirs = peer(caption[None], attention_mask=torch.ones(1, len(caption), dtype=torch.long)).pooler_output
        torch.testing.assert_close(encoder(caption[None]), theirs, rtol=0, atol=1e-5)


@torch.no_grad()
def test_against_transformers_in_bf16():
    encoder = random_text_encoder()
    text = batch_of(random_captions([2, 5, 9, CONTEXT]), pad=0)
    expected = encoder.double()(text)
    ours = encoder.bfloat16()(text)
    theirs = peer_of(encoder, "eager").bfloat16()(text, attention_mask=torch.ones_like(text)).pooler_output
    assert ours.dtype == theirs.dtype == torch.bfloat16
    # 8 bits a value, 2^-9 relative each time one is rounded; some 30 roundings on the way, at random
    bound = 30**0.5 * 2**-8
    for features in (ours, theirs):
        assert (features - expected).norm() / expected.norm() < bound
    assert (ours - theirs).float().norm() / expected.norm() < 2 * bound


@pytest.mark.parametrize(("attention", "mask"), [("sdpa", None), ("eager", None), ("sdpa", "ones")])
@torch.no_grad()
def test_transformers_is_not_causal_without_padding_and_ours_is(attention, mask):
    """Why the comparison above is with eager attention and a mask: otherwise transformers' tower sees what follows.

    With SDPA not even a mask of ones helps, as it is optimised away. So its feature changes with the padding.
    """
    encoder = random_text_encoder()
    peer = peer_of(encoder, attention)
    caption, other = batch_of(random_captions([5]), pad=0), batch_of(random_captions([5]), pad=1)
    assert torch.equal(encoder(caption), encoder(other))
    mask = None if mask is None else torch.ones_like(caption)
    theirs = [peer(text, attention_mask=mask).pooler_output for text in (caption, other)]
    if torch.allclose(*theirs, rtol=0, atol=1e-5):
        pytest.skip("this version of transformers is causal here")
    assert (theirs[0] - encoder(caption)).abs().max() > 0.1


# --- what follows the first EOS


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@settings(max_examples=20, deadline=None)
@given(data=st.data())
@torch.no_grad()
def test_a_caption_alone_padded_and_in_a_batch_has_one_feature(dtype, data):
    encoder = random_text_encoder().to(dtype)
    lengths = data.draw(st.lists(st.integers(1, CONTEXT), min_size=1, max_size=5), "lengths")
    captions = random_captions(lengths, seed=sum(lengths))
    pads = st.integers(0, CONFIG.vocab_size - 1)  # EOS among them
    total = data.draw(st.integers(max(lengths), CONTEXT), "T")
    features = encoder(batch_of(captions, data.draw(pads, "pad"), total))
    assert torch.equal(features, encoder(batch_of(captions, data.draw(pads, "another pad"), CONTEXT)))
    for caption, feature in zip(captions, features, strict=True):
        alone = encoder(caption[None])[0]
        for length in (len(caption), CONTEXT):
            padded = batch_of([caption], data.draw(pads, "third pad"), length)
            assert torch.equal(encoder(padded)[0], alone)
        # In a batch other kernels may do the sums, in another order: rounding errors of each type, for unit vectors;
        # bf16's as in the comparison with transformers, of two features.
        bound = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2 * 30**0.5 * 2**-8}[dtype]
        feature, alone = F.normalize(feature.double(), dim=0), F.normalize(alone.double(), dim=0)
        assert (feature - alone).norm() < bound


@torch.no_grad()
def test_the_first_eos_is_the_one():
    encoder = random_text_encoder()
    alone = encoder(torch.tensor([[3, 4, EOS]]))
    for tail in ([EOS], [5, EOS], [EOS, EOS, EOS], [7, 8, EOS, 9]):
        assert torch.equal(encoder(torch.tensor([[3, 4, EOS, *tail]])), alone)
    assert not torch.allclose(encoder(torch.tensor([[3, EOS, 4, EOS]])), alone, atol=0.1)


def test_nothing_that_follows_is_read():
    """By the gradient: exactly zero for the embedding of what follows the first EOS, never zero for what precedes."""
    encoder = random_text_encoder()
    text = torch.tensor([[3, 4, EOS, 10, 11, 12, 13], [5, 6, 7, 8, 9, 14, EOS]])
    encoder(text).square().sum().backward()
    used = encoder.tokens.weight.grad.abs().sum(dim=1) > 0
    assert used.nonzero().flatten().tolist() == [3, 4, 5, 6, 7, 8, 9, 14, EOS]


def test_common_padding_costs_nothing():
    encoder = random_text_encoder()
    lengths = []
    encoder.blocks[0].register_forward_hook(lambda _module, _input, out: lengths.append(out.shape[1]))
    encoder(batch_of(random_captions([3, 6]), pad=EOS))
    assert lengths == [6]


def test_order_and_position_matter():
    encoder = random_text_encoder()
    a, b = encoder(torch.tensor([[3, 4, EOS], [4, 3, EOS]]))
    assert (a - b).abs().max() > 0.1


# --- shape, initial values, graphs


def test_parameter_count():
    with torch.device("meta"):
        encoder = TextEncoder(TextConfig())
    width, hidden = 768, 2048
    block = 4 * width**2 + 3 * width * hidden + 2 * width
    expected = (49408 + 77) * width + 12 * block + width
    assert sum(p.numel() for p in encoder.parameters()) == expected == 122_958_336
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        peer = transformers.Aimv2TextModel(transformers.Aimv2TextConfig())
    shapes = {key: value.shape for key, value in to_transformers(encoder.state_dict()).items()}
    assert shapes == {key: value.shape for key, value in peer.state_dict().items()}


def test_initial_values():
    torch.manual_seed(0)
    encoder = TextEncoder(replace(CONFIG, vocab_size=500))
    for parameter, std in ((encoder.tokens.weight, 0.02), (encoder.positions, 0.01)):
        # a deviation measured on n draws is off by 1 / sqrt(2 n); 4 of those
        assert parameter.std().item() == pytest.approx(std, rel=4 / math.sqrt(2 * parameter.numel()))
        assert abs(parameter.mean().item()) < 4 * std / math.sqrt(parameter.numel())
    query = encoder.blocks[0].attention.qkv.weight[: CONFIG.width]
    assert query.abs().max().item() == pytest.approx(math.sqrt(6 / (2 * CONFIG.width)), rel=0.01)  # xavier's bound
    assert torch.equal(encoder.norm.weight, torch.ones(CONFIG.width))


def test_checkpointing_changes_no_bit():
    text = batch_of(random_captions([3, 9]), pad=0)
    gradients = []
    for checkpointing in (False, True):
        encoder = random_text_encoder(replace(CONFIG, checkpointing=checkpointing))
        encoder(text).square().sum().backward()
        gradients.append([p.grad for p in encoder.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@torch.no_grad()
def test_compiled_and_exported_without_graph_breaks():
    encoder = random_text_encoder().eval()
    text = batch_of(random_captions([3, 9, CONTEXT]), pad=0)  # the longest fills it: nothing is cut in eager mode
    torch._dynamo.reset()
    compiled = torch.compile(encoder, fullgraph=True, backend="eager")
    assert torch.equal(compiled(text), encoder(text))
    any_number = {"text": {0: torch.export.Dim("captions")}}
    exported = torch.export.export(encoder, (text[:2],), dynamic_shapes=any_number).module()
    assert torch.equal(exported(text), encoder(text))


# --- errors


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ([[3, EOS], [3, 4]], f"row 1 of the text has no EOS.*{EOS}"),
        ([[EOS, 4], [3, EOS], [5, 6], [7, 8]], "row 2 of the text has no EOS"),
        ([[3, EOS], [50, EOS]], "row 1 .* token id 50 at position 0: expected 0 to 49"),
        ([[3, EOS, -100]], "row 0 .* token id -100 at position 2"),
        ([[3] * CONTEXT + [EOS]], "text of 17 tokens.* 16"),
        ([[]], r"shape \(1, 0\)"),
        ([3, EOS], r"shape \(2,\)"),
    ],
)
def test_impossible_texts_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        random_text_encoder()(torch.tensor(text, dtype=torch.long))


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match=r"shape \(0, 5\)"):
        random_text_encoder()(torch.zeros(0, 5, dtype=torch.long))


@pytest.mark.parametrize(
    ("change", "message"), [({"heads": 5}, "width 96.*heads 5"), ({"eos": 50}, "eos 50.*0 to 49"), ({"eos": -1}, "-1")]
)
def test_impossible_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)
