"""Draw what a finished run learned: RUN/loss.png and RUN/predictions.png.

    python scripts/show_predictions.py runs/shapes
    python scripts/show_predictions.py runs/shapes --samples 16 --temperature 0.8 --top-p 0.9 --out /tmp/sampled

Captions are greedy, or sampled at a temperature above 0. Start it in the folder where training was started: the run's
config names its data from there.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from aimv2.config import from_json
from aimv2.data.loader import DataConfig
from aimv2.evals.predictions import draw_run

PRINTED = 4  # captions


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder, with config.json and export/")
    parser.add_argument("--samples", type=int, default=8, help="held-out images, from the first (default: 8)")
    parser.add_argument("--temperature", type=float, default=0.0, help="of sampled captions (default: 0, greedy)")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from this share of the mass (default: 1)")
    parser.add_argument("--out", type=Path, help="folder of the pictures (default: RUN)")
    arguments = parser.parse_args()
    out = arguments.out or arguments.run
    try:
        run = json.loads((arguments.run / "config.json").read_text())
        predictions = draw_run(
            arguments.run,
            from_json(DataConfig, run["data"]),
            seed=run["seed"],
            samples=arguments.samples,
            temperature=arguments.temperature,
            top_p=arguments.top_p,
            out=out,
            device="cuda" if torch.cuda.is_available() else "cpu",
        )
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    print(out / "loss.png")
    if not predictions:
        print("no predictions.png: the run has no validation data")
        return 0
    print(out / "predictions.png")
    for prediction in predictions[:PRINTED]:
        verdict = {True: " (right)", False: " (wrong)", None: ""}[prediction.right]
        print(f"\n  true       {prediction.true_caption}\n  generated  {prediction.caption}{verdict}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
