"""The vision tower: LLaVA's contract, against transformers' AIMv2 from the same weights, and in its LLaVA."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from processes import finish, start
from torch import nn

from aimv2.encoder import VisionConfig, VisionEncoder
from aimv2.exports import export_model
from aimv2.preprocessing import ProcessorConfig
from aimv2.pretrained import load_encoder
from aimv2.tower import (
    LORA_TARGETS,
    AIMv2VisionTower,
    AIMv2VisionTowerS2,
    build_vision_tower,
    parameter_groups,
    register_llava,
)
from aimv2.weights import ModelError

CONFIG = VisionConfig(width=64, depth=3, heads=2, mlp_hidden=96, image_size=56)  # 4 x 4 patches
PROCESSING = ProcessorConfig(image_size=56, patch_size=14, mean=(0.5, 0.4, 0.3), std=(0.3, 0.2, 0.25))


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """One tiny encoder, in two layouts: `ours` and `transformers`."""
    torch.manual_seed(0)
    model, folder = VisionEncoder(CONFIG), tmp_path_factory.mktemp("exports")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)  # so that a norm left out or doubled shows
    for layout in ("ours", "transformers"):
        export_model(model, folder / layout, config=CONFIG, processing=PROCESSING, format=layout)
    return folder


@pytest.fixture(scope="module")
def theirs(exports):
    from transformers import AutoModel

    return AutoModel.from_pretrained(exports / "transformers").eval()


def tower_of(exports, layout: str = "ours", kind=AIMv2VisionTower, delay_load: bool = False, **args):
    return kind(str(exports / layout), SimpleNamespace(**args), delay_load=delay_load)


def pixels(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


# What it computes


@pytest.mark.parametrize("layer", [-1, -2, 1, 3, [1, -1]])
def test_layers_are_those_of_transformers_hidden_states(exports, theirs, layer):
    images = pixels(2, 3, 56, 56)
    with torch.no_grad():
        states = theirs(images, output_hidden_states=True).hidden_states
    assert len(states) == CONFIG.depth + 1
    layers = [layer] if isinstance(layer, int) else layer
    tower = tower_of(exports, mm_vision_select_layer=layer, mm_vision_norm=False)
    expected = torch.cat([states[number] for number in layers], dim=-1)
    # Two implementations in fp32: a matrix product's own rounding at values of about 3.
    torch.testing.assert_close(tower(images), expected, atol=1e-5, rtol=1e-5)
    assert tower.hidden_size == expected.shape[-1]
    normed = tower_of(exports, mm_vision_select_layer=layer)
    expected = torch.cat([theirs.rms_norm(states[number]) for number in layers], dim=-1).detach()
    torch.testing.assert_close(normed(images), expected, atol=1e-5, rtol=1e-5)


def test_every_patch_is_there_the_first_among_them(exports, theirs):
    images = pixels(1, 3, 56, 56)
    features = tower_of(exports, "transformers")(images)
    assert features.shape == (1, (56 // 14) ** 2, 64)
    torch.testing.assert_close(features[:, 0], theirs(images).last_hidden_state[:, 0].detach(), atol=1e-5, rtol=1e-5)


def test_tensors_tiles_and_lists(exports):
    tower, images = tower_of(exports), pixels(4, 3, 56, 56)
    features = tower(images)
    # The same sums, in a matrix product of another size.
    close = {"atol": 2e-6, "rtol": 1e-5}
    listed = tower(list(images))
    assert isinstance(listed, list) and [one.shape for one in listed] == [(1, 16, 64)] * 4
    torch.testing.assert_close(torch.cat(listed), features, **close)
    tiles = tower(images.unflatten(0, (2, 2)))
    assert tiles.shape == (2, 2, 16, 64)
    torch.testing.assert_close(tiles.flatten(0, 1), features, **close)
    one, three = tower([images[0], images[1:]])
    assert one.shape == (1, 16, 64) and three.shape == (3, 16, 64)
    torch.testing.assert_close(three, features[1:], **close)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_features_have_the_dtype_of_the_images(exports, dtype):
    tower, images = tower_of(exports), pixels(2, 3, 56, 56).to(dtype)
    features = tower(images)
    assert features.dtype == dtype and tower.dtype == torch.float32
    assert torch.equal(features, tower(images.float()).to(dtype))
    assert tower([images[0]])[0].dtype == dtype
    assert tower.bfloat16()(images).dtype == dtype and tower.dtype == tower.dummy_feature.dtype == torch.bfloat16


@pytest.mark.parametrize("size", [(28, 112), (112, 112), (42, 42)])
def test_another_size_raises_or_is_asked_for(exports, size):
    images = pixels(1, 3, *size)  # the first has as many patches as the table has positions
    with pytest.raises(ValueError, match="learned positions are for 4x4"):
        tower_of(exports)(images)
    native = tower_of(exports, mm_vision_image_size="native")
    assert [one.shape[1] for one in native([images[0], pixels(3, 56, 56)])] == [size[0] * size[1] // 196, 16]


def test_image_size_is_passed_on(exports):
    tower = tower_of(exports, mm_vision_image_size=112, delay_load=True)
    assert tower.num_patches == 64 and tower.image_processor.crop_size == {"height": 112, "width": 112}
    tower.load_model()
    images = pixels(1, 3, 112, 112)
    assert torch.equal(tower(images), load_encoder(exports / "ours", image_size=112)(images))


# What it is


def test_the_contract_before_and_after_loading(exports):
    tower = tower_of(exports, delay_load=True, mm_vision_select_layer=-2)
    assert not tower.is_loaded and not list(tower.parameters())
    assert tower.config is tower.cfg_only and tower.config.hidden_size == 64 and tower.config.image_size == 56
    before = (tower.hidden_size, tower.num_patches, tower.num_patches_per_side, tower.image_size, tower.select_layer)
    assert before == (64, 16, 4, 56, -2) and tower.select_feature == "patch"
    for use in (lambda: tower(pixels(1, 3, 56, 56)), lambda: tower.dtype, lambda: tower.dummy_feature):
        with pytest.raises(RuntimeError, match=r"ours: call load_model\(\) first"):
            use()
    tower.load_model()
    loaded = tower.vision_tower
    tower.load_model(device_map="auto")
    assert tower.is_loaded and tower.vision_tower is loaded
    assert (tower.hidden_size, tower.num_patches) == before[:2] and len(loaded.encoder.blocks) == 2
    assert tower.dummy_feature.shape == (1, 64) and tower.device == torch.device("cpu")
    assert tower.feature_select(loaded(pixels(1, 3, 56, 56), output_hidden_states=True)).shape == (1, 16, 64)


def test_a_tower_to_be_trained_does_not_wait(exports):
    assert tower_of(exports, delay_load=True, unfreeze_mm_vision_tower=True).is_loaded
    tower = tower_of(exports, delay_load=True, mm_tunable_parts="mm_vision_tower,mm_mlp_adapter")  # LLaVA-NeXT's way
    assert tower.is_loaded and tower.frozen  # which thaws it by itself
    assert not tower_of(exports, delay_load=True, mm_tunable_parts="mm_mlp_adapter").is_loaded


def test_checkpointing_is_passed_on(exports):
    tower = tower_of(exports, unfreeze_mm_vision_tower=True, mm_vision_checkpointing=True)
    assert tower.vision_tower.config.checkpointing


def test_llava_next_names_its_second_argument(exports):
    cfg = SimpleNamespace(mm_vision_select_layer=-2)
    tower = AIMv2VisionTower(str(exports / "ours"), vision_tower_cfg=cfg, delay_load=True)
    assert tower.select_layer == -2 and not tower.is_loaded
    assert AIMv2VisionTower("random:base-224", delay_load=True).num_patches == 256  # nothing said: the defaults


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"mm_vision_select_feature": "cls_patch"}, "AIMv2 has no CLS token"),
        ({"mm_vision_select_feature": "slicefour_patch"}, "'slicefour_patch': expected 'patch'"),
        ({"mm_vision_select_layer": 0}, "patch embedding"),
        ({"mm_vision_select_layer": 4}, "from -3 to 2"),
        ({"mm_vision_select_layer": -4}, "from -3 to 2"),
        ({"mm_vision_image_size": 50}, "50 is not a multiple"),
    ],
)
def test_wrong_arguments_are_known_before_loading(exports, args, message):
    with pytest.raises(ValueError, match=message):
        tower_of(exports, delay_load=True, **args)


def test_wrong_images(exports):
    tower = tower_of(exports)
    for images in (pixels(3, 56, 56), pixels(1, 1, 1, 3, 56, 56), pixels(1, 3, 56, 56).byte(), pixels(1, 1, 56, 56)):
        with pytest.raises(ValueError, match=r"images of shape"):
            tower(images)


@pytest.mark.parametrize("device_map", [None, "cpu", torch.device("cpu"), {"": "cpu"}, {"a": "cpu", "b": "cpu"}])
def test_device_maps(exports, device_map):
    tower = tower_of(exports, delay_load=True)
    tower.load_model(device_map=device_map)
    assert tower.device == torch.device("cpu")


def test_a_tower_is_not_split(exports):
    with pytest.raises(ValueError, match="expected one place"):
        tower_of(exports, delay_load=True).load_model(device_map={"a": "cpu", "b": 0})


def test_processor_as_llava_uses_it(exports):
    processor = tower_of(exports).image_processor
    assert processor.crop_size["height"] == processor.size["shortest_edge"] == 56
    assert tuple(int(x * 255) for x in processor.image_mean) == (127, 102, 76)  # LLaVA's padding to a square
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 60, 3), dtype=np.uint8))
    one = processor.preprocess(image, return_tensors="pt")["pixel_values"][0]
    assert one.shape == (3, 56, 56)
    assert torch.equal(processor([image, image], return_tensors="pt")["pixel_values"][1], one)


# Frozen and trained


def test_frozen_is_without_graph_and_always_in_eval_mode(exports):
    tower = tower_of(exports)
    assert not any(module.training for module in tower.modules())
    nn.ModuleList([tower]).train()
    assert not any(module.training for module in tower.modules())
    assert not any(parameter.requires_grad for parameter in tower.parameters())
    assert not tower(pixels(1, 3, 56, 56).requires_grad_()).requires_grad


def unfreeze_by_parameter(tower):
    for parameter in tower.parameters():
        parameter.requires_grad_(True)


@pytest.mark.parametrize("unfreeze", [None, lambda tower: tower.requires_grad_(True), unfreeze_by_parameter])
def test_unfrozen_gradients_reach_every_weight(exports, unfreeze):
    """Also when LLaVA's training script unfreezes it afterwards: nothing may go on without gradients in silence."""
    tower = tower_of(exports, unfreeze_mm_vision_tower=unfreeze is None)
    if unfreeze is not None:
        unfreeze(tower)
    tower.train()
    assert tower.vision_tower.training
    tower(pixels(2, 3, 56, 56)).square().mean().backward()
    assert not [name for name, weight in tower.named_parameters() if weight.grad is None or not weight.grad.any()]


