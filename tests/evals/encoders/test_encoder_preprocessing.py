"""Each encoder's preprocessing makes of photographs the very pixels that its library's own does."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small_encoders import BIT_32, CLIP_32, SIGLIP_32, VIT_32

from aimv2.data.transforms import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD
from aimv2.evals.encoders import open_encoder
from aimv2.evals.encoders.interface import preprocessing_hash
from aimv2.evals.encoders.open_clip import clip_processing
from aimv2.evals.encoders.transformers import transformers_processing
from aimv2.preprocessing import CROP_ROUNDINGS, INTERPOLATIONS, RESIZES, ProcessorConfig
from aimv2.processor import Processor

SIZES = [(512, 512), (451, 300), (300, 451), (225, 223), (224, 231), (33, 47), (16, 90), (257, 255)]  # (W, H)


@pytest.fixture(scope="module")
def photographs() -> list[Image.Image]:
    """Whole, and cut to odd sizes."""
    data = pytest.importorskip("skimage.data")
    whole = [Image.fromarray(getattr(data, name)()) for name in ("astronaut", "chelsea", "coffee", "rocket")]
    cut = [whole[i % 4].crop((20, 10, 20 + w, 10 + h)) for i, (w, h) in enumerate(SIZES)]
    return whole + cut


def assert_same_pixels(config: ProcessorConfig, theirs, photographs) -> None:
    """The same byte everywhere; their fp32 normalisation, in another order, may round elsewhere."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.mean, config.std))
    for photograph in photographs:
        ours, expected = Processor(config)(photograph).pixel_values[0], theirs(photograph)
        assert ours.shape == expected.shape == (3, config.image_size, config.image_size)
        as_bytes = [((pixels * std + mean) * 255).round().to(torch.uint8) for pixels in (ours, expected)]
        assert torch.equal(*as_bytes), photograph.size
        torch.testing.assert_close(ours, expected, rtol=0, atol=2e-6)


