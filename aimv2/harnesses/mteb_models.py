"""Our models in mteb, whose image tasks are MIEB: `mteb.evaluate(MtebEncoder(PATH), tasks)`.

n inputs, B of them in a batch, N patches, D width, E length of an embedding.

A LiT model embeds images and texts, unit vectors of one space; an encoder images only, as the mean of its patches.
Interface: mteb 2, `mteb.models.EncoderProtocol`.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from aimv2.evals.encoders.interface import preprocessing_hash, weights_digest
from aimv2.harnesses.clip_benchmark import load_lit
from aimv2.lit import LiTConfig
from aimv2.pretrained import load_encoder, open_checkpoint
from aimv2.weights import ModelError

try:
    from mteb.models import ModelMeta
    from mteb.models.abs_encoder import AbsEncoder
    from mteb.models.model_meta import ScoringFunction
except ImportError as error:
    raise ImportError("mteb's models need mteb: pip install mteb") from error


class MtebEncoder(AbsEncoder):
    """A LiT model or an encoder by mteb's interface; similarities are cosines.

    Args:
        source: whatever `aimv2.load_encoder` takes.
        name: in mteb's results, OWNER/NAME.
        device: of the weights.

    Raises:
        ModelError: nothing there, or a LiT model whose tokenizer is not known.
    """

    def __init__(self, source: str | Path, name: str | None = None, device: torch.device | str = "cpu"):
        source, self.device = str(source), device
        self.tokenize = None
        if not source.startswith("random:") and isinstance(open_checkpoint(source).whole()[0], LiTConfig):
            self.model, transform, self.tokenize = load_lit(pretrained=source, device=device)
            self.processor, length = transform.processor, self.model.config.projection
        else:
            self.model = load_encoder(source, device=device)
            self.processor, length = self.model.processor, self.model.hidden_size
        # mteb keeps results by name and revision, and skips those it has.
        revision = f"{weights_digest(self.model)[:12]}-{preprocessing_hash(self.processor.config)[:12]}"
        self.mteb_model_meta = ModelMeta.create_empty(
            {
                "name": name or f"aimv2/{Path(source).name}",
                "revision": revision,
                "modalities": ["image", "text"] if self.tokenize else ["image"],
                "similarity_fn_name": ScoringFunction.COSINE,
                "embed_dim": length,
                "n_parameters": sum(parameter.numel() for parameter in self.model.parameters()),
                "framework": ["PyTorch"],
            }
        )

    @torch.no_grad()
    def encode(self, inputs: Iterable[dict], *, task_metadata=None, hf_split="", hf_subset="", **kwargs) -> Tensor:
        """Batches of {"image": B images} or {"text": B texts} -> (n, E) on the CPU; of both, their sum, as mteb's CLIP.

        Raises ValueError for batches that have neither, or text where there is no text tower.
        """
        return torch.cat([self._embed(batch).float().cpu() for batch in inputs])

    def _embed(self, batch: dict) -> Tensor:
        parts = []
        if "text" in batch:
            if self.tokenize is None:
                name = self.mteb_model_meta.name
                raise ModelError(f"{name}: an encoder without a text tower: expected a task with images only")
            parts.append(self.model.encode_text(self.tokenize(list(batch["text"])).to(self.device)))
        if "image" in batch:
            parts.append(self._embed_images(batch["image"]))
        if not parts:
            raise ValueError(f"a batch of {', '.join(batch)}: expected image or text")
        return sum(parts)  # (B, E)

    def _embed_images(self, images: list) -> Tensor:
        batch = self.processor(list(images)).to(self.device)
        if self.tokenize is not None:
            return self.model.encode_image(batch.pixel_values)
        features = self.model(batch.pixel_values, mask=batch.mask).float()  # (B, N, D), 0 where nothing is real
        count = features.shape[1] if batch.mask is None else batch.mask.sum(dim=1, keepdim=True)
        return features.sum(dim=1) / count
