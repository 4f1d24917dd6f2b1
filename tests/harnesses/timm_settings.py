"""The same encoder as ours and as timm's own AIMv2, from the same weights."""

import timm
import torch

from aimv2.harnesses.timm_models import register_timm
from aimv2.preprocessing import ProcessorConfig

register_timm()

PROCESSING = ProcessorConfig(image_size=56, patch_size=14, mean=(0.5, 0.4, 0.3), std=(0.3, 0.2, 0.25))
# The same products in the same order, in fp32; attention may be summed otherwise. Values are of the order of 1 to 10.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def ours(exports, **arguments):
    return timm.create_model("aimv2_export", source=str(exports / "ours"), **arguments).eval()


def theirs(exports, **arguments):
    return timm.create_model(f"local-dir:{exports / 'timm'}", pretrained=True, **arguments).eval()


def pair(exports, **arguments):
    """Both, with the same head."""
    one, other = ours(exports, **arguments), theirs(exports, **arguments)
    if one.num_classes:
        other.head.load_state_dict(one.head.state_dict())
    return one, other


def pixels(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))
