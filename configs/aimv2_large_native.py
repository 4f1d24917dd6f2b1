"""AIMv2-L at native resolution: images keep their aspect ratio and have 128 to 4096 patches (AIMv2, arXiv 2411.14402).

    deepspeed scripts/train_aimv2.py --config configs/aimv2_large_native.py

Not run. Expected: ImageNet-1k, attentive probe, top-1 87.3 (paper, which doesn't say at what size), by the command of
configs/aimv2_large_336.py with `--image-size 448`, say.

From the paper: the area of a micro-batch is A = 2^n patches, n a normal variable cut off at one deviation and mapped to
[7, 12]; every image is resized to fit it, its aspect ratio kept; a micro-batch has C / A of them, C being constant.
Positions are fixed sines and cosines (Apple's code), which serve any grid.

Nobody published C, the steps, the learning rate or what the model starts from; these are our choices:
- It starts from the 224 px model without its table of positions. Positions being of another kind, more has to change
  than from 224 to 336 px: the peak learning rate is a fifth of pre-training's. To keep the table instead, resized to
  the grid of each image: `objective.vision.positions=interpolated init_from.positions=interpolate`.
- C is 32,768 patches, the micro-batch of configs/aimv2_large.py, and a step has as many patches as there: those of 8192
  images of 224 px, which here are 4,350 images on average. 460,000 steps are 2 billion pairs, as many as the paper
  gives to 336 and 448 px; as there, alt-texts only and no weight decay.
- All 64 micro-batches of a step have one area (`shared_by`). Micro-batches of unlike areas have as many patches, but
  cost from 0.92 to 1.40 of the mean (counted flops of encoder, decoder and heads): with an area for each, 64 GPUs would
  wait for the dearest of 64, a third longer than the mean, 8 GPUs 17 %. The price is that steps are of one area each,
  with 512 to 16,384 images. With fewer GPUs, which accumulate, their number is enough: `data.native.shared_by=8`.
- Captions are padded to the longest of their micro-batch, not to the context: nothing is compiled here. A micro-batch
  of area 128 has 256 captions, twice those of configs/aimv2_large.py, and with 77 tokens each logits of 1.3 GB in bf16,
  2.5 GB in fp32: where memory is short, lower `engine.micro_batch`, which C follows.
- Whole images, for a crop would have an aspect ratio of its own; flips as in pre-training.

Data and tokenizer are those of configs/aimv2_large.py. Nothing is compiled: nearly every micro-batch has a shape of its
own. `scripts/benchmark.py native` compares how such images can be put together.
"""

from pathlib import Path

from aimv2.config import load_config
from aimv2.data.native import NativeConfig
from aimv2.train import TrainConfig


def config() -> TrainConfig:
    run = load_config(Path(__file__).with_name("aimv2_large_336.py"))
    run.out = "runs/aimv2_large_native"
    run.init_from.positions = "replace"
    run.steps = 460_000
    run.objective.vision.positions = "sincos"
    run.objective.vision.image_size = run.data.transform.image_size = 224  # what C and the batch are counted in
    run.data.native = NativeConfig(min_patches=128, max_patches=4096, shared_by=64)
    run.data.pad_text_to_context = False
    run.data.transform.crop_scale = None
    run.optim.peak_lr, run.optim.final_lr = 2e-4, 2e-6
    run.engine.micro_batch = 128
    run.engine.compile = False
    return run
