"""Write webdataset shards.

python scripts/make_shards.py shapes --difficulty quick --out data/shapes_quick --train 40000 --validation 2000
"""

import argparse
import os
import sys

from tqdm import tqdm

from aimv2.data.shapes import WORLDS, ShapesRecipe, write_shards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sources = parser.add_subparsers(required=True, metavar="SOURCE")
    add_shapes(sources.add_parser("shapes", help="the embedded world of coloured shapes", description=shapes.__doc__))
    arguments = parser.parse_args()
    try:
        arguments.run(arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"make_shards: {error}")


def add_shapes(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=shapes)
    parser.add_argument("--difficulty", choices=WORLDS, default="quick")
    parser.add_argument("--out", required=True, metavar="FOLDER")
    parser.add_argument("--train", type=int, default=40_000, metavar="N", help="training samples (%(default)s)")
    parser.add_argument("--validation", type=int, default=2_000, metavar="N", help="held-out samples (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples-per-shard", type=int, default=1_000, metavar="N", help="(%(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (%(default)s)")


def shapes(arguments: argparse.Namespace) -> None:
    """Write the shapes world; the same command again goes on where it stopped."""
    recipe = ShapesRecipe(
        difficulty=arguments.difficulty,
        folder=arguments.out,
        train=arguments.train,
        validation=arguments.validation,
        seed=arguments.seed,
        samples_per_shard=arguments.samples_per_shard,
    )
    # The delay keeps an immediate error to one line.
    with tqdm(total=recipe.train + recipe.validation, unit=" samples", unit_scale=True, delay=0.5) as bar:
        folder = write_shards(recipe, workers=arguments.workers, progress=bar.update)
    print(f"{recipe.train} training and {recipe.validation} validation samples in {folder}")


if __name__ == "__main__":
    main()
