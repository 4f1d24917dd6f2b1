"""Sets of Hugging Face's `datasets`: from the hub, or a folder (save_to_disk, parquet files, an imagefolder).

No code of a set is run: `datasets` from version 4 on has no such thing.
"""

import os
from collections.abc import Sequence
from hashlib import sha256
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from aimv2.data.images import BadImage
from aimv2.evals.datasets.files import IMAGE_EXTENSIONS, read_file, stamps
from aimv2.evals.datasets.interface import Dataset, ImageSet
from aimv2.evals.datasets.labels import first_line, number_labels

if TYPE_CHECKING:
    import datasets

TEST_NAMES = ("test", "validation", "val", "valid")  # the first that has labels
_SAVED = "dataset_dict.json"  # what save_to_disk leaves of several splits


class _Rows(Sequence[bytes]):
    """The bytes of images, by row."""

    def __init__(self, rows: "datasets.Dataset"):
        self.rows = rows  # of one column

    def __len__(self) -> int:
        return self.rows.num_rows

    def __getitem__(self, row: int) -> bytes:
        """Raises BadImage for a row without an image, or whose file is not there."""
        (value,) = self.rows[row].values()
        if isinstance(value, bytes):
            return value
        if value and value["bytes"] is not None:
            return value["bytes"]
        if value and value["path"]:
            return read_file(value["path"])
        raise BadImage("no image")


class _Keys(Sequence[str]):
    """SPLIT/NUMBER: rows have no names."""

    def __init__(self, split: str, count: int):
        self.split, self.count = split, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> str:
        return f"{self.split}/{range(self.count)[row]:08d}"


def open_huggingface(where: str, spec: str) -> Dataset:
    """`NAME[@label column]`: a folder, or "owner/name" of a set on the hub. The column comes after the last @.

    It is trained on "train", if there is such a split, and tested on the first of TEST_NAMES that has labels; the
    report says which, and what is left unused. The label is a column of class labels, integers or texts; without a name
    the only one of class labels, whose classes are the set's own, seen in "train" or not. For integers and texts they
    are those found in "train", sorted. A copy of a folder is the same set if it has kept the times of the files.

    Raises:
        ImportError: no `datasets`, or one that would run a set's code.
        ValueError: no such set or column, several to choose from, nothing to test on, a row without a label, a class to
            test that "train" has not, or classes numbered otherwise there.
    """
    name, at, label = where.rpartition("@")
    if not at or "/" in label or Path(where).expanduser().is_dir():
        name, label = where, ""
    splits = _load(name)
    image, label = _choose_columns(spec, splits, label)
    labelled = {s: _labels(spec, s, splits[s], label) for s in ("train", *TEST_NAMES) if s in splits}
    test = next((s for s in TEST_NAMES if labelled.get(s) is not None), None)
    if test is None:
        raise ValueError(f"{spec}: no split to test on with labels: found {', '.join(splits)}, expected {TEST_NAMES}")
    train = "train" if labelled.get("train") is not None else None
    used = {"test": labelled[test]} | ({"train": labelled["train"]} if train else {})
    names = getattr(splits[test].features[label], "names", None)
    if train:
        _check_same_names(spec, test, names, getattr(splits["train"].features[label], "names", None))
    numbers, classes = (used, tuple(names)) if names else number_labels(spec, used)
    beside = _folder_stamps(Path(name).expanduser())
    sets = {
        role: _image_set(spec, Path(name).name, split, splits[split], image, numbers[role], beside)
        for role, split in (("train", train), ("test", test))
        if split
    }
    unused = sorted(set(splits) - {train, test})
    return Dataset(
        spec=spec,
        name=Path(name).name,
        classes=classes,
        train=sets.get("train"),
        test=sets["test"],
        report={"splits": {"train": train, "test": test, "unused": unused}, "columns": [image, label]},
    )


