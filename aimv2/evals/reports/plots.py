"""The pictures of a report: encoders side by side, accuracy per layer, sweeps, shots, classes."""

import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from aimv2.evals.curves import save
from aimv2.evals.reports.files import Result
from aimv2.evals.reports.panels import RING, SERIES, Line, Panels, draw_levels, grid, having, short, sort_panels
from aimv2.evals.reports.sweeps import draw_sweep
from aimv2.evals.reports.table import Table
from aimv2.evals.results import Metric

PICTURES = {  # file -> title and what is to be seen
    "encoders.png": (
        "Encoders side by side",
        "Bars end at the value, whiskers are one standard error. Dashed: chance. Dotted: raw pixels.",
    ),
    "layers.png": (
        "Per layer",
        "Dots are single blocks, triangles means of several, placed at their middle, diamonds the encoder's output. "
        "A ring marks the layer that is quoted. The grey line stands at two thirds of the depth, where AIM found its "
        "features to peak.",
    ),
    "sweep.png": (
        "Sweeps",
        "What the choice was made on, of the layer that was chosen. A ring marks the choice.",
    ),
    "shots.png": ("Few shots", "Means over draws of images; whiskers are one standard error. All: the whole set."),
    "per_class.png": (
        "Per class",
        "Bars are the table's first encoder, dots are all. Of many classes the best and the worst are shown.",
    ),
}
MOST_CLASSES = 20
OUTPUT = 1.1  # of the depth: where the output is drawn, behind the last block

_SHOTS = re.compile(r"(.+)_(\d+)_shot")
_BLOCK, _MEAN = re.compile(r"block_(\d+)"), re.compile(r"blocks_(\d+)-(\d+)")


def draw_pictures(results: Sequence[Result], table: Table, folder: Path) -> list[Path]:
    """Draw those of PICTURES for which there is something to show; their paths."""
    try:
        from matplotlib import rc_context
    except ImportError as error:
        raise ImportError('pictures are drawn by matplotlib: pip install "aimv2[eval]"') from error
    panels = sort_panels(results, table)
    draw = {"encoders.png": _draw_encoders, "layers.png": _draw_layers, "sweep.png": draw_sweep}
    draw |= {"shots.png": _draw_shots, "per_class.png": _draw_classes}
    paths = []
    style = {"text.parse_math": False, "font.size": 9, "axes.titlesize": 10}  # a name may hold a $
    with rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a sign that no font here has is drawn as a box
        for name, function in draw.items():
            figure = function(panels)
            if figure is not None:
                paths.append(save(figure, folder / name))
    return paths


def layer_place(stream: str, depth: int) -> tuple[str, float] | None:
    """(kind, blocks run through) of a stream's name: its block's number from 1, the middle of several; None: no layer.

    The output, which has been through the final norm too, stands behind the last block.
    """
    if match := _BLOCK.fullmatch(stream):
        return "block", int(match[1]) + 1.0
    if match := _MEAN.fullmatch(stream):
        return "mean", (int(match[1]) + int(match[2])) / 2 + 1
    return ("output", OUTPUT * depth) if stream == "output" else None


def layer_metrics(result: Result) -> dict[str, Metric]:
    """Stream -> the headline's metric for it, in the order they were written."""
    base = result.headline.partition("@")[0]
    pairs = ((name.partition("@"), metric) for name, metric in result.metrics.items())
    return {stream: metric for (name, at, stream), metric in pairs if at and name == base}


