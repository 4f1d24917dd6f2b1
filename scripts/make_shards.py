"""Write webdataset shards, and prepare them for training.

python scripts/make_shards.py shapes --difficulty quick --out data/shapes_quick --train 40000 --validation 2000
python scripts/make_shards.py coyo --metadata data/coyo-metadata --images data/coyo
python scripts/make_shards.py prepare data/coyo --keep "clip_similarity_vitl14 >= quantile:0.5"

Whatever was interrupted goes on when the same command is given again.
"""

import argparse
import json
import os
import shlex
import sys
from pathlib import Path
from typing import ClassVar

from tqdm import tqdm

from aimv2.data.processes import LostProcess
from aimv2.data.shapes import WORLDS, ShapesRecipe, write_shards
from aimv2.data.shard_list import LIST_NAME
from aimv2.data.shard_writer import SampleSource, report_path
from aimv2.data.shard_writer import write_shards as write_samples
from aimv2.ingest import coyo as coyo_metadata
from aimv2.ingest.downloads import is_download
from aimv2.ingest.folders import ImageFolder
from aimv2.ingest.huggingface import ImageSet
from aimv2.ingest.measures import MeasureConfig
from aimv2.ingest.pairs import SAMPLES_PER_SHARD, Packing
from aimv2.ingest.prepare import PrepareConfig
from aimv2.ingest.prepare import prepare as prepare_folder
from aimv2.ingest.tables import ImageTable

FORMATTER = argparse.RawDescriptionHelpFormatter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=FORMATTER)
    sources = parser.add_subparsers(required=True, metavar="SOURCE")
    add_shapes(sources.add_parser("shapes", help="the embedded world of coloured shapes", description=shapes.__doc__))
    for add, does in (
        (add_folder, "images with captions beside them"),
        (add_table, "a table of image paths and captions"),
        (add_huggingface, "a set of Hugging Face's datasets"),
        (add_coyo, "COYO-700M's metadata for what img2dataset downloaded of it"),
        (add_prepare, "index, check, measure and filter the shards of a folder, in place"),
        (add_img2dataset, "sum up a download of img2dataset and prepare it"),
    ):
        name = add.__name__.removeprefix("add_")
        add(sources.add_parser(name, help=does, description=globals()[name].__doc__, formatter_class=FORMATTER))
    arguments = parser.parse_args()
    try:
        try:
            arguments.run(arguments)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough; what is left must not be tried again at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError, ImportError, LostProcess) as error:
        sys.exit(f"make_shards: {error}")
    except KeyboardInterrupt:
        sys.exit("make_shards: interrupted; the same command goes on")


def add_shapes(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=shapes)
    parser.add_argument("--difficulty", choices=WORLDS, default="quick")
    parser.add_argument("--out", required=True, metavar="FOLDER")
    parser.add_argument("--train", type=int, default=40_000, metavar="N", help="training samples (%(default)s)")
    parser.add_argument("--validation", type=int, default=2_000, metavar="N", help="held-out samples (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples-per-shard", type=int, default=1_000, metavar="N", help="(%(default)s)")
    add_workers(parser)


def shapes(arguments: argparse.Namespace) -> None:
    """Write the shapes world; the same command again goes on where it stopped."""
    recipe = ShapesRecipe(
        difficulty=arguments.difficulty,
        folder=arguments.out,
        train=arguments.train,
        validation=arguments.validation,
        seed=arguments.seed,
        samples_per_shard=arguments.samples_per_shard,
    )
    # The delay keeps an immediate error to one line.
    with tqdm(total=recipe.train + recipe.validation, unit=" samples", unit_scale=True, delay=0.5) as bar:
        folder = write_shards(recipe, workers=arguments.workers, progress=bar.update)
    print(f"{recipe.train} training and {recipe.validation} validation samples in {folder}")


def add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (%(default)s)")


def add_packing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, metavar="FOLDER", help="for the shards")
    parser.add_argument(
        "--allow-no-caption", action="store_true", help="keep images without a caption, to be trained on for the pixels"
    )
    parser.add_argument("--samples-per-shard", type=int, default=SAMPLES_PER_SHARD, metavar="N", help="(%(default)s)")
    add_workers(parser)


def add_columns(parser: argparse.ArgumentParser, required: bool) -> None:
    parser.add_argument("--image-column", required=required, default="", metavar="NAME")
    parser.add_argument(
        "--caption-column",
        action="append",
        required=required,
        default=[],
        metavar="NAME",
        help="of a caption or a list of them; repeatable, the first usable caption becomes KEY.txt",
    )


