import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_text_encoder import peer_config
from tiny_models import to_transformers

from aimv2.config import from_json, to_json
from aimv2.encoder import VisionConfig, vision_config
from aimv2.lit import LiT, LiTConfig
from aimv2.text_encoder import TextConfig

VISION = VisionConfig(width=96, depth=2, heads=3, mlp_hidden=256, image_size=56)
TEXT = TextConfig(width=64, depth=2, heads=2, mlp_hidden=160, vocab_size=50, context_length=12, eos=49)
CONFIG = LiTConfig(vision=VISION, text=TEXT, projection=40, pool_heads=3)
CAPTIONS = torch.tensor([[3, 4, 5, 49, 0, 0], [6, 7, 8, 9, 10, 49], [49, 0, 0, 0, 0, 0]])


def random_lit(config: LiTConfig = CONFIG, seed: int = 0) -> LiT:
    """Random norms, queries and biases too: at their initial values, some exchanged ones would not be seen."""
    torch.manual_seed(seed)
    model = config.build()
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=0.3)
    for parameter in (model.pool.query, model.text_encoder.tokens.weight, model.text_encoder.positions):
        torch.nn.init.normal_(parameter)
    return model


def random_images(count: int = 2, height: int = 56, width: int = 56) -> torch.Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))


# --- transformers


def lit_to_transformers(model: LiT) -> dict[str, torch.Tensor]:
    """The state dict of `Aimv2Model`."""
    state = {f"vision_model.{key}": value for key, value in to_transformers(model.encoder.state_dict()).items()}
    text = to_transformers(model.text_encoder.state_dict())
    state |= {f"text_model.{key}": value for key, value in text.items()}
    names = {"query": "cls_token", "key": "k_proj", "value": "v_proj", "proj": "output_proj"}
    for key, value in model.pool.state_dict().items():
        name, dot, rest = key.partition(".")
        state[f"vision_model.head.{names[name]}{dot}{rest}"] = value
    state["visual_projection.weight"] = model.image_projection.weight
    state["text_projection.weight"] = model.text_projection.weight
    state["logit_scale"] = model.log_scale
    return state


def peer_of(model: LiT, attention: str = "eager"):
    transformers = pytest.importorskip("transformers")
    vision, text = model.config.vision, model.config.text
    config = transformers.Aimv2Config(
        vision_config=transformers.Aimv2VisionConfig(
            hidden_size=vision.width,
            intermediate_size=vision.mlp_hidden,
            num_hidden_layers=vision.depth,
            num_attention_heads=vision.heads,
            image_size=vision.image_size,
            is_native=vision.positions == "sincos",
        ).to_dict(),
        text_config=peer_config(transformers, text).to_dict(),
        projection_dim=model.config.projection,
    )
    peer = transformers.Aimv2Model(config).eval()
    peer.set_attn_implementation(attention)
    peer.load_state_dict(lit_to_transformers(model))
    return peer


