import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import LIT, NATIVE, V1, V2, random_encoder, random_lit

from aimv2.data.transforms import CLIP_MEAN, CLIP_STD
from aimv2.decoder import DecoderConfig
from aimv2.encoder import VisionConfig
from aimv2.exports import FORMATS, Card, export_model, read_export_config
from aimv2.objectives.aimv2 import AIMv2Config
from aimv2.preprocessing import RESIZES, ProcessorConfig
from aimv2.pretrained import load_encoder, load_model
from aimv2.weights import ModelError

CONFIG = AIMv2Config(
    vision=VisionConfig(width=8, depth=2, heads=2, mlp_hidden=16, image_size=8, patch_size=4),
    decoder=DecoderConfig(width=8, depth=1, heads=2, mlp_hidden=16, vocab_size=11, context_length=5),
)
SQUARE = ProcessorConfig(image_size=56, patch_size=14, mean=CLIP_MEAN, std=CLIP_STD)
ANY_SIZE = ProcessorConfig(image_size=None, patch_size=14, mean=CLIP_MEAN, std=CLIP_STD, resize="native")
SETTINGS = {
    "config": CONFIG,
    "processing": ProcessorConfig(image_size=8, patch_size=4, mean=CLIP_MEAN, std=CLIP_STD),
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return CONFIG.build()


@pytest.fixture
def export(model, tmp_path) -> Path:
    return export_model(model, tmp_path / "export", **SETTINGS)


def assert_same_weights(ours, theirs):
    expected = ours.state_dict()
    assert theirs.state_dict().keys() == expected.keys()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, expected[name]) and tensor.dtype == expected[name].dtype


# -- There and back ----------------------------------------------------------------------------------------------------


def test_aimv2_round_trip_is_bit_equal(model, export):
    loaded = load_model(export)
    assert not loaded.training and loaded.config == CONFIG
    assert_same_weights(model, loaded)
    image = torch.randn(2, 3, 8, 8)
    assert torch.equal(loaded.encoder(image), model.eval().encoder(image))


ENCODERS = [(format, V2) for format in FORMATS]
ENCODERS += [(format, NATIVE) for format in ("ours", "apple", "transformers")] + [("ours", V1), ("apple", V1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("format", "config"), ENCODERS)
def test_encoders_there_and_back(tmp_path, format, config, dtype):
    encoder = random_encoder(config).to(dtype)
    processing = ANY_SIZE if config is NATIVE else SQUARE
    folder = export_model(encoder, tmp_path / format, config=config, processing=processing, format=format)
    loaded = load_encoder(folder)
    assert loaded.config == config
    assert_same_weights(encoder, loaded.encoder)
    assert_same_weights(encoder, load_model(folder))
    expected = processing if format in ("ours", "timm") else transformers_rounding(processing)
    assert loaded.processor.config == expected
    again = export_model(loaded.encoder, tmp_path / "again", config=config, processing=processing)
    assert_same_weights(encoder, load_model(again))


def transformers_rounding(processing: ProcessorConfig) -> ProcessorConfig:
    """A preprocessor_config.json means transformers' rounding of the crop."""
    return ProcessorConfig.from_transformers(processing.to_transformers(), processing.patch_size)


@pytest.mark.parametrize("format", ["apple", "transformers", "timm"])
def test_an_interpolated_table_is_for_squares_elsewhere(tmp_path, format):
    """Trained at native resolution. Ours keeps that."""
    config = replace(V2, positions="interpolated")
    encoder = random_encoder(config)
    settings = {"config": config, "processing": ANY_SIZE}
    loaded = load_encoder(export_model(encoder, tmp_path / format, format=format, **settings))
    prepared = loaded.processor.config
    assert (prepared.image_size, prepared.resize, loaded.config.positions) == (56, "squash", "learned")
    assert f"| preprocessing | 56 px, {RESIZES['squash']}, " in (tmp_path / format / "README.md").read_text()
    image = torch.randint(0, 256, (3, 70, 41), dtype=torch.uint8)
    ours = load_encoder(export_model(encoder, tmp_path / "ours", **settings))
    assert ours.processor.config == ANY_SIZE
    at_size = load_encoder(tmp_path / "ours", image_size=56)
    assert torch.equal(loaded(loaded.processor(image).pixel_values), at_size(at_size.processor(image).pixel_values))


@pytest.mark.parametrize("format", ["ours", "apple", "transformers"])
def test_lit_there_and_back(tmp_path, format):
    model = random_lit()
    folder = export_model(model, tmp_path / format, config=LIT, processing=SQUARE, format=format)
    assert_same_weights(model, loaded := load_model(folder))
    assert loaded.config == LIT
    assert_same_weights(model.encoder, load_encoder(folder).encoder)


@pytest.mark.parametrize("format", ["apple", "transformers", "timm"])
def test_elsewhere_aimv2_is_its_encoder(tmp_path, format):
    model = AIMv2Config(vision=V2, decoder=CONFIG.decoder).build()
    config = AIMv2Config(vision=V2, decoder=CONFIG.decoder)
    folder = export_model(model, tmp_path / format, config=config, processing=SQUARE, format=format)
    assert_same_weights(model.encoder, load_model(folder))


# -- Opened by the others ----------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(("config", "size"), [(V2, (56, 56)), (NATIVE, (56, 56)), (NATIVE, (28, 98))])
def test_transformers_opens_it(tmp_path, config, size):
    """Without remote code. fp32 on both sides, q, k and v as three products there: rounding."""
    transformers = pytest.importorskip("transformers")
    encoder = random_encoder(config)
    processing = ANY_SIZE if config is NATIVE else SQUARE
    folder = export_model(encoder, tmp_path / "export", config=config, processing=processing, format="transformers")
    peer = transformers.AutoModel.from_pretrained(folder, trust_remote_code=False).eval()
    assert type(peer).__name__ == "Aimv2VisionModel"
    images = torch.randn(2, 3, *size)
    torch.testing.assert_close(encoder(images), peer(images).last_hidden_state, rtol=0, atol=1e-5)
    processor = transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    picture = torch.randint(256, (3, 168, 182), dtype=torch.uint8)
    theirs = processor(picture, return_tensors="pt")["pixel_values"]
    ours = load_encoder(folder).processor(picture).pixel_values
    if config is V2:
        assert ours.shape == theirs.shape == (1, 3, 56, 56)
    else:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)  # not resized: the same arithmetic


