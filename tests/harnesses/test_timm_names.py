"""Our encoders by a name alone, for whatever takes one, and what they refuse."""

import subprocess
import sys
import warnings

import pytest
import torch

from aimv2.pretrained import load_encoder
from aimv2.weights import ModelError

timm = pytest.importorskip("timm")

from timm_settings import ours, pixels  # noqa: E402

from aimv2.harnesses.timm_models import TimmEncoder, register_timm  # noqa: E402


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
        ({"drop_path_rate": 0.1}, "drop_path_rate 0.1: expected 0"),
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
    assert ours(exports, drop_path_rate=0.0, proj_drop_rate=0.0).num_classes == 0  # which ask for nothing
    with pytest.raises(TypeError, match="no_such_thing"):
        ours(exports, no_such_thing=0)


def test_all_its_names_are_there(exports):
    """timm adds a registered name to `__all__`, where it names nothing, or something else."""
    for name in ("starred_encoder", "TimmEncoder"):
        register_timm(name, source=exports / "ours")
        names: dict = {}
        exec("from aimv2.harnesses.timm_models import *", names)
        assert names["register_timm"] is register_timm and names["TimmEncoder"] is TimmEncoder


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("sys.modules['timm'] = None", "None in sys.modules"),
        ("import timm.layers; del timm.layers.global_pool_nlc", "cannot import name 'global_pool_nlc'"),
    ],
)
def test_no_timm_or_too_old_a_one(change, reason):
    code = f"import sys\n{change}\nimport aimv2.harnesses.timm_models"
    found = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120)
    last = found.stderr.splitlines()[-1]
    assert found.returncode == 1 and "need a recent timm: pip install --upgrade" in last and reason in last
