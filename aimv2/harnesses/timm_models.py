"""AIM and AIMv2 encoders as timm has models: `timm.create_model("aimv2_export", source=PATH)`.

timm has AIMv2's architecture, and opens our exports in its layout. These are our own modules by the same interface: any
layout and name, AIM v1, native positions.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from aimv2.preprocessing import ProcessorConfig
from aimv2.pretrained import load_configs, load_encoder

try:
    import timm
    from timm.models import build_model_with_cfg, register_model

    from aimv2.harnesses.timm_encoder import TimmEncoder, one_side
except ImportError as error:
    raise ImportError(f'timm\'s models need a recent timm: pip install --upgrade "aimv2[eval]" ({error})') from error

__all__ = ["NAME", "TimmEncoder", "register_timm", "timm_config"]

NAME = "aimv2_export"
_DROP_RATES = ("attn_drop_rate", "drop_path_rate", "patch_drop_rate", "pos_drop_rate", "proj_drop_rate")
_registered: dict[str, dict] = {}  # name -> arguments


def register_timm(name: str = NAME, **arguments) -> str:
    """Let `timm.create_model(name, ...)` build encoders of ours, and return the name.

    `arguments`, which `create_model` may change, are for what passes on a name and no more. They are:

        source: whatever `aimv2.load_encoder` takes. Its weights are read whatever `pretrained` says: fresh ones are
            asked for by `random:large-224`.
        num_classes, global_pool, drop_rate: `TimmEncoder`'s.
        img_size: S or (S, S): positions are interpolated to it once, as by `set_input_size`.
        dynamic_img_size: interpolate them for each image, of any size that patches divide.
        dynamic_img_pad: pad an image with zeros, at the right and below, to a size that they divide.
        features_only, out_indices: timm's own wrapper around it, for maps (B, D, h, w) at reduction P.
        device, dtype: of the weights.

    Raises ValueError for a name that is timm's own or that `create_model` would take apart.
    """
    if not name.isidentifier():
        raise ValueError(f"name {name!r}: expected letters, digits and _")
    if timm.is_model(name) and name not in _registered:
        raise ValueError(f"name {name!r}: timm has a model of its own by this name")

    def create(pretrained: bool = False, **changes) -> nn.Module:
        return _create(name, **(arguments | changes))

    if _registered.get(name) != arguments:  # timm warns when one takes the place of another
        create.__name__ = name
        register_model(create)
        __all__[:] = [each for each in __all__ if each in globals()]  # timm adds the name, which is none of this module
        _registered[name] = arguments
    return name


def _create(
    name: str,
    *,
    source: str | Path | None = None,
    img_size: int | Sequence[int] | None = None,
    dynamic_img_size: bool = False,
    dynamic_img_pad: bool = False,
    in_chans: int = 3,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    pretrained_cfg=None,
    cache_dir=None,
    **arguments,
) -> nn.Module:
    if source is None:
        raise ValueError(f"{name}: expected source=PATH, whatever aimv2.load_encoder takes")
    if in_chans != 3:
        raise ValueError(f"in_chans {in_chans}: expected 3")
    for key, value in (("pretrained_cfg", pretrained_cfg), ("cache_dir", cache_dir)):
        if value:
            raise ValueError(f"{key} {value!r}: expected none, the source is all there is (downloads go to HF_HOME)")
    for key in _DROP_RATES:
        if rate := arguments.pop(key, 0):
            raise ValueError(f"{key} {rate!r}: expected 0, there is none but drop_rate, of the head")
    image_size = None if img_size is None else one_side(img_size)
    vision, processing = load_configs(source, image_size=image_size)
    any_size = dynamic_img_size or vision.positions == "sincos"
    encoder = load_encoder(
        source, image_size="native" if dynamic_img_size else image_size, device=device, dtype=dtype, frozen=False
    ).encoder
    return build_model_with_cfg(
        lambda **kwargs: TimmEncoder(encoder, processing, pad=dynamic_img_pad, **kwargs),
        name,
        pretrained=False,
        pretrained_cfg=timm_config(processing, vision.image_size, fixed=not any_size) | {"architecture": name},
        feature_cfg={"out_indices": arguments.pop("out_indices", 3), "feature_cls": "getter"},
        kwargs_filter=("img_size", "in_chans"),
        **arguments,
    )


def timm_config(processing: ProcessorConfig, image_size: int, fixed: bool = True) -> dict:
    """The `pretrained_cfg` by which timm prepares images as `processing` does; native ones as `image_size`.

    It can't say that half a pixel of margin is rounded down, as transformers does: timm rounds to even, and one image
    in four is cut a pixel away.
    """
    return {
        **processing.to_timm(image_size),
        "fixed_input_size": fixed,
        "num_classes": 0,
        "pool_size": None,
        "first_conv": "encoder.patch_embed",
        "classifier": "head",
    }
