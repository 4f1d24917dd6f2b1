"""Sets of Hugging Face's `datasets`: from the hub, or a folder (save_to_disk, parquet files, an imagefolder).

No code of a set is run: `datasets` from version 4 on has no such thing.
"""

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from aimv2.data.images import BadImage
from aimv2.evals.datasets.folder import read_file
from aimv2.evals.datasets.interface import Dataset, ImageSet
from aimv2.evals.datasets.labels import number_labels

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
    """`NAME[@label column]`: a folder, or "owner/name" of a set on the hub.

    It is trained on "train", if there is such a split, and tested on the first of TEST_NAMES that has labels; the
    report says which, and what is left unused. The label is a column of class labels, integers or texts; without a name
    the only one of class labels, whose classes are the set's own, seen in "train" or not. For integers and texts they
    are those found in "train", sorted.

    Raises:
        ImportError: no `datasets`, or one that would run a set's code.
        ValueError: no such set or column, several to choose from, nothing to test on, a row without a label, or a class
            to test that "train" has not.
    """
    name, _, label = where.partition("@")
    splits = _load(name)
    image, label = _choose_columns(spec, splits, label)
    labelled = {s: _labels(spec, s, splits[s], label) for s in ("train", *TEST_NAMES) if s in splits}
    test = next((s for s in TEST_NAMES if labelled.get(s) is not None), None)
    if test is None:
        raise ValueError(f"{spec}: no split to test on with labels: found {', '.join(splits)}, expected {TEST_NAMES}")
    train = "train" if labelled.get("train") is not None else None
    used = {"test": labelled[test]} | ({"train": labelled["train"]} if train else {})
    names = getattr(splits[test].features[label], "names", None)
    numbers, classes = (used, tuple(names)) if names else number_labels(spec, used)
    sets = {
        role: _image_set(name, split, splits[split], image, numbers[role])
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
    except (ValueError, RuntimeError, OSError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        hint = "" if folder.exists() else "; no such folder: for a set on the hub check its name and the network"
        raise ValueError(f"{name}: {said}{hint}") from error


def _choose_columns(spec: str, splits: "datasets.DatasetDict", label: str) -> tuple[str, str]:
    """The columns of the images and of the labels."""
    import datasets

    features = next(iter(splits.values())).features
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
    labels = rows.with_format(None)[label][:]
    missing = [row for row, value in enumerate(labels) if value is None or value == -1]
    if len(missing) == len(labels):
        return None
    if missing:
        raise ValueError(f"{spec}: {split} row {missing[0]} and {len(missing) - 1} more have no {label!r}")
    if not isinstance(labels[0], str | int) or isinstance(labels[0], bool):
        raise ValueError(f"{spec}: {label!r} is {rows.features[label]}, expected class labels, integers or texts")
    return labels


def _image_set(
    name: str, split: str, rows: "datasets.Dataset", image: str, labels: Sequence[int] | np.ndarray
) -> ImageSet:
    import datasets

    rows = rows.select_columns(image).cast_column(image, datasets.Image(decode=False)).with_format(None)
    return ImageSet(
        name=Path(name).name,
        split=split,
        images=_Rows(rows),
        keys=_Keys(split, rows.num_rows),
        digest=_digest(rows, image),
        labels=labels,
    )


def _digest(rows: "datasets.Dataset", image: str) -> str:
    """Of the sizes of the images, or of the names of their files."""
    import pyarrow.compute as pc

    digest = sha256()
    for batch in rows.with_format("arrow").iter(1024):
        sizes = pc.binary_length(pc.struct_field(batch[image], "bytes")).fill_null(-1)
        digest.update(sizes.to_numpy().astype("<i8").tobytes())
        for path in pc.struct_field(batch[image], "path").to_pylist():
            digest.update(repr(path and Path(path).name).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
