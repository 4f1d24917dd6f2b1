"""Ranks that are threads, and encoders that know the label, for tests of probes."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from aimv2.evals.encoders import BlockOutput, Encoder
from aimv2.evals.session import Session
from aimv2.preprocessing import ProcessorConfig

SECONDS = 60  # before a rank that waits for the others gives up


class Threads:
    """So many ranks in one process."""

    def __init__(self, ranks: int):
        self.ranks, self.barrier = ranks, threading.Barrier(ranks)
        self.parts: list[Tensor | None] = [None] * ranks

    def run(self, function: Callable[[Session], object]) -> list:
        """What the function returns on each rank."""
        sessions = [_Thread(rank=rank, world_size=self.ranks, quiet=True) for rank in range(self.ranks)]
        for session in sessions:
            session.threads = self
        with ThreadPoolExecutor(self.ranks) as pool:
            return list(pool.map(function, sessions))


class _Thread(Session):
    threads: Threads

    def sum(self, tensor: Tensor) -> Tensor:
        self.threads.parts[self.rank] = tensor.detach().clone()
        self.threads.barrier.wait(SECONDS)
        total = torch.stack(self.threads.parts).sum(dim=0)
        self.threads.barrier.wait(SECONDS)
        return total


class Told(Encoder):
    """Reads the class off an image of `made_images`, whose red is 10 times its number, and tells it or not.

    kind: "oracle", the class and the noise; "random", the noise alone, which has nothing to do with the class;
    "constant", the same for all. With a CLS token if `cls`.
    """

    def __init__(self, kind: str, *, width: int = 12, depth: int = 2, cls: bool = False):
        half = (0.5, 0.5, 0.5)
        super().__init__(
            nn.Identity(),
            ProcessorConfig(image_size=8, patch_size=4, mean=half, std=half),
            spec=f"told:{kind}",
            name=kind,
            source="told",
            width=width,
            depth=depth,
            heads=2,
            grid=(2, 2),
            trained=False,
        )
        self.kind, self.with_cls = kind, cls

    def _pass(self, images: Tensor, numbers, output: bool) -> tuple[list[BlockOutput], BlockOutput]:
        levels = (images + 1) * 127.5  # (B, 3, 8, 8)
        noise = levels[:, 1:].reshape(len(images), 4, -1)[..., : self.width] / 255  # (B, N, D)
        if self.kind == "constant":
            noise = torch.ones_like(noise)
        if self.kind == "oracle":
            label = (levels[:, 0].mean(dim=(1, 2)) / 10).round().long().clamp(max=self.width - 1)
            noise = noise + 3 * nn.functional.one_hot(label, self.width)[:, None]

        def block(number: int) -> BlockOutput:
            patches = noise * (number + 1)
            return BlockOutput(patches, 2 * patches[:, 0] if self.with_cls else None)

        return [block(number) for number in numbers], block(self.depth)

    def _pooled(self, images: Tensor) -> Tensor:
        return self.output(images).patches.mean(dim=1)

    def norm(self, x: Tensor) -> Tensor:
        return x / 2
