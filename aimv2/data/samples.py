"""One sample: read, decoded, transformed, its caption encoded, and many of them put into a batch.

g is the global sample number, S the side of an image, P of a patch, N its patches; at native resolution an image has
n = r x c patches, at most its area A, and N are those of the longest.
"""

import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from aimv2.data.batch import Batch, Replaced
from aimv2.data.images import BadImage
from aimv2.data.mixture import Mixture, MixtureChange, Source, weights_over_time
from aimv2.data.native import SizedSample
from aimv2.data.remote import RemoteConfig, RemoteFiles
from aimv2.data.shards import IMAGE_EXTENSIONS, DamagedMember, Sample, ShardError, Shards, expand_shards
from aimv2.data.tokenizer import Tokenizer, clean_caption
from aimv2.data.transforms import (
    TransformConfig,
    native_training_image,
    native_validation_image,
    normalize_batch,
    training_image,
    validation_image,
)
from aimv2.patches import to_strip

MOST_ATTEMPTS = 8  # at replacing one sample


class BadCaption(ValueError):
    """A caption that is not where the source says. The message is a reason of a few words."""


class Example(NamedTuple):
    """One sample, before it is put into a batch."""

    sample: int  # g
    image: Tensor  # (3, S, S) uint8; native: a strip, (3, P, n P)
    grid: tuple[int, int] | None  # r, c of a strip
    text: list[int]
    prefix_length: int
    replaced: list[Replaced]


class Samples(Dataset):
    """Global sample number, and an area for native resolution -> Example, a pure function of these and the seed.

    Args:
        sources: mixed by weight and shuffled for training; a single one, in its own order, otherwise.
        training: random crop, flip and caption; else the whole image or its centre, and the first caption. The two
            never share random numbers.
        changes: of the mixture, in training.
        remote: what may be read from elsewhere.

    Raises:
        ShardError: a shard or its index is missing, or they disagree.
        ValueError: the image size is not a multiple of the patch size.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        transform: TransformConfig,
        tokenizer: Tokenizer,
        *,
        context_length: int,
        pad_text_to_context: bool,
        patch_size: int,
        seed: int,
        training: bool,
        changes: Sequence[MixtureChange] = (),
        remote: RemoteConfig | None = None,
    ):
        if transform.image_size % patch_size:
            raise ValueError(
                f"transform.image_size {transform.image_size} is not a multiple of the patch size {patch_size}"
            )
        self.num_patches = (transform.image_size // patch_size) ** 2
        if self.num_patches < 2:
            raise ValueError(
                f"transform.image_size {transform.image_size} makes a single patch of size {patch_size}: expected more"
            )
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed {seed}: expected 0 <= seed < 2^64")
        self.sources, self.transform, self.tokenizer = list(sources), transform, tokenizer
        self.context_length, self.pad_text_to_context = context_length, pad_text_to_context
        self.patch_size, self.seed, self.training = patch_size, seed, training
        self._remote = RemoteFiles(remote) if remote else None
        self.shards = [Shards(expand_shards(s.shards, self._remote), _extensions(s), self._remote) for s in sources]
        (_, weights), *changed = weights_over_time(sources, changes)
        self.mixture = Mixture([len(s) for s in self.shards], weights, seed, changed)

    def __getitems__(self, wanted: Sequence[int | SizedSample]) -> list[Example]:
        """Those of a batch, by the name that the data loader knows: what is far away is fetched all at once."""
        if self._remote is not None:
            numbers = (w.sample if isinstance(w, SizedSample) else w for w in wanted)
            places = [(self.shards[source], number) for source, number in map(self._locate, numbers)]
            self._remote.prefetch_copies({index for shards, n in places if (index := shards.unopened(n))})
            self._remote.prefetch(part for shards, n in places for part in shards.places(n))
        return [self[w] for w in wanted]

    def __getitem__(self, wanted: int | SizedSample) -> Example:
        """A sample that cannot be used is replaced by others of its source, drawn from (seed, g, attempt).

        Raises:
            ShardError: the replacements cannot be used either.
        """
        g, area = wanted if isinstance(wanted, SizedSample) else (wanted, None)
        rng = self._generator(g, 0)
        # A native image's n is known when its header is read, maybe that of a replacement; the draw is (seed, g)'s.
        prefix = int(rng.integers(1, self.num_patches)) if area is None else rng.random()
        source, number = self._locate(g)
        shards, replaced = self.shards[source], []
        for attempt in range(1, MOST_ATTEMPTS + 2):
            try:
                image, text = self._read(source, number, area, rng)
                if area is None:
                    return Example(g, image, None, text, prefix, replaced)
                grid = image.shape[1] // self.patch_size, image.shape[2] // self.patch_size
                prefix_length = 1 + int(prefix * (grid[0] * grid[1] - 1))
                return Example(g, to_strip(image, self.patch_size), grid, text, prefix_length, replaced)
            except (BadImage, BadCaption, DamagedMember) as error:
                replaced.append(Replaced(g, str(error), shards.describe(number)))
            rng = self._generator(g, attempt)
            number = int(rng.integers(len(shards)))
        tried = "; ".join(f"{r.where}: {r.reason}" for r in replaced)
        raise ShardError(f"{self.sources[source].shards}: no usable sample in {len(replaced)} tries: {tried}")

    def collate(self, examples: list[Example]) -> Batch:
        """Captions are padded on the right, to the longest one or to the context length; strips to the longest one."""
        lengths = [len(e.text) for e in examples]
        grids = [e.grid for e in examples if e.grid]
        longest = self.context_length if self.pad_text_to_context else max(1, *lengths)
        return Batch(
            image=normalize_batch([e.image for e in examples], self.transform.mean, self.transform.std),
            text=torch.tensor([e.text + [self.tokenizer.pad_id] * (longest - len(e.text)) for e in examples]),
            text_length=torch.tensor(lengths),
            prefix_length=torch.tensor([e.prefix_length for e in examples]),
            sample=torch.tensor([e.sample for e in examples]),
            num_patches=max(r * c for r, c in grids) if grids else self.num_patches,
            grid=torch.tensor(grids) if grids else None,
            replaced=[r for e in examples for r in e.replaced],
        )

    def _locate(self, g: int) -> tuple[int, int]:
        """(source, number in it)."""
        if not self.training:
            return 0, g
        source, _, number = self.mixture.locate(g)
        return source, number

    def _generator(self, g: int, attempt: int) -> np.random.Generator:
        """Philox with key (seed, g). The counter's high words keep training from validation, and attempts apart."""
        counter = (int(not self.training) << 192) | (attempt << 128)
        return np.random.Generator(np.random.Philox(key=(self.seed << 64) | g, counter=counter))

    def _read(self, source: int, number: int, area: int | None, rng: np.random.Generator) -> tuple[Tensor, list[int]]:
        sample = self.shards[source][number]
        if sample.image is None:
            raise BadImage("no image")
        captions = _find_captions(sample, self.sources[source].caption_shares)
        text = self._encode(captions, source, rng)
        if not text and (usable := _usable(captions)):
            text = self._encode(usable, source, rng)
        return self._picture(sample.image, area, rng), text

    def _picture(self, data: bytes, area: int | None, rng: np.random.Generator) -> Tensor:
        """(3, S, S), or (3, r P, c P) if an area is asked for."""
        if area is not None and self.training:
            return native_training_image(data, self.transform, area, self.patch_size, rng)
        if area is not None:
            return native_validation_image(data, self.transform, area, self.patch_size)
        if self.training:
            return training_image(data, self.transform, rng)
        return validation_image(data, self.transform)

    def _encode(self, captions: dict[str, Sequence[str | bytes]], source: int, rng: np.random.Generator) -> list[int]:
        """In training a caption of a place drawn by its share among these, else the first of the first."""
        if not captions:
            return []
        places = list(captions)
        place = chosen = 0
        if self.training and len(places) > 1:
            ends = np.cumsum([self.sources[source].caption_shares[where] for where in places])
            place = min(int(np.searchsorted(ends, rng.random() * ends[-1], side="right")), len(places) - 1)
        texts = captions[places[place]]
        if self.training:
            chosen = int(rng.integers(len(texts)))
        return self.tokenizer.encode(texts[chosen], self.context_length)


