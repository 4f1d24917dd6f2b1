import numpy as np
import pytest
from made_images import Pictures
from PIL import Image
from tiny_models import V2, random_encoder

from aimv2.evals.datasets import Dataset, ImageSet
from aimv2.evals.dense.features import attention_probabilities
from aimv2.evals.dense.patch_probe import PatchProbe
from aimv2.evals.dense.pictures import DenseSample, dense_samples, draw_dense, draw_heads
from aimv2.evals.encoders import encoder_of, open_encoder
from aimv2.evals.reports.files import read_result
from aimv2.evals.run import evaluate
from aimv2.evals.session import Session
from aimv2.preprocessing import ProcessorConfig

QUIET = Session(quiet=True)
CONFIG = ProcessorConfig(image_size=56, patch_size=14, mean=(0.5,) * 3, std=(0.5,) * 3)
BOX = (0.25, 0.25, 0.75, 0.75)


def image_set(n: int, seed: int, bad: tuple[int, ...] = ()) -> ImageSet:
    """A red or green square in the middle of noise; its class is its colour."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 120, (n, 56, 56, 3), np.uint8)
    for row in range(n):
        pixels[row, 14:42, 14:42] = ((250, 0, 0), (0, 250, 0))[row % 2]
    return ImageSet(
        name="made",
        split="test",
        images=Pictures(pixels, bad),
        keys=[f"{row}" for row in range(n)],
        digest=f"{seed} {n} {bad}",
        boxes=[[(row % 2, BOX)] for row in range(n)],
    )


def dataset(bad: tuple[int, ...] = ()) -> Dataset:
    names = ("red $x$", "_green")
    return Dataset(spec="made", name="made", classes=names, train=image_set(12, 0), test=image_set(6, 1, bad))


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> list[DenseSample]:
    encoder, data = encoder_of(random_encoder(V2), CONFIG), dataset(bad=(1,))
    probe = PatchProbe(grid=4, epochs=30, lrs=(1e-2,), batch=4, layers="0,output")
    result = read_result(evaluate(probe, encoder, data, tmp_path_factory.mktemp("out"), QUIET))
    return dense_samples(encoder, data.test, QUIET, count=3, block=1, probe=probe, result=result)


def test_each_picture_is_of_its_image(samples):
    assert len(samples) == 3
    data = dataset()
    for sample, row in zip(samples, (0, 2, 3), strict=True):  # image 1 can't be read
        np.testing.assert_allclose(sample.image, np.asarray(data.test.image(row)) / 255, atol=1e-6)
        middle = np.zeros((4, 4), int)
        middle[1:3, 1:3] = row % 2 + 1
        assert (sample.labels == middle).all()
        assert (sample.predicted == middle).all()  # colours, which random features keep


def test_attention_is_the_blocks(samples):
    encoder = encoder_of(random_encoder(V2), CONFIG)
    for sample, row in zip(samples, (0, 2, 3), strict=True):
        images = encoder.processor([dataset().test.image(row)]).pixel_values
        probabilities = attention_probabilities(encoder.model, images, 1)[0]
        assert sample.query in (5, 6, 9, 10)  # inside the square
        expected = probabilities[:, sample.query].reshape(2, 4, 4)
        np.testing.assert_allclose(sample.looked_at, expected, atol=1e-6)  # alone or in a batch of three
        np.testing.assert_allclose(sample.received, probabilities.mean(1).reshape(2, 4, 4), atol=1e-6)


def test_the_pictures_show_something(samples, tmp_path, recwarn):
    dense = draw_dense(samples, ("background", "red $x$", "_green"), tmp_path / "dense.png", "title")
    heads = draw_heads(samples, tmp_path / "heads.png")
    for path, columns in ((dense, 7), (heads, 3)):
        with Image.open(path) as image:
            assert abs(image.width / columns - 170) < 10  # as wide as its columns
            assert np.asarray(image.convert("L")).std() > 20
    assert not [str(warning.message) for warning in recwarn]


def test_an_encoder_without_attention_and_data_without_labels(tmp_path):
    data = dataset()
    found = dense_samples(open_encoder("pixels:32"), data.test, QUIET, count=2)
    assert found[0].received is found[0].labels is found[0].query is None
    assert found[0].pca.shape == (8, 8, 3)
    assert draw_dense(found, (), tmp_path / "dense.png").exists()


def test_blocks_are_counted_from_the_end_too():
    encoder, data = encoder_of(random_encoder(V2), CONFIG), dataset()
    last, same = (dense_samples(encoder, data.test, QUIET, count=1, block=block)[0] for block in (-1, 2))
    assert np.array_equal(last.received, same.received)
    assert last.query == 10  # the middle, without labels
    for block in (3, -4):
        with pytest.raises(ValueError, match=f"block {block}: expected -3 to 2"):
            dense_samples(encoder, data.test, QUIET, block=block)


def test_a_flat_image_is_drawn_as_any_other(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 56, 56, 3), np.uint8)
    pixels[1] = 255
    keys = ["0", "1", "2"]
    images = ImageSet(name="made", split="test", images=Pictures(pixels), keys=keys, digest="white")
    found = dense_samples(open_encoder("pixels:32"), images, QUIET, count=3)
    assert len(found) == 3
    assert draw_dense(found, (), tmp_path / "dense.png").exists()


class Counted(Pictures):
    """How often an image was decoded."""

    read = 0

    def __getitem__(self, row: int) -> Image.Image:
        self.read += 1
        return super().__getitem__(row)


def test_no_more_images_are_read_than_drawn():
    pictures = Counted(np.zeros((50, 56, 56, 3), np.uint8))
    keys = [f"{row}" for row in range(50)]
    images = ImageSet(name="made", split="test", images=pictures, keys=keys, digest="counted")
    assert len(dense_samples(open_encoder("pixels:32"), images, QUIET, count=2)) == 2
    assert pictures.read <= 2 * 2  # once to know that it can be read
    for count in (0, -1):
        with pytest.raises(ValueError, match=f"count {count}: expected 1 or more"):
            dense_samples(open_encoder("pixels:32"), images, QUIET, count=count)


def test_no_image_that_can_be_read():
    with pytest.raises(ValueError, match="no image that can be read"):
        dense_samples(open_encoder("pixels:32"), image_set(2, 0, bad=(0, 1)), QUIET)
