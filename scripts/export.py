"""Write a model in another library's layout.

    python scripts/export.py runs/shapes/export /models/shapes-hf --format transformers --licence apache-2.0
    python scripts/export.py apple/aimv2-large-patch14-336 /models/aimv2-timm --format timm

SOURCE is whatever `aimv2.load_encoder` takes but `random:`. `ours` keeps everything; `apple` and `transformers` have
encoders and LiT models, `timm` encoders. Of an AIMv2 model they get the encoder, without its decoder; of any model
`--part encoder` writes that alone. A LiT model with CLIP's tokens is whole in `transformers`: AutoModel and
AutoProcessor open it; one with other tokens has no tokenizer there. OUT is written at once or not at all, and read back
before it is there. The preprocessing of Apple's and transformers' layouts rounds half a pixel of the centre crop down,
ours and timm's to even.
"""

import argparse
import sys
from pathlib import Path

import torch

from aimv2.exports import FORMATS, Card, export_model
from aimv2.objectives.aimv2 import AIMv2
from aimv2.pretrained import Checkpoint, open_checkpoint

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument("--format", choices=FORMATS, default="ours")
    parser.add_argument("--part", choices=("whole", "encoder"), default="whole", help="of the model (whole)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (as they are)")
    parser.add_argument("--revision", help="of a repository of the hub")
    parser.add_argument("--name", help="in the model card (the name of OUT)")
    parser.add_argument("--licence", default="unknown", help="an identifier of the hub; Apple's weights: apple-amlr")
    parser.add_argument("--data", default="not stated", help="what it was trained on, for the model card")
    parser.add_argument("--recipe", default="not stated", help="how it was trained, for the model card")
    arguments = parser.parse_args()
    try:
        checkpoint = open_checkpoint(arguments.source, revision=arguments.revision)
        vision, layout, prefix = checkpoint.vision()
        if arguments.part == "encoder":
            model, tokenizer = checkpoint.read_vision(vision, vision, layout, prefix, None), None
        else:
            model, tokenizer = checkpoint.read_whole(), tokenizer_of(checkpoint)
        folder = export_model(
            model,
            arguments.out,
            config=model.config,
            processing=checkpoint.processor_config(vision, layout),
            format=arguments.format,
            tokenizer=tokenizer,
            metadata=checkpoint.config.get("metadata"),
            dtype=DTYPES.get(arguments.dtype),
            card=Card(
                name=arguments.name or arguments.out.resolve().name,
                licence=arguments.licence,
                data=arguments.data,
                recipe=arguments.recipe,
            ),
        )
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    written = model.encoder if isinstance(model, AIMv2) and arguments.format != "ours" else model
    parameters = sum(p.numel() for p in written.parameters())
    sys.stderr.write(f"{folder}: {type(written).__name__} of {parameters / 1e6:.1f}M parameters, {arguments.format}\n")
    return 0


def tokenizer_of(checkpoint: Checkpoint) -> str | Path | None:
    """Of an export of ours: a name, or the folder that has its file."""
    kept = checkpoint.config.get("tokenizer") if checkpoint.is_ours else None
    return kept and kept.get("name", checkpoint.path.parent)


if __name__ == "__main__":
    sys.exit(main())
