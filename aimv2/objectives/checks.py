"""What objectives ask of the data, when a run's config is made."""

from typing import TYPE_CHECKING

from aimv2.encoder import VisionConfig

if TYPE_CHECKING:  # it needs what only training has
    from aimv2.data.loader import DataConfig


def check_image_size(data: "DataConfig", size: int, key: str) -> None:
    """Raises ValueError if the images are not of the size that the config has under `key`."""
    if data.transform.image_size != size:
        raise ValueError(
            f"data.transform.image_size {data.transform.image_size} is not {key} {size}, "
            "which the positions are made for"
        )


def check_context(data: "DataConfig", length: int, key: str) -> None:
    """Raises ValueError if captions may be longer than the context that the config has under `key`."""
    if data.context_length > length:
        raise ValueError(f"data.context_length {data.context_length} is more than {key} {length}")


def check_native(data: "DataConfig", vision: VisionConfig, key: str) -> None:
    """Raises ValueError if images have sizes of their own and the encoder, whose config is under `key`, has not."""
    if data.native is not None and vision.positions == "learned":
        raise ValueError(f"{key}.positions 'learned' with data.native: expected 'sincos' or 'interpolated'")
