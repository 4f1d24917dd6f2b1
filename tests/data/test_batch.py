import pickle

import pytest
import torch

from aimv2.data.batch import Batch, Replaced, count_padding, count_targets


def make(prefix: list[int], lengths: list[int], num_patches: int = 16) -> Batch:
    b, t = len(prefix), max(1, *lengths)
    return Batch(
        image=torch.zeros(b, 3, 8, 8),
        text=torch.zeros(b, t, dtype=torch.int64),
        text_length=torch.tensor(lengths),
        prefix_length=torch.tensor(prefix),
        sample=torch.arange(b),
        num_patches=num_patches,
    )


def test_counts_equal_a_loop_over_every_target():
    batches = [make([1, 15, 7], [3, 0, 5]), make([4, 4], [0, 0], num_patches=9)]
    patches = tokens = 0
    for batch in batches:
        for prefix, length in zip(batch.prefix_length.tolist(), batch.text_length.tolist(), strict=True):
            patches += len([n for n in range(batch.num_patches) if n >= prefix])
            tokens += length
    counts = count_targets(batches)
    assert counts.dtype == torch.float64
    assert counts.tolist() == [patches, tokens, 5, 2]


def test_nothing_to_count_is_zero_and_not_an_error():
    assert count_targets([]).tolist() == [0, 0, 0, 0]


def test_to_moves_every_tensor_and_keeps_the_rest():
    batch = make([1, 2], [1, 2])
    batch.replaced.append(Replaced(1, "truncated", "a.tar: key"))
    moved = batch.to("meta")
    assert {t.device.type for t in (moved.image, moved.text, moved.text_length, moved.prefix_length)} == {"meta"}
    assert moved.sample.device.type == "meta"
    assert (moved.num_patches, moved.replaced, len(moved)) == (16, batch.replaced, 2)


def test_several_tries_for_a_sample_are_one_replaced():
    batch = make([1], [1])
    batch.replaced = [Replaced(3, "cut off", "a"), Replaced(3, "cut off", "b"), Replaced(4, "no txt", "c")]
    assert batch.count_replaced() == 2


def test_survives_a_pickle():
    batch = pickle.loads(pickle.dumps(make([1, 2], [1, 2])))
    assert batch.prefix_length.tolist() == [1, 2]


@pytest.mark.gpu
def test_pinned_batches_go_to_the_gpu():
    batch = make([1, 2], [1, 2]).pin_memory()
    assert batch.image.is_pinned()
    assert batch.to("cuda").text.device.type == "cuda"


def test_padding_is_what_is_not_an_image():
    strips = make([1, 1], [1, 1], num_patches=12)
    strips.grid = torch.tensor([[3, 4], [2, 5]])
    assert count_padding([strips]) == (2, 24)
    assert count_padding([strips, strips]) == (4, 48)
    assert strips.real_patches().sum(dim=1).tolist() == [12, 10]
    strips.grid = torch.tensor([[3, 4], [4, 3]])
    assert count_padding([strips]) == (0, 24)
    assert count_padding([make([1], [1])]) == (0, 0)
