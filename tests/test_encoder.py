import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import random_encoder, to_transformers

from aimv2.encoder import SIZES, VisionConfig, VisionEncoder, vision_config
from aimv2.masks import prefix_mask

V2 = VisionConfig(width=96, depth=3, heads=3, mlp_hidden=256, image_size=56)
V1 = replace(V2, mlp_hidden=384, mlp="gelu", norm="layernorm", positions="sincos")
NATIVE = replace(V2, positions="sincos")


# --- shapes and sizes


def count_by_formula(width, depth, mlp_hidden, patches, *, norm_parameters, mlp_matrices):
    """The parameters of an encoder: patch convolution and norm, positions (none for 0 patches), blocks, final norm."""
    norm = norm_parameters * width
    block = 4 * width**2 + mlp_matrices * width * mlp_hidden + 2 * norm
    return 588 * width + width + norm + patches * width + depth * block + norm


def count(config: VisionConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in VisionEncoder(config).parameters())


AIMV2_MILLIONS = [
    ("base", 224, 85.60),
    ("large", 224, 309.198),
    ("large", 336, 309.526),
    ("large", 448, 309.984),
    ("huge", 224, 680.852),
    ("huge", 336, 681.343),
    ("huge", 448, 682.032),
    ("1b", 224, 1234.958),
    ("1b", 336, 1235.614),
    ("1b", 448, 1236.531),
    ("3b", 224, 2720.658),
    ("3b", 336, 2721.641),
    ("3b", 448, 2723.018),
]


@pytest.mark.parametrize(("size", "image_size", "millions"), AIMV2_MILLIONS)
def test_aimv2_parameter_counts(size, image_size, millions):
    config = vision_config(size, image_size)
    hidden = 256 * math.ceil(int(8 / 3 * config.width) / 256)
    expected = count_by_formula(
        config.width, config.depth, hidden, (image_size // 14) ** 2, norm_parameters=1, mlp_matrices=3
    )
    assert count(config) == expected
    assert expected / 1e6 == pytest.approx(millions, abs=0.005 if size == "base" else 0.0005)
    assert config.width == 128 * config.heads


def test_native_parameter_count():
    expected = count_by_formula(1024, 24, 2816, 0, norm_parameters=1, mlp_matrices=3)
    assert count(vision_config("large", positions="sincos")) == expected
    assert round(expected / 1e6, 3) == 308.936


@pytest.mark.parametrize(
    ("size", "parameters"),
    [("aim-0.6b", 680_535_552), ("aim-1b", 1_209_370_624), ("aim-3b", 2_720_025_600), ("aim-7b", 6_445_404_160)],
)
def test_aim_v1_parameter_counts(size, parameters):
    config = vision_config(size)
    expected = count_by_formula(config.width, config.depth, 4 * config.width, 0, norm_parameters=2, mlp_matrices=2)
    assert count(config) == expected == parameters
    assert config.width == 128 * config.heads


def test_vision_config_gives_a_fresh_copy_and_names_what_exists():
    config = vision_config("large", 336, checkpointing=True)
    assert (config.grid, config.num_patches) == (24, 576)
    config.depth = 1
    assert SIZES["large"].depth == 24 and SIZES["large"].image_size == 224
    with pytest.raises(ValueError, match=r"'giant'.*base, large, huge, 1b, 3b"):
        vision_config("giant")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 225}, "image_size 225.*patch_size 14"),
        ({"heads": 7}, "width 96.*heads 7"),
        ({"mlp": "relu"}, r"mlp 'relu': expected one of \['gelu', 'swiglu'\]"),
        ({"norm": "batchnorm"}, "norm 'batchnorm'"),
        ({"positions": "rope"}, "positions 'rope'"),
        ({"position_scale": 0.5}, "position_scale 0.5 with positions 'learned'"),
        ({"position_scale": 0.0, "positions": "sincos"}, "position_scale 0.0.*more than 0"),
    ],
)
def test_impossible_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(V2, **change)


@pytest.mark.parametrize("config", [V2, NATIVE])
@pytest.mark.parametrize("size", [(56, 57), (57, 56), (13, 56)])
def test_sizes_that_are_not_multiples_of_the_patch_are_named(config, size):
    with pytest.raises(ValueError, match=rf"{size[0]}x{size[1]}.*14"):
        VisionEncoder(config)(torch.zeros(1, 3, *size))


