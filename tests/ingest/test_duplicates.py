import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from aimv2.ingest.duplicates import Repeats, repeated_hashes


@settings(max_examples=300, deadline=None)
@given(shards=st.lists(st.lists(st.sampled_from([0, 1, 2, 5, 2**63, 2**64 - 1]) | st.integers(0, 30), max_size=12)))
def test_the_first_of_each_hash_is_no_repeat(shards):
    chunks = [np.array(shard, np.uint64) for shard in shards]
    seen: set[int] = set()
    expected = []
    for shard in shards:
        expected.append([])
        for value in shard:
            expected[-1].append(value in seen)
            seen.add(value)
    every = [value for shard in shards for value in shard]
    repeated, count = repeated_hashes(iter(chunks), len(every))
    assert repeated.tolist() == sorted(value for value in seen if every.count(value) > 1)
    assert count == sum(map(sum, expected))
    repeats = Repeats(repeated)
    assert [repeats.find(chunk).tolist() for chunk in chunks] == expected


def test_a_million_hashes():
    """The size at which sets would be slow: numpy's own unique says how many there should be."""
    hashes = np.random.default_rng(0).integers(0, 2_000_000, 1_000_000, dtype=np.uint64)
    chunks = np.array_split(hashes, 7)
    repeated, count = repeated_hashes(chunks, len(hashes))
    assert count == len(hashes) - len(np.unique(hashes))
    repeats = Repeats(repeated)
    kept = np.concatenate([chunk[~repeats.find(chunk)] for chunk in chunks])
    assert np.array_equal(np.sort(kept), np.unique(hashes))
