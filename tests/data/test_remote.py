"""What is read through a server and the cache is compared with the bytes the server was given."""

import functools
import logging
import multiprocessing
import os
import pickle
import re
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import fsspec
import numpy as np
import pytest
from http_server import Server
from hypothesis import given, settings
from hypothesis import strategies as st
from moto.server import ThreadedMotoServer
from torch.utils.data import DataLoader, Dataset

from aimv2.config import from_json, to_json
from aimv2.data import block_cache, connections, remote
from aimv2.data.block_cache import PAGE, BlockCache
from aimv2.data.remote import RemoteConfig, RemoteFiles, is_remote
from aimv2.data.tar import ShardError

BLOCK = 1 << 16
LIMIT = 1 << 20
DATA = np.random.default_rng(0).bytes(1_000_003)  # sixteen blocks, the last one short


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(connections, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(connections, "ATTEMPTS", 4)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server({"a.tar": DATA})
    yield server
    server.shutdown()
    server.server_close()


def opened(server: Server, folder: Path, **changes) -> RemoteFiles:
    arguments = {"allow": [server.url], "cache": str(folder / "cache"), "cache_gib": LIMIT / 2**30}
    return RemoteFiles(RemoteConfig(**arguments | {"block_mib": BLOCK / 2**20} | changes))


def total(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


# --- what may be read -----------------------------------------------------------------------------------------------

REFUSED = [
    "pipe:cat /etc/passwd",
    "file:///etc/passwd",
    "memory://a/b.tar",
    "zip://a.tar::http://127.0.0.1/a.zip",
    "simplecache::http://127.0.0.1:1/data/a.tar",
    "python://os.system/a",
    "HTTP://127.0.0.1:1/data/a.tar",
    "http://127.0.0.1:1/data",
    "http://127.0.0.1:1/database/a.tar",
    "http://127.0.0.1:1/data/../a.tar",
    "http://127.0.0.1:1/data/./a.tar",
    "http://127.0.0.1:1/data/%2e%2E/a.tar",
    "http://127.0.0.1:1/data/.%2e/a.tar",
    "http://127.0.0.1:1/data/%252e%252e/a.tar",
    "http://127.0.0.1:1/data/..%2fa.tar",
    "http://127.0.0.1:1/data/..%5ca.tar",
    "http://127.0.0.1:1/data/%zz.tar",
    "http://127.0.0.1:1/data\\..\\a.tar",
    "http://127.0.0.1:1/data/a.tar?x=1",
    "http://127.0.0.1:1/data/a.tar#x",
    "http://127.0.0.1:1/data/a.tar\nHost: x",
    "http://127.0.0.1:1/data/a\x00.tar",
    "http://127.0.0.1:1/data/a\u2024.tar",
    "http://127.0.0.1:1@evil.example/data/a.tar",
    "http://user@127.0.0.1:1/data/a.tar",
    "http://127.0.0.1:1.evil.example/data/a.tar",
    "http://127.0.0.1:11/data/a.tar",
    "https://127.0.0.1:1/data/a.tar",
    "s3://bucket/a.tar",
]


@pytest.mark.parametrize("url", REFUSED)
def test_what_is_not_allowed_never_reaches_fsspec(tmp_path, monkeypatch, url):
    monkeypatch.setattr(fsspec, "filesystem", lambda *args, **kwargs: pytest.fail("fsspec was asked"))
    allow = ["http://127.0.0.1:1/data/", "s3://bucket/coyo/"]
    files = RemoteFiles(RemoteConfig(allow=allow, cache=str(tmp_path)))
    assert is_remote(url)
    for call in (files.check, files.size, files.local_copy, lambda url: files.read(url, 0, 1)):
        with pytest.raises(
            ShardError, match=re.escape("allowed is http://127.0.0.1:1/data/ s3://bucket/coyo/")
        ) as error:
            call(url)
        assert repr(url) in str(error.value)


def test_what_is_allowed(tmp_path):
    allow = ["http://127.0.0.1:1/data/", "s3://bucket/coyo/"]
    check = RemoteFiles(RemoteConfig(allow=allow, cache=str(tmp_path))).check
    for url in ("http://127.0.0.1:1/data/a%20b/0.tar", "s3://bucket/coyo/{00000..00127}.tar", "s3://bucket/coyo/..a"):
        assert is_remote(url)
        check(url)
    assert not is_remote("data/{000..127}.tar") and not is_remote("/data/a:b.tar")


@pytest.mark.parametrize(
    "changes",
    [
        {"allow": []},
        {"allow": ["s3://bucket"]},
        {"allow": ["s3:///"]},
        {"allow": ["https://host/folder"]},
        {"allow": ["https://"]},
        {"allow": ["https:///folder/"]},
        {"allow": ["file:///data/"]},
        {"allow": ["https://user:word@host/"]},
        {"allow": ["https://host/a/../"]},
        {"allow": ["https://host/a/?x=/"]},
        {"cache": ""},
        {"cache_gib": 0.03},
        {"cache_gib": float("nan")},
        {"cache_gib": float("inf")},
        {"block_mib": 0.0},
        {"block_mib": 0.1},
        {"block_mib": 65.0},
        {"options": {"s3": {"secret": "x"}}},
        {"options": {"http": {"client_kwargs": "x"}}},
        {"options": {"file": {}}},
    ],
)
def test_configs_that_cannot_be(changes):
    (key,) = changes
    with pytest.raises(ValueError, match=key) as error:
        RemoteConfig(**{"allow": ["s3://bucket/"], "cache": "cache"} | changes)
    assert "expected" in str(error.value) and "\n" not in str(error.value)
    if key == "options":
        assert "'x'" not in str(error.value)


def test_a_package_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ValueError, match="gs:// of the allow-list needs a package: "):
        RemoteFiles(RemoteConfig(allow=["gs://bucket/"], cache=str(tmp_path)))


def test_a_config_survives_json():
    config = RemoteConfig(allow=["s3://b/"], cache="c", options={"s3": {"endpoint_url": "https://x", "anon": True}})
    assert from_json(RemoteConfig, to_json(config)) == config


# --- what is read ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Iterator[tuple[RemoteFiles, str]]:
    server = Server({"a.tar": DATA})
    yield opened(server, tmp_path_factory.mktemp("shared")), server.url + "plain/a.tar"
    server.shutdown()
    server.server_close()


@settings(max_examples=200, deadline=None)
@given(
    begin=st.one_of(st.integers(0, len(DATA)), st.sampled_from([0, BLOCK - 1, BLOCK, len(DATA) - 1, len(DATA)])),
    size=st.one_of(st.integers(0, 3 * BLOCK), st.sampled_from([0, 1, PAGE, BLOCK, len(DATA)])),
)
def test_any_range_is_the_bytes_of_the_file(shared, begin, size):
    files, url = shared
    if begin + size <= len(DATA):
        assert files.read(url, begin, size) == DATA[begin : begin + size]
    else:
        with pytest.raises(ShardError, match=rf"{url}: byte {begin}: no {size} bytes here: the file has {len(DATA)}"):
            files.read(url, begin, size)


def test_blocks_larger_than_a_page(server, tmp_path):
    files = opened(server, tmp_path, block_mib=3 / 16, cache_gib=4 / 1024)
    url = server.url + "plain/a.tar"
    for begin, size in [(0, len(DATA)), (PAGE - 1, 2), (3 * PAGE - 1, 2), (len(DATA) - 1, 1), (70_000, 130_000)]:
        assert files.read(url, begin, size) == DATA[begin : begin + size]
    assert server.gets() == 6  # ceil(1,000,003 / 196,608): nothing is fetched twice


def test_what_was_prefetched_is_there_and_was_fetched_together(server, tmp_path):
    files, url = opened(server, tmp_path, cache_gib=4 / 1024), server.url + "plain/a.tar"
    server.latency = 0.2
    begin = time.monotonic()
    files.prefetch((url, begin, 10) for begin in range(0, len(DATA), BLOCK // 2))
    assert time.monotonic() - begin < 2  # one after the other they would take 3.4 s
    assert server.gets() == 16
    assert files.read(url, 0, len(DATA)) == DATA
    assert server.gets() == 16
    with pytest.raises(ShardError, match="no 10 bytes here"):
        files.prefetch([(url, 0, 10), (url, len(DATA), 10)])


def test_copies_sizes_and_empty_files(server, tmp_path):
    server.files |= {"empty.idx": b"", "a.idx": DATA[:200_001]}
    files = opened(server, tmp_path)
    assert files.size(server.url + "plain/a.idx") == 200_001
    assert files.local_copy(server.url + "plain/a.idx").read_bytes() == DATA[:200_001]
    assert files.local_copy(server.url + "plain/empty.idx").read_bytes() == b""
    assert files.read(server.url + "plain/empty.idx", 0, 0) == b""
    requests = server.seen.total()
    again = pickle.loads(pickle.dumps(files))
    assert again.local_copy(server.url + "plain/a.idx").read_bytes() == DATA[:200_001]
    assert server.seen.total() == requests  # neither size nor contents are asked for by another process


def test_a_small_file_of_a_server_without_ranges(server, tmp_path):
    """A 200 that is all that was asked for will do."""
    server.files["a.idx"] = DATA[:1000]
    assert opened(server, tmp_path).local_copy(server.url + "no-range/a.idx").read_bytes() == DATA[:1000]


# --- faults of servers ----------------------------------------------------------------------------------------------


def failure(server: Server, folder: Path, mode: str) -> str:
    url = f"{server.url}{mode}/a.tar"
    begin = time.monotonic()
    with pytest.raises(ShardError) as error:
        opened(server, folder).read(url, BLOCK + 5, 100)
    assert time.monotonic() - begin < 10
    assert not [path for path in (folder / "cache").glob("*") if path.name.endswith(("-1", ".tmp"))]
    assert str(error.value).startswith(url) and "\n" not in str(error.value)
    return str(error.value).removeprefix(url)


@pytest.mark.parametrize(
    ("mode", "tries", "reason"),
    [
        ("no-range", 1, f": byte {BLOCK}: the server ignores Range: it would send the whole file"),
        ("gzip", 1, f": byte {BLOCK}: the server sends it as gzip"),
        (
            "short-range",
            4,
            f": byte {BLOCK}: .*the server sends 'bytes 65536-131061/1000003' when asked for .*65536-131071",
        ),
        ("short", 4, f": byte {BLOCK}: .*65526 bytes"),
        ("cut", 4, f": byte {BLOCK}: .*65526 of 65536 bytes"),
    ],
)
def test_other_bytes_than_were_asked_for(server, tmp_path, mode, tries, reason):
    message = failure(server, tmp_path, mode)
    assert re.match(reason, message), message
    assert server.gets() == tries
    assert message.endswith(f"(tried {tries} times)") == (tries > 1)


@pytest.mark.parametrize(("status", "tries"), [(404, 1), (403, 1), (401, 1), (410, 1), (429, 4), (503, 4)])
def test_errors_of_a_server(server, tmp_path, status, tries):
    assert re.match(rf": (HTTP {status} |not found)", failure(server, tmp_path, str(status)))
    assert server.gets() == tries


def test_two_errors_and_then_an_answer(server, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        assert opened(server, tmp_path).read(server.url + "flaky/a.tar", 5, 100) == DATA[5:105]
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and all("HTTP 500 Internal Server Error; try" in line for line in said)
    assert server.gets() == 3


@pytest.mark.parametrize("mode", ["slow", "drip"])
def test_a_server_that_does_not_come_to_an_end(server, tmp_path, monkeypatch, mode):
    monkeypatch.setattr(connections, "TIMEOUT", 0.4)
    assert failure(server, tmp_path, mode) == f": byte {BLOCK}: no answer within 0.4 s (tried 4 times)"


def test_nobody_answers(server, tmp_path):
    server.shutdown()
    server.server_close()
    assert re.match(r": ConnectionRefusedError: .*tried 4 times", failure(server, tmp_path, "plain"))


def test_a_file_that_changes_its_size(server, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "MAX_AGE", 0.0)
    files, url = opened(server, tmp_path), server.url + "plain/a.tar"
    files.read(url, 0, 10)
    server.files["a.tar"] = DATA + b"more"
    with pytest.raises(ShardError, match="has 1000007 bytes, and had 1000003 before: it changed while in use"):
        files.read(url, 0, 10)


def test_a_file_that_changes_its_contents(server, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(remote, "MAX_AGE", 0.0)
    files, url = opened(server, tmp_path), server.url + "plain/a.tar"
    files.read(url, 0, 10)
    server.files["a.tar"] = DATA[::-1]
    assert files.read(url, 0, 10) == DATA[::-1][:10]
    assert "changed while in use" in caplog.text


# --- redirects ------------------------------------------------------------------------------------------------------


def test_redirects_are_followed_within_the_allow_list(server, tmp_path):
    server.location = server.url + "plain/a.tar?signature=secret"
    assert opened(server, tmp_path).read(server.url + "redirect/a.tar", 5, 100) == DATA[5:105]
    assert "signature=secret" in server.queries


@pytest.mark.parametrize("to", ["other", "outside", "file:///etc/passwd", "http://127.0.0.1:1@[::1]/plain/a.tar"])
def test_redirects_are_not_followed_elsewhere(server, tmp_path, to):
    other = Server({"a.tar": DATA})
    allow = [server.url + "redirect/", server.url + "data/"]
    places = {
        "other": other.url + "data/a.tar?signature=secret",
        "outside": server.url + "plain/a.tar?signature=secret",
    }
    server.location = places.get(to, to)
    with pytest.raises(ShardError) as error:
        opened(server, tmp_path, allow=allow).read(server.url + "redirect/a.tar", 0, 100)
    other.shutdown()
    assert not other.seen and not any("plain" in path for _, path, _ in server.seen)
    assert "secret" not in str(error.value)
    if to in places:
        assert "not in the allow-list" in str(error.value) and places[to].partition("?")[0] in str(error.value)


# --- the cache ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["flip", "cut", "longer", "empty"])
def test_a_damaged_block_or_copy_is_fetched_anew(server, tmp_path, caplog, damage):
    files, url = opened(server, tmp_path), server.url + "plain/a.tar"
    server.files["a.idx"] = DATA[:1000]
    for _ in range(2):
        before = server.gets()
        assert files.read(url, 5, 100) == DATA[5:105]
        assert files.local_copy(server.url + "plain/a.idx").read_bytes() == DATA[:1000]
        assert server.gets() == before + 2
        for path in (tmp_path / "cache").glob("*-*"):
            data = path.read_bytes()
            flipped = data[:50] + bytes([data[50] ^ 1]) + data[51:] if len(data) > 50 else data
            path.write_bytes({"flip": flipped, "cut": data[:-1], "longer": data + b"x", "empty": b""}[damage])
    assert "damaged, so it is fetched anew" in caplog.text or damage == "flip"


def test_the_least_recently_used_go_first(tmp_path):
    cache = BlockCache(tmp_path, 10_000)
    for i in range(9):
        cache.write(str(i), bytes(1000 - 4))
        os.utime(tmp_path / str(i), (i + 1, i + 1))
    assert cache.read("0", 996) == bytes(996)  # used last from here on
    cache.write("9", bytes(1000 - 4))
    cache.write("new", bytes(1000 - 4))
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [*sorted("03456789"), "new"]
    assert total(tmp_path) == 9000  # a tenth is made free at a time


def test_what_a_killed_process_left_is_counted_and_goes(tmp_path):
    cache = BlockCache(tmp_path, 10_000)
    if (child := os.fork()) == 0:
        cache._reserve(tmp_path / "half.tmp", 6000)
        os._exit(0)
    os.waitpid(child, 0)
    assert total(tmp_path) == 6000
    for i in range(8):
        cache.write(str(i), bytes(1000 - 4))
        assert total(tmp_path) <= 10_000
    assert cache.read("7", 996) == bytes(996) and not (tmp_path / "half.tmp").exists()


@pytest.mark.parametrize("contents", [b"", b"12", b"x" * 20, b"1" * 5000])
def test_a_damaged_total_is_counted_anew(tmp_path, contents):
    cache = BlockCache(tmp_path, 10_000)
    for i in range(20):
        cache.write(str(i), bytes(996))
        (tmp_path / "locks" / "total").write_bytes(contents)
        assert total(tmp_path) <= 10_000
    assert cache.read("19", 996) is not None


def test_a_lock_that_is_never_given_back(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(block_cache, "PATIENCE", 0.2)
    cache = BlockCache(tmp_path, 10_000)
    with cache.fetching("a"), cache.fetching("a"):
        cache.write("a", b"data")
    assert cache.read("a", 4) == b"data" and "held by another process" in caplog.text


def test_a_disk_that_takes_no_more(server, tmp_path):
    """The limit of a process stands for a full disk: the system refuses the write either way."""
    files, limits = opened(server, tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    files.size(server.url + "plain/a.tar")
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(ShardError, match=r"cache: cannot cache \d+ bytes: File too large"):
            files.read(server.url + "plain/a.tar", 0, 10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "cache").glob("*.tmp"))
    assert files.read(server.url + "plain/a.tar", 0, 10) == DATA[:10]


def test_a_folder_that_cannot_be_written_and_a_file_too_large(server, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ShardError, match=r"cache: not usable as a cache: "):
        opened(server, tmp_path)
    (tmp_path / "cache").unlink()
    server.files["large.idx"] = bytes(LIMIT + 1)
    with pytest.raises(ShardError, match=f"{LIMIT + 1} bytes are more than all that this cache may hold, {LIMIT}"):
        opened(server, tmp_path).local_copy(server.url + "plain/large.idx")


# --- several processes ----------------------------------------------------------------------------------------------


def read_at_random(files: RemoteFiles, url: str, seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(count):
        begin = int(rng.integers(len(DATA) * 3))
        size = min(int(rng.integers(1, 30_000)), len(DATA) * 3 - begin)
        assert files.read(url, begin, size) == (DATA * 3)[begin : begin + size]


def processes(count: int, target, *args) -> list[multiprocessing.Process]:
    started = [multiprocessing.get_context("fork").Process(target=target, args=(*args, i)) for i in range(count)]
    for process in started:
        process.start()
    return started


def refuse_damage(message: str, *_) -> None:
    assert "too small" in message, message  # sixteen blocks are hardly more than four processes write


def test_several_processes_under_eviction(server, tmp_path, monkeypatch):
    """The file is three times the cache, whose bound holds at every moment that it is looked at.

    No process finds a block damaged, as half of one would be.
    """
    monkeypatch.setattr(block_cache.logger, "warning", refuse_damage)
    server.files["large.tar"] = DATA * 3
    files, url = opened(server, tmp_path), server.url + "plain/large.tar"
    read_at_random(files, url, 9, 20)  # so that the children inherit open connections
    started = processes(4, functools.partial(read_at_random, files, url, count=250))
    most, looks = 0, 0
    while any(process.is_alive() for process in started):
        with block_cache._lock(tmp_path / "cache" / "locks" / "total"):  # so that all sizes are of one moment
            most = max(most, total(tmp_path / "cache"))
        looks += 1
        time.sleep(0.01)
    assert [process.exitcode for process in started] == [0] * 4
    assert 0.8 * LIMIT < most <= LIMIT and looks > 10
    read_at_random(files, url, 10, 20)


def read_all(files: RemoteFiles, url: str, _: int) -> None:
    assert files.read(url, 0, len(DATA)) == DATA


def test_a_block_is_fetched_once_a_machine(server, tmp_path):
    server.latency = 0.01
    files, url = opened(server, tmp_path, cache_gib=1 / 256), server.url + "plain/a.tar"
    started = processes(4, read_all, files, url)
    for process in started:
        process.join(30)
    assert [process.exitcode for process in started] == [0] * 4
    assert server.gets() == 16 and server.seen.total() == 17


class Ranges(Dataset):
    def __init__(self, files: RemoteFiles, url: str):
        self.files, self.url = files, url

    def __len__(self) -> int:
        return 40

    def __getitem__(self, i: int) -> tuple[int, bytes]:
        return os.getpid(), self.files.read(self.url, i * 20_000, 20_000)


@pytest.mark.parametrize(("context", "workers"), [("fork", 2), ("spawn", 1)])
def test_workers_of_a_data_loader(server, tmp_path, context, workers):
    """The parent has read before, so its thread and connections exist when the workers are forked; it reads on."""
    files, url = opened(server, tmp_path), server.url + "plain/a.tar"
    assert files.read(url, 0, 5) == DATA[:5]
    loader = DataLoader(
        Ranges(files, url), batch_size=None, num_workers=workers, multiprocessing_context=context, timeout=60
    )
    readers, parts = set(), []
    for i, (reader, part) in enumerate(loader):
        readers.add(reader)
        parts.append(part)
        at = 800_000 + i * 5000  # blocks that no worker reads
        assert files.read(url, at, 100) == DATA[at : at + 100]
    assert b"".join(parts) == DATA[:800_000]
    assert len(readers) == workers and os.getpid() not in readers


# --- an object store ------------------------------------------------------------------------------------------------


@pytest.fixture
def store(monkeypatch) -> Iterator[str]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "made-up")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "made-up")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    url = f"http://{host}:{port}"
    client = boto3.client("s3", endpoint_url=url)
    client.create_bucket(Bucket="bucket")
    client.put_object(Bucket="bucket", Key="coyo/a.tar", Body=DATA)
    client.put_object(Bucket="bucket", Key="private/a.tar", Body=DATA)
    yield url
    moto.stop()


def test_an_object_store(store, tmp_path):
    config = RemoteConfig(
        allow=["s3://bucket/coyo/"],
        cache=str(tmp_path),
        cache_gib=LIMIT / 2**30,
        block_mib=BLOCK / 2**20,
        options={"s3": {"endpoint_url": store}},
    )
    files, url = RemoteFiles(config), "s3://bucket/coyo/a.tar"
    assert files.size(url) == len(DATA)
    for begin, size in [(0, 10), (BLOCK - 5, 10), (len(DATA) - 7, 7), (0, 200_000)]:
        assert files.read(url, begin, size) == DATA[begin : begin + size]
    started = processes(2, read_all, files, url)
    for process in started:
        process.join(30)
    assert [process.exitcode for process in started] == [0] * 2
    assert files.local_copy(url).read_bytes() == DATA
    with pytest.raises(ShardError, match="not in the allow-list"):
        files.size("s3://bucket/private/a.tar")
    for missing in ("s3://bucket/coyo/none.tar", "s3://bucket/coyo/"):
        with pytest.raises(ShardError, match=rf"{missing}: (HTTP 404|not found|expected a file)"):
            files.size(missing)
