"""Native resolution: strips padded to the longest image beside packing, all images of a micro-batch in one sequence.

Packed, nothing is padded, captions neither, but attention has to keep to each image: by one block-diagonal mask, for
which all that is masked is computed too, or image by image, with as many calls.

B images, n_i patches of one, N the most, t_i tokens, L = sum n_i packed patches, M = sum n_i + t_i, P patch side,
D width, H heads, V vocabulary.
"""

import argparse
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from benchmark_models import CAPTION_TOKENS, DTYPES, TINY, TINY_DECODER, Subject, memory
from benchmark_rounds import OURS, compare, time_rounds
from torch import Tensor, nn

from aimv2 import losses
from aimv2.data.batch import Batch, Counts, count_targets
from aimv2.data.native import area_grid
from aimv2.decoder import DecoderConfig
from aimv2.encoder import vision_config
from aimv2.layers import Attention, Block, attention_in_products
from aimv2.masks import causal_mask, prefix_mask
from aimv2.objectives.aimv2 import AIMv2, AIMv2Config

PEERS = ()
MASKED, APART = "packed, one mask", "packed, image by image"
AREAS = (128, 256, 512, 1024, 2048, 4096)  # powers of two in the paper's range
BUDGET, SEEDS = 32_768, 8  # patches of a micro-batch of configs/aimv2_large_native.py, and how many are drawn
LONGEST = 2.0  # aspect ratios are log-uniform up to this, either way


class ImageByImage(Attention):
    """Another module's attention for a packed sequence (1, L, D), whose `mask` lists the length and mask of each part.

    A mask of None is causal.
    """

    def __init__(self, attention: Attention):
        nn.Module.__init__(self)
        self.heads, self.layer = attention.heads, attention.layer
        self.qkv, self.proj = attention.qkv, attention.proj

    def forward(self, x: Tensor, mask: Sequence[tuple[int, Tensor | None]], causal: bool = False, cache=None) -> Tensor:
        lengths, masks = zip(*mask, strict=True)
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2).split(lengths, dim=2)  # of (1, H, L, D/H)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        in_products = x.dtype == torch.bfloat16 and x.device.type == "cpu"  # as `Attention` chooses
        attend = attention_in_products if in_products else F.scaled_dot_product_attention
        x = [attend(*parts, attn_mask=m, is_causal=m is None) for *parts, m in zip(q, k, v, masks, strict=True)]
        return self.proj(torch.cat(x, dim=2).transpose(1, 2).flatten(2))


@dataclass(slots=True, kw_only=True)
class Packed:
    """What a loader that packs would make of a micro-batch."""

    strips: Batch  # what it was
    image: Tensor  # (1, 3, P, L P), one image's patches after the other's
    real: Tensor  # (B, N), which patches of the strips they are
    text_real: Tensor  # (B, T), the same for tokens
    is_patch: Tensor  # (M,), patches among the decoder's positions
    encoder_mask: Tensor | list
    decoder_mask: Tensor | list


def pack(batch: Batch, patch_size: int, one_mask: bool) -> Packed:
    """From strips; one mask for all, or one for each image."""
    counts, tokens, device = batch.patch_counts().tolist(), batch.text_length.tolist(), batch.image.device
    real = batch.real_patches()
    image = batch.image.unflatten(3, (-1, patch_size)).permute(0, 3, 1, 2, 4)[real]  # (L, 3, P, P)
    is_patch = torch.cat([torch.arange(n + t) < n for n, t in zip(counts, tokens, strict=True)]).to(device)
    encoder = [(n, prefix_mask(s[None], n)[0, 0]) for n, s in zip(counts, batch.prefix_length, strict=True)]
    decoder = [(n + t, None) for n, t in zip(counts, tokens, strict=True)]
    if one_mask:
        encoder = torch.block_diag(*(mask for _, mask in encoder)).bool()  # (L, L)
        decoder = torch.block_diag(*(causal_mask(length, device) for length, _ in decoder)).bool()  # (M, M)
    return Packed(
        strips=batch,
        image=image.permute(1, 2, 0, 3).flatten(2)[None],
        real=real,
        text_real=torch.arange(batch.text.shape[1], device=device) < batch.text_length[:, None],
        is_patch=is_patch,
        encoder_mask=encoder,
        decoder_mask=decoder,
    )


