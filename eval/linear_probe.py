"""Linear classifiers on frozen features: DINOv2's grid by SGD, or few-shot logistic regression.

    python eval/linear_probe.py --encoder aimv2:runs/shapes/export --data shapes:data/shapes_quick --out results
    python eval/linear_probe.py --encoder aimv2:runs/shapes/export --data digits --out results --few-shot

Features are extracted once (mode=cached); with mode=online they are those of augmented images.
"""

import sys
from functools import partial

from arguments import add_features, add_select_on, main, parser

from aimv2.evals.encoders import open_encoder
from aimv2.evals.few_shot import FewShot
from aimv2.evals.probes.linear_probe import LinearProbe

if __name__ == "__main__":
    made = parser(__doc__)
    made.add_argument("--few-shot", action="store_true", help="logistic regression on 1 to 16 images of each class")
    add_features(made, "grid, pooled, ")
    add_select_on(made)
    arguments = made.parse_args()
    protocol = FewShot() if arguments.few_shot else LinearProbe()
    sys.exit(main(arguments, protocol, partial(open_encoder, image_size=arguments.image_size)))
