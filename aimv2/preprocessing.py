"""What a checkpoint says about preprocessing: our words for it, transformers' and timm's, to and from one config.

S side of a square image, P patch side.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING

from aimv2.data.transforms import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD

if TYPE_CHECKING:  # it needs what only training has
    from aimv2.data.loader import DataConfig

RESIZES = {  # and how an export's config.json says it
    "shortest_edge": "shortest edge, then centre crop",
    "squash": "whole image to a square, then centre crop",
    "native": "nearest size on the patch grid, aspect kept",
}
INTERPOLATIONS = {"bicubic": 3, "bilinear": 2, "lanczos": 1}  # and Pillow's number, which transformers writes
CROP_ROUNDINGS = ("half_even", "down")  # torchvision, timm and `eval_transform`; transformers

_CLIP_CLASSES = ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil", "CLIPFeatureExtractor")
_CLIP = {  # CLIPImageProcessor's defaults
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": 224},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": list(CLIP_MEAN),
    "image_std": list(CLIP_STD),
}
_TIMM = {  # the defaults of timm's resolve_data_config
    "input_size": (3, 224, 224),
    "interpolation": "bicubic",
    "mean": IMAGENET_MEAN,
    "std": IMAGENET_STD,
    "crop_pct": 0.875,
    "crop_mode": "center",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessorConfig:
    """What `Processor` does to an image. The constructors raise ValueError naming the key and the value."""

    image_size: int | None  # S; None: native
    patch_size: int  # P
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize: str = "shortest_edge"  # one of RESIZES
    crop_pct: float = 1.0  # S over the size before the crop, as in timm; Apple's README has 0.875
    crop_rounding: str = "half_even"  # of half a pixel of margin in the centre crop
    interpolation: str = "bicubic"
    min_patches: int = 112  # of a native image; both are what the released checkpoint supports
    max_patches: int = 4096

    def __post_init__(self):
        _one_of("resize", self.resize, RESIZES)
        _one_of("interpolation", self.interpolation, INTERPOLATIONS)
        _one_of("crop_rounding", self.crop_rounding, CROP_ROUNDINGS)
        _expect("patch_size", self.patch_size, _is_count(self.patch_size), "1 or more")
        if self.resize == "native":
            _expect("image_size", self.image_size, self.image_size is None, "None with resize 'native'")
        else:
            fits = _is_count(self.image_size) and self.image_size % self.patch_size == 0
            _expect("image_size", self.image_size, fits, f"a multiple of patch_size {self.patch_size}")
        _share("crop_pct", self.crop_pct)
        _expect("mean", self.mean, _is_rgb(self.mean), "three numbers")
        _expect("std", self.std, _is_rgb(self.std) and min(self.std) > 0, "three positive numbers")
        _expect("max_patches", self.max_patches, _is_count(self.max_patches), "1 or more")
        fits = _is_count(self.min_patches) and self.min_patches <= self.max_patches
        _expect("min_patches", self.min_patches, fits, f"from 1 to max_patches {self.max_patches}")

    @classmethod
    def of_training(cls, data: "DataConfig", image_size: int, patch_size: int) -> "ProcessorConfig":
        """How an encoder that is trained on `data` at `image_size` expects its images.

        Where images are neither cropped nor kept at their aspect ratio, they are squashed, as in training.
        """
        transform, native = data.transform, data.native
        known = {"patch_size": patch_size, "mean": transform.mean, "std": transform.std}
        if native is not None:
            limits = {"min_patches": native.min_patches, "max_patches": native.max_patches}
            return cls(image_size=None, resize="native", **limits, **known)
        resize = "squash" if transform.crop_scale is None else "shortest_edge"
        return cls(image_size=image_size, resize=resize, **known)

    @property
    def resize_size(self) -> int:
        """Shortest side before the crop."""
        return round(self.image_size / self.crop_pct)

    @classmethod
    def from_preprocessing(cls, entry: Mapping, patch_size: int | None = None) -> "ProcessorConfig":
        """From "preprocessing" of an export's config.json.

        `patch_size` is the encoder's, for the entries of older exports, which don't say it.
        """
        for key, value in entry.items():
            names = [field.name for field in fields(cls)]
            _expect(key, value, key in names, f"no such key in preprocessing, but {', '.join(names)}")
        for key in ("image_size", "mean", "std", "resize"):
            _expect(f"preprocessing {entry}", key, key in entry, "to be there")
        stored = entry.get("patch_size", patch_size)
        _expect("patch_size", patch_size, patch_size in (None, stored), f"{stored}, as in the preprocessing")
        names = {words: name for name, words in RESIZES.items()}
        _one_of("resize", entry["resize"], names)
        changes = {"mean": _rgb(entry["mean"]), "std": _rgb(entry["std"]), "resize": names[entry["resize"]]}
        return cls(**{**entry, "patch_size": stored, **changes})

    def to_preprocessing(self) -> dict:
        """The inverse of `from_preprocessing`, ready for JSON."""
        return asdict(self) | {"mean": list(self.mean), "std": list(self.std), "resize": RESIZES[self.resize]}

    @classmethod
    def from_transformers(cls, entry: Mapping, patch_size: int) -> "ProcessorConfig":
        """From a preprocessor_config.json; what it leaves out is CLIPImageProcessor's. Neither resize nor crop: native.

        The limits of a native image are not in that file: they are the defaults.
        """
        entry = _CLIP | {key: value for key, value in entry.items() if value is not None}
        kind = entry.get("image_processor_type", entry.get("feature_extractor_type", _CLIP_CLASSES[0]))
        _one_of("image_processor_type", kind, _CLIP_CLASSES)
        for key, value in entry.items():
            _expect(key, value, not value or not key.startswith("do_") or key in _CLIP, "false")
        _expect("do_rescale", entry["do_rescale"], entry["do_rescale"], "true")
        factor = entry["rescale_factor"]
        _expect("rescale_factor", factor, _is_number(factor) and math.isclose(factor, 1 / 255), "1/255")
        names = {number: name for name, number in INTERPOLATIONS.items()}
        _one_of("resample", entry["resample"], names)
        values = {
            "patch_size": patch_size,
            "mean": _rgb(entry["image_mean"]) if entry["do_normalize"] else (0.0, 0.0, 0.0),
            "std": _rgb(entry["image_std"]) if entry["do_normalize"] else (1.0, 1.0, 1.0),
            "interpolation": names[entry["resample"]],
            "crop_rounding": "down",
        }
        if not entry["do_resize"]:
            _expect("do_center_crop", entry["do_center_crop"], not entry["do_center_crop"], "false without do_resize")
            return cls(image_size=None, resize="native", **values)
        size, resize = _transformers_size(entry["size"])
        crop = size
        if entry["do_center_crop"]:
            crop = _square("crop_size", entry["crop_size"])
            _expect("crop_size", entry["crop_size"], crop <= size, f"at most size {entry['size']}")
        else:
            _expect("do_center_crop", False, resize == "squash", f"true with size {entry['size']}")
        return cls(image_size=crop, resize=resize, crop_pct=crop / size, **values)

    def to_transformers(self) -> dict:
        """A preprocessor_config.json that `AutoImageProcessor.from_pretrained` opens as CLIPImageProcessor.

        It can't say everything: half a pixel is rounded down there; and a native image is left at its size, so that its
        sides should be multiples of P already.
        """
        entry = {
            **_CLIP,
            "image_processor_type": _CLIP_CLASSES[0],
            "resample": INTERPOLATIONS[self.interpolation],
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }
        if self.resize == "native":
            del entry["size"], entry["crop_size"]
            return entry | {"do_resize": False, "do_center_crop": False}
        side, squash = self.resize_size, self.resize == "squash"
        return entry | {
            "do_center_crop": not squash or side > self.image_size,
            "size": {"height": side, "width": side} if squash else {"shortest_edge": side},
            "crop_size": {"height": self.image_size, "width": self.image_size},
        }

    @classmethod
    def from_timm(cls, pretrained_cfg: Mapping, patch_size: int) -> "ProcessorConfig":
        """From a `pretrained_cfg`; what it leaves out is what timm's `resolve_data_config` fills in."""
        entry = _TIMM | {key: value for key, value in pretrained_cfg.items() if value is not None}
        shape = entry["input_size"]
        square = isinstance(shape, list | tuple) and len(shape) == 3 and shape[0] == 3 and shape[1] == shape[2]
        _expect("input_size", shape, square and _is_count(shape[1]), "(3, S, S)")
        _share("crop_pct", entry["crop_pct"])
        resizes = {"center": "shortest_edge", "squash": "squash"}
        _one_of("crop_mode", entry["crop_mode"], resizes)
        return cls(
            image_size=shape[1],
            patch_size=patch_size,
            mean=_rgb(entry["mean"]),
            std=_rgb(entry["std"]),
            resize=resizes[entry["crop_mode"]],
            crop_pct=shape[1] / math.floor(shape[1] / entry["crop_pct"]),  # timm rounds down, `resize_size` to nearest
            interpolation=entry["interpolation"],
        )

    def to_timm(self, image_size: int) -> dict:
        """What a `pretrained_cfg` says of images; of native ones, that they are squares of `image_size`."""
        side, crop_pct = self.image_size or image_size, self.crop_pct
        if self.image_size and math.floor(side / crop_pct) != self.resize_size:
            crop_pct = side / (self.resize_size + 0.5)  # timm rounds down, `resize_size` to nearest
        return {
            "input_size": (3, side, side),
            "interpolation": self.interpolation,
            "crop_pct": crop_pct,
            "crop_mode": "squash" if self.resize == "squash" else "center",
            "mean": self.mean,
            "std": self.std,
        }


