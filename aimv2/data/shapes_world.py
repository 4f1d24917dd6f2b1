"""The shapes world: scenes of coloured shapes, drawn with their masks, as a pure function of (seed, split, index).

All attributes are drawn independently and uniformly: the number of objects, then distinct places (the cells of a
grid), then shape, colour and size of each. Nothing about an object can be guessed from another one, from its place or
from the background, which is what makes the chance levels of the labels and questions exact. Last, each object's
centre is drawn within its cell, again until no two objects touch.

The canvas is square but in the mixed world: there each scene draws its aspect ratio, independently of all else, and
the area stays.

Pixels are xyxy with the origin at the top left corner, y downwards.
"""

import colorsys
import itertools
import math
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = ("red", "yellow", "green", "cyan", "blue", "purple")
SIZES = ("big", "small")
SPLITS = ("train", "validation", "test")

OVERSAMPLING = 8

# Degrees. At least 44 apart where the jitter is 8, so the names stay true after JPEG.
_HUES = {"red": 0, "yellow": 55, "green": 120, "cyan": 182, "blue": 226, "purple": 288}
_HUE_JITTER = 8
_RADII = {"big": (7.8, 8.6), "small": (4.9, 5.4)}  # pixels


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """One difficulty: 1 to `most_objects` objects on `grid` x `grid` cells."""

    name: str
    grid: int
    image_size: int  # pixels: the side of the canvas, or of the square of its area
    most_aspect: float = 1.0  # of width to height and of height to width
    most_objects: int
    turn: float  # largest rotation, degrees
    margin: float  # least distance of an object's centre from the edges of its cell, pixels
    contrast: tuple[float, float]  # least and most amplitude of the background's texture, of 255
    places: tuple[str, ...]  # in reading order


