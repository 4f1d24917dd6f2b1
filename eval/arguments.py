"""The arguments that the scripts of this folder share, and what they do with them."""

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from aimv2.config import override
from aimv2.evals.datasets import open_dataset
from aimv2.evals.datasets.interface import Dataset
from aimv2.evals.run import Evaluation, evaluate, shortened
from aimv2.evals.session import Session, launched_session
from aimv2.ranks import lost_peer

ENCODERS = """
ENCODER is aimv2:PATH, random:PATH (the same architecture with random weights), timm:NAME[,WEIGHTS],
open_clip:NAME[,WEIGHTS], hf:NAME or pixels; with @LAYERS behind it, as @12-17, the mean of those blocks' outputs.
"""
MODELS = """
ENCODER is aimv2:PATH, open_clip:NAME[,WEIGHTS] or hf:NAME: a model with a text tower.
"""
DATA = """
DATA is shapes:FOLDER[@shape_colour], digits, faces, folder:PATH (train/ and val/), shards:TRAIN,TEST@json.KEY, hf:NAME,
a name such as imagenet, cifar10, dtd, or for captions coco:FOLDER, flickr30k:FOLDER: eval/README.md has them all. On
several GPUs: torchrun --nproc-per-node 8 in place of python. What was finished is not done again, and what was stopped
goes on; for that, OUT/work keeps features and states, until you delete it.
"""
HELD_BACK = 3.0  # seconds


def parser(description: str, encoders: str = ENCODERS) -> argparse.ArgumentParser:
    """With the arguments of every script."""
    made = argparse.ArgumentParser(
        description=description, epilog=encoders + DATA, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    several = {"nargs": "+", "action": "extend"}
    made.add_argument("--encoder", required=True, metavar="ENCODER", help="one or several", **several)
    made.add_argument("--data", required=True, metavar="DATA", help="one or several", **several)
    made.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="of the results")
    made.add_argument("--root", type=Path, help="folder of the named datasets")
    made.add_argument("--download", action="store_true", help="named datasets that are not there")
    made.add_argument("--train-images", type=int, metavar="N", help="so many of the training images, drawn once")
    made.add_argument("--test-images", type=int, metavar="N", help="so many of the test images")
    made.add_argument("--batch-size", type=int, default=64, help="images per forward pass and rank (default: 64)")
    add_workers(made)
    made.add_argument("--device", help="as cuda:1 or cpu (default: a GPU if there is one)")
    made.add_argument(
        "--set", default=[], dest="settings", metavar="KEY=VALUE", help="settings of the protocol, as k=5,10", **several
    )
    return made


def add_workers(made: argparse.ArgumentParser) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(4, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    made.add_argument(
        "--workers", type=int, default=workers, help="processes per rank that decode images (%(default)s)"
    )


def add_image_size(made: argparse.ArgumentParser) -> None:
    made.add_argument("--image-size", type=int, help="pixels a side (the checkpoint's own)")


def add_features(made: argparse.ArgumentParser, own: str = "") -> None:
    """For protocols that look at an encoder's blocks; `own` are words that only some of them know."""
    add_image_size(made)
    made.add_argument(
        "--layers",
        help=f"{own}output, a block counted from 0, a range as 12-17, last6, all, windows (of six); commas join",
    )


def add_select_on(made: argparse.ArgumentParser) -> None:
    made.add_argument(
        "--select-on",
        choices=("held_out", "test"),
        help="the sweep's winner: on 10 %% of train (default), or as published",
    )


def main(arguments: argparse.Namespace, protocol: Evaluation, open_encoder: Callable) -> int:
    """Evaluate every encoder on every dataset; print where the results are and what they say."""

    def one(encoder, data: Dataset, protocol: Evaluation, session: Session) -> None:
        show(evaluate(protocol, encoder, data, arguments.out, session), session)

    return for_each(arguments, protocol, open_encoder, one)


def for_each(arguments: argparse.Namespace, protocol: Evaluation, open_encoder: Callable, one: Callable) -> int:
    """Call `one(encoder, data, protocol, session)` with every encoder on every dataset. Returns the exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("aimv2").setLevel(logging.INFO if rank() == 0 else logging.WARNING)
    sys.stdout.reconfigure(errors="replace")
    for name in ("layers", "select_on", "templates"):
        if getattr(arguments, name, None) is not None:
            arguments.settings.append(f"{name}={getattr(arguments, name)}")
    where = {"folder": arguments.out / "work", "batch_size": arguments.batch_size, "workers": arguments.workers}
    try:
        protocol = override(protocol, arguments.settings)
        with launched_session(arguments.device, **where) as session:
            for spec in arguments.data:
                data = open_in_turn(spec, arguments, session)
                for encoder_spec in arguments.encoder:
                    one(open_encoder(encoder_spec, device=session.device), data, protocol, session)
    except (ValueError, OSError, ImportError) as error:
        report(str(error))
        return 1
    except RuntimeError as error:
        if not lost_peer(error):
            raise
        report("another rank ended or hangs; look for its own error")
        return 1
    except KeyboardInterrupt:
        report("interrupted; the same command goes on from here")
        return 130
    return 0


def open_in_turn(spec: str, arguments: argparse.Namespace, session: Session) -> Dataset:
    """The first rank may have to download it."""
    for turn in (True, False):
        if (session.rank == 0) == turn:
            data = open_dataset(spec, root=arguments.root, download=arguments.download)
            data = shortened(data, arguments.train_images, arguments.test_images)
        session.wait()
    return data


def show(path: Path, session: Session) -> None:
    """A result's numbers, for people."""
    if session.rank > 0:
        return
    result = json.loads(path.read_text())
    print(f"{path}\n  {result['encoder']['spec']} on {result['data']['spec']}")
    for name, metric in result["metrics"].items():
        chance = "" if metric["chance"] is None else f"  chance {100 * metric['chance']:.2f}"
        print(f"  {name:24} {100 * metric['value']:6.2f} ± {100 * metric['stderr']:.2f}  n {metric['n']}{chance}")
    train, test = (result["data"].get(split, {}) for split in ("train", "test"))
    for split, found in (("training", train), ("test", test)):
        if found.get("unreadable"):
            print(f"  {found['unreadable']} {split} images could not be read, such as {found['unreadable_keys'][0]}")
    for note in result["details"].get("notes", []):
        print(f"  note: {note}")


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def report(error: str) -> None:
    """One line, of a worker's error the last. The other ranks leave an error of all to rank 0, whose end ends them."""
    if error.startswith("Caught "):
        error = error.strip().splitlines()[-1]
    if rank() > 0:
        time.sleep(HELD_BACK)
    sys.stderr.write(f"error: {error}\n" if rank() == 0 else f"error on rank {rank()}: {error}\n")
