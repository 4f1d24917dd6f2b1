"""Optimizer and learning rate, independent of who runs them."""

import math
import re
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(slots=True, kw_only=True)
class OptimConfig:
    """AdamW with linear warm-up and cosine decay; defaults are AIMv2's (appendix, table of pre-training)."""

    peak_lr: float
    warmup_steps: int
    start_lr: float = 1e-6
    final_lr: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 1e-4
    decoupled: bool = True  # p *= 1 - weight_decay * lr / peak_lr; False: torch's p *= 1 - weight_decay * lr
    no_decay: str = r"bias$|norm\d?\.weight$|positions|bos$"  # the token table IS decayed
    clip: float = 1.0  # largest norm of the whole gradient

    def __post_init__(self):
        if self.peak_lr <= 0:
            raise ValueError(f"peak_lr {self.peak_lr}: expected a positive number")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps {self.warmup_steps}: expected 0 or more")


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict]:
    """Trainable parameters as AdamW's groups: those that decay, and those whose name matches `no_decay`."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decay = config.weight_decay / config.peak_lr if config.decoupled else config.weight_decay
    groups = [
        {"params": [p for name, p in named if not re.search(config.no_decay, name)], "weight_decay": decay},
        {"params": [p for name, p in named if re.search(config.no_decay, name)], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: OptimConfig, *, fused: bool = False) -> torch.optim.AdamW:
    """A plain torch AdamW: ZeRO accepts it by its exact type."""
    groups = parameter_groups(model, config)
    return torch.optim.AdamW(groups, lr=config.peak_lr, betas=config.betas, eps=config.eps, fused=fused or None)


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """The rate of step `step` of `steps`: linear from `start_lr` to the peak, then cosine to `final_lr`."""
    if step < config.warmup_steps:
        return config.start_lr + (config.peak_lr - config.start_lr) * step / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, steps - config.warmup_steps))
    return config.final_lr + (config.peak_lr - config.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))
