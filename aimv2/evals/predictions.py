"""predictions.png: held-out images as the model continues and describes them.

B images, N patches, P patch side, S prefix length. Native images come as strips, (B, 3, P, N P), and are drawn as what
they are strips of.
"""

import dataclasses
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from aimv2.clip_tokens import CLIP
from aimv2.data.batch import Batch
from aimv2.data.loader import DataConfig, validation_loader
from aimv2.data.shapes import parse_caption
from aimv2.data.tokenizer import ClipTokenizer, Tokenizer, open_tokenizer
from aimv2.data.transforms import TransformConfig
from aimv2.evals.curves import draw_losses, save
from aimv2.evals.harness import at_rest
from aimv2.exports import TOKENIZER
from aimv2.masks import prefix_mask
from aimv2.objectives.aimv2 import AIMv2
from aimv2.patches import from_strip, patch_statistics, patchify, unpatchify
from aimv2.pretrained import load_model

GIVEN = 0.45  # share of the patches; in the shapes worlds the edge then runs through objects, not between them
HIDDEN = 0.85  # grey of what the prefix does not show
COLOURS = {True: "tab:green", False: "tab:red", None: "black"}


@dataclass(slots=True, kw_only=True)
class Prediction:
    """One held-out image. Pictures are (H, W, 3) float arrays in [0, 1]."""

    original: np.ndarray
    given: np.ndarray  # the prefix, and grey
    continued: np.ndarray  # the prefix, then next-patch predictions
    from_first: np.ndarray  # the first patch, then next-patch predictions
    prefix_length: int
    patch_size: int
    true_caption: str
    caption: str
    right: bool | None = None  # both captions name the same objects; None if nobody can tell


def draw_run(
    run: str | Path,
    data: DataConfig,
    *,
    seed: int = 0,
    samples: int = 8,
    temperature: float = 0.0,
    top_p: float = 1.0,
    out: str | Path | None = None,
    device: torch.device | str = "cpu",
) -> list[Prediction]:
    """Draw loss.png and predictions.png of a finished run into `out`, by default its own folder.

    Reads `run`/metrics.jsonl, `run`/export and the first `samples` validation images of `data`. Captions are greedy, or
    sampled from `seed` at a temperature above 0. Returns what is drawn; nothing, and no predictions.png, if the run
    has no validation data or its model no decoder, as LiT.
    """
    if samples < 1:
        raise ValueError(f"samples {samples}: expected at least 1")
    run, out = Path(run), Path(out or run)
    out.mkdir(parents=True, exist_ok=True)
    draw_losses(run / "metrics.jsonl", out / "loss.png")
    if data.validation is None:
        return []
    model = load_model(run / "export", device=device)
    if not isinstance(model, AIMv2):
        return []
    loader = validation_loader(
        dataclasses.replace(data, workers=0),
        patch_size=model.config.vision.patch_size,
        micro_batch=samples,
        seed=seed,
        rank=0,
        world_size=1,
        limit=samples,
    )
    predictions = predict(
        model,
        next(iter(loader)).to(device),
        open_tokenizer(CLIP if data.tokenizer == CLIP else run / "export" / TOKENIZER),
        data.transform,
        difficulty=data.made_by.difficulty if data.made_by else None,
        temperature=temperature,
        top_p=top_p,
        generator=torch.Generator(device).manual_seed(seed),
    )
    draw_predictions(predictions, out / "predictions.png")
    return predictions


def predict(
    model: AIMv2,
    batch: Batch,
    tokenizer: Tokenizer | ClipTokenizer,
    transform: TransformConfig,
    *,
    difficulty: str | None,
    **sampling,
) -> list[Prediction]:
    """Next-patch predictions and generated captions of a batch that lies where the model does.

    `difficulty` is that of the shapes world, whose captions can be parsed, else None; `sampling` goes to `generate`.
    """
    p = model.config.vision.patch_size
    first = torch.ones_like(batch.prefix_length)
    prefix = (GIVEN * batch.patch_counts()).round().long().clamp(min=1)

    def pictures(images: Tensor) -> list[np.ndarray]:
        if batch.grid is None:
            return list(to_rgb(images, transform))
        images = (from_strip(strip, *grid, p) for strip, grid in zip(images, batch.grid.tolist(), strict=True))
        return [to_rgb(image[None], transform)[0] for image in images]

    def continued(prefix_length: Tensor) -> list[np.ndarray]:
        features = model.encoder(batch.image, prefix_mask(prefix_length, batch.num_patches), grid=batch.grid)
        pixels, _ = model.decoder(features, batch.text)  # padding comes after the patches: none of them sees it
        return pictures(next_patches(pixels, batch.image, prefix_length, p))

    with at_rest(model):
        features = model.encoder(batch.image, grid=batch.grid)
        ids = model.decoder.generate(features, real=batch.real_patches(), eos_id=tokenizer.eos_id, **sampling)
        rows = zip(pictures(batch.image), continued(prefix), continued(first), prefix.tolist(), strict=True)
    predictions = []
    for i, (original, after_prefix, after_first, prefix_length) in enumerate(rows):
        caption = tokenizer.decode(ids[i])
        true_caption = tokenizer.decode(batch.text[i, : batch.text_length[i]].tolist())
        predictions.append(
            Prediction(
                original=original,
                given=hide_rest(original, prefix_length, p),
                continued=after_prefix,
                from_first=after_first,
                prefix_length=prefix_length,
                patch_size=p,
                true_caption=true_caption,
                caption=caption,
                right=same_objects(caption, true_caption, difficulty),
            )
        )
    return predictions


