import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from aimv2.data.images import BadImage
from aimv2.evals.datasets import Dataset, ImageSet
from aimv2.evals.dense.patch_labels import (
    IGNORED,
    labels_from_boxes,
    labels_from_mask,
    patch_classes,
    patch_labels,
    visible_part,
)
from aimv2.evals.session import Session
from aimv2.preprocessing import ProcessorConfig
from aimv2.processor import Processor

WHOLE = (0.0, 0.0, 1.0, 1.0)
PLAIN = {"patch_size": 8, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(40, 200),
    height=st.integers(40, 200),
    resize=st.sampled_from(["shortest_edge", "squash"]),
    crop_pct=st.floats(0.5, 1.0),
    crop_rounding=st.sampled_from(["down", "half_even"]),
)
def test_the_visible_part_is_what_the_processor_keeps(width, height, resize, crop_pct, crop_rounding):
    """An image whose red says where it is from left to right, and green from top to bottom, shows what is kept."""
    config = ProcessorConfig(image_size=32, resize=resize, crop_pct=crop_pct, crop_rounding=crop_rounding, **PLAIN)
    x, y = (np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height
    image = np.zeros((height, width, 3))
    image[..., 0], image[..., 1] = x, y[:, None]
    pixels = Processor(config)(Image.fromarray((image * 255).round().astype(np.uint8))).pixel_values[0].numpy()
    left, top, right, bottom = visible_part(config, width, height)
    middles = (np.arange(32) + 0.5) / 32
    inner = slice(3, -3)  # bicubic filters bend a ramp where they are cut off at the image's edge
    expected = left + middles * (right - left)
    # 8 bits, twice rounded: 1/255. A part that was off by one of 32 pixels would be off by 8/255.
    np.testing.assert_allclose(pixels[0, 16, inner], expected[inner], atol=1.6 / 255)
    expected = top + middles * (bottom - top)
    np.testing.assert_allclose(pixels[1, inner, 16], expected[inner], atol=1.6 / 255)


def test_native_images_have_no_common_grid():
    config = ProcessorConfig(image_size=None, resize="native", **PLAIN)
    with pytest.raises(ValueError, match="native preprocessing"):
        visible_part(config, 10, 10)


def test_boxes_by_hand():
    """Centres of 4 x 4 cells are at 1/8, 3/8, 5/8, 7/8."""
    large, small, thin = (0.0, 0.0, 0.5, 1.0), (0.25, 0.25, 0.75, 0.5), (0.76, 0.0, 0.86, 1.0)
    labels = labels_from_boxes([(0, large), (1, small), (2, thin)], WHOLE, (4, 4)).reshape(4, 4)
    assert labels.tolist() == [
        [1, 1, 0, 0],
        [1, 2, 2, 0],  # the smaller one is in front; the thin one covers no centre
        [1, 1, 0, 0],
        [1, 1, 0, 0],
    ]
    assert (labels_from_boxes([(1, small), (0, large)], WHOLE, (4, 4)).reshape(4, 4) == labels).all()
    # Of the right half only: the centres lie at 9/16, 11/16, 13/16, 15/16.
    right = labels_from_boxes([(0, large), (1, small), (2, thin)], (0.5, 0.0, 1.0, 1.0), (4, 4)).reshape(4, 4)
    assert right[1].tolist() == [2, 2, 3, 0]


def test_masks_by_hand():
    mask = np.full((8, 8), 255, np.uint8)
    mask[:4, :4] = 2
    mask[0, :4] = 1  # 4 of the 16 pixels of the first cell
    mask[:4, 4:6], mask[:4, 6:] = 3, 0  # as many of each: the lower one
    mask[7, 7] = 4  # one pixel that counts among those that don't
    assert labels_from_mask(mask, WHOLE, (2, 2), 5).tolist() == [2, 0, IGNORED, 4]
    assert labels_from_mask(mask, (0.0, 0.0, 0.5, 0.125), (1, 2), 5).tolist() == [1, 1]
    with pytest.raises(ValueError, match=r"class 4 in a mask: expected 0 to 2, or 255"):
        labels_from_mask(mask, WHOLE, (2, 2), 3)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(1, 5), st.integers(1, 4))
def test_masks_as_a_plain_loop_counts_them(seed, rows, columns, side):
    """Cells of whole pixels, whose 16 x 16 places are then spread evenly if a cell's side divides 16."""
    side = 2 ** (side - 1)
    rng = np.random.default_rng(seed)
    mask = rng.choice(np.array([0, 1, 2, 255], np.uint8), (rows * side, columns * side))
    expected = []
    for row in range(rows):
        for column in range(columns):
            cell = mask[row * side : (row + 1) * side, column * side : (column + 1) * side]
            counts = [(cell == number).sum() for number in range(3)]
            expected.append(int(np.argmax(counts)) if sum(counts) else IGNORED)
    assert labels_from_mask(mask, WHOLE, (rows, columns), 3).tolist() == expected


class Column(list):
    """Rows of None can't be read."""

    def __getitem__(self, row):
        value = super().__getitem__(row)
        if value is None:
            raise BadImage("cut off")
        return value


def image_set(images, **columns) -> ImageSet:
    keys = [f"{row}" for row in range(len(images))]
    return ImageSet(name="made", split="test", images=Column(images), keys=keys, digest="", **columns)


def test_labels_follow_the_crop():
    """Of a wide image only the middle is seen; a red object in it is where its label is."""
    config = ProcessorConfig(image_size=32, crop_pct=0.8, **PLAIN)
    image = Image.new("RGB", (120, 60))
    image.paste((255, 0, 0), (48, 12, 72, 36))
    box = (48 / 120, 12 / 60, 72 / 120, 36 / 60)
    mask = Image.fromarray((np.asarray(image)[..., 0] > 0).astype(np.uint8))
    seen = Processor(config)(image).pixel_values[0, 0].numpy() > 0.5
    boxed = patch_labels(image_set([image], boxes=[[(0, box)]]), config, (32, 32), 2, Session(quiet=True))
    masked = patch_labels(image_set([image], masks=[mask]), config, (32, 32), 2, Session(quiet=True))
    assert seen.any()
    assert (boxed.reshape(32, 32) == seen).all()
    assert (masked.reshape(32, 32) == seen).all()


def test_what_can_not_be_read():
    config = ProcessorConfig(image_size=32, **PLAIN)
    image, mask = Image.new("RGB", (64, 32)), Image.new("L", (64, 32), 1)
    labels = patch_labels(
        image_set([image, None, image], masks=Column([mask, mask, None])), config, (2, 2), 2, Session(quiet=True)
    )
    assert labels.tolist() == [[1] * 4, [1] * 4, [IGNORED] * 4]
    broken = image_set([image], masks=[Image.new("L", (64, 32), 7)])
    with pytest.raises(ValueError, match="0: class 7 in a mask"):
        patch_labels(broken, config, (2, 2), 2, Session(quiet=True))


def test_classes_have_a_background_only_where_boxes_leave_one():
    image = Image.new("RGB", (8, 8))
    data = {"spec": "made", "name": "made", "classes": ("a", "b"), "train": None}
    assert patch_classes(Dataset(**data, test=image_set([image], boxes=[[]]))) == ("background", "a", "b")
    assert patch_classes(Dataset(**data, test=image_set([image], masks=[image.convert("L")]))) == ("a", "b")
    with pytest.raises(ValueError, match="made has neither masks nor boxes"):
        patch_classes(Dataset(**data, test=image_set([image])))
