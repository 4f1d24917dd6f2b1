"""transformers' models against their own outputs."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_encoders import TRANSFORMERS, images_for

from aimv2.evals.encoders import open_encoder

transformers = pytest.importorskip("transformers")

PREFIX = {
    "hf-dinov2": 1,
    "hf-dinov2-registers": 5,
    "hf-vit": 1,
    "hf-clip": 1,
    "hf-clip-vision": 1,
    "hf-clip-projection": 1,
}


def opened(spec: str):
    """The encoder and, read apart from it, transformers' own model."""
    folder = spec.removeprefix("hf:")
    model = getattr(transformers, transformers.AutoConfig.from_pretrained(folder).architectures[0])
    # frozen: torch's MultiheadAttention, in SigLIP's pool, rounds elsewhere when there may be gradients
    return open_encoder(spec), model.from_pretrained(folder).eval().requires_grad_(False)


@pytest.mark.parametrize("name", TRANSFORMERS)
@torch.no_grad()
def test_blocks_and_output(spec_of, name):
    encoder, model = opened(spec_of(name))
    images, prefix = images_for(encoder), PREFIX.get(name, 0)
    tower = getattr(model, "vision_model", model)
    found = tower(images, output_hidden_states=True)
    last = found.last_hidden_state
    states, seen = found.hidden_states[1:], []  # the first are the embeddings
    modules = [module for key, module in tower.named_modules() if key.rpartition(".")[0].endswith(("layers", "layer"))]
    handles = [module.register_forward_hook(lambda _, __, output: seen.append(output)) for module in modules]
    tower(images)
    for handle in handles:
        handle.remove()
    assert len(seen) == encoder.depth == 3
    blocks = encoder.blocks(images, range(3))
    for block, expected in zip(blocks, seen, strict=True):
        assert torch.equal(block.patches, expected[:, prefix:])
        assert torch.equal(block.cls, expected[:, 0]) if prefix else block.cls is None
    for block, state in zip(blocks[:-1], states[:-1], strict=True):  # some give the last after their norm
        assert torch.equal(block.patches, state[:, prefix:])
    output = encoder.output(images)
    if "clip" in name:  # its last_hidden_state is without the norm that the pooled CLS gets
        last = tower.post_layernorm(last)
        assert torch.equal(output.cls, found.pooler_output) or name == "hf-clip-projection"
    assert torch.equal(output.patches, last[:, prefix:])
    assert torch.equal(output.cls, last[:, 0]) if prefix else output.cls is None


@pytest.mark.parametrize("name", TRANSFORMERS)
@torch.no_grad()
def test_pooled(spec_of, name):
    encoder, model = opened(spec_of(name))
    images = images_for(encoder)
    if name in ("hf-clip", "hf-siglip", "hf-aimv2-lit"):
        expected = model.get_image_features(images).pooler_output
    elif name == "hf-clip-projection":
        expected = model(images).image_embeds
    elif name == "hf-vit":  # its pooler is for a task that few were trained on
        expected = model(images).last_hidden_state[:, 0]
    elif name == "hf-aimv2":
        expected = model(images).last_hidden_state.mean(dim=1)
    else:
        expected = model(images).pooler_output
    assert torch.equal(encoder.pooled(images), expected)
    width = 24 if name in ("hf-clip", "hf-clip-projection", "hf-aimv2-lit") else 32
    assert expected.shape == (2, width)


@pytest.mark.parametrize("name", ["hf-clip", "hf-siglip", "hf-aimv2-lit"])
def test_a_text_tower_is_no_part_of_the_encoder(spec_of, name):
    encoder, model = opened(spec_of(name))
    parts = [model.vision_model] + ([model.visual_projection] if hasattr(model, "visual_projection") else [])
    assert encoder.describe()["parameters"] == sum(p.numel() for part in parts for p in part.parameters())


@pytest.mark.parametrize("name", ["hf-dinov2", "hf-vit", "hf-clip", "hf-siglip"])
@torch.no_grad()
def test_another_image_size(spec_of, name):
    encoder, model = open_encoder(spec_of(name), image_size=48), opened(spec_of(name))[1]
    images = images_for(encoder)
    settings = {} if "dinov2" in name else {"interpolate_pos_encoding": True}
    last = getattr(model, "vision_model", model)(images, **settings).last_hidden_state
    last = model.vision_model.post_layernorm(last) if name == "hf-clip" else last
    assert encoder.grid == (6, 6)
    assert torch.equal(encoder.output(images).patches, last[:, PREFIX.get(name, 0) :])
    assert encoder.pooled(images).isfinite().all()


