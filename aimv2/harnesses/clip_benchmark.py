"""LiT models in CLIP_benchmark: its zero-shot classification and retrieval, its data sets, its numbers.

    from aimv2.harnesses.clip_benchmark import register_clip_benchmark
    register_clip_benchmark()  # then clip_benchmark's own functions know the model type "aimv2"

S side of the encoder's image, n samples, C classes.
Interface: clip_benchmark 1.6, `clip_benchmark.models`.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from aimv2.evals.text_image import open_lit
from aimv2.lit import LiT
from aimv2.processor import Processor

MODEL_TYPE = "aimv2"


def register_clip_benchmark() -> None:
    """Add the model type "aimv2" to the installed clip_benchmark, whose `pretrained` then is a LiT model's source.

    With numpy 2.4 its top-k accuracy (1.6.2) ends in a TypeError, once all is computed; `accuracy` then takes its
    place, with a warning. Raises ImportError without clip_benchmark.
    """
    try:
        from clip_benchmark import models
        from clip_benchmark.metrics import linear_probe, zeroshot_classification
    except ImportError as error:
        raise ImportError(f"CLIP_benchmark can't be imported: pip install clip_benchmark ({error})") from error
    models.TYPE2FUNC[MODEL_TYPE] = load_lit
    if MODEL_TYPE not in models.MODEL_TYPES:  # the list that its command line has as choices
        models.MODEL_TYPES.append(MODEL_TYPE)
    try:
        zeroshot_classification.accuracy(torch.ones(1, 1), torch.zeros(1, dtype=torch.long))
    except TypeError as error:
        logging.getLogger(__name__).warning("clip_benchmark's accuracy() fails here (%s): ours takes its place", error)
        zeroshot_classification.accuracy = linear_probe.accuracy = accuracy


def load_lit(
    model_name: str = "", pretrained: str = "", cache_dir: str | None = None, device: torch.device | str = "cpu"
) -> tuple[LiT, "Transform", Callable[[Sequence[str]], Tensor]]:
    """A LiT model in fp32, what prepares an image for it, and what makes token ids of captions.

    Args:
        model_name: a label for clip_benchmark's tables; nothing is looked up by it.
        pretrained: whatever `aimv2.load_model` takes: a folder, a file, or a name of the hub.
        cache_dir: None: the hub's cache is where HF_HOME says.

    Raises:
        ValueError: nothing there, no LiT model, or one whose tokenizer is not known.
    """
    if cache_dir is not None:
        raise ValueError(f"cache_dir {cache_dir!r}: expected none, set HF_HOME")
    found = open_lit(pretrained, pretrained).to(device)  # native ones take squares
    return found.model, Transform(found.processor), found.tokenizer


@dataclass(frozen=True)
class Transform:
    """A PIL image -> (3, S, S), as a torchvision transform is called; it can be pickled for a loader's workers.

    Raises ValueError for an image that is damaged or over 200 times as long as wide.
    """

    processor: Processor

    def __call__(self, image: Image.Image) -> Tensor:
        try:
            return self.processor(image).pixel_values[0]
        except ValueError as error:
            raise ValueError(str(error).removeprefix("image 0: ")) from error  # its number is not known here


def accuracy(output: Tensor, target: Tensor, topk: Sequence[int] = (1,)) -> list[float]:
    """Shares of rows (n, C) whose target (n,) is among the k highest, for each k; arguments as clip_benchmark's."""
    ranked = output.topk(max(topk), dim=1).indices  # (n, k)
    hits = ranked == target[:, None]
    return [hits[:, :k].any(dim=1).double().mean().item() for k in topk]
