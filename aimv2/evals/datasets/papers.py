"""The 15 classification datasets of the AIM and AIMv2 papers by name, below one folder, `--root`.

Most are laid out as torchvision has them, which downloads them too; four as the `wilds` package has them. The papers
name the datasets and not all of the splits: what is ours to choose is said in each report.
"""

import json
import os
import pickle
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from aimv2.evals.datasets.bundled import array_set
from aimv2.evals.datasets.files import file_set, stamps
from aimv2.evals.datasets.folder import open_folder
from aimv2.evals.datasets.interface import Dataset, ImageSet, Texts

TEMPLATES = {  # a prompt for each, where "a photo of a {}." would not say what it is
    "food101": ("a photo of {}, a type of food.",),
    "dtd": ("a photo of a {} texture.",),
    "pets": ("a photo of a {}, a type of pet.",),
    "pcam": ("this is a photo of {}.",),
    "eurosat": ("a centered satellite photo of {}.",),
    "infograph": ("an infographic about a {}.",),
}
_PHOTO = ("a photo of a {}.",)
_INAT = ("2018", "train_val2018")
_WNIDS = "385e0240499426c022b773be1ae4da780f057b89c9694c7f47199f62746b6edd"  # sha256 of ImageNet-1k's, sorted, by lines


def open_cifar(name: str, root: Path, download: bool) -> Dataset:
    """50,000 and 10,000 images of 32 x 32 in root/cifar-10-batches-py or root/cifar-100-python. Official splits."""
    from torchvision import datasets

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    splits = [kind(str(root), train=train, download=download) for train in (True, False)]
    train, test = (
        array_set(name, split, found.data, np.arange(len(found.data)), np.array(found.targets))
        for split, found in zip(("train", "test"), splits, strict=True)
    )
    return _dataset(name, splits[0].classes, train, test)


def open_food101(name: str, root: Path, download: bool) -> Dataset:
    """75,750 and 25,250 images in root/food-101. Official splits; the training images are noisy on purpose."""
    from torchvision.datasets import Food101

    return _two_splits(name, root, *(Food101(root, s, download=download, loader=str) for s in ("train", "test")))


def open_dtd(name: str, root: Path, download: bool) -> Dataset:
    """Textures in root/dtd/dtd: train and val of partition 1 (3760 images) to train on, its test (1880) to test."""
    from torchvision.datasets import DTD

    train, val, test = (DTD(root, split, 1, download=download, loader=str) for split in ("train", "val", "test"))
    learnt = _of_paths(name, "train+val", root, [*_pairs(train), *_pairs(val)])
    report = {"split": "partition 1 of 10: train and val to train on, test to test"}
    return _dataset(name, train.classes, learnt, _of_paths(name, "test", root, _pairs(test)), report)


def open_pets(name: str, root: Path, download: bool) -> Dataset:
    """37 breeds in root/oxford-iiit-pet: trainval (3680 images) and test (3669). Official splits."""
    from torchvision.datasets import OxfordIIITPet

    splits = {split: OxfordIIITPet(root, split, download=download) for split in ("trainval", "test")}
    train, test = (  # torchvision has no other way to the paths than to decode the images
        _of_paths(name, split, root, zip(found._images, found._labels, strict=True)) for split, found in splits.items()
    )
    return _dataset(name, splits["trainval"].classes, train, test)


def open_cars(name: str, root: Path, download: bool) -> Dataset:
    """196 models in root/stanford_cars: 8144 and 8041 images. Official splits. Nobody serves them any more."""
    from torchvision.datasets import StanfordCars

    return _two_splits(name, root, *(StanfordCars(root, s, download=download, loader=str) for s in ("train", "test")))


def open_pcam(name: str, root: Path, download: bool) -> Dataset:
    """Tissue in root/pcam: train (262,144 patches) and test (32,768); the official validation split is not used."""
    from torchvision.datasets import PCAM

    for split in ("train", "test"):
        PCAM(str(root), split, download=download)
    train, test = (_pcam_split(name, split, root / "pcam") for split in ("train", "test"))
    report = {"split": "train and test; the validation split is not used"}
    return _dataset(name, ("lymph node", "lymph node containing metastatic tumor tissue"), train, test, report)


class H5Images(Sequence[np.ndarray]):
    """The rows of "x", (n, H, W, 3), of an HDF5 file, which each process opens for itself."""

    def __init__(self, path: Path):
        self.path, self._opened = path, None

    def __len__(self) -> int:
        return len(self._images())

    def __getitem__(self, row: int) -> np.ndarray:
        return self._images()[row]

    def __getstate__(self) -> dict:
        return {"path": self.path, "_opened": None}

    def _images(self):
        import h5py

        if self._opened is None or self._opened[0] != os.getpid():  # HDF5 does not survive a fork
            self._opened = os.getpid(), h5py.File(self.path)["x"]
        return self._opened[1]