@pytest.mark.parametrize("positions", ["learned", "sincos"])
@torch.no_grad()
def test_against_transformers(positions):
    model = random_lit(replace(CONFIG, vision=replace(VISION, positions=positions)))
    images = random_images() if positions == "learned" else random_images(2, 28, 84)
    theirs = peer_of(model)(CAPTIONS, images, attention_mask=torch.ones_like(CAPTIONS))
    image_features, text_features, scale = model(images, CAPTIONS)
    # fp32 on both sides, other kernels and summation orders
    pooled = model.pool(model.encoder(images))
    torch.testing.assert_close(pooled, theirs.vision_model_output.pooler_output, rtol=0, atol=1e-5)
    torch.testing.assert_close(image_features, theirs.image_embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(text_features, theirs.text_embeds, rtol=0, atol=1e-5)
    per_image, per_text = model.get_logits(images, CAPTIONS)
    torch.testing.assert_close(per_image, theirs.logits_per_image, rtol=0, atol=1e-5 * scale.item())
    torch.testing.assert_close(per_text, theirs.logits_per_text, rtol=0, atol=1e-5 * scale.item())
    assert per_image.shape == (2, 3) and torch.equal(per_image, per_text.T)


@torch.no_grad()
def test_against_transformers_in_bf16():
    model = random_lit()
    images = random_images()
    model.double()
    expected = [*model(images, CAPTIONS)[:2], *model.get_logits(images, CAPTIONS)]
    model.bfloat16()
    features, logits = model(images, CAPTIONS)[:2], model.get_logits(images, CAPTIONS)
    assert all(part.dtype == torch.float32 for part in (*features, *logits))
    assert model.encode_image(images, normalize=False).dtype == torch.bfloat16
    theirs = peer_of(model).bfloat16()(CAPTIONS, images.bfloat16(), attention_mask=torch.ones_like(CAPTIONS))
    # 8 bits a value, 2^-9 relative each time one is rounded; some 30 roundings on the way, at random
    bound = 30**0.5 * 2**-8
    for ours, peer, exact in zip(features, (theirs.image_embeds, theirs.text_embeds), expected[:2], strict=True):
        norm = exact.norm()
        assert (ours - exact).norm() / norm < bound
        assert (peer - exact).norm() / norm < bound
        assert (ours - peer).norm() / norm < 2 * bound
    # a cosine of two unit vectors is off by no more than both errors, and the scale by 2^-9 of itself
    scale = 1 / 0.07
    assert (logits[0] - expected[2]).abs().max() < scale * (2 * bound + 2**-9)


def test_published_parameter_count():
    """`projection_dim` is 512 in transformers' defaults and 768 in the published model; all else is the default."""
    with torch.device("meta"):
        model = LiTConfig(vision=vision_config("large")).build()
    pool = 3 * 1024**2 + 2 * 1024
    expected = 309_197_824 + pool + 1024 * 768 + 122_958_336 + 768**2 + 1
    assert sum(p.numel() for p in model.parameters()) == expected
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        peer = transformers.Aimv2Model(transformers.Aimv2Config(projection_dim=768))
    shapes = {key: value.shape for key, value in lit_to_transformers(model).items()}
    assert shapes == {key: value.shape for key, value in peer.state_dict().items()}
    assert peer.config.vision_config.num_attention_heads == model.pool.heads == 8


# --- features, logits and scale


@torch.no_grad()
def test_logits_against_their_formula():
    model = random_lit().double()
    images = random_images(3)
    image_features = model.encode_image(images, normalize=False).numpy()
    text_features = model.encode_text(CAPTIONS, normalize=False).numpy()
    pooled, ended = model.pool(model.encoder(images)).numpy(), model.text_encoder(CAPTIONS).numpy()
    expected = pooled @ model.image_projection.weight.numpy().T, ended @ model.text_projection.weight.numpy().T
    np.testing.assert_allclose(image_features, expected[0], rtol=0, atol=1e-12)
    np.testing.assert_allclose(text_features, expected[1], rtol=0, atol=1e-12)
    logits = model.get_logits(images, CAPTIONS)[0]
    for i, image in enumerate(image_features):
        for j, caption in enumerate(text_features):
            cosine = image @ caption / math.sqrt((image @ image) * (caption @ caption))
            # the scale's logarithm began as fp32: 1e-7 of itself
            assert logits[i, j].item() == pytest.approx(cosine / 0.07, rel=0, abs=1e-5)


@torch.no_grad()
def test_features_are_unit_vectors_of_single_samples():
    model = random_lit()
    images = random_images(3)
    for features, alone in (
        (model.encode_image(images), [model.encode_image(image[None]) for image in images]),
        (model.encode_text(CAPTIONS), [model.encode_text(caption[None]) for caption in CAPTIONS]),
    ):
        assert features.shape == (3, CONFIG.projection)
        # fp32 roundings of other kernels for other numbers of rows
        torch.testing.assert_close(features.norm(dim=1), torch.ones(3), rtol=0, atol=1e-6)
        torch.testing.assert_close(features, torch.cat(alone), rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_dead_feature_gives_zero_and_not_nan():
    model = random_lit()
    torch.nn.init.zeros_(model.image_projection.weight)
    assert torch.equal(model.get_logits(random_images(), CAPTIONS)[0], torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("log_scale", "scale"),
    [(None, 1 / 0.07), (0.0, 1.0), (-3.0, 1.0), (3.0, math.exp(3)), (math.log(100), 100.0), (50.0, 100.0)],
)
def test_the_scale_is_clamped(log_scale, scale):
    model = random_lit()
    if log_scale is not None:
        torch.nn.init.constant_(model.log_scale, log_scale)
    assert model.scale.item() == pytest.approx(scale, rel=1e-5)  # exp of an fp32 number of up to 4.6
    assert model.logit_scale.exp().item() == model.scale.item()  # as open_clip's users write it
    assert model(random_images(), CAPTIONS)[2].item() == model.scale.item()
    assert model.log_scale.shape == ()


def test_gradients_reach_every_parameter():
    model = random_lit()
    logits = model.get_logits(random_images(3), CAPTIONS)[0]
    torch.nn.functional.cross_entropy(logits, torch.arange(3)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name
    ids = model.text_encoder.tokens.weight.grad.abs().sum(dim=1).nonzero().flatten().tolist()
    assert ids == [3, 4, 5, 6, 7, 8, 9, 10, 49]  # and not the padding, 0


@torch.no_grad()
def test_images_padded_to_one_size_equal_single_ones():
    model = random_lit(replace(CONFIG, vision=replace(VISION, positions="sincos")))
    images = [random_images(1, 28, 56), random_images(1, 56, 42), random_images(1, 56, 56)]
    padded, mask = torch.full((3, 3, 56, 56), 7.0), torch.zeros(3, 4, 4, dtype=torch.bool)
    for i, image in enumerate(images):
        height, width = image.shape[-2:]
        padded[i, :, :height, :width] = image
        mask[i, : height // 14, : width // 14] = True
    features = model.encode_image(padded, mask=mask.flatten(1))
    for image, feature in zip(images, features, strict=True):
        torch.testing.assert_close(model.encode_image(image)[0], feature, rtol=0, atol=1e-6)  # fp32, other kernels
    assert (model.encode_image(padded) - features)[:2].abs().max() > 0.01


@torch.no_grad()
def test_compiles_without_graph_breaks():
    model = random_lit()
    images, text = random_images(3), CAPTIONS
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for ours, theirs in zip(compiled(images, text), model(images, text), strict=True):
        assert torch.equal(ours, theirs)


# --- config and errors


def test_the_config_survives_json():
    config = LiTConfig(vision=vision_config("large"))
    assert from_json(LiTConfig, to_json(config)) == config
    assert (config.text, config.projection, config.pool_heads) == (TextConfig(), 768, 8)


@pytest.mark.parametrize(
    ("change", "message"), [({"pool_heads": 5}, "width 96.*pool_heads 5"), ({"projection": 0}, "projection 0")]
)
def test_impossible_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)


def test_errors_of_the_towers_come_through():
    model = random_lit()
    with pytest.raises(ValueError, match="55x56"):
        model.encode_image(torch.zeros(1, 3, 55, 56))
    with pytest.raises(ValueError, match="row 1 of the text has no EOS"):
        model(random_images(), torch.tensor([[49], [3]]))
    with pytest.raises(ValueError, match=r"bool \(2, 9\): expected torch.bool \(2, 16\)"):
        model.pool(model.encoder(random_images()), torch.ones(2, 9, dtype=torch.bool))