def test_a_norm_that_is_not_used_is_not_trained(exports):
    tower = tower_of(exports, unfreeze_mm_vision_tower=True, mm_vision_norm=False, mm_vision_select_layer=-2)
    tower(pixels(2, 3, 56, 56)).square().mean().backward()
    assert not [name for name, weight in tower.named_parameters() if weight.requires_grad and weight.grad is None]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_take_their_statistics_in_fp32(exports, dtype):
    """Values of 1000: their squares are beyond fp16, and a sum of 64 of them in bf16 would be off by percents."""
    norm = tower_of(exports).to(dtype).vision_tower.encoder.norm
    x = (1000 * pixels(8, 64)).to(dtype).requires_grad_()
    exact = x.detach().double()
    exact = exact / (exact.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.double()
    y = norm(x)
    y.sum().backward()
    # Two roundings to `dtype`, of the quotient and of its product with the weight, each of eps / 2.
    torch.testing.assert_close(y.double(), exact, rtol=1.1 * torch.finfo(dtype).eps, atol=0)
    assert x.grad.isfinite().all()


def test_parameter_groups_decay_down_the_layers(exports):
    tower = tower_of(exports, unfreeze_mm_vision_tower=True)
    groups = parameter_groups(tower, 1e-3, layer_decay=0.5, weight_decay=0.1)
    found = {id(weight): group for group in groups for weight in group["params"]}
    named = dict(tower.vision_tower.encoder.named_parameters())
    assert sum(len(group["params"]) for group in groups) == len(found) == len(named)

    def settings(name):
        group = found[id(named[name])]
        return group["lr"], group["weight_decay"]

    assert settings("norm.weight") == (1e-3, 0)
    assert settings("blocks.2.attention.qkv.weight") == (5e-4, 0.1) and settings("blocks.2.norm1.weight") == (5e-4, 0)
    assert settings("blocks.0.mlp.down.weight") == (1.25e-4, 0.1)
    assert settings("patch_embed.weight") == (6.25e-5, 0.1) and settings("patch_embed.bias") == (6.25e-5, 0)
    assert settings("positions.weight") == settings("patch_norm.weight") == (6.25e-5, 0)
    torch.optim.AdamW(groups)
    assert parameter_groups(tower_of(exports), 1e-3) == []


def test_lora_trains_its_adapters_only(exports):
    peft = pytest.importorskip("peft")
    tower = tower_of(exports)
    images = pixels(2, 3, 56, 56)
    before = tower(images)
    model = peft.get_peft_model(tower, peft.LoraConfig(r=4, target_modules=LORA_TARGETS)).train()
    assert torch.equal(model(images), before)  # LoRA starts at zero
    model(images).square().mean().backward()
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert len(trained) == 2 * len(LORA_TARGETS) * CONFIG.depth and all("lora_" in name for name in trained)
    gradients = [weight.grad for name, weight in model.named_parameters() if "lora_B" in name]
    assert all(gradient.any() for gradient in gradients)


# S2


def test_s2_against_loops(exports):
    scales, images = (56, 112, 168), pixels(2, 3, 168, 168)
    tower = tower_of(exports, kind=AIMv2VisionTowerS2)
    assert tower.s2_scales == list(scales) and tower.hidden_size == 3 * 64 and tower.num_patches == 16
    plain = tower_of(exports)
    expected = torch.zeros(2, 16, 3 * 64)
    for number, scale in enumerate(scales):
        resize = {"mode": "bicubic", "antialias": True}
        resized = images if scale == 168 else nn.functional.interpolate(images, size=(scale, scale), **resize)
        r = scale // 56
        for i, j in [(i, j) for i in range(r) for j in range(r)]:
            tile = plain(resized[:, :, 56 * i : 56 * i + 56, 56 * j : 56 * j + 56])
            for patch in range(16):
                row, column = 4 * i + patch // 4, 4 * j + patch % 4  # of the patches of the whole picture
                cell = row // r * 4 + column // r
                expected[:, cell, 64 * number : 64 * number + 64] += tile[:, patch] / r**2
    # An average of nine in another order, after products of another size.
    torch.testing.assert_close(tower(images), expected, atol=5e-6, rtol=1e-5)
    assert tower([images[0]])[0].shape == (1, 16, 192) and tower.dummy_feature.shape == (1, 192)


def test_s2_processor_makes_the_largest_scale_also_before_loading(exports):
    tower = tower_of(exports, kind=AIMv2VisionTowerS2, delay_load=True, s2_scales="112,56")
    assert tower.s2_scales == [56, 112] and tower.hidden_size == 128 and tower.image_size == 112
    assert tower.image_processor.crop_size["height"] == tower.image_processor.size["shortest_edge"] == 112
    tower.load_model()
    assert tower.image_processor.crop_size["height"] == 112 and tower(pixels(1, 3, 112, 112)).shape == (1, 16, 128)


def test_s2_refuses_what_does_not_tile(exports):
    for scales in ("56,100", "112,224", [28, 56]):
        with pytest.raises(ValueError, match="expected the encoder's 56 pixels and multiples"):
            tower_of(exports, kind=AIMv2VisionTowerS2, delay_load=True, s2_scales=scales)
    with pytest.raises(ValueError, match="56x112 pixels: S2 expected squares"):
        tower_of(exports, kind=AIMv2VisionTowerS2)(pixels(1, 3, 56, 112))


# In LLaVA itself


@pytest.fixture
def llava(tmp_path, monkeypatch):
    """A package with LLaVA's two modules that matter, one of which has a reference of its own to the function."""
    builder = "def build_vision_tower(vision_tower_cfg, **kwargs):\n    return 'theirs', kwargs\n"
    arch = "from .multimodal_encoder.builder import build_vision_tower\n"
    arch += "def build(cfg):\n    return build_vision_tower(cfg, delay_load=True)\n"
    package = tmp_path / "site" / "llava"
    for path, text in {
        "__init__.py": "",
        "model/__init__.py": "",
        "model/llava_arch.py": arch,
        "model/multimodal_encoder/__init__.py": "",
        "model/multimodal_encoder/builder.py": builder,
    }.items():
        (package / path).parent.mkdir(parents=True, exist_ok=True)
        (package / path).write_text(text)
    monkeypatch.syspath_prepend(package.parent)
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "llava"]:
        del sys.modules[name]


