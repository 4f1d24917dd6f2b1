"""What a preparation looks like: samples.png, some of the samples kept; histograms.png, what the filters cut off."""

import math
import os
import re
import textwrap
import unicodedata
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from aimv2.data.images import BadImage, decode_image
from aimv2.data.shard_index import IMAGE_EXTENSIONS, read_index
from aimv2.data.tokenizer import clean_caption
from aimv2.ingest.filters import Filter
from aimv2.ingest.measures import find_caption, parse_json
from aimv2.ingest.prepared_folder import writing
from aimv2.ingest.selection import Selection
from aimv2.whole_files import whole_file

SAMPLES, ACROSS = 48, 8
CELL, CAPTION, MARGIN = 2.0, 0.85, 0.08  # inches: side of a picture's place, height of its caption's, between them
LINE, MOST_LINES = 28, 5  # characters, lines of a caption
MOST_PANELS, PANELS_ACROSS, MOST_BINS = 16, 4, 60
FIRST = ("min_side", "aspect", "image_bytes", "caption_tokens", "caption_characters", "caption_words")
NOT_DRAWN = ("id", "width", "height")
MOST_BOXES = 12  # characters
OUTER = 0.005  # share of the values beyond either end of a panel
FONTS = ("DejaVu Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "WenQuanYi Zen Hei", "Noto Sans Arabic")

_GLYPH = re.compile(r"Glyph (\d+) .*missing from")  # matplotlib's warning


def draw_samples(selection: Selection, where: str | None, out: Path) -> str:
    """Draw SAMPLES of the kept samples, chosen by a fixed seed, with their captions as the tokenizer sees them.

    Returns a line on the characters that no font here has, which are drawn as boxes; "" if there are none.

    Args:
        where: "txt" or "json:KEY"; None: no captions.
    """
    from matplotlib.figure import Figure

    chosen = _choose(selection)
    rows, columns = -(-len(chosen) // ACROSS), min(len(chosen), ACROSS)
    width, cell_height = columns * (CELL + MARGIN) + MARGIN, CELL + (CAPTION if where else 0) + MARGIN
    height = rows * cell_height + MARGIN + 0.4
    figure = Figure(figsize=(max(width, 5), height), dpi=100)
    figure.text(
        MARGIN / figure.get_figwidth(),
        1 - 0.28 / height,
        f"{len(chosen)} of the {selection.kept:,} samples kept, drawn at random",
        fontsize=11,
    )
    for place, (shard, row) in enumerate(chosen):
        left = MARGIN + place % ACROSS * (CELL + MARGIN)
        top = height - 0.4 - place // ACROSS * cell_height
        box = (left / figure.get_figwidth(), (top - CELL) / height, CELL / figure.get_figwidth(), CELL / height)
        axes = figure.add_axes(box)
        axes.set_axis_off()
        image, caption = _read(shard, row, where)
        if isinstance(image, str):
            axes.text(0.5, 0.5, textwrap.fill(image, LINE), ha="center", va="center", fontsize=8, color="tab:red")
        else:
            axes.imshow(image)
            axes.set_anchor("S")
        if where:
            _write(figure, left, top - CELL - 0.05, caption)
    return _boxes(_save(figure, out))


def _boxes(characters: set[str]) -> str:
    """What to say of characters that are drawn as boxes: their scripts, which are what fonts are made for."""
    if not characters:
        return ""
    scripts = {unicodedata.name(c, "UNKNOWN").split()[0].capitalize() if c.isalpha() else "symbols" for c in characters}
    some = " ".join(sorted(characters)[:MOST_BOXES])
    return f"Boxes in samples.png stand for characters that no font here has: {', '.join(sorted(scripts))} ({some})."


def _choose(selection: Selection) -> list[tuple[Path, int]]:
    """(shard, row) of some of the samples kept, in order."""
    ends = np.cumsum([selection.mask(number).sum() for number in range(len(selection.shards))])
    rng = np.random.default_rng(0)
    chosen = np.sort(rng.choice(selection.kept, min(SAMPLES, selection.kept), replace=False))
    places = []
    for n in chosen.tolist():
        shard = int(np.searchsorted(ends, n, side="right"))
        before = int(ends[shard - 1]) if shard else 0
        places.append((selection.shards[shard], int(np.flatnonzero(selection.mask(shard))[n - before])))
    return places


def _read(shard: Path, row: int, where: str | None) -> tuple[Image.Image | str, str]:
    """(the image, or why there is none; the clean caption)."""
    members: dict[str, bytes] = {}
    with open(shard, "rb", buffering=0) as file:
        for extension, offset, size, _ in read_index(shard).members(row):
            kind = "image" if extension in IMAGE_EXTENSIONS else extension
            if kind not in members:  # the first image, as in training
                members[kind] = os.pread(file.fileno(), size, offset)
    caption = find_caption(where, members.get("txt"), parse_json(members.get("json"))) if where else None
    try:
        image: Image.Image | str = decode_image(members.get("image", b""), draft_size=256)
        image.thumbnail((256, 256))
    except BadImage as error:
        image = str(error)
    return image, clean_caption(caption or "")


def _write(figure, x: float, y: float, caption: str) -> None:
    """Below and right of (x, y), in inches."""
    from matplotlib.transforms import Bbox, TransformedBbox

    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in caption) > len(caption) / 3
    lines = textwrap.wrap(caption, LINE // 2 if wide else LINE, max_lines=MOST_LINES, placeholder=" ...")
    style = {"color": "black"} if lines else {"color": "0.5", "style": "italic"}
    text = "\n".join(lines) or "(no caption: pixels only)"
    place = figure.dpi_scale_trans
    written = figure.text(x, y, text, va="top", fontsize=8, transform=place, family=_fonts(), parse_math=False, **style)
    written.set_clip_box(TransformedBbox(Bbox.from_bounds(x, y - CAPTION, CELL + MARGIN / 2, CAPTION + 0.05), place))
    written.set_clip_on(True)  # a line of wide letters ends at the next picture


def _fonts() -> list[str]:
    """Those of FONTS that there are; a sign that none of them has is drawn as a box."""
    from matplotlib.font_manager import fontManager

    present = set(fontManager.get_font_names())
    return [name for name in FONTS if name in present]


def draw_histograms(values: dict[str, np.ndarray], kept: np.ndarray, filters: Sequence[Filter], out: Path) -> Path:
    """Draw the columns, all samples in grey and those kept in blue, each filter's threshold as a dashed line.

    Args:
        values: column -> (n,), NaN where there is no value.
        kept: (n,) bool.
    """
    from matplotlib.figure import Figure

    names = _panels(values, filters)
    rows, columns = -(-len(names) // PANELS_ACROSS), min(len(names), PANELS_ACROSS)
    figure = Figure(figsize=(4 * columns, 2.7 * rows + 0.5), dpi=100, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, name in zip(panels, names, strict=False):
        _draw_panel(axes, name, values[name], kept, [f for f in filters if f.column == name])
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles[:2], labels[:2], loc="outside upper right", ncols=2, frameon=False)
    _save(figure, out)
    return out


def _panels(values: dict[str, np.ndarray], filters: Sequence[Filter]) -> list[str]:
    """What is filtered, then what is always of interest, then what else has different values."""
    first = dict.fromkeys((*(f.column for f in filters), *FIRST))
    others = [name for name in values if not name.startswith("caption_") and name not in NOT_DRAWN]
    names = [name for name in dict.fromkeys((*first, *others)) if name in values]
    present = [name for name in names if not np.isnan(values[name]).all()]
    varied = [name for name in present if name in first or np.nanmin(values[name]) < np.nanmax(values[name])]
    return varied[:MOST_PANELS]


def _draw_panel(axes, name: str, values: np.ndarray, kept: np.ndarray, filters: Sequence[Filter]) -> None:
    from matplotlib.ticker import MaxNLocator

    present = ~np.isnan(values)
    thresholds = [f.threshold for f in filters if math.isfinite(f.threshold)]
    low, high = np.quantile(values[present], (OUTER, 1 - OUTER))
    low, high = min(low, *thresholds) if thresholds else low, max(high, *thresholds) if thresholds else high
    logarithmic = low > 0 and high / low > 50
    edges = _edges(values[present], float(low), float(high), logarithmic)
    axes.hist(values[present], edges, color="0.8", label="all samples")
    axes.hist(values[present & kept], edges, color="tab:blue", alpha=0.75, label="kept")
    if logarithmic:
        axes.set_xscale("log")
    axes.margins(x=0.01)
    for f in filters:
        if math.isfinite(f.threshold):
            _draw_threshold(axes, f)
    axes.set_title(name, fontsize=10)
    axes.tick_params(labelsize=8)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.spines[["top", "right"]].set_visible(False)


def _draw_threshold(axes, f: Filter) -> None:
    axes.axvline(f.threshold, color="tab:red", linestyle="--", linewidth=1.2)
    right = axes.transData.transform((f.threshold, 0))[0] > axes.transAxes.transform((0.6, 0))[0]
    axes.annotate(
        f"{f.operator} {f.threshold:.4g}",
        (f.threshold, 1),
        xycoords=("data", "axes fraction"),
        xytext=(-3 if right else 3, -1),
        textcoords="offset points",
        ha="right" if right else "left",
        va="top",
        fontsize=8,
        color="tab:red",
    )


def _edges(values: np.ndarray, low: float, high: float, logarithmic: bool) -> np.ndarray:
    """Of bins; between whole numbers where there are few of them."""
    bins = min(MOST_BINS, 10 + int(len(values) ** 0.5))
    if high - low <= MOST_BINS and np.equal(values, np.round(values)).all():
        return np.arange(np.floor(low), np.floor(high) + 2) - 0.5
    if logarithmic:
        return np.geomspace(low, high, bins + 1)
    return np.linspace(low, high if high > low else low + 1, bins + 1)


def _save(figure, path: Path) -> set[str]:
    """Write the PNG, whole or not at all. Returns the characters that no font has."""
    with writing(path), whole_file(path) as temporary, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        figure.savefig(temporary, format="png")
    found = (_GLYPH.match(str(warning.message)) for warning in told)
    return {chr(int(match[1])) for match in found if match}
