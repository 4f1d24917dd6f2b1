"""Our encoders as timm's models, against timm's own AIMv2 from the same weights, through timm's own functions."""

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_models import NATIVE, V1, V2, random_encoder, random_lit

from aimv2.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from aimv2.exports import export_model
from aimv2.layouts import LAYOUTS, parts
from aimv2.preprocessing import ProcessorConfig
from aimv2.pretrained import load_encoder
from aimv2.weights import ModelError

timm = pytest.importorskip("timm")

from timm.optim import create_optimizer_v2  # noqa: E402

from aimv2.harnesses.timm_models import TimmEncoder, register_timm, timm_config  # noqa: E402

PROCESSING = ProcessorConfig(image_size=56, patch_size=14, mean=(0.5, 0.4, 0.3), std=(0.3, 0.2, 0.25))
# The same products in the same order, in fp32; attention may be summed otherwise. Values are of the order of 1 to 10.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports")
    encoder = random_encoder(V2)
    for format in ("ours", "timm", "transformers"):
        export_model(encoder, folder / format, config=V2, processing=PROCESSING, format=format)
    return folder


@pytest.fixture(scope="module", autouse=True)
def registered():
    register_timm()


def ours(exports, **arguments):
    return timm.create_model("aimv2_export", source=str(exports / "ours"), **arguments).eval()


def theirs(exports, **arguments):
    return timm.create_model(f"local-dir:{exports / 'timm'}", pretrained=True, **arguments).eval()


def pixels(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def pair(exports, **arguments):
    """Both, with the same head."""
    one, other = ours(exports, **arguments), theirs(exports, **arguments)
    if one.num_classes:
        other.head.load_state_dict(one.head.state_dict())
    return one, other


# -- What it computes --------------------------------------------------------------------------------------------------


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
    with pytest.raises(ValueError, match="learned positions are for 4x4"):
        ours(exports)(pixels(1, 3, 84, 84))


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


# -- Preprocessing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "processing",
    [
        PROCESSING,
        replace(PROCESSING, resize="squash", interpolation="bilinear", mean=IMAGENET_MEAN, std=IMAGENET_STD),
        replace(PROCESSING, crop_pct=0.875),
        replace(PROCESSING, crop_pct=0.9),  # 62.2 before the crop
        replace(PROCESSING, crop_pct=0.93, resize="squash"),  # 60.2
        replace(PROCESSING, image_size=224, crop_pct=0.9),  # 248.9: 249 here, where timm cuts to 248
    ],
)
def test_timm_prepares_images_as_the_checkpoint_says(tmp_path, processing):
    config = replace(V2, depth=1, image_size=processing.image_size)
    folder = export_model(random_encoder(config), tmp_path / "e", config=config, processing=processing)
    model = timm.create_model("aimv2_export", source=str(folder))
    data = timm.data.resolve_data_config({}, model=model)
    assert data == timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**data)
    processor = load_encoder(folder).processor
    generator = np.random.default_rng(0)
    for width, height in ((300, 200), (97, 131), (56, 56), (250, 249)):
        image = Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
        # The same 8-bit pixels; (x / 255 - mean) / std in fp32, where a level is some 1e-2.
        torch.testing.assert_close(transform(image), processor(image).pixel_values[0], rtol=0, atol=1e-6)


@given(st.integers(1, 80), st.floats(0.05, 1.0))
def test_size_before_the_crop(patches, crop_pct):
    """timm's own is floor(size / crop_pct), which for 14 / (14 / 25) gives 24."""
    processing = replace(PROCESSING, image_size=7 * patches, patch_size=7, crop_pct=crop_pct)
    entry = timm_config(processing, 7)
    assert math.floor(7 * patches / entry["crop_pct"]) == processing.resize_size and entry["crop_pct"] <= 1


def test_img_size_is_prepared_for(exports):
    for arguments in ({"img_size": 84}, {"img_size": 84, "dynamic_img_size": True}):
        data = timm.data.resolve_data_config({}, model=ours(exports, **arguments))
        assert data["input_size"] == (3, 84, 84) and data["mean"] == PROCESSING.mean
    assert timm_config(PROCESSING, 56)["crop_pct"] == 1.0


# -- Training ----------------------------------------------------------------------------------------------------------


def their_name(name: str) -> str:
    return name if name.startswith("head.") else parts(LAYOUTS["timm"].vision, name.removeprefix("encoder."))[0]