def packing_model(model: AIMv2, one_mask: bool) -> AIMv2:
    """A copy, whose attention takes the masks of `pack`."""
    model = copy.deepcopy(model)
    if not one_mask:
        for block in [module for module in model.modules() if isinstance(module, Block)]:
            block.attention = ImageByImage(block.attention)
    return model


def packed_loss(model: AIMv2, packed: Packed, counts: Counts) -> Tensor:
    """The loss of AIMv2 for the strips that were packed."""
    batch, encoder, decoder = packed.strips, model.encoder, model.decoder
    patches = encoder.patch_embed(packed.image.to(encoder.patch_embed.weight.dtype)).flatten(2).transpose(1, 2)
    positions = encoder.positions.of_grids(batch.grid, batch.num_patches)[packed.real]  # (L, D)
    x = encoder.patch_norm(patches) + positions.to(patches)  # (1, L, D)
    for block in encoder.blocks:
        x = block(x, packed.encoder_mask)
    features = decoder.projection(encoder.norm(x))[0]

    bos = decoder.bos.to(x).expand(len(batch), 1, -1)
    text = torch.cat([bos, decoder.tokens(batch.text[:, :-1])], dim=1)  # (B, T, D)
    text = (text + decoder.text_positions[: text.shape[1]].to(x))[packed.text_real]
    x = x.new_empty(len(packed.is_patch), features.shape[1])  # (M, D)
    x = x.masked_scatter(packed.is_patch[:, None], features).masked_scatter(~packed.is_patch[:, None], text)[None]
    for block in decoder.blocks:
        x = block(x, packed.decoder_mask)
    x = decoder.norm(x)[0]

    pixels = decoder.pixel_head(x[packed.is_patch])  # (L, 3P^2)
    pixels = pixels.new_zeros(*packed.real.shape, pixels.shape[1]).masked_scatter(packed.real[..., None], pixels)
    logits = decoder.text_head(x[~packed.is_patch])[None]  # (1, sum t_i, V)
    patch_size = model.config.vision.patch_size
    pixel = losses.pixel(pixels, batch.image, batch.prefix_length, patch_size, batch.patch_counts()) / counts.patches
    tokens = batch.text[packed.text_real][None]
    caption = losses.caption(logits, tokens, batch.text_length.sum()[None]) / counts.tokens
    return caption + model.config.pixel_weight * pixel


