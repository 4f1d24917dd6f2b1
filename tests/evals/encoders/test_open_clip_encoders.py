"""open_clip's towers against its own `encode_image`, `forward_intermediates` and `image_transform`."""

import json

import pytest
import torch
from small_encoders import images_for

from aimv2.evals.encoders import open_encoder

open_clip = pytest.importorskip("open_clip")


def model_of(encoder) -> torch.nn.Module:
    """The whole of open_clip's model around the same image tower."""
    model = open_clip.create_model(encoder.spec.removeprefix("open_clip:"), pretrained_text=False).eval()
    model.visual = encoder.model
    return model


@pytest.mark.parametrize("name", ["tiny-clip", "tiny-clip-gap", "tiny-coca", "tiny-siglip"])
@torch.no_grad()
def test_against_open_clip(spec_of, name):
    encoder = open_encoder(spec_of(name))
    images, model = images_for(encoder), model_of(encoder)
    assert torch.equal(encoder.pooled(images), model.encode_image(images, normalize=False))
    found = encoder.model.forward_intermediates(images, output_fmt="NLC", output_extra_tokens=True)
    assert len(found["image_intermediates"]) == encoder.depth
    prefixes = found.get("image_intermediates_prefix")
    for number, block in enumerate(encoder.blocks(images, range(encoder.depth))):
        assert torch.equal(block.patches, found["image_intermediates"][number])
        assert block.cls is None if name == "tiny-siglip" else torch.equal(block.cls, prefixes[number][:, 0])


@torch.no_grad()
def test_the_output_is_what_clip_pools(spec_of):
    """CLIP's embedding is the projection of the output's CLS."""
    encoder = open_encoder(spec_of("tiny-clip"))
    images, visual = images_for(encoder), encoder.model
    output = encoder.output(images)
    visual.output_tokens = True
    pooled, tokens = visual(images)
    assert torch.equal(output.patches, tokens) and torch.equal(output.cls @ visual.proj, pooled)
    assert torch.equal(encoder.pooled(images), pooled)  # not the tokens, which come along


@torch.no_grad()
def test_a_norm_after_the_pooling_is_none_of_the_patches(spec_of):
    encoder = open_encoder(spec_of("tiny-clip-gap"))
    images, visual = images_for(encoder), encoder.model
    output = encoder.output(images)
    assert torch.equal(output.patches, encoder.blocks(images, [2])[0].patches)
    assert torch.equal(visual.ln_post(output.patches.mean(dim=1)) @ visual.proj, encoder.pooled(images))


@torch.no_grad()
def test_a_timm_tower_gives_what_timm_gives(spec_of):
    encoder = open_encoder(spec_of("tiny-siglip"))
    images, trunk = images_for(encoder), encoder.model.trunk
    assert trunk.num_prefix_tokens == 1  # a register
    assert torch.equal(encoder.output(images).patches, trunk.forward_features(images)[:, 1:])


def test_another_image_size(spec_of):
    for name, size, grid in (("tiny-clip", 48, (6, 6)), ("tiny-siglip", 96, (6, 6))):
        encoder = open_encoder(spec_of(name), image_size=size)
        assert encoder.grid == grid and encoder.processor.config.image_size == size
        assert encoder.output(images_for(encoder)).patches.shape[1] == 36


@pytest.fixture(scope="module")
def weights(spec_of, tmp_path_factory):
    torch.manual_seed(3)
    model, path = open_clip.create_model(spec_of("tiny-clip").removeprefix("open_clip:")), tmp_path_factory.mktemp("w")
    torch.save({"state_dict": model.state_dict()}, path / "last.pt")
    return model.eval(), path / "last.pt"


def test_weights_of_a_file(spec_of, weights):
    encoder = open_encoder(f"{spec_of('tiny-clip')},{weights[1]}")
    images = images_for(encoder)
    with torch.no_grad():
        assert torch.equal(encoder.pooled(images), weights[0].encode_image(images))
    assert encoder.trained and encoder.name == "tiny-clip-last.pt"
    untrained = open_encoder(spec_of("tiny-clip"))
    assert not untrained.trained and untrained.name == "random-tiny-clip"
    assert not torch.equal(untrained.pooled(images), encoder.pooled(images))