def same_objects(caption: str, true_caption: str, difficulty: str | None) -> bool | None:
    """Whether both captions of the shapes world name the same objects; None where nobody can tell."""
    truth = parse_caption(true_caption, difficulty) if difficulty else None
    return None if truth is None else parse_caption(caption, difficulty) == truth


def next_patches(pixels: Tensor, image: Tensor, prefix_length: Tensor, patch_size: int) -> Tensor:
    """Predictions (B, N, 3P^2), of which pixels[:, i] is patch i+1, as images (B, 3, H, W) in the scale of `image`.

    A model predicts patches without their mean and deviation: the true ones are put back. The first S (B,) patches
    are those of `image`.
    """
    patches = patchify(image.float(), patch_size)  # (B, N, 3P^2)
    mean, deviation = patch_statistics(patches[:, 1:])
    predicted = pixels[:, :-1].float() * deviation + mean
    predicted = torch.cat([patches[:, :1], predicted], dim=1)
    given = torch.arange(patches.shape[1], device=image.device) < prefix_length[:, None]  # (B, N)
    patches = torch.where(given[..., None], patches, predicted)
    return unpatchify(patches, image.shape[2] // patch_size, image.shape[3] // patch_size, patch_size)


def to_rgb(image: Tensor, transform: TransformConfig) -> np.ndarray:
    """Normalised (B, 3, H, W) -> (B, H, W, 3) in [0, 1]."""
    rgb = image.float().cpu().permute(0, 2, 3, 1) * torch.tensor(transform.std) + torch.tensor(transform.mean)
    return rgb.clamp(0, 1).numpy()


def hide_rest(picture: np.ndarray, prefix_length: int, patch_size: int) -> np.ndarray:
    """(H, W, 3) -> the same with everything after the first `prefix_length` patches in grey."""
    height, width = picture.shape[0] // patch_size, picture.shape[1] // patch_size
    hidden = (np.arange(height * width) >= prefix_length).reshape(height, width)
    hidden = hidden.repeat(patch_size, axis=0).repeat(patch_size, axis=1)
    return np.where(hidden[..., None], np.float32(HIDDEN), picture)


def draw_predictions(predictions: Sequence[Prediction], out: str | Path) -> Path:
    """Draw one row an image into the PNG `out` and return its path."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1 + 1.75 * len(predictions)), dpi=100, layout="constrained")
    figure.suptitle(
        "Each patch predicted from all the true patches before it (teacher-forced), "
        "drawn with the true patch's own mean and deviation\n",
        fontsize=11,
    )
    rows = figure.subplots(len(predictions), 5, squeeze=False, width_ratios=(1, 1, 1, 1, 2))
    titles = ("original", "prefix given", "next patches\nafter that prefix", "next patches\nafter the first one")
    for axes, title in zip(rows[0], titles, strict=False):
        axes.set_title(title, fontsize=10)
    for row, prediction in zip(rows, predictions, strict=True):
        p = prediction
        for axes, picture in zip(row, (p.original, p.given, p.continued, p.from_first), strict=False):
            axes.imshow(picture, interpolation="nearest")
        _draw_edge(row[2], p.prefix_length, p)
        _draw_edge(row[3], 1, p)
        _write_captions(row[4], p)
        for axes in row:
            axes.set_axis_off()
    return save(figure, Path(out))


def _draw_edge(axes, prefix_length: int, prediction: Prediction) -> None:
    """The line between the prefix and what is predicted."""
    size, width = prediction.patch_size, prediction.original.shape[1] // prediction.patch_size
    row, column = divmod(prefix_length, width)
    x = np.array([0, column, column, width]) * size - 0.5  # pixel centres lie on whole numbers
    y = np.array([row + 1, row + 1, row, row]) * size - 0.5
    visible = slice(None) if column else slice(2, None)
    axes.plot(x[visible], y[visible], color="white", linewidth=1, scalex=False, scaley=False)


def _write_captions(axes, prediction: Prediction) -> None:
    verdict = {True: "generated, right:", False: "generated, wrong:", None: "generated:"}[prediction.right]
    lines = (
        (0.96, "true:", prediction.true_caption, "black"),
        (0.48, verdict, prediction.caption, COLOURS[prediction.right]),
    )
    for y, heading, caption, colour in lines:
        text = textwrap.fill(caption, 48, max_lines=3, placeholder=" ...") or "(empty)"
        axes.text(
            0, y, f"{heading}\n{text}", transform=axes.transAxes, va="top", fontsize=9, color=colour, parse_math=False
        )
