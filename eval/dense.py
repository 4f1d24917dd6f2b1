"""Patch features of frozen encoders: pictures of principal components and attention, and a probe on patches.

    python eval/dense.py --encoder aimv2:runs/shapes/export pixels --data shapes:data/shapes_quick --out results
    python eval/dense.py --encoder aimv2:runs/shapes/export --data masks:/data/ade20k --out results --layers all

The probe is for data with masks or boxes; others get pictures only. Beside its result are STEM.png and, of our own
encoders, STEM.heads.png: what the patch in the box looks at, in the block --block.
"""

import logging
import re
import sys
from pathlib import Path

from arguments import add_features, open_in_turn, parser, show

from aimv2.config import override
from aimv2.evals.datasets import Dataset
from aimv2.evals.dense.patch_probe import PatchProbe
from aimv2.evals.dense.pictures import dense_samples, draw_dense, draw_heads
from aimv2.evals.encoders import Encoder, open_encoder
from aimv2.evals.reports.files import read_result
from aimv2.evals.run import evaluate
from aimv2.evals.session import Session, launched_session


def main() -> int:
    made = parser(__doc__)
    add_features(made)
    made.add_argument("--block", type=int, default=-1, help="whose attention is drawn (default: -1, the last)")
    made.add_argument("--pictures", type=int, default=6, metavar="N", help="images drawn (default: 6)")
    arguments = made.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if arguments.layers is not None:
        arguments.settings.append(f"layers={arguments.layers}")
    where = {"folder": arguments.out / "work", "batch_size": arguments.batch_size, "workers": arguments.workers}
    try:
        probe = override(PatchProbe(), arguments.settings)
        with launched_session(arguments.device, **where) as session:
            for spec in arguments.data:
                data = open_in_turn(spec, arguments, session)
                for encoder_spec in arguments.encoder:
                    encoder = open_encoder(encoder_spec, image_size=arguments.image_size, device=session.device)
                    _evaluate(probe, encoder, data, arguments, session)
    except (ValueError, OSError, ImportError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def _evaluate(probe: PatchProbe, encoder: Encoder, data: Dataset, arguments, session: Session) -> None:
    labelled = data.train is not None and (data.test.has_masks or data.test.has_boxes)
    stem = "-".join(re.sub(r"[^\w.@]+", "_", text).strip("_")[-60:] for text in ("dense", data.spec, encoder.spec))
    path, result = arguments.out / f"{stem}.json", None
    if labelled:
        path = evaluate(probe, encoder, data, arguments.out, session)
        show(path, session)
    if session.rank > 0:
        return
    if labelled:
        result = read_result(path)
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
