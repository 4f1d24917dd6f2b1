"""Evaluation: a sweep of attentive heads in one pass beside the same heads one by one, and beside the published module;
nearest neighbours beside scikit-learn's.

D width, H attention heads, N patches, B images of a batch.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from benchmark_rounds import OURS, compare, time_rounds
from sklearn.neighbors import NearestNeighbors
from torch import nn
from torch.nn.utils import clip_grad_norm_

from aimv2.encoder import VisionEncoder, vision_config
from aimv2.evals.knn import Rows, nearest
from aimv2.evals.probes.attentive_probe import AttentiveProbe
from aimv2.evals.probes.attentive_sweep import AttentiveSweep
from aimv2.evals.session import Session

PEERS = ("sklearn",)
MODES = ("cached", "online", "knn")
CLASSES = 1000
ONE_BY_ONE, PUBLISHED, SCIKIT_LEARN = "one by one", "published", "scikit-learn"
QUERIES, NEIGHBOURS, WIDTH = 1_000, 200, 1024


class Published(nn.Module):
    """Apple's head as it is written: keys and values of every patch."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.linear = nn.Linear(width, CLASSES, bias=False)
        self.bn = nn.BatchNorm1d(width, affine=False, eps=1e-6)

    def forward(self, x):
        x = self.bn(x.transpose(-2, -1)).transpose(-2, -1)
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.cls_token.expand(len(x), -1, -1), self.k(x), self.v(x))
        )
        return self.linear(F.scaled_dot_product_attention(q, k, v).flatten(1))


def results(arguments: argparse.Namespace) -> Iterator[dict]:
    config, device = vision_config(arguments.size, arguments.image_size), torch.device(arguments.device)
    rng = np.random.default_rng(0)
    kept = rng.standard_normal((2 * arguments.batch, config.num_patches, config.width), np.float32)
    encoder = VisionEncoder(config).to(device).eval()
    images = torch.randn(arguments.batch, 3, arguments.image_size, arguments.image_size, device=device)
    labels = torch.randint(CLASSES, (arguments.batch,), device=device)
    buffer = np.empty_like(kept[: arguments.batch])

    def cached() -> torch.Tensor:
        rows = np.sort(rng.permutation(len(kept))[: arguments.batch])
        return torch.from_numpy(np.take(kept, rows, axis=0, out=buffer, mode="clip")).to(device)

    @torch.no_grad()
    def online() -> torch.Tensor:
        return encoder(images)

    for mode, features in (("cached", cached), ("online", online)):
        if mode not in arguments.modes:
            continue
        compared = compare(time_rounds(passes(config, features, labels, device), arguments.rounds, device, mode))
        for name, times in compared.items():
            yield {"mode": mode, "subject": name, **times}
    if "knn" not in arguments.modes:
        return
    seconds = time_rounds(searches(arguments.gallery), arguments.rounds, torch.device("cpu"), "knn")
    for name, times in compare(seconds).items():
        yield {"mode": "knn", "subject": name, **times}


def passes(config, features: Callable, labels: torch.Tensor, device: torch.device) -> dict[str, Callable]:
    protocol, session = AttentiveProbe(), Session(device=device)
    settings = [{"lr": lr, "weight_decay": wd} for lr, wd in itertools.product(protocol.lrs, protocol.weight_decays)]
    make = partial(
        AttentiveSweep,
        width=config.width,
        heads=config.heads,
        classes=CLASSES,
        warmup=0.05,
        min_lr=protocol.min_lr,
        clip=protocol.clip,
        seed=0,
        device=device,
    )
    together, apart = make(settings), [make([setting]) for setting in settings]
    head = Published(config.width, config.heads).to(device)
    optimizer = torch.optim.AdamW(head.parameters(), fused=True)

    def one_by_one() -> None:
        for sweep in apart:
            sweep.step(features(), labels, 1, 100, session)

    def published() -> None:
        for _ in settings:
            F.cross_entropy(head(features()), labels).backward()
            clip_grad_norm_(head.parameters(), protocol.clip)
            optimizer.step()
            optimizer.zero_grad()

    return {
        OURS: lambda: together.step(features(), labels, 1, 100, session),
        ONE_BY_ONE: one_by_one,
        PUBLISHED: published,
    }


def searches(size: int) -> dict[str, Callable]:
    rng = np.random.default_rng(0)
    gallery, queries = (rng.standard_normal((count, WIDTH), np.float32) for count in (size, QUERIES))
    peer = NearestNeighbors(n_neighbors=NEIGHBOURS, metric="cosine", algorithm="brute").fit(gallery)
    rows, session = [Rows(array, np.arange(len(array))) for array in (queries, gallery)], Session(quiet=True)
    return {
        OURS: lambda: nearest(*rows, NEIGHBOURS, session),
        SCIKIT_LEARN: lambda: peer.kneighbors(queries),
    }


TITLE = f"{'mode':8} {'subject':12} {'seconds':>10} {'ratio (quartiles)':>23}"


def line(r: dict) -> str:
    ratio = "{:.2f} ({:.2f}-{:.2f})".format(r["ratio"], *r["ratio_quartiles"])
    return f"{r['mode']:8} {r['subject']:12} {r['seconds']:10.3f} {ratio:>23}"


def footer(found: list[dict]) -> str:
    return (
        "cached, online: a step of all heads. one by one: each head with its own features and statistics, by the same "
        f"code. knn: {QUERIES} queries, the {NEIGHBOURS} nearest of --gallery x {WIDTH}."
    )
