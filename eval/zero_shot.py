"""Zero-shot classification: the class whose prompts, averaged, are nearest to the image.

    python eval/zero_shot.py --encoder aimv2:/models/lit --data imagenet --root /data --out results
    python eval/zero_shot.py --encoder open_clip:ViT-B-32,laion2b_s34b_b79k --data cifar10 --root /data --out results
    python eval/zero_shot.py --encoder aimv2:runs/shapes_lit/export --out results \\
        --data shapes:data/shapes_mixed@single_shape_colour --templates eval/templates/shapes_unseen.txt

The encoder must have a text tower. The third command's templates are of the words of the shapes world, in orders that
none of its captions has; without them, they are its captions.
"""

import sys
from functools import partial

from arguments import MODELS, add_image_size, main, parser

from aimv2.evals.text_image import open_text_image
from aimv2.evals.zero_shot import ZeroShot

if __name__ == "__main__":
    made = parser(__doc__, MODELS)
    add_image_size(made)
    made.add_argument(
        "--templates", help="dataset, imagenet, simple, none, or a file with one a line, {} for the class"
    )
    arguments = made.parse_args()
    sys.exit(main(arguments, ZeroShot(), partial(open_text_image, image_size=arguments.image_size)))
