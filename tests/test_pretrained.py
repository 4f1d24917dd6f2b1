import json
import shutil
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from test_encoder import aim_v1
from tiny_models import LIT, NATIVE, V1, V2, random_encoder, random_lit, write

import aimv2
from aimv2.data.transforms import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD
from aimv2.encoder import VisionEncoder, vision_config
from aimv2.exports import export_model
from aimv2.layouts import LAYOUTS, from_ours
from aimv2.preprocessing import ProcessorConfig
from aimv2.pretrained import default_processing, load_configs, load_encoder, load_model
from aimv2.weights import ModelError

PROCESSING = ProcessorConfig(image_size=56, patch_size=14, mean=CLIP_MEAN, std=CLIP_STD)
IMAGES = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def encoder() -> VisionEncoder:
    return random_encoder(V2)


@pytest.fixture
def export(encoder, tmp_path) -> Path:
    return export_model(encoder, tmp_path / "export", config=V2, processing=PROCESSING)


# -- Every layout ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_bare_files(tmp_path, encoder, layout, suffix):
    path = write(tmp_path / f"weights.{suffix}", V2, layout)
    for source in (path, str(path), tmp_path):
        loaded = load_encoder(source)
        assert loaded.config == V2
        assert torch.equal(loaded(IMAGES), encoder(IMAGES))


@torch.no_grad()
def test_aim_v1_from_apples_pickle(tmp_path):
    """Against the paper's description in float64, whose eps is the training code's: a file without one means 1e-6."""
    loaded = load_encoder(write(tmp_path / "aim.pth", V1, "apple"))
    assert loaded.config == V1
    loaded.encoder.double()
    for module in loaded.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-5
    state = {name: tensor.numpy() for name, tensor in loaded.encoder.state_dict().items()}
    expected = aim_v1(state, IMAGES[0].double().numpy(), V1.heads, prefix_length=16)
    # float64 but for the sines of the positions
    torch.testing.assert_close(loaded(IMAGES[:1].double())[0], torch.from_numpy(expected), rtol=0, atol=1e-6)
    c = loaded.processor.config
    assert (c.image_size, c.mean, c.std, c.crop_pct) == (224, IMAGENET_MEAN, IMAGENET_STD, 0.875)


def test_a_released_checkpoint_of_transformers(tmp_path, encoder):
    """Shards with an index, config.json, preprocessor_config.json: as on the hub."""
    transformers = pytest.importorskip("transformers")
    folder = export_model(encoder, tmp_path / "one", config=V2, processing=PROCESSING, format="transformers")
    peer = transformers.AutoModel.from_pretrained(folder)
    peer.save_pretrained(tmp_path / "many", max_shard_size="3MB")
    shutil.copy(folder / "preprocessor_config.json", tmp_path / "many")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    loaded = load_encoder(tmp_path / "many")
    assert loaded.config == V2
    assert torch.equal(loaded(IMAGES), encoder(IMAGES))


def test_a_head_on_top_is_left_alone(tmp_path, encoder):
    state = from_ours(encoder.state_dict(), LAYOUTS["apple"].vision)
    save_file(state | {"head.cls_token": torch.zeros(1, 1, 256)}, tmp_path / "model.safetensors")
    assert torch.equal(load_encoder(tmp_path)(IMAGES), encoder(IMAGES))
    assert torch.equal(load_model(tmp_path)(IMAGES), encoder(IMAGES))


def test_a_config_file_of_another_model(tmp_path):
    write(tmp_path / "aim.safetensors", V2, "apple")
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 768, "num_attention_heads": 12}))
    with pytest.raises(ModelError, match="another model's, of hidden_size 768, not 256"):
        load_encoder(tmp_path / "aim.safetensors")
    odd = {"hidden_size": 256, "num_attention_heads": 0, "vision_config": None, "model_args": None}
    (tmp_path / "config.json").write_text(json.dumps(odd | {"pretrained_cfg": None}))
    assert load_encoder(tmp_path).config == V2


def test_a_run_is_not_its_export(tmp_path, export):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=f"found none; did you mean {export}"):
        load_encoder(tmp_path)


def test_devices_and_types_that_are_none(export):
    with pytest.raises(ValueError, match=r"dtype 'bfloat16': expected a torch\.dtype"):
        load_encoder(export, dtype="bfloat16")
    with pytest.raises(RuntimeError, match="gpu"):  # torch's own words
        load_encoder(export, device="gpu")
    assert load_encoder(export, device="cpu:0").device.type == "cpu"