@pytest.mark.parametrize("size", [(112, 448), (448, 112), (448, 448), (224, 210)])
def test_learned_positions_refuse_another_grid(size):
    encoder = VisionEncoder(replace(V2, image_size=224))  # 112x448 px has its 256 patches, in another grid
    with pytest.raises(ValueError, match=rf"{size[0] // 14}x{size[1] // 14} patches.*16x16"):
        encoder(torch.zeros(1, 3, *size))


# --- independent implementations


def assert_same_features(ours, theirs):
    """Final features and each block's raw output; fp32 on both sides, other kernels and summation orders."""
    features, hidden_states = ours
    their_features, their_hidden_states = theirs
    assert len(hidden_states) == len(their_hidden_states)
    for a, b in zip([features, *hidden_states], [their_features, *their_hidden_states], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "size"), [(V2, (56, 56)), (NATIVE, (56, 56)), (NATIVE, (28, 98)), (NATIVE, (126, 14))]
)
@torch.no_grad()
def test_against_transformers(config, size):
    transformers = pytest.importorskip("transformers")
    encoder = random_encoder(config)
    peer = transformers.Aimv2VisionModel(
        transformers.Aimv2VisionConfig(
            hidden_size=config.width,
            intermediate_size=config.mlp_hidden,
            num_hidden_layers=config.depth,
            num_attention_heads=config.heads,
            image_size=config.image_size,
            patch_size=config.patch_size,
            use_head=False,
            is_native=config.positions == "sincos",
        )
    ).eval()
    peer.load_state_dict(to_transformers(encoder.state_dict()))
    image = torch.randn(2, 3, *size)
    theirs = peer(image, output_hidden_states=True)
    # transformers' list starts with the embeddings, and ends with the last block's output or with the final norm's
    blocks = []
    hooks = [layer.register_forward_hook(lambda _m, _i, out: blocks.append(out)) for layer in peer.encoder.layers]
    peer(image)
    assert len(hooks) == len(blocks) == len(theirs.hidden_states) - 1
    assert_same_features(encoder(image, output_hidden_states=True), (theirs.last_hidden_state, blocks))


@torch.no_grad()
def test_against_timm():
    timm = pytest.importorskip("timm")
    config = replace(V2, width=128, heads=4, mlp_hidden=352)  # 2.75 * 128, as timm's large has it
    encoder = random_encoder(config)
    peer = timm.create_model("aimv2_large_patch14_224", img_size=56, embed_dim=128, depth=3, num_heads=4).eval()
    names = {"patch_embed.": "patch_embed.proj.", "patch_norm.": "patch_embed.norm.", "positions.weight": "pos_embed"}
    names |= {".attention.": ".attn.", ".gate.": ".fc1_g.", ".up.": ".fc1_x.", ".down.": ".fc2."}
    state = {}
    for key, value in encoder.state_dict().items():
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        state[key] = value
    peer.load_state_dict(state)
    image = torch.randn(2, 3, 56, 56)
    theirs = peer.forward_intermediates(image, output_fmt="NLC")
    assert_same_features(encoder(image, output_hidden_states=True), theirs)


