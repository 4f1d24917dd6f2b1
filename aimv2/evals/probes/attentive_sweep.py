"""Many attentive heads on the same features, one for each learning rate and weight decay, trained in one pass.

B images, N patches, D width, H attention heads, S heads of the sweep, C classes.

The features are frozen and the BatchNorm has no parameters, so that its statistics need no gradient: they are computed
once for all S heads. Beyond that each head does what it would do alone, operations of the same shapes in the same
order, its own gradient clipping included: the result is the same to the bit. Heads share a matrix product, which is up
to twice as fast, where the first batch of each shape shows that its bits are those of one head at a time; that depends
on the shape, the threads and the library.
"""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from aimv2.evals.probes.attentive_head import AttentiveHead
from aimv2.evals.session import Session
from aimv2.optim import OptimConfig, learning_rate

BETAS = (0.9, 0.999)
MOMENTUM = 0.1  # of BatchNorm's running statistics
CHUNK_BYTES = {"cpu": 2**20}  # patches that stay in a core's cache while one head after the other looks at them
_CHUNK_BYTES_ELSEWHERE = 2**25


class AttentiveSweep:
    """The heads of one stream of features.

    Args:
        settings: {"lr", "weight_decay"} of each head; all begin with the same weights, from `seed`.
        warmup: share of the training in which the rate rises linearly from 0.
        min_lr: where the cosine ends.
        clip: largest norm of a head's gradient.
    """

    def __init__(
        self,
        settings: Sequence[dict[str, float]],
        *,
        width: int,
        heads: int,
        classes: int,
        warmup: float,
        min_lr: float,
        clip: float,
        seed: int,
        device: torch.device,
    ):
        self.settings, self.warmup, self.min_lr, self.clip = list(settings), warmup, min_lr, clip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            first = AttentiveHead(width, heads, classes).to(device)
        self.heads, self.bn = [copy.deepcopy(first) for _ in self.settings], first.bn
        for head in self.heads:
            head.bn = self.bn
        groups = [
            {"params": list(head.parameters()), "lr": setting["lr"], "weight_decay": setting["weight_decay"]}
            for head, setting in zip(self.heads, self.settings, strict=True)
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=BETAS, fused=True)
        self._exact: dict[tuple[int, ...], bool] = {}  # shapes of features for which one product for all is exact

    def step(self, x: Tensor, labels: Tensor, step: int, steps: int, session: Session) -> Tensor:
        """One update of all heads from this rank's part of a batch, x (B, N, D), which is overwritten.

        Returns each head's loss (S,), this rank's part of the mean over the whole batch. B may be 0; if it is on all
        ranks, nothing happens.
        """
        count = float(session.sum(torch.tensor(float(len(labels)), device=x.device)))
        if not count:
            return torch.zeros(len(self.heads), device=x.device)
        scale = self._normalize(x, session)
        queries = torch.stack([head.queries() for head in self.heads]) * scale  # (S, H, D)
        losses = [
            F.cross_entropy(head.classify(pooled * scale), labels, reduction="sum") / count
            for head, pooled in zip(self.heads, self._pool(x, queries), strict=True)
        ]
        torch.stack(losses).sum().backward()
        self._sum_gradients(session)
        for head, setting, group in zip(self.heads, self.settings, self.optimizer.param_groups, strict=True):
            clip_grad_norm_(head.parameters(), self.clip)
            group["lr"] = self._rate(setting["lr"], step, steps)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return torch.stack(losses).detach()

    @torch.no_grad()
    def scores(self, x: Tensor) -> Tensor:
        """(B, N, D), which is overwritten, -> (S, B, C), with the running statistics."""
        x.sub_(self.bn.running_mean)
        scale = (self.bn.running_var + self.bn.eps).rsqrt()
        queries = torch.stack([head.queries() for head in self.heads]) * scale
        pooled = _Pool.apply(x, queries)
        return torch.stack([head.classify(seen * scale) for head, seen in zip(self.heads, pooled, strict=True)])

    def state_dict(self) -> dict:
        return {"heads": [head.state_dict() for head in self.heads], "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        for head, weights in zip(self.heads, state["heads"], strict=True):
            head.load_state_dict(weights)
        self.optimizer.load_state_dict(state["optimizer"])

    def tensors(self, number: int) -> dict[str, Tensor]:
        """The weights of a head, under the published names."""
        return self.heads[number].state_dict()

    def _rate(self, peak: float, step: int, steps: int) -> float:
        schedule = OptimConfig(
            peak_lr=peak, warmup_steps=round(self.warmup * steps), start_lr=0.0, final_lr=min(self.min_lr, peak)
        )
        # The first step counts as one of the warm-up's, or it would change nothing.
        return learning_rate(schedule, step + 1 if step < schedule.warmup_steps else step, steps)

    def _normalize(self, x: Tensor, session: Session) -> Tensor:
        """Centre x in place and return 1 / standard deviation (D,), over all ranks' images and patches.

        The scale is left to the queries and to what they see, which are smaller.
        """
        sums = x.new_zeros(x.shape[-1] + 1, dtype=torch.float64)
        sums[-1] = x.shape[0] * x.shape[1]
        for part in _chunks(x):
            sums[:-1] += x[part].sum(dim=(0, 1))
        sums = session.sum(sums)
        count, mean = sums[-1], (sums[:-1] / sums[-1]).float()
        squares = x.new_zeros(x.shape[-1], dtype=torch.float64)
        for part in _chunks(x):
            squares += x[part].sub_(mean).square().sum(dim=(0, 1))
        variance = session.sum(squares) / count
        with torch.no_grad():
            self.bn.num_batches_tracked += 1
            self.bn.running_mean.lerp_(mean, MOMENTUM)
            self.bn.running_var.lerp_((variance * count / (count - 1).clamp(min=1)).float(), MOMENTUM)
        return (variance + self.bn.eps).rsqrt().float()

    def _pool(self, x: Tensor, queries: Tensor) -> Tensor:
        """`_Pool`, as one head of S*H queries where that has the same bits."""
        shape = tuple(x.shape)
        if len(self.heads) > 1 and shape not in self._exact:
            self._exact[shape] = _same_bits(x, queries.detach())
        return _pool_together(x, queries) if self._exact.get(shape) else _Pool.apply(x, queries)

    def _sum_gradients(self, session: Session) -> None:
        if session.world_size == 1:
            return
        parameters = [parameter for head in self.heads for parameter in head.parameters()]
        total = session.sum(torch.cat([parameter.grad.flatten() for parameter in parameters]))
        for parameter, part in zip(parameters, total.split([p.numel() for p in parameters]), strict=True):
            parameter.grad.copy_(part.view_as(parameter))


class _Pool(torch.autograd.Function):
    """Patches (B, N, D), queries (S, H, D) -> (S, B, H, D): softmax(q x^T) x for each. No gradient for the patches.

    Some images at a time, forwards and backwards, so that their patches are read from memory once for all heads.
    """

    @staticmethod
    def forward(ctx, x: Tensor, queries: Tensor) -> Tensor:
        (b, n, d), (s, h, _) = x.shape, queries.shape
        attention, pooled = x.new_empty(s, b, h, n), x.new_empty(s, b, h, d)
        for part in _chunks(x):
            patches = x[part]
            for query, weights, seen in zip(queries, attention[:, part], pooled[:, part], strict=True):
                torch.bmm(query.expand(len(patches), -1, -1), patches.transpose(1, 2), out=weights)
                torch.softmax(weights, dim=-1, out=weights)
                torch.bmm(weights, patches, out=seen)
        ctx.save_for_backward(x, attention, pooled)
        return pooled

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[None, Tensor]:
        x, attention, pooled = ctx.saved_tensors
        gradient = gradient.contiguous()
        total = x.new_zeros(gradient.shape[0], *gradient.shape[2:])  # (S, H, D)
        expected = (gradient * pooled).sum(dim=-1, keepdim=True)  # (S, B, H, 1)
        for part in _chunks(x):
            patches = x[part]
            slices = (gradient[:, part], attention[:, part], expected[:, part])
            for s, (wanted, weights, mean) in enumerate(zip(*slices, strict=True)):
                of_scores = weights * (wanted @ patches.transpose(1, 2) - mean)  # (b, H, N)
                total[s] += (of_scores @ patches).sum(dim=0)
        return None, total


def _pool_together(x: Tensor, queries: Tensor) -> Tensor:
    s, h, d = queries.shape
    pooled = _Pool.apply(x, queries.view(1, s * h, d))[0]  # (B, S*H, D)
    return pooled.unflatten(1, (s, h)).transpose(0, 1)


def _same_bits(x: Tensor, queries: Tensor) -> bool:
    """Whether heads in one matrix product get what each gets alone, forwards and backwards."""
    found = []
    for pool in (_Pool.apply, _pool_together):
        wanted = queries.clone().requires_grad_()
        pooled = pool(x, wanted)
        (gradient,) = torch.autograd.grad(pooled, wanted, pooled.detach())
        found.append((pooled.detach(), gradient))
    return all(map(torch.equal, *found))


def _chunks(x: Tensor) -> list[slice]:
    """Images of about CHUNK_BYTES."""
    size = max(1, CHUNK_BYTES.get(x.device.type, _CHUNK_BYTES_ELSEWHERE) // max(1, x[:1].nbytes))
    return [slice(start, start + size) for start in range(0, len(x), size)]
