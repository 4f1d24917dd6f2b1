"""CLIP_benchmark's own command line, with our LiT models in it.

    python eval/clip_benchmark_lit.py eval --pretrained MODEL --dataset cifar10 --dataset_root DATA
    python eval/clip_benchmark_lit.py eval --pretrained MODEL --dataset wds/mine --dataset_root SHARDS \\
        --task zeroshot_retrieval --recall_k 1 5 10
    python eval/clip_benchmark_lit.py eval --help

MODEL is a LiT model's folder, file or hub name, or several. `--model` is the name of all of them in the results
("aimv2"). All else is clip_benchmark's, and stays as it is there; `--model_type open_clip` is for open_clip's models.
"""

import sys
from argparse import Namespace
from collections.abc import Callable

from aimv2.harnesses.clip_benchmark import MODEL_TYPE, register_clip_benchmark

DEFAULTS = ["--model_type", MODEL_TYPE, "--model", MODEL_TYPE]


def into_one_folder(run: Callable) -> Callable:
    """`cli.run`, whose `{pretrained}` in --output is MODEL as a file's name.

    With its slashes the run would end in an error, having computed all; without it models would take one file in turn.
    """

    def run_one(args: Namespace) -> int | None:
        if args.model_type == MODEL_TYPE:
            name = args.pretrained.strip("/").replace("/", "_")
            for field in ("{pretrained}", "{pretrained_full_path}"):
                args.output = args.output.replace(field, name.replace("{", "{{").replace("}", "}}"))
        return run(args)

    return run_one


def main() -> int:
    if sys.argv[1:2] == ["eval"]:
        sys.argv[2:2] = DEFAULTS
    try:
        register_clip_benchmark()
        from clip_benchmark import cli

        cli.run = into_one_folder(cli.run)
        cli.main()
    except (ImportError, OSError, ValueError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        sys.stderr.write(f"error: {lines[-1]}\n")  # of a worker's error the last is its own
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
