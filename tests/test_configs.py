"""Every run of configs/ can be loaded, says how it is started, and builds a model of exactly the published size."""

import ast
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from aimv2.config import from_json, load_config, to_json
from aimv2.data.shapes import captions, scene
from aimv2.data.tokenizer import open_tokenizer
from aimv2.data.transforms import CLIP_MEAN, CLIP_STD
from aimv2.encoder import VisionConfig
from aimv2.exports import export_model
from aimv2.objectives.aimv2 import AIMv2Config
from aimv2.objectives.distill import DistillConfig
from aimv2.objectives.lit import LiTObjectiveConfig
from aimv2.optim import parameter_groups
from aimv2.preprocessing import ProcessorConfig
from aimv2.train import TrainConfig

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
PAPER = {  # size: (peak learning rate, ImageNet-1k, millions of encoder parameters), AIMv2 tables 1 and 2 and appendix
    "large": (1e-3, "86.6", 309.198),
    "huge": (8e-4, "87.5", 680.852),
    "1b": (8e-4, "88.1", 1234.958),
    "3b": (4e-4, "88.5", 2720.658),
}
POST_TRAINED = {  # run: (ImageNet-1k, millions of encoder parameters), the same tables
    "large_336": ("87.6", 309.526),
    "large_448": ("87.9", 309.984),
    "huge_336": ("88.2", 681.343),
    "huge_448": ("88.6", 682.032),
    "1b_336": ("88.7", 1235.614),
    "1b_448": ("89.0", 1236.531),
    "3b_336": ("89.2", 2721.641),
    "3b_448": ("89.5", 2723.018),
    "large_native": ("87.3", 308.936),
    "large_lit": ("77.0", 309.198),  # zero-shot
    "large_distilled": ("86.6", 309.198),  # of the same model without a teacher: nothing else is published
    "large_distilled_336": ("87.6", 309.526),
}
HIGHER = [name for name in POST_TRAINED if name[-3:] in ("336", "448") and "distilled" not in name]
ALT_TEXTS = {("dfn", "txt"): 0.30, ("coyo", "txt"): 0.09}  # the paper's weights, less HQITP and synthetic captions
GPUS = 8


def load(name: str) -> TrainConfig:
    return load_config(ROOT / "configs" / f"{name}.py")


def count_trunk(depth: int, width: int, hidden: int) -> int:
    """Attention (qkv, output), SwiGLU (gate, up, down), two norms per block; and the norm at the end."""
    return depth * (4 * width**2 + 3 * width * hidden + 2 * width) + width


