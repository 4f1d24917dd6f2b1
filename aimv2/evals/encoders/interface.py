"""What an evaluation sees of an encoder, whichever library it comes from.

B images, N patches, D width, E length of the image feature.
"""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from aimv2.evals.feature_store import fingerprint
from aimv2.evals.harness import at_rest
from aimv2.preprocessing import ProcessorConfig
from aimv2.processor import Processor
from aimv2.weights import digest


class BlockOutput(NamedTuple):
    """Neither the CLS token nor registers are among the patches, which are in raster order."""

    patches: Tensor  # (B, N, D)
    cls: Tensor | None  # (B, D)


class Encoder(ABC):
    """A frozen encoder: called in eval mode and without gradients, its features are fp32.

    A subclass says how one pass through its library goes (`_pass`), what the final norm is, and what the library's own
    image feature is (`_pooled`).

    Attributes:
        spec: what `open_encoder` was given.
        name: the same, short and fit for a file's name.
        source: the library, "aimv2" for ours, or "pixels".
        trained: whether the weights were read, and not drawn.
        width: D of `output`.
        depth: blocks there are, whether or not `layers` needs them all.
        heads: attention heads of a block; 1 where there are none.
        grid: rows and columns of the patches of `output`.
        processor: prepares images as this encoder wants them.
        layers: blocks whose mean is the output, from `@LAYERS` of the spec; empty for the encoder's own output.
        model: the module behind it.
        settings: what the library knows of it beside the weights, as JSON: two encoders of the same weights may differ.
    """

    def __init__(
        self,
        model: nn.Module,
        config: ProcessorConfig,
        *,
        spec: str,
        name: str,
        source: str,
        width: int,
        depth: int,
        heads: int,
        grid: tuple[int, int],
        settings: Mapping[str, Any] | None = None,
        trained: bool = True,
    ):
        self.model, self.processor = model, Processor(config)
        self.spec, self.name, self.source, self.trained = spec, name, source, trained
        self.width, self.depth, self.heads, self.grid = width, depth, heads, grid
        self.settings = settings or {}
        self.layers: tuple[int, ...] = ()
        self._weights: str | None = None  # their digest, once it is known
        self.device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))

    @abstractmethod
    def _pass(
        self, images: Tensor, numbers: Sequence[int], output: bool
    ) -> tuple[list[BlockOutput], BlockOutput | None]:
        """Raw outputs of the blocks `numbers`, which ascend, and what the whole encoder puts out, if asked for.

        Without `output`, blocks above the highest are not run and the second value is not looked at.
        """

    @abstractmethod
    def _pooled(self, images: Tensor) -> Tensor:
        """(B, E), the library's own image feature."""

    @abstractmethod
    def norm(self, x: Tensor) -> Tensor:
        """The final norm of (..., D); identity where there is none."""

    def forward(
        self, images: Tensor, numbers: Sequence[int] = (), output: bool = True
    ) -> tuple[list[BlockOutput], BlockOutput | None]:
        """`blocks` and, if asked for, `output` in one pass. Raises ValueError for a block that is not there."""
        if any(not 0 <= number < self.depth for number in numbers):
            raise ValueError(f"blocks {list(numbers)}: {self.spec} has blocks 0 to {self.depth - 1}")
        wanted = sorted({*numbers, *(self.layers if output else ())})
        with at_rest(self.model):
            found, last = self._pass(images.to(self.device), wanted, output and not self.layers)
        blocks = dict(zip(wanted, map(_at_fp32, found), strict=True))
        if not output:
            last = None
        elif self.layers:
            last = mean_of([blocks[number] for number in self.layers])
        else:
            last = _at_fp32(last)
        return [blocks[number] for number in numbers], last

    def blocks(self, images: Tensor, numbers: Sequence[int]) -> list[BlockOutput]:
        """Raw outputs of these blocks, counted from 0, in the given order; blocks above the highest are not run."""
        return self.forward(images, numbers, output=False)[0]

    def output(self, images: Tensor) -> BlockOutput:
        """The last block after the final norm; with `layers`, the mean of their raw outputs."""
        return self.forward(images)[1]

    def pooled(self, images: Tensor) -> Tensor:
        """(B, E), the library's own image feature; with `layers`, the mean of the output's patches."""
        if self.layers:
            return self.output(images).patches.mean(dim=1)
        with at_rest(self.model):
            return self._pooled(images.to(self.device)).float()

    def average(self, layers: tuple[int, ...]) -> Self:
        """From now on the output is the mean of these blocks; of none: the encoder's own."""
        self.layers = layers
        return self

    def to(self, device: torch.device | str) -> Self:
        self.model.to(device)
        self.device = torch.device(device)
        return self

    def describe(self) -> dict:
        """All that tells one encoder from another, ready for JSON. Weights of which none is trained are read once."""
        return {
            "spec": self.spec,
            "name": self.name,
            "source": self.source,
            "trained": self.trained,
            "layers": list(self.layers) or "output",
            "width": self.width,
            "depth": self.depth,
            "heads": self.heads,
            "grid": list(self.grid),
            "weights": self._weights_digest(),
            **describe_module(self.model, self.settings, self.processor.config),
        }

    def _weights_digest(self) -> str:
        if any(parameter.requires_grad for parameter in self.model.parameters()):
            return weights_digest(self.model)
        if self._weights is None:
            self._weights = weights_digest(self.model)
        return self._weights


