"""Counted operations against torch's own counter, which watches the real products."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from aimv2.decoder import DecoderConfig, MultimodalDecoder
from aimv2.encoder import VisionConfig, VisionEncoder
from aimv2.flops import encoder_flops, peak_flops, training_flops

SHAPE = {"width": 64, "depth": 3, "heads": 4, "image_size": 32, "patch_size": 8}


def counted(function, *args) -> int:
    with FlopCounterMode(display=False) as counter:
        function(*args)
    return counter.get_total_flops()


@pytest.mark.parametrize("changes", [{"mlp_hidden": 96}, {"mlp_hidden": 128, "mlp": "gelu", "norm": "layernorm"}])
def test_encoder(changes):
    config = VisionConfig(**SHAPE, **changes)
    image = torch.randn(1, 3, 32, 32)
    assert counted(VisionEncoder(config).eval(), image) == encoder_flops(config)


def test_training_is_three_forward_passes():
    vision = VisionConfig(**SHAPE, mlp_hidden=96)
    config = DecoderConfig(width=48, depth=2, heads=4, mlp_hidden=80, vocab_size=50, context_length=12)
    encoder, decoder = VisionEncoder(vision), MultimodalDecoder(config, vision.width, vision.patch_size)
    image, text = torch.randn(1, 3, 32, 32), torch.randint(50, (1, 7))
    forward = counted(lambda: decoder(encoder(image), text))
    assert training_flops(vision, config, tokens=7) == 3 * forward


def test_no_peak_is_claimed_for_a_cpu():
    assert peak_flops(torch.device("cpu"), torch.float32) is None