def _draw_encoders(panels: Panels):
    def draw(axes, lines: list[Line], room: int) -> None:
        metrics = [line.result.metrics[line.result.headline] for line in lines]
        places = np.arange(len(lines))
        axes.barh(
            places,
            [100 * m.value for m in metrics],
            0.7,
            xerr=[100 * m.stderr for m in metrics],
            color=[line.colour for line in lines],
            error_kw={"elinewidth": 1, "capsize": 2, "ecolor": "0.2"},
        )
        for place, metric in zip(places, metrics, strict=True):
            x, box = 100 * (metric.value + metric.stderr) + 1.5, {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
            axes.text(x, place, f"{100 * metric.value:.1f}", va="center", size=8, bbox=box)  # over the lines of levels
        axes.set_yticks(places, [line.label for line in lines])
        axes.set_ylim(room - 0.4, -0.6)
        axes.set_xlim(0, 112)
        axes.set_xticks(range(0, 101, 25))
        axes.tick_params(axis="y", length=0)
        draw_levels(axes.axvline, lines)
        axes.set_xlabel("%")

    return grid(panels, draw, bars=len, encoders=False)


def _draw_layers(panels: Panels):
    swept = having(panels, _series)
    kinds = {kind for lines in swept.values() for line in lines for kind in _series(line.result)}

    def draw(axes, lines: list[Line], _) -> None:
        depths = {line.result.encoder["depth"] for line in lines}
        scale = depths.pop() if len(depths) == 1 else 1  # of different depths: shares of it
        for line in lines:
            for kind, points in _series(line.result).items():
                x, y, error = (np.array(values) for values in zip(*points, strict=True))
                marker, style, _ = SERIES[kind]
                x = x * scale / line.result.encoder["depth"]
                fmt = {"marker": marker, "markersize": 4, "linestyle": style, "linewidth": 1.3, "elinewidth": 1}
                axes.errorbar(x, 100 * y, 100 * error, color=line.colour, **fmt)
            if (quoted := quoted_layer(line.result)) is not None:
                axes.plot(quoted[0] * scale / line.result.encoder["depth"], 100 * quoted[1], color=line.colour, **RING)
        axes.axvline(scale * 2 / 3, color="0.6", linewidth=5, alpha=0.3, zorder=0)
        draw_levels(axes.axhline, lines)
        step = -(-scale // 8)
        ticks = [*range(step, scale + 1, step)] if scale > 1 else [0.2, 0.4, 0.6, 0.8, 1]
        axes.set_xticks([*ticks, OUTPUT * scale], [*(f"{tick:g}" for tick in ticks), "output"])
        axes.get_xticklabels()[-1].set_horizontalalignment("left")
        axes.set_xlim(0.5 if scale > 1 else 0, 1.17 * scale)
        axes.set_xlabel("blocks run through" if scale > 1 else "share of the blocks run through")
        axes.set_ylabel("%")
        axes.set_ylim(bottom=0)

    return grid(swept, draw, series=[kind for kind in SERIES if kind in kinds])


def _series(result: Result) -> dict[str, list[tuple[float, float, float]]]:
    """Kind -> (blocks run through, value, standard error), by the first. Pixels have no layers."""
    if result.is_floor:
        return {}
    series: dict[str, list[tuple[float, float, float]]] = {}
    for stream, metric in layer_metrics(result).items():
        place = layer_place(stream, result.encoder.get("depth", 1))
        if place is not None:
            series.setdefault(place[0], []).append((place[1], metric.value, metric.stderr))
    return {kind: sorted(points) for kind, points in series.items()}


def quoted_layer(result: Result) -> tuple[float, float] | None:
    """(blocks run through, value) of the layer that was chosen; None where that is none of the plot's."""
    stream = (result.details.get("selection") or {}).get("stream")
    metric = layer_metrics(result).get(stream)
    place = None if metric is None else layer_place(stream, result.encoder.get("depth", 1))
    return None if place is None else (place[1], metric.value)


def _draw_shots(panels: Panels):
    shown = having(panels, lambda result: shots(result)[1])

    def draw(axes, lines: list[Line], _) -> None:
        counts = sorted({count for line in lines for count, _ in shots(line.result)[1]})
        end = counts[-1] * (counts[-1] / counts[-2] if len(counts) > 1 else 2)
        for line in lines:
            whole, few = shots(line.result)
            style = {"color": line.colour, "markersize": 4, "elinewidth": 1}
            x, metrics = zip(*few, strict=True)
            y, error = ([100 * value for value in values] for values in zip(*map(_bar, metrics), strict=True))
            axes.errorbar(x, y, error, fmt="o-", linewidth=1.3, **style)
            axes.errorbar(end, *(100 * value for value in _bar(whole)), fmt="D", **style)
        draw_levels(axes.axhline, lines, ("chance",))
        axes.set_xscale("log")
        axes.set_xticks([*counts, end], [*map(str, counts), "all"])
        axes.minorticks_off()
        axes.set_xlabel("training images of each class")
        axes.set_ylabel("%")
        axes.set_ylim(bottom=0)

    return grid(shown, draw, levels=("chance",))


def shots(result: Result) -> tuple[Metric, list[tuple[int, Metric]]]:
    """(with all training images, [(images of each class, with so many)]), rising."""
    matches = ((_SHOTS.fullmatch(name), metric) for name, metric in result.metrics.items())
    few = [(int(match[2]), metric) for match, metric in matches if match and match[1] == result.headline]
    return result.metrics[result.headline], sorted(few, key=lambda pair: pair[0])


def _bar(metric: Metric) -> tuple[float, float]:
    return metric.value, metric.stderr


def _draw_classes(panels: Panels):
    known = having(panels, class_values)

    def classes(lines: list[Line]) -> int:
        return min(MOST_CLASSES, len(class_values(lines[0].result)))

    def draw(axes, lines: list[Line], room: int) -> None:
        tables = [class_values(line.result) for line in lines]
        names = sorted(tables[0], key=lambda name: -tables[0][name][0])
        if len(names) > MOST_CLASSES:
            names = names[: MOST_CLASSES // 2] + names[-MOST_CLASSES // 2 :]
        values, errors = ([100 * tables[0][name][part] for name in names] for part in (0, 1))
        style = {"color": lines[0].colour, "alpha": 0.45, "error_kw": {"elinewidth": 1, "ecolor": "0.4"}}
        axes.barh(range(len(names)), values, 0.7, xerr=errors, **style)
        for line, table in reversed(list(zip(lines, tables, strict=True))):  # the bars' own dots on top
            points = [(100 * table[name][0], place) for place, name in enumerate(names) if name in table]
            axes.plot(
                [x for x, _ in points], [y for _, y in points], "o", color=line.colour, markersize=4, clip_on=False
            )
        axes.set_yticks(range(len(names)), [short(name) for name in names])
        axes.set_ylim(room - 0.4, -0.6)
        axes.set_xlim(0, 101)
        axes.set_xlabel("IoU, %" if lines[0].result.headline.startswith("miou") else "%")
        draw_levels(axes.axvline, lines)

    return grid(known, draw, bars=classes)


def class_values(result: Result) -> dict[str, tuple[float, float]]:
    """Class -> (value, its standard error), of classes with test samples.

    Of patches it is the IoU, without a standard error: those of one image are not independent.
    """
    found = {}
    for name, entry in (result.details.get("per_class") or {}).items():
        value, n = entry["value"], entry["n"]
        if n and "iou" in entry:
            found[name] = (entry["iou"], 0.0)
        elif n:
            found[name] = (value, (value * (1 - value) / n) ** 0.5)
    return found
