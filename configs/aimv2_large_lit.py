"""LiT on AIMv2-L at 224 px: a text tower learns to name what the locked image tower sees (AIMv2, arXiv 2411.14402).

    deepspeed scripts/train_aimv2.py --config configs/aimv2_large_lit.py

Not run. Expected: ImageNet-1k, zero-shot, top-1 77.0 (paper), after 3 billion pairs of the paper's data, by

    python eval/zero_shot.py --encoder aimv2:runs/aimv2_large_lit/export --data imagenet --root /data --out results

From the paper and Apple's code: the image tower is locked; an attention pool of 8 heads on it; a causal text tower of
width 768, 12 layers and 6 heads, with CLIP's byte pairs and 77 tokens; projections to 768; 3 billion pairs.

Nobody published the rest; these are our choices:
- Optimizer: AdamW, peak 1e-3, betas (0.9, 0.95), torch's weight decay 0.2, as Apple's code has it for a CLIP with the
  same text tower; cosine to 1e-5 and gradients clipped at 1.0, as in pre-training. Norms, positions, biases, the scale
  and the pool's query do not decay.
- Batch 16,384, twice that of pre-training: every caption more is a negative more. So 183,000 steps, the first 2,000 of
  them warm-up. The gradient is that of the whole batch, for any number of ranks and micro-batches; with 256 to a
  micro-batch, 64 ranks at most.
- Validation compares within 128 pairs, the share of each of 64 ranks: the same curve for that many or fewer.
- Softmax over the batch; `objective.loss=sigmoid` is SigLIP's.
- Alt-texts only, which have the names of things that zero-shot classes are called by; crops and flips of pre-training.
- Nothing is compiled: with negatives from other micro-batches that has not been tried.

Data are those of configs/aimv2_large.py. The tokenizer comes with open_clip: `pip install -e ".[eval]"`.
"""

from pathlib import Path

from aimv2.config import load_config
from aimv2.evals.validation import ValidationLoss
from aimv2.init_from import InitFrom
from aimv2.lit import LiTConfig
from aimv2.objectives.lit import LiTObjectiveConfig
from aimv2.optim import OptimConfig
from aimv2.text_encoder import TextConfig
from aimv2.train import TrainConfig


def config() -> TrainConfig:
    run = load_config(Path(__file__).with_name("aimv2_large.py"))
    run.out = "runs/aimv2_large_lit"
    run.init_from = InitFrom(source="runs/aimv2_large/export")
    run.steps = 183_000
    run.objective = LiTObjectiveConfig(model=LiTConfig(vision=run.objective.vision, text=TextConfig()))
    dfn = run.data.train[0]
    dfn.weight, dfn.captions = 0.30, "txt"
    run.data.tokenizer = "clip"
    run.optim = OptimConfig(
        peak_lr=1e-3,
        warmup_steps=2_000,
        betas=(0.9, 0.95),
        weight_decay=0.2,
        decoupled=False,
        no_decay=run.optim.no_decay + r"|log_scale$|query$",
    )
    run.engine.batch_size, run.engine.micro_batch = 16_384, 256
    run.engine.compile = False
    run.evals = [ValidationLoss(every=5_000, samples=8_192, batch_size=128)]
    return run
