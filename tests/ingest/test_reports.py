import json
import math

import numpy as np
import pytest
from made_tars import picture, write_samples
from PIL import Image

pytest.importorskip("sentencepiece")
pytest.importorskip("matplotlib")

from aimv2.data.shard_scan import build_index
from aimv2.ingest import reports
from aimv2.ingest.filters import Filter
from aimv2.ingest.measures import MeasureConfig
from aimv2.ingest.report_pictures import draw_histograms, draw_samples
from aimv2.ingest.reports import Report, sample_values, table, write_report
from aimv2.ingest.selection import Dropped, Selection, select
from aimv2.ingest.shard_measures import ShardMeasurer


def measured(folder, samples, shards=1, **config):
    paths = []
    for number in range(shards):
        paths.append(write_samples(folder / f"{number}.tar", samples, first=number * len(samples)))
        ShardMeasurer(MeasureConfig(**config)).measure(paths[-1], build_index(paths[-1]))
    return paths


def test_a_table_is_aligned_and_what_is_in_it_stays_in_its_cell():
    assert table(["name", "n"], [["a|b\nc", "1"], ["d", "1,000"]]).splitlines() == [
        "| name   |     n |",
        "| ------ | ----: |",
        "| a\\|b c |     1 |",
        "| d      | 1,000 |",
    ]


def test_a_report_counted_by_hand(tmp_path):
    selection = Selection(
        [tmp_path / "0.tar", tmp_path / "1.tar"], [Filter.parse("clip >= quantile:0.5")], samples=1000
    )
    selection.reasons = {r.reason: r for r in (Dropped("no caption", 40, 40), Dropped("not clip", 500, 480))}
    selection.captions["txt"], selection.hygiene["escaped"], selection.hygiene["empty"] = 800, 200, 8
    selection.duplicates = {"bytes": 3, "phash": 12}
    selection.formats["JPEG"] = 1000
    selection.filters[0] = Filter(column="clip", operator=">=", threshold=0.25, quantile=0.5)
    damage = [f"{tmp_path}/2.tar: byte 512: a damaged header"]
    report = Report(folder=tmp_path, command="make it", tars=3, download=None, damage=damage, selection=selection)
    report.summarise({"clip": np.array([0.0, 0.25, 0.5, np.nan], np.float32), "none": np.array([np.nan])})
    write_report(report, tmp_path)
    contents = json.loads((tmp_path / "report.json").read_text())
    assert (contents["samples"], contents["kept"]) == (1000, 480)
    assert [(d["alone"], d["dropped"], d["left"]) for d in contents["dropped"]] == [(40, 40, 960), (500, 480, 480)]
    assert contents["thresholds"][0] == {
        "column": "clip",
        "operator": ">=",
        "threshold": 0.25,
        "quantile": 0.5,
        "missing_passes": False,
        "filter": "clip >= quantile:0.5",
    }
    assert contents["columns"] == {
        "clip": {"share": 0.75, "lowest": 0, "1 %": pytest.approx(0.005), "25 %": 0.125, "median": 0.25}
        | {"75 %": 0.375, "99 %": pytest.approx(0.495), "highest": 0.5}
    }
    text = (tmp_path / "report.md").read_text()
    for line in (
        "2 of 3 shards, 1 left out as damaged.",
        "| all        |           |         | 1,000 | 100.0 % |",
        "| not clip   |       500 |     480 |   480 |  48.0 % |",
        "| kept       |           |     520 |   480 |  48.0 % |",
        "| clip >= quantile:0.5 |      0.25 |",
        "Images that repeat an earlier one: 3 by bytes, 12 by phash.",
        f"- `{damage[0]}`",
        "    200 | 25.0 % |",  # of the 800 captions
    ):
        assert line in text, line


def test_what_may_go_unseen_is_a_line_each(tmp_path):
    """Members not read, files without a tar, whether duplicates were looked for; the title of a folder typed as dot."""
    report = Report(folder=tmp_path / "coyo" / "..", command="", tars=1, download=None)
    report.selection = Selection([tmp_path / "0.tar"], [], samples=2)
    report.ignored.update({"pyd": 3, "v1.jpg": 12, "": 1, "\n": 1})
    report.notes, report.boxes = ["Without a tar: 1.tar.idx"], "Boxes in samples.png"
    lines = report.markdown().splitlines()
    assert lines[0] == f"# {tmp_path.name}"
    assert "Members not read: 12 .v1.jpg, 3 .pyd, 1 without extension, 1 .\\n" in lines
    assert {"Images that repeat an earlier one were not looked for.", *report.notes, report.boxes} <= set(lines)
    assert report.contents()["ignored"] == {"v1.jpg": 12, "pyd": 3, "": 1, "\n": 1}


