"""Speed of ours beside the field's, in the same run: encoders, a whole train step, and what feeds it.

    python scripts/benchmark.py encoder --size base --dtype fp32 bf16
    python scripts/benchmark.py train --size large --dtype bf16 --batch 128 --compile
    python scripts/benchmark.py data --data build/photos
    python scripts/benchmark.py probe --size large --batch 64
    python scripts/benchmark.py native --size base --dtype bf16 --budget 8192

Those compared take turns within each round, each beginning in its turn, so that a machine whose speed drifts is as
unfair to one as to another. The ratio of a round is the peer's time over ours, above 1 where ours is faster; the median
over the rounds is what counts.

encoder, train: All have random weights of the same distribution. bf16 means bf16 weights and images, for all alike; in
the train step AdamW then works on an fp32 copy, as DeepSpeed's does. Memory is what stays (weights, optimizer) and the
most that torch's allocator hands out during a pass. The MFU counts the operations of `aimv2.flops` against the device's
data sheet, --peak-tflops, or the fastest of ten large matrix products of the same run.

data: Shards of made photos are written to --data, once. Everything happens in one process, so the samples/s are those
of a core.

native: A micro-batch of AIMv2 at native resolution, forward and backward: images as strips padded to the longest, and
packed into one sequence. One micro-batch for each area, of --budget patches.

probe: The attentive probe's sweep of 14 heads on kept features and on features made anew, and exact nearest neighbours.
"""

import argparse
import importlib.util
import json
import platform
import re
import sys
from importlib.metadata import version
from pathlib import Path

import benchmark_data
import benchmark_models
import benchmark_native
import benchmark_probe
import torch

import aimv2

PACKAGES = {
    "PIL": "pillow",
    "open_clip": "open_clip_torch",
    "sklearn": "scikit-learn",
}  # by module, where the names differ


def environment(arguments: argparse.Namespace, packages: tuple[str, ...]) -> dict:
    device = torch.device(arguments.device)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "aimv2": aimv2.__version__,
        "torch": torch.__version__,
    } | {name: version(PACKAGES.get(name, name)) for name in packages if importlib.util.find_spec(name)}


def processor() -> str:
    info = Path("/proc/cpuinfo")  # platform.processor() is empty on Linux
    name = re.search(r"^model name\s*: (.*)", info.read_text(), re.MULTILINE) if info.exists() else None
    return name[1] if name else platform.processor()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--rounds", type=int, default=15, metavar="N", help="timed (%(default)s)")
    common.add_argument("--json", type=Path, metavar="FILE", help="write environment and results there")
    doors = parser.add_subparsers(dest="what", required=True)
    for what in ("encoder", "train"):
        add_models(doors.add_parser(what, parents=[common]))
    add_data(doors.add_parser("data", parents=[common]))
    add_native(doors.add_parser("native", parents=[common]))
    probe = doors.add_parser("probe", parents=[common])
    add_encoder(probe)
    probe.add_argument("--modes", nargs="+", choices=benchmark_probe.MODES, default=list(benchmark_probe.MODES))
    probe.add_argument("--gallery", type=int, default=100_000, metavar="N", help="to search in (%(default)s)")
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error(f"--rounds {arguments.rounds}: expected 2 or more, for a median with quartiles")
    return arguments


def add_encoder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", default="base", help="base, large, huge, 1b, 3b; tiny to try this (%(default)s)")
    parser.add_argument("--image-size", type=int, default=224, metavar="PIXELS")
    parser.add_argument("--batch", type=int, default=4, metavar="N", help="images (%(default)s)")
    add_device(parser)


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N", help="on the CPU")


def add_models(parser: argparse.ArgumentParser) -> None:
    add_encoder(parser)
    parser.add_argument("--dtype", nargs="+", choices=benchmark_models.DTYPES, default=list(benchmark_models.DTYPES))
    parser.add_argument("--compile", action="store_true", help="torch.compile, for all alike")
    parser.add_argument("--forward-only", action="store_true", help="encoder: as at inference, no backward pass")
    parser.add_argument("--peak-tflops", type=float, metavar="X", help="of the device, for the MFU")


def add_native(parser: argparse.ArgumentParser) -> None:
    areas = benchmark_native.AREAS
    parser.add_argument("--size", default="base", help="base, large, huge, 1b, 3b; tiny to try this (%(default)s)")
    parser.add_argument(
        "--areas", type=int, nargs="+", default=list(areas), metavar="N", help="most patches (%(default)s)"
    )
    parser.add_argument("--budget", type=int, default=max(areas), metavar="N", help="patches at once (%(default)s)")
    parser.add_argument("--dtype", nargs="+", choices=benchmark_models.DTYPES, default=list(benchmark_models.DTYPES))
    add_device(parser)


def add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, default=Path("data/photos"), metavar="FOLDER", help="(%(default)s)")
    parser.add_argument("--samples", type=int, default=1024, metavar="N", help="to be made (%(default)s)")
    parser.add_argument("--image-size", type=int, default=224, metavar="PIXELS", help="of a crop (%(default)s)")
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="samples (%(default)s)")
    parser.add_argument("--batches", type=int, default=2, metavar="N", help="in a round (%(default)s)")
    parser.set_defaults(device="cpu", threads=1)


def main() -> int:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    others = {"data": benchmark_data, "probe": benchmark_probe, "native": benchmark_native}
    benchmark = others.get(arguments.what, benchmark_models)
    place, found = environment(arguments, benchmark.PEERS), []
    try:
        for result in benchmark.results(arguments):
            if not found:
                print(", ".join(f"{name} {value}" for name, value in place.items()))
                print(benchmark.TITLE)
            print(benchmark.line(result), flush=True)
            found.append(result)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    print(benchmark.footer(found))
    if arguments.json:
        report = {"command": sys.argv[1:], "environment": place, "results": found}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