def _pcam_split(name: str, split: str, folder: Path) -> ImageSet:
    import h5py

    path = folder / f"camelyonpatch_level_2_split_{split}_x.h5"
    with h5py.File(folder / f"camelyonpatch_level_2_split_{split}_y.h5") as file:
        labels = file["y"][:].reshape(-1).astype(np.int64)
    keys = Texts(f"{split}/{row:06d}" for row in range(len(labels)))
    digest = sha256(keys.digest.encode() + stamps(folder, [path.name]).tobytes()).hexdigest()
    return ImageSet(name=name, split=split, images=H5Images(path), keys=keys, digest=digest, labels=labels)


def open_eurosat(name: str, root: Path, download: bool) -> Dataset:
    """27,000 satellite images in root/eurosat/2750, without an official split.

    Ours has the sizes that are usual: of each class the 60 % of the images to train on and the 20 % to test that come
    last and first by the SHA-256 of their names. So a missing file moves none from the one to the other.
    `hf:timm/eurosat-rgb` has the split of google-research's remote_sensing_representations.
    """
    from torchvision.datasets import EuroSAT

    found = EuroSAT(root, download=download, loader=str)
    whole = _of_paths(name, "all", root, _pairs(found))
    names = (os.path.basename(key).encode("utf-8", "surrogateescape") for key in whole.keys)
    hashes = np.frombuffer(b"".join(sha256(name).digest()[:8] for name in names), ">u8")
    place = np.empty(len(whole))  # of each row in its class, 0 to 1
    for number in range(len(found.classes)):
        rows = np.flatnonzero(whole.labels == number)
        place[rows[np.argsort(hashes[rows])]] = (np.arange(len(rows)) + 0.5) / len(rows)
    learnt, tested = (whole.subset(np.flatnonzero(chosen)) for chosen in (place > 0.4, place < 0.2))
    report = {
        "split": "no official one: of each class 60 % to train on and 20 % to test, by the SHA-256 of their names"
    }
    classes = [re.sub("(?<=[a-z])(?=[A-Z])", " ", each).lower() for each in found.classes]  # AnnualCrop
    return _dataset(name, classes, learnt, tested, report)


def open_inat18(name: str, root: Path, download: bool) -> Dataset:
    """iNaturalist 2018 in root/inaturalist: its images in 2018/, as torchvision has them (or in train_val2018/), and
    train2018.json (437,513 images) and val2018.json (24,426) of the competition. Official splits.
    """
    folder = root / "inaturalist"
    if download and not any((folder / where).is_dir() for where in _INAT):
        from torchvision.datasets import INaturalist

        INaturalist(str(folder), "2018", download=True)
    images = next((where for where in _INAT if (folder / where).is_dir()), None)
    if images is None:
        raise ValueError(f"{folder}: neither {' nor '.join(_INAT)} is there")
    records = {split: _inat_record(folder / f"{split}2018.json") for split in ("train", "val")}
    known = sorted(records["train"]["categories"], key=lambda category: category["id"])
    numbers = {category["id"]: number for number, category in enumerate(known)}
    sets = {}
    for split, record in records.items():
        paths = {i["id"]: os.path.join(folder, images, i["file_name"].partition("/")[2]) for i in record["images"]}
        for each in record["annotations"]:
            if each["image_id"] not in paths or each["category_id"] not in numbers:
                raise ValueError(
                    f"{folder / f'{split}2018.json'}: annotation {each} is of no image or category there is"
                )
        pairs = ((paths[a["image_id"]], numbers[a["category_id"]]) for a in record["annotations"])
        sets[split] = _of_paths(name, split, folder, pairs)
    return _dataset(name, [str(category["name"]) for category in known], sets["train"], sets["val"])


def _inat_record(path: Path) -> dict:
    try:
        record = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file: it is in {path.name}.tar.gz of the competition") from None
    except ValueError as error:
        raise ValueError(f"{path}: no JSON ({error})") from None
    for part in ("categories", "images", "annotations"):
        if not isinstance(record, dict) or not isinstance(record.get(part), list):
            raise ValueError(f"{path}: no list of {part}")
    return record