def _transformers_size(size) -> tuple[int, str]:
    """(pixels, resize) from CLIPImageProcessor's `size`; a bare number, in old files, is the shortest edge."""
    size = {"shortest_edge": size} if _is_count(size) else size
    if isinstance(size, Mapping) and size.keys() == {"shortest_edge"} and _is_count(size["shortest_edge"]):
        return size["shortest_edge"], "shortest_edge"
    return _square("size", size, "{'shortest_edge': S} or "), "squash"


def _square(key: str, size, alternative: str = "") -> int:
    size = {"height": size, "width": size} if _is_count(size) else size
    square = isinstance(size, Mapping) and size.keys() == {"height", "width"} and size["height"] == size["width"]
    _expect(key, size, square and _is_count(size["height"]), alternative + "{'height': S, 'width': S}")
    return size["height"]


def _rgb(numbers):
    """JSON has no tuples."""
    return tuple(numbers) if isinstance(numbers, list) else numbers


def _is_rgb(value) -> bool:
    return isinstance(value, tuple) and len(value) == 3 and all(map(_is_number, value))


def _is_number(value) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _share(key: str, value) -> None:
    _expect(key, value, _is_number(value) and 0 < value <= 1, "over 0, at most 1")


def _one_of(key: str, value, allowed: Iterable) -> None:
    _expect(key, value, value in list(allowed), f"one of {', '.join(map(str, allowed))}")


def _expect(key: str, value, holds, expected: str) -> None:
    if not holds:
        raise ValueError(f"{key} {value!r}: expected {expected}")
