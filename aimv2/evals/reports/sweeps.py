"""Panels of sweeps: what each setting gave, and which was chosen."""

from aimv2.evals.reports.files import Result
from aimv2.evals.reports.panels import RING, Line, Panels, grid, having, short

SWEPT = {"lr": "learning rate", "C": "C, the inverse of the penalty", "k": "k"}  # and what the axis is called
STYLES = ("-", "--", ":", "-.")  # of weight decays


def draw_sweep(panels: Panels):
    from matplotlib.ticker import LogLocator, NullFormatter

    swept = having(panels, sweep_lines)

    def draw(axes, lines: list[Line], _) -> None:
        decays = sorted({decay for line in lines for decay in sweep_lines(line.result)}, key=lambda d: (d is None, d))
        styles = {decay: STYLES[number % len(STYLES)] for number, decay in enumerate(decays)}
        axes.set_xscale("log")
        for line in lines:
            for decay, values in sweep_lines(line.result).items():
                x, y = zip(*values, strict=True)
                axes.plot(x, [100 * v for v in y], styles[decay], marker=".", color=line.colour, linewidth=1.2)
        low, high = axes.get_xlim()
        for line in lines:
            _ring_choice(axes, line, right=(low * high) ** 0.5)
        for decay in decays if decays != [None] else ():
            axes.plot([], [], styles[decay], color="0.3", label=f"weight decay {decay:g}")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(SWEPT[_swept(lines[0].result)])
        on_test = all(_choice_value(entry)[0] == "test" for entry in lines[0].result.details["sweep"])
        axes.set_ylabel("%, test" if on_test else "%, held out of training")
        axes.margins(y=0.12)
        if decays != [None]:
            axes.legend(fontsize=8, frameon=False)

    return grid(swept, draw, levels=())


def _ring_choice(axes, line: Line, right: float) -> None:
    """And the stream's name, if it was one of several, to the left of what is further right than `right`."""
    choice = chosen_setting(line.result)
    if choice is None:
        return
    x, y = choice
    axes.plot(x, 100 * y, color=line.colour, **RING)
    if len({entry.get("stream") for entry in line.result.details["sweep"]}) > 1:
        side, ha = (-6, "right") if x > right else (6, "left")
        place = {"xytext": (side, 5), "textcoords": "offset points", "ha": ha}
        stream = short(line.result.details["selection"]["stream"])
        axes.annotate(stream, (x, 100 * y), color=line.colour, fontsize=7.5, **place)


def chosen_setting(result: Result) -> tuple[float, float] | None:
    """(learning rate, C or k; value the choice was made on) of `details.selection`; None where nothing was chosen."""
    selection, name = result.details.get("selection") or {}, _swept(result)
    value = _choice_value(selection)[1]
    return None if name not in selection or value is None else (selection[name], value)


def sweep_lines(result: Result) -> dict[float | None, list[tuple[float, float]]]:
    """Weight decay -> (learning rate, C or k; value the choice was made on), rising, of the stream that was chosen.

    A few-shot result has a choice for each draw of images instead, which is no sweep.
    """
    name, stream = _swept(result), (result.details.get("selection") or {}).get("stream")
    lines: dict[float | None, list[tuple[float, float]]] = {}
    for entry in result.details.get("sweep") or ():
        value = _choice_value(entry)[1]
        of_chosen = stream is None or entry.get("stream") == stream
        if of_chosen and "shots" not in entry and entry.get(name) is not None and value is not None:
            lines.setdefault(entry.get("weight_decay"), []).append((entry[name], value))
    return {decay: sorted(values) for decay, values in lines.items()}


def _choice_value(entry: dict) -> tuple[str, float | None]:
    """Which split, and the value. A sweep's entry has the test set's as "top1", the selection as "test"."""
    if "held_out" in entry:
        return "held_out", entry["held_out"]
    return "test", entry.get("test", entry.get("top1"))


def _swept(result: Result) -> str | None:
    """Which of SWEPT the sweep is over."""
    first = next(iter(result.details.get("sweep") or [{}]))
    return next((name for name in SWEPT if name in first), None)
