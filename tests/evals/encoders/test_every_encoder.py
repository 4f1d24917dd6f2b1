"""What holds for each encoder, whatever library it is of. Their own functions as oracles are in the other files."""

import json
import re

import pytest
import torch
from small_encoders import block_modules, images_for

from aimv2.evals.encoders import BlockOutput, open_encoder, parse_layers, streams
from aimv2.evals.encoders.interface import weights_digest


def test_what_it_says_of_itself(encoder):
    description = encoder.describe()
    assert json.loads(json.dumps(description)) == description
    assert description["spec"] == encoder.spec
    assert re.fullmatch(r"[\w.+@-]+", encoder.name)
    assert description["parameters"] == sum(p.numel() for p in encoder.model.parameters())
    for digest in ("weights", "preprocessing_hash"):
        assert re.fullmatch("[0-9a-f]{64}", description[digest])
    assert re.fullmatch("[0-9a-f]{16}", description["config"])
    assert len(block_modules(encoder)) == (encoder.depth if encoder.source != "pixels" else 0)
    assert encoder.width % encoder.heads == 0


def test_shapes_and_types(encoder):
    images, patches = images_for(encoder), encoder.grid[0] * encoder.grid[1]
    outputs = [encoder.output(images), *encoder.blocks(images, range(encoder.depth))]
    for output in outputs:
        assert isinstance(output, BlockOutput) and output.patches.shape == (2, patches, encoder.width)
        assert output.cls is None or output.cls.shape == (2, encoder.width)
        assert all(x.dtype == torch.float32 and not x.requires_grad for x in output if x is not None)
    pooled = encoder.pooled(images)
    assert pooled.ndim == 2 and len(pooled) == 2 and pooled.dtype == torch.float32


def test_patches_are_those_of_the_image_in_raster_order(encoder):
    """With blocks that do nothing, changing one patch of the image changes one of the output: no CLS, no register."""
    for parameter in [p for block in block_modules(encoder) for p in block.parameters()]:
        parameter.data.zero_()
    before = images_for(encoder, 1)
    (raw,), output = encoder.forward(before, [0])
    side = before.shape[-1] // encoder.grid[1]
    for row, column in [(0, 0), (0, 1), (1, 0), (encoder.grid[0] - 1, encoder.grid[1] - 1)]:
        after = before.clone()
        after[:, :, row * side : (row + 1) * side, column * side : (column + 1) * side] += 1
        (raw_after,), output_after = encoder.forward(after, [0])
        for one, other in ((raw, raw_after), (output, output_after)):
            changed = (one.patches != other.patches).any(dim=-1)[0]
            assert changed.nonzero().flatten().tolist() == [row * encoder.grid[1] + column]
            assert one.cls is None or torch.equal(one.cls, other.cls)


def test_no_block_above_the_highest_runs(encoder):
    calls = [0] * encoder.depth
    for number, block in enumerate(block_modules(encoder)):
        block.register_forward_hook(lambda *_, number=number: calls.__setitem__(number, calls[number] + 1))
    if not block_modules(encoder):
        pytest.skip("no blocks")
    images = images_for(encoder)
    encoder.blocks(images, [1, 0])
    assert calls == [1, 1] + [0] * (encoder.depth - 2)
    streams(encoder, images, {"two": (0, 1), "one": (1,), "output": ()})
    assert calls == [2, 2] + [1] * (encoder.depth - 2)  # one pass for all of them
    encoder.average((0,))
    encoder.output(images)
    encoder.pooled(images)
    assert calls == [4, 2] + [1] * (encoder.depth - 2)


def test_order_and_repetition_of_blocks(encoder):
    images, last = images_for(encoder), encoder.depth - 1
    found = encoder.blocks(images, [last, 0, last])
    apart = [encoder.blocks(images, [number])[0] for number in (last, 0, last)]
    assert all(torch.equal(one.patches, other.patches) for one, other in zip(found, apart, strict=True))
    for numbers in ([encoder.depth], [-1]):
        with pytest.raises(ValueError, match=rf"has blocks 0 to {last}"):
            encoder.blocks(images, numbers)