@torch.no_grad()
def test_an_encoder_made_for_larger_images_than_its_preprocessing(spec_of, tmp_path):
    """As DINOv2's: positions for 518 pixels, images of 224."""
    shutil.copytree(spec_of("hf-dinov2").removeprefix("hf:"), tmp_path / "m")
    entry = json.loads((tmp_path / "m" / "preprocessor_config.json").read_text())
    entry |= {"crop_size": {"height": 16, "width": 16}, "size": {"shortest_edge": 18}}
    (tmp_path / "m" / "preprocessor_config.json").write_text(json.dumps(entry))
    encoder, model = opened(f"hf:{tmp_path / 'm'}")
    images = images_for(encoder)
    assert images.shape[-1] == 16 and encoder.grid == (2, 2)
    assert torch.equal(encoder.output(images).patches, model(images).last_hidden_state[:, 1:])


def test_a_size_that_the_patches_do_not_divide(spec_of, tmp_path):
    """As SigLIP's so400m, 384 pixels with patches of 14: the rest at the right and below is not seen."""
    shutil.copytree(spec_of("hf-siglip").removeprefix("hf:"), tmp_path / "m")
    entry = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 37, "width": 37}}
    (tmp_path / "m" / "preprocessor_config.json").write_text(json.dumps(entry))
    encoder = open_encoder(f"hf:{tmp_path / 'm'}")
    assert encoder.grid == (4, 4) and encoder.output(images_for(encoder)).patches.shape == (2, 16, 32)


def test_weights_that_are_not_all_there(spec_of, tmp_path):
    """transformers draws them at random, with a line in the log."""
    shutil.copytree(spec_of("hf-dinov2").removeprefix("hf:"), tmp_path / "m")
    state = load_file(tmp_path / "m" / "model.safetensors")
    lost = next(name for name in state if name.endswith("layer.1.norm1.weight"))
    del state[lost]
    save_file(state, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"its weights lack encoder\.layer\.1\.norm1\.weight") as error:
        open_encoder(f"hf:{tmp_path / 'm'}")
    assert str(error.value).startswith(f"hf:{tmp_path / 'm'}: ")


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("preprocessor_config.json", "image processor"),
        ("model.safetensors", "model.safetensors"),
        ("config.json", "config"),
    ],
)
def test_files_that_are_missing(spec_of, tmp_path, missing, message):
    shutil.copytree(spec_of("hf-siglip-vision").removeprefix("hf:"), tmp_path / "m")
    (tmp_path / "m" / missing).unlink()
    with pytest.raises(ValueError, match=message) as error:
        open_encoder(f"hf:{tmp_path / 'm'}")
    assert "\n" not in str(error.value) and str(error.value).startswith(f"hf:{tmp_path / 'm'}: ")


def test_model_types_that_are_not_known(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match=r"model type 'bert': expected one of dinov2, "):
        open_encoder(f"hf:{tmp_path}")


def test_native_images_need_a_size(spec_of, tmp_path):
    shutil.copytree(spec_of("hf-aimv2").removeprefix("hf:"), tmp_path / "m")
    entry = {"image_processor_type": "CLIPImageProcessor", "do_resize": False, "do_center_crop": False}
    (tmp_path / "m" / "preprocessor_config.json").write_text(json.dumps(entry))
    with pytest.raises(ValueError, match="expected an image_size"):
        open_encoder(f"hf:{tmp_path / 'm'}")
    assert open_encoder(f"hf:{tmp_path / 'm'}", image_size=32).grid == (4, 4)


@pytest.mark.parametrize("name", ["hf-vit", "hf-clip"])
def test_what_is_not_in_the_weights_is_described(spec_of, name, tmp_path):
    """Another activation gives other features of the same weights; who wrote the file, or where it is, does not."""
    folder = shutil.copytree(spec_of(name).removeprefix("hf:"), tmp_path / "copy")
    described = [open_encoder(spec_of(name)).describe()]
    record = json.loads((folder / "config.json").read_text())
    vision = record.get("vision_config", record)
    for changes, where in (
        ({"transformers_version": "5.0.0", "architectures": None}, record),
        ({"hidden_act": "tanh"}, vision),
    ):
        where.update(changes)
        (folder / "config.json").write_text(json.dumps(record))
        described.append(open_encoder(f"hf:{folder}").describe())
    assert len({each["weights"] for each in described}) == 1
    first, same, other = (each["config"] for each in described)
    assert first == same != other
