"""The embedded chain's last stage: a text tower learns to name what the locked image tower sees; then zero-shot.

    deepspeed scripts/train_aimv2.py --config configs/shapes_lit.py

As configs/aimv2_large_lit.py, on the distilled student: attention-pool head, causal text tower, CLIP's byte pairs.
Sizes, steps and optimizer are ours.

Measured: zero-shot shape and colour, 36 classes, 36 % of 3,080 held-out images; retrieval: docs/post-training.md.
"""

from dataclasses import replace
from pathlib import Path

from aimv2.config import load_config
from aimv2.evals.validation import ValidationLoss
from aimv2.init_from import InitFrom
from aimv2.lit import LiTConfig
from aimv2.objectives.lit import LiTObjectiveConfig
from aimv2.text_encoder import TextConfig
from aimv2.train import TrainConfig


def config() -> TrainConfig:
    run = load_config(Path(__file__).with_name("shapes_distilled.py"))
    run.init_from = InitFrom(source=f"{run.out}/export")
    run.out = "runs/shapes_lit"
    run.steps = 600
    vision = run.objective.vision
    text = TextConfig(width=128, depth=2, heads=2, mlp_hidden=352)
    run.objective = LiTObjectiveConfig(
        model=LiTConfig(vision=vision, text=text, projection=128, pool_heads=vision.heads),
        feature_cache=2.0,
    )
    run.data.tokenizer = "clip"
    no_decay = run.optim.no_decay + r"|log_scale$|query$"
    run.optim = replace(run.optim, peak_lr=1e-3, warmup_steps=50, weight_decay=0.2, decoupled=False, no_decay=no_decay)
    run.engine = replace(run.engine, batch_size=256, micro_batch=256)
    run.evals = [ValidationLoss(every=200, samples=2_000, batch_size=256)]
    run.save_every = 200
    return run
