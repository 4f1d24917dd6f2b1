"""Do greedy captions of the shapes world name the objects that are in the image?

The truth is the `json` member of each sample, not its caption. Chance, for a captioner that knows the grammar and not
the image, is 1/6 for shape and colour and 1/2 for size once the place is right, and below 1 % for the exact set.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from aimv2.data.loader import DataConfig, validation_loader
from aimv2.data.remote import RemoteFiles
from aimv2.data.shapes import parse_caption
from aimv2.data.shards import Shards, expand_shards
from aimv2.data.tokenizer import Tokenizer
from aimv2.evals.harness import at_rest
from aimv2.ranks import sum_over_ranks

ATTRIBUTES = ("shape", "colour", "size", "place")  # as `parse_caption` orders them
Objects = frozenset[tuple[str, str, str, str]]


@dataclass(slots=True, kw_only=True)
class ShapesCaptions:
    """Greedy captions, parsed and held against the scene. Attention in the encoder is bidirectional over all patches,
    as downstream; training has seen it over every proper prefix.
    """

    name: ClassVar[str] = "captions"
    every: int = 0  # steps; 0: at the end only
    samples: int = 512  # at most, over all ranks
    batch_size: int = 128  # images per rank and pass

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
        )
        tokenizer = Tokenizer(data.tokenizer)
        remote = RemoteFiles(data.remote) if data.remote else None
        records = Shards(expand_shards(data.validation.shards, remote), ("json",), remote)

        def evaluate(model: nn.Module) -> dict[str, float]:
            counts = torch.zeros(len(COUNTED), dtype=torch.float64)
            with at_rest(model):
                for batch in loader:
                    features = model.encoder(batch.image.to(device))
                    captions = model.decoder.generate(features, eos_id=tokenizer.eos_id, max_tokens=data.context_length)
                    for number, ids in zip(batch.sample.tolist(), captions, strict=True):
                        truth, difficulty = true_objects(records[number].json)
                        counts += count_right(parse_caption(tokenizer.decode(ids), difficulty), truth)
            return score(sum_over_ranks(counts.to(device)).tolist())

        return evaluate


def true_objects(record: bytes | None) -> tuple[Objects, str]:
    """The objects and the difficulty in the `json` of a shapes sample; ValueError if it is none."""
    try:
        scene = json.loads(record or b"{}")
        return frozenset(tuple(o[a] for a in ATTRIBUTES) for o in scene["objects"]), scene["difficulty"]
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


def score(counts: Sequence[float]) -> dict[str, float]:
    """Shares from sums of COUNTED over images.

    exact_set: images whose stated set of objects is the true one, in shape, colour, size and place; parsed: captions
    that are sentences of the grammar; object_place: matched objects of `claims`; object_colour, _shape, _size: true
    objects that are matched and right in it.
    """
    n = dict(zip(COUNTED, counts, strict=True))
    images, objects, claims = (max(n[key], 1.0) for key in ("images", "objects", "claims"))
    return {
        "exact_set": n["exact"] / images,
        "object_colour": n["colour"] / objects,
        "object_place": n["place"] / claims,
        "object_shape": n["shape"] / objects,
        "object_size": n["size"] / objects,
        "parsed": n["parsed"] / images,
    }
