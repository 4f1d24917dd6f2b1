import json
import pickle
import struct

import pytest
import torch
from safetensors.torch import save_file

from aimv2.weights import ModelError, WeightFiles, find_weights

WEIGHTS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


def write_shards(folder):
    for name, tensor in WEIGHTS.items():
        save_file({name: tensor}, folder / f"{name}.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: f"{name}.safetensors" for name in WEIGHTS}}))
    return index


def write_file(folder):
    save_file(WEIGHTS, folder / "model.safetensors")
    return folder / "model.safetensors"


def write_pickle(folder, contents=WEIGHTS):
    torch.save(contents, folder / "model.pth")
    return folder / "model.pth"


def write_nested_pickle(folder):
    return write_pickle(folder, {"model": WEIGHTS, "epoch": 3})


@pytest.mark.parametrize("write", [write_file, write_shards, write_pickle, write_nested_pickle])
def test_tensors_and_shapes(tmp_path, write):
    path = write(tmp_path)
    weights = WeightFiles(path)
    assert weights.shapes == {"a": (2, 3), "b": (4,)}
    for name, tensor in WEIGHTS.items():
        assert torch.equal(weights[name], tensor) and weights[name].dtype == tensor.dtype
    assert find_weights(tmp_path) == path


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_pickle_is_not_run(tmp_path, legacy):
    fired = tmp_path / "fired"
    path = tmp_path / "model.pth"
    torch.save({"a": Bomb(fired)}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ModelError, match="refused, nothing of it was run"):
        WeightFiles(path)
    assert not fired.exists()
    pickle.loads(pickle.dumps(Bomb(fired))).close()
    assert fired.exists()  # it is a bomb


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def web_page(path):
    path.write_text("<!DOCTYPE html><html>Sign in</html>")


def pointer(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")


def endless_header(path):
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}")


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut, "damaged, cut off or no file of weights"),
        (web_page, "a web page, not weights"),
        (pointer, "a Git LFS pointer"),
        (endless_header, "damaged"),
        (empty, "damaged"),
    ],
)
@pytest.mark.parametrize("write", [write_file, write_pickle])
def test_what_is_no_weights_is_named(tmp_path, damage, words, write):
    path = write(tmp_path)
    damage(path)
    with pytest.raises(ModelError, match=words) as error:
        WeightFiles(path)
    assert str(path) in str(error.value)


def test_other_contents(tmp_path):
    for contents in ([1, 2], {"a": 3}):
        with pytest.raises(ModelError, match="expected tensors by name"):
            WeightFiles(write_pickle(tmp_path, contents))
    with pytest.raises(ModelError, match=r"nowhere\.safetensors is missing"):
        WeightFiles(tmp_path / "nowhere.safetensors")


def test_shards_are_complete_and_beside_their_index(tmp_path):
    index = write_shards(tmp_path)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(ModelError, match=r"b\.safetensors is missing, a shard"):
        WeightFiles(index)
    index.write_text(json.dumps({"weight_map": {"a": "a.safetensors", "c": "a.safetensors"}}))
    with pytest.raises(ModelError, match="its shards lack c"):
        WeightFiles(index)
    index.write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))
    with pytest.raises(ModelError, match="expected a file beside it"):
        WeightFiles(index)
    index.write_text("[]")
    with pytest.raises(ModelError, match="not an index of shards"):
        WeightFiles(index)


def test_a_folder_without_a_usual_name(tmp_path):
    with pytest.raises(ModelError, match="found none"):
        find_weights(tmp_path)
    (tmp_path / "aim.pth").touch()
    assert find_weights(tmp_path).name == "aim.pth"
    (tmp_path / "other.bin").touch()
    with pytest.raises(ModelError, match=r"found aim\.pth, other\.bin"):
        find_weights(tmp_path)