def aim_v1(state: dict[str, np.ndarray], image: np.ndarray, heads: int, prefix_length: int) -> np.ndarray:
    """AIM v1 as its paper has it (section 3 and table 1), in float64: one image (3, H, W) -> (N, D)."""

    def layer_norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    kernel = state["patch_embed.weight"]
    d, _, p, _ = kernel.shape
    rows, columns = image.shape[1] // p, image.shape[2] // p
    x = np.empty((rows * columns, d))
    position = np.empty((rows * columns, d))
    frequency = 1 / 10000 ** (np.arange(d // 4) / (d // 4))
    for r in range(rows):
        for c in range(columns):
            patch = image[:, r * p : (r + 1) * p, c * p : (c + 1) * p]
            x[r * columns + c] = (kernel * patch).sum((1, 2, 3)) + state["patch_embed.bias"]
            angles = np.sin(c * frequency), np.cos(c * frequency), np.sin(r * frequency), np.cos(r * frequency)
            position[r * columns + c] = np.concatenate(angles)
    x = layer_norm(x, "patch_norm") + position
    key, query = np.arange(len(x))[None], np.arange(len(x))[:, None]
    hidden_states = 0
    while f"blocks.{hidden_states}.norm1.weight" in state:
        block = f"blocks.{hidden_states}"
        q, k, v = np.split(layer_norm(x, f"{block}.norm1") @ state[f"{block}.attention.qkv.weight"].T, 3, axis=1)
        attended = []
        for h in range(heads):
            part = slice(h * d // heads, (h + 1) * d // heads)
            scores = q[:, part] @ k[:, part].T / math.sqrt(d // heads)
            weights = np.exp(scores) * ((key <= query) | (key < prefix_length))
            attended.append(weights / weights.sum(1, keepdims=True) @ v[:, part])
        x = x + np.concatenate(attended, axis=1) @ state[f"{block}.attention.proj.weight"].T
        hidden = layer_norm(x, f"{block}.norm2") @ state[f"{block}.mlp.fc1.weight"].T
        hidden = hidden * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2))) / 2
        x = x + hidden @ state[f"{block}.mlp.fc2.weight"].T
        hidden_states += 1
    return layer_norm(x, "norm")


@pytest.mark.parametrize("prefix_length", [0, 5, 12])
@torch.no_grad()
def test_aim_v1_against_its_description(prefix_length):
    encoder = random_encoder(V1).double()
    image = torch.randn(1, 3, 42, 56, dtype=torch.float64)
    features = encoder(image, prefix_mask(torch.tensor([prefix_length]), 12))
    state = {name: value.numpy() for name, value in encoder.state_dict().items()}
    expected = aim_v1(state, image[0].numpy(), V1.heads, prefix_length)
    # all is float64 but for the sines, which the encoder keeps in fp32
    np.testing.assert_allclose(features[0].numpy(), expected, rtol=0, atol=1e-6)


# --- invariants


@torch.no_grad()
def test_hidden_states_are_raw_block_outputs():
    encoder = random_encoder(V2)
    image = torch.randn(2, 3, 56, 56)
    features, hidden_states = encoder(image, output_hidden_states=True)
    assert len(hidden_states) == V2.depth
    assert torch.equal(features, encoder.norm(hidden_states[-1])) and torch.equal(features, encoder(image))


@pytest.mark.parametrize("config", [V2, V1], ids=["v2", "v1"])
def test_checkpointing_changes_no_bit(config):
    encoder = random_encoder(config)
    image, mask = torch.randn(2, 3, 56, 56), prefix_mask(torch.tensor([3, 9]), 16)
    gradients = []
    for checkpointing in (False, True):
        encoder.config = replace(config, checkpointing=checkpointing)
        encoder.zero_grad()
        encoder(image, mask).square().sum().backward()
        gradients.append([p.grad.clone() for p in encoder.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("config", [V2, V1, NATIVE, replace(V2, checkpointing=True)])
def test_compiles_without_graph_breaks(config):
    encoder = random_encoder(config)
    image, mask = torch.randn(2, 3, 56, 56), prefix_mask(torch.tensor([3, 9]), 16)
    torch._dynamo.reset()
    assert torch._dynamo.explain(encoder)(image, mask).graph_break_count == 0
    compiled = torch.compile(encoder, fullgraph=True, backend="eager")
    assert torch.equal(compiled(image, mask), encoder(image, mask))


@pytest.mark.parametrize("config", [V2, V1, NATIVE], ids=["v2", "v1", "native"])
@torch.no_grad()
def test_bf16_weights_give_bf16_features(config):
    encoder = random_encoder(config)
    image = torch.randn(2, 3, 56, 56)
    expected = encoder(image)
    features = encoder.bfloat16()(image)
    assert features.dtype == torch.bfloat16 and torch.equal(features, encoder(image.bfloat16()))
    # 8 bits a value, 2^-9 relative each time one is rounded; some 30 roundings on the way, at random
    assert (features - expected).norm() / expected.norm() < 30**0.5 * 2**-8
