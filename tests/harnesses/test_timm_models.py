"""Our encoders as timm's models compute what timm's own AIMv2 does from the same weights, through timm's functions."""

import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import NATIVE, V1, V2, random_encoder, random_lit

from aimv2.exports import export_model
from aimv2.preprocessing import ProcessorConfig
from aimv2.pretrained import load_encoder

timm = pytest.importorskip("timm")

from timm_settings import CLOSE, PROCESSING, ours, pair, pixels, theirs  # noqa: E402


@torch.no_grad()
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"num_classes": 5},
        {"num_classes": 5, "global_pool": "max"},
        {"num_classes": 5, "global_pool": ""},
        {"num_classes": 3, "img_size": 84},
        {"img_size": (28, 28)},
        {"num_classes": 3, "img_size": 84, "global_pool": "avgmax"},
    ],
)
def test_every_output_is_timms(exports, arguments):
    one, other = pair(exports, **arguments)
    side = int(np.max(arguments.get("img_size", 56)))
    images = pixels(2, 3, side, side)
    features = one.forward_features(images)
    assert features.abs().mean() > 0.1
    torch.testing.assert_close(features, other.forward_features(images), **CLOSE)
    torch.testing.assert_close(one(images), other(images), **CLOSE)
    for pre_logits in (False, True):
        torch.testing.assert_close(one.forward_head(features, pre_logits), other.forward_head(features, pre_logits))
    final, maps = one.forward_intermediates(images)
    torch.testing.assert_close((final, maps), other.forward_intermediates(images), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize(
    "arguments",
    [
        {"indices": 2},
        {"indices": [0, -1], "norm": True},
        {"indices": (1, 0), "output_fmt": "NLC"},
        {"indices": [0], "stop_early": True},
        {"indices": [1, -2], "intermediates_only": True, "return_prefix_tokens": True},
        {"indices": [1], "output_dict": True},
        {"indices": [1], "output_dict": True, "intermediates_only": True},
    ],
)
def test_intermediates_are_timms(exports, arguments):
    one, other = pair(exports)
    images = pixels(2, 3, 56, 56)
    found, expected = (model.forward_intermediates(images, **arguments) for model in (one, other))
    assert type(found) is type(expected)
    torch.testing.assert_close(found, expected, **CLOSE)


@torch.no_grad()
def test_only_the_maps_asked_for_are_kept(tmp_path):
    """Outputs of blocks that are alive at the last block of 12, weakly held here: one map, its input and its output."""
    config, alive = replace(V2, depth=12), []
    encoder = random_encoder(config)
    for format in ("ours", "timm"):
        export_model(encoder, tmp_path / format, config=config, processing=PROCESSING, format=format)
    for kind, blocks in ((ours, "encoder.blocks"), (theirs, "blocks")):
        model, outputs = kind(tmp_path, features_only=True, out_indices=[5, 11]), []
        for block in model.model.get_submodule(blocks):
            block.register_forward_hook(lambda _, __, output, outputs=outputs: outputs.append(weakref.ref(output)))
        block.register_forward_hook(
            lambda *_, outputs=outputs: alive.append(sum(output() is not None for output in outputs))
        )
        model(pixels(1, 3, 56, 56))
    assert alive == [3, 3]


@torch.no_grad()
def test_stopping_early_runs_no_further(exports):
    model, calls = ours(exports), []
    model.encoder.blocks[2].register_forward_hook(lambda *_: calls.append(2))
    model.forward_intermediates(pixels(1, 3, 56, 56), indices=[1], stop_early=True)
    assert not calls
    model.forward_intermediates(pixels(1, 3, 56, 56), indices=[1])
    assert calls == [2]


def test_intermediates_recomputed_have_the_same_gradient(exports):
    gradients, calls = [], []
    for enable in (False, True):
        model = ours(exports)
        model.encoder.blocks[0].register_forward_pre_hook(lambda *_, enable=enable: calls.append(enable))
        model.set_grad_checkpointing(enable)
        final, maps = model.forward_intermediates(pixels(1, 3, 56, 56), indices=[0, 2])
        (final.square().mean() + sum(each.square().mean() for each in maps)).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(gradients[0], gradients[1])
    assert calls == [False, True, True]


@torch.no_grad()
def test_another_input_size_is_timms(exports):
    one, other = pair(exports, num_classes=3)
    for model in (one, other):
        model.set_input_size(img_size=(84, 84))
        model.set_input_size()
    images = pixels(2, 3, 84, 84)
    torch.testing.assert_close(one(images), other(images), **CLOSE)
    with pytest.raises(ValueError, match="learned positions are for 6x6"):
        one(pixels(1, 3, 56, 56))
    assert torch.equal(one.encoder.positions.weight, ours(exports, img_size=84).encoder.positions.weight)
    one.encoder.positions.requires_grad_(False)
    one.set_input_size(28, patch_size=14)
    assert one.encoder.config.image_size == 28 and not one.encoder.positions.weight.requires_grad
    for arguments, message in (
        ({"img_size": 60}, "image_size 60 is not a multiple of patch_size 14"),
        ({"img_size": (56, 84)}, r"img_size \(56, 84\): expected one side"),
        ({"patch_size": 16}, "patch_size 16: expected 14"),
    ):
        with pytest.raises(ValueError, match=message):
            one.set_input_size(**arguments)
    assert one.encoder.config.image_size == 28


@torch.no_grad()
def test_traced(exports):
    """Without gradients, as the second look of torch's own check is."""
    model, images = ours(exports, num_classes=3), pixels(2, 3, 56, 56)
    assert torch.equal(torch.jit.trace(model, images)(images), model(images))


@torch.no_grad()
@pytest.mark.parametrize(
    ("arguments", "shape"),
    [
        ({"out_indices": (0, 1, 2)}, (56, 56)),
        ({"out_indices": (-2,)}, (56, 56)),
        ({"out_indices": 2}, (56, 56)),
        ({}, (56, 56)),
        ({"out_indices": (0, 2), "img_size": 84}, (84, 84)),
        ({"out_indices": (1,), "dynamic_img_size": True}, (42, 98)),
    ],
)
def test_features_only_through_timms_own_wrapper(exports, arguments, shape):
    one, other = (kind(exports, features_only=True, **arguments) for kind in (ours, theirs))
    assert type(one) is type(other) and type(one).__name__ == "FeatureGetterNet"
    images = pixels(2, 3, *shape)
    maps = one(images)
    torch.testing.assert_close(maps, other(images), **CLOSE)
    assert {tuple(each.shape) for each in maps} == {(2, 256, shape[0] // 14, shape[1] // 14)}
    for what in ("channels", "reduction"):
        assert getattr(one.feature_info, what)() == getattr(other.feature_info, what)()
    assert one.feature_info.reduction() == [14] * len(maps)
    blocks = len(one.model.encoder.blocks)
    assert blocks == len(other.model.blocks)  # what lies above is dropped
    assert [name for name, _ in one.model.named_parameters() if f"blocks.{blocks}" in name or "head" in name] == []


@torch.no_grad()
def test_any_size_as_timms(exports):
    one, other = pair(exports, dynamic_img_size=True)
    for shape in ((56, 56), (28, 84), (98, 70)):
        images = pixels(1, 3, *shape)
        torch.testing.assert_close(one.forward_features(images), other.forward_features(images), **CLOSE)
    one, other = pair(exports, dynamic_img_size=True, dynamic_img_pad=True)
    images = pixels(2, 3, 57, 97)  # 5 x 7 patches
    torch.testing.assert_close(one.forward_intermediates(images), other.forward_intermediates(images), **CLOSE)
    torch.testing.assert_close(one(images), other(images), **CLOSE)
    for run in (ours(exports), ours(exports).forward_intermediates):
        with pytest.raises(ValueError, match="learned positions are for 4x4"):
            run(pixels(1, 3, 84, 84))
        with pytest.raises(ValueError, match="image of 57x56 pixels: both sides must be multiples"):
            run(pixels(1, 3, 57, 56))


@torch.no_grad()
@pytest.mark.parametrize("config", [NATIVE, V1])
def test_what_timm_has_not(tmp_path, config):
    """AIM v1 and native positions."""
    processing = ProcessorConfig(image_size=None, patch_size=14, mean=(0.5,) * 3, std=(0.5,) * 3, resize="native")
    folder = export_model(random_encoder(config), tmp_path / "e", config=config, processing=processing)
    model = timm.create_model("aimv2_export", source=str(folder), features_only=True, out_indices=[-1]).eval()
    images = pixels(1, 3, 28, 70)
    expected = load_encoder(folder, norm=False)(images)  # (1, N, D)
    assert torch.equal(model(images)[0].flatten(2).transpose(1, 2), expected)
    assert model.pretrained_cfg["input_size"] == (3, 224, 224) and not model.pretrained_cfg["fixed_input_size"]


@torch.no_grad()
def test_lit_and_other_layouts_give_their_encoder(exports, tmp_path):
    lit = random_lit()
    folder = export_model(lit, tmp_path / "lit", config=lit.config, processing=PROCESSING)
    images = pixels(1, 3, 56, 56)
    model = timm.create_model("aimv2_export", source=str(folder)).eval()
    assert torch.equal(model.forward_features(images), lit.encoder(images))
    model = timm.create_model("aimv2_export", source=str(exports / "transformers"), dtype=torch.bfloat16, num_classes=2)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
