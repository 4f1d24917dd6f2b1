"""Names and shapes. The oracles are the libraries themselves, and maps written by hand in the tests of each model."""

import re
from dataclasses import replace

import pytest
import torch
from test_lit import lit_to_transformers
from tiny_models import LIT, NATIVE, V1, V2, random_encoder, random_lit, to_transformers

from aimv2.encoder import SIZES, VisionEncoder, vision_config
from aimv2.layouts import (
    LAYOUTS,
    find_lit,
    find_vision,
    from_ours,
    infer_lit,
    infer_vision,
    misfits,
    parts,
    to_ours,
)
from aimv2.lit import LiTConfig
from aimv2.weights import ModelError


def shapes_of(state):
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


APPLE_V2 = """
    preprocessor.patchifier.proj.weight preprocessor.patchifier.proj.bias preprocessor.patchifier.norm.weight
    preprocessor.pos_embed trunk.post_trunk_norm.weight trunk.blocks.2.attn.qkv.weight trunk.blocks.2.attn.proj.weight
    trunk.blocks.2.mlp.fc1.weight trunk.blocks.2.mlp.fc2.weight trunk.blocks.2.mlp.fc3.weight
    trunk.blocks.2.norm_1.weight trunk.blocks.2.norm_2.weight
"""
APPLE_V1 = """
    preprocessor.patchifier.proj.weight preprocessor.patchifier.proj.bias preprocessor.patchifier.norm.weight
    preprocessor.patchifier.norm.bias trunk.post_trunk_norm.weight trunk.post_trunk_norm.bias
    trunk.blocks.2.attn.qkv.weight trunk.blocks.2.attn.proj.weight trunk.blocks.2.mlp.fc1.weight
    trunk.blocks.2.mlp.fc2.weight trunk.blocks.2.norm_1.weight trunk.blocks.2.norm_1.bias
    trunk.blocks.2.norm_2.weight trunk.blocks.2.norm_2.bias
"""
TRAINER = APPLE_V2.replace("preprocessor.", "preprocessor.blocks.0.")
TRAINER = TRAINER.replace(
    "trunk.blocks.2.attn.qkv.weight",
    " ".join(f"trunk.blocks.2.attn.{part}_proj.weight" for part in "qkv"),
)


@pytest.mark.parametrize(
    ("layout", "config", "published"),
    [("apple", V2, APPLE_V2), ("apple", V1, APPLE_V1), ("apple-trainer", V2, TRAINER)],
)
def test_apples_names(layout, config, published):
    """As listed for its releases; the third block stands for all."""
    theirs = from_ours(random_encoder(config).state_dict(), LAYOUTS[layout].vision)
    assert {name for name in theirs if not re.search(r"blocks\.[01]\.(attn|mlp|norm)", name)} == set(published.split())
    gate, up, down = ("fc1", "fc3", "fc2") if config is V2 else ("fc1", "fc1", "fc2")
    state = random_encoder(config).state_dict()
    block = next(name for name in theirs if name.endswith("blocks.2.mlp.fc1.weight")).removesuffix("mlp.fc1.weight")
    names = {"gate": gate, "up": up, "down": down} if config is V2 else {"fc1": "fc1", "fc2": "fc2"}
    for ours, other in names.items():
        assert torch.equal(theirs[f"{block}mlp.{other}.weight"], state[f"blocks.2.mlp.{ours}.weight"])


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]) and tensor.shape == theirs[name].shape, name


@pytest.mark.parametrize("config", [V2, NATIVE])
def test_transformers_names(config):
    encoder = random_encoder(config)
    assert_same(from_ours(encoder.state_dict(), LAYOUTS["transformers"].vision), to_transformers(encoder.state_dict()))


def test_transformers_names_of_lit():
    model = random_lit()
    assert_same(from_ours(model.state_dict(), LAYOUTS["transformers"].lit), lit_to_transformers(model))


def test_timm_takes_them_strictly():
    timm = pytest.importorskip("timm")
    peer = timm.create_model("aimv2_large_patch14_224", img_size=56, embed_dim=256, depth=3, num_heads=2)
    encoder = random_encoder(replace(V2, mlp_hidden=704))
    peer.load_state_dict(from_ours(encoder.state_dict(), LAYOUTS["timm"].vision))


VISION = [(layout, config) for layout in LAYOUTS for config in (V2, NATIVE)] + [("apple", V1), ("ours", V1)]