def test_values_are_of_every_kth_sample(tmp_path, monkeypatch):
    samples = [{"json": json.dumps({"n": i, "big": 1e300 * i}).encode(), "jpg": picture(0)} for i in range(10)]
    shards = measured(tmp_path, samples, shards=3, captions=(), decode=False)
    selection = select(shards, [Filter.parse("n < 5")], captions=())
    values, kept = sample_values(selection, ["n", "nothing", "big"])
    assert values["n"].tolist() == 3 * list(range(10)) and np.isnan(values["nothing"]).all()
    assert np.isnan(values["big"][1:10]).all()  # beyond float32, which the pictures have
    assert kept.tolist() == [n < 5 for n in values["n"]]
    monkeypatch.setattr(reports, "MOST_VALUES", 8)
    values, kept = sample_values(selection, ["n"])  # few shards: some rows of each
    assert values["n"].tolist() == [0, 4, 8, 2, 6, 0, 4, 8] and kept.tolist() == [n < 5 for n in values["n"]]
    monkeypatch.setattr(reports, "FEWEST_READ", 1)
    monkeypatch.setattr(reports, "MOST_VALUES", 20)
    values, kept = sample_values(selection, ["n"])  # many: every second one, whole
    assert values["n"].tolist() == 2 * list(range(10)) and kept.tolist() == [n < 5 for n in values["n"]]


ODD_CAPTIONS = [
    *(
        "a dog",
        "",
        "$x^2$ and $\\frac",
        "無料配送 " * 30,
        "w" * 400,
        "\u202eright to left صورة",
        "line\n" * 30,
        "🎉 100 %",
    ),
    *("_a_ {b} \\begin", "<b>&amp;", "a"),
]


def test_samples_of_any_kind_can_be_drawn(tmp_path):
    images = [picture(0, (400, 40)), picture(1, (40, 400)), picture(2, image_format="PNG"), b"not an image"]
    samples = [{"jpg": images[i % 4], "txt": text.encode()} for i, text in enumerate(ODD_CAPTIONS)]
    shards = measured(tmp_path, samples, decode=False)
    selection = select(shards, [], keep_all=True)
    said = draw_samples(selection, "txt", tmp_path / "samples.png")
    with Image.open(tmp_path / "samples.png") as sheet:
        assert sheet.width > 1600 and np.asarray(sheet)[..., :3].std() > 10
    assert "symbols" in said and "\U0001f389" in said and "\n" not in said  # no text font has a party popper
    assert draw_samples(selection, None, tmp_path / "without.png") == ""
    with Image.open(tmp_path / "without.png") as without:
        assert without.height < sheet.height
    one = select(measured(tmp_path / "one", samples[:1]), [])
    assert draw_samples(one, "txt", tmp_path / "one.png") == "" and (tmp_path / "one.png").stat().st_size > 1000


def test_samples_are_drawn_from_all_that_are_kept(tmp_path, monkeypatch):
    samples = [{"jpg": picture(0), "txt": b"a dog", "json": json.dumps({"n": i}).encode()} for i in range(40)]
    shards = measured(tmp_path, samples, shards=3, decode=False)
    selection = select(shards, [Filter.parse("n >= 20")])
    from aimv2.ingest import report_pictures

    chosen = report_pictures._choose(selection)
    assert len(set(chosen)) == len(chosen) == 48 and all(20 <= row < 40 for _, row in chosen)
    assert {shard for shard, _ in chosen} == set(shards)
    monkeypatch.setattr(report_pictures, "SAMPLES", 1000)
    assert report_pictures._choose(selection) == [(shard, row) for shard in shards for row in range(20, 40)]


def test_histograms_of_any_values_can_be_drawn(tmp_path):
    rng = np.random.default_rng(0)
    n = 500
    values = {
        "min_side": rng.integers(32, 4000, n).astype(float),
        "constant": np.full(n, 3.0),
        "empty": np.full(n, np.nan),
        "score": np.where(rng.random(n) < 0.3, np.nan, rng.normal(size=n)),
        "huge": rng.normal(size=n) * 1e30,
        "tiny": np.exp(rng.normal(size=n) * 9),
        "flag": rng.integers(0, 2, n).astype(float),
        "one": np.where(np.arange(n) == 0, 5.0, np.nan),
    }
    filters = [
        Filter(column="score", operator=">=", threshold=0.2, quantile=0.5),
        Filter(column="min_side", operator="<", threshold=math.inf),
        Filter(column="constant", operator="<=", threshold=100.0),
        Filter(column="one", operator="!=", threshold=5.0),
    ]
    path = draw_histograms(values, rng.random(n) < 0.5, filters, tmp_path / "histograms.png")
    colours = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3).astype(int)
    red = colours[:, 0] - colours[:, 1:].max(1) > 60  # the dashed lines, over bars and with soft edges
    blue = colours[:, 2] - colours[:, 0] > 60
    assert red.sum() > 200 and blue.sum() > 2000
