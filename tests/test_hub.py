from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import V1, V2, random_encoder, write

from aimv2.hub import HUB
from aimv2.pretrained import load_encoder
from aimv2.weights import ModelError

IMAGES = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and nothing else to be had."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def add(repository: str, revision: str, commit: str) -> Path:
        folder = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "refs" / revision).write_text(commit)
        (folder / "snapshots" / commit).mkdir(parents=True)
        return folder / "snapshots" / commit

    return add


def test_names_of_the_hub():
    assert len([name for name in HUB if name.startswith("aimv2-")]) == 16
    assert len([name for name in HUB if name.startswith("aim-")]) == 4
    assert HUB["aimv2-1B-patch14-448"] == ("apple/aimv2-1B-patch14-448", None)
    assert HUB["aim-600M-2B-imgs"] == ("apple/AIM", "aim_600m_2bimgs_attnprobe_backbone.pth")
    timm = pytest.importorskip("timm")
    known = {name for name in timm.list_pretrained("aimv2*")}
    assert {name for name in HUB if name.startswith("aimv2_")} == known


@pytest.mark.parametrize(
    "name", ["apple/aimv2-large-patch14-224", "aimv2-large-patch14-224", "AIMv2-Large-patch14-224"]
)
def test_a_cached_repository(cache, name):
    """Both of its layouts: Apple's at an older revision, transformers' at main."""
    write(cache("apple/aimv2-large-patch14-224", "main", "c1") / "model.safetensors", V2, "transformers")
    write(cache("apple/aimv2-large-patch14-224", "apple", "c2") / "model.safetensors", replace(V2, depth=2), "apple")
    assert torch.equal(load_encoder(name)(IMAGES), random_encoder(V2)(IMAGES))
    assert load_encoder(name, revision="apple").config.depth == 2
    with pytest.raises(ModelError, match="at revision v9 of the hub is neither cached nor to be had"):
        load_encoder(name, revision="v9")


def test_one_file_of_a_repository(cache):
    write(cache("apple/AIM", "main", "c1") / "aim_600m_2bimgs_attnprobe_backbone.pth", V1, "apple")
    assert load_encoder("aim-600M-2B-imgs").config == V1


def test_names_that_are_nothing(cache, tmp_path):
    for name in ("apple/aimv2-large-patch14-224", "someone/something"):
        with pytest.raises(ModelError, match=f"{name}: no such file or folder here, and {name} of the hub is neither"):
            load_encoder(name)
    with pytest.raises(
        ModelError, match=r"no such file or folder; names of the hub like it: aimv2-large-patch14-224, "
    ):
        load_encoder("aimv2-large-patch14-225")
    with pytest.raises(ModelError, match="names of the hub like it: aimv2-large-patch14-224, "):
        load_encoder("apple/aimv2-large-patch14-225")
    with pytest.raises(ModelError, match=r"nowhere: no such file or folder$"):
        load_encoder(tmp_path / "nowhere")
    for source in ("random:gigantic", "random:large-x"):
        with pytest.raises(ModelError, match="SIZE one of base, large"):
            load_encoder(source)