def test_layer_decay_is_timms(exports):
    """Each parameter's rate and decay."""
    tables = []
    for model, rename in zip(pair(exports, num_classes=5), (their_name, str), strict=True):
        names = {id(parameter): rename(name) for name, parameter in model.named_parameters()}
        optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.7)
        tables.append(
            {
                names[id(parameter)]: (group["lr_scale"], group["weight_decay"])
                for group in optimizer.param_groups
                for parameter in group["params"]
            }
        )
    assert tables[0] == tables[1]
    assert len({scale for scale, _ in tables[0].values()}) == V2.depth + 2  # stem, blocks, norm and head


@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_step_is_timms(exports, checkpointing):
    after = []
    for model in pair(exports, num_classes=5):
        model.train()
        model.set_grad_checkpointing(checkpointing)
        optimizer = create_optimizer_v2(model, opt="sgd", lr=0.1, weight_decay=0.01, layer_decay=0.7)
        loss = torch.nn.functional.cross_entropy(model(pixels(4, 3, 56, 56)), torch.tensor([0, 1, 2, 3]))
        loss.backward()
        optimizer.step()
        after.append(dict(model.state_dict()))
    before = ours(exports, num_classes=5).state_dict()
    for name, tensor in after[0].items():
        assert not torch.equal(tensor, before[name])
        # Weights of up to 2, moved by gradients that are sums over 64 patches.
        other = after[1][their_name(name)]
        torch.testing.assert_close(tensor, other.reshape(tensor.shape), rtol=1e-4, atol=1e-5)


def test_checkpointing_recomputes(exports):
    calls = []
    model = ours(exports)
    model.encoder.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for enable, expected in ((True, 2), (False, 1)):
        calls.clear()
        model.set_grad_checkpointing(enable)
        model(pixels(1, 3, 56, 56)).sum().backward()
        assert len(calls) == expected


def test_head_comes_and_goes(exports):
    model = ours(exports, num_classes=5, drop_rate=0.5)
    assert model.get_classifier() is model.head and model.head.out_features == 5
    model.reset_classifier(2, "max")
    assert (model.num_classes, model.global_pool) == (2, "max") and model(pixels(3, 3, 56, 56)).shape == (3, 2)
    model.reset_classifier(0)
    assert model.global_pool == "max" and isinstance(model.head, torch.nn.Identity)
    assert model(pixels(3, 3, 56, 56)).shape == (3, model.num_features) == (3, model.head_hidden_size)
    model.reset_classifier(0, "")
    assert model(pixels(3, 3, 56, 56)).shape == (3, 16, 256)
    images = pixels(3, 3, 56, 56)
    assert not torch.equal(model.train()(images), model(images)) and torch.equal(model.eval()(images), model(images))