def test_heads_and_eps_come_from_a_config_file(tmp_path):
    config = replace(V2, heads=8, norm_eps=1e-4)
    write(tmp_path / "model.safetensors", config, "apple")
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 8, "rms_norm_eps": 1e-4}))
    assert load_encoder(tmp_path).config == config


def test_load_model_gives_what_there_is(tmp_path, export):
    assert isinstance(load_model(export), VisionEncoder)
    lit = export_model(random_lit(), tmp_path / "lit", config=LIT, processing=PROCESSING, format="apple")
    assert load_model(lit, dtype=torch.bfloat16).log_scale.dtype == torch.bfloat16


# -- Layers, sizes, types ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_blocks_above_the_chosen_ones_are_not_read(export, encoder):
    _, raw = encoder(IMAGES, output_hidden_states=True)
    loaded = load_encoder(export, layer=-2, norm=False)
    assert len(loaded.encoder.blocks) == loaded.config.depth == 2
    assert torch.equal(loaded(IMAGES), raw[1])
    several = load_encoder(export, layer=[0, -3 + 1], norm=False, combine="mean")
    torch.testing.assert_close(several(IMAGES), (raw[0] + raw[1]) / 2, rtol=0, atol=1e-6)  # a sum's rounding
    with pytest.raises(ValueError, match="layer 3: expected one or several different blocks from -3 to 2"):
        load_encoder(export, layer=3)


@torch.no_grad()
def test_another_image_size(export, encoder):
    """The table as torch's own resampling of it as an image."""
    loaded = load_encoder(export, image_size=84)
    table = encoder.positions.weight.view(1, 4, 4, 256).permute(0, 3, 1, 2)
    table = F.interpolate(table, (6, 6), mode="bicubic", antialias=True)
    torch.testing.assert_close(loaded.encoder.positions.weight, table.permute(0, 2, 3, 1).reshape(1, 36, 256))
    assert loaded.config == replace(V2, image_size=84) and loaded.num_patches == 36
    assert loaded.processor(torch.zeros(3, 50, 60)).pixel_values.shape == (1, 3, 84, 84)
    assert loaded(torch.randn(1, 3, 84, 84)).shape == (1, 36, 256)
    with pytest.raises(ValueError, match="4x4 patches, but the learned positions are for 6x6"):
        loaded(IMAGES)
    same = load_encoder(export, image_size=56)
    assert torch.equal(same(IMAGES), encoder(IMAGES))
    for size in (60, 0, "large"):
        with pytest.raises(ValueError, match=str(size)):
            load_encoder(export, image_size=size)


@torch.no_grad()
def test_any_size_on_request_only(tmp_path):
    """A 112x448 image has as many patches as the 224 px table has rows: it must not be taken for a square."""
    config = replace(V2, image_size=224)
    folder = export_model(
        random_encoder(config), tmp_path / "e", config=config, processing=replace(PROCESSING, image_size=224)
    )
    wide = torch.randn(1, 3, 112, 448)
    with pytest.raises(ValueError, match="8x32 patches, but the learned positions are for 16x16"):
        load_encoder(folder)(wide)
    loaded = load_encoder(folder, image_size="native")
    assert loaded(wide).shape == (1, 256, 256)
    square = torch.randn(1, 3, 224, 224)
    assert torch.equal(loaded(square), load_encoder(folder)(square))
    assert loaded.processor(torch.zeros(3, 112, 448)).pixel_values.shape == (1, 3, 112, 448)


@torch.no_grad()
def test_native_positions_serve_any_size(tmp_path):
    loaded = load_encoder(write(tmp_path / "native.safetensors", NATIVE, "transformers"))
    assert loaded.config == NATIVE and loaded.processor.config.resize == "native"
    image = torch.randn(1, 3, 28, 98)
    assert torch.equal(loaded(image), random_encoder(NATIVE)(image))
    assert load_encoder(tmp_path, image_size=112).processor.config.image_size == 112


def test_types_and_training(export):
    loaded = load_encoder(export, dtype=torch.bfloat16, device="cpu", frozen=False, checkpointing=True)
    assert loaded.dtype == torch.bfloat16 and loaded.config.checkpointing
    loaded.train()(IMAGES).float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in loaded.parameters())


@pytest.mark.parametrize(
    ("source", "config"),
    [
        ("random:base", vision_config("base", depth=1)),
        ("random:large-336", vision_config("large", 336, depth=1)),
        ("random:base-native", vision_config("base", depth=1, positions="sincos")),
    ],
)
def test_untrained(source, config):
    assert load_encoder(source, layer=0).config == config