def count_encoder(v: VisionConfig) -> int:
    """From the architecture as the paper states it; the next ones too."""
    positions = (v.image_size // v.patch_size) ** 2 * v.width if v.positions == "learned" else 0
    return (3 * v.patch_size**2 + 1) * v.width + v.width + positions + count_trunk(v.depth, v.width, v.mlp_hidden)


def count_aimv2(config: AIMv2Config) -> int:
    v, d = config.vision, config.decoder
    text = d.vocab_size * d.width + d.width + (d.context_length + 1) * d.width  # tokens, BOS, positions
    heads = d.width * 3 * v.patch_size**2 + d.width * d.vocab_size
    decoder = (v.width + 1) * d.width + text + count_trunk(d.depth, d.width, d.mlp_hidden) + heads
    return count_encoder(v) + decoder


def count_lit(config: LiTObjectiveConfig) -> int:
    width, text = config.vision.width, config.text
    pool = width + 2 * width**2 + (width + 1) * width  # query, keys and values, output with bias
    words = (text.vocab_size + text.context_length) * text.width + count_trunk(text.depth, text.width, text.mlp_hidden)
    scale_and_bias = 1 + (config.loss == "sigmoid")
    return count_encoder(config.vision) + pool + words + (width + text.width) * config.model.projection + scale_and_bias


def make_teacher(folder: Path, student: AIMv2Config) -> Path:
    """A small one that can teach this student."""
    vision = VisionConfig(
        width=8,
        depth=1,
        heads=1,
        mlp_hidden=8,
        image_size=student.vision.image_size,
        patch_size=student.vision.patch_size,
        positions="sincos",
    )
    decoder = replace(student.decoder, width=8, depth=1, heads=1, mlp_hidden=8)
    config = AIMv2Config(vision=vision, decoder=decoder)
    processing = ProcessorConfig(image_size=224, patch_size=14, mean=CLIP_MEAN, std=CLIP_STD)
    return export_model(config.build(), folder / "teacher", config=config, processing=processing)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config(path, tmp_path):
    run = load_config(path)
    assert isinstance(run, TrainConfig)
    assert from_json(TrainConfig, to_json(run)) == run

    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert f"deepspeed scripts/train_aimv2.py --config configs/{path.name}\n" in docstring + "\n"
    assert run.out == f"runs/{path.stem}"  # two configs never share a folder

    config, extra = run.objective, 0
    if isinstance(config, DistillConfig):
        config.teacher = str(make_teacher(tmp_path, config.student))  # only its width shapes what is trained
        extra = (config.vision.width + 1) * 8 if config.feature_weight else 0
    with torch.device("meta"):
        model = config.build()
    expected = (
        count_lit(config) if isinstance(config, LiTObjectiveConfig) else count_aimv2(getattr(config, "student", config))
    )
    assert sum(p.numel() for p in model.parameters()) == expected + extra
    assert sum(p.numel() for p in model.encoder.parameters()) == count_encoder(config.vision)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_what_a_run_starts_from_is_what_another_leaves_behind(path):
    """Of the same sizes, and made of the same tokens if there is a decoder to be read."""
    run = load_config(path)
    if run.init_from is None:
        return
    source = load(run.init_from.source.removeprefix("runs/").removesuffix("/export"))
    assert f"{source.out}/export" == run.init_from.source
    where = {"image_size": 224, "positions": "learned", "position_scale": 1.0, "checkpointing": False}
    assert replace(source.objective.vision, **where) == replace(run.objective.vision, **where)
    tables = {c.objective.vision.positions == "sincos" for c in (source, run)}
    assert len(tables) == 1 or run.init_from.positions == "replace"
    assert (source.data.transform.mean, source.data.transform.std) == (run.data.transform.mean, run.data.transform.std)
    if not isinstance(run.objective, LiTObjectiveConfig):
        assert source.objective.decoder == run.objective.decoder
        assert source.data.tokenizer == run.data.tokenizer


@pytest.mark.parametrize("name", [path.stem for path in CONFIGS if "distilled" in path.stem])
def test_what_teaches_is_what_another_run_leaves_behind(name):
    run = load(name)
    teacher = load(run.objective.teacher.removeprefix("runs/").removesuffix("/export"))
    assert f"{teacher.out}/export" == run.objective.teacher
    assert teacher.data.tokenizer == run.data.tokenizer
    assert teacher.objective.decoder.context_length >= run.objective.decoder.context_length
    assert (teacher.data.transform.mean, teacher.data.transform.std) == (
        run.data.transform.mean,
        run.data.transform.std,
    )


@pytest.mark.parametrize("size", PAPER)
def test_the_runs_of_the_paper(size):
    run = load(f"aimv2_{size}")
    peak_lr, score, millions = PAPER[size]
    encoder = count_encoder(run.objective.vision)
    decoder = count_aimv2(run.objective) - encoder
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
    assert shares(run) == ALT_TEXTS | {("dfn", "json:synthetic_captions"): 0.30}  # the paper's, less HQITP


def shares(run: TrainConfig) -> dict[tuple[str, str], float]:
    """How much of each source's captions, and where they are from."""
    return {(s.name, where): s.weight * p for s in run.data.train for where, p in s.caption_shares.items()}


@pytest.mark.parametrize("name", POST_TRAINED)
def test_the_post_trained_models_of_the_paper(name):
    run = load(f"aimv2_{name}")
    score, millions = POST_TRAINED[name]
    assert count_encoder(run.objective.vision) / 1e6 == pytest.approx(millions, abs=5e-4)
    docstring = ast.get_docstring(ast.parse((ROOT / "configs" / f"aimv2_{name}.py").read_text()))
    assert score in docstring and "not run" in docstring.lower()
    assert run.engine.accumulation(GPUS) >= 1
    assert (run.optim.start_lr, run.optim.clip, run.optim.betas) == (1e-6, 1.0, (0.9, 0.95))


@pytest.mark.parametrize("name", HIGHER)
def test_higher_resolution(name):
    """2 billion pairs from the 224 px model, without synthetic captions and weight decay; all else as it was."""
    run, (size, pixels) = load(f"aimv2_{name}"), name.split("_")
    before = load(f"aimv2_{size}")
    assert run.objective.vision == replace(before.objective.vision, image_size=int(pixels))
    assert run.data.transform == replace(before.data.transform, image_size=int(pixels))
    assert (run.objective.decoder, run.objective.pixel_weight) == (before.objective.decoder, 0.4)
    assert run.init_from.source == f"runs/aimv2_{size}/export" and run.init_from.parts is None
    assert run.steps * run.engine.batch_size == pytest.approx(2e9, rel=0.01)
    assert shares(run) == ALT_TEXTS
    assert run.optim.weight_decay == 0
    # Ours: a tenth of the peak, and a hundredth of that at the end.
    assert run.optim.peak_lr == pytest.approx(before.optim.peak_lr / 10)
    assert run.optim.final_lr == pytest.approx(run.optim.peak_lr / 100)
    assert run.engine.zero_stage == before.engine.zero_stage
    tokens = [c.engine.micro_batch * (c.objective.vision.num_patches + 78) for c in (run, before)]
    assert tokens[0] <= tokens[1]  # what fitted fits


def test_native_resolution():
    """128 to 4096 patches in fixed positions; the pairs of its steps, by the definition of the areas."""
    run = load("aimv2_large_native")
    assert (run.data.native.min_patches, run.data.native.max_patches) == (2**7, 2**12)
    assert run.data.native.shared_by * run.engine.micro_batch == run.engine.batch_size  # a step is of one area
    assert run.objective.vision.positions == "sincos" and run.init_from.positions == "replace"
    assert run.data.transform.crop_scale is None and not run.data.pad_text_to_context
    assert (shares(run), run.optim.weight_decay) == (ALT_TEXTS, 0)
    x = torch.linspace(-1, 1, 100_001, dtype=torch.float64)
    likely = torch.exp(-(x**2) / 2)
    area = 2 ** (9.5 + 2.5 * x)
    images = float((likely * run.engine.batch_size * 256 / area).sum() / likely.sum())
    assert images == pytest.approx(4350, rel=0.01)  # as the docstring says
    assert run.steps * images == pytest.approx(2e9, rel=0.01)


def test_lit():
    run = load("aimv2_large_lit")
    assert run.steps * run.engine.batch_size == pytest.approx(3e9, rel=0.01)
    assert (run.objective.model.projection, run.objective.model.pool_heads, run.objective.loss) == (768, 8, "softmax")
    text = run.objective.text
    assert (text.width, text.depth, text.heads, text.mlp_hidden) == (768, 12, 6, 2048)
    assert (text.vocab_size, text.context_length, text.eos, run.data.tokenizer) == (49408, 77, 49407, "clip")
    with torch.device("meta"):
        model = run.objective.build()
    decay, none = (group["params"] for group in parameter_groups(model, run.optim))
    ids = {id(p): name for name, p in model.named_parameters()}
    assert not any(ids[id(p)].startswith("model.encoder.") for p in [*decay, *none])
    assert {ids[id(p)] for p in none if "norm" not in ids[id(p)]} == {
        "model.log_scale",
        "model.pool.query",
        "model.pool.proj.bias",
        "model.text_encoder.positions",
    }


@pytest.mark.parametrize("name", [path.stem for path in CONFIGS if path.stem.startswith("shapes")])
def test_no_caption_of_the_shapes_world_is_cut_off(name, monkeypatch):
    run = load(name)
    monkeypatch.chdir(ROOT)
    tokenizer = open_tokenizer(run.data.tokenizer)
    assert tokenizer.vocab_size == run.objective.vocab_size
    scenes = (scene(0, "train", index, run.data.made_by.difficulty) for index in range(300))
    encoded = [tokenizer.encode(caption, 1000) for s in scenes for caption in captions(s)]
    assert max(map(len, encoded)) <= run.data.context_length
    assert not any(getattr(tokenizer, "unk_id", None) in ids for ids in encoded)


@pytest.mark.parametrize("name", ["aimv2_3b", "aimv2_3b_448", "aimv2_large_distilled", "aimv2_large_lit"])
def test_a_derived_run_leaves_its_parent_alone(name):
    before = to_json(load("aimv2_large"))
    load(name)
    assert to_json(load("aimv2_large")) == before
