"""The shapes world: scenes of coloured shapes, drawn with their masks, as a pure function of (seed, split, index).

A scene lies on a grid of square cells, each with room for one object, so objects never overlap. All attributes are
drawn independently and uniformly: the number of objects, then distinct places, then shape, colour and size of each.
Nothing about an object can be guessed from another one, from its place or from the background, which is what makes
the chance levels of the labels and questions exact.

Pixels are xyxy with the origin at the top left corner, y downwards.
"""

import colorsys
import math
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = ("red", "yellow", "green", "cyan", "blue", "purple")
SIZES = ("big", "small")
SPLITS = ("train", "validation", "test")

CELL = 24  # pixels; one object each
OVERSAMPLING = 8

# Degrees. At least 44 apart where the jitter is 8, so the names stay true after JPEG.
_HUES = {"red": 0, "yellow": 55, "green": 120, "cyan": 182, "blue": 226, "purple": 288}
_HUE_JITTER = 8
_RADII = {"big": (7.8, 8.6), "small": (4.9, 5.4)}  # pixels
_SHIFTS = {"big": 1.0, "small": 4.0}  # largest shift from the cell's centre along x and y, pixels


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """One difficulty: a `grid` x `grid` board of cells, 1 to `most_objects` objects, each turned by up to `turn` degrees."""

    name: str
    grid: int
    most_objects: int
    turn: float
    places: tuple[str, ...]  # in reading order

    @property
    def image_size(self) -> int:
        return CELL * self.grid


WORLDS = {
    "quick": World(
        name="quick",
        grid=2,
        most_objects=2,
        turn=20.0,
        places=("top left", "top right", "bottom left", "bottom right"),
    ),
    "full": World(
        name="full",
        grid=3,
        most_objects=3,
        turn=180.0,
        places=(
            *("top left", "top", "top right"),
            *("left", "centre", "right"),
            *("bottom left", "bottom", "bottom right"),
        ),
    ),
}


def world(difficulty: str) -> World:
    """The world of that difficulty.

    Raises:
        ValueError: no such difficulty.
    """
    if difficulty not in WORLDS:
        raise ValueError(f"difficulty is {difficulty!r}, expected one of {', '.join(WORLDS)}")
    return WORLDS[difficulty]