def test_state_dict_there_and_back(exports, tmp_path):
    """Through timm's own `checkpoint_path`, and after training to an export of ours."""
    model = ours(exports, num_classes=5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    torch.save(model.state_dict(), tmp_path / "tuned.pth")
    again = ours(exports, num_classes=5, checkpoint_path=str(tmp_path / "tuned.pth"))
    images = pixels(2, 3, 56, 56)
    assert torch.equal(again(images), model(images))
    folder = export_model(model.encoder, tmp_path / "e", config=model.encoder.config, processing=PROCESSING)
    assert torch.equal(load_encoder(folder)(images), model.forward_features(images))


@pytest.mark.slow
def test_compiled_in_one_graph(exports):
    torch.compiler.reset()
    for model in (ours(exports, num_classes=5), ours(exports, features_only=True, out_indices=[0, 2])):
        images = pixels(2, 3, 56, 56)
        with torch.no_grad():
            torch.testing.assert_close(torch.compile(model, fullgraph=True)(images), model(images), **CLOSE)


# -- Names -------------------------------------------------------------------------------------------------------------


def test_a_name_with_its_source(exports):
    """For whatever passes on a name only."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # timm's, of a name that is taken
        for _ in range(2):
            assert register_timm("shapes_encoder", source=exports / "ours") == "shapes_encoder"
    model = timm.create_model("shapes_encoder", pretrained=True, num_classes=3)
    assert isinstance(model, TimmEncoder) and model.pretrained_cfg["architecture"] == "shapes_encoder"
    assert "shapes_encoder" in timm.list_models("shapes*")
    with pytest.warns(UserWarning, match="Overwriting shapes_encoder"):
        register_timm("shapes_encoder", source=exports / "transformers")


def test_transformers_takes_it_as_a_backbone(exports):
    transformers = pytest.importorskip("transformers")
    name = register_timm("backbone_encoder", source=exports / "ours")
    backbone = transformers.TimmBackbone(transformers.TimmBackboneConfig(backbone=name, out_indices=[0, 2])).eval()
    images = pixels(2, 3, 56, 56)
    with torch.no_grad():
        maps = backbone(images).feature_maps
        states = load_encoder(exports / "ours")(images, output_hidden_states=True)[1]
    assert backbone.channels == [256, 256]
    for found, number in zip(maps, (0, 2), strict=True):
        assert torch.equal(found.flatten(2).transpose(1, 2), states[number])


def test_a_detector_of_transformers_takes_it(exports, tmp_path):
    """Images of any size, and a gradient down to the patches."""
    transformers = pytest.importorskip("transformers")
    name = register_timm("detector_encoder", source=exports / "ours", dynamic_img_size=True, dynamic_img_pad=True)
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    detector = {"encoder_layers": 1, "encoder_ffn_dim": 32, "encoder_attention_heads": 2}
    detector |= {"decoder_layers": 2, "decoder_ffn_dim": 32, "decoder_attention_heads": 2}
    config = transformers.MMGroundingDinoConfig(
        backbone_config=transformers.TimmBackboneConfig(backbone=name, out_indices=[0, 1, 2]),
        text_config={"model_type": "bert", "vocab_size": 100, "max_position_embeddings": 64, **text},
        d_model=32,
        num_queries=7,
        max_text_len=16,
        **detector,
    )
    model = transformers.MMGroundingDinoForObjectDetection(config).eval()
    images, ids = pixels(1, 3, 61, 99), torch.tensor([[1, 5, 6, 2]])
    found = model(pixel_values=images, input_ids=ids)
    assert found.pred_boxes.shape == (1, 7, 4) and found.pred_boxes.isfinite().all()
    found.logits[:, :, : ids.shape[1]].sum().backward()  # a fresh box head is zero, and lets no gradient through
    timm_model = model.model.backbone.conv_encoder.model._backbone.model
    assert isinstance(timm_model, TimmEncoder) and timm_model.encoder.patch_embed.weight.grad.abs().sum() > 0
    states = load_encoder(exports / "ours").encoder.state_dict()
    assert torch.equal(timm_model.encoder.blocks[1].mlp.up.weight, states["blocks.1.mlp.up.weight"])
    with torch.no_grad():
        timm_model.encoder.blocks[0].mlp.up.weight.mul_(2)
        expected = model(pixel_values=images, input_ids=ids).logits
        assert not torch.equal(expected, found.logits)
        model.save_pretrained(tmp_path)
        again = transformers.MMGroundingDinoForObjectDetection.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(again(pixel_values=images, input_ids=ids).logits, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": None}, r"aimv2_export: expected source=PATH"),
        ({"in_chans": 1}, "in_chans 1: expected 3"),
        ({"img_size": (56, 84)}, r"img_size \(56, 84\): expected one side"),
        ({"img_size": 60}, "image_size 60 is not a multiple of patch_size 14"),
        ({"global_pool": "token"}, "global_pool 'token': expected one of"),
        ({"num_classes": -1}, "num_classes -1: expected 0 or more"),
        ({"cache_dir": "/x"}, "cache_dir '/x': expected none"),
        ({"pretrained_cfg": {"mean": 0}}, "expected none, the source is all there is"),
        ({"features_only": True, "out_indices": [7]}, r"out_indices \[7\]: expected blocks from -3 to 2"),
    ],
)
def test_what_it_refuses(exports, arguments, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("aimv2_export", **({"source": str(exports / "ours")} | arguments))


def test_no_such_source_and_no_such_names(exports, tmp_path):
    with pytest.raises(ModelError, match="no such file or folder"):
        timm.create_model("aimv2_export", source=str(tmp_path / "no"))
    with pytest.raises(ValueError, match=r"name 'a\.b': expected letters, digits and _"):
        register_timm("a.b")
    with pytest.raises(ValueError, match="'aimv2_large_patch14_224': timm has a model of its own by this name"):
        register_timm("aimv2_large_patch14_224", source=exports / "ours")
    with pytest.raises(ValueError, match="output_fmt 'NHWC'"):
        ours(exports).forward_intermediates(pixels(1, 3, 56, 56), output_fmt="NHWC")
    with pytest.raises(TypeError, match="drop_path_rate"):
        ours(exports, drop_path_rate=0.1)