# --- timm


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224.augreg_in21k",  # 0.9 of 224, shortest edge, bicubic
        "vit_small_patch14_dinov2.lvd142m",  # 518
        "vit_base_patch16_siglip_256.webli",  # squashed
        "convnext_tiny.fb_in1k",
        "resnet50.a1_in1k",
        "tf_efficientnet_b0.in1k",  # 0.875
        "efficientnet_b1.ft_in1k",  # 256 pixels of all of it
        "mobilenetv3_large_100.miil_in21k",  # bilinear
        "aimv2_large_patch14_336.apple_pt",
    ],
)
def test_timm(name, photographs):
    timm = pytest.importorskip("timm")
    data = timm.data.resolve_data_config({}, pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    assert_same_pixels(ProcessorConfig.from_timm(data, 1), timm.data.create_transform(**data), photographs)


@pytest.mark.parametrize(
    ("spec", "size"),
    [("timm:test_vit", None), ("timm:test_vit3", 96), ("timm:test_resnet", None), ("timm:test_vit", 64)],
)
def test_timm_models_as_opened(spec, size, photographs):
    timm = pytest.importorskip("timm")
    model = timm.create_model(spec.removeprefix("timm:"))
    arguments = {} if size is None else {"img_size": size}
    data = timm.data.resolve_data_config(arguments, model=model)
    config = open_encoder(spec, image_size=size).processor.config
    assert_same_pixels(config, timm.data.create_transform(**data), photographs)


def test_all_of_timm_s_tags():
    """But for borders around the image, images that aren't square, and crops larger than the image."""
    timm = pytest.importorskip("timm")
    refused = []
    for name in timm.list_pretrained():
        data = timm.data.resolve_data_config({}, pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
        try:
            ProcessorConfig.from_timm(data, 1)
        except ValueError:
            height, width = data["input_size"][1:]
            refused.append(name)
            assert data["crop_mode"] == "border" or height != width or data["crop_pct"] > 1, name
    assert 0 < len(refused) < 30 and len(timm.list_pretrained()) > 1000


# --- open_clip


@pytest.mark.parametrize(
    "name",
    [
        ("ViT-B-32", "openai"),
        ("ViT-B-16-SigLIP", "webli"),  # squashed
        ("ViT-B-16-SigLIP-384", "webli"),
        ("ViT-L-14", "commonpool_xl_s13b_b90k"),
        ("MobileCLIP-B", "datacompdr"),  # bilinear, not normalised
        ("ViT-L-14-CLIPA", "datacomp1b"),  # squashed, bilinear
        ("coca_ViT-B-32", "laion2b_s13b_b90k"),
    ],
)
def test_open_clip(name, photographs):
    open_clip = pytest.importorskip("open_clip")
    entry = open_clip.transform.merge_preprocess_dict(
        open_clip.transform.PreprocessCfg(), open_clip.get_pretrained_cfg(*name)
    )
    entry["size"] = open_clip.get_model_config(name[0])["vision_cfg"]["image_size"]
    theirs = open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(**entry), is_train=False)
    assert_same_pixels(clip_processing(entry, 1), theirs, photographs)


@pytest.mark.parametrize("name", ["tiny-clip", "tiny-siglip"])
def test_open_clip_models_as_opened(spec_of, name, photographs):
    open_clip = pytest.importorskip("open_clip")
    encoder = open_encoder(spec_of(name))
    entry = open_clip.transform.PreprocessCfg(**encoder.model.preprocess_cfg)
    theirs = open_clip.transform.image_transform_v2(entry, is_train=False)
    assert_same_pixels(encoder.processor.config, theirs, photographs)


def test_all_of_open_clip_s_tags():
    open_clip = pytest.importorskip("open_clip")
    for name, tag in open_clip.list_pretrained():
        entry = open_clip.transform.merge_preprocess_dict(
            open_clip.transform.PreprocessCfg(), open_clip.get_pretrained_cfg(name, tag)
        )
        config = clip_processing(entry | {"size": (224, 224)}, 14)
        assert (config.image_size, config.mean, config.std) == (224, tuple(entry["mean"]), tuple(entry["std"])), tag
        assert config.resize == {"shortest": "shortest_edge"}.get(entry["resize_mode"], entry["resize_mode"]), tag


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"size": (224, 336)}, r"size \(224, 336\)"), ({"resize_mode": "longest"}, "resize_mode 'longest'")],
)
def test_what_open_clip_does_and_we_do_not(changes, message):
    entry = {"size": 224, "mean": CLIP_MEAN, "std": 0.5, "interpolation": "random", "resize_mode": "shortest"}
    config = clip_processing(entry, 14)
    assert (config.std, config.interpolation, config.patch_size) == ((0.5, 0.5, 0.5), "bicubic", 14)
    with pytest.raises(ValueError, match=message):
        clip_processing(entry | changes, 14)


# --- transformers

DINOV2 = {
    "image_processor_type": "BitImageProcessor",
    "crop_size": {"height": 224, "width": 224},
    "size": {"shortest_edge": 256},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": list(IMAGENET_MEAN),
    "image_std": list(IMAGENET_STD),
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
}  # facebook/dinov2-base
ENTRIES = [
    DINOV2,
    {"image_processor_type": "CLIPImageProcessor"},
    {"feature_extractor_type": "CLIPFeatureExtractor", "size": 336, "crop_size": 336},  # clip-vit-large-patch14-336
    {"image_processor_type": "CLIPImageProcessorFast", "size": {"height": 40, "width": 40}, "crop_size": 33},
    {"image_processor_type": "SiglipImageProcessor", "size": {"height": 256, "width": 256}, "do_convert_rgb": None},
    {"image_processor_type": "ViTImageProcessor"},
    {"feature_extractor_type": "ViTFeatureExtractor", "size": 64, "resample": 3},
    {"image_processor_type": "ViTImageProcessor", "do_normalize": False},
    CLIP_32,
    SIGLIP_32,
    BIT_32,
    VIT_32,
]