@dataclass(frozen=True, slots=True, kw_only=True)
class Object:
    """One drawn shape. `coverage` is its cell's anti-aliased mask; the box is that of the mask's pixels."""

    shape: str
    colour: str
    size: str
    place: str
    rgb: tuple[float, float, float]  # 0 to 255
    corner: tuple[int, int]  # x, y of the cell's top left pixel
    coverage: np.ndarray = field(repr=False, compare=False)  # (CELL, CELL) float32 in [0, 1]

    @property
    def attributes(self) -> tuple[str, str, str, str]:
        return self.shape, self.colour, self.size, self.place

    @property
    def box(self) -> tuple[int, int, int, int]:
        """xyxy in pixels, right and bottom exclusive: the pixels covered by half or more."""
        rows, columns = np.nonzero(self.coverage >= 0.5)
        x, y = self.corner
        return (
            x + int(columns.min()),
            y + int(rows.min()),
            x + int(columns.max()) + 1,
            y + int(rows.max()) + 1,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What is to be seen in sample `index` of `split`. Objects are in reading order (rows from the top)."""

    seed: int
    split: str
    index: int
    difficulty: str
    objects: tuple[Object, ...]

    @property
    def image_size(self) -> int:
        return world(self.difficulty).image_size

    def generator(self, stream: str) -> np.random.Generator:
        """A generator of this scene's own for "objects", "background", "captions" or "questions"."""
        return _generator(self.seed, self.split, self.index, self.difficulty, stream)


_STREAMS = ("objects", "background", "captions", "questions")


def _generator(seed: int, split: str, index: int, difficulty: str, stream: str) -> np.random.Generator:
    numbers = (seed, SPLITS.index(split), index, tuple(WORLDS).index(difficulty), _STREAMS.index(stream))
    return np.random.default_rng(numbers)


def scene(seed: int, split: str, index: int, difficulty: str) -> Scene:
    """Draw scene `index` of a split: a pure function of its arguments.

    Raises:
        ValueError: a negative seed or index, an unknown split or difficulty.
    """
    board = world(difficulty)
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, expected one of {', '.join(SPLITS)}")
    if seed < 0 or index < 0:
        raise ValueError(f"seed and index are {seed} and {index}, expected at least 0")
    rng = _generator(seed, split, index, difficulty, "objects")
    count = int(rng.integers(1, board.most_objects + 1))
    cells = sorted(rng.choice(len(board.places), size=count, replace=False).tolist())
    objects = tuple(_draw_object(rng, board, cell) for cell in cells)
    return Scene(seed=seed, split=split, index=index, difficulty=difficulty, objects=objects)


def _draw_object(rng: np.random.Generator, board: World, cell: int) -> Object:
    shape, colour = (names[rng.integers(len(names))] for names in (SHAPES, COLOURS))
    size = SIZES[rng.integers(len(SIZES))]
    radius = rng.uniform(*_RADII[size])
    shift = rng.uniform(-_SHIFTS[size], _SHIFTS[size], 2)
    turn = math.radians(rng.uniform(-board.turn, board.turn))
    hue = (_HUES[colour] + rng.uniform(-_HUE_JITTER, _HUE_JITTER)) % 360 / 360
    rgb = colorsys.hsv_to_rgb(hue, rng.uniform(0.75, 1.0), rng.uniform(0.75, 1.0))
    row, column = divmod(cell, board.grid)
    return Object(
        shape=shape,
        colour=colour,
        size=size,
        place=board.places[cell],
        rgb=tuple(255 * channel for channel in rgb),
        corner=(column * CELL, row * CELL),
        coverage=_coverage(shape, radius, shift, turn),
    )


def _regular(corners: int, radius: float) -> np.ndarray:
    angle = 2 * np.pi * np.arange(corners) / corners
    return radius * np.stack((np.sin(angle), -np.cos(angle)), axis=1)


def _star(outer: float, inner: float) -> np.ndarray:
    points = _regular(10, outer)
    points[1::2] *= inner / outer
    return points


def _cross(length: float, width: float) -> np.ndarray:
    quarter = np.array([(-width, -length), (width, -length), (width, -width)])
    turn = np.array([(0, 1), (-1, 0)])  # (x, y) @ turn is a quarter turn clockwise on the screen
    return np.concatenate([quarter @ np.linalg.matrix_power(turn, k) for k in range(4)])


# Outlines at radius 1, each made about as heavy to the eye as the circle; no point is further out than _REACH.
_OUTLINES = {
    "circle": _regular(48, 1.0),
    "square": _regular(4, 1.2) @ np.array([(1, 1), (-1, 1)]) / math.sqrt(2),
    "triangle": _regular(3, 1.25),
    "star": _star(1.25, 0.5),
    "cross": _cross(1.15, 0.36),
    "ring": _regular(48, 1.05),
}
_HOLES = {"ring": _regular(48, 0.6)}
_REACH = 1.26


def _coverage(shape: str, radius: float, shift: np.ndarray, turn: float) -> np.ndarray:
    """The cell's mask (CELL, CELL) float32: the covered share of each pixel, by supersampling."""
    cosine, sine = math.cos(turn), math.sin(turn)
    rotation = np.array([(cosine, sine), (-sine, cosine)])
    canvas = Image.new("L", (CELL * OVERSAMPLING, CELL * OVERSAMPLING))
    draw = ImageDraw.Draw(canvas)
    for outlines, value in ((_OUTLINES, 255), (_HOLES, 0)):
        if shape in outlines:
            points = outlines[shape] @ rotation * radius + CELL / 2 + shift  # (K, 2) pixels of the cell
            draw.polygon((points * OVERSAMPLING - 0.5).ravel().tolist(), fill=value)
    return np.asarray(canvas.reduce(OVERSAMPLING), dtype=np.float32) / 255


def render(scene: Scene) -> Image.Image:
    """Paint the objects over their background: an RGB image of `scene.image_size` squared."""
    canvas = _background(scene.generator("background"), scene.image_size)  # (H, W, 3)
    for thing in scene.objects:
        x, y = thing.corner
        cell = canvas[y : y + CELL, x : x + CELL]
        cell += thing.coverage[..., None] * (np.asarray(thing.rgb, dtype=np.float32) - cell)
    return Image.fromarray((canvas + 0.5).clip(0, 255).astype(np.uint8))


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """A greyish texture (size, size, 3) float32: a ramp, stripes or clouds, faint and smooth.

    Smooth, because pixel targets are normalised patch by patch: in a patch of fine noise, however faint, all of the
    target would be unpredictable.
    """
    grey = rng.uniform(70, 185) + rng.uniform(-12, 12, 3)
    y, x = np.mgrid[:size, :size].astype(np.float32)
    waves = {"ramp": 1, "stripes": 1, "clouds": 3}
    kind = tuple(waves)[rng.integers(len(waves))]
    texture = np.zeros((size, size), dtype=np.float32)
    for _ in range(waves[kind]):
        angle, phase = rng.uniform(0, 2 * np.pi, 2)
        along = x * math.cos(angle) + y * math.sin(angle)
        if kind == "ramp":
            texture += 2 * (along - along.mean()) / size
        else:
            length = rng.uniform(10, 20) if kind == "stripes" else rng.uniform(24, 60)
            texture += np.sin(2 * np.pi * along / length + phase)
    strength = rng.uniform(8, 16) / waves[kind] ** 0.5 * rng.uniform(0.8, 1.2, 3)
    return (grey + texture[..., None] * strength).astype(np.float32)
