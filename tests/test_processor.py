import copy
import io
import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from aimv2.data.transforms import CLIP_MEAN, CLIP_STD, TransformConfig, eval_transform, resize_transform
from aimv2.preprocessing import ProcessorConfig
from aimv2.processor import MOST_ASPECT, ProcessedImages, Processor, native_grid, read_image

SQUARE = ProcessorConfig(image_size=56, patch_size=14, mean=CLIP_MEAN, std=CLIP_STD)
NATIVE = replace(SQUARE, image_size=None, resize="native", min_patches=4, max_patches=24)
PLAIN = replace(SQUARE, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))  # shows the bytes
SIZES = [(57, 56), (640, 427), (427, 640), (60, 57), (56, 59), (301, 59), (33, 190), (20, 31), (9, 7), (500, 500)]
MEAN, STD = torch.tensor(CLIP_MEAN).view(3, 1, 1), torch.tensor(CLIP_STD).view(3, 1, 1)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth as a photograph is, with strong colours and different corners."""
    return noise(9, 7, seed).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def to_bytes(pixels: torch.Tensor) -> torch.Tensor:
    """Normalised with CLIP's statistics -> levels 0..255."""
    return ((pixels * STD + MEAN) * 255).round()


def pixels_of(image, config: ProcessorConfig = PLAIN) -> torch.Tensor:
    return Processor(config)(image).pixel_values


# --- the references


@pytest.fixture(scope="module")
def transformers_processor(tmp_path_factory):
    """(config, backend) -> what AutoImageProcessor makes of the file we write, without code from there."""
    auto = pytest.importorskip("transformers").AutoImageProcessor

    def build(config: ProcessorConfig, backend: str):
        folder = tmp_path_factory.mktemp("processor")
        (folder / "preprocessor_config.json").write_text(json.dumps(config.to_transformers()))
        return auto.from_pretrained(folder, backend=backend, trust_remote_code=False)

    return build


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos"])
@pytest.mark.parametrize(
    "changes", [{}, {"crop_pct": 0.875}, {"resize": "squash"}, {"resize": "squash", "crop_pct": 0.8}]
)
def test_equal_to_transformers_with_pillow(transformers_processor, changes, interpolation):
    """The levels are equal. Theirs are scaled in float64, so that normalised values may differ in the last bit or two:
    2^-22 of 2.6, the largest value."""
    config = replace(SQUARE, crop_rounding="down", interpolation=interpolation, **changes)
    theirs = transformers_processor(config, "pil")
    assert type(theirs).__name__ == "CLIPImageProcessorPil"
    for size in SIZES:
        for image in (noise(*size), picture(*size)):
            found, expected = pixels_of(image, config), theirs(image, return_tensors="pt").pixel_values
            assert torch.equal(to_bytes(found), to_bytes(expected)), (size, config)
            assert (found - expected).abs().max() < 1e-6


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos"])
def test_close_to_transformers_with_torchvision(transformers_processor, interpolation):
    """What a user of AutoImageProcessor gets by default. The two differ by rounding: by 1 level in one byte of 200, and
    2 where the first pass was rounded differently."""
    config = replace(SQUARE, crop_rounding="down", interpolation=interpolation)
    theirs = transformers_processor(config, "torchvision")
    assert type(theirs).__name__ == "CLIPImageProcessor"
    levels = []
    for seed, size in enumerate(SIZES):
        image = picture(*size, seed)
        expected = theirs(image, return_tensors="pt").pixel_values
        levels.append((to_bytes(pixels_of(image, config)) - to_bytes(expected)).abs().flatten())
    levels = torch.cat(levels)
    assert levels.max() <= 2
    assert (levels > 0).float().mean() < 0.02 and (levels > 1).float().mean() < 0.001


@pytest.mark.parametrize("size", [(250, 734), (734, 250), (240, 700)])
def test_why_noise_differs_from_torchvision(transformers_processor, size):
    """The order of the passes, where Pillow does the vertical one first: done in torchvision's order, one at a time,
    noise is as close as pictures are."""
    config = replace(SQUARE, image_size=224, crop_rounding="down")
    image = noise(*size)
    short = min(size)
    width, height = (int(224 * side / short) for side in size)
    ordered = image.resize((width, size[1]), Image.Resampling.BICUBIC).resize((width, height), Image.Resampling.BICUBIC)
    expected = to_bytes(transformers_processor(config, "torchvision")(image, return_tensors="pt").pixel_values)
    assert (to_bytes(pixels_of(ordered, config)) - expected).abs().max() <= 2


