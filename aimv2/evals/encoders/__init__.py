"""One interface over encoders of every library: `open_encoder(spec)`, `encoder_of(model)`, blocks and streams."""

from aimv2.evals.encoders.interface import BlockOutput, Encoder
from aimv2.evals.encoders.layers import parse_layers, streams
from aimv2.evals.encoders.opening import open_encoder
from aimv2.evals.encoders.ours import encoder_of

__all__ = ["BlockOutput", "Encoder", "encoder_of", "open_encoder", "parse_layers", "streams"]