def open_imagenet(name: str, root: Path, download: bool) -> Dataset:
    """ImageNet-1k in root/imagenet: as torchvision has it, with the archives or meta.bin, or train/ and val/ alone.

    Trained on train (1,281,167 images), tested on val (50,000), as everybody does. Without train, zero-shot only. The
    classes have CLIP's names if they are the 1000 that these are of.
    """
    from torchvision.datasets import ImageNet

    folder = root / "imagenet"
    if not any((folder / file).is_file() for file in ("meta.bin", "ILSVRC2012_devkit_t12.tar.gz")):
        data = open_folder(folder, name, test="val")
        names, templates, noticed = _clip_names(data.classes, None)
        return replace(data, name=name, classes=names, templates=templates, report={**data.report, "names": noticed})
    try:
        test = ImageNet(str(folder), "val", loader=str)
    except pickle.UnpicklingError:
        raise ValueError(f"{folder / 'meta.bin'}: damaged; torchvision makes it from the devkit's archive") from None
    learnt = any((folder / part).exists() for part in ("train", "ILSVRC2012_img_train.tar"))
    train = _of_paths(name, "train", folder, _pairs(ImageNet(str(folder), "train", loader=str))) if learnt else None
    names, templates, noticed = _clip_names(test.wnids, [", ".join(names) for names in test.classes])
    tested = _of_paths(name, "val", folder, _pairs(test))
    return _dataset(name, names, train, tested, {"split": "official", "names": noticed}, templates)


def _clip_names(wnids: Sequence[str], names: Sequence[str] | None) -> tuple[Sequence[str], tuple[str, ...] | None, str]:
    """(names of the classes, templates, what to report): CLIP's own if the sorted WordNet ids are those of ImageNet-1k.

    Args:
        names: what the classes are called otherwise; None: only by their ids, which no prompt can have.
    """
    standard = sha256("\n".join(wnids).encode()).hexdigest() == _WNIDS
    try:
        import open_clip
    except ImportError:
        return names or wnids, None, "CLIP's are not known without open_clip"
    templates = tuple(template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES)
    if standard:
        return tuple(open_clip.IMAGENET_CLASSNAMES), templates, "CLIP's"
    if names is not None:
        return names, templates, "WordNet's: other classes than the 1000 of ImageNet-1k"
    return wnids, None, "none: other folders than the 1000 of ImageNet-1k"


def open_infograph(name: str, root: Path, download: bool) -> Dataset:
    """DomainNet's 345 classes in root/domainnet: infograph_train.txt (36,023 images), infograph_test.txt (15,582) and
    infograph/. Official splits.
    """
    folder, sets, classes = root / "domainnet", {}, {}
    for split in ("train", "test"):
        path = folder / f"infograph_{split}.txt"
        if not path.is_file():
            raise ValueError(f"{path}: no such file: DomainNet's site has it beside infograph.zip")
        pairs = [(folder / image, label) for image, label in _infograph_lines(path)]
        classes |= {label: image.parent.name.replace("_", " ") for image, label in pairs}
        sets[split] = _of_paths(name, split, folder, pairs)
    return _dataset(name, [classes.get(n, str(n)) for n in range(max(classes) + 1)], sets["train"], sets["test"])


def _infograph_lines(path: Path) -> list[tuple[str, int]]:
    pairs = []
    for line in filter(str.strip, path.read_text(encoding="utf-8").splitlines()):
        image, _, label = line.strip().rpartition(" ")
        if not image or not label.isdecimal():
            raise ValueError(f"{path}: line {line[:100]!r}, expected a path and the number of a class")
        pairs.append((image, int(label)))
    if not pairs:
        raise ValueError(f"{path}: empty")
    return pairs


def _two_splits(name: str, root: Path, train: Any, test: Any) -> Dataset:
    """Of two sets of torchvision whose loader is `str`."""
    sets = (_of_paths(name, s, root, _pairs(found)) for s, found in (("train", train), ("test", test)))
    return _dataset(name, train.classes, *sets)


def _pairs(dataset: Any) -> list[tuple[str, int]]:
    """(path, label) of a set of torchvision whose loader is `str`, which `iter` would not see the end of."""
    return [dataset[i] for i in range(len(dataset))]


def _of_paths(name: str, split: str, root: Path, found: Iterable[tuple[str | Path, int]]) -> ImageSet:
    """The images of (path, label) pairs, named relative to the root."""
    pairs = list(found)
    keys = Texts(os.path.relpath(path, root) for path, _ in pairs)
    return file_set(name, split, root, keys, labels=[label for _, label in pairs])


def _dataset(
    name: str,
    classes: Iterable[str],
    train: ImageSet | None,
    test: ImageSet,
    report: dict | None = None,
    templates: tuple[str, ...] | None = None,
) -> Dataset:
    """Templates are those of TEMPLATES, unless there are some or the classes are numbers."""
    classes, report = tuple(str(each).replace("_", " ") for each in classes), report or {"split": "official"}
    if all(each.isdecimal() for each in classes):
        report["templates"] = "none: the classes are numbers"
    elif templates is None and name != "imagenet":
        templates = TEMPLATES.get(name, _PHOTO)
    return Dataset(spec=name, name=name, classes=classes, train=train, test=test, templates=templates, report=report)
