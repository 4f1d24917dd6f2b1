"""Every count and every row against a naive loop over the same samples."""

import math
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_tars import picture, write_samples

pytest.importorskip("sentencepiece")

from aimv2.data.shard_scan import build_index
from aimv2.ingest.filters import OPERATORS, Filter, find_thresholds
from aimv2.ingest.measures import MeasureConfig
from aimv2.ingest.selection import select
from aimv2.ingest.shard_measures import ShardMeasurer, measures_path

SIZES = (13, 1, 20, 9)
PICTURES = [picture(seed, (40 + 9 * seed, 48)) for seed in range(6)]
FILTERS = ("clip >= quantile:0.4", "aspect <= 1.7", "clip < 0.9", "words != 3")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(shards, their samples in order as dictionaries of what a naive reader knows)."""
    folder = tmp_path_factory.mktemp("made")
    rng = np.random.default_rng(1)
    shards, known = [], []
    for number, size in enumerate(SIZES):
        samples, rows = [], []
        for _ in range(size):
            image = int(rng.integers(-2, len(PICTURES)))
            row = {"image": image, "clip": float(rng.random()), "words": float(rng.integers(0, 5)), "txt": None}
            row["clip"] = math.nan if rng.random() < 0.15 else row["clip"]
            sample = {"json": b"{}"}
            if image != -1:  # -1: none, -2: one that cannot be decoded
                sample["jpg"] = b"?" * int(rng.integers(1, 3)) if image == -2 else PICTURES[image]
            if rng.random() < 0.85:
                row["txt"] = sample["txt"] = [b"a dog", b"!", b"a <b>cat</b>", b"x&amp;y z"][int(rng.integers(4))]
            row["bytes"] = sample.get("jpg")
            row["phash"] = f"{int(rng.integers(1, 12)):016x}" if rng.random() < 0.8 else None
            samples.append(sample)
            rows.append(row)
        shard = write_samples(folder / f"{number:05d}.tar", samples)
        ShardMeasurer(MeasureConfig()).measure(shard, build_index(shard))
        columns = {"key": [f"{i:06d}" for i in range(size)], "image_phash": [row["phash"] for row in rows]}
        columns |= {name: [row[name] for row in rows] for name in ("clip", "words")}
        pq.write_table(pa.table(columns), measures_path(shard).with_name(f"{number:05d}.columns.parquet"))
        shards.append(shard)
        known.append(rows)
    return shards, known


def naive(known, filters, *, captions=True, duplicates="none", keep_missing=False):
    """(kept rows of each shard, reason -> samples dropped, reason -> samples concerned), sample by sample."""
    dropped, alone, kept = Counter(), Counter(), []
    seen = set()
    for rows in known:
        kept.append([])
        for number, row in enumerate(rows):
            reasons = []
            if row["image"] == -1:
                reasons.append("unusable: no image")
            if row["image"] == -2:
                reasons.append("unusable: not a JPEG, PNG, WEBP, GIF, BMP")
            if captions and row["txt"] is None:
                reasons.append("no caption")
            aspect = math.nan
            if row["image"] >= 0:
                sides = sorted((40 + 9 * row["image"], 48))
                aspect = sides[1] / sides[0]
            for f in filters:
                value = aspect if f.column == "aspect" else row[f.column]
                if math.isnan(value):
                    if not keep_missing and f"{f.column} missing" not in reasons:
                        reasons.append(f"{f.column} missing")
                elif not OPERATORS[f.operator](value, f.threshold):
                    reasons.append(f"not {f}")
            alone.update(reasons)
            if reasons:
                dropped[reasons[0]] += 1
                continue
            if duplicates != "none" and row[duplicates] is not None:
                if row[duplicates] in seen:
                    dropped[f"duplicate ({duplicates})"] += 1
                    continue
                seen.add(row[duplicates])
            kept[-1].append(number)
    return kept, dropped, alone


def repeats(known, kind):
    values = [row[kind] for rows in known for row in rows if row[kind] is not None]
    return len(values) - len(set(values))


@pytest.mark.parametrize("duplicates", ["none", "bytes", "phash"])
@pytest.mark.parametrize("keep_missing", [False, True])
@pytest.mark.parametrize("texts", [(), FILTERS[:1], FILTERS])
def test_against_the_naive_loop(made, texts, keep_missing, duplicates):
    shards, known = made
    filters = find_thresholds([Filter.parse(text) for text in texts], shards, sum(SIZES))
    selection = select(shards, filters, duplicates=duplicates, keep_missing=keep_missing)
    kept, dropped, alone = naive(known, filters, duplicates=duplicates, keep_missing=keep_missing)
    assert [np.flatnonzero(selection.mask(i)).tolist() for i in range(len(shards))] == kept
    assert selection.samples == sum(SIZES) and selection.kept == sum(map(len, kept))
    found = {reason: entry.dropped for reason, entry in selection.reasons.items() if entry.dropped}
    assert found == dropped and sum(dropped.values()) + selection.kept == sum(SIZES)
    assert selection.duplicates == ({} if duplicates == "none" else {duplicates: repeats(known, duplicates)})
    concerned = {reason: entry.alone for reason, entry in selection.reasons.items() if entry.alone}
    duplicate = concerned.pop(f"duplicate ({duplicates})", None)
    assert concerned == alone
    assert duplicate == (None if duplicates == "none" else repeats(known, duplicates))


def test_reasons_come_in_the_order_in_which_they_are_applied(made):
    filters = find_thresholds([Filter.parse(text) for text in FILTERS], made[0], sum(SIZES))
    reasons = list(select(made[0], filters, duplicates="phash").reasons)
    assert [reason.partition(":")[0] for reason in reasons[:2]] == ["unusable", "unusable"]
    assert reasons[2:] == [
        *("no caption", "clip missing", "not clip >= quantile:0.4", "aspect missing", "not aspect <= 1.7"),
        *("not clip < 0.9", "words missing", "not words != 3", "duplicate (phash)"),
    ]


def test_captions_are_counted_and_their_hygiene(made):
    shards, known = made
    selection = select(shards, [])
    texts = [row["txt"] for rows in known for row in rows if row["txt"] is not None]
    assert selection.captions == {"txt": len(texts)}
    assert selection.hygiene["empty"] == texts.count(b"!") and selection.hygiene["tags"] == texts.count(b"a <b>cat</b>")
    assert selection.hygiene["escaped"] == texts.count(b"x&amp;y z") and selection.hygiene["cut"] == 0
    assert selection.formats == {"JPEG": sum(row["image"] >= 0 for rows in known for row in rows)}
    empty = [(s, i) for s, rows in enumerate(known) for i, r in enumerate(rows) if r["txt"] == b"!" and r["image"] >= 0]
    assert empty and all(selection.mask(shard)[row] for shard, row in empty)  # kept, for their pixels


def test_without_captions_and_without_any_filter(made):
    shards, known = made
    kept, dropped, _ = naive(known, [], captions=False)
    selection = select(shards, [], captions=())
    assert [np.flatnonzero(selection.mask(i)).tolist() for i in range(len(shards))] == kept
    assert selection.samples - selection.kept == sum(dropped.values())
    everything = select(shards, [Filter.parse("clip > 2")], duplicates="bytes", keep_all=True)
    assert everything.kept == sum(SIZES) and all(everything.mask(i).all() for i in range(len(shards)))
    assert everything.reasons["not clip > 2"].alone > 0


def test_the_first_copy_that_is_left_stays(tmp_path):
    """Not the first of all: an image is not lost because its first copy has no caption."""
    same = picture(0)
    samples = [{"jpg": same}, {"jpg": same, "txt": b"a dog"}, {"jpg": same, "txt": b"the dog"}]
    shard = write_samples(tmp_path / "a.tar", samples)
    ShardMeasurer(MeasureConfig()).measure(shard, build_index(shard))
    for kind in ("bytes", "phash"):
        selection = select([shard], [], duplicates=kind)
        assert selection.mask(0).tolist() == [False, True, False]
        assert (selection.duplicates[kind], selection.reasons[f"duplicate ({kind})"].dropped) == (2, 1)


def test_processes_find_what_one_finds(made):
    shards, _ = made
    filters = find_thresholds([Filter.parse(text) for text in FILTERS], shards, sum(SIZES), workers=2)
    assert filters == find_thresholds([Filter.parse(text) for text in FILTERS], shards, sum(SIZES))
    done = []
    one, two = (
        select(shards, filters, duplicates="phash", workers=workers, progress=done.append) for workers in (1, 2)
    )
    assert [one.mask(i).tolist() for i in range(4)] == [two.mask(i).tolist() for i in range(4)]
    assert list(one.reasons.values()) == list(two.reasons.values()) and sum(done) == 2 * sum(SIZES)
    for name in ("samples", "captions", "hygiene", "formats", "duplicates"):
        assert getattr(one, name) == getattr(two, name)


def test_a_filter_that_nobody_typed_drops_nothing_for_want_of_a_value(made):
    shards, known = made
    f = Filter(column="clip", operator="<=", threshold=0.5, missing_passes=True)
    selection = select(shards, [f])
    usable, *_ = naive(known, [])
    rows = [known[s][row] for s, rows in enumerate(usable) for row in rows]
    assert selection.kept == sum(not row["clip"] > 0.5 for row in rows)
    entry = selection.reasons["clip missing, which passes"]
    assert entry.alone == sum(math.isnan(row["clip"]) for rows in known for row in rows) and entry.dropped == 0