def test_llava_builds_ours_for_our_names_and_theirs_for_the_rest(llava, exports, tmp_path):
    register_llava()
    register_llava()  # does no harm
    from llava.model import llava_arch

    def build(name, **cfg):
        return llava_arch.build(SimpleNamespace(mm_vision_tower=str(name), **cfg))

    tower = build(exports / "ours", mm_vision_select_layer=-2)
    assert type(tower) is AIMv2VisionTower and not tower.is_loaded and tower.select_layer == -2
    assert type(build(exports / "transformers", s2=True)) is AIMv2VisionTowerS2
    assert type(llava_arch.build(SimpleNamespace(vision_tower="random:base-224"))) is AIMv2VisionTower
    clip = tmp_path / "aimv2-runs" / "clip-vit-large"  # a folder's name counts, not those above it
    clip.mkdir(parents=True)
    (clip / "model.safetensors").write_bytes(b"not ours")
    for name in ("openai/clip-vit-large-patch14-336", "claim/clip", clip):
        assert build(name) == ("theirs", {"delay_load": True})
    damaged = tmp_path / "aimv2-large"
    clip.rename(damaged)
    with pytest.raises(ModelError, match="damaged"):
        build(damaged)


def test_without_llava_the_error_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "llava", None)
    with pytest.raises(ModuleNotFoundError, match="LLaVA is not installed"):
        register_llava()


