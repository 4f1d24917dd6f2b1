"""The pictures of a report: encoders side by side, accuracy per layer, sweeps, classes."""

import math
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from aimv2.evals.curves import save
from aimv2.evals.reports.files import Result
from aimv2.evals.reports.panels import SERIES, Line, Panels, draw_levels, grid, short, sort_panels
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
        "The grey line stands at two thirds of the depth, where AIM found its features to peak.",
    ),
    "sweep.png": ("Sweeps", "Accuracy on what the choice was made on. A ring marks the choice."),
    "per_class.png": (
        "Per class",
        "Bars are the best encoder, dots the others. Of many classes the best and the worst are shown.",
    ),
}
MOST_CLASSES = 20
SWEPT = {"lr": "learning rate", "C": "C, the inverse of the penalty", "k": "k"}  # and what the axis is called
OUTPUT = 1.1  # of the depth: where the output is drawn, behind the last block

_BLOCK, _MEAN = re.compile(r"block_(\d+)"), re.compile(r"blocks_(\d+)-(\d+)")


def draw_pictures(results: Sequence[Result], table: Table, folder: Path) -> list[Path]:
    """Draw those of PICTURES for which there is something to show; their paths."""
    try:
        from matplotlib import rc_context
    except ImportError as error:
        raise ImportError('pictures are drawn by matplotlib: pip install "aimv2[eval]"') from error
    panels = sort_panels(results, table)
    draw = {"encoders.png": _draw_encoders, "layers.png": _draw_layers, "sweep.png": _draw_sweep}
    draw |= {"per_class.png": _draw_classes}
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
            axes.text(100 * (metric.value + metric.stderr) + 1, place, f"{100 * metric.value:.1f}", va="center", size=8)
        axes.set_yticks(places, [line.label for line in lines])
        axes.set_ylim(room - 0.4, -0.6)
        axes.set_xlim(0, 112)
        axes.set_xticks(range(0, 101, 25))
        axes.tick_params(axis="y", length=0)
        draw_levels(axes.axvline, lines)
        axes.set_xlabel("%")

    return grid(panels, draw, bars=len, encoders=False)


def _draw_layers(panels: Panels):
    swept = {title: [line for line in lines if _series(line.result)] for title, lines in panels.items()}
    swept = {title: lines for title, lines in swept.items() if lines}
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
        axes.axvline(scale * 2 / 3, color="0.6", linewidth=5, alpha=0.3, zorder=0)
        draw_levels(axes.axhline, lines)
        step = -(-scale // 8)
        ticks = [*range(step, scale + 1, step)] if scale > 1 else [0.2, 0.4, 0.6, 0.8, 1]
        axes.set_xticks([*ticks, OUTPUT * scale], [*(f"{tick:g}" for tick in ticks), "output"])
        axes.get_xticklabels()[-1].set_horizontalalignment("left")
        axes.set_xlim(0.5 if scale > 1 else 0, 1.17 * scale)
        axes.set_xlabel("blocks" if scale > 1 else "share of the blocks")
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


def _draw_sweep(panels: Panels):
    from matplotlib.ticker import LogLocator, NullFormatter

    swept = {title: [line for line in lines if sweep_lines(line.result)] for title, lines in panels.items()}
    swept = {title: lines for title, lines in swept.items() if lines}

    def draw(axes, lines: list[Line], _) -> None:
        styles = ("-", "--", ":", "-.")
        decays = sorted({decay for line in lines for decay in sweep_lines(line.result)}, key=lambda d: (d is None, d))
        for line in lines:
            points = sweep_lines(line.result)
            for decay, values in points.items():
                x, y = zip(*values, strict=True)
                style = styles[decays.index(decay) % len(styles)]
                axes.plot(x, [100 * v for v in y], style, marker=".", color=line.colour, linewidth=1.2)
            best = max((v for values in points.values() for v in values), key=lambda point: point[1])
            axes.plot(best[0], 100 * best[1], "o", markersize=9, markerfacecolor="none", color=line.colour)
        for decay in decays if decays != [None] else ():
            axes.plot([], [], styles[decays.index(decay) % len(styles)], color="0.3", label=f"weight decay {decay:g}")
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(SWEPT[_swept(lines[0].result)])
        axes.set_ylabel("%")
        if decays != [None]:
            axes.legend(fontsize=8, frameon=False)

    return grid(swept, draw, levels=False)


def sweep_lines(result: Result) -> dict[float | None, list[tuple[float, float]]]:
    """Weight decay -> (learning rate, C or k; value the choice was made on), rising; of other settings the best."""
    name = _swept(result)
    highest: dict[float | None, dict[float, float]] = {}
    for entry in result.details.get("sweep") or ():
        rate, decay, value = entry.get(name), entry.get("weight_decay"), entry.get("held_out", entry.get("top1"))
        if rate is not None and value is not None and math.isfinite(value):
            values = highest.setdefault(decay, {})
            values[rate] = max(value, values.get(rate, 0.0))
    return {decay: sorted(values.items()) for decay, values in highest.items()}


def _swept(result: Result) -> str | None:
    """Which of SWEPT the sweep is over."""
    first = next(iter(result.details.get("sweep") or [{}]))
    return next((name for name in SWEPT if name in first), None)


def _draw_classes(panels: Panels):
    known = {title: [line for line in lines if line.result.details.get("per_class")] for title, lines in panels.items()}
    known = {title: lines for title, lines in known.items() if lines}

    def classes(lines: list[Line]) -> int:
        return min(MOST_CLASSES, len(lines[0].result.details["per_class"]))

    def draw(axes, lines: list[Line], room: int) -> None:
        tables = [line.result.details["per_class"] for line in lines]
        names = [name for name, entry in tables[0].items() if entry["n"]]
        names.sort(key=lambda name: -tables[0][name]["value"])
        if len(names) > MOST_CLASSES:
            names = names[: MOST_CLASSES // 2] + names[-MOST_CLASSES // 2 :]
        places = np.arange(len(names))
        values = np.array([tables[0][name]["value"] for name in names])
        errors = np.sqrt(values * (1 - values) / np.array([tables[0][name]["n"] for name in names]))
        axes.barh(
            places,
            100 * values,
            0.7,
            xerr=100 * errors,
            color=lines[0].colour,
            alpha=0.45,
            error_kw={"elinewidth": 1, "ecolor": "0.4"},
        )
        for line, table in zip(lines, tables, strict=True):
            found = [(table[name]["value"], place) for name, place in zip(names, places, strict=True) if name in table]
            x, y = zip(*((100 * value, place) for value, place in found if value is not None), strict=True)
            axes.plot(x, y, "o", color=line.colour, markersize=4)
        axes.set_yticks(places, [short(name) for name in names])
        axes.set_ylim(room - 0.4, -0.6)
        axes.set_xlim(0, 101)
        axes.set_xlabel("%")
        draw_levels(axes.axvline, lines)

    return grid(known, draw, bars=classes)
