"""Patch features of frozen encoders: pictures of principal components and attention, and a probe on patches.

    python eval/dense.py --encoder aimv2:runs/shapes/export pixels --data shapes:data/shapes_quick --out results
    python eval/dense.py --encoder aimv2:runs/shapes/export --data masks:/data/ade20k --out results --layers all

The probe is for data with masks or boxes; others get pictures only. Beside its result are STEM.png and, of our own
encoders, STEM.heads.png: what the patch in the box looks at, in the block --block.
"""

import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

from arguments import add_features, for_each, parser, report, show

from aimv2.evals.datasets import Dataset
from aimv2.evals.dense.patch_probe import PatchProbe
from aimv2.evals.dense.pictures import dense_samples, draw_dense, draw_heads
from aimv2.evals.encoders import Encoder, open_encoder
from aimv2.evals.reports.files import read_result
from aimv2.evals.run import evaluate, stem_of
from aimv2.evals.session import Session

FIRST_HASH = 8  # characters of a digest in a file's name


def main() -> int:
    made = parser(__doc__)
    add_features(made)
    made.add_argument("--block", type=int, default=-1, help="whose attention is drawn (default: -1, the last)")
    made.add_argument("--pictures", type=int, default=6, metavar="N", help="images drawn (default: 6)")
    arguments = made.parse_args()
    if arguments.pictures < 0:
        report(f"--pictures {arguments.pictures}: expected 0 or more")
        return 1
    opened = partial(open_encoder, image_size=arguments.image_size)
    return for_each(arguments, PatchProbe(), opened, partial(_evaluate, arguments=arguments))


def _evaluate(encoder: Encoder, data: Dataset, probe: PatchProbe, session: Session, *, arguments: Namespace) -> None:
    labelled = data.train is not None and (data.test.has_masks or data.test.has_boxes)
    if labelled:
        path = evaluate(probe, encoder, data, arguments.out, session)
        show(path, session)
    else:
        seen_as = encoder.describe()["preprocessing_hash"][:FIRST_HASH]  # pictures of another size are other pictures
        path = arguments.out / f"{stem_of('dense', data.spec, encoder.spec)}-{seen_as}.json"
    if session.rank > 0 or not arguments.pictures:
        return
    result = read_result(path) if labelled else None
    samples = dense_samples(
        encoder,
        data.test,
        session,
        count=arguments.pictures,
        block=arguments.block,
        probe=probe if labelled else None,
        result=result,
    )
    title = f"{encoder.name} on {data.name}"
    path.parent.mkdir(parents=True, exist_ok=True)
    classes = result.details["classes"] if result else ()
    pictures: list[Path] = [draw_dense(samples, classes, path.with_suffix(".png"), title)]
    if samples[0].looked_at is not None:
        pictures.append(draw_heads(samples, path.with_suffix(".heads.png"), title))
    print("\n".join(f"  {picture}" for picture in pictures))


if __name__ == "__main__":
    sys.exit(main())
