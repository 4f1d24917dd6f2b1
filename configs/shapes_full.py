"""The full shapes world, for a GPU or a night: up to three objects on nine places, turned any way, over rough textures.

    deepspeed scripts/train_aimv2.py --config configs/shapes_full.py

As configs/shapes.py, with larger images, a larger model and more data. Measured, much reduced (width 128, 5 + 2 blocks,
100,000 images, 4,000 steps of 64 in 47 minutes of one CPU core): 74 % of 512 held-out images captioned with exactly the
right set of objects, and still climbing. As it stands it has not been run.
"""

from dataclasses import replace
from pathlib import Path

from aimv2.config import load_config
from aimv2.data.shapes import ShapesRecipe, world
from aimv2.train import TrainConfig

CONTEXT_LENGTH = 32  # the longest caption has 27 tokens


def config() -> TrainConfig:
    run = load_config(Path(__file__).with_name("shapes.py"))
    run.out = "runs/shapes_full"
    run.steps = 20_000
    recipe = ShapesRecipe(difficulty="full", folder="data/shapes_full", train=400_000, validation=2_000)
    run.data.made_by = recipe
    run.data.train[0].shards = f"{recipe.folder}/train-*.tar"
    run.data.validation.shards = f"{recipe.folder}/validation-*.tar"
    size = world(recipe.difficulty).image_size
    run.data.context_length = CONTEXT_LENGTH
    run.data.transform = replace(run.data.transform, image_size=size)
    vision, decoder = run.objective.vision, run.objective.decoder
    width = {"width": 256, "heads": 4, "mlp_hidden": 768}  # int(8/3 * 256), rounded up to a multiple of 256
    run.objective.vision = replace(vision, image_size=size, patch_size=8, depth=8, **width)
    run.objective.decoder = replace(decoder, depth=4, context_length=CONTEXT_LENGTH, **width)
    run.optim = replace(run.optim, peak_lr=1e-3, warmup_steps=1_000)
    run.engine = replace(run.engine, batch_size=128, micro_batch=128)
    run.save_every = 2_000
    for evaluation in run.evals:
        evaluation.every = 2_000
    return run
