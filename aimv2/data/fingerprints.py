"""What decided the samples so far. A resumed run must have the same, or it would repeat some and never see others."""

import hashlib

import numpy as np

from aimv2.data.loader import DataConfig
from aimv2.data.mixture import Mixture, Source, weights_over_time
from aimv2.data.native import NativeConfig, NativeOrder, area_grid
from aimv2.data.remote import RemoteFiles
from aimv2.data.shards import Shards, expand_shards
from aimv2.data.tokenizer import Tokenizer


class DataFingerprints:
    """Of all that decides the training samples but the seed.

    Args:
        budget: patches of a micro-batch at native resolution, as of `native.patch_budget`; not used at a fixed one.

    Raises:
        ShardError: a shard or its index is missing, or they disagree.
        ValueError: the config is native, and the budget is not given.
    """

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, *, budget: int | None = None):
        if config.native is not None and budget is None:
            raise ValueError("data.native is set and the budget is None: expected the patches of a micro-batch")
        remote = RemoteFiles(config.remote) if config.remote else None
        self._names = [source.name for source in config.train]
        self._sources = [_digest_of(i, source, remote) for i, source in enumerate(config.train)]
        self._tokenizer = tokenizer.fingerprint
        self._versions = weights_over_time(config.train, config.changes)
        self._transform = repr((config.transform, config.context_length))
        self._native = {} if config.native is None else {"data.native": _native(config.native, budget)}

    def before(self, g: int) -> dict[str, str]:
        """Of samples 0 to g - 1: later changes of the mixture, and sources not used before them, are not in it."""
        versions = [(start, weights) for start, weights in self._versions if start < max(g, 1)]
        used = [i for i in range(len(self._names)) if any(weights[i] for _, weights in versions)]
        mixture = "; ".join(
            f"from {start}: " + ", ".join(f"{self._names[i]} {weights[i]:.12g}" for i in used)
            for start, weights in versions
        )
        return {
            "data.mixture": mixture,
            "data.order": _order(),
            "data.transform": hashlib.sha256(self._transform.encode()).hexdigest(),
            "tokenizer": self._tokenizer,
            **self._native,
            **{f"data.train {self._names[i]}": self._sources[i] for i in used},
        }


def _order() -> str:
    """Another version of this library or of numpy may shuffle or draw otherwise."""
    mixture = Mixture([10**6, 999], [2, 1], seed=0)
    places = [mixture.locate(g) for g in (0, 1, 12_345, 10**9)]
    rng = np.random.Generator(np.random.Philox(key=1, counter=2))
    drawn = rng.integers(1000, size=4).tolist(), rng.random(4).tolist(), rng.uniform(0.4, 1.0, 4).tolist()
    return hashlib.sha256(repr((places, drawn)).encode()).hexdigest()


def _native(config: NativeConfig, budget: int) -> str:
    """In words, and what areas and grids this version draws and chooses."""
    place = {"start": 0, "first_batch": 0, "rank": 0, "world_size": 1}
    order = NativeOrder(config=config, budget=budget, seed=0, **place)
    areas = [order.area(m) for m in (0, 1, 12_345, 10**9)]
    grids = [area_grid(*size, area) for area in areas for size in ((480, 640), (333, 333), (1000, 100))]
    drawn = hashlib.sha256(repr((areas, grids)).encode()).hexdigest()
    words = f"{config.min_patches} to {config.max_patches} patches an image, {budget} a micro-batch"
    shared = f", {config.shared_by} of one area" if config.shared_by > 1 else ""
    return f"{words}{shared}; {drawn[:16]}"


def _digest_of(position: int, source: Source, remote: RemoteFiles | None) -> str:
    """The position counts: each source is shuffled by it."""
    shards = Shards(expand_shards(source.shards, remote), remote=remote)
    described = (position, source.caption_shares, len(shards), shards.digests)
    return hashlib.sha256(repr(described).encode()).hexdigest()