def add_folder(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=folder)
    parser.add_argument("source", metavar="FOLDER", help="of images at any depth")
    add_packing(parser)


def folder(arguments: argparse.Namespace) -> None:
    """Write images with captions beside them (NAME.txt, NAME.json, or metadata.jsonl), then prepare the shards."""
    write_source(arguments, ImageFolder(Path(arguments.source), packing(arguments), Path(arguments.out)))


def add_table(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=table)
    parser.add_argument("source", metavar="TABLE", help=".csv, .tsv, .jsonl or .parquet")
    parser.add_argument("--images", required=True, metavar="FOLDER", help="that the paths start from and stay in")
    add_columns(parser, required=True)
    add_packing(parser)


def table(arguments: argparse.Namespace) -> None:
    """Write the images that a table names, with its captions, then prepare the shards. Nothing is downloaded."""
    source = ImageTable(
        path=Path(arguments.source),
        root=Path(arguments.images),
        image_column=arguments.image_column,
        caption_columns=arguments.caption_column,
        packing=packing(arguments),
    )
    write_source(arguments, source)


def add_huggingface(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=huggingface)
    parser.add_argument("source", metavar="NAME", help="a folder, or the name of a set on the hub")
    parser.add_argument("--split", default="train", help="(%(default)s)")
    add_columns(parser, required=False)
    add_packing(parser)


def huggingface(arguments: argparse.Namespace) -> None:
    """Write a split of a set of images and captions, bytes as they are, then prepare the shards."""
    source = ImageSet(
        name=arguments.source,
        split=arguments.split,
        image_column=arguments.image_column,
        caption_columns=arguments.caption_column,
        packing=packing(arguments),
    )
    write_source(arguments, source)


def packing(arguments: argparse.Namespace) -> Packing:
    return Packing(samples_per_shard=arguments.samples_per_shard, allow_no_caption=arguments.allow_no_caption)


def write_source(arguments: argparse.Namespace, source: SampleSource) -> None:
    out = Path(arguments.out)
    with Bars() as bars:
        written = write_samples(
            out, source, arguments.workers, progress=lambda done: bars.update("write", done, len(source))
        )
    print(f"{written.summary()}\n{report_path(out)}\n")
    if (out / LIST_NAME).is_file():  # no shard was written; perhaps with filters, which stay
        print(f"{out / LIST_NAME} is as it was")
        return
    if filters := last_prepare(out):
        sys.exit(f"make_shards: {out}: new shards are not filtered as the others are; now run: {filters}")
    measures = {"no_decode": False, "no_phash": False, "tokenizer": None, "verify": False}
    captions = ["none"] if arguments.allow_no_caption else None
    run_prepare(argparse.Namespace(folder=out, workers=arguments.workers, captions=captions, **measures))


def last_prepare(out: Path) -> str | None:
    """The command by which a folder was last prepared, if somebody chose one: its filters would be lost."""
    report = out / "prepared" / "report.json"
    command = json.loads(report.read_text()).get("command", "") if report.is_file() else ""
    return command if shlex.split(command)[2:3] == ["prepare"] else None


def add_coyo(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=coyo)
    parser.add_argument("--metadata", required=True, metavar="FOLDER", help="of COYO's parquet files")
    parser.add_argument("--images", required=True, metavar="FOLDER", help="that img2dataset wrote")
    add_workers(parser)


def coyo(arguments: argparse.Namespace) -> None:
    """Write COYO's columns for every finished shard of a download, IMAGES/prepared/00000.columns.parquet.

    Samples are found by COYO's id if img2dataset saved it, else by url. The tars are not touched, and nothing is
    copied. Afterwards `prepare IMAGES` can filter by these columns.
    """
    images = Path(arguments.images)
    with Bars() as bars:
        joined = coyo_metadata.join_coyo(Path(arguments.metadata), images, arguments.workers, progress=bars.update)
    print(f"{joined.summary()}\n{coyo_metadata.report_path(images)}")
    if joined.unusable:
        sys.exit(1)


def add_prepare(parser: argparse.ArgumentParser) -> None:
    add_measures(parser)
    parser.set_defaults(run=prepare)
    parser.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="FILTER",
        help="'COLUMN OPERATOR NUMBER' or 'COLUMN OPERATOR quantile:NUMBER', e.g. 'clip_similarity_vitl14 >= "
        "quantile:0.5'; repeatable. Operators: >= <= > < == !=. The report lists the columns",
    )
    parser.add_argument(
        "--duplicates",
        choices=("none", "bytes", "phash"),
        default="none",
        help="drop images that repeat an earlier one: the same bytes, or the same perceptual hash (%(default)s)",
    )
    parser.add_argument(
        "--nsfw",
        default="0.5",
        metavar="SCORE",
        help="the highest nsfw_score_opennsfw2 and nsfw_score_gantman; samples without pass; none: any (%(default)s)",
    )
    parser.add_argument("--keep-missing", action="store_true", help="--keep passes samples that have no value, too")
    parser.add_argument("--all", action="store_true", help="keep every sample, as if there had never been a filter")


