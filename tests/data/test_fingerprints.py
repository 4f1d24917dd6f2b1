import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from aimv2.data.fingerprints import DataFingerprints
from aimv2.data.loader import DataConfig
from aimv2.data.mixture import MixtureChange, Source
from aimv2.data.native import NativeConfig
from aimv2.data.shard_index import select_rows
from aimv2.data.shards import ensure_indices, expand_shards
from aimv2.data.tokenizer import Tokenizer, train_tokenizer
from aimv2.data.transforms import TransformConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    jpeg = io.BytesIO()
    Image.new("RGB", (40, 40)).save(jpeg, "JPEG")
    for name in "abc":
        with webdataset.ShardWriter(f"{folder}/{name}-%d.tar", maxcount=4, verbose=0) as writer:
            for i in range(10):
                writer.write({"__key__": f"{name}{i}", "jpg": jpeg.getvalue(), "txt": f"caption {i}"})
        ensure_indices(expand_shards(f"{folder}/{name}-*.tar"))
    train_tokenizer(["one two three four five six seven"] * 9, folder / "tokenizer", 32, source="this", licence="none")
    return folder


@pytest.fixture
def config(folder) -> DataConfig:
    sources = [Source(name=n, shards=f"{folder}/{n}-*.tar", weight=w) for n, w in (("a", 0.7), ("b", 0.3))]
    return DataConfig(train=sources, tokenizer=str(folder / "tokenizer"), transform=TransformConfig(image_size=32))


def before(config: DataConfig, g: int = 100) -> dict[str, str]:
    return DataFingerprints(config, Tokenizer(config.tokenizer)).before(g)


def test_they_are_of_what_decides_the_samples(config, folder, tmp_path):
    a, b = config.train
    for path in expand_shards(a.shards):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    moved = replace(a, shards=f"{tmp_path}/a-*.tar")
    ensure_indices(expand_shards(moved.shards))
    same = [replace(config, workers=5), replace(config, validation=b), replace(config, train=[moved, b])]
    assert all(before(c) == before(config) for c in same)
    select_rows(tmp_path / "a-1.tar", np.array([0, 2, 3]))
    others = {
        "mixture": [
            replace(config, train=[a]),
            replace(config, train=[b, a]),
            replace(config, train=[replace(a, weight=0.6), b]),
            replace(config, train=[replace(a, name="d"), b]),
        ],
        "train": [
            replace(config, train=[replace(a, captions="json:x"), b]),
            replace(config, train=[replace(a, captions={"txt": 0.5, "json:x": 0.5}), b]),
            replace(config, train=[replace(a, shards=f"{folder}/a-[01].tar"), b]),
            replace(config, train=[moved, b]),  # of which a filter has taken one since
        ],
        "transform": [
            replace(config, transform=replace(config.transform, flip=0.0)),
            replace(config, context_length=15),
        ],
    }
    for kind, configs in others.items():
        for changed in configs:
            different = {key for key, value in before(changed).items() if before(config).get(key) != value}
            assert any(key.startswith(f"data.{kind}") for key in different)


def test_what_comes_later_may_change(config, folder):
    """The mixture is in words, so that a refusal says what was and what is."""
    c = Source(name="c", shards=f"{folder}/c-*.tar", weight=0.0)
    later = replace(config, train=[*config.train, c], changes=[MixtureChange(sample=50, weights={"a": 0.2, "c": 0.1})])
    assert before(later, 50) == before(config, 50)
    assert before(later, 51)["data.mixture"] == "from 0: a 0.7, b 0.3, c 0; from 50: a 0.2, b 0.3, c 0.1"
    assert before(config, 51)["data.mixture"] == "from 0: a 0.7, b 0.3"
    assert before(later, 51).keys() - before(config, 51).keys() == {"data.train c"}
    again = replace(later, changes=[*later.changes, MixtureChange(sample=80, weights={"b": 0.0})])
    assert before(again, 80) == before(later, 80) != before(again, 81)


def test_native_adds_its_limits_and_the_budget_and_nothing_else(config):
    whole = replace(config, transform=replace(config.transform, crop_scale=None))
    native = replace(whole, native=NativeConfig(min_patches=6, max_patches=40))

    def of(config: DataConfig, budget: int | None) -> dict[str, str]:
        return DataFingerprints(config, Tokenizer(config.tokenizer), budget=budget).before(100)

    found = of(native, 64)
    assert found.pop("data.native").startswith("6 to 40 patches an image, 64 a micro-batch; ")
    assert found == of(whole, 64) == of(whole, None) == before(whole)
    others = [of(native, 65), of(replace(native, native=NativeConfig(min_patches=6, max_patches=41)), 64)]
    others.append(of(replace(native, native=NativeConfig(min_patches=5, max_patches=40)), 64))
    others.append(of(replace(native, native=NativeConfig(min_patches=6, max_patches=40, shared_by=2)), 64))
    assert len({other["data.native"] for other in [*others, of(native, 64)]}) == 5
    assert of(replace(native, workers=7), 64) == of(native, 64)
    with pytest.raises(ValueError, match=r"data.native is set and the budget is None"):
        of(native, None)


def test_another_way_to_draw_areas_or_choose_grids_is_noticed(config, monkeypatch):
    native = replace(config, transform=replace(config.transform, crop_scale=None), native=NativeConfig())
    seen = set()
    for changes in ({"area_grid": lambda *_: (2, 3)}, {"NativeOrder.area": lambda *_: 200}, {}):
        with monkeypatch.context() as patch:
            for name, other in changes.items():
                patch.setattr(f"aimv2.data.fingerprints.{name}", other)
            seen.add(DataFingerprints(native, Tokenizer(native.tokenizer), budget=9).before(1)["data.native"])
    assert len(seen) == 3
