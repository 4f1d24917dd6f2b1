import io
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from aimv2.config import to_json
from aimv2.data.batch import Batch, Replaced
from aimv2.data.images import decode_image
from aimv2.data.loader import DataConfig, SampleCounter, train_loader, validation_loader
from aimv2.data.mixture import MixtureChange, Source
from aimv2.data.samples import Samples
from aimv2.data.shards import ShardError, ensure_indices, expand_shards
from aimv2.data.tokenizer import Tokenizer, train_tokenizer
from aimv2.data.transforms import TransformConfig, eval_transform

PATCH = 8
WORDS = ["red", "green", "blue", "large", "small", "circle", "square", "triangle"]


def caption(i: int, form: int) -> str:
    return " ".join(WORDS[(i + form * k) % 8] for k in range(1 + (i + form) % 6))


def write_source(folder: Path, name: str, count: int, broken: set[int] = frozenset()) -> str:
    """Returns a pattern. Image i has its number in its colour; the images in `broken` are cut."""
    with webdataset.ShardWriter(f"{folder}/{name}-%03d.tar", maxcount=16, verbose=0) as writer:
        for i in range(count):
            jpeg = io.BytesIO()
            Image.new("RGB", (48 + i % 5, 40), (4 * i, 255 - 4 * i, 128)).save(jpeg, "JPEG")
            data = jpeg.getvalue()
            texts = [caption(i, form) for form in range(1, 4)]
            record = json.dumps({"captions": texts, "one": texts[0], "odd": [1], "index": i})
            writer.write(
                {
                    "__key__": f"{i:05d}",
                    "jpg": data[:200] if i in broken else data,
                    "txt": texts[0].encode(),
                    "json": record.encode(),
                }
            )
    pattern = f"{folder}/{name}-*.tar"
    ensure_indices(expand_shards(pattern))
    return pattern


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_source(folder, "a", 50)
    write_source(folder, "b", 30)
    write_source(folder, "broken", 40, broken=set(range(0, 40, 10)))
    write_source(folder, "ruin", 5, broken=set(range(5)))
    texts = [caption(i, form) for i in range(60) for form in range(4)]
    train_tokenizer(texts, folder / "tokenizer", 64, source="this test", licence="none")
    return folder


@pytest.fixture
def config(folder) -> DataConfig:
    return DataConfig(
        train=[
            Source(name="a", shards=f"{folder}/a-*.tar", weight=0.7, captions="json:captions"),
            Source(name="b", shards=f"{folder}/b-*.tar", weight=0.3),
        ],
        validation=Source(name="v", shards=f"{folder}/b-*.tar", captions="json:captions"),
        tokenizer=str(folder / "tokenizer"),
        transform=TransformConfig(image_size=32),
        context_length=16,
        workers=0,
    )


def load(config: DataConfig, micro_batches: int, **changes) -> list[Batch]:
    place = {"patch_size": PATCH, "micro_batch": 4, "start": 0, "seed": 1, "rank": 0, "world_size": 1} | changes
    batches = iter(train_loader(config, **place))
    found = list(islice(batches, micro_batches))
    batches.close()
    return found


def equal(a: Batch, b: Batch) -> bool:
    same_text = torch.equal(a.text, b.text) and torch.equal(a.text_length, b.text_length)
    same_place = torch.equal(a.sample, b.sample) and torch.equal(a.prefix_length, b.prefix_length)
    return torch.equal(a.image, b.image) and same_text and same_place and a.num_patches == b.num_patches


def test_a_batch_is_what_it_says(config):
    (batch,) = load(config, 1, micro_batch=8, start=100)
    assert batch.image.shape == (8, 3, 32, 32) and batch.image.dtype == torch.float32
    assert batch.sample.tolist() == list(range(100, 108))
    assert batch.num_patches == 16
    assert batch.text.dtype == batch.text_length.dtype == batch.prefix_length.dtype == batch.sample.dtype == torch.int64
    assert batch.text.shape == (8, int(batch.text_length.max()))
    tokenizer = Tokenizer(config.tokenizer)
    for text, length in zip(batch.text, batch.text_length, strict=True):
        assert text[length - 1] == tokenizer.eos_id
        assert (text[length:] == tokenizer.pad_id).all()
    (padded,) = load(replace(config, pad_text_to_context=True), 1)
    assert padded.text.shape == (4, 16)


