import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import aimv2
from aimv2.config import to_json
from aimv2.data.transforms import CLIP_MEAN, TransformConfig
from aimv2.decoder import DecoderConfig
from aimv2.encoder import VisionConfig
from aimv2.hub import ExportError, export_model, load_encoder, load_model, read_export_config
from aimv2.objectives.aimv2 import AIMv2Config

CONFIG = AIMv2Config(
    vision=VisionConfig(width=8, depth=2, heads=2, mlp_hidden=16, image_size=8, patch_size=4),
    decoder=DecoderConfig(width=8, depth=1, heads=2, mlp_hidden=16, vocab_size=11, context_length=5),
)
TRANSFORM = TransformConfig(image_size=8, mean=CLIP_MEAN)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return CONFIG.build()


@pytest.fixture
def export(model, tmp_path) -> Path:
    return export_model(model, tmp_path / "export", objective=to_json(CONFIG), transform=TRANSFORM)


def rewrite(export: Path, change) -> None:
    weights = load_file(export / "model.safetensors")
    change(weights)
    save_file(weights, export / "model.safetensors")


def test_round_trip_is_bit_equal(model, export):
    loaded = load_model(export)
    assert not loaded.training and loaded.config == CONFIG
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]) and tensor.dtype == torch.float32
    image = torch.randn(2, 3, 8, 8)
    assert torch.equal(loaded.encoder(image), model.eval().encoder(image))


def test_encoder_needs_only_its_own_weights(model, export):
    rewrite(export, lambda weights: [weights.pop(name) for name in list(weights) if name.startswith("decoder.")])
    encoder = load_encoder(export)
    image = torch.randn(2, 3, 8, 8)
    assert not encoder.training and torch.equal(encoder(image), model.eval().encoder(image))
    with pytest.raises(ExportError, match=r"decoder\.bos is missing"):
        load_model(export)


def test_dtype_and_device(model, export):
    encoder = load_encoder(export, dtype=torch.bfloat16, device="cpu")
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, model.encoder.state_dict()[name].bfloat16())


def test_written_in_another_dtype_and_from_a_state_dict(model, tmp_path):
    state = dict(model.state_dict())
    folder = export_model(
        state, tmp_path / "half", objective=to_json(CONFIG), transform=TRANSFORM, dtype=torch.bfloat16
    )
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}


def test_config_says_how_to_prepare_images_and_text(model, tmp_path):
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "tokenizer.model").write_bytes(b"pieces")
    folder = export_model(
        model,
        tmp_path / "export",
        objective=to_json(CONFIG),
        transform=TRANSFORM,
        tokenizer=tmp_path / "words",
        metadata={"step": 7},
    )
    config = read_export_config(folder)
    assert config["preprocessing"]["image_size"] == 8 and config["preprocessing"]["mean"] == list(CLIP_MEAN)
    assert config["preprocessing"]["interpolation"] == "bicubic"
    assert config["objective"]["decoder"]["context_length"] == 5
    sha256 = subprocess.run(["sha256sum", folder / "tokenizer.model"], capture_output=True, text=True).stdout.split()[0]
    assert config["tokenizer"] == {"file": "tokenizer.model", "sha256": sha256}
    assert config["metadata"] == {"step": 7}


def test_every_misfit_is_listed_at_once(export):
    def damage(weights):
        weights.pop("encoder.norm.weight")
        weights["encoder.extra"] = torch.zeros(1)
        weights["encoder.patch_embed.bias"] = torch.zeros(3)

    rewrite(export, damage)
    with pytest.raises(ExportError) as error:
        load_encoder(export)
    for part in ("norm.weight is missing", "extra is not a parameter", "patch_embed.bias is (3,), expected (8,)"):
        assert f"encoder.{part}" in str(error.value)


@pytest.mark.parametrize("load", [load_encoder, load_model])
def test_absent_and_damaged_files_are_named(load, export, tmp_path):
    with pytest.raises(ExportError, match="nowhere is not a folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(ExportError, match=r"config\.json is missing"):
        load(tmp_path)
    weights = export / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ExportError, match=r"model\.safetensors is damaged"):
        load(export)
    weights.unlink()
    with pytest.raises(ExportError, match=r"model\.safetensors is missing"):
        load(export)
    config = json.loads((export / "config.json").read_text()) | {"version": 2}
    (export / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match=r"\('aimv2', 2\), expected \('aimv2', 1\)"):
        load(export)


def test_an_export_is_replaced_whole(model, export):
    (export / "stray").touch()
    with torch.no_grad():
        model.decoder.bos.fill_(3.0)
    export_model(model, export, objective=to_json(CONFIG), transform=TRANSFORM)
    assert load_model(export).decoder.bos.eq(3.0).all()
    assert sorted(path.name for path in export.iterdir()) == ["config.json", "model.safetensors"]
    assert [path.name for path in export.parent.iterdir()] == ["export"]


def test_a_failed_export_leaves_the_old_one(model, export, monkeypatch):
    def full_disk(weights, path, metadata):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    before = (export / "model.safetensors").read_bytes()
    monkeypatch.setattr("aimv2.hub.save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        export_model(model, export, objective=to_json(CONFIG), transform=TRANSFORM)
    assert (export / "model.safetensors").read_bytes() == before
    assert [path.name for path in export.parent.iterdir()] == ["export"]


def test_what_reads_back_differently_is_no_export(model, tmp_path, monkeypatch):
    def flipped(weights, path, metadata):
        save_file(weights | {"decoder.bos": weights["decoder.bos"] + 1}, path)

    monkeypatch.setattr("aimv2.hub.save_file", flipped)
    with pytest.raises(ExportError, match="does not read back"):
        export_model(model, tmp_path / "export", objective=to_json(CONFIG), transform=TRANSFORM)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_export_is_not_replaced(model, tmp_path):
    (tmp_path / "config.json").write_text('{"steps": 10}')  # a run's folder
    with pytest.raises(ExportError, match="no exported model to be replaced"):
        export_model(model, tmp_path, objective=to_json(CONFIG), transform=TRANSFORM)
    assert (tmp_path / "config.json").read_text() == '{"steps": 10}'


def test_importing_the_package_is_cheap_and_its_doors_work(export):
    code = (
        "import sys, aimv2; assert 'torch' not in sys.modules; assert aimv2.load_encoder and 'torch' in sys.modules; "
    )
    # What an encoder doesn't need: the extra `train`, and the seconds that torch's compiler takes to load.
    code += (
        "aimv2.load_encoder(sys.argv[1]); assert not {'sentencepiece', 'deepspeed', 'torch._dynamo'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code, export], check=True)
    assert aimv2.load_model(export).encoder.config == CONFIG.vision
    with pytest.raises(AttributeError, match="nothing"):
        _ = aimv2.nothing


def test_version_is_that_of_pyproject():
    project = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text())["project"]
    assert aimv2.__version__ == project["version"]
