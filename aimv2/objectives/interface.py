"""What the loop asks of an objective: a config that builds it, and a module that turns micro-batches into losses."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from aimv2.data.batch import Batch, Counts

if TYPE_CHECKING:  # it needs what only training has
    from aimv2.data.loader import DataConfig


class ObjectiveConfig:
    """Of dataclasses with a `vision: VisionConfig` and, if they have such a tower, a `decoder` or a `text`."""

    __slots__ = ()
    needs_weights: ClassVar[bool] = False  # whether it has a locked tower: at random weights that would see nothing

    @property
    def vocab_size(self) -> int:
        raise NotImplementedError

    @property
    def data_patch_size(self) -> int:
        """Side of a patch in the pixels of the data."""
        return self.vision.patch_size

    def build(self) -> "Objective":
        raise NotImplementedError

    def check(self, data: "DataConfig") -> None:
        """Raises ValueError for data that the model has no place for."""
        raise NotImplementedError

    def check_engine(self, batch_size: int, zero_stage: int) -> None:
        """Raises ValueError for a batch or a way of sharding that the loss doesn't allow."""

    def check_sources(self, data: "DataConfig") -> None:
        """Open, and download, the models that it learns from. Raises ModelError or ConfigError."""

    def training_flops(self, tokens: int) -> float:
        """Of one image of the configured size with so many caption tokens."""
        raise NotImplementedError


class Objective(nn.Module):
    """A module with an `encoder`, all of whose weights the engine has."""

    @property
    def exported(self) -> nn.Module:
        """What a run leaves behind."""
        return self

    def fingerprints(self) -> dict[str, str]:
        """What a run needs besides its checkpoint to go on as it began."""
        return {}

    def prepare(self, data: "DataConfig") -> None:
        """Open what is no part of the module, where its weights are by now; before others wait for its first batch."""

    def look_ahead(self, micro_batches: Sequence[Batch], counts: Counts) -> None:
        """This rank's micro-batches of an optimizer step; every rank calls it, with as many of them."""

    def forward(self, batch: Batch, counts: Counts) -> dict[str, Tensor]:
        """-> losses of a micro-batch, of which `loss` is learned, each as a share of the optimizer step's.

        `counts` are the step's targets, over all its micro-batches and all ranks: the sum of the shares is the mean.
        """
        raise NotImplementedError
