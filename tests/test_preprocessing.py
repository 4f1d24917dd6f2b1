"""What checkpoints carry, read and written. What it means for pixels is in test_processor.py."""

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aimv2.data.transforms import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD
from aimv2.preprocessing import CROP_ROUNDINGS, INTERPOLATIONS, RESIZES, ProcessorConfig

SQUARE = ProcessorConfig(image_size=224, patch_size=14, mean=CLIP_MEAN, std=CLIP_STD)
NATIVE = replace(SQUARE, image_size=None, resize="native")
HUB = {  # of an AIMv2 at 224 px; transformers writes the same
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": list(CLIP_MEAN),
    "image_processor_type": "CLIPImageProcessor",
    "image_std": list(CLIP_STD),
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 224},
}
EXPORT = {  # of version 0.1.0
    "image_size": 224,
    "mean": list(IMAGENET_MEAN),
    "std": list(IMAGENET_STD),
    "resize": "shortest edge, then centre crop",
    "interpolation": "bicubic",
}


@st.composite
def configs(draw) -> ProcessorConfig:
    patch = draw(st.integers(1, 32))
    resize = draw(st.sampled_from(sorted(RESIZES)))
    size = None if resize == "native" else patch * draw(st.integers(1, 40))
    before = 1 if size is None else draw(st.integers(size, 2 * size))
    few = draw(st.integers(1, 300))
    return ProcessorConfig(
        image_size=size,
        patch_size=patch,
        mean=draw(st.sampled_from([CLIP_MEAN, IMAGENET_MEAN])),
        std=draw(st.sampled_from([CLIP_STD, (1.0, 1.0, 1.0)])),
        resize=resize,
        crop_pct=1.0 if size is None else size / before,
        crop_rounding=draw(st.sampled_from(CROP_ROUNDINGS)),
        interpolation=draw(st.sampled_from(sorted(INTERPOLATIONS))),
        min_patches=few,
        max_patches=draw(st.integers(few, 5000)),
    )


# --- ours


@given(configs())
@settings(deadline=None)
def test_our_entry_there_and_back(config):
    entry = json.loads(json.dumps(config.to_preprocessing()))
    assert ProcessorConfig.from_preprocessing(entry) == config
    assert ProcessorConfig.from_preprocessing(entry, config.patch_size) == config


