"""Webdataset shards, and the shapes world that is written as such: labels and captions from their JSON.

The index beside each shard is built where it is missing.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from aimv2.data.images import BadImage
from aimv2.data.shapes_world import COLOURS, SHAPES, SIZES, World, world
from aimv2.data.shard_index import IMAGE_EXTENSIONS, read_index
from aimv2.data.shard_list import ShardEntry
from aimv2.data.shards import DamagedMember, Sample, Shards, ensure_indices, expand_shards
from aimv2.data.tar import ShardError, read_members
from aimv2.evals.datasets.interface import Box, Dataset, ImageSet, Texts
from aimv2.evals.datasets.labels import number_labels

SINGLE, SMALL = "single_", "small_"  # images of one object, of one small object
SHAPES_LABELS = (
    "shape",
    "shape_colour",
    "count",
    *(f"{of}{kind}" for of in (SINGLE, SMALL) for kind in ("shape", "shape_colour")),
)
CAPTION_KEYS = ("captions", "caption")  # of a sample's JSON

_MOST_CLS = 1000  # bytes
_INTEGER = re.compile("-?(0|[1-9][0-9]*)")  # 007 and 7 may be two classes
_COMMA = "; the comma comes between TRAIN and TEST, and can't be part of a path"
_LABEL = re.compile(r"(?P<shards>.*)@(?:json\.(?P<key>[^@/]+)|cls)")


class Members(Sequence[Any]):
    """Something of each sample of some shards, as `take` gets it from the sample."""

    def __init__(self, entries: list[ShardEntry], take: Callable[[Sample], Any], extensions: Sequence[str]):
        self.shards, self.take = Shards(entries, extensions), take

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, row: int) -> Any:
        """Raises ValueError naming the sample if what is asked for is not there or damaged."""
        try:
            return self.take(self.shards[row])
        except ShardError:
            raise
        except ValueError as error:
            raise ValueError(f"{self.shards.describe(row)}: {error}") from error


class _Images(Sequence[bytes]):
    """The first image of each sample."""

    def __init__(self, entries: list[ShardEntry]):
        self.shards = Shards(entries, IMAGE_EXTENSIONS)

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, row: int) -> bytes:
        """Raises BadImage if there is none, or it is damaged."""
        try:
            image = self.shards[row].image
        except DamagedMember as error:
            raise BadImage(str(error)) from error
        if image is None:
            raise BadImage("no image")
        return image


def open_shards(pattern: str, spec: str) -> Dataset:
    """`TRAIN,TEST@json.KEY`, `TRAIN,TEST@cls`, or `TEST` alone; without a label for retrieval.

    TRAIN and TEST are globs, ranges in braces or lists of shards. KEY leads to the label in each sample's JSON, with
    dots into objects ("labels.shape"): a text or an integer; with cls it is what the sample's cls member says, an
    integer if all are written as one. Classes are those that are found in TRAIN, sorted. Captions are the JSON's
    "captions" or "caption", else the txt. The report counts members that are not read and rows that are not selected.

    Raises:
        ShardError: a shard is missing or damaged.
        ValueError: a sample without a label, or a class to test that TRAIN has not.
    """
    match = _LABEL.fullmatch(pattern)
    patterns = (match["shards"] if match else pattern).split(",")
    if len(patterns) > 2:
        raise ValueError(f"{spec}: {len(patterns)} patterns, expected TRAIN,TEST or TEST{_COMMA}")
    try:
        splits = dict(zip(("test", "train"), map(open_split, reversed(patterns)), strict=False))
    except ShardError as error:
        raise ShardError(f"{error}{_COMMA if len(patterns) > 1 and ': no ' in str(error) else ''}") from error
    labels, classes, by_cls = {}, (), bool(match and match["key"] is None)
    if match:
        found = {split: _labels(entries, match["key"]) for split, entries in splits.items()}
        if by_cls and all(_INTEGER.fullmatch(label) for column in found.values() for label in column):
            found = {split: list(map(int, column)) for split, column in found.items()}
        labels, classes = number_labels(spec, found)
    sets = {split: _image_set("shards", split, entries, labels.get(split)) for split, entries in splits.items()}
    return Dataset(
        spec=spec,
        name="shards",
        classes=classes,
        train=sets.get("train"),
        test=sets["test"],
        report={"left_out": _left_out(splits, "cls" if by_cls else "")},
    )


def open_shapes(where: str, spec: str) -> Dataset:
    """`FOLDER[@shape|shape_colour|count|single_shape|single_shape_colour|small_shape|small_shape_colour]` (shape), of
    the folder that `data.shapes.write_shards` wrote.

    The class is that of the first object in reading order, or how many objects there are; with `single_`, only images
    of one object are taken, so that the class does not depend on an order; with `small_`, only of one small object.
    Templates are all captions of one object, in the three forms of the world's grammar. `boxes` have the class of each
    object, unless it is a count.

    Raises:
        ShardError: a shard is missing or damaged.
        ValueError: no such label, or other shards than of the shapes world.
    """
    folder, at, label = where.rpartition("@")
    if not at or "/" in label:
        folder, label = where, "shape"
    if label not in SHAPES_LABELS:
        raise ValueError(f"{spec}: label {label!r}, expected one of {', '.join(SHAPES_LABELS)}")
    name = label
    taken, label = next(((of, label.removeprefix(of)) for of in (SINGLE, SMALL) if label.startswith(of)), ("", label))
    splits = {split: open_split(os.path.join(folder, f"{split}-*.tar")) for split in ("train", "validation")}
    board = Members(splits["validation"], _board, ("json",))[0]
    sets = {}
    for split, entries in splits.items():
        labels = Members(entries, partial(_shapes_label, label=label), ("json",))
        boxes = None if label == "count" else Members(entries, partial(_boxes, label=label), ("json",))
        sets[split] = _image_set("shapes", split, entries, list(labels), boxes)
        if taken:
            sizes = Members(entries, _sizes, ("json",))
            allowed = (["big"], ["small"]) if taken == SINGLE else (["small"],)
            sets[split] = sets[split].subset([row for row, found in enumerate(sizes) if found in allowed])
    return Dataset(
        spec=spec,
        name=f"shapes {name}",
        classes=shapes_classes(label, board),
        train=sets["train"],
        test=sets["validation"],
        templates=shapes_templates(label, board),
        report={"left_out": _left_out(splits)},
    )


def shapes_classes(label: str, board: World) -> tuple[str, ...]:
    """The words that captions have for them, by number."""
    if label == "shape":
        return SHAPES
    if label == "shape_colour":
        return tuple(f"{colour} {shape}" for shape in SHAPES for colour in COLOURS)
    return tuple(str(number) for number in range(1, board.most_objects + 1))


def shapes_templates(label: str, board: World) -> tuple[str, ...] | None:
    """Captions of one object with "{}" for its class; None for a count, which no caption states."""
    if label == "count":
        return None
    things = [f"{colour} {{}}" for colour in COLOURS] if label == "shape" else ["{}"]
    forms = ("a {size} {thing} at {place}", "{place}: {size} {thing}", "the {thing} at {place} is {size}")
    return tuple(
        form.format(size=size, thing=thing, place=place)
        for form in forms
        for thing in things
        for place in board.places
        for size in SIZES
    )


def open_split(pattern: str) -> list[ShardEntry]:
    """The shards of a pattern, with their indices there."""
    shards = expand_shards(pattern)
    ensure_indices(shards)
    return [shard if isinstance(shard, ShardEntry) else _entry(shard) for shard in shards]


def _entry(path: Path) -> ShardEntry:
    index = read_index(path, columns=False)
    return ShardEntry(path, index.samples, index.identity)


def _left_out(splits: dict[str, list[ShardEntry]], read: str = "") -> dict[str, dict[str, int]]:
    """Of each split, members by their extension that no index has, but for those `read`, and rows not selected."""
    counts = {split: Counter() for split in splits}
    for split, entry in ((split, entry) for split, entries in splits.items() for entry in entries):
        index = read_index(entry.location, columns=False)
        counts[split]["rows not selected"] += index.rows - index.samples
        for extension, count in index.ignored.items():
            if not read or extension.lower() != read:
                counts[split][f"members by their extension: {'.' + extension if extension else 'none'}"] += count
    return {split: dict(sorted((+of).items())) for split, of in counts.items()}  # without zeros


def _image_set(
    name: str,
    split: str,
    entries: list[ShardEntry],
    labels: Sequence[int] | None,
    boxes: Members | None = None,
) -> ImageSet:
    keys = Texts(_keys(entries))
    return ImageSet(
        name=name,
        split=split,
        images=_Images(entries),
        keys=keys,
        digest=sha256("".join([keys.digest, *(entry.digest for entry in entries)]).encode()).hexdigest(),
        labels=labels,
        captions=Members(entries, _captions, ("txt", "json")),
        boxes=boxes,
    )


def _labels(entries: list[ShardEntry], key: str | None) -> list[str | int]:
    """Of all samples, by a key of their json, or by their cls."""
    if key is not None:
        return list(Members(entries, partial(_label, path=key.split(".")), ("json",)))
    return [label for entry in entries for label in _cls_labels(entry)]


def _cls_labels(entry: ShardEntry) -> Iterator[str]:
    """From the tar itself: no index knows where such members are."""
    labels = {}
    with open(entry.location, "rb", buffering=0) as file:
        for member in read_members(entry.location, file.fileno()):
            folder, slash, name = member.name.rpartition(b"/")
            stem, _, extension = name.partition(b".")
            if extension.lower() == b"cls":
                text = os.pread(file.fileno(), min(member.size, _MOST_CLS), member.offset).decode("utf-8", "replace")
                labels[(folder + slash + stem).decode("utf-8", "backslashreplace")] = text.strip()
    index = read_index(entry.location)
    for number in range(index.samples):
        key = index.key(index.row(number))
        label = labels.get(key)
        if not label:
            raise ValueError(f"{entry.location}: sample {key}: no cls member that holds a label")
        yield label


def _keys(entries: list[ShardEntry]) -> Iterator[str]:
    """SHARD/KEY, the shard relative to the folder that all are in."""
    folder = os.path.commonpath([entry.location.parent.absolute() for entry in entries])
    for entry in entries:
        index, shard = read_index(entry.location), os.path.relpath(entry.location, folder)
        for number in range(index.samples):
            yield f"{shard}/{index.key(index.row(number))}"


def _captions(sample: Sample) -> list[str]:
    """Those of the JSON, or else the txt. Raises ValueError if there are none."""
    record = _record(sample) if sample.json is not None else {}
    found = next((record[key] for key in CAPTION_KEYS if record.get(key)), None)
    if found is None and sample.text:
        found = sample.text.decode("utf-8", "replace").strip()
    captions = [found] if isinstance(found, str) else found
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"no captions: expected a txt, or in the json one of {', '.join(CAPTION_KEYS)}")
    return captions


def _record(sample: Sample) -> dict:
    try:
        record = json.loads(sample.json or b"")
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise ValueError("no json member that holds an object")
    return record


def _label(sample: Sample, path: Sequence[str]) -> str | int:
    value = _record(sample)
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise ValueError(f"json.{'.'.join(path)} is {value!r:.100}, expected a text or an integer")
    return value


def _board(sample: Sample) -> World:
    return world(_record(sample).get("difficulty"))


def _shapes_label(sample: Sample, label: str) -> int:
    value = _label(sample, ("labels", label))
    return value - 1 if label == "count" else value  # no scene is without an object


def _sizes(sample: Sample) -> list[str]:
    return [thing["size"] for thing in _record(sample)["objects"]]


def _boxes(sample: Sample, label: str) -> list[tuple[int, Box]]:
    record = _record(sample)
    size, found = record["image_size"], []
    sides = 2 * (size if isinstance(size, list) else [size, size])
    for thing in record["objects"]:
        shape, colour = SHAPES.index(thing["shape"]), COLOURS.index(thing["colour"])
        x0, y0, x1, y1 = (edge / side for edge, side in zip(thing["box"], sides, strict=True))
        found.append((shape if label == "shape" else shape * len(COLOURS) + colour, (x0, y0, x1, y1)))
    return found