def test_build_vision_tower_chooses_by_s2(exports):
    cfg = SimpleNamespace(mm_vision_tower=str(exports / "ours"), s2=True, s2_scales="56,112")
    assert build_vision_tower(cfg, delay_load=True).hidden_size == 128


# In transformers' LLaVA

IMAGE_TOKEN, VOCABULARY = 99, 100


def tiny_llava(exports):
    """transformers' LLaVA with a random Llama and our exported encoder, configured as docs/vision-tower.md says."""
    from transformers import AutoConfig, AutoModel, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    vision = AutoConfig.from_pretrained(exports / "transformers")
    vision.tie_last_hidden_states = True
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = LlamaConfig(vocab_size=VOCABULARY, **sizes)
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_TOKEN,
        image_seq_length=16,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower = AutoModel.from_pretrained(exports / "transformers", config=vision)
    return model


def batch(images: int = 2, image_tokens: int = 16) -> dict:
    words = torch.randint(0, 99, (images, 6), generator=torch.Generator().manual_seed(2))
    ids = torch.cat([words[:, :2], torch.full((images, image_tokens), IMAGE_TOKEN), words[:, 2:]], dim=1)
    labels = ids.masked_fill(ids == IMAGE_TOKEN, -100)
    return {"input_ids": ids, "labels": labels, "pixel_values": pixels(images, 3, 56, 56)}