def test_images_on_the_grid_are_those_of_the_native_hub_file(transformers_processor):
    """It neither resizes nor crops."""
    image = picture(5 * 14, 3 * 14)
    theirs = transformers_processor(NATIVE, "pil")(image, return_tensors="pt").pixel_values
    assert (pixels_of(image, NATIVE) - theirs).abs().max() < 1e-6  # float64 against float32, as above


def test_transformers_makes_the_same_of_the_same_modes(transformers_processor):
    config = replace(SQUARE, crop_rounding="down")
    theirs = transformers_processor(config, "pil")
    see_through = picture(90, 70)
    see_through.putalpha(noise(90, 70).convert("L"))
    for image in (see_through, *(picture(90, 70).convert(mode) for mode in ("L", "1", "P", "CMYK", "YCbCr", "LA"))):
        expected = theirs(image, return_tensors="pt").pixel_values
        assert torch.equal(to_bytes(pixels_of(image, config)), to_bytes(expected)), image.mode


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos"])
@pytest.mark.parametrize(("crop_mode", "crop_pct"), [("center", 1.0), ("center", 0.9), (None, None), ("squash", 0.93)])
def test_equal_to_timm(crop_mode, crop_pct, interpolation):
    """Bit for bit: the same operations in the same order."""
    data = pytest.importorskip("timm.data")
    cfg = {"input_size": (3, 56, 56), "crop_mode": crop_mode, "crop_pct": crop_pct, "interpolation": interpolation}
    transform = data.create_transform(**data.resolve_data_config(pretrained_cfg=cfg))
    processor = Processor(ProcessorConfig.from_timm(cfg, 14))
    for size in SIZES:
        image = noise(*size)
        assert torch.equal(processor(image).pixel_values[0], transform(image)), size


def test_equal_to_the_transforms_of_training():
    transform = TransformConfig(image_size=56, mean=CLIP_MEAN, std=CLIP_STD)
    for size in SIZES:
        image = noise(*size)
        assert torch.equal(pixels_of(image, SQUARE)[0], eval_transform(image, transform))
        squashed = pixels_of(image, replace(SQUARE, resize="squash"))
        assert torch.equal(squashed[0], resize_transform(image, transform))


def test_half_a_pixel_of_margin_is_the_only_difference_of_the_roundings():
    """A margin of 3 leaves 1 or 2 above; margins of 1, 2 and 4 leave the same."""
    down = replace(PLAIN, crop_rounding="down")
    for margin, same in ((1, True), (2, True), (3, False), (4, True)):
        image = noise(56, 56 + margin)
        assert torch.equal(pixels_of(image), pixels_of(image, down)) == same
        top = margin // 2
        expected = torch.from_numpy(np.array(image)[top : top + 56]).permute(2, 0, 1) / 255
        assert torch.equal(pixels_of(image, down)[0], expected)


# --- what an image may be


def test_every_kind_of_image_gives_the_same(tmp_path):
    image = noise(90, 70)
    array = np.array(image)
    tensor = torch.from_numpy(array)
    path = tmp_path / "image.png"
    path.write_bytes(encode(image))
    kinds = [
        *(path, str(path), path.read_bytes(), bytearray(path.read_bytes()), memoryview(path.read_bytes())),
        *(Image.open(path), array, array.transpose(2, 0, 1), array[:, ::-1][:, ::-1]),
        *(array.astype(dtype) / 255 for dtype in (np.float16, np.float32, np.float64)),
        *(tensor, tensor.permute(2, 0, 1), (tensor / 255).requires_grad_()),
        *((tensor / 255).to(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float64)),
    ]
    expected = pixels_of(image)
    for kind in kinds:
        assert torch.equal(pixels_of(kind), expected), type(kind)
    assert torch.equal(pixels_of(kinds), expected.expand(len(kinds), -1, -1, -1))