def describe_module(model: nn.Module, settings: Mapping[str, Any], config: ProcessorConfig) -> dict:
    """What decides about features beside the weights, ready for JSON; `settings` are the library's."""
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "config": fingerprint(settings),
        "preprocessing": config.to_preprocessing(),
        "preprocessing_hash": preprocessing_hash(config),
    }


def modules_of(model: nn.Module) -> str:
    """The tree of modules as torch prints it, for libraries whose own configuration is not all of it."""
    return re.sub(" at 0x[0-9a-f]+", "", repr(model))


def mean_of(outputs: Sequence[BlockOutput]) -> BlockOutput:
    """Of several blocks. Raises ValueError if their shapes differ, as those of a convnet's stages do."""
    if len(outputs) == 1:
        return outputs[0]
    if len({output.patches.shape for output in outputs}) > 1:
        shapes = ", ".join(str(tuple(output.patches.shape[1:])) for output in outputs)
        raise ValueError(f"blocks of shapes {shapes} have no mean: take one of them")
    patches = torch.stack([output.patches for output in outputs]).mean(dim=0)  # (B, N, D)
    if outputs[0].cls is None:
        return BlockOutput(patches, None)
    return BlockOutput(patches, torch.stack([output.cls for output in outputs]).mean(dim=0))


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of the names, shapes and values of a state dict; of "none" where it is empty."""
    state = model.state_dict()
    if not state:
        return hashlib.sha256(b"none").hexdigest()
    return digest(sorted(state.items()))


def preprocessing_hash(config: ProcessorConfig) -> str:
    """SHA-256 of what decides about pixels: two configs that make the same of every image have the same."""
    pixels = {"mean": config.mean, "std": config.std, "interpolation": config.interpolation, "resize": config.resize}
    if config.resize == "native":
        pixels |= {"patches": (config.patch_size, config.min_patches, config.max_patches)}
    else:
        pixels |= {"image_size": config.image_size, "resize_size": config.resize_size}
        if config.resize == "shortest_edge" or (config.resize_size - config.image_size) % 4 == 3:  # 1.5 to 1 or to 2
            pixels |= {"crop_rounding": config.crop_rounding}
    return hashlib.sha256(json.dumps(pixels, sort_keys=True).encode()).hexdigest()


def _at_fp32(output: BlockOutput) -> BlockOutput:
    return BlockOutput(output.patches.float(), None if output.cls is None else output.cls.float())