def test_weights_of_a_folder(spec_of, weights, tmp_path):
    """As open_clip's hub has them."""
    config = open_clip.get_model_config("tiny-clip")
    preprocess = {"mean": [0.1, 0.2, 0.3], "resize_mode": "squash", "interpolation": "bilinear"}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    with pytest.raises(ValueError, match="could not be loaded"):  # open_clip warns, and leaves them at random
        open_encoder(f"open_clip:local-dir:{tmp_path}")
    torch.save(weights[0].state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    encoder = open_encoder(f"open_clip:local-dir:{tmp_path}")
    assert torch.equal(encoder.model.conv1.weight, weights[0].visual.conv1.weight) and encoder.trained
    processing = encoder.processor.config
    assert (processing.mean, processing.resize, processing.interpolation) == ((0.1, 0.2, 0.3), "squash", "bilinear")


@pytest.fixture
def tags(spec_of, weights, monkeypatch):
    """Tags of tiny-clip, as open_clip lists its own; what it would download is the file."""
    spec_of("tiny-clip")
    entry = {"url": "https://example.org/w.pt", "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic"}
    listed = {
        "plain": entry | {"resize_mode": "squash"},
        "quick": entry | {"resize_mode": "squash", "quick_gelu": True},
    }
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-clip", listed)
    monkeypatch.setattr("open_clip.factory.download_pretrained", lambda *_, **__: str(weights[1]))
    return listed


def test_weights_of_a_tag(tags, weights):
    encoder = open_encoder("open_clip:tiny-clip,plain")
    assert torch.equal(encoder.model.conv1.weight, weights[0].visual.conv1.weight)
    assert encoder.processor.config.mean == (0.5, 0.5, 0.5) and encoder.processor.config.resize == "squash"


def test_a_tag_with_its_activation(tags, weights):
    """OpenAI's weights want QuickGELU; open_clip warns about ViT-B-32,openai and computes other features."""
    encoder, plain = open_encoder("open_clip:tiny-clip,quick"), open_encoder("open_clip:tiny-clip,plain")
    images = images_for(encoder)
    model = open_clip.create_model("tiny-clip", pretrained=str(weights[1]), force_quick_gelu=True).eval()
    with torch.no_grad():
        assert torch.equal(encoder.pooled(images), model.encode_image(images))
    assert not torch.allclose(encoder.pooled(images), plain.pooled(images))


def test_a_model_with_an_activation_that_the_tag_has_not(tags, monkeypatch):
    config = open_clip.get_model_config("tiny-clip") | {"quick_gelu": True}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-clip", config)
    with pytest.raises(ValueError, match=r"^open_clip:tiny-clip,plain: UserWarning: QuickGELU mismatch"):
        open_encoder("open_clip:tiny-clip,plain")


def test_preprocessing_of_weights_that_are_no_tag(tags, weights):
    """What all tags agree on: a SigLIP of a file is not prepared like a CLIP."""
    for spec in ("open_clip:tiny-clip", f"open_clip:tiny-clip,{weights[1]}"):
        processing = open_encoder(spec).processor.config
        assert (processing.mean, processing.resize) == ((0.5, 0.5, 0.5), "squash")
    tags["quick"]["resize_mode"] = "shortest"
    assert open_encoder("open_clip:tiny-clip").processor.config.resize == "shortest_edge"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("open_clip:ViT-Z-1", "'ViT-Z-1' is not one of open_clip.list_models()"),
        ("open_clip:ViT-B-32,nope", "weights 'nope': no such file, nor one of open_clip's tags openai, "),
        ("open_clip:ViT-B-32,/nowhere/w.pt", "weights '/nowhere/w.pt': no such file"),
        ("open_clip:local-dir:/nowhere", "/nowhere"),
        ("open_clip:RN50", "its image tower ModifiedResNet is no transformer of patches"),
    ],
)
def test_specs_that_are_refused(spec, message):
    with pytest.raises(ValueError) as error:
        open_encoder(spec)
    assert message in str(error.value) and "\n" not in str(error.value) and str(error.value).startswith(f"{spec}: ")


def test_weights_that_do_not_fit(spec_of, weights, tmp_path):
    state = dict(weights[0].state_dict())
    del state["visual.ln_post.weight"]
    torch.save(state, tmp_path / "part.pt")
    with pytest.raises(ValueError, match=r"Missing key.*visual\.ln_post\.weight") as error:
        open_encoder(f"{spec_of('tiny-clip')},{tmp_path / 'part.pt'}")
    assert "\n" not in str(error.value)


def test_what_is_not_in_the_weights_is_described(spec_of, tmp_path):
    """Untrained weights are drawn in the same order, whatever the activation."""
    first = open_encoder(spec_of("tiny-clip")).describe()
    for name, changes, vision in (("quick", {"quick_gelu": True}, {}), ("mean", {}, {"pool_type": "avg"})):
        entry = json.loads(json.dumps(open_clip.get_model_config("tiny-clip"))) | changes
        entry["vision_cfg"] |= vision
        (tmp_path / f"tiny-clip-{name}.json").write_text(json.dumps(entry))
        open_clip.add_model_config(tmp_path / f"tiny-clip-{name}.json")
        other = open_encoder(f"open_clip:tiny-clip-{name}").describe()
        assert other["weights"] == first["weights"] and other["config"] != first["config"]