def test_batches_are_their_images():
    arrays = np.stack([np.array(noise(60, 70, seed)) for seed in range(3)])
    expected = torch.cat([pixels_of(Image.fromarray(array)) for array in arrays])
    tensors = torch.from_numpy(arrays)
    for batch in (arrays, arrays.transpose(0, 3, 1, 2), tensors, tensors.permute(0, 3, 1, 2), tuple(arrays)):
        assert torch.equal(pixels_of(batch), expected)


def test_mixed_sizes_and_modes_are_as_one_by_one():
    images = [noise(60, 70), picture(200, 90).convert("L"), np.array(noise(30, 31)), encode(picture(99, 98), "JPEG")]
    assert torch.equal(pixels_of(images), torch.cat([pixels_of(image) for image in images]))


def test_grey():
    grey = np.array(noise(90, 70))[..., 0]
    expected = pixels_of(np.stack([grey] * 3, axis=-1))
    for image in (grey, grey[..., None], grey[None], torch.from_numpy(grey), grey / 255, Image.fromarray(grey)):
        assert torch.equal(pixels_of(image), expected)


def test_16_bits_are_scaled_and_not_clipped():
    deep = np.random.default_rng(0).integers(0, 65536, (70, 90)).astype(np.uint16)
    expected = pixels_of((deep >> 8).astype(np.uint8))
    for image in (Image.fromarray(deep), encode(Image.fromarray(deep)), Image.fromarray(deep.astype(np.int32))):
        assert torch.equal(pixels_of(image), expected)


def test_transparency_is_white():
    rgba = np.array(noise(90, 70).convert("RGBA"))
    rgba[:35, :, 3] = 0
    expected = np.where(rgba[..., 3:] == 0, 255, rgba[..., :3]).astype(np.uint8)
    image = Image.fromarray(rgba)
    for kind in (image, encode(image), rgba, rgba.transpose(2, 0, 1), torch.from_numpy(rgba), rgba / 255):
        assert torch.equal(pixels_of(kind), pixels_of(expected))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "image.png"
    path.write_bytes(encode(picture(90, 60), exif=exif))
    expected = ImageOps.exif_transpose(Image.open(path))
    for kind in (path, path.read_bytes(), Image.open(path)):
        assert torch.equal(pixels_of(kind, NATIVE), pixels_of(np.array(expected), NATIVE))
        assert read_image(kind).size == expected.size


def test_images_are_left_as_they_were():
    image = noise(90, 70).convert("RGBA")
    array = np.array(image)
    kept = image.copy(), array.copy()
    pixels_of([image, array, torch.from_numpy(array)])
    assert image.mode == "RGBA" and image.tobytes() == kept[0].tobytes() and np.array_equal(array, kept[1])


# --- what is no image


