"""timm's own transform prepares images as the checkpoint says."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_models import V2, random_encoder

from aimv2.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from aimv2.exports import export_model
from aimv2.pretrained import load_encoder

timm = pytest.importorskip("timm")

from timm_settings import PROCESSING, ours  # noqa: E402

from aimv2.harnesses.timm_models import timm_config  # noqa: E402


@pytest.mark.parametrize(
    "processing",
    [
        PROCESSING,
        replace(PROCESSING, resize="squash", interpolation="bilinear", mean=IMAGENET_MEAN, std=IMAGENET_STD),
        replace(PROCESSING, crop_pct=0.875),
        replace(PROCESSING, crop_pct=0.9),  # 62.2 before the crop
        replace(PROCESSING, crop_pct=0.93, resize="squash"),  # 60.2
        replace(PROCESSING, image_size=224, crop_pct=0.9),  # 248.9: 249 here, where timm cuts to 248
    ],
)
def test_timm_prepares_images_as_the_checkpoint_says(tmp_path, processing):
    config = replace(V2, depth=1, image_size=processing.image_size)
    folder = export_model(random_encoder(config), tmp_path / "e", config=config, processing=processing)
    model = timm.create_model("aimv2_export", source=str(folder))
    data = timm.data.resolve_data_config({}, model=model)
    assert data == timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**data)
    processor = load_encoder(folder).processor
    generator = np.random.default_rng(0)
    for width, height in ((300, 200), (97, 131), (56, 56), (250, 249)):
        image = Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
        # The same 8-bit pixels; (x / 255 - mean) / std in fp32, where a level is some 1e-2.
        torch.testing.assert_close(transform(image), processor(image).pixel_values[0], rtol=0, atol=1e-6)
        assert torch.equal(model.processor(image).pixel_values, processor(image).pixel_values)


@given(st.integers(1, 80), st.floats(0.05, 1.0))
def test_size_before_the_crop(patches, crop_pct):
    """timm's own is floor(size / crop_pct), which for 14 / (14 / 25) gives 24."""
    processing = replace(PROCESSING, image_size=7 * patches, patch_size=7, crop_pct=crop_pct)
    entry = timm_config(processing, 7)
    assert math.floor(7 * patches / entry["crop_pct"]) == processing.resize_size and entry["crop_pct"] <= 1


def test_img_size_is_prepared_for(exports):
    for arguments in ({"img_size": 84}, {"img_size": 84, "dynamic_img_size": True}):
        data = timm.data.resolve_data_config({}, model=ours(exports, **arguments))
        assert data["input_size"] == (3, 84, 84) and data["mean"] == PROCESSING.mean
    assert timm_config(PROCESSING, 56)["crop_pct"] == 1.0


def test_half_a_pixel_is_rounded_down_by_the_models_own_processor(exports):
    """As transformers does, and its checkpoints say; timm's transform can't: it is a pixel beside it, now and then."""
    transformers = pytest.importorskip("transformers")
    model = timm.create_model("aimv2_export", source=str(exports / "transformers"))
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
    theirs = transformers.CLIPImageProcessorPil.from_pretrained(exports / "transformers")
    generator = np.random.default_rng(0)
    for width, same in ((57, True), (58, True), (59, False), (60, True), (61, True), (63, False)):  # 1.5 and 3.5
        image = Image.fromarray(generator.integers(0, 256, (56, width, 3), dtype=np.uint8))
        expected = theirs(image, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(model.processor(image).pixel_values, expected, rtol=0, atol=1e-6)
        assert torch.allclose(transform(image), expected[0], atol=1e-6) == same


def test_another_input_size_is_prepared_for(exports):
    model = ours(exports)
    model.set_input_size(img_size=84)
    assert timm.data.resolve_model_data_config(model)["input_size"] == (3, 84, 84)
    assert model.processor(Image.new("RGB", (90, 100))).pixel_values.shape == (1, 3, 84, 84)