def add_img2dataset(parser: argparse.ArgumentParser) -> None:
    add_measures(parser)
    parser.set_defaults(run=img2dataset)


def add_measures(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="of .tar files")
    parser.add_argument("--no-decode", action="store_true", help="look at the headers of images only: quicker")
    parser.add_argument("--no-phash", action="store_true", help="no perceptual hashes")
    parser.add_argument("--tokenizer", metavar="PATH", help="count the tokens of captions")
    parser.add_argument(
        "--captions",
        action="append",
        metavar="WHERE",
        help="txt, json:KEY or none; repeatable: the first is measured, samples with none of them are dropped (txt)",
    )
    parser.add_argument("--verify", action="store_true", help="read every byte again: finds disks that forget")
    add_workers(parser)


def prepare(arguments: argparse.Namespace) -> None:
    """Index, check, measure and filter the shards of a folder. The tars are only read.

    What the filters leave is written into the indices (00000.tar.idx) and listed in FOLDER/shards.list. Run it again
    with other filters, or with --all: nothing is measured twice. By default only what cannot be used is dropped: images
    that cannot be decoded, samples without a caption, and those over --nsfw. Samples without a score, and those whose
    captions clean to nothing, are counted and kept; the latter are trained on for the pixels.

    Each damage is a line `SHARD: byte OFFSET: REASON`, and the exit status then is 1.
    """
    try:
        most_nsfw = None if arguments.nsfw == "none" else float(arguments.nsfw)
    except ValueError:
        raise ValueError(f"--nsfw {arguments.nsfw}: expected a number or none") from None
    run_prepare(
        arguments,
        keep=tuple(arguments.keep),
        duplicates=arguments.duplicates,
        most_nsfw=most_nsfw,
        keep_missing=arguments.keep_missing,
        keep_all=arguments.all,
    )


def img2dataset(arguments: argparse.Namespace) -> None:
    """Sum up a download of img2dataset, and prepare it with the default filters.

    Where FOLDER/shards.list is, what is new is measured and the list stays as it is; `prepare` changes it.
    """
    if not is_download(Path(arguments.folder)):
        raise ValueError(f"{arguments.folder}: no *_stats.json, which img2dataset writes for each finished shard")
    run_prepare(arguments, leave=True)


def run_prepare(arguments: argparse.Namespace, **choices) -> None:
    captions = tuple(where for where in arguments.captions or ("txt",) if where != "none")
    measure = MeasureConfig(
        decode=not arguments.no_decode,
        phash=not arguments.no_phash,
        tokenizer=arguments.tokenizer,
        captions=captions,
    )
    command = shlex.join(["python", "scripts/make_shards.py", *sys.argv[1:]])
    config = PrepareConfig(
        measure=measure, verify=arguments.verify, workers=arguments.workers, command=command, **choices
    )
    with Bars() as bars:
        report = prepare_folder(arguments.folder, config, progress=bars.update)
    for line in report.damage:
        print(line)
    print(report.summary())
    if not report.selection.kept:
        sys.exit(f"make_shards: {arguments.folder}: no sample is left; its indices and shards.list are as they were")
    out = report.folder / "prepared"
    if report.left:
        print(f"\n{report.folder / LIST_NAME} is as it was; prepare changes it")
    else:
        print(f"\n{report.folder / LIST_NAME}\n{out / 'report.md'}\n{out / 'samples.png'}\n{out / 'histograms.png'}")
    if report.damage:
        sys.exit(1)


class Bars:
    """A progress bar for each thing that is done, one after the other."""

    UNITS: ClassVar = {"index": "B", "select": " samples", "apply": " shards", "look": " shards", "find": " parts"}

    def __init__(self):
        self._bar: tqdm | None = None

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, what: str, done: int, total: int) -> None:
        if self._bar is None or self._bar.desc != f"{what}: ":
            self.__exit__()
            self._bar = tqdm(total=total, desc=what, unit=self.UNITS.get(what, " samples"), unit_scale=True, delay=0.5)
        self._bar.update(done)


if __name__ == "__main__":
    main()