def truncated() -> Image.Image:
    data = encode(noise(90, 70))
    return Image.open(io.BytesIO(data[: len(data) // 2]))


def with_pixel(value: float) -> torch.Tensor:
    image = torch.full((3, 70, 90), 0.5)
    image[1, 2, 3] = value
    return image


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (Image.new("RGB", (0, 5)), "5x0 pixels: an empty image"),
        (np.zeros((0, 5, 3), np.uint8), r"shape \(0, 5, 3\): an empty image"),
        (torch.zeros(3, 0, 5), r"shape \(3, 0, 5\): an empty image"),
        (with_pixel(float("nan")), "NaN or infinite pixels"),
        (with_pixel(float("-inf")), "NaN or infinite pixels"),
        (with_pixel(255.0), r"floats from 0.5 to 255: expected \[0, 1\], or uint8"),
        (with_pixel(-1.0), "floats from -1 to 0.5: "),
        (np.zeros((70, 90, 2), np.uint8), r"shape \(70, 90, 2\): expected 1, 3 or 4 channels"),
        (torch.zeros(5, 70, 90), r"shape \(5, 70, 90\): expected 1, 3 or 4 channels"),
        (np.zeros((3, 90, 3), np.uint8), r"shape \(3, 90, 3\) may have its channels first or last"),
        (np.zeros((2, 3, 70, 90), np.uint8), r"shape \(2, 3, 70, 90\): expected \(H, W\)"),
        (np.zeros(90, np.uint8), r"shape \(90,\): expected"),
        (np.float32(1), "float32: expected a PIL image"),
        (np.zeros((70, 90, 3), np.int64), "dtype int64: expected uint8"),
        (torch.zeros(3, 70, 90, dtype=torch.bool), "dtype bool: expected uint8"),
        (np.full((70, 90), None), "dtype object: expected uint8"),
        (noise(90, 70).convert("L").convert("F"), "PIL mode 'F'"),
        (Image.new("RGB", (1, 201)), "201x1 pixels: an aspect ratio over 200"),
        (np.zeros((402, 2), np.uint8), "402x2 pixels: an aspect ratio over 200"),
        (encode(Image.new("RGB", (1, 201))), "an aspect ratio over 200"),
        (b"<html>", "not a JPEG, PNG"),
        (b"", "not a JPEG, PNG"),
        ("no/such.png", "no/such.png: No such file or directory"),
        ("https://example.org/a.png", "https://example.org/a.png: No such file or directory"),
        ("x" * 5000, "^image 1: x{200}: File name too long"),
        (None, "NoneType: expected a PIL image, path, bytes, numpy array or tensor"),
        ([noise(90, 70)], "list: expected a PIL image"),
    ],
)
def test_what_is_no_image_is_named(bad, message):
    with pytest.raises(ValueError, match=message) as caught:
        pixels_of([noise(90, 70), bad])
    text = str(caught.value)
    assert text.startswith("image 1: ") and "\n" not in text and len(text) < 300


def test_damaged_files(tmp_path):
    with pytest.raises(ValueError, match="image 0: unreadable PIL image of mode 'RGB'"):
        pixels_of(truncated())
    path = tmp_path / "image.png"
    path.write_bytes(encode(noise(90, 70))[:5000])
    with pytest.raises(ValueError, match=r"image 0: .*image\.png: undecodable"):
        pixels_of(path)
    with pytest.raises(ValueError, match=r"image 0: .*: Is a directory"):
        pixels_of(tmp_path)


@pytest.mark.parametrize("nothing", [[], (), torch.zeros(0, 3, 56, 56), np.zeros((0, 56, 56, 3), np.uint8)])
def test_no_images(nothing):
    with pytest.raises(ValueError, match="no images"):
        pixels_of(nothing)


def test_floats_half_a_level_out_of_range_are_rounding():
    assert torch.equal(pixels_of(with_pixel(1.0019)), pixels_of(with_pixel(1.0)))
    assert torch.equal(pixels_of(with_pixel(-0.0019)), pixels_of(with_pixel(0.0)))
    with pytest.raises(ValueError, match=r"floats from 0\.5 to 1\.003: "):
        pixels_of(with_pixel(1.003))


def test_only_torch_tensors_are_returned():
    with pytest.raises(ValueError, match="return_tensors 'np': expected 'pt'"):
        Processor(PLAIN)(noise(90, 70), return_tensors="np")


# --- native

SIDES = st.integers(1, 6000)


@given(SIDES, SIDES, st.integers(1, 32))
@settings(deadline=None, max_examples=300)
def test_native_grid(height, width, patch):
    """Within the limits; each side nearer than a patch to the image's, or the shrunk or enlarged image's; at rest."""
    if max(height, width) > MOST_ASPECT * min(height, width):
        return
    rows, columns = native_grid(height, width, patch, 112, 4096)
    assert 112 <= rows * columns <= 4096
    patches = height * width / patch**2
    scale = (min(max(patches, 112), 4096) / patches) ** 0.5 / patch
    assert abs(rows - height * scale) < 1 and abs(columns - width * scale) < 1
    assert native_grid(rows * patch, columns * patch, patch, 112, 4096) == (rows, columns)
    assert native_grid(width, height, patch, 112, 4096) in {(columns, rows), (rows, columns)}


@given(SIDES, SIDES, st.integers(1, 200), st.integers(0, 300))
@settings(deadline=None)
def test_native_grid_with_any_limits(height, width, few, more):
    """Where no grid near the image has so many patches, as with a prime number of them, another one is taken."""
    rows, columns = native_grid(height, width, 14, few, few + more)
    assert few <= rows * columns <= few + more
    assert native_grid(rows * 14, columns * 14, 14, few, few + more) == (rows, columns)


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((224, 224), (16, 16)),
        ((230, 218), (16, 16)),  # 16.4 x 15.6
        ((480, 640), (34, 46)),  # 34.3 x 45.7
        ((896, 896), (64, 64)),
        ((4000, 3000), (74, 55)),  # 73.9 x 55.4 after shrinking to 4096
        ((32, 32), (11, 11)),  # 10.6 x 10.6, and 10 x 11 is too few
        ((14, 14 * 112), (1, 112)),
    ],
)
def test_native_grids_worked_by_hand(size, grid):
    assert native_grid(*size, 14, 112, 4096) == grid


