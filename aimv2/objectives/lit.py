"""LiT: a text tower learns to name what a locked image tower sees (arXiv 2111.07991, on AIMv2).

B pairs of a micro-batch, n of them with a caption, M of an optimizer step over all ranks; N patches, D width, E
projection.

Each pair is compared with those of all others, so the loss is no sum over micro-batches. Its gradient is made equal to
that of one process with the whole batch in two passes (GradCache, arXiv 2101.06983): features of all micro-batches
without a graph, and the gradient of the loss with respect to them; then each micro-batch again, with a loss that is
linear in its features and has this gradient.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from aimv2 import losses
from aimv2.data.batch import Batch, Counts
from aimv2.encoder import VisionConfig, VisionEncoder
from aimv2.flops import encoder_flops, trunk_flops
from aimv2.layers import at_least_fp32
from aimv2.lit import LiT, LiTConfig, bounded
from aimv2.objectives.checks import check_context, check_image_size, check_native
from aimv2.objectives.patch_cache import PatchCache, digests_of
from aimv2.ranks import gather_rows, sum_over_ranks
from aimv2.text_encoder import TextConfig

if TYPE_CHECKING:  # it needs what only training has
    from aimv2.data.loader import DataConfig

SIGMOID_SCALE, SIGMOID_BIAS = 10.0, -10.0  # at the start (SigLIP, arXiv 2303.15343, section 3.2)


@dataclass(slots=True, kw_only=True)
class LiTObjectiveConfig:
    needs_weights: ClassVar[bool] = True  # a tower that is locked at random weights sees nothing

    model: LiTConfig
    loss: Literal["softmax", "sigmoid"] = "softmax"
    # GiB of each rank's CPU memory for the tower's output in training. A run that goes on begins with an empty one, and
    # the tower may round otherwise where it sees other images together: the same losses, but not to the last bit.
    feature_cache: float = 0.0

    def __post_init__(self):
        if self.loss not in ("softmax", "sigmoid"):
            raise ValueError(f"loss {self.loss!r}: expected softmax or sigmoid")
        if not 0 <= self.feature_cache < math.inf:
            raise ValueError(f"feature_cache {self.feature_cache}: expected GiB, 0 or more")

    def build(self) -> "LiTObjective":
        return LiTObjective(self)

    @property
    def vision(self) -> VisionConfig:
        return self.model.vision

    @property
    def text(self) -> TextConfig:
        return self.model.text

    @property
    def vocab_size(self) -> int:
        return self.text.vocab_size

    @property
    def data_patch_size(self) -> int:
        """Side of a patch in the pixels of the data."""
        return self.vision.patch_size

    def check(self, data: "DataConfig") -> None:
        """Raises ValueError for data that the model has no place for."""
        check_image_size(data, self.vision.image_size, "objective.model.vision.image_size")
        check_native(data, self.vision, "objective.model.vision")
        check_context(data, self.text.context_length, "objective.model.text.context_length")
        if self.feature_cache and data.transform.crop_scale is not None:
            raise ValueError(
                f"objective.feature_cache {self.feature_cache:g} with random crops, of which none comes twice: "
                "expected 0, or data.transform.crop_scale none"
            )

    def check_engine(self, batch_size: int, zero_stage: int) -> None:
        """Raises ValueError for a batch or a way of sharding that the loss doesn't allow."""
        if batch_size < 2:
            raise ValueError(f"engine.batch_size {batch_size}: expected 2 or more, for a pair to be told apart")
        if self.feature_cache and zero_stage == 3:  # who knows all its images would miss the others' gathers
            raise ValueError(
                f"objective.feature_cache {self.feature_cache:g} with engine.zero_stage 3, at which all ranks must run "
                "the image tower together: expected feature_cache 0, or stage 1 or 2"
            )

    def training_flops(self, tokens: int) -> float:
        """Of one image of the configured size with so many caption tokens: the image tower only goes forward."""
        n, width, c = self.vision.num_patches, self.vision.width, self.text
        pool = 2 * width**2 * (2 * n + 1) + 4 * n * width
        projections = 2 * self.model.projection * (width + c.width)
        text = trunk_flops(c.width, c.depth, c.mlp_hidden, 3, tokens)
        return encoder_flops(self.vision) + 3 * (pool + projections + text)


@dataclass(slots=True)
class _Share:
    """What a micro-batch adds to the step's loss, and the gradients of the whole loss that pass through it."""

    loss: Tensor  # ()
    accuracy: Tensor  # ()
    images: Tensor  # (n, E), with respect to the unit vectors
    texts: Tensor  # (n, E)
    log_scale: Tensor  # ()
    bias: Tensor  # ()


