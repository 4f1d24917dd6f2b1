"""Our training loader beside open_clip's on the same shards, and reading alone beside webdataset's reader."""

import argparse
import contextlib
import io
import os
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from benchmark_rounds import OURS, compare, time_rounds
from PIL import Image, ImageDraw
from tqdm import tqdm

from aimv2.data.loader import DataConfig, train_loader
from aimv2.data.mixture import Source
from aimv2.data.shard_writer import RawSample, ShardJob, write_shards
from aimv2.data.shards import ensure_indices
from aimv2.data.transforms import TransformConfig

PEERS = ("PIL", "torchvision", "simplejpeg", "open_clip", "webdataset")
TOKENIZER = Path(__file__).parents[1] / "tokenizers" / "shapes"
CAPTION = "a small red circle is left of a large blue square, and a green star is under both"
SIDES = (384, 512)  # what img2dataset is commonly told to keep
SHARDS = 4
SHUFFLED = 256  # samples in webdataset's buffer: filled before the clock starts, as 5,000 would be in a longer run


class Photos:
    """Made images that cost a decoder what photographs do: 1/f noise, as nature has it, behind a few flat shapes.

    About 2.4 bits a pixel at quality 90 and 4:2:0; photographs of these sides have 1.5 to 2.8.
    """

    def __init__(self, samples: int):
        if samples < SHARDS:
            raise ValueError(f"--samples {samples}: expected {SHARDS} or more")
        self.samples, self.notes = samples, Counter()
        self.opaque: dict[str, str] = {}
        self.recipe = {"photos": samples, "sides": list(SIDES), "quality": 90, "version": 1}

    def __len__(self) -> int:
        return self.samples

    def jobs(self) -> Iterator[ShardJob]:
        ends = [round(self.samples * n / SHARDS) for n in range(SHARDS + 1)]
        for number, (begin, end) in enumerate(pairwise(ends)):
            yield ShardJob(f"{number:05d}", end - begin, partial(photos, begin, end))


def photos(begin: int, end: int) -> Iterator[RawSample]:
    for number in range(begin, end):
        rng, data = np.random.default_rng(number), io.BytesIO()
        width, height = rng.integers(SIDES[0], SIDES[1] + 1, 2).tolist()
        photo(rng, width, height).save(data, "JPEG", quality=90)
        yield RawSample(f"{number:08d}", {"jpg": data.getvalue(), "txt": CAPTION.encode()})