def test_native_images_on_the_grid_keep_their_pixels():
    image = noise(5 * 14, 3 * 14)
    found = Processor(replace(NATIVE, mean=(0.0,) * 3, std=(1.0,) * 3))(image)
    assert torch.equal(found.pixel_values[0], torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255)
    assert found.grid.tolist() == [[3, 5]] and found.mask.all() and found.mask.shape == (1, 15)


def test_a_native_batch_is_its_images_one_by_one():
    images = [picture(80, 30), picture(30, 80), np.array(picture(41, 43)), picture(300, 200)]
    processor = Processor(NATIVE)
    batch = processor(images)
    rows, columns = batch.grid.amax(0).tolist()
    assert batch.pixel_values.shape == (4, 3, rows * 14, columns * 14)
    assert batch.mask.shape == (4, rows * columns) and batch.mask.dtype == torch.bool
    assert batch.mask.sum(1).tolist() == batch.grid.prod(1).tolist()
    for index, image in enumerate(images):
        alone = processor(image)
        h, w = alone.grid[0].tolist()
        padded, mask = batch.pixel_values[index].clone(), batch.mask[index].view(rows, columns).clone()
        assert torch.equal(padded[:, : h * 14, : w * 14], alone.pixel_values[0])
        assert batch.grid[index].tolist() == [h, w] and mask[:h, :w].all()
        padded[:, : h * 14, : w * 14], mask[:h, :w] = 0, False
        assert not padded.any() and not mask.any()


# --- what it looks like from outside


def test_a_square_batch():
    batch = Processor(SQUARE)([noise(90, 70), noise(70, 90)])
    assert isinstance(batch, ProcessedImages) and batch.keys() == {"pixel_values", "grid"}
    assert batch["pixel_values"] is batch.pixel_values and batch.pixel_values.dtype == torch.float32
    assert batch.grid.tolist() == [[4, 4], [4, 4]] and batch.mask is None


def test_a_batch_moves():
    batch = Processor(NATIVE)([noise(90, 70), noise(70, 90)])
    moved = batch.to("cpu", torch.bfloat16)
    assert moved.pixel_values.dtype == torch.bfloat16 and batch.pixel_values.dtype == torch.float32
    assert moved.mask.dtype == torch.bool and moved.grid.dtype == torch.int64
    assert batch.to("meta").mask.device.type == "meta"


def test_what_llava_reads():
    """process_images, expand2square and the anyres tiles of LLaVA use these."""
    processor = Processor(replace(SQUARE, image_size=336, crop_pct=0.875))
    assert processor.crop_size == {"height": 336, "width": 336} and processor.size == {"shortest_edge": 384}
    assert tuple(int(x * 255) for x in processor.image_mean) == (122, 116, 104)
    assert processor.image_std == list(CLIP_STD) and processor.resample == Image.Resampling.BICUBIC
    for name in ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"):
        assert getattr(processor, name) is True
    image = noise(90, 70)
    found = processor.preprocess(image, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(found, processor(image).pixel_values[0])


def test_native_has_no_fixed_size():
    processor = Processor(NATIVE)
    assert processor.do_resize is False and not hasattr(processor, "crop_size") and not hasattr(processor, "size")
    with pytest.raises(AttributeError, match="Processor has no 'colour'"):
        processor.colour  # noqa: B018


def test_processors_are_copied_and_sent_to_workers():
    processor = Processor(SQUARE)
    for other in (copy.deepcopy(processor), pickle.loads(pickle.dumps(processor))):
        assert other.config == SQUARE and repr(other) == repr(processor)


def test_llava_next_finds_the_shortest_edge_of_a_squashed_image():
    config = ProcessorConfig(
        image_size=56, patch_size=14, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), resize="squash", crop_pct=0.5
    )
    assert Processor(config).size == {"height": 112, "width": 112, "shortest_edge": 112}
