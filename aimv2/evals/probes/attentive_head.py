"""The attentive probe's head: one learned query looks at all patches, a Linear classifies what it saw.

B images, N patches, D width, H attention heads, C classes.

As published (Apple's inference code): BatchNorm without parameters over images and patches; k and v without biases; a
learned query without projection; no output projection; a Linear without bias. The names of the weights are Apple's.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from aimv2.weights import WeightFiles

EPS = 1e-6  # of the BatchNorm
PREFIX = "head."  # in a file that holds the encoder too


class HeadError(ValueError):
    """A head that can't be read; the message names the file and what was expected."""


class AttentiveHead(nn.Module):
    """(B, N, D) -> (B, C).

    Keys are never computed: x_n.k of head h is x_n . (W_k,h^T q_h). Nor are the patches' values: the attention sums to
    1, so W_v may follow the sum. That is 4*D*H operations for a patch instead of 4*D*D, and the same function.
    """

    def __init__(self, width: int, heads: int, classes: int):
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"width {width} is not a multiple of the number of heads {heads}")
        self.heads = heads
        self.bn = nn.BatchNorm1d(width, affine=False, eps=EPS)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.linear = nn.Linear(width, classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(x.transpose(1, 2)).transpose(1, 2)
        attention = (self.queries() @ x.transpose(1, 2)).softmax(dim=-1)  # (B, H, N)
        return self.classify(attention @ x)

    def queries(self) -> Tensor:
        """(H, D): what each attention head looks for in a normalised patch, W_k,h^T q_h / sqrt(D/H)."""
        d = self.cls_token.shape[-1]
        query, key = self.cls_token.view(self.heads, 1, -1), self.k.weight.view(self.heads, -1, d)
        return (query @ key)[:, 0] * (d // self.heads) ** -0.5

    def classify(self, pooled: Tensor) -> Tensor:
        """(B, H, D), the patches as each attention head weighs them, -> (B, C)."""
        value = self.v.weight.view(self.heads, -1, pooled.shape[-1])  # (H, D/H, D)
        values = pooled.transpose(0, 1) @ value.transpose(1, 2)  # (H, B, D/H)
        return self.linear(values.transpose(0, 1).flatten(1))


def load_head(path: str | Path, *, heads: int, width: int | None = None, classes: int | None = None) -> AttentiveHead:
    """A head from a file of its own or of a model with a head, where its names begin with "head.".

    Args:
        heads: attention heads; the shapes don't tell.
        width, classes: expected, if given.

    Raises:
        HeadError: other names or shapes than a head's, or than expected.
        aimv2.weights.ModelError: no file of weights. Nothing in it is executed.
    """
    files = WeightFiles(path)
    prefix = PREFIX if any(name.startswith(PREFIX) for name in files.shapes) else ""
    found = {name.removeprefix(prefix): shape for name, shape in files.shapes.items() if name.startswith(prefix)}
    linear = found.get("linear.weight", ())
    if len(linear) != 2 or 0 in linear:
        raise HeadError(f"{path}: expected an attentive head, whose linear.weight is (classes, width), found {linear}")
    if width not in (None, linear[1]) or classes not in (None, linear[0]):
        expected = f"{classes or 'any number of'} classes and width {width or 'of any size'}"
        raise HeadError(f"{path}: a head of {linear[0]} classes and width {linear[1]}: expected {expected}")
    with torch.device("meta"):  # no random numbers are drawn
        head = AttentiveHead(linear[1], heads, linear[0])
    expected = {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}
    if found != expected:
        name = min(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        raise HeadError(
            f"{path}: {name} is {found.get(name, 'missing')}: expected {expected.get(name, 'no such name')}"
        )
    head.load_state_dict({name: files[prefix + name] for name in expected}, assign=True)
    return head.eval()
