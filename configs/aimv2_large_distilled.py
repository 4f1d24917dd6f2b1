"""AIMv2-L at 224 px, taught by AIMv2-3B: it goes on with its own objective and follows its teacher besides.

    deepspeed scripts/train_aimv2.py --config configs/aimv2_large_distilled.py

Not run. Apple released distilled models, L from 3B, but neither the method nor a figure: expected is more than 86.6,
ImageNet-1k, attentive probe, top-1, which the paper (arXiv 2411.14402) has for the same model without a teacher.

All of it is our choice:
- What is learned from the teacher are its features under the student's prefix mask; why, and what else there is, is in
  docs/post-training.md.
- The student starts from the model of configs/aimv2_large.py and sees 2 billion pairs, as many as the paper gives to a
  higher resolution: from nothing, the teacher's forward pass would have to be paid for 12 billion.
- Data, batch and weight decay of pre-training, synthetic captions included: that is what the teacher knows best. The
  peak learning rate is a fifth of pre-training's, twice that of a higher resolution, for features have to move.
- Nothing is compiled: with a teacher that has not been tried.

Data and tokenizer are those of configs/aimv2_large.py. The micro-batch is halved for the teacher's sake. With
`objective.prediction_weight` over 0 the teacher needs a decoder, and the student's tokenizer; else an encoder is enough
of a teacher. With Apple's for both, whose images are normalised as CLIP's:

    deepspeed scripts/train_aimv2.py --config configs/aimv2_large_distilled.py objective.teacher=aimv2-3B-patch14-224 \\
        init_from.source=aimv2-large-patch14-224 'init_from.parts=[encoder]' \\
        'data.transform.mean=[0.48145466,0.4578275,0.40821073]' 'data.transform.std=[0.26862954,0.26130258,0.27577711]'
"""

from pathlib import Path

from aimv2.config import load_config
from aimv2.init_from import InitFrom
from aimv2.objectives.distill import DistillConfig
from aimv2.train import TrainConfig


def config() -> TrainConfig:
    run = load_config(Path(__file__).with_name("aimv2_large.py"))
    run.out = "runs/aimv2_large_distilled"
    run.init_from = InitFrom(source="runs/aimv2_large/export")
    run.steps = 244_000
    run.objective = DistillConfig(student=run.objective, teacher="runs/aimv2_3b/export")
    run.optim.peak_lr, run.optim.final_lr, run.optim.warmup_steps = 2e-4, 2e-6, 2_500
    run.engine.micro_batch = 64
    run.engine.compile = False
    return run
