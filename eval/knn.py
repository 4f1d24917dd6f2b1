"""k nearest neighbours on frozen features, as DINOv2 does it.

    python eval/knn.py --encoder aimv2:runs/shapes/export pixels --data shapes:data/shapes_quick digits --out results
    python eval/knn.py --encoder aimv2:runs/shapes/export --data faces --out results --layers pooled,all

What is looked at is the library's own image feature (pooled), and of blocks the mean of the patches.
"""

import sys
from functools import partial

from arguments import add_features, main, parser

from aimv2.evals.encoders import open_encoder
from aimv2.evals.knn import KNN

if __name__ == "__main__":
    made = parser(__doc__)
    add_features(made, "pooled, ")
    arguments = made.parse_args()
    sys.exit(main(arguments, KNN(), partial(open_encoder, image_size=arguments.image_size)))
