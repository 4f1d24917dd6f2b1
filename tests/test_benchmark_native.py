"""Strips and packing, as scripts/benchmark.py native compares them, are the same computation."""

import importlib
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch


@pytest.fixture(scope="module")
def native(request):
    """The script's module, found as when it runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(request.config.rootpath / "scripts")
        yield importlib.import_module("benchmark_native")


@pytest.fixture
def config(native):
    vision = replace(native.TINY, width=16, heads=2, mlp_hidden=24, patch_size=2, image_size=8, positions="sincos")
    decoder = replace(native.TINY_DECODER, width=16, mlp_hidden=24, vocab_size=31)
    return native.AIMv2Config(vision=vision, decoder=decoder)


@pytest.mark.parametrize("seed", range(3))
def test_packing_gives_the_gradients_of_strips(native, config, seed):
    torch.manual_seed(seed)
    model = config.build().double()
    batch = native.native_batch(config, area=53, budget=265, seed=seed)
    batch = replace(batch, image=batch.image.double())
    batch.text_length[0] = 0
    assert len(batch) == 5 and len(set(batch.patch_counts().tolist())) > 1
    counts = native.Counts.of(native.count_targets([batch]))
    loss = model(batch, counts)["loss"]
    loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    for one_mask in (True, False):
        packing = native.packing_model(model, one_mask)
        packing.zero_grad()
        found = native.packed_loss(packing, native.pack(batch, 2, one_mask), counts)
        found.backward()
        assert found.item() == pytest.approx(loss.item(), rel=1e-12)
        # float64: the same terms, summed in another order
        torch.testing.assert_close({n: p.grad for n, p in packing.named_parameters()}, expected, rtol=1e-9, atol=1e-12)


def test_padding_is_what_is_not_an_image_or_a_caption(native, config):
    sizes = torch.tensor([[4, 6], [2, 6], [5, 4]]), torch.tensor([4, 1, 10])
    # 24, 12 and 20 patches of 3 x 24; 15 tokens of 3 x 10
    assert native.padding([sizes]) == pytest.approx((16 / 72, 31 / 102))
    another = torch.tensor([[1, 4], [2, 1]]), torch.tensor([5, 3])  # 6 patches of 2 x 4, 8 tokens of 2 x 5
    assert native.padding([sizes, another]) == pytest.approx((18 / 80, 35 / 120))


def test_images_are_of_many_shapes_and_nearly_fill_their_area(native, config):
    batch = native.native_batch(config, area=1024, budget=1024 * 40)
    rows, columns = batch.grid.T
    assert (columns > rows).sum() > 8 and (rows > columns).sum() > 8
    assert (batch.patch_counts() <= 1024).all() and native.padding([(batch.grid, batch.text_length)])[0] < 0.05
    assert (batch.prefix_length >= 1).all() and (batch.prefix_length < batch.patch_counts()).all()
    behind = batch.image.unflatten(3, (-1, 2)).permute(0, 3, 1, 2, 4)[~batch.real_patches()]
    assert len(behind) and (behind == 0).all()


def test_table_and_json(request, tmp_path):
    root, out = request.config.rootpath, tmp_path / "out.json"
    options = ["--size", "tiny", "--areas", "8", "32", "--budget", "64", "--rounds", "2", "--json", str(out)]
    on_cpu = ["--device", "cpu", "--threads", "1"]
    command = [sys.executable, str(root / "scripts" / "benchmark.py"), "native", *options, *on_cpu]
    done = subprocess.run(command, env={"PYTHONPATH": str(root)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())["results"]
    names = ["ours", "packed, one mask", "packed, image by image"]
    expected = [(dtype, area, 64 // area, name) for dtype in ("fp32", "bf16") for area in (8, 32) for name in names]
    assert [(r["dtype"], r["area"], r["images"], r["subject"]) for r in results] == expected
    assert all(r["seconds"] > 0 and r["memory_bytes"] > 0 and r["encoder_padding"] < 0.5 for r in results)
    _, title, *lines, last = done.stdout.splitlines()
    assert title.split()[:3] == ["dtype", "area", "images"] and len(lines) == len(expected) and last.startswith("ours")
    failed = subprocess.run([*command, "--budget", "16"], env={"PYTHONPATH": str(root)}, capture_output=True, text=True)
    assert failed.returncode == 1 and failed.stderr == "error: areas [8, 32], budget 16: expected 2 <= area <= budget\n"
