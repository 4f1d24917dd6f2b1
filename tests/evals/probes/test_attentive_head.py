"""The head against a plain module written from the published description, and files in Apple's layout."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from aimv2.evals.probes.attentive_head import AttentiveHead, HeadError, load_head
from aimv2.weights import ModelError


class Published(nn.Module):
    """Keys and values of every patch, then attention; nothing is rearranged."""

    def __init__(self, width: int, heads: int, classes: int):
        super().__init__()
        self.heads = heads
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.linear = nn.Linear(width, classes, bias=False)
        self.bn = nn.BatchNorm1d(width, affine=False, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        x = self.bn(x.transpose(-2, -1)).transpose(-2, -1)
        query = self.cls_token.expand(b, -1, -1).reshape(b, 1, self.heads, d // self.heads).permute(0, 2, 1, 3)
        key = self.k(x).reshape(b, n, self.heads, d // self.heads).permute(0, 2, 1, 3)
        value = self.v(x).reshape(b, n, self.heads, d // self.heads).permute(0, 2, 1, 3)
        x = F.scaled_dot_product_attention(query, key, value)
        return self.linear(x.transpose(1, 2).reshape(b, d))


def pair(width: int, heads: int, classes: int) -> tuple[AttentiveHead, Published]:
    """Equal weights, in float64, large enough that the attention is not flat."""
    torch.manual_seed(0)
    ours, published = AttentiveHead(width, heads, classes).double(), Published(width, heads, classes).double()
    with torch.no_grad():
        published.cls_token.mul_(100)
    ours.load_state_dict(published.state_dict())
    return ours, published


@pytest.mark.parametrize(("width", "heads", "patches"), [(12, 3, 5), (8, 1, 1), (16, 16, 9)])
def test_it_is_the_published_head(width, heads, patches):
    """Outputs, gradients and running statistics, in training and at rest. 1e-12: rounding in float64."""
    ours, published = pair(width, heads, classes=7)
    close = {"rtol": 1e-10, "atol": 1e-12}
    labels = torch.tensor([0, 6, 3, 3])
    for _ in range(3):
        x = 5 + 3 * torch.randn(4, patches, width, dtype=torch.float64)
        mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        for head, features in ((ours, mine), (published, theirs)):
            head.zero_grad()
            F.cross_entropy(head(features), labels).backward()
        torch.testing.assert_close(ours(x), published(x), **close)
        torch.testing.assert_close(mine.grad, theirs.grad, **close)
        for name, parameter in published.named_parameters():
            torch.testing.assert_close(ours.get_parameter(name).grad, parameter.grad, **close)
    torch.testing.assert_close(ours.state_dict(), published.state_dict(), **close)
    torch.testing.assert_close(ours.eval()(x), published.eval()(x), **close)


def test_names_shapes_and_start():
    torch.manual_seed(0)
    head = AttentiveHead(64, 4, 10)
    assert {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()} == {
        "cls_token": (1, 1, 64),
        "k.weight": (64, 64),
        "v.weight": (64, 64),
        "linear.weight": (10, 64),
        "bn.running_mean": (64,),
        "bn.running_var": (64,),
        "bn.num_batches_tracked": (),
    }
    assert head.cls_token.std().item() == pytest.approx(0.02, rel=0.35)  # 4 sigma of the deviation of 64 numbers
    with pytest.raises(ValueError, match="width 64 is not a multiple of the number of heads 5"):
        AttentiveHead(64, 5, 10)


def weights(prefix: str = "", **others: Tensor) -> dict[str, Tensor]:
    _, published = pair(12, 3, 7)
    return {prefix + name: tensor for name, tensor in published.float().state_dict().items()} | others


def test_apples_files(tmp_path):
    """A head beside a trunk in a .pth, one of its own, one nested as training code does it, and safetensors."""
    torch.save(weights("head.", **{"trunk.blocks.0.norm_1.weight": torch.ones(3)}), tmp_path / "model.pth")
    torch.save(weights(), tmp_path / "head.pth")
    torch.save({"model": weights("head.")}, tmp_path / "nested.bin")
    save_file(weights(), tmp_path / "head.safetensors")
    x = torch.randn(2, 5, 12)
    published = Published(12, 3, 7).eval()
    published.load_state_dict(weights())
    for name in ("model.pth", "head.pth", "nested.bin", "head.safetensors"):
        head = load_head(tmp_path / name, heads=3, width=12, classes=7)
        assert not head.training
        torch.testing.assert_close(head(x), published(x))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"linear.weight": torch.zeros(7, 12, 1)}, "whose linear.weight is (classes, width), found (7, 12, 1)"),
        ({"linear.weight": torch.zeros(8, 12)}, "a head of 8 classes and width 12: expected 7 classes and width 12"),
        ({"k.weight": torch.zeros(12, 11)}, "k.weight is (12, 11): expected (12, 12)"),
        ({"k.weight": None}, "k.weight is missing: expected (12, 12)"),
        ({"linear.bias": torch.zeros(7)}, "linear.bias is (7,): expected no such name"),  # LiT's pool
        ({"cls_token": torch.zeros(1, 2, 12)}, "cls_token is (1, 2, 12): expected (1, 1, 12)"),
    ],
)
def test_what_is_no_such_head(tmp_path, change, words):
    contents = {name: tensor for name, tensor in (weights() | change).items() if tensor is not None}
    save_file(contents, tmp_path / "head.safetensors")
    with pytest.raises(HeadError) as error:
        load_head(tmp_path / "head.safetensors", heads=3, width=12, classes=7)
    assert words in str(error.value)
    assert "head.safetensors" in str(error.value)


def test_an_encoder_without_a_head(tmp_path):
    save_file({"trunk.norm.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(HeadError, match="expected an attentive head"):
        load_head(tmp_path / "model.safetensors", heads=3)


class Harmful:
    def __reduce__(self):
        return pytest.fail, ("it was run",)


def test_nothing_is_unpickled(tmp_path):
    torch.save({**weights(), "more": Harmful()}, tmp_path / "head.pth", pickle_module=pickle)
    with pytest.raises(ModelError, match="nothing of it was run"):
        load_head(tmp_path / "head.pth", heads=3)