_CORNERS = ("top left", "top right", "bottom left", "bottom right")
WORLDS = {
    "quick": World(
        name="quick",
        grid=2,
        image_size=48,
        most_objects=2,
        turn=20.0,
        margin=8.0,
        contrast=(8.0, 16.0),
        places=_CORNERS,
    ),
    "full": World(
        name="full",
        grid=3,
        image_size=72,
        most_objects=3,
        turn=180.0,
        margin=4.0,
        contrast=(15.0, 40.0),
        places=(
            *("top left", "top", "top right"),
            *("left", "centre", "right"),
            *("bottom left", "bottom", "bottom right"),
        ),
    ),
    # Objects of the quick world's size in pixels, small against the canvas.
    "mixed": World(
        name="mixed",
        grid=2,
        image_size=96,
        most_aspect=2.0,
        most_objects=2,
        turn=20.0,
        margin=8.0,
        contrast=(8.0, 16.0),
        places=_CORNERS,
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
    """One drawn shape. `coverage` is its anti-aliased mask in a window of the image; its box is taken from it."""

    shape: str
    colour: str
    size: str
    place: str
    rgb: tuple[float, float, float]  # 0 to 255
    corner: tuple[int, int]  # x, y of the window's top left pixel
    coverage: np.ndarray = field(repr=False, compare=False)  # (H, W) float32 in [0, 1]

    @property
    def attributes(self) -> tuple[str, str, str, str]:
        return self.shape, self.colour, self.size, self.place

    @property
    def box(self) -> tuple[int, int, int, int]:
        """xyxy in pixels, right and bottom exclusive: pixels covered by a fifth or more, within 1 of the outline."""
        rows, columns = np.nonzero(self.coverage >= 0.2)
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
    canvas: tuple[int, int]  # width, height in pixels
    objects: tuple[Object, ...]

    def generator(self, stream: str) -> np.random.Generator:
        """A generator of this scene's own, for one of _STREAMS."""
        return _generator(self.seed, self.split, self.index, self.difficulty, stream)


_STREAMS = ("objects", "background", "captions", "references", "questions", "canvas")


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
    canvas = _canvas(_generator(seed, split, index, difficulty, "canvas"), board)
    rng = _generator(seed, split, index, difficulty, "objects")
    count = int(rng.integers(1, board.most_objects + 1))
    cells = sorted(rng.choice(len(board.places), size=count, replace=False).tolist())
    names = [tuple(options[rng.integers(len(options))] for options in (SHAPES, COLOURS, SIZES)) for _ in cells]
    radii = [rng.uniform(*_RADII[size]) for *_, size in names]
    centres = _centres(rng, board, canvas, cells, radii)
    objects = tuple(
        Object(
            shape=shape,
            colour=colour,
            size=size,
            place=board.places[cell],
            rgb=_shade(rng, colour),
            **_drawn(shape, radius, centre, rng.uniform(-board.turn, board.turn), canvas),
        )
        for (shape, colour, size), cell, radius, centre in zip(names, cells, radii, centres, strict=True)
    )
    return Scene(seed=seed, split=split, index=index, difficulty=difficulty, canvas=canvas, objects=objects)


def _canvas(rng: np.random.Generator, board: World) -> tuple[int, int]:
    """Width and height: their ratio log-uniform between `most_aspect` and its inverse, the area image_size^2."""
    furthest = math.log(board.most_aspect)
    width = round(board.image_size * math.exp(rng.uniform(-furthest, furthest) / 2))
    return width, round(board.image_size**2 / width)


def _centres(
    rng: np.random.Generator, board: World, canvas: tuple[int, int], cells: list[int], radii: list[float]
) -> np.ndarray:
    """Centres (objects, 2) in pixels: `margin` off their cells' edges, a pixel off the canvas's and one another."""
    reach = _REACH * np.array(radii)[:, None]
    cell_size = np.array(canvas) / board.grid
    first = cell_size * [(cell % board.grid, cell // board.grid) for cell in cells]  # top left corners of the cells
    low = np.maximum(first + board.margin, reach + 1)
    high = np.minimum(first + cell_size - board.margin, np.array(canvas) - 1 - reach)
    pairs = tuple(itertools.combinations(range(len(cells)), 2))
    while True:
        centres = rng.uniform(low, high)
        if all(math.dist(centres[i], centres[j]) > _REACH * (radii[i] + radii[j]) + 1 for i, j in pairs):
            return centres


def _shade(rng: np.random.Generator, colour: str) -> tuple[float, float, float]:
    hue = (_HUES[colour] + rng.uniform(-_HUE_JITTER, _HUE_JITTER)) % 360 / 360
    red, green, blue = colorsys.hsv_to_rgb(hue, rng.uniform(0.75, 1.0), rng.uniform(0.75, 1.0))
    return 255 * red, 255 * green, 255 * blue


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


def _drawn(shape: str, radius: float, centre: np.ndarray, turn: float, canvas_size: tuple[int, int]) -> dict:
    """The mask of one object and its window's corner. A pixel's value is its covered share, by supersampling."""
    corner = np.floor(centre - _REACH * radius).astype(int).clip(0)
    width, height = np.minimum(np.ceil(centre + _REACH * radius).astype(int), canvas_size) - corner
    cosine, sine = math.cos(math.radians(turn)), math.sin(math.radians(turn))
    rotation = np.array([(cosine, sine), (-sine, cosine)])
    canvas = Image.new("L", (int(width) * OVERSAMPLING, int(height) * OVERSAMPLING))
    draw = ImageDraw.Draw(canvas)
    for outlines, value in ((_OUTLINES, 255), (_HOLES, 0)):
        if shape in outlines:
            points = outlines[shape] @ rotation * radius + centre - corner  # (K, 2) pixels of the window
            draw.polygon((points * OVERSAMPLING - 0.5).ravel().tolist(), fill=value)
    coverage = np.asarray(canvas.reduce(OVERSAMPLING), dtype=np.float32) / 255
    return {"corner": (int(corner[0]), int(corner[1])), "coverage": coverage}


def render(scene: Scene) -> Image.Image:
    """Paint the objects over their background: an RGB image of the size of `scene.canvas`."""
    canvas = _background(scene.generator("background"), world(scene.difficulty), scene.canvas)  # (H, W, 3)
    for thing in scene.objects:
        x, y = thing.corner
        height, width = thing.coverage.shape
        window = canvas[y : y + height, x : x + width]
        window += thing.coverage[..., None] * (np.asarray(thing.rgb, dtype=np.float32) - window)
    return Image.fromarray((canvas + 0.5).clip(0, 255).astype(np.uint8))


def _background(rng: np.random.Generator, board: World, canvas: tuple[int, int]) -> np.ndarray:
    """A greyish texture (height, width, 3) float32: a ramp, stripes or clouds, faint and smooth.

    Smooth, because pixel targets are normalised patch by patch: in a patch of fine noise, however faint, all of the
    target would be unpredictable.
    """
    width, height = canvas
    grey = rng.uniform(70, 185) + rng.uniform(-12, 12, 3)
    x = np.arange(width, dtype=np.float32) - (width - 1) / 2
    y = (np.arange(height, dtype=np.float32) - (height - 1) / 2)[:, None]
    waves = {"ramp": 1, "stripes": 1, "clouds": 3}
    kind = tuple(waves)[rng.integers(len(waves))]
    texture = np.zeros((height, width), dtype=np.float32)
    for _ in range(waves[kind]):
        angle, phase = rng.uniform(0, 2 * np.pi, 2)
        along = x * math.cos(angle) + y * math.sin(angle)
        if kind == "ramp":
            texture += 2 * along / max(canvas)
        else:
            length = rng.uniform(10, 20) if kind == "stripes" else rng.uniform(24, 60)
            texture += np.sin(2 * np.pi * along / length + phase)
    strength = rng.uniform(*board.contrast) / waves[kind] ** 0.5 * rng.uniform(0.8, 1.2, 3)
    return (grey + texture[..., None] * strength).astype(np.float32)
