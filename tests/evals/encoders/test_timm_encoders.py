"""timm's models against timm's own functions, and hooks on its blocks."""

import json

import pytest
import torch
from safetensors.torch import save_file
from small_encoders import images_for

from aimv2.evals.encoders import open_encoder
from aimv2.evals.encoders import timm as ours

timm = pytest.importorskip("timm")

# class token; a register and none; both and a distillation token; registers and rotary positions; plain rotary
TOKENS = ["test_vit", "test_vit2", "test_vit4", "deit_tiny_distilled_patch16_224", "vit_small_patch14_reg4_dinov2"]
MAPS = ["test_resnet", "test_efficientnet", "test_convnext", "test_mambaout"]  # the last has its channels last


@pytest.fixture(params=TOKENS)
def tokens(request):
    return open_encoder(f"timm:{request.param}", image_size=56 if "dinov2" in request.param else 64)


@pytest.fixture(params=MAPS)
def maps(request):
    return open_encoder(f"timm:{request.param}", image_size=64)


def outputs_of(modules, run) -> list[torch.Tensor]:
    found, handles = [], []
    for module in modules:
        handles.append(module.register_forward_hook(lambda module, inputs, output: found.append(output.detach())))
    run()
    for handle in handles:
        handle.remove()
    return found


def test_tokens(tokens):
    model, images = tokens.model, images_for(tokens)
    blocks = tokens.blocks(images, range(tokens.depth))
    number, has_cls = model.num_prefix_tokens, model.cls_token is not None
    for block, seen in zip(blocks, outputs_of(model.blocks, lambda: model(images)), strict=True):
        assert torch.equal(block.patches, seen[:, number:])
        assert torch.equal(block.cls, seen[:, 0]) if has_cls else block.cls is None
    features, output = model.forward_features(images), tokens.output(images)
    assert torch.equal(output.patches, features[:, number:])
    assert torch.equal(output.cls, features[:, 0]) if has_cls else output.cls is None
    assert torch.equal(tokens.pooled(images), model(images))
    assert (
        torch.equal(tokens.pooled(images), model.forward_head(features, pre_logits=True)) or "distilled" in tokens.name
    )


def test_dinov2_with_registers():
    encoder = open_encoder("timm:vit_small_patch14_reg4_dinov2", image_size=56)
    images = images_for(encoder)
    output = encoder.output(images)
    assert encoder.model.num_prefix_tokens == 5 and output.patches.shape == (2, 16, 384)
    assert torch.equal(encoder.pooled(images), output.cls)


def test_maps(maps):
    model, images = maps.model, images_for(maps)
    final, stages = model.forward_intermediates(images)
    assert len(stages) == maps.depth
    for number, stage in enumerate(stages):
        (block,) = maps.blocks(images, [number])
        assert block.cls is None and torch.equal(block.patches, stage.flatten(2).transpose(1, 2))
        chosen = open_encoder(f"{maps.spec}@{number}", image_size=images.shape[-1])
        assert (chosen.width, *chosen.grid) == stage.shape[1:]
    assert torch.equal(final, model.forward_features(images))
    cells = final.flatten(1, 2) if "mambaout" in maps.spec else final.flatten(2).transpose(1, 2)
    assert torch.equal(maps.output(images).patches, cells)
    assert cells.shape[1:] == (maps.grid[0] * maps.grid[1], maps.width)
    assert torch.equal(maps.pooled(images), model(images))


def test_stages_have_no_mean():
    with pytest.raises(ValueError, match=r"^timm:test_resnet@last2: stages \[3, 4\] of shapes .* have no mean"):
        open_encoder("timm:test_resnet@last2")


def test_a_convnet_stops_at_the_stage_it_needs():
    encoder, calls = open_encoder("timm:test_resnet@2", image_size=64), []
    for number in (1, 2, 3, 4):
        stage = encoder.model.get_submodule(f"layer{number}")
        stage.register_forward_hook(lambda *_, number=number: calls.append(number))
    encoder.pooled(images_for(encoder))
    assert calls == [1, 2]


def test_what_a_head_does_not_pool():
    assert torch.equal(ours.pooled_over_space(torch.ones(2, 5)), torch.ones(2, 5))
    tokens = torch.arange(12.0).view(1, 3, 4)
    assert torch.equal(ours.pooled_over_space(tokens), tokens.mean(1))
    assert torch.equal(ours.pooled_over_space(tokens.view(1, 3, 2, 2)), tokens.mean(2))