@pytest.mark.parametrize("entry", ENTRIES, ids=range(len(ENTRIES)))
def test_transformers(entry, photographs, tmp_path):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(entry))
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    config = transformers_processing(theirs.to_dict(), 1)
    assert_same_pixels(
        config, lambda image: torch.from_numpy(np.stack(theirs(image)["pixel_values"])[0]).float(), photographs
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"image_processor_type": "Siglip2ImageProcessor"},
            "image processor Siglip2ImageProcessor: expected one of CLIP",
        ),
        ({"size": {"shortest_edge": 256}, "do_center_crop": False}, "do_center_crop False"),
        ({"do_pad": True}, "do_pad True"),
        ({"resample": 0}, "resample 0"),
        ({"do_rescale": False}, "do_rescale False"),
    ],
)
def test_what_transformers_does_and_we_do_not(changes, message):
    with pytest.raises(ValueError, match=message):
        transformers_processing(DINOV2 | changes, 14)


def test_another_size_keeps_the_share_of_the_crop():
    config = transformers_processing(DINOV2, 14, image_size=448)
    assert (config.image_size, config.resize_size, config.patch_size) == (448, 512, 14)
    assert transformers_processing(DINOV2, 15).patch_size == 1  # which does not divide 224


# --- the hash


@st.composite
def configs(draw) -> ProcessorConfig:
    """Few values each, so that two often mean the same."""
    resize, patch = draw(st.sampled_from(sorted(RESIZES))), draw(st.sampled_from([4, 8]))
    size = None if resize == "native" else draw(st.sampled_from([16, 24]))
    fewest = draw(st.sampled_from([4, 9]))
    return ProcessorConfig(
        image_size=size,
        patch_size=patch,
        mean=draw(st.sampled_from([CLIP_MEAN, IMAGENET_MEAN])),
        std=draw(st.sampled_from([CLIP_STD, (1.0, 1.0, 1.0)])),
        resize=resize,
        crop_pct=1.0 if size is None else size / (size + draw(st.integers(0, 3))),
        crop_rounding=draw(st.sampled_from(CROP_ROUNDINGS)),
        interpolation=draw(st.sampled_from(sorted(INTERPOLATIONS))),
        min_patches=fewest,
        max_patches=draw(st.sampled_from([fewest, 20])),
    )


GROUPS = [("image_size", "resize", "crop_pct"), ("min_patches", "max_patches")]  # which only go together
GROUPS += [(name,) for name in ("patch_size", "mean", "std", "crop_rounding", "interpolation")]


@given(configs(), configs(), st.sets(st.sampled_from(GROUPS), max_size=2))
@settings(deadline=None, max_examples=200)
def test_the_hash_changes_when_and_only_when_pixels_do(one, other, groups):
    """On noise, whose sides leave every margin to the crop, and are enlarged and shrunk."""
    other = replace(one, **{name: getattr(other, name) for group in groups for name in group})
    rng = np.random.default_rng(0)
    sides = [(20, width) for width in range(20, 32)] + [(43, 22), (7, 30), (8, 8)]
    images = [Image.fromarray(rng.integers(0, 256, (*side, 3), np.uint8)) for side in sides]
    pixels = [[Processor(config)(image).pixel_values for image in images] for config in (one, other)]
    same = all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(*pixels, strict=True))
    assert (preprocessing_hash(one) == preprocessing_hash(other)) == same


def test_hashes_are_what_they_were():
    """Results are skipped and compared by them: changing one on purpose makes all finished evaluations stale."""
    config = ProcessorConfig(image_size=224, patch_size=14, mean=CLIP_MEAN, std=CLIP_STD)
    assert preprocessing_hash(config) == "cd54595bf816a87f015f47f1dc68c84de40b17e3b0e9003d29158d050a182453"