@pytest.mark.parametrize("prefix", ["", "tower.model."])
@pytest.mark.parametrize(("layout", "config"), VISION)
def test_found_inferred_and_brought_back(layout, config, prefix):
    state = random_encoder(config).state_dict()
    names = LAYOUTS[layout].vision
    theirs = {prefix + name: tensor for name, tensor in from_ours(state, names).items()}
    found, at = find_vision(shapes_of(theirs))
    assert (found.name, at) == (layout, prefix)
    assert infer_vision(shapes_of(theirs), names, prefix, hints={}) == config
    assert misfits(shapes_of(state), shapes_of(theirs), names, prefix) == []
    assert_same({name: to_ours(theirs, names, name, tensor.shape, prefix) for name, tensor in state.items()}, state)


def test_a_whole_run_of_apples_trainer():
    """Its decoder lies beside the encoder; what is strange to the encoder is still told."""
    names = LAYOUTS["apple-trainer"].vision
    state = random_encoder(V2).state_dict()
    theirs = {f"models.image_encoder.{name}": tensor for name, tensor in from_ours(state, names).items()}
    shapes = shapes_of(theirs) | {"models.text_decoder.trunk.post_trunk_norm.weight": (8,)}
    layout, prefix = find_vision(shapes)
    assert (layout.name, prefix) == ("apple-trainer", "models.image_encoder.")
    assert misfits(shapes_of(state), shapes, names, prefix) == []
    shapes |= {f"{prefix}cls_token": (1, 1, 256)}
    assert misfits(shapes_of(state), shapes, names, prefix) == ["models.image_encoder.cls_token is unexpected"]


@pytest.mark.parametrize("layout", ["apple", "transformers"])
def test_lit_found_inferred_and_brought_back(layout):
    state = random_lit().state_dict()
    names = LAYOUTS[layout].lit
    theirs = from_ours(state, names)
    assert find_lit(shapes_of(theirs)) is LAYOUTS[layout]
    assert infer_lit(shapes_of(theirs), names, vision_hints={}, text_hints={}) == LIT
    assert_same({name: to_ours(theirs, names, name, tensor.shape) for name, tensor in state.items()}, state)
    vision, prefix = find_vision(shapes_of(theirs))
    assert vision is LAYOUTS[layout] and prefix in ("image_encoder.", "vision_model.")


@pytest.mark.parametrize("image_size", [224, 336, 448])
@pytest.mark.parametrize("size", [size for size in SIZES if not size.startswith("aim-")])
def test_published_sizes_from_their_shapes(size, image_size):
    config = vision_config(size, image_size)
    with torch.device("meta"):
        shapes = shapes_of(VisionEncoder(config).state_dict())
    assert infer_vision(shapes, None, hints={}) == config


def test_published_lit_from_its_shapes():
    config = LiTConfig(vision=vision_config("large"))
    with torch.device("meta"):
        theirs = from_ours(config.build().state_dict(), LAYOUTS["apple"].lit)
    assert infer_lit(shapes_of(theirs), LAYOUTS["apple"].lit, vision_hints={}, text_hints={}) == config


def test_hints_say_what_shapes_do_not():
    shapes = shapes_of(random_encoder(V2).state_dict())
    config = infer_vision(shapes, None, hints={"heads": 4, "norm_eps": 1e-4})
    assert (config.heads, config.norm_eps) == (4, 1e-4)


def test_what_fits_no_layout():
    with pytest.raises(ModelError, match=r"it holds visual\.conv1\.weight, \.\.\."):
        find_vision({"visual.conv1.weight": (8, 3, 4, 4)})
    with pytest.raises(ModelError, match="has no name in this layout"):
        parts(LAYOUTS["timm"].vision, "blocks.0.mlp.fc1.weight")
    shapes = shapes_of(random_encoder(V2).state_dict())
    with pytest.raises(ModelError, match=r"patch embedding of shape \(256, 1, 14, 14\)"):
        infer_vision(shapes | {"patch_embed.weight": (256, 1, 14, 14)}, None, hints={})
    with pytest.raises(ModelError, match="15 positions are no square grid"):
        infer_vision(shapes | {"positions.weight": (1, 15, 256)}, None, hints={})
    shapes = {name: shape for name, shape in shapes.items() if not name.startswith("blocks.0.")}
    with pytest.raises(ModelError, match=r"blocks\.0\..*is missing"):
        infer_vision(shapes, None, hints={})


def test_every_misfit_is_listed():
    state = random_encoder(V2).state_dict()
    names = LAYOUTS["transformers"].vision
    shapes = shapes_of(from_ours(state, names))
    del shapes["encoder.layers.1.attention.k_proj.weight"]
    shapes["rms_norm.weight"] = (255,)
    shapes |= {"head.cls_token": (1, 1, 256), "cls_token": (1, 1, 256)}
    assert misfits(shapes_of(state), shapes, names, allowed=("head.",)) == [
        "encoder.layers.1.attention.k_proj.weight is missing",
        "rms_norm.weight is (255,), expected (256,)",
        "cls_token is unexpected",
    ]
