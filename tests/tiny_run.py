"""A run of seconds, for tests: the smallest AIMv2 on 200 scenes of the quick shapes world. Give it data.* and out."""

from aimv2.data.loader import DataConfig
from aimv2.data.mixture import Source
from aimv2.data.shapes import ShapesRecipe
from aimv2.data.transforms import TransformConfig
from aimv2.decoder import DecoderConfig
from aimv2.encoder import VisionConfig
from aimv2.engine import EngineConfig
from aimv2.evals.validation import ValidationLoss
from aimv2.objectives.aimv2 import AIMv2Config
from aimv2.optim import OptimConfig
from aimv2.train import TrainConfig


def config() -> TrainConfig:
    shape = {"width": 32, "depth": 1, "heads": 2, "mlp_hidden": 64}
    return TrainConfig(
        out="runs/tiny",
        steps=10,
        objective=AIMv2Config(
            vision=VisionConfig(image_size=48, patch_size=16, **shape),
            decoder=DecoderConfig(vocab_size=128, context_length=32, **shape),
        ),
        data=DataConfig(
            train=[Source(name="shapes", shards="data/tiny/train-*.tar", captions="json:captions")],
            validation=Source(name="shapes", shards="data/tiny/validation-*.tar"),
            tokenizer="tokenizers/shapes",
            transform=TransformConfig(image_size=48),  # cropped and flipped: random numbers in every sample
            context_length=32,
            workers=1,
            made_by=ShapesRecipe(
                difficulty="quick", folder="data/tiny", train=200, validation=20, samples_per_shard=50
            ),
        ),
        optim=OptimConfig(peak_lr=1e-2, warmup_steps=2),
        engine=EngineConfig(batch_size=8, micro_batch=4, precision="fp32"),
        save_every=3,
        log_every=1,
        evals=[ValidationLoss(every=5, samples=20, batch_size=8)],
    )