@dataclass(slots=True)
class _Seen:
    """A micro-batch between `look_ahead` and `forward`."""

    sample: Tensor  # (B,) g
    digests: list[bytes] | None  # of its images, if there is a cache
    patches: Tensor | None = None  # (B, N, D), the locked tower's output
    share: _Share | None = None  # None: it is the only one of the step, and one pass does


class LiTObjective(nn.Module):
    """The contrastive loss of images and captions, the negatives of a pair being all others of the optimizer step.

    `look_ahead` is given the micro-batches of a step, then `forward` each of them once, in the same order. Where there
    are several, the locked tower still runs once: its output, B N D numbers each, is held for all of them.

    Pairs without a caption are left out, as negatives too. In evaluation, without gradients, the negatives are the
    micro-batch's own, so that the loss depends on its size: also on the number of ranks, once the share of each is less
    than a micro-batch.
    """

    def __init__(self, config: LiTObjectiveConfig):
        super().__init__()
        self.config = config
        self.model = LiT(config.model)
        self.model.encoder.requires_grad_(False)
        self.register_parameter("bias", None)
        if config.loss == "sigmoid":
            self.bias = nn.Parameter(torch.tensor(SIGMOID_BIAS))  # a matter of training: comparisons don't need it
            nn.init.constant_(self.model.log_scale, math.log(SIGMOID_SCALE))
        self._cache = PatchCache(int(config.feature_cache * 2**30)) if config.feature_cache else None
        self._step: deque[_Seen] = deque()

    @property
    def encoder(self) -> VisionEncoder:
        return self.model.encoder

    @property
    def exported(self) -> nn.Module:
        """What a run leaves behind: both towers."""
        return self.model

    def train(self, mode: bool = True) -> "LiTObjective":
        super().train(mode)
        self.encoder.eval()
        return self

    def look_ahead(self, micro_batches: Sequence[Batch], counts: Counts) -> None:
        """This rank's micro-batches of an optimizer step; every rank calls it, with as many of them."""
        self._step = deque(_Seen(batch.sample.cpu(), self._digests(batch)) for batch in micro_batches)
        if len(self._step) == 1:
            return
        device = next(self.parameters()).device
        with torch.no_grad():  # by the module's own call, at which ZeRO-3 gathers the weights
            found = [self(b.to(device), counts, seen) for b, seen in zip(micro_batches, self._step, strict=True)]
        pairs = [(each["images"], each["texts"]) for each in found]
        shares = self._differentiate(pairs, found[0]["log_scale"], found[0]["bias"])
        for seen, share in zip(self._step, shares, strict=True):
            seen.share = share

    def forward(self, batch: Batch, counts: Counts, seen: _Seen | None = None) -> dict[str, Tensor]:
        """-> the loss, whose sum over all micro-batches is the mean over the step's captioned pairs, and the accuracy,
        as such a share: how often an image's own caption is the one it fits best.

        With `seen`, which `look_ahead` alone gives, -> what the loss is made of. Raises ValueError for a micro-batch
        that is not the next of those shown to `look_ahead`.
        """
        first_pass, training = seen is not None, torch.is_grad_enabled()
        if not first_pass:
            seen = self._next(batch) if training else _Seen(batch.sample, self._digests(batch))
        if seen.patches is None:
            seen.patches = self._patches(batch, seen.digests)
        images, texts, log_scale, bias = self._features(batch, seen.patches)
        if first_pass:
            return {"images": images, "texts": texts, "log_scale": log_scale, "bias": bias}
        if not training:
            own = torch.arange(len(images), device=images.device)
            loss, right = self._compare(images, texts, own, bounded(log_scale), bias)
            return {"loss": loss / counts.captions, "accuracy": right / counts.captions}
        share = seen.share or self._differentiate([(images, texts)], log_scale, bias)[0]
        linear = (images * share.images).sum() + (texts * share.texts).sum()
        linear = linear + log_scale * share.log_scale + bias * share.bias
        return {"loss": share.loss + (linear - linear.detach()), "accuracy": share.accuracy}

    def _next(self, batch: Batch) -> _Seen:
        seen = self._step.popleft() if self._step else None
        if seen is None or not torch.equal(seen.sample, batch.sample.cpu()):
            self._step.clear()
            shown = "nothing is left of those" if seen is None else f"the next is {_numbers(seen.sample)}"
            raise ValueError(
                f"the micro-batch of samples {_numbers(batch.sample)}, but of those that look_ahead was shown {shown}: "
                "its negatives would be stale. Expected look_ahead with all micro-batches of the optimizer step, then "
                "forward with each of them once, in order"
            )
        return seen

    def _features(self, batch: Batch, patches: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """-> unit vectors of the n captioned pairs (n, E), twice, the scale's logarithm, not bounded, and bias."""
        captioned = batch.text_length > 0
        text = batch.text.clone()
        text[:, 0].masked_fill_(~captioned, self.config.text.eos)  # for the text tower; left out below
        images, texts, _ = self.model(None, text, patches=patches, mask=batch.real_patches())
        log_scale = at_least_fp32(self.model.log_scale).reshape(())  # DeepSpeed has scalars as (1,)
        bias = log_scale.new_zeros(()) if self.bias is None else at_least_fp32(self.bias).reshape(())
        return images[captioned], texts[captioned], log_scale, bias

    def _compare(
        self, images: Tensor, texts: Tensor, own: Tensor, log_scale: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Pairs `own` (n,) of all (M, E) against all -> the sum of their losses, and how many images fit their own
        caption best; of equal captions the first counts.
        """
        scale = log_scale.exp()
        image_logits = scale * images[own] @ texts.T + bias  # (n, M)
        if self.config.loss == "sigmoid":
            loss = losses.sigmoid_contrastive(image_logits, own)
        else:
            loss = losses.contrastive(image_logits, scale * texts[own] @ images.T, own)
        best = image_logits.argmax(dim=1) if len(own) else own
        return loss, (best == own).sum()

    @torch.enable_grad()
    def _differentiate(self, pairs: list[tuple[Tensor, Tensor]], log_scale: Tensor, bias: Tensor) -> list[_Share]:
        """The loss of each micro-batch's features against those of all micro-batches of all ranks, and gradients.

        A scale beyond its bound, where momentum carries it, counts as the bound and keeps the gradient that leads back.
        """
        own = torch.cat([torch.cat(pair, dim=1) for pair in pairs]).detach()  # (n, 2E) of this rank
        features, first = gather_rows(own)
        images, texts = (x.detach().requires_grad_() for x in features.chunk(2, dim=1))  # twice (M, E)
        inside, bias = (x.detach().requires_grad_() for x in (bounded(log_scale), bias))
        gradient, found, total = torch.zeros_like(features), [], max(1, len(features))
        rows = torch.arange(first, first + len(own), device=own.device).split([len(part) for part, _ in pairs])
        for mine in rows:  # one micro-batch at a time, for the memory of n x M logits
            loss, right = self._compare(images, texts, mine, inside, bias)
            loss = loss / total
            *by_features, by_scale, by_bias = torch.autograd.grad(
                loss, [images, texts, inside, bias], materialize_grads=True
            )
            gradient += torch.cat(by_features, dim=1)
            found.append((loss.detach(), right / total, by_scale, by_bias))
        gradient = sum_over_ranks(gradient)
        whole = sum_over_ranks(torch.stack([by_scale for *_, by_scale, _ in found]).sum(dim=0, keepdim=True))
        outward = ((log_scale - inside) * whole < 0).squeeze(0)  # a step goes against the gradient
        return [
            _Share(loss, accuracy, *gradient[mine].chunk(2, dim=1), by_scale.masked_fill(outward, 0.0), by_bias)
            for mine, (loss, accuracy, by_scale, by_bias) in zip(rows, found, strict=True)
        ]

    def _digests(self, batch: Batch) -> list[bytes] | None:
        if self._cache is None or not self.training:  # held-out images would take the room of those that come again
            return None
        return digests_of(batch.image, batch.grid)

    @torch.no_grad()
    def _patches(self, batch: Batch, digests: list[bytes] | None) -> Tensor:
        """(B, N, D), the locked tower's output; of a strip's padding it may be anything."""
        if digests is None:
            return self._look(batch, slice(None))
        new = [i for i, digest in enumerate(digests) if digest not in self._cache]
        seen = self._look(batch, new) if new else None
        computed = dict(zip(new, () if seen is None else seen.cpu(), strict=True))
        patches = []
        for i, (digest, n) in enumerate(zip(digests, batch.patch_counts().tolist(), strict=True)):
            if i in computed:
                self._cache.keep(digest, computed[i][:n])
            patches.append(computed[i][:n] if i in computed else self._cache[digest])
        if len(new) == len(digests):
            return seen
        return nn.utils.rnn.pad_sequence(patches, batch_first=True).to(batch.image.device)

    def _look(self, batch: Batch, rows: list[int] | slice) -> Tensor:
        return self.encoder(batch.image[rows], grid=None if batch.grid is None else batch.grid[rows])


def _numbers(samples: Tensor) -> str:
    samples = samples.tolist()
    return f"{samples[0]} to {samples[-1]}" if samples else "none"