def sizes(area: int, budget: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Grids (B, 2) and tokens (B,) of images and captions, as `NativeOrder` would size them."""
    samples = max(1, budget // area)
    aspects = LONGEST ** (2 * torch.rand(samples, generator=generator) - 1)  # width / height
    grid = torch.tensor([area_grid(1000, round(1000 * aspect), area) for aspect in aspects.tolist()])
    return grid, torch.randint(1, CAPTION_TOKENS + 1, (samples,), generator=generator)


def native_batch(config: AIMv2Config, area: int, budget: int, seed: int = 0) -> Batch:
    """Random images and captions of 1 to 77 tokens."""
    generator = torch.Generator().manual_seed(seed)
    p = config.vision.patch_size
    grid, text_length = sizes(area, budget, generator)
    samples, counts = len(grid), grid.prod(dim=1)
    n = int(counts.max())
    image = torch.randn(samples, 3, p, n, p, generator=generator)
    image = image.masked_fill((torch.arange(n) >= counts[:, None])[:, None, None, :, None], 0.0).flatten(3)
    return Batch(
        image=image,
        text=torch.randint(config.decoder.vocab_size, (samples, int(text_length.max())), generator=generator),
        text_length=text_length,
        prefix_length=1 + (torch.rand(samples, generator=generator) * (counts - 1)).long(),
        sample=torch.arange(samples),
        num_patches=n,
        grid=grid,
    )


def subjects(model: AIMv2, batch: Batch) -> dict[str, Subject]:
    """Forward and backward of strips and of both ways to pack them, on copies of one model."""
    counts = Counts.of(count_targets([batch]).to(batch.image.device).float())
    found = {OURS: subject(model, lambda model: model(batch, counts)["loss"])}
    for name, one_mask in ((MASKED, True), (APART, False)):
        packed = pack(batch, model.config.vision.patch_size, one_mask)
        found[name] = subject(packing_model(model, one_mask), lambda m, packed=packed: packed_loss(m, packed, counts))
    return found


def subject(model: AIMv2, loss: Callable[[AIMv2], Tensor]) -> Subject:
    def run() -> None:
        model.zero_grad(set_to_none=True)
        loss(model).backward()

    return Subject(run=run, tensors=lambda: list(model.parameters()))


def padding(batches: Sequence[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """Shares of the encoder's and of the decoder's positions that are padding, from the `sizes` of batches."""
    counts = [(grid.prod(dim=1), tokens) for grid, tokens in batches]
    patches, tokens = (sum(int(part.sum()) for part in parts) for parts in zip(*counts, strict=True))
    strips, text = (sum(len(part) * int(part.max()) for part in parts) for parts in zip(*counts, strict=True))
    return 1 - patches / strips, 1 - (patches + tokens) / (strips + text)


def results(arguments: argparse.Namespace) -> Iterator[dict]:
    """One for each dtype, area and subject. Raises ValueError for a size or area that isn't one."""
    if min(arguments.areas) < 2 or arguments.budget < max(arguments.areas):
        raise ValueError(f"areas {arguments.areas}, budget {arguments.budget}: expected 2 <= area <= budget")
    if arguments.size == "tiny":
        vision, decoder = replace(TINY, positions="sincos"), TINY_DECODER
    else:
        vision, decoder = vision_config(arguments.size, positions="sincos"), DecoderConfig()
    config, device = AIMv2Config(vision=vision, decoder=decoder), torch.device(arguments.device)
    for dtype in arguments.dtype:
        model = config.build().to(device, DTYPES[dtype])
        for area in arguments.areas:
            batch = native_batch(config, area, arguments.budget).to(device)
            patches, found = int(batch.patch_counts().sum()), subjects(model, batch)
            seconds = time_rounds({n: s.run for n, s in found.items()}, arguments.rounds, device, f"{dtype} {area}")
            of_encoder, of_decoder = padding([(batch.grid, batch.text_length)])
            for name, times in compare(seconds).items():
                yield {
                    "dtype": dtype,
                    "area": area,
                    "images": len(batch),
                    "subject": name,
                    "patches_per_second": patches / times["seconds"],
                    "encoder_padding": of_encoder if name == OURS else 0.0,
                    "decoder_padding": of_decoder if name == OURS else 0.0,
                    "memory_bytes": memory(found[name], device),
                    **times,
                }


TITLE = (
    f"{'dtype':5} {'area':>5} {'images':>6} {'subject':22} {'ms':>9} {'patches/s':>9} {'ratio (quartiles)':>22} "
    f"{'padding':>13} {'MiB':>6}"
)


def line(r: dict) -> str:
    """A result under TITLE."""
    ratio = "{:.2f} ({:.2f}-{:.2f})".format(r["ratio"], *r["ratio_quartiles"])
    return (
        f"{r['dtype']:5} {r['area']:5} {r['images']:6} {r['subject']:22} {1e3 * r['seconds']:9.1f} "
        f"{r['patches_per_second']:9.0f} {ratio:>22} {r['encoder_padding']:6.1%} {r['decoder_padding']:6.1%} "
        f"{r['memory_bytes'] / 2**20:6.0f}"
    )


def footer(found: list[dict]) -> str:
    """Padding at a budget of training, whatever the one that was timed; the table's columns are of what was timed."""
    generator = torch.Generator().manual_seed(0)
    areas = sorted({r["area"] for r in found})
    of_encoder, of_decoder = padding([sizes(area, BUDGET, generator) for area in areas for _ in range(SEEDS)])
    return (
        f"ours: strips. Padding, of the encoder's and the decoder's positions; with micro-batches of {BUDGET} patches "
        f"over these areas {of_encoder:.1%} and {of_decoder:.1%}"
    )
