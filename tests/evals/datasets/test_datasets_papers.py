"""Each dataset is made in a small way in its own layout. Checksums, which only the real files have, are not checked."""

import errno
import hashlib
import json
import os
import pickle
import sys

import numpy as np
import pytest
import torch
import torchvision.datasets as published
from PIL import Image

from aimv2.data.images import BadImage
from aimv2.evals.datasets import open_dataset
from aimv2.evals.datasets.opening import PAPERS
from aimv2.evals.datasets.wilds import _Inputs


def picture(path, colour=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 7), (colour, colour, colour)).save(path)


def pixel(images, row):
    return images.image(row).getpixel((0, 0))[0]


def labelled(images):
    """{key: label}."""
    return dict(zip(images.keys, images.labels.tolist(), strict=True))


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar(tmp_path, monkeypatch, name):
    kind = {"cifar10": published.CIFAR10, "cifar100": published.CIFAR100}[name]
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: True)
    folder = tmp_path / kind.base_folder
    folder.mkdir()
    pixels, labels = {}, {}
    for number, (file, _) in enumerate(kind.train_list + kind.test_list):
        rng = np.random.default_rng(number)
        pixels[file] = rng.integers(0, 256, (4, 3072), dtype=np.uint8)
        labels[file] = rng.integers(0, 3, 4).tolist()
        key = "labels" if name == "cifar10" else "fine_labels"
        (folder / file).write_bytes(pickle.dumps({"data": pixels[file], key: labels[file]}))
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps({kind.meta["key"]: ["a_b", "c", "d"]}))
    data = open_dataset(name, root=tmp_path)
    assert data.classes == ("a b", "c", "d") and data.templates == ("a photo of a {}.",)
    for images, files in ((data.train, kind.train_list), (data.test, kind.test_list)):
        assert images.labels.tolist() == [label for file, _ in files for label in labels[file]]
        expected = np.concatenate([pixels[file] for file, _ in files]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        found = np.stack([np.asarray(images.image(i)) for i in range(len(images))])
        assert np.array_equal(found, expected)


def test_food101(tmp_path):
    folder = tmp_path / "food-101"
    for split, numbers in (("train", (1, 2)), ("test", (3,))):
        listed = {each: [f"{each}/{n}" for n in numbers] for each in ("pie", "apple_pie")}
        for path in (path for paths in listed.values() for path in paths):
            picture(folder / "images" / f"{path}.jpg", int(path[-1]))
        (folder / "meta").mkdir(exist_ok=True)
        (folder / "meta" / f"{split}.json").write_text(json.dumps(listed))
    data = open_dataset("food101", root=str(tmp_path))
    assert data.classes == ("apple pie", "pie") and data.templates == ("a photo of {}, a type of food.",)
    assert labelled(data.train) == {
        f"food-101/images/{each}/{n}.jpg": label for each, label in (("pie", 1), ("apple_pie", 0)) for n in (1, 2)
    }
    assert [pixel(data.test, i) for i in range(2)] == [3, 3]


def test_dtd_trains_on_train_and_val_of_partition_1(tmp_path):
    folder = tmp_path / "dtd" / "dtd"
    (folder / "labels").mkdir(parents=True)
    for split, number in (("train", 1), ("val", 2), ("test", 3)):
        names = [f"{each}/{each}_{number}.jpg" for each in ("dotted", "banded")]
        (folder / "labels" / f"{split}1.txt").write_text("\n".join(names) + "\n")
        for name in names:
            picture(folder / "images" / name, number)
    data = open_dataset("dtd", root=tmp_path)
    assert data.classes == ("banded", "dotted") and data.train.split == "train+val"
    assert labelled(data.train) == {
        f"dtd/dtd/images/{each}/{each}_{n}.jpg": label for n in (1, 2) for each, label in (("dotted", 1), ("banded", 0))
    }
    assert [pixel(data.train, i) for i in range(4)] == [1, 1, 2, 2] and pixel(data.test, 0) == 3


def test_pets(tmp_path):
    folder = tmp_path / "oxford-iiit-pet"
    (folder / "annotations").mkdir(parents=True)
    for split, n in (("trainval", 1), ("test", 2)):
        lines = [f"Great_Dane_{n} 2 2 1", f"Bengal_{n} 1 1 1"]
        (folder / "annotations" / f"{split}.txt").write_text("\n".join(lines) + "\n")
        for line in lines:
            picture(folder / "images" / f"{line.split()[0]}.jpg", n)
    data = open_dataset("pets", root=tmp_path)
    assert data.classes == ("Bengal", "Great Dane")
    assert labelled(data.train) == {
        "oxford-iiit-pet/images/Great_Dane_1.jpg": 1,
        "oxford-iiit-pet/images/Bengal_1.jpg": 0,
    }
    assert pixel(data.test, 1) == 2


def test_cars(tmp_path):
    sio = pytest.importorskip("scipy.io")
    folder = tmp_path / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    kinds = np.array(["BMW M3", "Audi A4"], dtype=object)
    sio.savemat(folder / "devkit" / "cars_meta.mat", {"class_names": kinds})
    for split, path in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        dtype = [("class", object), ("fname", object)]
        rows = np.array([(2, f"{split}1.jpg"), (1, f"{split}2.jpg")], dtype=dtype)
        sio.savemat(folder / path, {"annotations": rows})
        for n in (1, 2):
            picture(folder / f"cars_{split}" / f"{split}{n}.jpg", n)
    data = open_dataset("cars", root=tmp_path)
    assert data.classes == ("BMW M3", "Audi A4")
    assert labelled(data.test) == {
        "stanford_cars/cars_test/test1.jpg": 1,
        "stanford_cars/cars_test/test2.jpg": 0,
    }
    with pytest.raises(ValueError, match="StanfordCars dataset cannot be downloaded anymore"):
        open_dataset("cars", root=tmp_path, download=True)


def test_pcam(tmp_path):
    h5py = pytest.importorskip("h5py")
    (tmp_path / "pcam").mkdir()
    for split, count in (("train", 3), ("test", 2)):
        stem = tmp_path / "pcam" / f"camelyonpatch_level_2_split_{split}"
        for part, values in (
            ("x", np.arange(count, dtype=np.uint8)[:, None, None, None] * np.ones((1, 96, 96, 3), np.uint8)),
            ("y", (np.arange(count) % 2).reshape(-1, 1, 1, 1)),
        ):
            with h5py.File(f"{stem}_{part}.h5", "w") as file:
                file[part] = values
    data = open_dataset("pcam", root=tmp_path)
    assert data.train.labels.tolist() == [0, 1, 0] and list(data.test.keys) == ["test/000000", "test/000001"]
    expected = published.PCAM(str(tmp_path), "train")
    for images in (data.train, pickle.loads(pickle.dumps(data.train))):
        for i, (image, label) in enumerate(expected[i] for i in range(3)):
            assert np.array_equal(np.asarray(images.image(i)), np.asarray(image)) and images.labels[i] == label
    os.utime(tmp_path / "pcam" / "camelyonpatch_level_2_split_test_x.h5", ns=(0, 0))
    again = open_dataset("pcam", root=tmp_path)
    assert again.test.pictures != data.test.pictures and again.train.identity == data.train.identity


def test_eurosat_is_split_by_class_and_always_alike(tmp_path):
    for each, count in (("River", 20), ("AnnualCrop", 40)):
        for n in range(count):
            picture(tmp_path / "eurosat" / "2750" / each / f"{each}_{n}.png", n)
    data = open_dataset("eurosat", root=tmp_path)
    assert data.classes == ("annual crop", "river") and "no official one" in data.report["split"]
    for images, share in ((data.train, 0.6), (data.test, 0.2)):
        assert np.bincount(images.labels).tolist() == [40 * share, 20 * share]
        for i, key in enumerate(images.keys):
            assert key.split("/")[2] == ("AnnualCrop", "River")[images.labels[i]]
    assert not set(data.train.keys) & set(data.test.keys)
    drawn = sorted((f"River_{n}.png" for n in range(20)), key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    for images, expected in ((data.test, drawn[:4]), (data.train, drawn[8:])):
        assert {os.path.basename(key) for key in images.keys if "River" in key} == set(expected)
    again = open_dataset("eurosat", root=tmp_path)
    assert (again.train.identity, again.test.identity) == (data.train.identity, data.test.identity)
    (tmp_path / data.test.keys[0]).unlink()
    again = open_dataset("eurosat", root=tmp_path)
    # The shares of the class's other 39 (or 19) images begin and end elsewhere, by one image at most.
    assert len(set(data.test.keys) - set(again.test.keys)) <= 2
    assert not set(data.test.keys) & set(again.train.keys) and not set(data.train.keys) & set(again.test.keys)


def inat(folder, images):
    """Two species, of which the second has the lower number; ids of images are not their places."""
    categories = [{"id": 7, "name": "7", "supercategory": "Aves"}, {"id": 3, "name": "3", "supercategory": "Fungi"}]
    for split, ids in (("train", (5, 4)), ("val", (9,))):
        record = {
            "categories": categories,
            "images": [{"id": i, "file_name": f"train_val2018/Aves/7/{i}.jpg"} for i in ids],
            "annotations": [{"image_id": i, "category_id": 7 if i != 4 else 3} for i in sorted(ids)],
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{split}2018.json").write_text(json.dumps(record))
        for i in ids:
            picture(folder / images / "Aves" / "7" / f"{i}.jpg", i)


@pytest.mark.parametrize("images", ["2018", "train_val2018"])
def test_inat18(tmp_path, images, monkeypatch):
    inat(tmp_path / "inaturalist", images)
    data = open_dataset("inat18", root=tmp_path)
    assert data.classes == ("3", "7") and data.test.split == "val"
    assert data.templates is None and data.report["templates"] == "none: the classes are numbers"
    assert labelled(data.train) == {f"{images}/Aves/7/4.jpg": 0, f"{images}/Aves/7/5.jpg": 1}
    assert pixel(data.test, 0) == 9
    monkeypatch.setattr(published.INaturalist, "download", None)
    assert len(open_dataset("inat18", root=tmp_path, download=True).train) == 2  # which is there: not again
    record = json.loads((tmp_path / "inaturalist" / "val2018.json").read_text())
    for text, message in (
        (
            json.dumps(record | {"annotations": [{"image_id": 1, "category_id": 7}]}),
            r"val2018.json: annotation .* is of no",
        ),
        (json.dumps(record | {"images": None}), "val2018.json: no list of images"),
        ("<html>", r"val2018.json: no JSON \(Expecting value"),
        (
            json.dumps(record | {"images": [{"id": 9, "file_name": "train_val2018/9.jpg"}]}),
            f"inat18 val: none of 1 images is there, from .*{images}/9.jpg on",
        ),
    ):
        (tmp_path / "inaturalist" / "val2018.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            open_dataset("inat18", root=tmp_path)
    (tmp_path / "inaturalist" / "val2018.json").unlink()
    with pytest.raises(ValueError, match=r"val2018.json: no such file: it is in val2018.json.tar.gz"):
        open_dataset("inat18", root=tmp_path)


@pytest.mark.parametrize("layout", ["torchvision", "folders"])
def test_imagenet(tmp_path, layout):
    folder = tmp_path / "imagenet"
    for split, number in (("train", 1), ("val", 2)):
        for wnid in ("n02012849", "n03126707"):
            picture(folder / split / wnid / f"{wnid}_{number}.JPEG", number)
    names = {"n02012849": ("crane",), "n03126707": ("crane", "derrick")}
    if layout == "torchvision":
        torch.save((names, ["n02012849", "n03126707"]), folder / "meta.bin")
    data = open_dataset("imagenet", root=tmp_path)
    assert data.classes == (("crane", "crane, derrick") if layout == "torchvision" else tuple(names))
    assert labelled(data.test) == {"val/n02012849/n02012849_2.JPEG": 0, "val/n03126707/n03126707_2.JPEG": 1}
    assert data.train.labels.tolist() == [0, 1] and pixel(data.train, 0) == 1 and data.name == "imagenet"
    assert data.report["names"].startswith("WordNet's" if layout == "torchvision" else "none: other folders")
    assert (data.templates is None) == (layout == "folders")  # no prompt can have n02012849
    if layout == "torchvision":
        (folder / "meta.bin").write_bytes(b"no meta")
        with pytest.raises(ValueError, match=r"meta.bin: damaged"):
            open_dataset("imagenet", root=tmp_path)


def test_imagenet_has_the_names_and_templates_of_clip(tmp_path, monkeypatch):
    """timm knows the WordNet ids, by number, and open_clip the names."""
    open_clip, timm = pytest.importorskip("open_clip"), pytest.importorskip("timm.data")
    folder, known = tmp_path / "imagenet", timm.ImageNetInfo()
    wnids = [known.index_to_label_name(number) for number in range(1000)]
    for split in ("val", "test"):
        for wnid in wnids:
            (folder / split / wnid).mkdir(parents=True)
    picture(folder / "val" / wnids[207] / "1.JPEG")
    data = open_dataset("imagenet", root=tmp_path)
    assert data.classes[data.test.labels[0]] == "Golden Retriever" == open_clip.IMAGENET_CLASSNAMES[207]
    assert len(data.templates) == 80 and data.templates[0] == "a bad photo of a {}." and data.test.split == "val"
    for number in (0, 207, 980):  # the ids are in the order of the names
        first = known.index_to_description(number).partition(",")[0]
        assert first.lower() == data.classes[number].lower()
    monkeypatch.setitem(sys.modules, "open_clip", None)
    data = open_dataset("imagenet", root=tmp_path)
    assert data.classes == tuple(wnids) and data.templates is None and "without open_clip" in data.report["names"]


def test_infograph(tmp_path):
    for split, n in (("train", 1), ("test", 2)):
        lines = [
            f"infograph/{each}/infograph_{label:03d}_{n}.jpg {label}" for label, each in ((1, "ant"), (0, "an axe"))
        ]
        for line in lines:
            picture(tmp_path / "domainnet" / line.rpartition(" ")[0], n)
        (tmp_path / "domainnet" / f"infograph_{split}.txt").write_text("\n".join(lines) + "\n")
    data = open_dataset("infograph", root=tmp_path)
    assert data.classes == ("an axe", "ant") and data.train.labels.tolist() == [1, 0] and pixel(data.test, 1) == 2
    for text, message in (
        ("404\n", "infograph_test.txt: line '404', expected a path and the number of a class"),
        ("infograph/ant/1.jpg x\n", "line 'infograph/ant/1.jpg x'"),
        ("\n", "infograph_test.txt: empty"),
        ("infograph/ant/none.jpg 1\n", "infograph test: none of 1 images is there, from .*ant/none.jpg on"),
    ):
        (tmp_path / "domainnet" / "infograph_test.txt").write_text(text)
        with pytest.raises(ValueError, match=message):
            open_dataset("infograph", root=tmp_path)


def test_camelyon17_trains_on_train_and_tests_on_another_hospital(tmp_path):
    pytest.importorskip("wilds")
    folder = tmp_path / "camelyon17_v1.0"
    folder.mkdir()
    (folder / "RELEASE_v1.0.txt").touch()
    centers, splits, tumor = [0, 1, 2, 3, 3, 1], [0, 0, 0, 0, 1, 1], [1, 0, 1, 0, 1, 1]
    lines = [",patient,node,x_coord,y_coord,tumor,slide,center,split"]
    for row, (center, split, label) in enumerate(zip(centers, splits, tumor, strict=True)):
        lines.append(f"{row},004,4,{row},9,{label},0,{center},{split}")
        name = f"patient_004_node_4/patch_patient_004_node_4_x_{row}_y_9.png"
        picture(folder / "patches" / name, row)
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    data = open_dataset("camelyon17", root=tmp_path)
    assert labelled(data.train) == {"train/0000000": 1, "train/0000003": 0}
    assert labelled(data.test) == {"val/0000001": 0, "val/0000005": 1}  # of center 1, whatever its column says
    assert [pixel(data.test, i) for i in range(2)] == [1, 5]
    assert len(data.classes) == 2 and "out of distribution" in data.report["split"]


def test_a_failing_disk_is_no_bad_image(tmp_path):
    """As for files of ours; a stand-in for `wilds`, which opens them itself."""
    (tmp_path / "bad.png").write_bytes(b"404 not found")

    class Found:
        def get_input(self, row):
            if row == 2:
                raise OSError(errno.EIO, "Input/output error")
            return Image.open(tmp_path / ("none.png", "bad.png")[row]).convert("RGB")

    images = _Inputs(Found(), np.arange(3))
    for row, reason in enumerate(("no such file", "undecodable")):
        with pytest.raises(BadImage, match=reason):
            images[row]
    with pytest.raises(OSError, match="Input/output error"):
        images[2]


@pytest.mark.parametrize("name", ["iwildcam", "camelyon17", "rxrx1", "fmow"])
def test_wilds_is_named_where_it_is_missing(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "wilds", None)
    with pytest.raises(ImportError, match=f"{name} .*pip install wilds; or make PATH/train/CLASS"):
        open_dataset(name, root=tmp_path)


@pytest.mark.parametrize("name", sorted(set(PAPERS) - {"iwildcam", "camelyon17", "rxrx1", "fmow", "pcam"}))
def test_what_is_not_there_is_said_in_one_line(tmp_path, name):
    with pytest.raises(ValueError, match=str(tmp_path)) as error:
        open_dataset(name, root=tmp_path)
    assert "\n" not in str(error.value) and ".." not in str(error.value)
    with pytest.raises(ValueError, match=f"{name}: where is it"):
        open_dataset(name)


@pytest.mark.parametrize(
    ("name", "kind"), [("cifar10", "CIFAR10"), ("dtd", "DTD"), ("food101", "Food101"), ("eurosat", "EuroSAT")]
)
def test_download_is_passed_on(tmp_path, monkeypatch, name, kind):
    asked = []
    method = "download" if hasattr(getattr(published, kind), "download") else "_download"
    monkeypatch.setattr(getattr(published, kind), method, lambda self: asked.append(self.root))
    for download in (False, True):
        with pytest.raises(ValueError, match="Dataset not found"):
            open_dataset(name, root=tmp_path, download=download)
    assert list(map(str, asked)) == [str(tmp_path)]
