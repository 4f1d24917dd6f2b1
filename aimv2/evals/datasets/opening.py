"""A dataset's spec, as `--data` takes it, to the dataset."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from aimv2.data.tar import ShardError
from aimv2.evals.datasets import papers
from aimv2.evals.datasets.bundled import open_digits, open_faces
from aimv2.evals.datasets.folder import open_folder
from aimv2.evals.datasets.huggingface import open_huggingface
from aimv2.evals.datasets.interface import Dataset
from aimv2.evals.datasets.karpathy import open_coco, open_flickr30k
from aimv2.evals.datasets.labels import first_line
from aimv2.evals.datasets.pixel_masks import open_masks
from aimv2.evals.datasets.shards import open_shapes, open_shards
from aimv2.evals.datasets.wilds import open_wilds

BUNDLED: dict[str, Callable[[str], Dataset]] = {"digits": open_digits, "faces": open_faces}
KINDS: dict[str, Callable[[str, str], Dataset]] = {  # by what is before the colon
    "shapes": open_shapes,
    "folder": open_folder,
    "shards": open_shards,
    "hf": open_huggingface,
    "coco": open_coco,
    "flickr30k": open_flickr30k,
    "masks": open_masks,
}
PAPERS: dict[str, Callable[[str, Path, bool], Dataset]] = {  # in the order of the papers' tables
    "imagenet": papers.open_imagenet,
    "inat18": papers.open_inat18,
    "cifar10": papers.open_cifar,
    "cifar100": papers.open_cifar,
    "food101": papers.open_food101,
    "dtd": papers.open_dtd,
    "pets": papers.open_pets,
    "cars": papers.open_cars,
    "iwildcam": open_wilds,
    "camelyon17": open_wilds,
    "pcam": papers.open_pcam,
    "rxrx1": open_wilds,
    "eurosat": papers.open_eurosat,
    "fmow": open_wilds,
    "infograph": papers.open_infograph,
}


def open_dataset(spec: str, *, root: Path | str | None = None, download: bool = False) -> Dataset:
    """The dataset of a spec. Everything is local, but `hf:` names of the hub, and what `download` may fetch.

    Args:
        spec: one of BUNDLED, KIND:WHERE with one of KINDS, or one of PAPERS.
        root: the folder of the datasets in PAPERS.
        download: whether one of these may be downloaded to the root, if its package can.

    Raises:
        ImportError: a package is missing; the message says which.
        ValueError: no such spec, or the data are not as they should be; ShardError, one of it, for shards.
    """
    kind, _, where = spec.partition(":")
    if spec in BUNDLED:
        return BUNDLED[spec](spec)
    if kind in KINDS and where:
        with _in_one_line(spec, where):
            return KINDS[kind](where, spec)
    if spec not in PAPERS:
        names = ", ".join([*BUNDLED, *(f"{kind}:..." for kind in KINDS), *PAPERS])
        raise ValueError(f"no dataset {spec!r}, expected one of {names}")
    if root is None:
        raise ValueError(f"{spec}: where is it? expected the folder of the papers' datasets as the root")
    root = Path(root).expanduser()
    with _in_one_line(spec, str(root)):
        return PAPERS[spec](spec, root, download)


@contextmanager
def _in_one_line(spec: str, place: str) -> Iterator[None]:
    """Libraries raise whatever a missing or damaged file leads to, over many lines, and don't say of what."""
    try:
        yield
    except (ImportError, ShardError):
        raise
    except Exception as error:
        reason = first_line(error)
        if not isinstance(error, ValueError) or not (spec in reason or str(Path(place).expanduser()) in reason):
            reason = f"{spec}: {reason}" + ("" if place in reason or place in spec else f". Looked below {place}")
        raise ValueError(reason) from error