def test_another_image_size():
    """Positions as timm itself interpolates them."""
    encoder, original = open_encoder("timm:test_vit3", image_size=96), open_encoder("timm:test_vit3")
    assert encoder.grid == (6, 6) and original.grid == (10, 10)
    original.model.set_input_size((96, 96))
    assert torch.equal(encoder.model.pos_embed, original.model.pos_embed)
    assert encoder.processor.config.image_size == 96
    assert encoder.output(images_for(encoder)).patches.shape == (2, 36, 96)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file with a classifier, as training with timm leaves it."""
    torch.manual_seed(3)
    model, path = timm.create_model("test_vit"), tmp_path_factory.mktemp("timm") / "best.pth"
    torch.save({"state_dict": model.state_dict()}, path)
    return model.eval(), path


def test_weights_of_a_file(weights):
    model, path = weights
    encoder = open_encoder(f"timm:test_vit,{path}")
    images = images_for(encoder)
    features = model.forward_features(images)
    assert torch.equal(encoder.output(images).patches, features[:, 1:])
    assert torch.equal(encoder.pooled(images), features[:, 0])
    assert encoder.trained and encoder.name == "test_vit-best.pth"


@pytest.mark.parametrize("name", ["test_vit,r160_in1k", "test_vit.r160_in1k"])
def test_weights_of_a_tag(weights, name, monkeypatch):
    """What timm would download, without the network."""
    asked = []

    def from_hub(repository, **_):
        asked.append(repository)
        return weights[0].state_dict()

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", from_hub)
    encoder = open_encoder(f"timm:{name}")
    assert asked == ["timm/test_vit.r160_in1k"] and encoder.trained
    assert torch.equal(encoder.model.pos_embed, weights[0].pos_embed)


def test_weights_of_a_folder(weights, tmp_path):
    """As timm's `save_for_hf` leaves it, and its hub has it."""
    timm.models.save_for_hf(weights[0], tmp_path / "mine", safe_serialization=True)
    encoder = open_encoder(f"timm:local-dir:{tmp_path / 'mine'}")
    assert encoder.trained and torch.equal(encoder.model.pos_embed, weights[0].pos_embed)


@pytest.mark.parametrize("classes", [0, 10])
def test_a_file_with_another_classifier(classes, tmp_path):
    model = timm.create_model("test_vit", num_classes=classes)
    torch.save(model.state_dict(), tmp_path / "other.pt")
    encoder = open_encoder(f"timm:test_vit,{tmp_path / 'other.pt'}")
    assert torch.equal(encoder.model.pos_embed, model.pos_embed)


@pytest.mark.parametrize("change", ["all", "one missing", "one more"])
def test_weights_that_do_not_fit(weights, tmp_path, change):
    """timm itself, asked for a model without a classifier, takes what is there and leaves the rest at random."""
    state = dict(weights[0].state_dict())
    if change == "one missing":
        del state["blocks.3.norm1.weight"]
    state = {"more": torch.zeros(1)} | ({} if change == "all" else state)
    torch.save({"model": state}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"^timm:test_vit,.*other\.pth: .*(Missing|Unexpected) key") as error:
        open_encoder(f"timm:test_vit,{tmp_path / 'other.pth'}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("timm:vit_gigantic", "Unknown model"),
        ("timm:test_vit.nope", r"Invalid pretrained tag \(nope\)"),
        ("timm:test_vit,nope", "weights 'nope': no such file, nor one of timm's tags r160_in1k"),
        ("timm:test_vit,/nowhere/best.pth", "weights '/nowhere/best.pth': no such file"),
        ("timm:local-dir:/nowhere,a.pth", "has weights of its own"),
        ("timm:local-dir:/nowhere", "local-dir:/nowhere: "),
        ("timm:test_vit@6", "'6' is not within blocks 0 to 5"),
        ("timm:test_vit@all", "layer 'all' is several"),
        ("timm:mixer_s32_224", "ends in 2 axes, not in a feature map"),
    ],
)
def test_specs_that_are_refused(spec, message):
    with pytest.raises(ValueError, match=message) as error:
        open_encoder(spec)
    assert "\n" not in str(error.value) and str(error.value).startswith(f"{spec}: ")


def test_what_is_not_in_the_weights_is_described(tmp_path):
    """A folder's activation and pooling are in its config alone."""
    state, described = timm.create_model("test_vit").state_dict(), []
    for name, arguments in (
        ("plain", {}),
        ("act", {"act_layer": "relu"}),
        ("pool", {"global_pool": "avg", "fc_norm": False}),
    ):
        entry = {"architecture": "test_vit", "num_classes": 1000, "model_args": arguments, "pretrained_cfg": {}}
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(entry))
        save_file(state, tmp_path / name / "model.safetensors")
        described.append(open_encoder(f"timm:local-dir:{tmp_path / name}").describe())
    assert len({each["weights"] for each in described}) == 1 and len({each["config"] for each in described}) == 3
