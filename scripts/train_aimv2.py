"""Train a run of configs/, alone or under a launcher.

    deepspeed scripts/train_aimv2.py --config configs/shapes.py [key=value ...]
    torchrun --nproc-per-node 2 scripts/train_aimv2.py --config configs/shapes.py engine.micro_batch=32
    python scripts/train_aimv2.py --config configs/shapes.py out=runs/try steps=100

`key=value` changes a field of the config, `key.sub=value` one further down. The same command again resumes.
"""

import argparse
import os
import sys
from pathlib import Path

from aimv2.config import load_config
from aimv2.train import TrainingError, train


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="a Python file whose config() returns the run")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    try:
        train(load_config(arguments.config, arguments.overrides))
    except (ValueError, OSError, TrainingError) as error:
        # What a user can mend is one line; anything else is a bug, and keeps its traceback.
        rank = int(os.environ.get("RANK", "0"))
        sys.stderr.write(f"error: {error}\n" if rank == 0 else f"error on rank {rank}: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
