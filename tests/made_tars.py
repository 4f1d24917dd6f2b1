"""Small tars with real images for tests of what looks into them."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int, size: tuple[int, int] = (64, 48), image_format: str = "JPEG", **options) -> bytes:
    """A smooth random image, as a file."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(buffer, image_format, **options)
    return buffer.getvalue()


def write_tar(path: Path, files: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_samples(path: Path, samples: list[dict[str, bytes]], first: int = 0) -> Path:
    """One sample for each {extension: bytes}, with keys of six digits."""
    files = [(f"{first + i:06d}.{ext}", data) for i, sample in enumerate(samples) for ext, data in sample.items()]
    return write_tar(path, files)
