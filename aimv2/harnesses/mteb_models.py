"""Our models in mteb, whose image tasks are MIEB: `mteb.evaluate(MtebEncoder(PATH), tasks)`.

n inputs, B of them in a batch, N patches, D width, E length of an embedding.

A LiT model embeds images and texts, unit vectors of one space; an encoder images only, as the mean of its patches.
Interface: mteb 2, `mteb.models.EncoderProtocol`.
"""

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from aimv2.evals.encoders.interface import preprocessing_hash, weights_digest
from aimv2.evals.feature_store import fingerprint
from aimv2.evals.text_image import open_lit
from aimv2.lit import LiTConfig
from aimv2.pretrained import load_encoder, open_checkpoint

try:
    from mteb.models import ModelMeta
    from mteb.models.abs_encoder import AbsEncoder
    from mteb.models.model_meta import ScoringFunction
except ImportError as error:
    raise ImportError(f"mteb's models need mteb: pip install mteb ({error})") from error


class MtebEncoder(AbsEncoder):
    """A LiT model or an encoder by mteb's interface, in fp32; similarities are cosines.

    Args:
        source: whatever `aimv2.load_encoder` takes.
        name: in mteb's results, OWNER/NAME; None: aimv2 and the last part of the source.
        device: of the weights.

    Raises:
        ValueError: nothing there, or a LiT model whose tokenizer is not known.
    """

    def __init__(self, source: str | Path, name: str | None = None, device: torch.device | str = "cpu"):
        source, self.device = str(source), device
        self.tokenize, tokens = None, {}
        if not source.startswith("random:") and isinstance(open_checkpoint(source).whole()[0], LiTConfig):
            lit = open_lit(source, source).to(device)
            self.model, self.processor, self.tokenize, tokens = lit.model, lit.processor, lit.tokenizer, lit.tokens
            length = self.model.config.projection
        else:
            self.model = load_encoder(source, dtype=torch.float32, device=device)
            self.processor, length = self.model.processor, self.model.hidden_size
        # mteb keeps results by name and revision, and skips those it has.
        settings = fingerprint({"model": asdict(self.model.config), "tokens": tokens})
        parts = [weights_digest(self.model), preprocessing_hash(self.processor.config), settings]
        path = Path(source).expanduser()
        self.mteb_model_meta = ModelMeta.create_empty(
            {
                "name": name or f"aimv2/{path.resolve().name if path.exists() else path.name}",
                "revision": "-".join(part[:12] for part in parts),
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

        Raises ValueError for no batches, for one that has neither, for a text or an image that is none, and for text
        where there is no text tower.
        """
        found = []
        for number, batch in enumerate(inputs):
            try:
                found.append(self._embed(batch).float().cpu())
            except ValueError as error:
                raise ValueError(f"batch {number}: {error}") from error
        if not found:
            raise ValueError("no inputs: expected at least one batch")
        return torch.cat(found)

    def _embed(self, batch: dict) -> Tensor:
        parts = []
        if "text" in batch:
            parts.append(self._embed_texts(list(batch["text"])))
        if "image" in batch:
            parts.append(self._embed_images(batch["image"]))
        if not parts:
            raise ValueError(f"{', '.join(batch)}: expected image or text")
        return sum(parts)  # (B, E)

    def _embed_texts(self, texts: list[str]) -> Tensor:
        if self.tokenize is None:
            name = self.mteb_model_meta.name
            raise ValueError(f"{name}: an encoder without a text tower: expected a task with images only")
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise ValueError(f"text {index} is {text!r:.100}: expected a string")
        return self.model.encode_text(self.tokenize(texts).to(self.device))

    def _embed_images(self, images: list) -> Tensor:
        batch = self.processor(list(images)).to(self.device)
        if self.tokenize is not None:
            return self.model.encode_image(batch.pixel_values)
        features = self.model(batch.pixel_values, mask=batch.mask).float()  # (B, N, D), 0 where nothing is real
        count = features.shape[1] if batch.mask is None else batch.mask.sum(dim=1, keepdim=True)
        return features.sum(dim=1) / count