def test_output_is_the_last_block_after_the_norm(encoder):
    images = images_for(encoder)
    (last,), output = encoder.forward(images, [encoder.depth - 1])
    assert torch.equal(encoder.norm(last.patches), output.patches)
    assert output.cls is None or torch.equal(encoder.norm(last.cls), output.cls)


def test_layers_in_the_spec(encoder):
    images = images_for(encoder)
    plain, last = encoder.output(images), encoder.depth - 1
    chosen = open_encoder(f"{encoder.spec}@0-{last}")
    raw = encoder.blocks(images, range(encoder.depth))
    output = chosen.output(images)
    # the order of a sum of at most nine numbers
    torch.testing.assert_close(output.patches, sum(one.patches for one in raw) / len(raw), rtol=1e-5, atol=1e-5)
    assert (output.cls is None) == (plain.cls is None)
    assert torch.equal(chosen.pooled(images), output.patches.mean(dim=1))
    assert chosen.describe()["layers"] == list(range(encoder.depth)) and chosen.name.endswith(f"@0-{last}")
    assert torch.equal(open_encoder(f"{encoder.spec}@output").output(images).patches, plain.patches)


def test_streams(encoder):
    images = images_for(encoder)
    layers = parse_layers("all,windows", encoder.depth)
    found = streams(encoder, images, layers)
    raw = [one.patches for one in encoder.blocks(images, range(encoder.depth))]
    assert found.keys() == layers.keys() and torch.equal(found["output"], encoder.output(images).patches)
    for name, numbers in layers.items():
        if numbers:
            mean = sum(raw[number] for number in numbers) / len(numbers)
            torch.testing.assert_close(found[name], mean, rtol=1e-5, atol=1e-5)  # the order of a sum


def test_it_stays_at_rest(encoder):
    """Whoever calls train(): dropout and batch statistics would change the features."""
    modes, images = [], images_for(encoder)
    for module in encoder.model.modules():
        module.register_forward_hook(lambda module, *_: modes.append((module.training, torch.is_grad_enabled())))
    for features in (encoder.output, encoder.pooled, lambda images: encoder.blocks(images, [0])):
        encoder.model.train()
        features(images)
        assert encoder.model.training
    assert set(modes) == {(False, False)} or (encoder.source == "pixels" and not modes)
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())


def test_another_device(encoder):
    """On the meta device whatever is left behind on the CPU is an error; images come along."""
    encoder.to("meta")
    images = images_for(encoder)
    assert encoder.output(images).patches.device == encoder.pooled(images).device == encoder.device
    assert encoder.device == torch.device("meta")


def test_opening_twice(encoder):
    """Untrained weights too; whatever the global generator stands at, and it stays there."""
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again = open_encoder(encoder.spec)
    assert torch.equal(torch.get_rng_state(), before)
    assert again.describe() == encoder.describe()


def test_the_digest_follows_the_weights(encoder):
    parameters = list(encoder.model.parameters())
    if not parameters:
        pytest.skip("no weights")
    before = weights_digest(encoder.model)
    assert encoder.describe()["weights"] == before
    value = parameters[-1].data.flatten()[0].item()
    parameters[-1].data.view(-1)[0] = value + 1
    assert weights_digest(encoder.model) != before
    parameters[-1].data.view(-1)[0] = value
    assert weights_digest(encoder.model) == before


def test_weights_are_read_once(encoder, monkeypatch):
    """Of a large encoder that takes seconds, and each result describes it several times."""
    read = []
    monkeypatch.setattr("aimv2.evals.encoders.interface.weights_digest", lambda model: read.append(model) or "")
    first = encoder.describe()
    assert encoder.average((0,)).describe() == first | {"layers": [0]} and len(read) == 1
