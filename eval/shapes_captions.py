"""Caption accuracy in the shapes world at several image sizes, and for tall, squarish and wide images.

    python eval/shapes_captions.py --model runs/shapes_mixed/export runs/shapes_native/export \\
        --data data/shapes_mixed --out results --image-size 48 72 96

Models are exports of AIMv2. A native one is given whole images with their aspect ratio kept, any other one whole images
squashed into squares, its positions interpolated; with @native behind its path it is treated as a native one, too.
Sizes are the sides of squares, or with --area numbers of patches; images whose aspect is kept have as many patches as
such a square, or a few less. Each result is a JSON file; OUT/shapes_captions.png draws all of this command. A caption
is right if it is a sentence of the world's grammar and says exactly which objects there are and where.
"""

import argparse
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from arguments import add_workers, for_each, show

from aimv2.evals.caption_sizes import Captioner, CaptionSizes
from aimv2.evals.datasets.interface import Dataset
from aimv2.evals.reports.caption_sizes import draw_sizes
from aimv2.evals.reports.files import read_result
from aimv2.evals.run import evaluate
from aimv2.evals.session import Session

PICTURE = "shapes_captions.png"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    several = {"nargs": "+", "action": "extend"}
    parser.add_argument("--model", dest="encoder", required=True, metavar="EXPORT", help="one or several", **several)
    parser.add_argument("--data", required=True, metavar="FOLDER", help="of the shapes world, with validation-*.tar")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="of the results")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument(
        "--image-size", type=int, metavar="N", help="pixels a side (default: the model's own)", **several
    )
    sizes.add_argument("--area", type=int, metavar="N", help="patches an image", **several)
    parser.add_argument("--samples", type=int, metavar="N", help="the first N of the split (default: all)")
    parser.add_argument("--batch-size", type=int, default=64, help="images per forward pass and rank (default: 64)")
    add_workers(parser)
    parser.add_argument("--device", help="as cuda:1 or cpu (default: a GPU if there is one)")
    parser.set_defaults(root=None, download=False, train_images=None, test_images=None)
    arguments = parser.parse_args()
    arguments.data = [f"shapes:{arguments.data}"]
    arguments.settings = [] if arguments.samples is None else [f"samples={arguments.samples}"]
    return for_each(arguments, CaptionSizes(), Captioner, partial(_evaluate, arguments=arguments, written=[]))


def _evaluate(
    captioner: Captioner,
    data: Dataset,
    protocol: CaptionSizes,
    session: Session,
    *,
    arguments: argparse.Namespace,
    written: list[Path],
) -> None:
    """One model at all sizes; `written` are the results so far."""
    if arguments.area:
        sizes = arguments.area
    elif arguments.image_size:
        sizes = [captioner.patches(size) for size in arguments.image_size]
    else:
        sizes = [captioner.vision.num_patches]
    for patches in sizes:
        written.append(evaluate(replace(protocol, patches=patches), captioner, data, arguments.out, session))
        show(written[-1], session)
    if session.rank == 0:
        print(draw_sizes([read_result(path) for path in written], arguments.out / PICTURE))


if __name__ == "__main__":
    sys.exit(main())
