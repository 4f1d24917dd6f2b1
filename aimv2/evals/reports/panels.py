"""Panels in which a report draws: what is in each, and the figure around them.

One colour is one encoder, in all pictures of a report.
"""

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from aimv2.evals.reports.files import Result
from aimv2.evals.reports.table import Column, Table, data_titles, protocol_titles

MOST_PANELS, ACROSS = 24, 3
MOST_LABEL = 32  # characters of a name
BAR = 0.24  # inches
LEAST_BARS = 3  # that a panel has room for
CHANCE = {"color": "0.25", "linestyle": (0, (5, 3)), "linewidth": 1}
FLOOR = {"color": "0.25", "linestyle": (0, (1, 1.6)), "linewidth": 1.4}
RING = {"marker": "o", "markersize": 9, "markerfacecolor": "none", "linestyle": "none"}  # of what was chosen
LEVELS = {"chance": CHANCE, "raw pixels": FLOOR}
GREY = "0.55"  # of raw pixels
COLOURS = ("#1f6fb4", "#e07b1f", "#2f9e44", "#c92a4b", "#7b4fb0", "#8c6239", "#d657a5", "#17a2b0", "#9aa21b", "#4a5568")
SERIES = {  # of streams of layers: marker, line, and what it is
    "block": ("o", "-", "one block"),
    "mean": ("^", "--", "mean of several blocks, at their middle"),
    "output": ("D", "-", "output, after the final norm"),
}


@dataclass(frozen=True, slots=True)
class Line:
    """A result as a plot shows it: with its encoder's row in the table, and the column of its headline."""

    result: Result
    row: int
    label: str
    colour: str
    column: Column


Panels = dict[tuple[str, str], list[Line]]  # (data, protocol and metric) -> its results, the best encoder first


def sort_panels(results: Sequence[Result], table: Table) -> Panels:
    cells = {id(cell.result): (row, c) for c in table.headlines for row, cell in c.cells.items()}
    floors = {row for c in table.headlines for row, cell in c.cells.items() if cell.result.is_floor}
    trained = [row for row in range(len(table.rows)) if row not in floors]
    data, protocols = data_titles(results), protocol_titles(results)
    panels: Panels = {}
    for result in results:
        row, column = cells[id(result)]
        colour = GREY if row in floors else COLOURS[trained.index(row) % len(COLOURS)]
        title = (data[result.path], f"{protocols[result.path]} {result.headline}")
        panels.setdefault(title, []).append(Line(result, row, short(table.rows[row]), colour, column))
    return {title: sorted(panels[title], key=lambda line: line.row) for title in sorted(panels)}


def having(panels: Panels, found: Callable) -> Panels:
    """The results, and the panels, for which `found(result)` is not empty."""
    kept = {title: [line for line in lines if found(line.result)] for title, lines in panels.items()}
    return {title: lines for title, lines in kept.items() if lines}


def draw_levels(line_at: Callable, lines: Sequence[Line], levels: Sequence[str] = tuple(LEVELS)) -> None:
    for level in levels:
        value = _level(lines[0].column, level)
        if value is not None:
            line_at(100 * value, **LEVELS[level])


def _level(column: Column, level: str) -> float | None:
    if level == "chance":
        return column.chance
    return None if column.floor is None else column.floor.value


def grid(
    panels: Panels,
    draw: Callable,
    bars: Callable[[list[Line]], int] | None = None,
    encoders: bool = True,
    levels: Sequence[str] = tuple(LEVELS),
    series: Sequence[str] = (),
):
    """A figure with a panel for each title, `draw(axes, lines, room)`; None if there is none.

    Args:
        bars: how many bars a panel has; `room` is the most in its row of panels, which is as high as they need.
        encoders, levels, series: what the legend explains, of levels those that some panel has.
    """
    from matplotlib.figure import Figure

    if not panels:
        return None
    shown = list(panels.items())[:MOST_PANELS]
    across = 2 if len(shown) == 4 else min(ACROSS, len(shown))
    rows = [shown[start : start + across] for start in range(0, len(shown), across)]
    rooms = [max(LEAST_BARS, *(bars(lines) for _, lines in row)) if bars else 0 for row in rows]
    heights = [0.95 + BAR * room if bars else 3.2 for room in rooms]
    columns = [lines[0].column for _, lines in shown]
    levels = [level for level in levels if any(_level(column, level) is not None for column in columns)]
    handles = _handles(panels if encoders else {}, levels, series)
    legend_rows = -(-len(handles) // across)
    size = (4.6 * across + 0.3, sum(heights) + 0.22 * legend_rows + 0.2)
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    subplots = figure.subplots(len(rows), across, squeeze=False, height_ratios=heights)
    for of_row, row, room in zip(subplots, rows, rooms, strict=True):
        for axes, ((data, rest), lines) in zip(of_row, row, strict=False):
            draw(axes, lines, room)
            axes.set_title(short(data), loc="left", fontweight="bold", pad=17)
            axes.text(0, 1, short(rest, 60), transform=axes.transAxes, va="bottom", color="0.35", fontsize=8.5)
            axes.grid(alpha=0.25, axis="x" if bars else "both")
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
        for axes in of_row[len(row) :]:
            axes.set_axis_off()
    figure.legend(handles=handles, loc="outside lower center", ncols=across, frameon=False, fontsize=8.5)
    if len(panels) > len(shown):
        figure.suptitle(f"{len(shown)} of {len(panels)} panels", fontsize=9, color="0.4")
    return figure


def _handles(panels: Panels, levels: Sequence[str], series: Sequence[str]) -> list:
    from matplotlib.lines import Line2D

    encoders = dict(
        sorted({(line.row, line.label): line.colour for lines in panels.values() for line in lines}.items())
    )
    handles = [
        Line2D([], [], color=colour, marker="o", markersize=4, label=label) for (_, label), colour in encoders.items()
    ]
    handles += [Line2D([], [], label=level, **LEVELS[level]) for level in levels]
    for marker, style, words in (SERIES[kind] for kind in series):
        handles.append(Line2D([], [], color="0.3", marker=marker, linestyle=style, markersize=4, label=words))
    if series:
        handles.append(Line2D([], [], color="0.6", linewidth=5, alpha=0.3, label="two thirds of the blocks"))
    return handles


def short(name: str, most: int = MOST_LABEL) -> str:
    """For a plot: printable, and cut in the middle, since both ends tell names apart. Never hidden by a first "_"."""
    name = "".join(c if c.isprintable() else "?" for c in name)
    if sum(unicodedata.east_asian_width(c) in "WF" for c in name) > len(name) / 3:
        most //= 2  # letters twice as wide
    half = most // 2
    name = name if len(name) <= most else f"{name[: half - 1]}...{name[-half + 2 :]}"
    return f" {name}" if name.startswith("_") else name
