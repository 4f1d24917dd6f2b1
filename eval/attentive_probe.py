"""The attentive probe of AIM and AIMv2 on frozen features: every learning rate and weight decay in one pass.

    python eval/attentive_probe.py --encoder aimv2:runs/shapes/export --data shapes:data/shapes_quick --out results
    torchrun --nproc-per-node 8 eval/attentive_probe.py --encoder aimv2:/models/large --data imagenet --root /data \\
        --out results --select-on test
    python eval/attentive_probe.py --encoder aimv2:runs/shapes/export --data digits --out results --layers all \\
        --set epochs=20 mode=online

The paper augments the training images in each epoch (mode=online). Without augmentation (mode=cached) features are
extracted once; that is done when they fit into 4 GB, unless a mode is given, and the result says which it was.
"""

import sys
from functools import partial

from arguments import add_features, add_select_on, main, parser

from aimv2.evals.encoders import open_encoder
from aimv2.evals.probes.attentive_probe import AttentiveProbe

if __name__ == "__main__":
    made = parser(__doc__)
    add_features(made)
    add_select_on(made)
    arguments = made.parse_args()
    sys.exit(main(arguments, AttentiveProbe(), partial(open_encoder, image_size=arguments.image_size)))
