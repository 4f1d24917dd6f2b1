"""Zero-shot classification: the class whose prompts, averaged, are nearest to the image.

    python eval/zero_shot.py --encoder aimv2:/models/lit --data imagenet --root /data --out results
    python eval/zero_shot.py --encoder open_clip:ViT-B-32,laion2b_s34b_b79k --data cifar10 --root /data --out results

The encoder must have a text tower.
"""

import sys

from arguments import MODELS, main, parser

from aimv2.evals.text_image import open_text_image
from aimv2.evals.zero_shot import ZeroShot

if __name__ == "__main__":
    sys.exit(main(parser(__doc__, MODELS).parse_args(), ZeroShot(), open_text_image))
