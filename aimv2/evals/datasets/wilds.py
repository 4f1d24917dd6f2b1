"""iWildCam, Camelyon17, RxRx1 and fMoW as the `wilds` package has them: it knows their files, downloads and splits."""

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from aimv2.data.images import BadImage
from aimv2.evals.datasets.files import why_unreadable
from aimv2.evals.datasets.interface import Dataset, ImageSet, Texts

NAMES = ("iwildcam", "camelyon17", "rxrx1", "fmow")
TRAIN, TEST = "train", "val"


class _Inputs(Sequence[Image.Image]):
    """Images of a set of `wilds`, by row of a split."""

    def __init__(self, found: Any, rows: np.ndarray):
        self.found, self.rows = found, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Image.Image:
        """Raises BadImage for one that can't be read; OSError if the disk fails."""
        try:
            return self.found.get_input(int(self.rows[row]))
        except Exception as error:  # Pillow raises whatever the damage leads to, OSError without a number too
            if isinstance(error, OSError) and error.errno is not None:
                if reason := why_unreadable(error):
                    raise BadImage(reason) from None
                raise
            raise BadImage(f"undecodable ({type(error).__name__})") from None


def open_wilds(name: str, root: Path, download: bool) -> Dataset:
    """One of NAMES, in root/NAME_vVERSION: "train" to train on, "val" to test.

    Both are of the official split scheme, and "val" is out of distribution, as "test" is, which WILDS itself reports:
    to take "val" is our choice, for its sizes are those that the AIM paper gives. Identities are of the version and the
    rows, not of the files, whose paths only `wilds` knows.
    """
    try:
        import wilds
    except ImportError as error:
        raise ImportError(
            f"{name} is read through the package wilds: pip install wilds; or make PATH/train/CLASS/... and "
            "PATH/test/CLASS/... of it, for folder:PATH"
        ) from error
    found = wilds.get_dataset(dataset=name, root_dir=str(root), download=download)
    labels, splits = np.asarray(found.y_array).reshape(-1), np.asarray(found.split_array)
    sets = {}
    for split in (TRAIN, TEST):
        rows = np.flatnonzero(splits == found.split_dict[split])
        keys = Texts(f"{split}/{row:07d}" for row in rows.tolist())
        sets[split] = ImageSet(
            name=name,
            split=split,
            images=_Inputs(found, rows),
            keys=keys,
            digest=sha256(f"{name} {found.version} {keys.digest}".encode()).hexdigest(),
            labels=labels[rows],
        )
    return Dataset(
        spec=name,
        name=name,
        classes=tuple(map(str, range(int(found.n_classes)))),
        train=sets[TRAIN],
        test=sets[TEST],
        report={
            "split": f"WILDS {found.version}, official: train, and the validation split out of distribution",
            "templates": "none: the classes are numbers",
        },
    )
