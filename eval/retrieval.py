"""Image-text retrieval: recall at 1, 5 and 10, from images to captions and back.

    python eval/retrieval.py --encoder aimv2:/models/lit --data coco:/data/coco flickr30k:/data/flickr30k --out results
    python eval/retrieval.py --encoder open_clip:ViT-B-32,laion2b_s34b_b79k --data coco:/data/coco --out results

The encoder must have a text tower.
"""

import sys

from arguments import MODELS, main, parser

from aimv2.evals.retrieval import Retrieval
from aimv2.evals.text_image import open_text_image

if __name__ == "__main__":
    sys.exit(main(parser(__doc__, MODELS).parse_args(), Retrieval(), open_text_image))