def _load(name: str) -> "datasets.DatasetDict":
    try:
        import datasets
    except ImportError as error:
        raise ImportError('sets of Hugging Face need its package: pip install "aimv2[huggingface]"') from error
    if int(datasets.__version__.partition(".")[0]) < 4:
        raise ImportError(f'datasets {datasets.__version__} may run a set\'s code: pip install "aimv2[huggingface]"')
    folder = Path(name).expanduser()
    try:
        if (folder / _SAVED).is_file():
            return datasets.load_from_disk(str(folder))
        if (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file():
            raise ValueError("saved without splits, expected a DatasetDict of train and test")
        return datasets.load_dataset(str(folder) if folder.is_dir() else name)
    except ImportError:
        raise
    except Exception as error:  # `datasets` raises whatever the damage leads to
        hint = "" if folder.exists() else "; no such folder: for a set on the hub check its name and the network"
        raise ValueError(f"{name}: {first_line(error)}{hint}") from error


def _choose_columns(spec: str, splits: "datasets.DatasetDict", label: str) -> tuple[str, str]:
    """The columns of the images and of the labels."""
    import datasets

    features = next(splits[s] for s in ("train", *TEST_NAMES, *splits) if s in splits).features
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if len(images) != 1:
        raise ValueError(f"{spec}: columns of images {images}, expected exactly one")
    classes = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if not label and len(classes) != 1:
        raise ValueError(f"{spec}: columns of class labels {classes}: say which by @COLUMN, of {list(features)}")
    if label and label not in features:
        raise ValueError(f"{spec}: no column {label!r}, expected one of {list(features)}")
    return images[0], label or classes[0]


def _labels(spec: str, split: str, rows: "datasets.Dataset", label: str) -> list[str | int] | None:
    """None if no row has a label, as of test splits whose answers are kept secret."""
    if label not in rows.features:
        return None
    labels = rows.with_format(None)[label][:]
    missing = [row for row, value in enumerate(labels) if value is None or value == -1]
    if len(missing) == len(labels):
        return None
    if missing:
        raise ValueError(f"{spec}: {split} row {missing[0]} and {len(missing) - 1} more have no {label!r}")
    if not isinstance(labels[0], str | int) or isinstance(labels[0], bool):
        raise ValueError(f"{spec}: {label!r} is {rows.features[label]}, expected class labels, integers or texts")
    return labels


def _check_same_names(spec: str, test: str, tested: Sequence[str] | None, learnt: Sequence[str] | None) -> None:
    """Rows have numbers, which each split names for itself."""
    for number, (one, other) in enumerate(zip_longest(learnt or (), tested or ())):
        if one != other:
            raise ValueError(
                f"{spec}: class {number} is {one!r} in train and {other!r} in {test}, expected the same names"
            )


def _image_set(
    spec: str,
    name: str,
    split: str,
    rows: "datasets.Dataset",
    image: str,
    labels: Sequence[int] | np.ndarray,
    beside: bytes,
) -> ImageSet:
    import datasets

    if image not in rows.features:
        raise ValueError(f"{spec}: {split} has no column {image!r}, but {list(rows.features)}")
    rows = rows.select_columns(image).cast_column(image, datasets.Image(decode=False)).with_format(None)
    return ImageSet(
        name=name,
        split=split,
        images=_Rows(rows),
        keys=_Keys(split, rows.num_rows),
        digest=sha256(_digest(rows, image) + beside).hexdigest(),
        labels=labels,
    )


def _folder_stamps(folder: Path) -> bytes:
    """Of the files of a local set that rows may be in; images have their own, and sets on the hub a version."""
    paths = [os.path.join(here, name) for here, _, names in os.walk(folder) for name in names]
    paths = sorted(path for path in paths if not path.lower().endswith(IMAGE_EXTENSIONS))
    return repr([os.path.relpath(path, folder) for path in paths]).encode() + stamps(folder, paths).tobytes()


def _digest(rows: "datasets.Dataset", image: str) -> bytes:
    """Of the sizes of the images; where they are files, of the names and `stamps` of these."""
    import pyarrow.compute as pc

    digest = sha256()
    for batch in rows.with_format("arrow").iter(1024):
        sizes = pc.binary_length(pc.struct_field(batch[image], "bytes")).fill_null(-1).to_numpy()
        digest.update(sizes.astype("<i8").tobytes())
        paths = [path or "" for path in pc.struct_field(batch[image], "path").to_pylist()]
        digest.update(repr([os.path.basename(path) for path in paths]).encode("utf-8", "surrogatepass"))
        digest.update(stamps("", [path for path, size in zip(paths, sizes, strict=True) if size < 0]).tobytes())
    return digest.digest()