@torch.no_grad()
@pytest.mark.parametrize("format", ["transformers", "timm"])
def test_bf16_is_no_worse_than_theirs(tmp_path, format):
    """Distance of bf16 features from a float64 run on the same weights, relative in norm.

    bf16 rounds by up to 2^-9; over the 25 or so roundings in a row of three blocks that is some 1e-2 for anybody. The
    kernels differ, so that ours may be somewhat further away than theirs, or nearer.
    """
    peers = pytest.importorskip(format)
    encoder = random_encoder(V2).bfloat16()
    folder = export_model(encoder, tmp_path / "export", config=V2, processing=SQUARE, format=format)
    images = torch.randn(4, 3, 56, 56).bfloat16()
    if format == "timm":
        peer = peers.create_model(f"local-dir:{folder}", pretrained=True).eval().bfloat16()
        theirs = peer.forward_features(images)
    else:
        theirs = peers.AutoModel.from_pretrained(folder, dtype=torch.bfloat16).eval()(images).last_hidden_state
    assert theirs.dtype == torch.bfloat16
    ours = encoder(images)
    exact = random_encoder(V2).bfloat16().double()(images.double())
    error, their_error = (float((f.double() - exact).norm() / exact.norm()) for f in (ours, theirs))
    assert error < 2e-2 and error < 1.25 * their_error


@torch.no_grad()
def test_transformers_opens_lit(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = random_lit()
    folder = export_model(model, tmp_path / "export", config=LIT, processing=SQUARE, format="transformers")
    peer = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    assert type(peer).__name__ == "Aimv2Model"
    images, text = torch.randn(2, 3, 56, 56), torch.tensor([[1, 2, 59, 0], [3, 4, 5, 59]])
    theirs = peer(input_ids=text, pixel_values=images, attention_mask=torch.ones_like(text))
    # Scaled by 1 / 0.07 = 14 after unit vectors that agree to a few 1e-7.
    torch.testing.assert_close(model.get_logits(images, text)[0], theirs.logits_per_image, rtol=0, atol=2e-5)


@torch.no_grad()
def test_timm_opens_it(tmp_path):
    timm = pytest.importorskip("timm")
    encoder = random_encoder(V2)
    folder = export_model(encoder, tmp_path / "export", config=V2, processing=SQUARE, format="timm")
    peer = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.randn(2, 3, 56, 56)
    torch.testing.assert_close(encoder(images), peer.forward_features(images), rtol=0, atol=1e-5)
    cfg = timm.data.resolve_model_data_config(peer)
    assert (*cfg["mean"], *cfg["std"]) == (*CLIP_MEAN, *CLIP_STD)
    assert (cfg["crop_pct"], cfg["input_size"]) == (1.0, (3, 56, 56))


def test_what_a_format_has_no_place_for(tmp_path):
    settings = {"folder": tmp_path / "export", "processing": SQUARE}
    with pytest.raises(ModelError, match="format 'onnx': expected one of ours, apple, transformers, timm"):
        export_model(random_encoder(V2), config=V2, format="onnx", **settings)
    for format in ("transformers", "timm"):
        with pytest.raises(ModelError, match=f"{format} has AIMv2 .* only, not an encoder with gelu"):
            export_model(random_encoder(V1), config=V1, format=format, **settings)
    with pytest.raises(ModelError, match="positions 'sincos' can't be exported to it"):
        export_model(random_encoder(NATIVE), config=NATIVE, format="timm", **settings)
    with pytest.raises(ModelError, match=r"norm_eps 1e-05, not 0\.001"):
        config = replace(V2, norm_eps=1e-3)
        export_model(random_encoder(config), config=config, format="timm", **settings)
    with pytest.raises(ModelError, match="timm has no LiT model"):
        export_model(random_lit(), config=LIT, format="timm", **settings)
    assert list(tmp_path.iterdir()) == []


# -- What lies in the folder -------------------------------------------------------------------------------------------


def test_config_says_how_to_prepare_images_and_text(model, tmp_path):
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "tokenizer.model").write_bytes(b"pieces")
    folder = export_model(
        model, tmp_path / "export", tokenizer=tmp_path / "words", metadata={"step": 7}, dtype=torch.bfloat16, **SETTINGS
    )
    config = read_export_config(folder)
    assert ProcessorConfig.from_preprocessing(config["preprocessing"]) == SETTINGS["processing"]
    assert config["architecture"] == "AIMv2" and config["model"]["decoder"]["context_length"] == 5
    sha256 = subprocess.run(["sha256sum", folder / "tokenizer.model"], capture_output=True, text=True).stdout.split()[0]
    assert config["tokenizer"] == {"file": "tokenizer.model", "sha256": sha256}
    assert config["metadata"] == {"step": 7}
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize("format", FORMATS)
def test_model_card(tmp_path, format):
    card = Card(name="Shapes", licence="apache-2.0", data="the shapes world", recipe="configs/shapes.py")
    folder = export_model(
        random_encoder(V2), tmp_path / "export", config=V2, processing=SQUARE, format=format, card=card
    )
    text = (folder / "README.md").read_text()
    header = text.split("---")[1]
    assert "license: apache-2.0\n" in header and "# Shapes" in text
    for words in ("3 blocks of width 256", "56 px", "the shapes world", "configs/shapes.py", "shortest edge"):
        assert words in text


