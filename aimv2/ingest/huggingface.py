"""A set of images and captions in Hugging Face's `datasets` to jobs for the shard writer.

From a folder on this machine (save_to_disk, parquet files, an imagefolder) or from the hub. Image bytes are taken as
the set holds them. No code of a set is run: `datasets` from version 4 on has no such thing.
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aimv2.data.images import MOST_BYTES, BadImage
from aimv2.data.shard_writer import Dropped, RawSample, ShardJob
from aimv2.ingest.pairs import CAPTION_KEYS, Packing, Unusable, as_captions, pack_pair, read_inside, shard_name

if TYPE_CHECKING:
    from datasets import Dataset, Features

_BATCH = 64  # rows at a time
_SAVED = ("dataset_info.json", "dataset_dict.json")  # what save_to_disk leaves
_WHOLE = ("train", "all")  # what a set that was saved without splits may be called


@dataclass(slots=True, kw_only=True)
class ImageSet:
    """The rows of one split.

    Args:
        name: a folder, or "owner/name" of a set on the hub.
        image_column: "" for the only column of images.
        caption_columns: of a caption each, of lists of them, or of class labels; none for "captions", "caption" or
            "text".

    Raises:
        ImportError: no `datasets`, or one that would run a set's code.
        ValueError: no such set, split or column, or several to choose from.
    """

    name: str
    split: str
    image_column: str = ""
    caption_columns: Sequence[str] = ()
    packing: Packing
    rows: int = field(init=False)
    notes: Counter[str] = field(default_factory=Counter)  # columns that JSON has no form for
    _fingerprint: str = field(init=False)
    _dataset: "Dataset" = field(init=False)

    def __post_init__(self):
        dataset = _load(self.name, self.split)
        features = dataset.features
        self.image_column = self._choose_image(features)
        self.caption_columns = self._choose_captions(features)
        self.rows, self._fingerprint = dataset.num_rows, dataset._fingerprint
        if not self.rows:
            raise ValueError(f"{self.name}: split {self.split!r} has no row")
        left_out = [n for n, f in features.items() if n != self.image_column and not _fits_json(f)]
        self.notes.update({f"column {name!r} left out, JSON has no form for it": self.rows for name in left_out})
        self._dataset = _undecoded(dataset.remove_columns(left_out), self.image_column)

    def __len__(self) -> int:
        return self.rows

    @property
    def opaque(self) -> dict[str, str]:
        return {"fingerprint": f"the rows of {self.name} are others"}

    @property
    def recipe(self) -> dict:
        return {
            "source": "huggingface",
            "rows": self.rows,
            "fingerprint": self._fingerprint,
            "split": self.split,
            "image_column": self.image_column,
            "caption_columns": list(self.caption_columns),
            **asdict(self.packing),
        }

    def jobs(self) -> Iterator[ShardJob]:
        size = self.packing.samples_per_shard
        roots = _allowed_roots(self.name)
        for first in range(0, self.rows, size):
            rows = self._dataset.select(range(first, min(first + size, self.rows)))
            columns = self.image_column, tuple(self.caption_columns)
            read = partial(_read, rows, self.split, first, *columns, roots, self.packing)
            yield ShardJob(shard_name(first, size), rows.num_rows, read)

    def _choose_image(self, features: "Features") -> str:
        import datasets

        found = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
        name = self.image_column or (found[0] if len(found) == 1 else "")
        if not name:
            raise ValueError(f"{self.name}: {len(found)} columns of images {found}: say which by --image-column")
        _check_column(self.name, features, name)
        feature = features[name]
        undeclared = isinstance(feature, dict) and {"bytes", "path"} <= feature.keys()  # images as parquet has them
        if not (name in found or undeclared or feature == datasets.Value("binary")):
            raise ValueError(f"{self.name}: column {name!r} is {feature}, expected images or their bytes")
        return name

    def _choose_captions(self, features: "Features") -> list[str]:
        names = list(self.caption_columns) or [name for name in CAPTION_KEYS if name in features][:1]
        if not names and not self.packing.allow_no_caption:
            columns = ", ".join(map(repr, features))
            raise ValueError(f"{self.name}: say by --caption-column which of {columns} has the captions")
        for name in names:
            _check_column(self.name, features, name)
        return names


def _load(name: str, split: str) -> "Dataset":
    try:
        import datasets
    except ImportError as error:
        raise ImportError('sets of Hugging Face need its package: pip install "aimv2[huggingface]"') from error
    if int(datasets.__version__.partition(".")[0]) < 4:
        raise ImportError(f'datasets {datasets.__version__} may run a set\'s code: pip install "aimv2[huggingface]"')
    try:
        if not any((Path(name) / file).is_file() for file in _SAVED):
            return datasets.load_dataset(name, split=split)
        loaded = datasets.load_from_disk(name)
    except (ValueError, RuntimeError, OSError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        hint = "" if Path(name).exists() else "; no such folder: for a set on the hub check its name and the network"
        raise ValueError(f"{name}: {said}{hint}") from error
    if isinstance(loaded, datasets.Dataset):
        if split not in _WHOLE:
            raise ValueError(f"{name}: no split {split!r}; it was saved without splits: --split all takes all of it")
        return loaded
    if split not in loaded:
        raise ValueError(f"{name}: no split {split!r}; it has {', '.join(map(repr, loaded))}")
    return loaded[split]


def _undecoded(dataset: "Dataset", column: str) -> "Dataset":
    import datasets

    dataset = dataset.with_format(None)
    if isinstance(dataset.features[column], datasets.Image):
        dataset = dataset.cast_column(column, datasets.Image(decode=False))
    return dataset


def _check_column(name: str, features: "Features", column: str) -> None:
    if column not in features:
        raise ValueError(f"{name}: no column {column!r}; it has {', '.join(map(repr, features))}")


def _fits_json(feature: Any) -> bool:
    """Whether a column is of texts, numbers and labels, or of lists and records of them."""
    import datasets

    if isinstance(feature, datasets.Value):
        return "binary" not in feature.dtype
    if isinstance(feature, datasets.List | datasets.LargeList):
        return _fits_json(feature.feature)
    if isinstance(feature, dict):
        return all(map(_fits_json, feature.values()))
    return isinstance(feature, datasets.ClassLabel)


def _allowed_roots(name: str) -> list[Path]:
    """Where images that a set only names may be: in its folder, or where Hugging Face keeps what it downloads."""
    import datasets
    import huggingface_hub

    if Path(name).is_dir():
        return [Path(name).resolve()]
    caches = datasets.config.DOWNLOADED_DATASETS_PATH, huggingface_hub.constants.HF_HUB_CACHE
    return [Path(cache).resolve() for cache in caches]


def _read(
    rows: "Dataset",
    split: str,
    first: int,
    image_column: str,
    caption_columns: tuple[str, ...],
    roots: list[Path],
    packing: Packing,
) -> Iterator[RawSample | Dropped]:
    labels = {name: f.names for name, f in rows.features.items() if hasattr(f, "names")}
    for start in range(0, rows.num_rows, _BATCH):
        columns = rows[start : start + _BATCH]
        for offset, values in enumerate(zip(*columns.values(), strict=True)):
            row = dict(zip(columns, values, strict=True))
            number = first + start + offset
            source = f"{split}: row {number}"
            for name, names in labels.items():
                row[name] = names[row[name]] if row[name] is not None and row[name] >= 0 else None
            try:
                image = _image_bytes(row.pop(image_column), roots)
                captions = [caption for name in caption_columns for caption in as_captions(row.pop(name, None))]
                yield pack_pair(f"{number:09d}", source, image, captions, row, packing)
            except (BadImage, Unusable) as reason:
                yield Dropped(source, str(reason))


def _image_bytes(value: Any, roots: list[Path]) -> bytes:
    if isinstance(value, bytes):
        return value
    if not value or (value["bytes"] is None and not value["path"]):
        raise Unusable("no image")
    if value["bytes"] is not None:
        return value["bytes"]
    path = Path(os.path.realpath(value["path"].replace("\0", "?")))
    for root in roots:
        if path.is_relative_to(root):
            return read_inside(root, str(path.relative_to(root)), MOST_BYTES, "image")
    raise Unusable("the image is outside the folder")
