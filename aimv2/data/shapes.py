"""The embedded data set: the shapes world written as ordinary webdataset shards.

`FOLDER/train-000000.tar` ..., `FOLDER/validation-000000.tar` ... hold KEY.jpg, KEY.txt (one caption) and KEY.json
(see `encode_sample`). `FOLDER/recipe.json` appears last, so its presence says that the data are complete.
The world itself is in `shapes_world`, what is said of it in `shapes_language`.
"""

import io
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from aimv2.data import shard_writer
from aimv2.data.processes import run_jobs
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
from aimv2.data.shard_writer import RawSample

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
    complete = shard_writer.is_complete(folder, _contents(recipe))
    return complete and all((folder / name).is_file() for name, *_ in _shards(recipe))


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
    shard_writer.begin(folder, _contents(recipe))
    for count in run_jobs(partial(_write_shard, recipe), _shards(recipe), workers):
        if progress is not None:
            progress(count)
    shard_writer.finish(folder)
    return folder


def _contents(recipe: ShapesRecipe) -> dict:
    """The recipe as recorded: without its folder, which may be moved."""
    fields = asdict(recipe)
    del fields["folder"]
    return {"world": "shapes", "version": VERSION, **fields}


def _shards(recipe: ShapesRecipe) -> list[tuple[str, str, range]]:
    """(file name, split, sample indices) of every shard."""
    step = recipe.samples_per_shard
    return [
        (f"{split}-{start // step:06d}.tar", split, range(start, min(start + step, total)))
        for split, total in (("train", recipe.train), ("validation", recipe.validation))
        for start in range(0, total, step)
    ]


def _write_shard(recipe: ShapesRecipe, shard: tuple[str, str, range]) -> int:
    name, split, indices = shard
    path = Path(recipe.folder, name)
    if not path.is_file():
        scenes = (scene(recipe.seed, split, index, recipe.difficulty) for index in indices)
        shard_writer.write_tar(path, (RawSample(f"{s.index:09d}", encode_sample(s)) for s in scenes))
    return len(indices)


def encode_sample(scene: Scene) -> dict[str, bytes]:
    """The members of one sample: extension -> bytes.

    `jpg` keeps full chroma (4:4:4), for colour is a label here. `txt` is the first caption. `json` holds

    - seed, split, index, difficulty;
    - image_size in pixels: a number, or [width, height] in a world whose canvas is not always square;
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
        "image_size": scene.canvas if world(scene.difficulty).most_aspect > 1 else scene.canvas[0],
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
