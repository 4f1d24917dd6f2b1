"""Train a run of configs/, alone or under a launcher.

    deepspeed scripts/train_aimv2.py --config configs/shapes.py [key=value ...]
    torchrun --nproc-per-node 2 scripts/train_aimv2.py --config configs/shapes.py engine.micro_batch=32
    python scripts/train_aimv2.py --config configs/shapes.py out=runs/try steps=100

`key=value` changes a field of the config, `key.sub=value` one further down. The same command again resumes.
"""

import argparse
import os
import sys
import time
from pathlib import Path

from aimv2.config import load_config

HELD_BACK = 3.0  # seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="a Python file whose config() returns the run")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    # Here, because the processes that write data import this file, too.
    from aimv2.ranks import lost_peer
    from aimv2.train import TrainingError, train

    try:
        train(load_config(arguments.config, arguments.overrides))
    except (ValueError, OSError, TrainingError) as error:
        # What a user can mend is one line; anything else is a bug, and keeps its traceback.
        report(str(error))
        return 1
    except RuntimeError as error:
        if not lost_peer(error):
            raise
        report("another rank ended or hangs; look for its own error")
        return 1
    except KeyboardInterrupt:
        report("interrupted before training began")
        return 130
    return 0


def report(error: str) -> None:
    """One line. As a rule all ranks fail alike: the others leave it to rank 0, after which the launcher ends them."""
    rank = int(os.environ.get("RANK", "0"))
    if rank > 0:
        time.sleep(HELD_BACK)
    sys.stderr.write(f"error: {error}\n" if rank == 0 else f"error on rank {rank}: {error}\n")


if __name__ == "__main__":
    sys.exit(main())
