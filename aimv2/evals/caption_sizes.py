"""Caption accuracy in the shapes world of a trained AIMv2, at any number of patches an image, by the image's aspect.

n images, N patches of an image, P patch side, T text positions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from aimv2.config import to_json
from aimv2.data.loader import DataConfig, validation_loader
from aimv2.data.mixture import Source
from aimv2.data.shapes import parse_caption
from aimv2.data.shards import Shards, expand_shards
from aimv2.data.tokenizer import open_tokenizer
from aimv2.data.transforms import TransformConfig
from aimv2.evals.datasets import Dataset
from aimv2.evals.encoders.interface import describe_module, weights_digest
from aimv2.evals.encoders.opening import as_one_line, short_name
from aimv2.evals.harness import at_rest
from aimv2.evals.results import Metric, Outcome, share
from aimv2.evals.session import Session
from aimv2.evals.shapes_captions import COUNTED, Truth, caption_ids, count_right, read_truth, score_with_errors
from aimv2.exports import TOKENIZER
from aimv2.init_from import open_objective
from aimv2.objectives.aimv2 import AIMv2
from aimv2.pretrained import load_configs, open_checkpoint

KEPT = "@native"  # behind a model's path

# Width over height: thirds of the aspects from 1/2 to 2 on a logarithmic scale, as those of the mixed world are drawn.
ASPECTS = {
    "tall": (0.0, 2 ** (-1 / 3)),
    "squarish": (2 ** (-1 / 3), 2 ** (1 / 3)),
    "wide": (2 ** (1 / 3), math.inf),
}


class Captioner:
    """An export that writes captions, and how its images are prepared at any number of patches.

    A native model gets whole images in their own aspect ratio, any other one whole images squashed into squares, with
    its positions interpolated once.

    Args:
        spec: folder of an export; with "@native" behind it, a model of squares is treated as a native one.

    Raises:
        ValueError: nothing there, or nothing that writes captions.
    """

    def __init__(self, spec: str, device: torch.device | str = "cpu"):
        self.spec, self.device = spec, torch.device(device)
        self.source = spec.removesuffix(KEPT)
        self.name = short_name("aimv2", self.source, KEPT[1:] if spec.endswith(KEPT) else None, trained=True)
        with as_one_line(spec):
            model = open_objective(self.source)
            self.vision, self.processing = load_configs(self.source)
            self.tokenizer, digest = _tokenizer_of(self.source)
        self.native = self.processing.resize == "native"
        self.keeps_aspect = self.native or spec.endswith(KEPT)
        self._description = {
            "spec": spec,
            "name": self.name,
            "source": "aimv2",
            "trained": True,
            "weights": weights_digest(model),
            "tokenizer": digest,
            "keeps_aspect": self.keeps_aspect,
            **describe_module(model, to_json(model.config), self.processing),
        }

    def describe(self) -> dict:
        """All that tells one model from another, ready for JSON."""
        return self._description

    def patches(self, image_size: int) -> int:
        """N of a square image. Raises ValueError for a size that the patches don't divide."""
        if image_size < 1 or image_size % self.vision.patch_size:
            raise ValueError(f"image size {image_size}: {self.spec} has patches of {self.vision.patch_size} pixels")
        return (image_size // self.vision.patch_size) ** 2

    def at(self, patches: int) -> AIMv2:
        """The model for images of so many patches. Raises ValueError where it takes squares, and this is no square."""
        if self.keeps_aspect:
            size = None if self.vision.positions == "sincos" else "native"
        else:
            size = self.image_size(patches)
        return open_objective(self.source, size).to(self.device, torch.float32)

    def image_size(self, patches: int) -> int:
        side = math.isqrt(max(patches, 0))
        if side < 2 or side**2 != patches:
            raise ValueError(
                f"{patches} patches: {self.spec} takes square images, expected a square number from 4 on; with "
                f"{KEPT} behind its path it takes images of any shape"
            )
        return side * self.vision.patch_size

    def data(self, shards: str, patches: int, workers: int) -> DataConfig:
        """Validation of whole images, as this model expects them."""
        transform = TransformConfig(
            image_size=self.vision.image_size if self.keeps_aspect else self.image_size(patches),
            crop_scale=None,
            flip=0.0,
            mean=self.processing.mean,
            std=self.processing.std,
            min_size=1,
        )
        source = Source(name="shapes", shards=shards)
        return DataConfig(
            train=[source], validation=source, tokenizer=self.tokenizer, transform=transform, workers=workers
        )


def _tokenizer_of(source: str) -> tuple[str, str]:
    """What `open_tokenizer` takes, and its digest."""
    checkpoint = open_checkpoint(source)
    entry = checkpoint.config.get("tokenizer")
    if not entry:
        raise ValueError(f"{source} has no tokenizer, in which its captions could be read")
    return entry.get("name") or str(checkpoint.path.parent / TOKENIZER), entry["sha256"]


@dataclass(slots=True, kw_only=True)
class CaptionSizes:
    """Greedy captions at `patches` an image, at most so many where aspect ratios are kept.

    exact_set is also given for each of ASPECTS, where images are of several. Images that can't be read are wrong.
    """

    name: ClassVar[str] = "captions"
    trains: ClassVar[bool] = False
    patches: int | None = None  # None: of the model's own image size
    samples: int | None = None  # the first of the split; None: all

    def __post_init__(self):
        for name, least in (("patches", 2), ("samples", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} {value}: expected {least} or more")

    def run(self, captioner: Captioner, data: Dataset, session: Session) -> Outcome:
        """`data` is `shapes:FOLDER`, all of it."""
        patches = self.patches or captioner.vision.num_patches
        shards = f"{data.spec.removeprefix('shapes:')}/validation-*.tar"
        images = min(self.samples or len(data.test), len(data.test))
        captions, lengths = _write(captioner, patches, shards, images, session)
        records = Shards(expand_shards(shards), ("json",))
        truths = [read_truth(records[row].json) for row in range(images)]
        stated = [parse_caption(caption, truth.difficulty) for caption, truth in zip(captions, truths, strict=True)]
        counts = torch.stack([count_right(said, truth.objects) for said, truth in zip(stated, truths, strict=True)])
        right = counts[:, COUNTED.index("exact")] > 0
        keys = (data.test.keys[row] for row in range(images))
        rows = zip(keys, truths, captions, right.tolist(), strict=True)
        return Outcome(
            metrics=score_with_errors(counts) | _by_aspect(right.numpy(), truths),
            samples=[
                {"sample": key, "aspect": round(truth.aspect, 4), "prediction": caption, "correct": correct}
                for key, truth, caption, correct in rows
            ],
            details={
                "patches": patches,
                "mean_patches": lengths.double().mean().item(),
                "trained_patches": None if captioner.native else captioner.vision.num_patches,
            },
        )


def _write(
    captioner: Captioner, patches: int, shards: str, images: int, session: Session
) -> tuple[list[str], torch.Tensor]:
    """Captions of the images, "" where one can't be read, and how many patches each has; equal on all ranks."""
    model = captioner.at(patches)
    context = model.config.decoder.context_length
    data = captioner.data(shards, patches, session.workers)
    loader = validation_loader(
        data,
        patch_size=captioner.vision.patch_size,
        micro_batch=session.batch_size,
        seed=0,
        rank=session.rank,
        world_size=session.world_size,
        limit=images,
        area=patches if captioner.keeps_aspect else None,
    )
    tokenizer = open_tokenizer(data.tokenizer)
    tokens = torch.zeros(images, context, dtype=torch.int64)  # (n, T), ids + 1, so that ranks add up
    lengths = torch.zeros(images, dtype=torch.int64)
    mine = len(range(session.rank, images, session.world_size))
    with at_rest(model), session.progress(mine, "img", f"{captioner.name} at {patches} patches") as bar:
        for batch in loader:
            written = caption_ids(model, batch.to(session.device), tokenizer.eos_id, context)
            unread = {replaced.sample for replaced in batch.replaced}
            for row, ids, length in zip(batch.sample.tolist(), written, batch.patch_counts().tolist(), strict=True):
                if row not in unread:
                    tokens[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64) + 1
                lengths[row] = length  # of an image that can't be read: of the one in its place
            bar.update(len(batch))
    rows = session.sum(tokens).tolist()
    return [tokenizer.decode([token - 1 for token in row if token]) for row in rows], session.sum(lengths)


def _by_aspect(right: np.ndarray, truths: Sequence[Truth]) -> dict[str, Metric]:
    """exact_set of each of ASPECTS, if there are several."""
    aspects = np.array([truth.aspect for truth in truths])
    groups = {name: (low <= aspects) & (aspects < high) for name, (low, high) in ASPECTS.items()}
    groups = {name: inside for name, inside in groups.items() if inside.any()}
    return {f"exact_set_{name}": share(right[inside]) for name, inside in groups.items()} if len(groups) > 1 else {}
