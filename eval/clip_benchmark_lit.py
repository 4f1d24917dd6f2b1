"""CLIP_benchmark's own command line, with our LiT models in it.

    python eval/clip_benchmark_lit.py eval --pretrained MODEL --dataset cifar10 --dataset_root DATA
    python eval/clip_benchmark_lit.py eval --pretrained MODEL --dataset wds/mine --dataset_root SHARDS \\
        --task zeroshot_retrieval --recall_k 1 5 10
    python eval/clip_benchmark_lit.py eval --help

MODEL is a LiT model's folder, file or hub name. `--model` is its name in the results ("aimv2"). All else is
clip_benchmark's, and stays as it is there; `--model_type open_clip` evaluates open_clip's models.
"""

import sys

from clip_benchmark import cli

from aimv2.harnesses.clip_benchmark import MODEL_TYPE, register_clip_benchmark
from aimv2.weights import ModelError

# Its own --output has MODEL in it, whose slashes are no folders: the run would end in an error, having computed all.
DEFAULTS = ["--model_type", MODEL_TYPE, "--model", MODEL_TYPE, "--output", "{dataset}_{model}_{language}_{task}.json"]


def main() -> int:
    register_clip_benchmark()
    if sys.argv[1:2] == ["eval"]:
        sys.argv[2:2] = DEFAULTS
    try:
        cli.main()
    except ModelError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
