"""What a run of LiT shows: validation within its batches, and a loss curve without pictures of predictions."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from aimv2.data.loader import DataConfig, validation_loader
from aimv2.encoder import VisionConfig
from aimv2.evals.predictions import draw_run
from aimv2.evals.validation import ValidationLoss
from aimv2.exports import export_model
from aimv2.lit import LiTConfig
from aimv2.objectives.lit import LiTObjective, LiTObjectiveConfig
from aimv2.preprocessing import ProcessorConfig
from aimv2.text_encoder import TextConfig

pytest.importorskip("open_clip")
PLACE = {"patch_size": 16, "seed": 0, "rank": 0, "world_size": 1}


@pytest.fixture(scope="module")
def data(shapes) -> DataConfig:
    return replace(shapes, tokenizer="clip")


@pytest.fixture(scope="module")
def objective() -> LiTObjective:
    torch.manual_seed(0)
    vision = VisionConfig(width=16, depth=1, heads=2, mlp_hidden=16, image_size=48, patch_size=16)
    text = TextConfig(width=16, depth=1, heads=2, mlp_hidden=16)
    return LiTObjectiveConfig(
        model=LiTConfig(vision=vision, text=text, projection=8, pool_heads=2), feature_cache=0.1
    ).build()


def test_validation_is_that_of_its_batches(data, objective):
    evaluate = ValidationLoss(samples=20, batch_size=8).build(data, **PLACE, device=torch.device("cpu"))
    metrics = evaluate(objective)
    assert metrics == evaluate(objective)  # and with the tower's features known
    loss = right = 0.0
    with torch.no_grad():
        for batch in validation_loader(data, micro_batch=8, limit=20, **PLACE):
            logits = objective.model.get_logits(batch.image, batch.text)[0]
            own = torch.arange(len(batch))
            both = F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)
            loss, right = loss + both.item() / 2 * len(batch), right + (logits.argmax(1) == own).sum().item()
    # fp32, whose sums are those of other rows where a batch has fewer
    assert metrics == pytest.approx({"loss": loss / 20, "accuracy": right / 20}, rel=1e-5)  # and no caption_entropy


def test_a_run_is_drawn_without_predictions(data, objective, tmp_path):
    t = data.transform
    processing = ProcessorConfig(image_size=48, patch_size=16, mean=t.mean, std=t.std)
    export_model(objective.exported, tmp_path / "export", config=objective.exported.config, processing=processing)
    lines = [{"step": step, "loss": 1 / step, "accuracy": step / 3} for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert draw_run(tmp_path, data) == []
    assert (tmp_path / "loss.png").stat().st_size > 0 and not (tmp_path / "predictions.png").exists()
