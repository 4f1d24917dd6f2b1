"""Layers and specs as they are written; what is wrong with them, in one line."""

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import V2, write

from aimv2.evals.encoders import open_encoder, parse_layers, streams
from aimv2.evals.encoders.interface import BlockOutput, mean_of, weights_digest
from aimv2.evals.encoders.pixels import open_pixels

# --- layers


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("output", {"output": ()}),
        ("5", {"block_05": (5,)}),
        ("-1", {"block_23": (23,)}),
        ("12-17", {"blocks_12-17": (12, 13, 14, 15, 16, 17)}),
        ("7-7", {"block_07": (7,)}),
        ("last6", {"blocks_18-23": (18, 19, 20, 21, 22, 23)}),
        ("last1", {"block_23": (23,)}),
        ("0, 3-4,output", {"block_00": (0,), "blocks_03-04": (3, 4), "output": ()}),
        ("5,5,5-5", {"block_05": (5,)}),
    ],
)
def test_layers_by_hand(text, expected):
    assert parse_layers(text, 24) == expected


@given(st.integers(1, 40))
def test_all_and_windows(depth):
    everything = parse_layers("all", depth)
    assert list(everything.values()) == [(number,) for number in range(depth)] + [()]
    windows = list(parse_layers("windows", depth).values())
    size = min(6, depth)
    assert windows == [tuple(range(first, first + size)) for first in range(depth) if first + size <= depth]
    assert parse_layers(f"last{size}", depth).popitem()[1] == windows[-1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("24", "layers '24': '24' is not within blocks 0 to 23"),
        ("-25", "'-25' is not within blocks 0 to 23"),
        ("20-24", "'20-24' is not within"),
        ("5-3", "'5-3' is not within"),
        ("last25", "'last25' is not within"),
        ("last0", "'last0' is not within"),
        ("", "layers '': expected output, all, windows, lastN, a block or FIRST-LAST, not ''"),
        ("1,", "layers '1,': expected .* not ''"),
        ("block_05", "not 'block_05'"),
        ("last", "not 'last'"),
        ("1.5", r"not '1\.5'"),
        ("1-2-3", "not '1-2-3'"),
        ("²", "not '²'"),
    ],
)
def test_layers_that_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_layers(text, 24)


def test_blocks_of_several_shapes_have_no_mean():
    one, other = (BlockOutput(torch.zeros(1, n, 4), None) for n in (9, 4))
    assert mean_of([one]) is one
    with pytest.raises(ValueError, match=r"blocks of shapes \(9, 4\), \(4, 4\) have no mean"):
        mean_of([one, other])
    encoder = open_encoder("timm:test_resnet")
    images = torch.zeros(1, 3, 160, 160)
    assert streams(encoder, images, {"a": (3,)})["a"].shape == (1, 100, 192)
    with pytest.raises(ValueError, match="have no mean"):
        streams(encoder, images, {"a": (3, 4)})


# --- specs


@pytest.mark.parametrize(
    "spec", ["", "aimv2", "aimv2:", "timm:", "hf", "resnet50", "clip:ViT-B-32", "@5", ":x", "Pixels", "pixels2"]
)
def test_specs_that_are_none(spec):
    with pytest.raises(ValueError) as error:
        open_encoder(spec)
    assert f"encoder {spec!r}: expected one of aimv2:PATH, " in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("aimv2:/nowhere/model", "/nowhere/model: no such file or folder"),
        ("random:/nowhere/model", "/nowhere/model: no such file or folder"),
        ("random:base-225", "225"),
        ("timm:test_vit@6", "layers '6': '6' is not within blocks 0 to 5"),
        ("timm:test_vit@", "layers '': expected"),
        ("timm:test_vit@all", "layer 'all' is several (block_00, "),
        ("timm:test_vit@1,2", "layer '1,2' is several (block_01, block_02)"),
        ("pixels:33", "side '33': expected a multiple of 8"),
        ("pixels:x", "side 'x': expected a multiple of 8"),
        ("pixels:0", "side '0'"),
        ("pixels@1", "'1' is not within blocks 0 to 0"),
        ("hf:/nowhere/model", "/nowhere/model"),
    ],
)
def test_specs_that_lead_nowhere(spec, message):
    with pytest.raises(ValueError) as error:
        open_encoder(spec)
    assert message in str(error.value) and "\n" not in str(error.value) and spec.split("@")[0] in str(error.value)


@pytest.mark.parametrize("size", [0, -14, "native", 224.0])
def test_sizes_that_are_none(size):
    with pytest.raises(ValueError, match=rf"^timm:test_vit: image_size {size!r}: expected pixels$"):
        open_encoder("timm:test_vit", image_size=size)


def test_a_path_with_an_at(tmp_path):
    path = write(tmp_path / "a@5.pth", V2, "timm")
    encoder = open_encoder(f"aimv2:{path}")
    assert encoder.layers == () and encoder.name == "a-5.pth"
    assert open_encoder(f"aimv2:{path}@1").layers == (1,)


@pytest.mark.parametrize("package", ["timm", "open_clip", "transformers"])
def test_a_package_that_is_not_installed(package, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    spec = {"timm": "timm:test_vit", "open_clip": "open_clip:ViT-B-32", "transformers": f"hf:{tmp_path}"}[package]
    with pytest.raises(ValueError) as error:
        open_encoder(spec)
    assert str(error.value).startswith(f"{spec}: package {package} ")
    assert str(error.value).endswith('pip install "aimv2[eval]"') and "\n" not in str(error.value)


# --- pixels


def test_pixels():
    encoder = open_encoder("pixels:16")
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(encoder.pooled(images), images.flatten(1))
    patch = images[:, :, 2:4, 6:8]  # the patch of row 1, column 3
    assert torch.equal(encoder.output(images).patches[:, 8 + 3].sort().values, patch.flatten(1).sort().values)
    assert encoder.describe()["parameters"] == 0
    assert encoder.describe()["weights"] == weights_digest(torch.nn.ReLU())
    assert (encoder.name, open_encoder("pixels").name) == ("pixels-16", "pixels")


def test_pixels_of_another_size():
    assert open_encoder("pixels", image_size=64).processor.config.image_size == 64
    assert open_encoder("pixels:64", image_size=64).processor.config.image_size == 64
    with pytest.raises(ValueError, match="image_size 32: expected 64, as in the spec"):
        open_pixels("64", "pixels:64", 32)


# --- the digest


def test_the_digest_tells_names_shapes_and_types():
    def digest(**tensors):
        module = torch.nn.Module()
        for name, tensor in tensors.items():
            module.register_buffer(name, tensor)
        return weights_digest(module)

    a = torch.arange(6.0)
    different = [{"a": a}, {"b": a}, {"a": a.view(2, 3)}, {"a": a.double()}, {"a": a + 1}, {"a": a, "b": a[:0]}, {}]
    assert len({digest(**tensors) for tensors in different}) == len(different)
    assert digest(a=a, b=a + 1) == digest(b=a + 1, a=a.clone())
    assert digest(a=a.view(2, 3).T) == digest(a=a.view(2, 3).T.contiguous())
    assert digest(a=torch.tensor(1.0, dtype=torch.bfloat16)) != digest(a=torch.tensor(1.0))
