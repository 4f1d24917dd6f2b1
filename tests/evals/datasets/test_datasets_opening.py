import subprocess
import sys

import pytest

from aimv2.evals.datasets import open_dataset
from aimv2.evals.datasets.opening import PAPERS


@pytest.mark.parametrize("spec", ["", "digit", "folder", "folder:", "digits:x", "ftp:x", "imagenet:x", "cifar10@label"])
def test_what_is_no_dataset(spec):
    with pytest.raises(ValueError, match=r"expected one of digits, faces, shapes:.*imagenet") as error:
        open_dataset(spec)
    assert repr(spec) in str(error.value) and "\n" not in str(error.value)


def test_all_15_of_the_papers_have_a_name():
    assert len(PAPERS) == 15


def test_the_home_folder_may_be_written_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for spec in ("folder:~/x", "masks:~/x", "coco:~/x", "cifar10"):
        with pytest.raises(ValueError, match=str(tmp_path)):
            open_dataset(spec, root="~/x")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (KeyError("images"), "cifar10: missing 'images'. Looked below /data"),
        (RuntimeError("Not found.\nUse download=True"), "cifar10: Not found. Looked below /data"),
        (EOFError(), "cifar10: EOFError. Looked below /data"),
        (OSError(13, "Permission denied", "/data/x"), "cifar10: [Errno 13] Permission denied: '/data/x'"),
        (ValueError("/data/x: empty"), "/data/x: empty"),
        (ValueError("No columns to parse"), "cifar10: No columns to parse. Looked below /data"),
    ],
)
def test_what_libraries_raise_is_said_in_one_line(error, message, monkeypatch):
    def opened(*_):
        raise error

    monkeypatch.setitem(PAPERS, "cifar10", opened)
    with pytest.raises(ValueError) as raised:
        open_dataset("cifar10", root="/data")
    assert str(raised.value) == message


def test_no_optional_package_is_imported():
    """Nor by the encoders: a process of its own takes seconds."""
    packages = "datasets sklearn skimage torchvision.datasets wilds h5py pandas timm open_clip transformers"
    modules = "aimv2.evals.datasets, aimv2.evals.encoders"
    code = f"import sys, {modules}; print([p for p in {packages.split()} if p in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
