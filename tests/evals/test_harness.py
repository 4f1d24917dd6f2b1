import json

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from aimv2.evals.shapes_captions import ShapesCaptions
from aimv2.evals.validation import ValidationLoss
from aimv2.pretrained import load_model
from aimv2.ranks import sum_over_ranks


def test_alone_the_sum_is_the_tensor_itself():
    tensor = torch.tensor([1.0, 2.0])
    assert sum_over_ranks(tensor) is tensor


def evaluate(rank, world_size, data, export, folder):
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    model = load_model(export)
    place = {"patch_size": 16, "seed": 0, "rank": rank, "world_size": world_size, "device": torch.device("cpu")}
    metrics = {}
    for settings in (ValidationLoss(samples=21, batch_size=10), ShapesCaptions(samples=21, batch_size=10)):
        metrics |= settings.build(data, **place)(model)
    (folder / f"{world_size}_{rank}.json").write_text(json.dumps(metrics))


@pytest.mark.slow
def test_two_ranks_with_uneven_parts_agree_with_one(shapes, run, tmp_path):
    """21 samples are 11 and 10, in two batches and one: nothing is padded, and no rank waits for the other's calls."""
    evaluate(0, 1, shapes, run / "export", tmp_path)
    mp.spawn(evaluate, args=(2, shapes, run / "export", tmp_path), nprocs=2)
    one, first, second = (json.loads((tmp_path / name).read_text()) for name in ("1_0.json", "2_0.json", "2_1.json"))
    assert first == second
    # fp32 losses summed over batches of other sizes
    assert first == pytest.approx(one, rel=1e-5)
