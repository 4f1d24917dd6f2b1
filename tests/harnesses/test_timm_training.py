"""Our encoders are trained by timm's own functions as timm's AIMv2 is."""

import pytest
import torch
from PIL import Image
from tiny_models import V2

from aimv2.exports import export_model
from aimv2.layouts import LAYOUTS, parts
from aimv2.pretrained import load_encoder

timm = pytest.importorskip("timm")

from timm.optim import create_optimizer_v2  # noqa: E402
from timm_settings import CLOSE, ours, pair, pixels  # noqa: E402


def their_name(name: str) -> str:
    return name if name.startswith("head.") else parts(LAYOUTS["timm"].vision, name.removeprefix("encoder."))[0]


def test_layer_decay_is_timms(exports):
    """Each parameter's rate and decay."""
    tables = []
    for model, rename in zip(pair(exports, num_classes=5), (their_name, str), strict=True):
        names = {id(parameter): rename(name) for name, parameter in model.named_parameters()}
        optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.7)
        tables.append(
            {
                names[id(parameter)]: (group["lr_scale"], group["weight_decay"])
                for group in optimizer.param_groups
                for parameter in group["params"]
            }
        )
    assert tables[0] == tables[1]
    assert len({scale for scale, _ in tables[0].values()}) == V2.depth + 2  # stem, blocks, norm and head


@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_step_is_timms(exports, checkpointing):
    after = []
    for model in pair(exports, num_classes=5):
        model.train()
        model.set_grad_checkpointing(checkpointing)
        optimizer = create_optimizer_v2(model, opt="sgd", lr=0.1, weight_decay=0.01, layer_decay=0.7)
        loss = torch.nn.functional.cross_entropy(model(pixels(4, 3, 56, 56)), torch.tensor([0, 1, 2, 3]))
        loss.backward()
        optimizer.step()
        after.append(dict(model.state_dict()))
    before = ours(exports, num_classes=5).state_dict()
    for name, tensor in after[0].items():
        assert not torch.equal(tensor, before[name])
        # Weights of up to 2, moved by gradients that are sums over 64 patches.
        other = after[1][their_name(name)]
        torch.testing.assert_close(tensor, other.reshape(tensor.shape), rtol=1e-4, atol=1e-5)


def test_checkpointing_recomputes(exports):
    calls = []
    model = ours(exports)
    model.encoder.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for enable, expected in ((True, 2), (False, 1)):
        calls.clear()
        model.set_grad_checkpointing(enable)
        model(pixels(1, 3, 56, 56)).sum().backward()
        assert len(calls) == expected


def test_head_comes_and_goes(exports):
    model = ours(exports, num_classes=5, drop_rate=0.5)
    assert model.get_classifier() is model.head and model.head.out_features == 5
    model.reset_classifier(2, "max")
    assert (model.num_classes, model.global_pool) == (2, "max") and model(pixels(3, 3, 56, 56)).shape == (3, 2)
    model.reset_classifier(0)
    assert model.global_pool == "max" and isinstance(model.head, torch.nn.Identity)
    assert model(pixels(3, 3, 56, 56)).shape == (3, model.num_features) == (3, model.head_hidden_size)
    model.reset_classifier(0, "")
    assert model(pixels(3, 3, 56, 56)).shape == (3, 16, 256)
    images = pixels(3, 3, 56, 56)
    assert not torch.equal(model.train()(images), model(images)) and torch.equal(model.eval()(images), model(images))


def test_state_dict_there_and_back(exports, tmp_path):
    """Through timm's own `checkpoint_path`, and after training to an export of ours."""
    model = ours(exports, num_classes=5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    torch.save(model.state_dict(), tmp_path / "tuned.pth")
    again = ours(exports, num_classes=5, checkpoint_path=str(tmp_path / "tuned.pth"))
    images = pixels(2, 3, 56, 56)
    assert torch.equal(again(images), model(images))
    folder = export_model(model.encoder, tmp_path / "e", config=model.encoder.config, processing=model.processor.config)
    assert torch.equal(load_encoder(folder)(images), model.forward_features(images))


@pytest.mark.parametrize("arguments", [{"img_size": 84}, {"img_size": 84, "dynamic_img_size": True}, {}])
def test_an_export_takes_the_images_it_was_trained_on(exports, tmp_path, arguments):
    model = ours(exports, num_classes=2, **arguments)
    if not arguments:
        model.set_input_size(84)
    folder = export_model(model.encoder, tmp_path / "e", config=model.encoder.config, processing=model.processor.config)
    again, image = load_encoder(folder), Image.new("RGB", (97, 90), (200, 20, 50))
    prepared = again.processor(image).pixel_values
    assert prepared.shape == (1, 3, 84, 84) and torch.equal(prepared, model.processor(image).pixel_values)
    assert torch.equal(again(prepared), model.forward_features(prepared))


@pytest.mark.slow
def test_compiled_in_one_graph(exports):
    torch.compiler.reset()
    for model in (ours(exports, num_classes=5), ours(exports, features_only=True, out_indices=[0, 2])):
        images = pixels(2, 3, 56, 56)
        with torch.no_grad():
            torch.testing.assert_close(torch.compile(model, fullgraph=True)(images), model(images), **CLOSE)
