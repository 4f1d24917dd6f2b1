"""Zero-shot and retrieval while a LiT model trains: the numbers of its export, with CLIP's tokens and its own."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from shapes_run import write_shapes
from tiny_models import LIT, random_lit

from aimv2.data.loader import DataConfig
from aimv2.data.native import NativeConfig
from aimv2.data.tokenizer import open_tokenizer
from aimv2.encoder import VisionConfig
from aimv2.evals.datasets import open_dataset
from aimv2.evals.in_loop import FrozenEvaluation
from aimv2.evals.retrieval import Retrieval
from aimv2.evals.session import Session
from aimv2.evals.text_image import open_text_image
from aimv2.evals.zero_shot import ZeroShot
from aimv2.exports import export_model
from aimv2.lit import LiTConfig
from aimv2.objectives.lit import LiTObjectiveConfig
from aimv2.preprocessing import ProcessorConfig

pytest.importorskip("open_clip")

UNSEEN = str(Path(__file__).parents[2] / "eval" / "templates" / "shapes_unseen.txt")
PROTOCOLS = [(ZeroShot(templates=UNSEEN), "@shape_colour"), (ZeroShot(), "@shape"), (Retrieval(k=(1, 5)), "")]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> DataConfig:
    return write_shapes(tmp_path_factory.mktemp("shapes"))


def lit_config(tokenizer: str) -> LiTConfig:
    tokens = open_tokenizer(tokenizer)
    vision = VisionConfig(width=32, depth=1, heads=2, mlp_hidden=32, image_size=48, patch_size=16)
    text = replace(LIT.text, width=32, vocab_size=tokens.vocab_size, eos=tokens.eos_id, context_length=40)
    return LiTConfig(vision=vision, text=text, projection=16, pool_heads=2)


@pytest.mark.parametrize(("tokens", "native"), [("clip", None), ("shapes", None), ("clip", NativeConfig())])
def test_the_numbers_are_those_of_the_export(shapes, tokens, native, tmp_path):
    data = replace(shapes, tokenizer="clip" if tokens == "clip" else shapes.tokenizer, native=native)
    config = lit_config(data.tokenizer)
    if native is not None:
        config.vision.positions = "sincos"
    objective = LiTObjectiveConfig(model=config).build()
    objective.exported.load_state_dict(random_lit(config).state_dict())
    with torch.no_grad():
        objective.exported.pool.query.normal_(std=2.0)  # else it looks at all patches alike
    objective.train()
    modes = [module.training for module in objective.modules()]
    folder = export_model(
        objective.exported,
        tmp_path / "export",
        config=objective.exported.config,
        processing=ProcessorConfig.of_training(data, 48, 16),
        tokenizer=data.tokenizer,
    )
    where = {"patch_size": 16, "seed": 0, "rank": 0, "world_size": 1, "device": torch.device("cpu")}
    model = open_text_image(f"aimv2:{folder}")
    for protocol, label in PROTOCOLS:
        spec = f"shapes:{Path(data.made_by.folder)}{label}"
        evaluation = FrozenEvaluation(protocol=protocol, dataset=spec, test=None)
        evaluation.check(1, has_text=hasattr(LiTObjectiveConfig, "text"))
        found = evaluation.build(data, **where)(objective)
        outcome = protocol.run(model, open_dataset(spec), Session(quiet=True))
        assert found == {name: metric.value for name, metric in outcome.metrics.items()}
    assert [module.training for module in objective.modules()] == modes