def test_transformers_llava_sees_what_the_tower_gives(exports):
    model = tiny_llava(exports)
    out = model(**batch())
    out.loss.backward()
    features = model.get_image_features(batch()["pixel_values"], return_dict=True).pooler_output
    assert torch.stack(list(features)).shape == (2, (56 // 14) ** 2, 64)
    expected = model.model.multi_modal_projector(tower_of(exports)(batch()["pixel_values"]))
    torch.testing.assert_close(torch.stack(list(features)), expected, atol=1e-5, rtol=1e-5)  # as above, fp32
    first = model.model.vision_tower.embeddings.patch_embed.weight.grad
    assert first is not None and first.any()
    for tokens in (15, 17):
        with pytest.raises(ValueError, match="do not match"):
            model(**batch(image_tokens=tokens))


def test_its_processor_writes_as_many_tokens_as_there_are_patches(exports):
    from transformers import AutoImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"a": 0, "<image>": IMAGE_TOKEN}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    processor = LlavaProcessor(
        AutoImageProcessor.from_pretrained(exports / "transformers"),
        PreTrainedTokenizerFast(tokenizer_object=words, extra_special_tokens={"image_token": "<image>"}),
        patch_size=14,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
    )
    image = Image.new("RGB", (90, 70), "red")
    inputs = processor(images=image, text="a <image> a", return_tensors="pt")
    assert (inputs["input_ids"] == IMAGE_TOKEN).sum() == 16
    assert tiny_llava(exports)(**{key: inputs[key] for key in ("input_ids", "pixel_values")}).logits.isfinite().all()


def train_in_bf16(model: nn.Module, inputs: dict, groups: list[dict]) -> list[float]:
    """20 steps; the loss of each. AssertionError as soon as anything is not finite."""
    optimizer, losses = torch.optim.AdamW(groups), []
    for _ in range(20):
        loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        assert all(w.isfinite().all() and (w.grad is None or w.grad.isfinite().all()) for w in model.parameters())
    return losses


@pytest.mark.parametrize("mode", ["frozen", "unfrozen", "lora"])
def test_twenty_steps_in_bf16_stay_finite_and_learn(exports, mode):
    if mode == "lora":
        pytest.importorskip("peft")
    model = tiny_llava(exports).bfloat16().train()
    vision = model.model.vision_tower
    vision.requires_grad_(mode == "unfrozen")
    if mode == "lora":
        import peft

        # transformers keeps q, k and v apart: its names for `LORA_TARGETS`
        targets = r".*vision_tower.*\.(q_proj|k_proj|v_proj|out_proj)"
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets))
    before = {name: weight.detach().clone() for name, weight in model.named_parameters() if "vision_tower" in name}
    inputs = batch()
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    losses = train_in_bf16(model, inputs, [{"params": weights, "lr": 1e-3}])
    assert losses[-1] < losses[0] - 0.05
    moved = {name for name, weight in model.named_parameters() if name in before and not weight.equal(before[name])}
    assert bool(moved) == (mode != "frozen")
    assert mode != "lora" or all("lora_" in name for name in moved)


