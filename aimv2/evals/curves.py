"""loss.png: how a run went, from its metrics.jsonl."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aimv2.logger import read_metrics
from aimv2.whole_files import whole_file

MOST_MARKED = 30  # points; more are a line without markers
WINDOWS = 60  # half widths of the running mean in a run
REFERENCE = {"color": "0.4", "linestyle": "--", "linewidth": 1}
LOG_FROM = 5.0  # highest over lowest caption loss


def draw_losses(metrics: str | Path, out: str | Path) -> Path:
    """Draw training and validation losses over the steps into the PNG `out` and return its path.

    One panel for pixels, one for captions: each logged value faint, their running mean, and the validation points.
    Dashed: the pixel loss of predicting every patch's mean, which is 1, and the entropy of the captions where the
    evaluation knows it. Values that were not finite are left out.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    steps, evaluations = read_metrics(metrics)
    validation = [line for line in evaluations if line["eval"] == "validation"]
    figure = Figure(figsize=(12, 4.8), dpi=100, layout="constrained")
    pixel, caption = figure.subplots(1, 2)
    _draw_curves(pixel, _column(steps, "pixel_loss"), _column(validation, "pixel_loss"))
    pixel.set(title="pixel loss", ylabel="mean squared error of normalised patches")
    pixel.axhline(1.0, label="predicting each patch's mean", **REFERENCE)
    _draw_curves(caption, _column(steps, "caption_loss"), _column(validation, "caption_loss"))
    caption.set(title="caption loss", ylabel="nats per token")
    for entropy in _column(validation, "caption_entropy")[1][-1:]:
        caption.axhline(entropy, label=f"entropy of the captions, {entropy:.3f}", **REFERENCE)
    values = np.concatenate([[], *(line.get_ydata() for line in caption.get_lines())])
    if values.size and 0 < values.min() * LOG_FROM < values.max():
        caption.set_yscale("log")
        caption.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        caption.yaxis.set_major_formatter("{x:g}")
        caption.yaxis.set_minor_formatter(NullFormatter())
    for axes in (pixel, caption):
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        if axes.get_lines():
            axes.legend()
    return save(figure, Path(out))


def _draw_curves(axes, training: tuple[np.ndarray, np.ndarray], validation: tuple[np.ndarray, np.ndarray]) -> None:
    step, loss = training
    if len(step) > MOST_MARKED:
        axes.plot(step, loss, color="tab:blue", alpha=0.25, linewidth=0.8)
        axes.plot(step, running_mean(loss, len(loss) // WINDOWS), color="tab:blue", label="training, running mean")
    elif len(step):
        axes.plot(step, loss, color="tab:blue", marker=".", label="training")
    step, loss = validation
    if len(step):
        style = {"marker": "o", "markersize": 4} if len(step) <= MOST_MARKED else {}
        axes.plot(step, loss, color="tab:orange", label=f"validation, {loss[-1]:.3f} at the end", **style)


def _column(lines: Sequence[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the lines that have a finite value; a value that was not finite is null in the file."""
    pairs = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    steps, values = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
    return steps, values


def running_mean(values: np.ndarray, reach: int) -> np.ndarray:
    """(n,) -> (n,): each the mean of at most `reach` values to either side of it.

    Near the steep start both sides shrink together, so that the mean follows; near the flat end only the right one.
    """
    index = np.arange(len(values))
    before = np.minimum(reach, index)
    after = np.minimum(before, index[::-1])
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[index + after + 1] - sums[index - before]) / (before + after + 1)


def save(figure, path: Path) -> Path:
    """Write the PNG, whole or not at all."""
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png")
    return path