# -- Whole or not at all -----------------------------------------------------------------------------------------------


def test_an_export_is_replaced_whole(model, export):
    (export / "stray").touch()
    with torch.no_grad():
        model.decoder.bos.fill_(3.0)
    export_model(model, export, **SETTINGS)
    assert load_model(export).decoder.bos.eq(3.0).all()
    assert sorted(path.name for path in export.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert [path.name for path in export.parent.iterdir()] == ["export"]


def test_a_failed_export_leaves_the_old_one(model, export, monkeypatch):
    def full_disk(weights, path, metadata):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    before = (export / "model.safetensors").read_bytes()
    monkeypatch.setattr("aimv2.exports.save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        export_model(model, export, **SETTINGS)
    assert (export / "model.safetensors").read_bytes() == before
    assert [path.name for path in export.parent.iterdir()] == ["export"]


def test_what_reads_back_differently_is_no_export(model, tmp_path, monkeypatch):
    def flipped(weights, path, metadata):
        save_file(weights | {"decoder.bos": weights["decoder.bos"] + 1}, path)

    monkeypatch.setattr("aimv2.exports.save_file", flipped)
    with pytest.raises(ModelError, match="does not read back"):
        export_model(model, tmp_path / "export", **SETTINGS)
    assert list(tmp_path.iterdir()) == []


def test_somebody_elses_model_is_not_replaced(model, export):
    """A clone of a hub repository has the same three names."""
    (export / "README.md").write_text("# Llama")
    with pytest.raises(ModelError, match="no exported model to be replaced"):
        export_model(model, export, **SETTINGS)


def test_weights_that_do_not_fit_the_config(tmp_path):
    encoder = random_encoder(V2)
    with pytest.raises(ModelError, match=r"don't fit the config: blocks\.3\.norm1\.weight is missing"):
        export_model(encoder, tmp_path / "e", config=replace(V2, depth=4), processing=SQUARE)
    folder = export_model(encoder, tmp_path / "e", config=V2, processing=SQUARE)
    again = export_model(load_encoder(folder), tmp_path / "again", config=V2, processing=SQUARE)  # its wrapper left out
    assert_same_weights(encoder, load_model(again))


@torch.no_grad()
def test_timm_opens_any_width(tmp_path):
    """Its ratio times the width is cut to an integer: 448 * (1952 / 448) gives 1951."""
    timm = pytest.importorskip("timm")
    config = replace(V2, width=448, heads=2, depth=1, mlp_hidden=1952)
    encoder = random_encoder(config)
    folder = export_model(encoder, tmp_path / "e", config=config, processing=SQUARE, format="timm")
    peer = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.randn(1, 3, 56, 56)
    torch.testing.assert_close(encoder(images), peer.forward_features(images), rtol=0, atol=1e-5)


def test_a_folder_that_is_no_export_is_not_replaced(model, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"steps": 10}))  # a run's folder
    with pytest.raises(ModelError, match="no exported model to be replaced"):
        export_model(model, tmp_path, **SETTINGS)
    assert json.loads((tmp_path / "config.json").read_text()) == {"steps": 10}