def test_images_and_captions_belong_together(config):
    """The colour says which image it is, and so which captions it may have."""
    config = replace(config, transform=replace(config.transform, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)))
    tokenizer, forms = Tokenizer(config.tokenizer), Counter()
    for batch in load(config, 20):
        for image, text, length in zip(batch.image, batch.text, batch.text_length, strict=True):
            red, green = (image[:2].mean(dim=(1, 2)) * 255).round().tolist()
            i = round((red + 255 - green) / 8)
            allowed = {caption(i, form): form for form in range(1, 4)}
            forms[allowed[tokenizer.decode(text[:length].tolist())]] += 1
    assert len(forms) == 3


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_the_same_samples_for_any_number_of_ranks_and_workers(config, world_size, workers):
    """16 samples of a step, from ranks of 16 / world_size each, are the batch of a single rank bit for bit."""
    whole = torch.cat([b.image for b in load(config, 2, micro_batch=16, start=40)])
    config = replace(config, workers=workers)
    ranks = [
        load(config, 2, micro_batch=16 // world_size, start=40, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    split = [batch for step in zip(*ranks, strict=True) for batch in step]
    assert torch.cat([b.sample for b in split]).tolist() == list(range(40, 72))
    assert torch.equal(torch.cat([b.image for b in split]), whole)


def test_a_restart_anywhere_goes_on_bit_for_bit(config):
    undisturbed = load(config, 60)
    rng = np.random.default_rng(0)
    for k in [0, 1, 59, *rng.integers(0, 59, 20).tolist()]:
        (again,) = load(config, 1, start=4 * k)
        assert equal(again, undisturbed[k])


@pytest.mark.slow
def test_200_restarts_with_workers(config):
    undisturbed = load(config, 300)
    for k in np.random.default_rng(0).integers(0, 298, 200).tolist():
        again = load(replace(config, workers=k % 3), 2, start=4 * k)
        assert all(map(equal, again, undisturbed[k : k + 2]))


def test_the_seed_changes_everything_random(config):
    a, b = load(config, 10), load(config, 10, seed=2)
    assert [x.sample.tolist() for x in a] == [x.sample.tolist() for x in b]
    for get in (lambda x: x.image, lambda x: x.prefix_length):
        assert not torch.equal(torch.cat([get(x) for x in a]), torch.cat([get(x) for x in b]))


def test_prefix_lengths_are_uniform_and_differ_between_ranks(config):
    """Chi-square over the 15 lengths: 1,600 draws, 14 degrees of freedom; 42 has probability 0.0001."""
    samples = train_loader(config, patch_size=PATCH, micro_batch=1, start=0, seed=0, rank=0, world_size=1).dataset
    lengths = np.array([int(samples._generator(g, 0).integers(1, samples.num_patches)) for g in range(1600)])
    assert [samples[g].prefix_length for g in range(20)] == lengths[:20].tolist()
    found = np.bincount(lengths, minlength=17)
    assert found[0] == found[16] == 0
    expected = 1600 / 15
    assert ((found[1:16] - expected) ** 2 / expected).sum() < 42
    # Neighbouring samples: correlation of independent draws has deviation 1 / 40.
    assert abs(np.corrcoef(lengths[:-1], lengths[1:])[0, 1]) < 5 / 40


def test_training_and_validation_share_no_random_numbers(config):
    common = {"patch_size": PATCH, "micro_batch": 30, "seed": 0, "rank": 0, "world_size": 1}
    training = next(iter(train_loader(config, start=0, **common)))
    validation = next(iter(validation_loader(config, **common)))
    assert training.prefix_length.tolist() != validation.prefix_length.tolist()


@pytest.mark.parametrize("workers", [0, 1])
def test_the_global_generators_are_left_alone(config, workers):
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    load(replace(config, workers=workers), 2)
    assert torch.equal(before[0], torch.get_rng_state()) and np.array_equal(before[1], np.random.get_state()[1])


def test_captions_from_txt_json_or_nowhere(config, folder):
    def texts(captions):
        source = Source(name="b", shards=f"{folder}/b-*.tar", captions=captions)
        tokenizer = Tokenizer(config.tokenizer)
        (batch,) = load(replace(config, train=[source]), 1)
        return [tokenizer.decode(t[:n].tolist()) for t, n in zip(batch.text, batch.text_length, strict=True)]

    assert texts("txt") == texts("json:one")
    assert texts(None) == [""] * 4
    for wrong in ("json:missing", "json:odd", "json:index"):
        with pytest.raises(ShardError, match=rf"no usable sample in 9 tries: .*{wrong[5:]}' in json"):
            texts(wrong)


def test_captions_of_several_places_come_by_their_shares(config, folder, tmp_path):
    """Of 2,000 draws at 0.3 one standard deviation is 20; four are allowed. The other draws of a sample stay."""
    tokenizer = Tokenizer(config.tokenizer)
    with webdataset.TarWriter(f"{tmp_path}/a.tar") as writer:
        jpeg = io.BytesIO()
        Image.new("RGB", (40, 40)).save(jpeg, "JPEG")
        for i in range(40):
            record = {} if i % 4 == 0 else {"synthetic": ["blue square"]}
            writer.write({"__key__": f"{i}", "jpg": jpeg.getvalue(), "txt": b"red circle", "json": json.dumps(record)})
    ensure_indices([tmp_path / "a.tar"])

    def texts(captions, batches=500):
        source = Source(name="a", shards=f"{tmp_path}/a.tar", captions=captions)
        loaded = load(replace(config, train=[source]), batches)
        assert not any(batch.replaced for batch in loaded)
        return [
            tokenizer.decode(text[:n].tolist()) for b in loaded for text, n in zip(b.text, b.text_length, strict=True)
        ]

    counts = Counter(texts({"txt": 0.7, "json:synthetic": 0.3}))
    assert counts.keys() == {"red circle", "blue square"}
    assert abs(counts["blue square"] - 2000 * 0.3 * 0.75) < 80  # a quarter has no synthetic one, and takes its alt-text
    assert set(texts({"txt": 1.0}, 5)) == {"red circle"}
    source = Source(name="a", shards=f"{tmp_path}/a.tar", captions={"json:none": 0.5, "json:nor this": 0.5})
    with pytest.raises(ShardError, match="no 'none' in json, no 'nor this' in json"):
        load(replace(config, train=[source]), 1)


def test_a_caption_that_is_empty_gives_way_to_one_that_is_not(config, tmp_path):
    with webdataset.TarWriter(f"{tmp_path}/a.tar") as writer:
        jpeg = io.BytesIO()
        Image.new("RGB", (40, 40)).save(jpeg, "JPEG")
        record = json.dumps({"list": ["  ", "blue square", "<br/>"], "none": ["", "?"]})
        writer.write({"__key__": "0", "jpg": jpeg.getvalue(), "txt": b"", "json": record})
    ensure_indices([tmp_path / "a.tar"])
    tokenizer = Tokenizer(config.tokenizer)

    def texts(captions):
        source = Source(name="a", shards=f"{tmp_path}/a.tar", captions=captions)
        place = {"patch_size": PATCH, "micro_batch": 1, "seed": 1, "rank": 0, "world_size": 1}
        found = load(replace(config, train=[source]), 20)
        found += list(validation_loader(replace(config, validation=source), **place))
        return {tokenizer.decode(t[:n].tolist()) for b in found for t, n in zip(b.text, b.text_length, strict=True)}

    assert texts("json:list") == texts({"txt": 0.9, "json:list": 0.1}) == {"blue square"}
    assert texts({"txt": 0.5, "json:none": 0.5}) == texts("txt") == {""}


def test_validation_takes_the_first_place_that_a_sample_has(config, folder):
    source = Source(name="v", shards=f"{folder}/b-*.tar", captions={"json:none": 0.5, "json:captions": 0.1, "txt": 0.4})
    first = replace(source, captions="json:captions")
    place = {"patch_size": PATCH, "micro_batch": 4, "seed": 1, "rank": 0, "world_size": 1}
    a, b = (list(validation_loader(replace(config, validation=v), **place)) for v in (source, first))
    assert all(equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_change_of_the_mixture_begins_at_its_sample(config, caplog):
    changed = replace(config, changes=[MixtureChange(sample=10, weights={"a": 0.0})])
    before = load(config, 5)
    with caplog.at_level("INFO"):
        after = load(changed, 5)
    assert caplog.messages == ["from sample 0 on: a 70.0000%, b 30.0000%", "from sample 10 on: a 0.0000%, b 100.0000%"]
    assert equal(before[0], after[0]) and equal(before[1], after[1]) and not equal(before[3], after[3])


def test_captions_that_clean_to_nothing_leave_a_sample_of_pixels(config, tmp_path):
    with webdataset.TarWriter(f"{tmp_path}/a.tar") as writer:
        jpeg = io.BytesIO()
        Image.new("RGB", (40, 40)).save(jpeg, "JPEG")
        writer.write({"__key__": "0", "jpg": jpeg.getvalue(), "txt": b"<br/> ?!"})
    ensure_indices([tmp_path / "a.tar"])
    (batch,) = load(replace(config, train=[Source(name="a", shards=f"{tmp_path}/a.tar")]), 1)
    assert batch.text_length.tolist() == [0] * 4
    assert batch.text.tolist() == [[Tokenizer(config.tokenizer).pad_id]] * 4
    assert not batch.replaced


# --- bad samples ----------------------------------------------------------------------------------------------------


def test_bad_samples_are_replaced_and_counted_the_same_way_every_time(config, folder):
    config = replace(config, train=[Source(name="broken", shards=f"{folder}/broken-*.tar")])
    batches = load(config, 20)
    replaced = [r for batch in batches for r in batch.replaced]
    assert {len(b) for b in batches} == {4}
    assert len({r.sample for r in replaced}) == 8  # 4 of 40 in each of two epochs
    assert {r.where.rpartition(": sample ")[2] for r in replaced} == {"00000", "00010", "00020", "00030"}
    assert {r.reason for r in replaced} == {"undecodable (OSError)"}
    again = load(replace(config, workers=2), 20)
    assert all(map(equal, batches, again))
    assert [r for batch in again for r in batch.replaced] == replaced
    # A replacement keeps the prefix that (seed, g) drew.
    whole = load(replace(config, train=[Source(name="a", shards=f"{folder}/a-*.tar")]), 20)
    assert [b.prefix_length.tolist() for b in whole] == [b.prefix_length.tolist() for b in batches]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_source_of_bad_samples_ends_with_one_error(config, folder, workers):
    config = replace(config, workers=workers, train=[Source(name="ruin", shards=f"{folder}/ruin-*.tar")])
    words = r"ruin-\*.tar: no usable sample in 9 tries: .*: sample 0000\d: undecodable"
    with pytest.raises(ShardError, match=words) as caught:
        load(config, 1)
    assert str(caught.value).startswith(str(folder)) and "\n" not in str(caught.value)  # without a worker's traceback


def counted(bad: list[int], start: int, length: int = 100) -> Batch:
    zeros = torch.zeros(length, dtype=torch.int64)
    return Batch(
        image=torch.zeros(length, 3, 1, 1),
        text=zeros[:, None],
        text_length=zeros,
        prefix_length=zeros,
        sample=torch.arange(start, start + length),
        num_patches=4,
        replaced=[Replaced(start + i, "cut", "a.tar: sample x") for i in bad],
    )


def test_one_percent_may_be_bad_and_no_more():
    counter = SampleCounter()
    for start in range(0, 30_000, 100):
        counter.add(counted([start // 100 % 100], start))
    assert counter.by_reason == {"cut": 300}
    with pytest.raises(ShardError, match=r"over 100 of 10000 samples had to be replaced \(cut: 302\)"):
        counter.add(counted([1, 2], 30_000))


def test_a_hundred_in_a_row_may_be_bad_and_no_more():
    counter = SampleCounter()
    counter.add(counted(list(range(100)), 0))
    counter.add(counted([], 100))
    with pytest.raises(ShardError):
        counter.add(counted([0], 200))


def test_several_tries_for_one_sample_are_one_bad_sample():
    counter = SampleCounter()
    counter.add(counted([5] * 8 * 20, 0))
    assert counter.by_reason == {"cut": 160}


def test_the_loader_counts(config, folder):
    loader = train_loader(
        replace(config, train=[Source(name="broken", shards=f"{folder}/broken-*.tar")]),
        patch_size=PATCH,
        micro_batch=40,
        start=0,
        seed=1,
        rank=0,
        world_size=1,
    )
    next(iter(loader))
    assert sum(loader.replaced.by_reason.values()) >= 4


# --- validation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("world_size", "limit"), [(1, None), (2, None), (4, 7), (8, 3), (1, 1000)])
def test_validation_ranks_cover_every_sample_once(config, world_size, limit):
    place = {"patch_size": PATCH, "micro_batch": 4, "seed": 0, "world_size": world_size, "limit": limit}
    ranks = [list(validation_loader(config, rank=rank, **place)) for rank in range(world_size)]
    expected = range(min(30, limit or 30))
    for rank, batches in enumerate(ranks):
        assert [g for b in batches for g in b.sample.tolist()] == list(expected[rank::world_size])
    assert sorted(g for r in ranks for b in r for g in b.sample.tolist()) == list(expected)


def test_validation_shows_the_first_caption_and_the_centre_the_same_way_every_time(config):
    loader = validation_loader(config, patch_size=PATCH, micro_batch=8, seed=0, rank=0, world_size=1)
    first, second = list(loader), list(loader)
    assert len(first) == len(loader) == 4
    assert all(map(equal, first, second))
    samples, tokenizer = loader.dataset, Tokenizer(config.tokenizer)
    for batch in first:
        for i, image, text, length in zip(
            batch.sample.tolist(), batch.image, batch.text, batch.text_length, strict=True
        ):
            assert tokenizer.decode(text[:length].tolist()) == caption(i, 1)
            assert torch.equal(image, eval_transform(decode_image(samples.shards[0][i].image), config.transform))


def test_validation_without_a_source(config):
    with pytest.raises(ValueError, match="no validation source"):
        validation_loader(
            replace(config, validation=None), patch_size=PATCH, micro_batch=1, seed=0, rank=0, world_size=1
        )


# --- the rest -------------------------------------------------------------------------------------------------------


def test_the_first_sample_at_a_distance_is_as_fast_as_at_the_start(config):
    """CPU seconds: opening everything, and the first sample of g = 10^9."""
    begin = time.process_time()
    (batch,) = load(config, 1, start=10**9, micro_batch=1)
    assert time.process_time() - begin < 0.5  # measured 0.01
    assert batch.sample.tolist() == [10**9]


@pytest.mark.parametrize("size", [30, 33])
def test_an_image_size_that_is_no_multiple_of_the_patch(config, size):
    config = replace(config, transform=TransformConfig(image_size=size))
    with pytest.raises(ValueError, match=f"image_size {size} is not a multiple of the patch size 8"):
        load(config, 1)


def test_one_patch_is_too_few(config):
    with pytest.raises(ValueError, match="a single patch of size 32"):
        load(config, 1, patch_size=32)


@pytest.mark.parametrize("change", [{"train": []}, {"context_length": 0}, {"workers": -1}])
def test_refused_configs(config, change):
    with pytest.raises(ValueError, match="expected"):
        replace(config, **change)


def test_workers_survive_the_signals_that_stop_a_run(config):
    others = set(multiprocessing.active_children())
    config = replace(config, workers=2)
    loader = train_loader(config, patch_size=PATCH, micro_batch=2, start=0, seed=0, rank=0, world_size=1)
    batches = iter(loader)
    for _ in range(2):
        next(batches)  # one from each: both have started
    workers = set(multiprocessing.active_children()) - others
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid, signal.SIGTERM)
        os.kill(worker.pid, signal.SIGINT)
    assert [next(batches).sample.tolist() for _ in range(10)][-1] == [22, 23]
    assert all(worker.is_alive() for worker in workers)
    del batches, loader
    assert not any(worker.is_alive() for worker in workers)


EXIT = """
import json, sys
from aimv2.config import from_json
from aimv2.data.loader import DataConfig, train_loader
config = from_json(DataConfig, json.loads(sys.argv[1]))
batches = iter(train_loader(config, patch_size=8, micro_batch=2, start=0, seed=0, rank=0, world_size=1))
print(next(batches).sample.tolist(), flush=True)
"""


@pytest.mark.parametrize("source", ["a", "ruin"])
def test_a_process_with_workers_ends(config, folder, source):
    """The workers ignore the signal by which an exiting interpreter stops them, unless it does exit."""
    config = replace(config, workers=2, train=[Source(name=source, shards=f"{folder}/{source}-*.tar")])
    process = subprocess.run(
        [sys.executable, "-c", EXIT, json.dumps(to_json(config))], capture_output=True, text=True, timeout=120
    )
    if source == "ruin":
        assert process.returncode == 1 and "no usable sample in 9 tries" in process.stderr
    else:
        assert (process.returncode, process.stdout) == (0, "[0, 1]\n"), process.stderr


def test_samples_can_be_sent_to_a_spawned_worker(config):
    samples = train_loader(config, patch_size=PATCH, micro_batch=1, start=0, seed=0, rank=0, world_size=1).dataset
    samples[0]
    copy = pickle.loads(pickle.dumps(samples))
    assert isinstance(copy, Samples)
    assert torch.equal(copy[7].image, samples[7].image)


@pytest.mark.gpu
def test_batches_come_pinned_where_there_is_a_gpu(config):
    assert load(replace(config, workers=1), 1)[0].image.is_pinned()