def photo(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    y, x = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)
    frequency = np.hypot(x, y)
    frequency[0, 0] = np.inf  # no mean
    planes = []
    for centre, deviation in ((120, 45), (128, 14), (128, 14)):  # luminance and two of colour
        plane = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((height, width))) / frequency**1.45, (height, width))
        planes.append(centre + plane * (deviation / plane.std()))
    image = Image.fromarray(np.stack(planes, -1).clip(0, 255).astype(np.uint8), "YCbCr").convert("RGB")
    draw = ImageDraw.Draw(image)
    for _ in range(3):
        left, top, side = rng.integers(0, SIDES[0], 3).tolist()
        draw.ellipse((left, top, left + side // 4, top + side // 3), fill=tuple(rng.integers(0, 256, 3).tolist()))
    return image


def made_shards(folder: Path, samples: int) -> list[Path]:
    source = Photos(samples)
    with tqdm(total=samples, desc="making photos", unit="photo", leave=False) as bar:
        write_shards(folder, source, workers=os.cpu_count() or 1, progress=bar.update)
    shards = sorted(folder.glob("*.tar"))
    ensure_indices(shards)
    return shards


def our_loader(shards: list[Path], arguments: argparse.Namespace):
    source = Source(name="photos", shards=f"{shards[0].parent}/*.tar")
    transform = TransformConfig(image_size=arguments.image_size)
    config = DataConfig(train=[source], tokenizer=str(TOKENIZER), transform=transform, workers=0)
    size = {"patch_size": 14, "micro_batch": arguments.batch}
    return train_loader(config, **size, start=0, seed=0, rank=0, world_size=1)


def open_clip_loader(shards: list[Path], arguments: argparse.Namespace):
    """As its training script builds it, but for two parts.

    The tokenizer is left out. Its copy of webdataset's grouping of members fails at the end of every shard with
    webdataset after 0.2.86: webdataset's own takes its place.
    """
    import webdataset
    from open_clip.transform import AugmentationCfg, PreprocessCfg, image_transform_v2
    from open_clip_train import data

    transform = TransformConfig(image_size=arguments.image_size)
    size = PreprocessCfg(size=arguments.image_size, mean=transform.mean, std=transform.std, interpolation="bicubic")
    preprocess = image_transform_v2(size, is_train=True, aug_cfg=AugmentationCfg(scale=transform.crop_scale))
    data._SAMPLE_SHUFFLE_SIZE = data._SAMPLE_SHUFFLE_INITIAL = SHUFFLED
    data.tarfile_to_samples_nothrow = webdataset.tarfile_to_samples(handler=data.log_and_continue)
    settings = argparse.Namespace(
        train_data=braces(shards),
        train_num_samples=1 << 40,  # never a second epoch
        train_data_upsampling_factors=None,
        dataset_resampled=True,
        batch_size=arguments.batch,
        workers=0,
        world_size=1,
        seed=0,
    )
    tokens = torch.zeros(1, 77, dtype=torch.int64)
    return data.get_wds_dataset(settings, preprocess, is_train=True, tokenizer=lambda text: tokens).dataloader


def braces(shards: list[Path]) -> str:
    return f"{shards[0].parent}/{{{shards[0].stem}..{shards[-1].stem}}}.tar"


def loading(shards: list[Path], arguments: argparse.Namespace) -> dict[str, Callable[[], None]]:
    loaders = {OURS: our_loader(shards, arguments), "open_clip": open_clip_loader(shards, arguments)}
    batches = {name: iter(loader) for name, loader in loaders.items()}
    ours, (image, _) = next(batches[OURS]).image, next(batches["open_clip"])
    if (ours.shape, ours.dtype) != (image.shape, image.dtype):
        raise ValueError(f"open_clip's images are {tuple(image.shape)} {image.dtype}: expected {tuple(ours.shape)}")
    return {name: partial(take, batch, arguments.batches) for name, batch in batches.items()}


def reading(shards: list[Path], arguments: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """Members of shuffled samples as bytes, with nothing decoded."""
    import webdataset

    samples = our_loader(shards, arguments).dataset
    ours = (samples.shards[0][samples.mixture.locate(g)[2]] for g in range(1 << 40))
    pipeline = [
        webdataset.ResampledShards(braces(shards)),
        webdataset.tarfile_to_samples(),
        webdataset.shuffle(SHUFFLED, initial=SHUFFLED),
    ]
    readers = {OURS: ours, "webdataset": iter(webdataset.DataPipeline(*pipeline))}
    return {name: partial(take, reader, arguments.batches * arguments.batch) for name, reader in readers.items()}


def take(items: Iterator, count: int) -> None:
    for _ in range(count):
        next(items)


def results(arguments: argparse.Namespace) -> Iterator[dict]:
    """One for each task and loader. Raises ValueError for an unusable folder, or without the peers."""
    try:
        import open_clip_train.data  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{error}: open_clip's loader needs `pip install open_clip_torch pandas`") from error
    shards = made_shards(arguments.data, arguments.samples)
    count = arguments.batch * arguments.batches
    for task, build in (("load", loading), ("read", reading)):
        with contextlib.redirect_stdout(io.StringIO()):
            passes = build(shards, arguments)
        compared = compare(time_rounds(passes, arguments.rounds, torch.device("cpu"), task))
        for name, times in compared.items():
            yield {"task": task, "loader": name, "samples_per_second": count / times["seconds"], **times}


TITLE = f"{'task':6} {'loader':12} {'samples/s':>10} {'ms':>8} {'ratio (quartiles)':>23}"
DIFFERENCES = """\
load: read, decoded, a random crop of 0.4 to 1 of the area resized (bicubic, anti-aliased), normalised, batched.
  Ours flips half of the images and encodes the captions; open_clip's does neither (its tokenizer is left out).
  Ours resizes with torch, open_clip's with Pillow: 0.02 levels in 255 apart on average. Ours decodes a JPEG at 1/2
  where the crop keeps the size of the result (1 crop in 100 here).
  Ours checks a crc32 and the header's limits, and a sample follows from the seed and its number alone; open_clip's
  draws shards with replacement and samples from a buffer.
read: the members of shuffled samples as bytes, nothing decoded."""


def line(r: dict) -> str:
    """A result under TITLE; ms of a sample."""
    ratio = "{:.3f} ({:.3f}-{:.3f})".format(r["ratio"], *r["ratio_quartiles"])
    rate = r["samples_per_second"]
    return f"{r['task']:6} {r['loader']:12} {rate:10.0f} {1e3 / rate:8.3f} {ratio:>23}"


def footer(found: list[dict]) -> str:
    return DIFFERENCES
