import pytest
import torch

from aimv2.decoder import DecoderConfig, MultimodalDecoder, sample_token

CONFIG = DecoderConfig(width=48, depth=3, heads=4, mlp_hidden=128, vocab_size=11, context_length=9)
N, VISION_WIDTH, EOS = 6, 32, 2


def random_decoder(seed: int = 0) -> MultimodalDecoder:
    """In float64, where two ways to the same logits agree on the argmax."""
    torch.manual_seed(seed)
    decoder = MultimodalDecoder(CONFIG, VISION_WIDTH, patch_size=2).double()
    for parameter in (decoder.tokens.weight, decoder.bos, decoder.text_positions):
        torch.nn.init.normal_(parameter)  # at their small initial values every caption would repeat one token
    return decoder


def random_features(samples: int) -> torch.Tensor:
    return torch.randn(samples, N, VISION_WIDTH, dtype=torch.float64)


@pytest.mark.parametrize("vision_width", [1024, 1536, 2048, 3072])
def test_parameter_count(vision_width):
    with torch.device("meta"):
        decoder = MultimodalDecoder(DecoderConfig(), vision_width, patch_size=14)
    width, hidden, vocabulary = 1024, 2816, 32000
    block = 4 * width**2 + 3 * width * hidden + 2 * width
    projection = vision_width * width + width
    text_inputs = vocabulary * width + width + 78 * width  # tokens, BOS, positions of BOS and 77 tokens
    heads = width * 588 + width * vocabulary
    expected = projection + text_inputs + 12 * block + width + heads
    assert sum(p.numel() for p in decoder.parameters()) == expected
    if vision_width == 1024:
        assert expected == 221_434_880


def test_shapes_and_the_longest_caption():
    decoder, features = random_decoder(), random_features(2)
    for length in (1, CONFIG.context_length):
        pixels, logits = decoder(features, torch.zeros(2, length, dtype=torch.long))
        assert pixels.shape == (2, N, 12) and logits.shape == (2, length, CONFIG.vocab_size)
    with pytest.raises(ValueError, match=r"caption of 10 tokens.* 9"):
        decoder(features, torch.zeros(2, 10, dtype=torch.long))


def test_checkpointing_changes_no_bit():
    decoder, features, text = random_decoder(), random_features(2), torch.tensor([[3, 4, 2], [5, 2, 0]])
    gradients = []
    for checkpointing in (False, True):
        decoder.config.checkpointing = checkpointing
        decoder.zero_grad()
        pixels, logits = decoder(features, text)
        (pixels.square().sum() + logits.square().sum()).backward()
        gradients.append([p.grad.clone() for p in decoder.parameters()])
    decoder.config.checkpointing = False
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# --- images of different sizes, padded to the longest

COUNTS = [6, 1, 4, 5]


def padded(content: float = 0.0, n: int = N) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (4, n, D) of which the first COUNTS are images', and which these are, (4, n)."""
    real = torch.arange(n) < torch.tensor(COUNTS)[:, None]
    features = torch.nn.functional.pad(random_features(4), (0, 0, 0, n - N))
    return features.masked_fill(~real[..., None], content), real


@torch.no_grad()
def test_padded_images_equal_one_by_one():
    decoder, (features, real) = random_decoder(), padded()
    text = torch.tensor([[3, 4, 2], [5, 2, 0], [2, 0, 0], [7, 8, 9]])
    pixels, logits = decoder(features, text, real)
    for i, count in enumerate(COUNTS):
        expected = decoder(features[i : i + 1, :count], text[i : i + 1])
        # float64, values of about 1: other summation orders only
        torch.testing.assert_close((pixels[i : i + 1, :count], logits[i : i + 1]), expected, rtol=0, atol=1e-12)
    ignored = decoder(features, text)[1]
    assert torch.equal(ignored[0], logits[0]) and not torch.allclose(ignored[1:], logits[1:], atol=1e-3)


def test_neither_what_stands_in_the_padding_nor_how_much_matters():
    decoder, text = random_decoder(), torch.tensor([[3, 4, 2], [5, 2, 0], [2, 0, 0], [7, 8, 9]])
    found = []
    for content, n in ((0.0, N), (1e3, N), (-7.0, N + 5)):
        torch.manual_seed(1)
        features, real = padded(content, n)
        features.requires_grad_()
        pixels, logits = decoder(features, text, real)
        decoder.zero_grad()
        (pixels[real].square().sum() + logits.square().sum()).backward()
        assert (features.grad[~real] == 0).all() and (features.grad[real] != 0).all()
        found.append([pixels[real], logits, features.grad[real], *(p.grad.clone() for p in decoder.parameters())])
    for other in found[1:]:
        # sums of up to some 1e5 in float64; gradients of a padding would be of the order of its content
        torch.testing.assert_close(other, found[0], rtol=1e-9, atol=1e-9)


def test_without_padding_nothing_changes():
    decoder, features, text = random_decoder(), random_features(3), torch.tensor([[3, 4, 2], [5, 2, 0], [2, 0, 0]])
    real = torch.ones(3, N, dtype=torch.bool)
    for a, b in zip(decoder(features, text, real), decoder(features, text), strict=True):
        assert torch.equal(a, b)
    assert decoder.generate(features, real=real, eos_id=EOS) == decoder.generate(features, eos_id=EOS)