def test_entries_of_older_exports():
    """They have no patch size, and mean what `eval_transform` does."""
    expected = ProcessorConfig(image_size=224, patch_size=14, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    assert ProcessorConfig.from_preprocessing(EXPORT, 14) == expected
    assert expected.crop_rounding == "half_even" and expected.crop_pct == 1
    assert EXPORT.items() <= expected.to_preprocessing().items()


@pytest.mark.parametrize(
    ("entry", "patch_size", "message"),
    [
        ({**EXPORT, "colour": "BGR"}, 14, "colour 'BGR': expected no such key"),
        ({**EXPORT, "resize": "fit"}, 14, "resize 'fit': expected one of shortest edge, then centre crop, "),
        ({**EXPORT, "resize": ["fit"]}, 14, r"resize \['fit'\]"),
        ({**EXPORT, "mean": [0.5, 0.5]}, 14, r"mean \(0.5, 0.5\): expected three"),
        ({**EXPORT, "mean": 0.5}, 14, "mean 0.5: expected three"),
        ({**EXPORT, "crop_pct": "1"}, 14, "crop_pct '1'"),
        ({k: v for k, v in EXPORT.items() if k != "std"}, 14, "'std': expected to be there"),
        (EXPORT, None, "patch_size None: expected 1 or more"),
        ({**EXPORT, "patch_size": 14}, 16, "patch_size 16: expected 14"),
        (EXPORT, 15, "image_size 224: expected a multiple of patch_size 15"),
    ],
)
def test_entries_that_are_refused(entry, patch_size, message):
    with pytest.raises(ValueError, match=message):
        ProcessorConfig.from_preprocessing(entry, patch_size)


@pytest.mark.parametrize(
    "changes",
    [
        {"image_size": None},
        {"image_size": 0},
        {"image_size": 224.0},
        {"patch_size": 0},
        {"patch_size": True},
        {"resize": "longest_edge"},
        {"resize": "native"},
        {"interpolation": "nearest"},
        {"crop_rounding": "up"},
        {"crop_pct": 0},
        {"crop_pct": 1.01},
        {"crop_pct": math.nan},
        {"std": (0.2, 0.2, 0.0)},
        {"mean": (0.2, 0.2, math.inf)},
        {"min_patches": 0},
        {"min_patches": 5000},
        {"max_patches": 4096.5},
    ],
)
def test_impossible_configs(changes):
    with pytest.raises(
        ValueError, match=rf"{next(iter(changes)) if 'native' not in changes.values() else 'image_size'} "
    ):
        replace(SQUARE, **changes)


# --- transformers


def test_the_hub_file():
    config = ProcessorConfig.from_transformers(HUB, 14)
    assert config == replace(SQUARE, crop_rounding="down")
    assert config.to_transformers() == {**HUB, "rescale_factor": 1 / 255}


def test_what_a_transformers_file_leaves_out_is_that_class_s():
    assert ProcessorConfig.from_transformers({}, 14) == ProcessorConfig.from_transformers(HUB, 14)
    older = {**HUB, "size": 224, "crop_size": 224, "feature_extractor_type": "CLIPFeatureExtractor"}
    assert ProcessorConfig.from_transformers(older, 14) == ProcessorConfig.from_transformers(HUB, 14)


def test_the_native_hub_file():
    config = ProcessorConfig.from_transformers({**HUB, "do_resize": False, "do_center_crop": False}, 14)
    assert config == replace(NATIVE, crop_rounding="down")
    assert (config.min_patches, config.max_patches) == (112, 4096)


@given(configs())
@settings(deadline=None)
def test_transformers_there_and_back(config):
    """But for what that file can't say."""
    expected = replace(config, crop_rounding="down", min_patches=112, max_patches=4096)
    entry = json.loads(json.dumps(config.to_transformers()))
    assert ProcessorConfig.from_transformers(entry, config.patch_size) == expected


def test_without_normalisation():
    config = ProcessorConfig.from_transformers({**HUB, "do_normalize": False}, 14)
    assert (config.mean, config.std) == ((0, 0, 0), (1, 1, 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_processor_type": "Qwen2VLImageProcessor"}, "image_processor_type 'Qwen2VLImageProcessor'"),
        ({"do_pad": True}, "do_pad True: expected false"),
        ({"do_rescale": False}, "do_rescale False: expected true"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor 0.0078"),
        ({"rescale_factor": "1/255"}, "rescale_factor '1/255'"),
        ({"resample": 0}, "resample 0: expected one of 3, 2, 1"),
        ({"size": {"longest_edge": 224}}, r"size \{'longest_edge': 224\}: expected \{'shortest_edge': S\} or"),
        ({"size": {"shortest_edge": 224, "longest_edge": 448}}, "size "),
        ({"size": {"height": 224, "width": 336}}, "size "),
        ({"crop_size": {"height": 224, "width": 112}}, "crop_size "),
        ({"crop_size": 238}, "crop_size 238: expected at most size "),
        ({"do_center_crop": False}, "do_center_crop False: expected true with size"),
        ({"do_resize": False}, "do_center_crop True: expected false without do_resize"),
        ({"image_std": [0.5]}, "std "),
        ({"size": 225, "crop_size": 225}, "image_size 225: expected a multiple of patch_size 14"),
    ],
)
def test_transformers_files_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ProcessorConfig.from_transformers({**HUB, **changes}, 14)


# --- timm


@pytest.mark.parametrize("name", ["aimv2_large_patch14_224", "aimv2_3b_patch14_448"])
def test_timm_knows_the_same_preprocessing(name):
    timm = pytest.importorskip("timm")
    config = ProcessorConfig.from_timm(timm.get_pretrained_cfg(name).to_dict(), 14)
    assert config == replace(SQUARE, image_size=int(name[-3:]))


def test_what_a_timm_config_leaves_out():
    data = pytest.importorskip("timm.data")
    theirs = data.resolve_data_config(pretrained_cfg={"num_classes": 0})
    assert ProcessorConfig.from_timm({}, 14) == ProcessorConfig.from_timm(theirs, 14)


@given(st.integers(1, 700), st.floats(0.3, 1))
def test_timm_rounds_the_size_before_the_crop_down(size, crop_pct):
    config = ProcessorConfig.from_timm({"input_size": (3, size, size), "crop_pct": crop_pct}, 1)
    assert config.resize_size == math.floor(size / crop_pct)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_size": (1, 224, 224)}, r"input_size \(1, 224, 224\): expected \(3, S, S\)"),
        ({"input_size": (3, 224, 336)}, "input_size "),
        ({"input_size": 224}, "input_size 224"),
        ({"crop_mode": "border"}, "crop_mode 'border': expected one of center, squash"),
        ({"crop_pct": 1.1}, "crop_pct 1.1"),
        ({"interpolation": "random"}, "interpolation 'random'"),
    ],
)
def test_timm_configs_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ProcessorConfig.from_timm(changes, 14)
