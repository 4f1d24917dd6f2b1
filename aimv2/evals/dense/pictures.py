"""Pictures of patch features: image | principal components | attention | labels | predicted classes.

B images, h x w patches of the encoder, g x g cells of the patch probe, H heads, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from aimv2.data.images import BadImage
from aimv2.encoder import VisionEncoder
from aimv2.evals.curves import save
from aimv2.evals.datasets import ImageSet
from aimv2.evals.dense.features import attention_probabilities, fit_pca, looked_at, received
from aimv2.evals.dense.patch_labels import patch_labels
from aimv2.evals.dense.patch_probe import PatchGrid, PatchHeads, PatchProbe
from aimv2.evals.encoders import Encoder
from aimv2.evals.reports.files import Result
from aimv2.evals.reports.panels import short
from aimv2.evals.session import Session

SIDE = 1.55  # inches of a picture
GREY = 0.35  # how much of the image is seen through classes
HEAT = "magma"
MOST_NAMED = 20  # classes in the legend
MOST_HEADS = 16
REACH = 3  # cells to each side, in which a patch deep inside something has its own label everywhere


@dataclass(slots=True, kw_only=True)
class DenseSample:
    """What is drawn of one image; None where there is nothing of the kind."""

    image: np.ndarray  # (S, S, 3) in [0, 1], as the encoder sees it
    pca: np.ndarray  # (h, w, 3)
    foreground: np.ndarray  # (h, w, 3), the components of this image's foreground, the rest black
    received: np.ndarray | None = None  # (H, h, w)
    looked_at: np.ndarray | None = None  # (H, h, w)
    query: int | None = None  # the patch that looks
    labels: np.ndarray | None = None  # (g, g), -1 where nothing counts
    predicted: np.ndarray | None = None  # (g, g)


def dense_samples(
    encoder: Encoder,
    images: ImageSet,
    session: Session,
    *,
    count: int = 6,
    block: int = -1,
    probe: PatchProbe | None = None,
    result: Result | None = None,
) -> list[DenseSample]:
    """The first `count` images that can be read: their features, and what a patch probe made of them.

    Args:
        block: whose attention, from the end if negative; only of our own encoders.
        probe, result: as it was run and what it found, for labels and predictions.

    Raises:
        ValueError: no such block, no image that can be read, or a count below 1.
    """
    if count < 1:
        raise ValueError(f"count {count}: expected 1 or more")
    rows = _readable(images, count)
    pixels = encoder.processor([images.image(row) for row in rows]).pixel_values  # (B, 3, S, S)
    patches = encoder.output(pixels).patches.cpu()  # (B, N, D)
    config, grid = encoder.processor.config, encoder.grid
    shown = (pixels.permute(0, 2, 3, 1) * torch.tensor(config.std) + torch.tensor(config.mean)).clamp(0, 1).numpy()
    pca = fit_pca(patches, grid).colours(patches).unflatten(1, grid).numpy()
    # Backgrounds differ more between images than objects do from them.
    alone = [fit_pca(image, grid, foreground_first=True).colours(image) for image in patches.split(1)]
    foreground = torch.cat(alone).unflatten(1, grid).numpy()
    samples = [
        DenseSample(image=image, pca=components, foreground=inner)
        for image, components, inner in zip(shown, pca, foreground, strict=True)
    ]
    if probe is not None and result is not None:
        _add_classes(samples, encoder, images.subset(rows), pixels, probe, result, session)
    if isinstance(encoder.model, VisionEncoder):
        for sample, image in zip(samples, pixels, strict=True):
            _add_attention(sample, encoder, image[None], block)
    return samples


def draw_dense(samples: Sequence[DenseSample], classes: Sequence[str], out: str | Path, title: str = "") -> Path:
    """Draw one row an image into the PNG `out` and return its path."""
    columns = [("image", _draw_image), ("components of all", _draw_pca), ("... of its foreground", _draw_foreground)]
    if samples[0].received is not None:
        columns += [("attention received", _draw_received), ("attention from the box", _draw_looked_at)]
    if samples[0].labels is not None:
        columns += [("labels", _draw_labels), ("predicted", _draw_predicted)]
    figure = _rows(samples, columns, title)
    if samples[0].labels is not None:
        _name_classes(figure, samples, classes)
    return save(figure, Path(out))


def draw_heads(samples: Sequence[DenseSample], out: str | Path, title: str = "") -> Path:
    """Draw what the boxed patch of each image looks at, head by head, into the PNG `out` and return its path."""
    heads = min(len(samples[0].looked_at), MOST_HEADS)

    def of_head(head: int):
        return lambda axes, sample: _draw_heat(axes, sample.looked_at[head], sample)

    columns = [("image", _draw_image_and_query)] + [(f"head {head}", of_head(head)) for head in range(heads)]
    return save(_rows(samples, columns, title), Path(out))


def _readable(images: ImageSet, count: int) -> list[int]:
    rows = []
    for row in range(len(images)):
        try:
            images.image(row)
        except BadImage:
            continue
        rows.append(row)
        if len(rows) == count:
            break
    if not rows:
        raise ValueError(f"{images.name} {images.split}: no image that can be read, expected at least one")
    return rows


def _add_classes(
    samples: list[DenseSample],
    encoder: Encoder,
    images: ImageSet,
    pixels: Tensor,
    probe: PatchProbe,
    result: Result,
    session: Session,
) -> None:
    view = PatchGrid(probe.layers, probe.grid)
    sides, names = view.sides(encoder), result.details["classes"]
    labels = patch_labels(
        images, encoder.processor.config, sides, len(names), Session(device=session.device, quiet=True)
    )
    head = PatchHeads.of(load_file(result.path.with_suffix(".safetensors"))).to(session.device)
    features = view(encoder, pixels)[result.details["selection"]["stream"]]
    predicted = head.predict(features.cpu().numpy(), np.arange(len(samples)), session)[0]
    for sample, label, guess in zip(samples, labels, predicted, strict=True):
        sample.labels, sample.predicted = label.reshape(sides), guess.reshape(sides)


def _add_attention(sample: DenseSample, encoder: Encoder, image: Tensor, block: int) -> None:
    depth, grid = len(encoder.model.blocks), encoder.grid
    if not -depth <= block < depth:
        raise ValueError(f"block {block}: expected {-depth} to {depth - 1}")
    probabilities = attention_probabilities(encoder.model, image.to(encoder.device), block % depth)
    sample.query = _query(sample, grid)
    sample.received = received(probabilities)[0].unflatten(1, grid).cpu().numpy()
    sample.looked_at = looked_at(probabilities, sample.query)[0].unflatten(1, grid).cpu().numpy()


def _query(sample: DenseSample, grid: tuple[int, int]) -> int:
    """The patch deepest inside something there is a label for; else in the middle of the image."""
    row, column = 0.5, 0.5
    if sample.labels is not None and (sample.labels > 0).any():
        around = np.lib.stride_tricks.sliding_window_view(np.pad(sample.labels, REACH), (2 * REACH + 1,) * 2)
        same = (around == sample.labels[..., None, None]).sum(axis=(2, 3))  # (g, g)
        depth = np.where(sample.labels > 0, same, -1)
        row, column = (np.argwhere(depth == depth.max())[0] + 0.5) / depth.shape
    return int(row * grid[0]) * grid[1] + int(column * grid[1])


def _rows(samples: Sequence[DenseSample], columns: Sequence[tuple], title: str):
    try:
        from matplotlib import rc_context
    except ImportError as error:
        raise ImportError('pictures are drawn by matplotlib: pip install "aimv2[eval]"') from error
    from matplotlib.figure import Figure

    size = (SIDE * len(columns) + 0.1, SIDE * len(samples) + 0.85)
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.035, wspace=0.0, hspace=0.0)
    with rc_context({"text.parse_math": False}):  # a name may hold a $
        grid = figure.subplots(len(samples), len(columns), squeeze=False)
        for row, sample in zip(grid, samples, strict=True):
            for axes, (_, draw) in zip(row, columns, strict=True):
                draw(axes, sample)
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set_visible(False)
        for axes, (name, _) in zip(grid[0], columns, strict=True):
            axes.set_title(name, fontsize=9)
        if title:
            figure.suptitle(title, fontsize=9.5, fontweight="bold", x=0.01, ha="left")
    return figure


def _extent(sample: DenseSample) -> tuple[float, float, float, float]:
    """In the pixels of the image, so that all pictures of a row lie on each other."""
    height, width = sample.image.shape[:2]
    return (-0.5, width - 0.5, height - 0.5, -0.5)


def _draw_image(axes, sample: DenseSample) -> None:
    axes.imshow(sample.image, interpolation="nearest")


def _draw_image_and_query(axes, sample: DenseSample) -> None:
    _draw_image(axes, sample)
    _draw_query(axes, sample)


def _draw_pca(axes, sample: DenseSample) -> None:
    axes.imshow(sample.pca, interpolation="nearest", extent=_extent(sample))


def _draw_foreground(axes, sample: DenseSample) -> None:
    axes.imshow(sample.foreground, interpolation="nearest", extent=_extent(sample))


def _draw_received(axes, sample: DenseSample) -> None:
    axes.imshow(sample.received.mean(axis=0), cmap=HEAT, vmin=0, interpolation="nearest", extent=_extent(sample))


def _draw_looked_at(axes, sample: DenseSample) -> None:
    _draw_heat(axes, sample.looked_at.mean(axis=0), sample)


def _draw_heat(axes, heat: np.ndarray, sample: DenseSample) -> None:
    axes.imshow(heat, cmap=HEAT, vmin=0, interpolation="nearest", extent=_extent(sample))
    _draw_query(axes, sample)


def _draw_query(axes, sample: DenseSample) -> None:
    from matplotlib.patches import Rectangle

    rows, columns = sample.pca.shape[:2]
    height, width = sample.image.shape[0] / rows, sample.image.shape[1] / columns
    row, column = divmod(sample.query, columns)
    corner = (column * width - 0.5, row * height - 0.5)
    axes.add_patch(Rectangle(corner, width, height, fill=False, edgecolor="white", linewidth=1.5))
    axes.add_patch(Rectangle(corner, width, height, fill=False, edgecolor="black", linewidth=0.5))


def _draw_labels(axes, sample: DenseSample) -> None:
    _draw_cells(axes, sample.labels, sample)


def _draw_predicted(axes, sample: DenseSample) -> None:
    _draw_cells(axes, sample.predicted, sample)


def _draw_cells(axes, cells: np.ndarray, sample: DenseSample) -> None:
    """Class colours over the image in grey; nothing over the background and what does not count."""
    axes.imshow(sample.image.mean(axis=2), cmap="gray", vmin=-1, vmax=1.3, interpolation="nearest")
    painted = np.zeros((*cells.shape, 4))
    for number in np.unique(cells[cells > 0]):
        painted[cells == number] = (*_colour(int(number)), 1 - GREY)
    axes.imshow(painted, interpolation="nearest", extent=_extent(sample))


def _colour(number: int) -> tuple[float, float, float]:
    """Golden steps round the wheel: neighbours differ, however many there are."""
    from matplotlib.colors import hsv_to_rgb

    return tuple(hsv_to_rgb(((number * 0.618034) % 1, 0.85, 0.95 - 0.25 * (number % 2))))


def _name_classes(figure, samples: Sequence[DenseSample], classes: Sequence[str]) -> None:
    from matplotlib import rc_context
    from matplotlib.patches import Patch

    found = np.unique(np.concatenate([np.r_[s.labels.ravel(), s.predicted.ravel()] for s in samples]))
    numbers = [int(number) for number in found if number > 0]
    handles = [Patch(facecolor="0.5", label=f"{short(classes[0])}: not painted")]
    handles += [Patch(facecolor=_colour(number), label=short(classes[number])) for number in numbers[:MOST_NAMED]]
    more = f"and {len(numbers) - MOST_NAMED} more" if len(numbers) > MOST_NAMED else None
    with rc_context({"text.parse_math": False}):
        figure.legend(handles=handles, loc="outside lower center", ncols=7, frameon=False, fontsize=8, title=more)