@torch.no_grad()
def test_captions_of_padded_images_equal_one_by_one():
    decoder = random_decoder()
    features, counts = random_features(24), [1 + i % N for i in range(24)]
    real = torch.arange(N) < torch.tensor(counts)[:, None]
    captions = decoder.generate(features, real=real, eos_id=EOS)
    alone = [decoder.generate(f[None, :n], eos_id=EOS)[0] for f, n in zip(features, counts, strict=True)]
    assert captions == alone == [roll_out(decoder, f[:n], 9) for f, n in zip(features, counts, strict=True)]
    assert captions != decoder.generate(features, eos_id=EOS) and len(set(map(len, captions))) >= 3
    longer = torch.nn.functional.pad(features, (0, 0, 0, 3), value=50.0)
    assert decoder.generate(longer, real=torch.nn.functional.pad(real, (0, 3)), eos_id=EOS) == captions
    assert decoder.generate(features, real=real, eos_id=EOS, max_tokens=2) == [caption[:2] for caption in captions]


# --- generation


def roll_out(decoder: MultimodalDecoder, features: torch.Tensor, limit: int) -> list[int]:
    """Greedy, one sample, no cache: the whole sequence again for each token."""
    ids = []
    while len(ids) < limit:
        text = torch.tensor([[*ids, 0]])  # the last token is only a target: its id doesn't matter
        token = decoder(features[None], text)[1][0, -1].argmax().item()
        if token == EOS:
            break
        ids.append(token)
    return ids


@torch.no_grad()
def test_cached_greedy_equals_uncached_roll_outs():
    decoder, features = random_decoder(), random_features(24)
    captions = decoder.generate(features, eos_id=EOS)
    assert captions == [roll_out(decoder, f, CONFIG.context_length) for f in features]
    lengths = {len(caption) for caption in captions}
    assert CONFIG.context_length in lengths and len(lengths) >= 3  # some ended by EOS at different places, some did not
    assert captions == [decoder.generate(f[None], eos_id=EOS)[0] for f in features]


def test_max_tokens_cuts_and_is_cut():
    decoder, features = random_decoder(), random_features(8)
    captions = decoder.generate(features, eos_id=EOS)
    assert decoder.generate(features, eos_id=EOS, max_tokens=3) == [caption[:3] for caption in captions]
    assert decoder.generate(features, eos_id=EOS, max_tokens=1000) == captions
    with pytest.raises(ValueError, match="max_tokens 0"):
        decoder.generate(features, eos_id=EOS, max_tokens=0)


def test_each_position_runs_once_until_the_last_eos():
    decoder, features = random_decoder(), random_features(1)
    first = decoder.generate(features, eos_id=EOS, max_tokens=1)[0][0]
    runs = []
    decoder.blocks[0].register_forward_hook(lambda _module, _input, out: runs.append(out.shape[1]))
    assert decoder.generate(features, eos_id=first) == [[]]
    assert runs == [N + 1]  # the image and BOS
    runs.clear()
    decoder.generate(features, eos_id=-1)  # an EOS that never comes
    assert runs == [N + 1] + [1] * (CONFIG.context_length - 1)


def test_sampling_from_nearly_nothing_is_greedy():
    decoder, features = random_decoder(), random_features(8)
    greedy = decoder.generate(features, eos_id=EOS)
    for top_p in (0.0, 1e-6):
        assert decoder.generate(features, eos_id=EOS, temperature=1.0, top_p=top_p) == greedy
    assert decoder.generate(features, eos_id=EOS, temperature=1e-4) == greedy


def test_a_generator_makes_sampling_repeatable_and_leaves_the_global_one():
    decoder, features = random_decoder(), random_features(8)

    def sample(seed):
        generator = torch.Generator().manual_seed(seed)
        return decoder.generate(features, eos_id=EOS, temperature=1.0, generator=generator)

    state = torch.get_rng_state()
    assert sample(0) == sample(0) != sample(1)
    assert torch.equal(torch.get_rng_state(), state)


def draw(logits: torch.Tensor, draws: int = 20_000, **settings) -> torch.Tensor:
    """How often each id comes up."""
    token = sample_token(logits.expand(draws, -1), generator=torch.Generator().manual_seed(0), **settings)
    return torch.bincount(token, minlength=len(logits))


def chi_square(observed: torch.Tensor, probability: torch.Tensor) -> float:
    expected = probability * observed.sum()
    return ((observed - expected).square() / expected).sum().item()


LOGITS = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.1, -0.5, 0.9, -2.0])
CRITICAL = {7: 24.32, 2: 13.82}  # chi-square at p = 0.001, by degrees of freedom; the seed is fixed


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_sampled_ids_follow_the_softmax(temperature):
    observed = draw(LOGITS, temperature=temperature)
    assert chi_square(observed, (LOGITS / temperature).softmax(0)) < CRITICAL[7]
    assert chi_square(observed, (LOGITS / temperature * 1.3).softmax(0)) > 3 * CRITICAL[7]  # it would see a wrong one


def test_top_p_keeps_the_smallest_set_that_holds_it():
    probability = LOGITS.softmax(0)
    order = probability.argsort(descending=True)
    mass = probability[order].cumsum(0)
    top_p = ((mass[1] + mass[2]) / 2).item()  # two tokens hold less, three hold more
    observed = draw(LOGITS, temperature=1.0, top_p=top_p)
    assert observed[order[3:]].sum() == 0
    kept = order[:3]
    assert chi_square(observed[kept], probability[kept] / probability[kept].sum()) < CRITICAL[2]


@pytest.mark.parametrize("settings", [{"temperature": -1.0}, {"temperature": 1.0, "top_p": 1.1}, {"top_p": -0.1}])
def test_impossible_sampling_settings_are_refused(settings):
    with pytest.raises(ValueError, match=r"temperature .* top_p"):
        sample_token(LOGITS[None], **settings)
