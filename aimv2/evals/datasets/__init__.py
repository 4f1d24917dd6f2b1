"""Datasets to evaluate on, by name: `open_dataset("folder:PATH")`."""

from aimv2.evals.datasets.interface import Dataset, ImageSet, held_out
from aimv2.evals.datasets.opening import open_dataset

__all__ = ["Dataset", "ImageSet", "held_out", "open_dataset"]
