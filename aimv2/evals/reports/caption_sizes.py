"""One picture of caption accuracy against the number of patches, a line for each model."""

from collections.abc import Sequence
from pathlib import Path

from aimv2.evals.curves import save
from aimv2.evals.reports.files import Result
from aimv2.evals.reports.panels import COLOURS, RING

PANELS = {
    "exact_set": "all images",
    "exact_set_tall": "tall",
    "exact_set_squarish": "squarish",
    "exact_set_wide": "wide",
}


def draw_sizes(results: Sequence[Result], out: Path) -> Path:
    """Draw results of `CaptionSizes` into the PNG `out` and return its path.

    A ring marks the number of patches that a model was trained at, if it is a single one. Whiskers are one standard
    error over images.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    models = list(dict.fromkeys(result.encoder["spec"] for result in results))
    shown = {metric: title for metric, title in PANELS.items() if any(metric in r.metrics for r in results)}
    ticks = sorted({result.details["patches"] for result in results})
    with rc_context({"text.parse_math": False, "font.size": 9}):
        figure = Figure(figsize=(1.2 + 3.3 * len(shown), 4.2), dpi=110, layout="constrained")
        panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
        for axes, (metric, title) in zip(panels, shown.items(), strict=True):
            for model, colour in zip(models, _colours(len(models)), strict=True):
                _draw_line(
                    axes, [r for r in results if r.encoder["spec"] == model and metric in r.metrics], metric, colour
                )
            axes.set_xscale("log")
            axes.set_xticks(ticks, [f"{patches:,}" for patches in ticks])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set(title=title, xlabel="patches an image")
            axes.margins(x=0.08, y=0.08)
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        panels[0].set_ylabel("captions with exactly the right objects, %")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(models)), frameon=False)
        return save(figure, out)


def _colours(number: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(number)]


def _draw_line(axes, results: Sequence[Result], metric: str, colour: str) -> None:
    results = sorted(results, key=lambda result: result.details["patches"])
    x = [result.details["patches"] for result in results]
    y = [100 * result.metrics[metric].value for result in results]
    errors = [100 * result.metrics[metric].stderr for result in results]
    label = results[0].encoder["name"] if results else None
    axes.errorbar(x, y, yerr=errors, color=colour, marker=".", linewidth=1.4, capsize=2, label=label)
    for patches, value, result in zip(x, y, results, strict=True):
        if patches == result.details.get("trained_patches"):
            axes.plot(patches, value, color=colour, **RING)
