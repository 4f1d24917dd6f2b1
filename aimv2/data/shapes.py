"""The embedded data set: the shapes world written as ordinary webdataset shards.

`FOLDER/train-000000.tar` ..., `FOLDER/validation-000000.tar` ... hold KEY.jpg, KEY.txt (one caption) and KEY.json
(see `encode_sample`). `FOLDER/recipe.json` appears last, so its presence says that the data are complete.
The world itself is in `shapes_world`, what is said of it in `shapes_language`.
"""

import io
import json
import multiprocessing
import os
import tarfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from aimv2.data.shapes_language import (
    Question,
    Reference,
    caption_entropy,
    captions,
    parse_caption,
    question_chances,
    questions,
    references,
)
from aimv2.data.shapes_world import COLOURS, SHAPES, SIZES, WORLDS, Object, Scene, World, render, scene, world

__all__ = [
    "COLOURS",
    "SHAPES",
    "SIZES",
    "WORLDS",
    "Object",
    "Question",
    "Reference",
    "Scene",
    "ShapesRecipe",
    "World",
    "caption_entropy",
    "captions",
    "encode_sample",
    "is_written",
    "parse_caption",
    "question_chances",
    "questions",
    "references",
    "render",
    "scene",
    "world",
    "write_shards",
]

# Goes up when the same recipe would give other samples.
VERSION = 1


@dataclass(slots=True, kw_only=True)
class ShapesRecipe:
    """Everything that decides the samples, and where they are written."""

    difficulty: str
    folder: str
    train: int
    validation: int
    seed: int = 0
    samples_per_shard: int = 1000

    def __post_init__(self):
        world(self.difficulty)
        if self.train < 1 or self.validation < 0 or self.samples_per_shard < 1 or self.seed < 0:
            raise ValueError(f"expected train and samples_per_shard >= 1, validation and seed >= 0, got {self}")


def is_written(recipe: ShapesRecipe) -> bool:
    """Whether the folder holds all shards of this recipe.

    Raises:
        ValueError: the folder holds (or has begun to hold) the data of another recipe; names what differs.
    """
    folder = Path(recipe.folder)
    for marker in _marked(folder):
        _check_same(json.loads(marker.read_text()), _contents(recipe), marker)
    return (folder / _DONE).is_file() and all((folder / name).is_file() for name, *_ in _shards(recipe))


def write_shards(recipe: ShapesRecipe, workers: int = 1, progress: Callable[[int], None] | None = None) -> Path:
    """Write the recipe's shards and return their folder. Shards that are already there are kept.

    The bytes of a shard depend on the recipe only. Each is written under a temporary name and renamed when complete.

    Args:
        workers: processes; with 1 everything happens in this one.
        progress: called in this process with the number of samples of each shard done (or found).

    Raises:
        ValueError: the folder holds the data of another recipe, or shards of no recipe at all.
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}, expected at least 1")
    folder = Path(recipe.folder)
    if not is_written(recipe):
        folder.mkdir(parents=True, exist_ok=True)
        strangers = [] if _marked(folder) else sorted(folder.glob("*.tar"))
        if strangers:
            raise ValueError(f"{folder} has {strangers[0].name} but no {_DONE}: expected an empty folder")
        temporary = _temporary(folder / _BEGUN)
        temporary.write_text(json.dumps(_contents(recipe), indent=2) + "\n")
        os.replace(temporary, folder / _BEGUN)
    jobs = [(recipe, *shard) for shard in _shards(recipe)]
    if workers == 1:
        _report(map(_write_shard, jobs), progress)
    else:
        # spawn: the caller may hold threads and a CUDA context, which do not survive a fork.
        with multiprocessing.get_context("spawn").Pool(min(workers, len(jobs))) as pool:
            _report(pool.imap_unordered(_write_shard, jobs), progress)
    if (folder / _BEGUN).is_file():
        os.replace(folder / _BEGUN, folder / _DONE)
    return folder


_BEGUN, _DONE = "recipe.unfinished.json", "recipe.json"


def _marked(folder: Path) -> list[Path]:
    return [folder / name for name in (_DONE, _BEGUN) if (folder / name).is_file()]


def _report(counts, progress: Callable[[int], None] | None) -> None:
    for count in counts:
        if progress is not None:
            progress(count)


def _contents(recipe: ShapesRecipe) -> dict:
    """The recipe as recorded: without its folder, which may be moved."""
    fields = asdict(recipe)
    del fields["folder"]
    return {"world": "shapes", "version": VERSION, **fields}


def _check_same(found: dict, expected: dict, marker: Path) -> None:
    for name in {**expected, **found}:
        if found.get(name) != expected.get(name):
            raise ValueError(
                f"{marker} says {name} = {found.get(name)!r}, the recipe says {expected.get(name)!r}: "
                "write to another folder or remove this one"
            )


def _shards(recipe: ShapesRecipe) -> list[tuple[str, str, range]]:
    """(file name, split, sample indices) of every shard."""
    step = recipe.samples_per_shard
    return [
        (f"{split}-{start // step:06d}.tar", split, range(start, min(start + step, total)))
        for split, total in (("train", recipe.train), ("validation", recipe.validation))
        for start in range(0, total, step)
    ]


def _write_shard(job: tuple[ShapesRecipe, str, str, range]) -> int:
    recipe, name, split, indices = job
    path = Path(recipe.folder, name)
    if not path.is_file():
        temporary = _temporary(path)
        with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
            for index in indices:
                sample = encode_sample(scene(recipe.seed, split, index, recipe.difficulty))
                for extension, data in sample.items():
                    member = tarfile.TarInfo(f"{index:09d}.{extension}")  # mtime, owner and mode are constants
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        os.replace(temporary, path)
    return len(indices)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def encode_sample(scene: Scene) -> dict[str, bytes]:
    """The members of one sample: extension -> bytes.

    `jpg` keeps full chroma (4:4:4), for colour is a label here. `txt` is the first caption. `json` holds

    - seed, split, index, difficulty, image_size (pixels);
    - captions: a list of strings;
    - objects: shape, colour, size, place, and box (xyxy pixels), in reading order;
    - labels: of the first object in reading order "shape" in [0, 6) and "shape_colour" = 6 * shape + colour in
      [0, 36), both uniform; and "count", the number of objects;
    - references and questions: the fields of Reference and Question.
    """
    jpeg = io.BytesIO()
    render(scene).save(jpeg, "JPEG", quality=92, subsampling=0)
    texts = captions(scene)
    first = scene.objects[0]
    shape, colour = SHAPES.index(first.shape), COLOURS.index(first.colour)
    record = {
        "seed": scene.seed,
        "split": scene.split,
        "index": scene.index,
        "difficulty": scene.difficulty,
        "image_size": scene.image_size,
        "captions": texts,
        "objects": [
            {"shape": o.shape, "colour": o.colour, "size": o.size, "place": o.place, "box": o.box}
            for o in scene.objects
        ],
        "labels": {"shape": shape, "shape_colour": shape * len(COLOURS) + colour, "count": len(scene.objects)},
        "references": [reference._asdict() for reference in references(scene)],
        "questions": [question._asdict() for question in questions(scene)],
    }
    return {
        "jpg": jpeg.getvalue(),
        "txt": texts[0].encode(),
        "json": json.dumps(record, separators=(",", ":")).encode(),
    }
