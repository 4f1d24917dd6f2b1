"""Training from a server is training from the disk."""

import io
from itertools import islice

import numpy as np
import pytest
import torch
import webdataset
from http_server import Server
from PIL import Image

from aimv2.data.fingerprints import DataFingerprints
from aimv2.data.loader import DataConfig, train_loader
from aimv2.data.mixture import Source
from aimv2.data.native import NativeConfig
from aimv2.data.remote import RemoteConfig
from aimv2.data.shard_index import select_rows
from aimv2.data.shard_list import expand_shards, write_shard_list
from aimv2.data.shards import ensure_indices
from aimv2.data.tar import ShardError
from aimv2.data.tokenizer import Tokenizer, train_tokenizer
from aimv2.data.transforms import TransformConfig


@pytest.fixture
def config(tmp_path, monkeypatch) -> DataConfig:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    rng = np.random.default_rng(0)
    with webdataset.ShardWriter(f"{tmp_path}/%d.tar", maxcount=10, verbose=0) as writer:
        for i in range(30):
            jpeg = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).save(jpeg, "JPEG")
            writer.write({"__key__": f"{i}", "jpg": jpeg.getvalue(), "txt": f"caption {i}", "json": b"{}"})
    ensure_indices(expand_shards(f"{tmp_path}/*.tar"))
    select_rows(tmp_path / "1.tar", np.arange(0, 10, 2))
    write_shard_list(tmp_path, ["0.tar", "1.tar", "2.tar"])
    train_tokenizer([f"caption {i}" for i in range(100)], tmp_path / "tokenizer", 32, source="this", licence="none")
    return DataConfig(
        train=[Source(name="a", shards=f"{tmp_path}/shards.list")],
        tokenizer=f"{tmp_path}/tokenizer",
        transform=TransformConfig(image_size=32),
        workers=0,
    )


@pytest.fixture
def server(config, tmp_path):
    server = Server({path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()})
    yield server
    server.shutdown()
    server.server_close()


def far(config: DataConfig, server: Server, cache, shards: str, workers: int = 0) -> DataConfig:
    source = Source(name="a", shards=f"{server.url}plain/{shards}")
    remote = RemoteConfig(allow=[f"{server.url}plain/"], cache=str(cache), cache_gib=0.01, block_mib=1 / 16)
    return DataConfig(
        train=[source], tokenizer=config.tokenizer, transform=config.transform, remote=remote, workers=workers
    )


def batches(config: DataConfig) -> list[tuple]:
    loader = train_loader(config, patch_size=8, micro_batch=4, start=0, seed=0, rank=0, world_size=1)
    found = iter(loader)
    taken = [(batch.image, batch.text, batch.sample) for batch in islice(found, 8)]
    found.close()
    return taken


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shards", ["shards.list", "{0..2}.tar"])
def test_the_same_samples(config, server, tmp_path, shards, workers):
    remote = far(config, server, tmp_path / "cache", shards, workers)
    for here, there in zip(batches(config), batches(remote), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))
    tokenizer = Tokenizer(config.tokenizer)
    assert DataFingerprints(remote, tokenizer).before(9) == DataFingerprints(config, tokenizer).before(9)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_strips(config, server, tmp_path, workers):
    config.transform = TransformConfig(image_size=32, crop_scale=None)
    config.native = NativeConfig(min_patches=6, max_patches=40)
    remote = far(config, server, tmp_path / "cache", "shards.list", workers)
    remote.native = config.native
    here, there = batches(config), batches(remote)
    assert len({image.shape for image, *_ in here}) > 3
    for a, b in zip(here, there, strict=True):
        assert all(map(torch.equal, a, b))


def test_a_list_is_all_that_is_read_at_the_start(config, server, tmp_path):
    expanded = far(config, server, tmp_path / "cache", "shards.list")
    train_loader(expanded, patch_size=8, micro_batch=4, start=0, seed=0, rank=0, world_size=1)
    assert {path for _, path, _ in server.seen} == {"/plain/shards.list"}


def test_what_cannot_be_read_from_a_server(config, server, tmp_path):
    for shards, message in (
        ("*.tar", "a server can't be asked for a glob"),
        ("{0..3}.tar", r"3\.tar.*404"),
        ("../shards.list", "may not be read"),
        ("none.list", "404"),
    ):
        with pytest.raises(ShardError, match=message):
            batches(far(config, server, tmp_path / "cache", shards))
    config.train[0].shards = f"{server.url}plain/shards.list"
    with pytest.raises(ShardError, match=r"not a local path; what may be read from elsewhere is said by data\.remote"):
        batches(config)


def test_a_shard_that_is_another_than_its_index(config, server, tmp_path):
    server.files["2.tar"] += bytes(512)
    with pytest.raises(ShardError, match=r"2\.tar: its index is stale: made for \d+ bytes, found \d+"):
        batches(far(config, server, tmp_path / "cache", "shards.list"))
