"""Ours against `load_encoder`, the untrained ones, and one in training."""

import json
from dataclasses import replace

import pytest
import torch
from small_encoders import OURS, images_for
from tiny_models import NATIVE, V1, V2, random_encoder, write

from aimv2.data.transforms import IMAGENET_MEAN
from aimv2.encoder import vision_config
from aimv2.evals.encoders import encoder_of, open_encoder
from aimv2.exports import export_model
from aimv2.pretrained import load_encoder


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ours") / "run" / "export"
    return export_model(random_encoder(V2), folder, config=V2, processing=OURS)


def test_it_is_what_load_encoder_gives(export):
    encoder, loaded = open_encoder(f"aimv2:{export}"), load_encoder(export)
    images = images_for(encoder)
    features, states = loaded(images, output_hidden_states=True)
    assert torch.equal(encoder.output(images).patches, features)
    assert torch.equal(encoder.pooled(images), features.mean(dim=1))
    for block, state in zip(encoder.blocks(images, range(3)), states, strict=True):
        assert torch.equal(block.patches, state) and block.cls is None
    mean = load_encoder(export, layer=(1, 2), norm=False, combine="mean")(images)
    assert torch.equal(open_encoder(f"aimv2:{export}@last2").output(images).patches, mean)
    assert encoder.processor.config == loaded.processor.config == OURS
    assert (encoder.name, encoder.source, encoder.trained) == ("run", "aimv2", True)
    assert (encoder.width, encoder.depth, encoder.heads, encoder.grid) == (256, 3, 2, (4, 4))


@pytest.mark.parametrize(("layout", "suffix"), [("apple", ".pth"), ("transformers", ".safetensors"), ("timm", ".pth")])
def test_any_layout(tmp_path, layout, suffix):
    path = write(tmp_path / f"weights{suffix}", V2, layout)
    encoder = open_encoder(f"aimv2:{path}")
    images = images_for(encoder)
    assert torch.equal(encoder.output(images).patches, load_encoder(path)(images))


def test_half_precision_weights_are_used_in_fp32(tmp_path):
    export_model(random_encoder(V2), tmp_path / "half", config=V2, processing=OURS, dtype=torch.bfloat16)
    encoder = open_encoder(f"aimv2:{tmp_path / 'half'}")
    images = images_for(encoder)
    expected = load_encoder(tmp_path / "half", dtype=torch.float32)(images)
    assert torch.equal(encoder.output(images).patches, expected)


@pytest.mark.parametrize("size", [28, 70])
def test_another_image_size(export, size):
    encoder = open_encoder(f"aimv2:{export}", image_size=size)
    images = images_for(encoder)
    assert images.shape[-1] == size and encoder.grid == (size // 14, size // 14)
    assert torch.equal(encoder.output(images).patches, load_encoder(export, image_size=size)(images))


@pytest.mark.parametrize("config", [V1, NATIVE])
def test_native_encoders_need_a_size(tmp_path, config):
    export_model(
        random_encoder(config),
        tmp_path / "native",
        config=config,
        processing=replace(OURS, image_size=None, resize="native"),
    )
    with pytest.raises(ValueError, match="expected an image_size") as error:
        open_encoder(f"aimv2:{tmp_path / 'native'}")
    assert str(error.value).startswith(f"aimv2:{tmp_path / 'native'}: ")
    encoder = open_encoder(f"aimv2:{tmp_path / 'native'}", image_size=42)
    images = images_for(encoder)
    assert encoder.grid == (3, 3) and encoder.processor.config.resize == "squash"
    assert torch.equal(encoder.output(images).patches, load_encoder(tmp_path / "native", image_size=42)(images))


def test_untrained_with_the_architecture_of_a_file(export):
    trained, untrained = open_encoder(f"aimv2:{export}"), open_encoder(f"random:{export}")
    assert untrained.model.config == trained.model.config
    assert untrained.processor.config == trained.processor.config
    assert (untrained.name, untrained.source, untrained.trained) == ("random-run", "aimv2", False)
    pairs = zip(trained.model.parameters(), untrained.model.parameters(), strict=True)
    assert not any(torch.equal(one, other) for one, other in pairs)
    same = {"config", "source", "layers", "width", "depth", "heads", "grid", "parameters"}
    same |= {"preprocessing", "preprocessing_hash"}
    one, other = trained.describe(), untrained.describe()
    assert {key for key in one if one[key] == other[key]} == same


def test_untrained_weights_are_as_before_training(export):
    """Norms at 1 and the rest drawn: the features are neither 0 nor those of any image."""
    encoder = open_encoder(f"random:{export}@1")
    assert all((p == 1).all() for name, p in encoder.model.named_parameters() if "norm" in name)
    one, other = encoder.output(images_for(encoder)).patches
    assert one.std() > 0.1 and not torch.allclose(one, other)


def test_untrained_of_a_published_size():
    encoder, same = open_encoder("random:base-28"), open_encoder("aimv2:random:base-28")
    assert encoder.model.config == vision_config("base", 28) and encoder.processor.config.image_size == 28
    assert encoder.describe()["weights"] == same.describe()["weights"]
    assert encoder.name == same.name == "random-base-28" and not same.trained


# --- in training


def test_an_encoder_in_training_is_left_as_it_is():
    model = random_encoder(V2).to(torch.bfloat16).train()
    model.blocks[1].eval()
    encoder = encoder_of(model, OURS)
    images = images_for(encoder)
    with torch.no_grad():
        expected = model.eval()(images).float()
    model.train().blocks[1].eval()
    output = encoder.output(images)
    assert torch.equal(output.patches, expected) and output.patches.dtype == torch.float32
    assert encoder.blocks(images, [0])[0].patches.dtype == encoder.pooled(images).dtype == torch.float32
    last = encoder.norm(encoder.blocks(images, [2])[0].patches)  # what a linear probe does
    assert torch.equal(last, expected) and not last.requires_grad
    assert model.training and not model.blocks[1].training and model.blocks[2].training
    assert all(p.requires_grad and p.dtype == torch.bfloat16 for p in model.parameters())
    assert len(model.blocks) == 3 and not any(module._forward_hooks for module in model.modules())
    assert (encoder.spec, encoder.name) == ("model", "model")


def test_its_weights_are_those_of_now():
    model = random_encoder(V2)
    encoder = encoder_of(model, OURS)
    images = images_for(encoder)
    before = encoder.describe()["weights"], encoder.pooled(images)
    with torch.no_grad():
        model.norm.weight.mul_(2)
    assert encoder.describe()["weights"] != before[0]
    torch.testing.assert_close(encoder.pooled(images), 2 * before[1])  # the final norm's factor
    assert json.dumps(encoder.describe())


def test_what_is_not_in_the_weights_is_described():
    def config(**changes):
        return encoder_of(random_encoder(replace(V2, **changes)), OURS).describe()["config"]

    assert config() == config(checkpointing=True) != config(norm_eps=1e-6)


def test_native_training_needs_a_size():
    native = replace(OURS, image_size=None, resize="native", mean=IMAGENET_MEAN)
    with pytest.raises(ValueError, match="expected an image_size"):
        encoder_of(random_encoder(NATIVE), native)
