"""Image-text retrieval: recall at 1, 5 and 10, from images to captions and back.

    python eval/retrieval.py --encoder aimv2:/models/lit --data coco:/data/coco flickr30k:/data/flickr30k --out results
    python eval/retrieval.py --encoder open_clip:ViT-B-32,laion2b_s34b_b79k --data coco:/data/coco --out results

The encoder must have a text tower.
"""

import sys
from functools import partial

from arguments import MODELS, add_image_size, main, parser

from aimv2.evals.retrieval import Retrieval
from aimv2.evals.text_image import open_text_image

if __name__ == "__main__":
    made = parser(__doc__, MODELS)
    add_image_size(made)
    arguments = made.parse_args()
    sys.exit(main(arguments, Retrieval(), partial(open_text_image, image_size=arguments.image_size)))
