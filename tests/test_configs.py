"""Every run of configs/ can be loaded, says how it is started, and builds a model of exactly the published size."""

import ast
from pathlib import Path

import pytest
import torch

from aimv2.config import from_json, load_config, to_json
from aimv2.data.shapes import captions, scene
from aimv2.data.tokenizer import Tokenizer
from aimv2.train import TrainConfig

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
PAPER = {  # size: (peak learning rate, ImageNet-1k, millions of encoder parameters), AIMv2 tables 1 and 2 and appendix
    "large": (1e-3, "86.6", 309.198),
    "huge": (8e-4, "87.5", 680.852),
    "1b": (8e-4, "88.1", 1234.958),
    "3b": (4e-4, "88.5", 2720.658),
}
GPUS = 8


def count_trunk(depth: int, width: int, hidden: int) -> int:
    """Attention (qkv, output), SwiGLU (gate, up, down), two norms per block; and the norm at the end."""
    return depth * (4 * width**2 + 3 * width * hidden + 2 * width) + width


def count_parameters(run: TrainConfig) -> tuple[int, int]:
    """Of the encoder and of the decoder, from the architecture as the paper states it."""
    v, d = run.objective.vision, run.objective.decoder
    patch = 3 * v.patch_size**2
    positions = (v.image_size // v.patch_size) ** 2 * v.width if v.positions == "learned" else 0
    encoder = (patch + 1) * v.width + v.width + positions + count_trunk(v.depth, v.width, v.mlp_hidden)
    text = d.vocab_size * d.width + d.width + (d.context_length + 1) * d.width  # tokens, BOS, positions
    heads = d.width * patch + d.width * d.vocab_size
    decoder = (v.width + 1) * d.width + text + count_trunk(d.depth, d.width, d.mlp_hidden) + heads
    return encoder, decoder


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config(path):
    run = load_config(path)
    assert isinstance(run, TrainConfig)
    assert from_json(TrainConfig, to_json(run)) == run

    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert f"deepspeed scripts/train_aimv2.py --config configs/{path.name}\n" in docstring + "\n"
    assert run.out == f"runs/{path.stem}"  # two configs never share a folder

    with torch.device("meta"):
        model = run.objective.build()
    sizes = tuple(sum(p.numel() for p in part.parameters()) for part in (model.encoder, model.decoder))
    assert sizes == count_parameters(run)
    assert sum(p.numel() for p in model.parameters()) == sum(sizes)


@pytest.mark.parametrize("size", PAPER)
def test_the_runs_of_the_paper(size):
    run = load_config(ROOT / "configs" / f"aimv2_{size}.py")
    peak_lr, score, millions = PAPER[size]
    encoder, decoder = count_parameters(run)
    assert (encoder / 1e6, decoder / 1e6) == (
        pytest.approx(millions, abs=5e-4),
        pytest.approx(221.4 + (run.objective.vision.width - 1024) * 1024 / 1e6, abs=0.05),
    )
    assert score in (ROOT / "configs" / f"aimv2_{size}.py").read_text()

    assert run.objective.vision.positions == "learned"
    optim, engine, data = run.optim, run.engine, run.data
    assert (optim.peak_lr, optim.warmup_steps, optim.start_lr, optim.final_lr) == (peak_lr, 12_500, 1e-6, 1e-5)
    assert (optim.betas, optim.eps, optim.weight_decay, optim.decoupled) == ((0.9, 0.95), 1e-8, 1e-4, True)
    assert (engine.batch_size, optim.clip, run.objective.pixel_weight) == (8192, 1.0, 0.4)
    assert run.steps * engine.batch_size == pytest.approx(12e9, rel=0.03)  # "12B pairs"
    assert engine.accumulation(GPUS) >= 1

    transform = data.transform
    assert (transform.image_size, transform.crop_scale, transform.flip) == (224, (0.4, 1.0), 0.5)
    assert transform.crop_ratio == (3 / 4, 4 / 3)
    shares = {(s.name, where): s.weight * p for s in data.train for where, p in s.caption_shares.items()}
    # The paper's, less HQITP.
    assert shares == {("dfn", "txt"): 0.30, ("dfn", "json:synthetic_captions"): 0.30, ("coyo", "txt"): 0.09}


@pytest.mark.parametrize("name", ["shapes", "shapes_full"])
def test_no_caption_of_the_shapes_world_is_cut_off(name):
    run = load_config(ROOT / "configs" / f"{name}.py")
    tokenizer = Tokenizer(ROOT / run.data.tokenizer)
    assert tokenizer.vocab_size == run.objective.decoder.vocab_size
    scenes = (scene(0, "train", index, run.data.made_by.difficulty) for index in range(300))
    lengths = [len(tokenizer.encode(caption, 1000)) for s in scenes for caption in captions(s)]
    assert max(lengths) <= run.data.context_length
    assert tokenizer.unk_id not in tokenizer.encode(captions(scene(0, "train", 0, "full"))[0], 1000)


def test_a_derived_run_leaves_its_parent_alone():
    before = to_json(load_config(ROOT / "configs" / "aimv2_large.py"))
    load_config(ROOT / "configs" / "aimv2_3b.py")
    assert to_json(load_config(ROOT / "configs" / "aimv2_large.py")) == before
