"""Do greedy captions of the shapes world name the objects that are in the image?

The truth is the `json` member of each sample, not its caption. Chance, for a captioner that knows the grammar and not
the image, is 1/6 for shape and colour and 1/2 for size once the place is right, and below 1 % for the exact set.

B images, N patches.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import nn

from aimv2.data.batch import Batch
from aimv2.data.loader import DataConfig, validation_loader
from aimv2.data.remote import RemoteFiles
from aimv2.data.shapes import parse_caption
from aimv2.data.shards import Shards, expand_shards
from aimv2.data.tokenizer import open_tokenizer
from aimv2.encoder import VisionConfig
from aimv2.evals.harness import at_rest
from aimv2.evals.results import Metric
from aimv2.ranks import sum_over_ranks

ATTRIBUTES = ("shape", "colour", "size", "place")  # as `parse_caption` orders them
Objects = frozenset[tuple[str, str, str, str]]


class Truth(NamedTuple):
    """What is to be seen in an image."""

    objects: Objects
    difficulty: str
    aspect: float  # width / height


@dataclass(slots=True, kw_only=True)
class ShapesCaptions:
    """Greedy captions, parsed and held against the scene. Attention in the encoder is bidirectional over all patches,
    as downstream; training has seen it over every proper prefix.
    """

    name: ClassVar[str] = "captions"
    every: int = 0  # steps; 0: at the end only
    samples: int = 512  # at most, over all ranks
    batch_size: int = 128  # images per rank and pass
    area: int | None = None  # patches an image, whose aspect ratio is kept; None: as the data are validated

    def check(self, vision: VisionConfig) -> None:
        """Raises ValueError for an area that is none, or that the encoder's positions don't serve."""
        if self.area is not None and (self.area < 2 or vision.positions == "learned"):
            raise ValueError(
                f"{self.name}: area {self.area} with positions {vision.positions!r}: expected 2 or more, and "
                "positions 'interpolated' or 'sincos', which serve any grid"
            )

    def build(
        self, data: DataConfig, *, patch_size: int, seed: int, rank: int, world_size: int, device: torch.device
    ) -> Callable[[nn.Module], dict[str, float]]:
        """The eval, model with `encoder` and `decoder` -> the numbers of `score`, equal on all ranks."""
        loader = validation_loader(
            data,
            patch_size=patch_size,
            micro_batch=self.batch_size,
            seed=seed,
            rank=rank,
            world_size=world_size,
            limit=self.samples,
            area=self.area,
        )
        tokenizer = open_tokenizer(data.tokenizer)
        remote = RemoteFiles(data.remote) if data.remote else None
        records = Shards(expand_shards(data.validation.shards, remote), ("json",), remote)

        def evaluate(model: nn.Module) -> dict[str, float]:
            counts = torch.zeros(len(COUNTED), dtype=torch.float64)
            with at_rest(model):
                for batch in loader:
                    captions = caption_ids(model, batch.to(device), tokenizer.eos_id, data.context_length)
                    for number, ids in zip(batch.sample.tolist(), captions, strict=True):
                        truth = read_truth(records[number].json)
                        counts += count_right(parse_caption(tokenizer.decode(ids), truth.difficulty), truth.objects)
            return score(sum_over_ranks(counts.to(device)).tolist())

        return evaluate


def caption_ids(model: nn.Module, batch: Batch, eos_id: int, max_tokens: int) -> list[list[int]]:
    """Greedy captions of the images of a batch that lies where the model does, which sees no padding."""
    features = model.encoder(batch.image, grid=batch.grid)
    return model.decoder.generate(features, real=batch.real_patches(), eos_id=eos_id, max_tokens=max_tokens)


def read_truth(record: bytes | None) -> Truth:
    """From the `json` of a shapes sample; ValueError if it is none."""
    try:
        scene = json.loads(record or b"{}")
        objects = frozenset(tuple(o[a] for a in ATTRIBUTES) for o in scene["objects"])
        size = scene["image_size"]
        return Truth(objects, scene["difficulty"], size[0] / size[1] if isinstance(size, list) else 1.0)
    except (KeyError, TypeError) as error:
        raise ValueError(f"not the json of a shapes sample, without {error}: {record!r:.80}") from error


COUNTED = ("images", "parsed", "exact", "objects", "claims", "shape", "colour", "size", "place")


def count_right(stated: Objects | None, truth: Objects) -> torch.Tensor:
    """(9,) float64, one number for each of COUNTED, from what a caption states (None: it doesn't parse) of one image.

    True and stated objects are matched by place, which no two share. A true object that is not matched is wrong in
    every attribute. `claims` = max(stated, true), so that naming places at random does not pay.
    """
    stated_at = {thing[-1]: thing for thing in stated or ()}
    matches = [(thing, stated_at[thing[-1]]) for thing in truth if thing[-1] in stated_at]
    right = [sum(true[i] == said[i] for true, said in matches) for i in range(len(ATTRIBUTES))]
    claims = max(len(stated or ()), len(truth))
    return torch.tensor([1, stated is not None, stated == truth, len(truth), claims, *right], dtype=torch.float64)


SCORES = {  # what of COUNTED is right, and of how many
    "exact_set": ("exact", "images"),
    "object_colour": ("colour", "objects"),
    "object_place": ("place", "claims"),
    "object_shape": ("shape", "objects"),
    "object_size": ("size", "objects"),
    "parsed": ("parsed", "images"),
}


def score(counts: Sequence[float]) -> dict[str, float]:
    """Shares from sums of COUNTED over images.

    exact_set: images whose stated set of objects is the true one, in shape, colour, size and place; parsed: captions
    that are sentences of the grammar; object_place: matched objects of `claims`; object_colour, _shape, _size: true
    objects that are matched and right in it.
    """
    n = dict(zip(COUNTED, counts, strict=True))
    return {name: n[right] / max(n[of], 1.0) for name, (right, of) in SCORES.items()}


def score_with_errors(counts: torch.Tensor) -> dict[str, Metric]:
    """`score` of (n, 9) counts, a row an image and at least one, with standard errors.

    Images are independent, objects of one image are not: the error of a ratio of sums is that of its residuals a - r b
    over images, which for a share of images is the binomial one.
    """
    columns = dict(zip(COUNTED, counts.T, strict=True))
    metrics = {}
    for name, (right, of) in SCORES.items():
        value = (columns[right].sum() / columns[of].sum()).item()
        residuals = columns[right] - value * columns[of]
        error = residuals.square().sum().sqrt() / columns[of].sum()
        metrics[name] = Metric(value, error.item(), len(counts))
    return metrics
