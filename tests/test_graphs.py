"""What else can run a loaded encoder: torch.compile, torch.export and ONNX, with the batch left open."""

from dataclasses import replace

import pytest
import torch
from tiny_models import NATIVE, V2, random_encoder

from aimv2.features import FeatureEncoder
from aimv2.preprocessing import ProcessorConfig
from aimv2.processor import Processor

PROCESSOR = Processor(ProcessorConfig(image_size=56, patch_size=14, mean=(0.5,) * 3, std=(0.5,) * 3))
CONFIGS = [V2, NATIVE, replace(V2, positions="interpolated")]
BATCH = {"images": {0: torch.export.Dim("batch", min=1, max=64)}}


@pytest.fixture(autouse=True)
def forget_graphs():
    """All cases share the forward's code, and dynamo stops after eight versions of it."""
    yield
    torch.compiler.reset()


def make(config, **settings) -> tuple[FeatureEncoder, torch.Tensor]:
    model = FeatureEncoder(random_encoder(config), PROCESSOR, layers=(0, 2), **settings).eval()
    return model, torch.randn(5, 3, 56, 56)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("config", CONFIGS)
def test_one_graph(config, frozen):
    """Without a break; the graph is run as it is, so that nothing may differ."""
    model, images = make(config, frozen=frozen)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(images), model(images))
    mask = torch.ones(5, 16, dtype=torch.bool)
    mask[:, 9:] = False
    assert torch.equal(compiled(images, mask), model(images, mask))


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS)
def test_compiled(config):
    """By inductor, which needs a compiler on a CPU; fused kernels round otherwise."""
    model, images = make(config)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(images), model(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS)
def test_exported(config):
    model, images = make(config)
    exported = torch.export.export(model, (images[:2],), dynamic_shapes=BATCH).module()
    for count in (1, 5):
        # The same operations, but for the attention kernel that a batch of one is given.
        torch.testing.assert_close(exported(images[:count]), model(images[:count]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS)
def test_onnx(config, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, images = make(config)
    path = tmp_path / "encoder.onnx"
    torch.onnx.export(model, (images[:2],), dynamo=True, dynamic_shapes=BATCH, verbose=False).save(path)
    session = onnxruntime.InferenceSession(path)
    (features,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    # Another library's kernels on features of size 1 to 10: a few units in the last place of fp32.
    torch.testing.assert_close(torch.from_numpy(features), model(images), rtol=0, atol=3e-5)