class OurLlava(nn.Module):
    """The same language model behind our own tower."""

    def __init__(self, llava, tower):
        super().__init__()
        self.llava, self.tower = llava, tower

    def forward(self, input_ids, labels, pixel_values):
        embeds = self.llava.get_input_embeddings()(input_ids)
        image = self.llava.model.multi_modal_projector(self.tower(pixel_values))
        embeds = embeds.masked_scatter((input_ids == IMAGE_TOKEN)[..., None], image)
        hidden = self.llava.model.language_model(inputs_embeds=embeds).last_hidden_state
        logits = self.llava.lm_head(hidden)[:, :-1].float()
        return SimpleNamespace(loss=nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()))


def test_twenty_steps_of_our_own_tower_unfrozen_in_bf16(exports):
    llava = tiny_llava(exports)
    llava.model.vision_tower = None
    model = OurLlava(llava, tower_of(exports, unfreeze_mm_vision_tower=True)).bfloat16().train()
    inputs = batch()
    inputs["pixel_values"] = 5 * inputs["pixel_values"].bfloat16()
    groups = parameter_groups(model.tower, 1e-3, layer_decay=0.8, weight_decay=0.05)
    losses = train_in_bf16(model, inputs, [*groups, {"params": model.llava.parameters(), "lr": 1e-3}])
    assert losses[-1] < losses[0] - 0.05


# Under ZeRO-3


def build_under_zero3(folder: str, delay_load: bool) -> None:
    """What `from_pretrained` does with a LLaVA under ZeRO-3: the tower is built within `zero.Init`."""
    import deepspeed

    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}
    settings["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
    deepspeed.init_distributed("gloo")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            args = SimpleNamespace(unfreeze_mm_vision_tower=not delay_load)
            self.tower = AIMv2VisionTower(folder, args, delay_load=delay_load)
            if delay_load:
                self.tower.load_model()
            self.projector = nn.Linear(self.tower.hidden_size, 8)

        def forward(self, images):
            return self.projector(self.tower(images))

    with deepspeed.zero.Init(config_dict_or_path=settings):
        model = Model()
    assert hasattr(model.projector.weight, "ds_id")  # LLaVA's own parts are shared out, as they should be
    images, expected = pixels(2, 3, 56, 56), load_encoder(folder, dtype=torch.bfloat16)
    trainable = [weight for weight in model.parameters() if weight.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trainable, config=settings)
    named = dict(expected.encoder.named_parameters())
    for name, weight in engine.module.tower.vision_tower.encoder.named_parameters():
        assert hasattr(weight, "ds_id")
        with deepspeed.zero.GatheredParameters(weight):
            assert torch.equal(weight, named[name]), name
    assert torch.equal(engine.module.tower(images.bfloat16()), expected(images))
    engine.backward(engine(images.bfloat16()).float().square().mean())
    engine.step()
    weight = engine.module.tower.vision_tower.encoder.blocks[0].attention.qkv.weight
    with deepspeed.zero.GatheredParameters(weight):
        assert torch.equal(weight, named["blocks.0.attention.qkv.weight"]) == delay_load  # trained, or left alone


@pytest.mark.slow
@pytest.mark.parametrize("delay_load", [False, True])
def test_built_within_zero_init_the_weights_are_right(exports, tmp_path, delay_load):
    log = tmp_path / "log"
    codes = finish(start(build_under_zero3, str(exports / "ours"), delay_load, ranks=2, log=log))
    assert codes == [0, 0], log.read_text()
