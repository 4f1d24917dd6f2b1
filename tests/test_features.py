from dataclasses import replace

import pytest
import torch
from tiny_models import NATIVE, V2, random_encoder

from aimv2.features import FeatureEncoder, block_numbers
from aimv2.preprocessing import ProcessorConfig
from aimv2.processor import Processor

PROCESSOR = Processor(ProcessorConfig(image_size=56, patch_size=14, mean=(0.5,) * 3, std=(0.5,) * 3))
IMAGES = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))


def features_of(config=V2, layers=(2,), **settings) -> FeatureEncoder:
    return FeatureEncoder(random_encoder(config), PROCESSOR, layers=layers, **settings)


@pytest.mark.parametrize(
    ("layer", "numbers"),
    [(-1, (2,)), (0, (0,)), (-3, (0,)), ([0, -1], (0, 2)), ((2, 1), (2, 1)), (range(3), (0, 1, 2))],
)
def test_block_numbers(layer, numbers):
    assert block_numbers(layer, 3) == numbers


@pytest.mark.parametrize("layer", ["-1", None, slice(0, 2), 1.0])
def test_layers_that_are_no_numbers(layer):
    with pytest.raises(ValueError, match="expected an int or several"):
        block_numbers(layer, 3)


@pytest.mark.parametrize("layer", [3, -4, [], [0, -3], [0, 7]])
def test_blocks_that_are_not_there(layer):
    with pytest.raises(ValueError, match="from -3 to 2"):
        block_numbers(layer, 3)


@torch.no_grad()
def test_layers_by_hand():
    encoder = random_encoder(V2)
    last, raw = encoder(IMAGES, output_hidden_states=True)
    assert torch.equal(features_of()(IMAGES), last)
    assert torch.equal(features_of(norm=False)(IMAGES), raw[2])
    assert torch.equal(features_of(layers=(1,), norm=False)(IMAGES), raw[1])
    assert torch.equal(features_of(layers=(1,))(IMAGES), encoder.norm(raw[1]))
    both = features_of(layers=(2, 0))
    assert torch.equal(both(IMAGES), torch.cat([encoder.norm(raw[2]), encoder.norm(raw[0])], dim=-1))
    assert both.hidden_size == 2 * V2.width
    mean = features_of(layers=(2, 0), norm=False, combine="mean")
    torch.testing.assert_close(mean(IMAGES), (raw[2] + raw[0]) / 2, rtol=0, atol=1e-6)  # a sum's rounding
    assert mean.hidden_size == V2.width
    features, states = features_of()(IMAGES, output_hidden_states=True)
    assert torch.equal(features, last) and all(map(torch.equal, states, raw))
    with pytest.raises(ValueError, match="combine 'sum'"):
        features_of(combine="sum")


def test_frozen_whatever_train_says():
    frozen = features_of().train()
    assert not frozen.training and not frozen.encoder.training
    assert not any(p.requires_grad for p in frozen.parameters())
    assert not frozen(IMAGES.clone().requires_grad_()).requires_grad


def test_a_parameter_that_requires_a_gradient_ends_it():
    """As adapters do that are added to a frozen encoder: their gradient must not be lost in silence."""
    model = features_of()
    adapted = model.encoder.blocks[1].mlp.up.weight.requires_grad_()
    assert not model.frozen and model.train().training
    model(IMAGES).sum().backward()
    assert adapted.grad.abs().sum() > 0


def test_unfrozen_trains():
    model = features_of(layers=(0, 2), frozen=False)
    assert model.training and not model.eval().training
    model(IMAGES).square().mean().backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert not without


@pytest.mark.parametrize("positions", ["sincos", "interpolated"])
@torch.no_grad()
def test_padded_images_give_what_they_give_alone(positions):
    """Rectangles of three sizes in one batch. Another attention kernel, with a mask: fp32 rounding."""
    model = features_of(replace(NATIVE, positions=positions, image_size=56), layers=(0, 2))
    if positions == "interpolated":
        torch.nn.init.normal_(model.encoder.positions.weight)  # as large as the patches
    sizes = [(56, 28), (14, 70), (28, 42)]
    images = [torch.randn(3, *size) for size in sizes]
    padded, mask = torch.full((3, 3, 56, 70), 5.0), torch.zeros(3, 4, 5, dtype=torch.bool)
    for i, image in enumerate(images):
        padded[i, :, : image.shape[1], : image.shape[2]] = image
        mask[i, : image.shape[1] // 14, : image.shape[2] // 14] = True
    together = model(padded, mask.flatten(1))
    for features, real, image in zip(together, mask.flatten(1), images, strict=True):
        torch.testing.assert_close(features[real], model(image[None])[0], rtol=0, atol=1e-5)
        assert not features[~real].any()


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((3, 56, 56), "expected floats of shape (B, 3, H, W)"),
        ((1, 1, 56, 56), "expected floats of shape (B, 3, H, W)"),
        ((0, 3, 56, 56), "expected floats of shape (B, 3, H, W)"),
        ((1, 3, 57, 56), "multiples of the patch size"),
        ((1, 3, 28, 112), "2x8 patches, but the learned positions are for 4x4"),
    ],
)
def test_shapes_that_cannot_be(shape, words):
    with pytest.raises(ValueError) as error:
        features_of()(torch.zeros(shape))
    assert words in str(error.value)


def test_bytes_are_no_images():
    with pytest.raises(ValueError, match=r"torch\.uint8: expected floats"):
        features_of()(torch.zeros(1, 3, 56, 56, dtype=torch.uint8))


@pytest.mark.parametrize("positions", ["learned", "interpolated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_image_that_is_all_padding(dtype, positions):
    """As a dummy sample has it: features of 0, and nobody's gradient is spoilt."""
    model = features_of(replace(V2, positions=positions), frozen=False).to(dtype)
    mask = torch.ones(2, 16, dtype=torch.bool)
    mask[1] = False
    features = model(IMAGES, mask)
    assert not features[1].any()
    features.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_an_unused_norm_is_not_trained():
    model = features_of(frozen=False, norm=False)
    model(IMAGES).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    assert not model.encoder.norm.weight.requires_grad


@torch.no_grad()
def test_hooks_see_what_a_module_put_out():
    model = features_of()
    seen = []
    model.encoder.blocks[0].mlp.register_forward_hook(lambda module, inputs, out: seen.extend([out, out.clone()]))
    model(IMAGES)
    assert torch.equal(*seen)


@pytest.mark.parametrize("mask", [torch.ones(2, 15, dtype=torch.bool), torch.ones(2, 16), torch.ones(1, 16).bool()])
def test_masks_that_cannot_be(mask):
    with pytest.raises(ValueError, match=r"expected \(2, 16\) and torch.bool"):
        features_of()(IMAGES, mask)


def test_what_it_says_of_itself():
    model = features_of().to(torch.bfloat16)
    assert (model.hidden_size, model.patch_size, model.num_patches) == (256, 14, 16)
    assert model.config == V2 and model.dtype == torch.bfloat16 and model.device == torch.device("cpu")
    assert model(IMAGES).dtype == torch.bfloat16