@pytest.mark.parametrize("image_size", [None, 84, "native"])
def test_configs_without_weights(export, image_size):
    for source, layer in ((export, -1), ("random:base", 11)):
        loaded = load_encoder(source, layer=layer, image_size=image_size)
        assert load_configs(source, image_size=image_size) == (loaded.config, loaded.processor.config)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["ours", "transformers"])
def test_weights_are_mapped_and_not_copied(tmp_path, format):
    """Reading all of them: peak memory under 1.3 of their size, though q, k and v are joined (a quarter copied)."""
    config = vision_config("base")
    with torch.device("meta"):
        size = sum(p.numel() for p in VisionEncoder(config).parameters()) * 4
    processing = replace(PROCESSING, image_size=224)
    folder = export_model(VisionEncoder(config), tmp_path / "e", config=config, processing=processing, format=format)
    code = (
        "import re, sys, aimv2, aimv2.pretrained\n"
        "def peak(): return int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "before = peak()\n"
        "checksum = sum(float(p.sum()) for p in aimv2.load_encoder(sys.argv[1]).parameters())\n"
        "print(peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, folder], check=True, capture_output=True, text=True)
    grown = float(done.stdout)
    assert grown * 1024 < 1.3 * size


# -- What is damaged ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", [load_encoder, load_model])
def test_files_that_do_not_fit(load, export):
    weights = load_file(export / "model.safetensors")
    del weights["norm.weight"]
    weights |= {"extra": torch.zeros(1), "patch_embed.bias": torch.zeros(3)}
    save_file(weights, export / "model.safetensors")
    with pytest.raises(ModelError) as error:
        load(export)
    assert "no AIM or AIMv2 encoder" in str(error.value) or "norm.weight is missing" in str(error.value)
    save_file(weights | {"norm.weight": torch.ones(256)}, export / "model.safetensors")
    with pytest.raises(ModelError) as error:
        load(export)
    for words in ("extra is unexpected", "patch_embed.bias is (3,), expected (256,)"):
        assert words in str(error.value)


@pytest.mark.parametrize("load", [load_encoder, load_model])
def test_absent_and_damaged_files_are_named(load, export, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="empty is an empty folder"):
        load(tmp_path / "empty")
    weights = export / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged"):
        load(export)
    weights.unlink()
    with pytest.raises(ModelError, match=r"expected model\.safetensors, .* found none"):
        load(export)


@pytest.mark.parametrize("load", [load_encoder, load_model])
def test_config_files_that_cannot_be(load, export):
    path = export / "config.json"
    config = json.loads(path.read_text())
    for contents, words in (
        (config | {"version": 2}, r"\('aimv2', 2\), expected \('aimv2', 1\)"),
        (config | {"architecture": "CLIP"}, "architecture 'CLIP': expected one of AIMv2, LiT, VisionEncoder"),
        ({key: config[key] for key in ("format", "version", "model")}, "lacks architecture, preprocessing"),
        ([1], "expected an object, found list"),
    ):
        path.write_text(json.dumps(contents))
        with pytest.raises(ModelError, match=words):
            load(export)
    path.write_text("{")
    with pytest.raises(ModelError, match=r"config\.json is not JSON"):
        load(export)


def test_preprocessing_that_cannot_be(export):
    path = export / "config.json"
    config = json.loads(path.read_text())
    config["preprocessing"]["interpolation"] = "nearest"
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match="preprocessing: interpolation 'nearest'"):
        load_encoder(export)


def test_preprocessing_of_weights_that_carry_none():
    assert default_processing(V2, "apple") == PROCESSING
    assert default_processing(NATIVE, "apple").resize == "native"
    assert default_processing(V2, "apple-trainer").mean == IMAGENET_MEAN
    assert default_processing(V2, "apple-trainer").std == IMAGENET_STD


# -- The package -------------------------------------------------------------------------------------------------------


def test_importing_the_package_is_cheap_and_its_doors_work(export):
    heavy = {"sentencepiece", "deepspeed", "transformers", "timm", "open_clip", "matplotlib", "torch._dynamo"}
    code = (
        "import sys, aimv2; assert 'torch' not in sys.modules; assert aimv2.load_encoder and 'torch' in sys.modules; "
        f"aimv2.load_encoder(sys.argv[1]); assert not {heavy} & {{*sys.modules}}, {heavy} & {{*sys.modules}}"
    )
    subprocess.run([sys.executable, "-c", code, export], check=True)
    assert aimv2.load_model(export).config == V2
    with pytest.raises(AttributeError, match="nothing"):
        _ = aimv2.nothing


def test_version_is_that_of_pyproject():
    project = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text())["project"]
    assert aimv2.__version__ == project["version"]