def _extensions(source: Source) -> tuple[str, ...]:
    """The members that the source's samples are made of."""
    return (*IMAGE_EXTENSIONS, *{where.partition(":")[0] for where in source.caption_shares})


def _find_captions(sample: Sample, shares: dict[str, float]) -> dict[str, Sequence[str | bytes]]:
    """{place: its captions}, of the places that the sample has; {} for a source of images only.

    Raises:
        BadCaption: it has none of them.
    """
    found, missing = {}, []
    for where in shares:
        try:
            found[where] = _captions(sample, where)
        except BadCaption as error:
            missing.append(str(error))
    if shares and not found:
        raise BadCaption(", ".join(missing))
    return found


def _usable(captions: dict[str, Sequence[str | bytes]]) -> dict[str, Sequence[str | bytes]]:
    """Those of which something is left after cleaning."""
    cleaned = {where: [text for text in texts if clean_caption(text)] for where, texts in captions.items()}
    return {where: texts for where, texts in cleaned.items() if texts}


def _captions(sample: Sample, where: str) -> Sequence[str | bytes]:
    """At least one."""
    if where == "txt":
        if sample.text is None:
            raise BadCaption("no txt")
        return [sample.text]
    if sample.json is None:
        raise BadCaption("no json")
    key = where.removeprefix("json:")
    try:
        value = json.loads(sample.json)[key]
    except (ValueError, RecursionError):
        raise BadCaption("damaged json") from None
    except (KeyError, TypeError):
        raise BadCaption(f"no {key!r} in json") from None
    captions = [value] if isinstance(value, str) else value
    if not isinstance(captions, list) or not captions or not all(isinstance(c, str) for c in captions):
        raise BadCaption(f"{key!r} in json is not a string or a list of them")
    return captions
