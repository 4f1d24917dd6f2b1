"""scripts/export.py, as a user starts it."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import LIT, V2, random_encoder, random_lit

from aimv2.data.transforms import CLIP_MEAN, CLIP_STD
from aimv2.exports import export_model
from aimv2.preprocessing import ProcessorConfig
from aimv2.pretrained import load_encoder, load_model

SCRIPT = Path(__file__).parents[1] / "scripts" / "export.py"
PROCESSING = ProcessorConfig(image_size=56, patch_size=14, mean=CLIP_MEAN, std=CLIP_STD)


@pytest.fixture
def export(monkeypatch, capsys):
    def run(*arguments) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return exit.value.code, capsys.readouterr().err

    return run


def test_round_the_layouts(export, tmp_path):
    """ours -> apple -> transformers -> timm -> ours: the same bits, and the card's words."""
    encoder = random_encoder(V2)
    source = export_model(encoder, tmp_path / "source", config=V2, processing=PROCESSING)
    for format in ("apple", "transformers", "timm", "ours"):
        code, said = export(source, tmp_path / format, "--format", format, "--licence", "mit", "--data", "shapes")
        assert code == 0 and said == f"{tmp_path / format}: VisionEncoder of 1.8M parameters, {format}\n", said
        source = tmp_path / format
    for name, tensor in load_encoder(source).encoder.state_dict().items():
        assert torch.equal(tensor, encoder.state_dict()[name])
    card = (source / "README.md").read_text()
    assert "license: mit" in card and "| data | shapes |" in card and "# ours" in card


def test_lit_in_another_type(export, tmp_path):
    source = export_model(random_lit(), tmp_path / "source", config=LIT, processing=PROCESSING)
    assert export(source, tmp_path / "out", "--format", "transformers", "--dtype", "bf16")[0] == 0
    assert load_model(tmp_path / "out").text_projection.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("format", ["ours", "apple", "transformers", "timm"])
def test_a_towers_encoder_alone(export, tmp_path, format):
    lit = random_lit()
    source = export_model(lit, tmp_path / "source", config=LIT, processing=PROCESSING)
    code, said = export(source, tmp_path / "out", "--format", format, "--part", "encoder")
    assert code == 0 and "VisionEncoder of" in said, said
    found = load_encoder(tmp_path / "out")
    assert found.processor.config.crop_pct == PROCESSING.crop_pct
    assert {k: v.tolist() for k, v in found.encoder.state_dict().items()} == {
        k: v.tolist() for k, v in lit.encoder.state_dict().items()
    }


def test_ours_keeps_everything(export, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"pieces")
    source = export_model(
        random_encoder(V2),
        tmp_path / "source",
        config=V2,
        processing=PROCESSING,
        tokenizer=tmp_path / "tokenizer.model",
        metadata={"step": 7},
    )
    assert export(source, tmp_path / "out", "--dtype", "bf16")[0] == 0
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"pieces"
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "out"))
    assert ours == theirs


def test_errors_are_one_line(export, tmp_path):
    code, said = export(tmp_path / "nowhere", tmp_path / "out")
    assert code == 1 and said == f"error: {tmp_path / 'nowhere'}: no such file or folder\n"
    source = export_model(random_lit(), tmp_path / "source", config=LIT, processing=PROCESSING)
    code, said = export(source, tmp_path / "out", "--format", "timm")
    assert code == 1 and said.startswith("error: timm has no LiT model") and len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()
