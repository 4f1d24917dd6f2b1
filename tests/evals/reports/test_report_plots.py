import json
import sys
from itertools import pairwise

import pytest
from made_results import entry, result, write_result

from aimv2.evals.encoders import parse_layers
from aimv2.evals.reports.files import read_result
from aimv2.evals.reports.plots import class_values, draw_pictures, layer_metrics, layer_place, quoted_layer, shots
from aimv2.evals.reports.sweeps import chosen_setting, sweep_lines
from aimv2.evals.reports.table import build_table


def test_every_stream_has_its_place():
    streams = parse_layers("all,windows,2-3", 8)
    places = {name: layer_place(name, 8) for name in streams}
    assert places["block_00"] == ("block", 1)  # one block run through
    assert places["block_07"] == ("block", 8)
    assert places["blocks_02-03"] == ("mean", 3.5)  # between the third and the fourth
    kind, output = places["output"]
    assert kind == "output"
    assert output > 8
    for name, numbers in streams.items():
        if numbers:  # the mean of its blocks, counted from 1
            assert places[name][1] == pytest.approx(sum(numbers) / len(numbers) + 1)
    assert layer_place("pooled", 8) is None


def test_layers_are_of_the_headline_only(tmp_path):
    metrics = {"top1": entry(0.8), "top1@block_03": entry(0.7), "mean_per_class@block_03": entry(0.1)}
    found = layer_metrics(read_result(write_result(tmp_path, result(metrics=metrics))))
    assert {stream: metric.value for stream, metric in found.items()} == {"block_03": 0.7}


def test_a_sweep_is_a_line_for_each_weight_decay(tmp_path):
    sweep = [
        {"lr": 1e-3, "weight_decay": 0.1, "held_out": 0.6},
        {"lr": 1e-4, "weight_decay": 0.1, "held_out": 0.4, "top1": 0.9},
        {"lr": 1e-4, "weight_decay": 0.0, "held_out": 0.3},
        {"k": 10, "held_out": 0.9},  # no learning rate
    ]
    found = sweep_lines(read_result(write_result(tmp_path, result(details={"sweep": sweep}))))
    assert found == {0.1: [(1e-4, 0.4), (1e-3, 0.6)], 0.0: [(1e-4, 0.3)]}
    for line in found.values():
        assert all(first < second for first, second in pairwise(line))


def test_a_sweep_is_of_the_chosen_stream_and_the_ring_of_the_selection(tmp_path):
    """Three are equal, and the first was chosen: by streams, not by learning rates."""
    sweep = [
        {"lr": 2e-3, "weight_decay": 0.1, "held_out": 0.7, "top1": 0.1, "stream": "block_03"},
        {"lr": 5e-4, "weight_decay": 0.1, "held_out": 0.7, "top1": 0.2, "stream": "block_03"},
        {"lr": 5e-4, "weight_decay": 0.1, "held_out": 0.7, "top1": 0.3, "stream": "output"},
    ]
    selection = {"on": "10 held-out training images", **sweep[0]}
    metrics = {"top1": entry(0.1), "top1@block_03": entry(0.1), "top1@output": entry(0.3)}
    content = result(metrics=metrics, details={"sweep": sweep, "selection": selection})
    found = read_result(write_result(tmp_path, content))
    assert sweep_lines(found) == {0.1: [(5e-4, 0.7), (2e-3, 0.7)]}
    assert chosen_setting(found) == (2e-3, 0.7)
    assert quoted_layer(found) == (4, 0.1)  # block_03 is the fourth


def test_a_choice_on_the_test_set_and_none_at_all(tmp_path):
    sweep = [{"lr": lr, "top1": top1, "stream": "output"} for lr, top1 in ((1e-3, 0.5), (1e-4, 0.6))]
    for selection, expected in (
        ({"on": "test", "stream": "output", "lr": 1e-4, "test": 0.6}, (1e-4, 0.6)),
        ({"on": "nothing", "stream": "output", "head": "x"}, None),
    ):
        found = read_result(write_result(tmp_path, result(details={"sweep": sweep, "selection": selection})))
        assert sweep_lines(found) == {None: [(1e-4, 0.6), (1e-3, 0.5)]}
        assert chosen_setting(found) == expected
        assert quoted_layer(found) is None  # there are no layers


def test_few_shots_are_no_sweep(tmp_path):
    sweep = [{"shots": count, "draw": 0, "C": 1.0, "held_out": 0.5} for count in ("all", 1, 1, 16)]
    metrics = {"top1": entry(0.9), "top1_16_shot": entry(0.8), "top1_1_shot": entry(0.5), "top5_1_shot": entry(0.7)}
    content = result(metrics=metrics, details={"sweep": sweep, "selection": {"C": 1.0, "held_out": 0.5}})
    found = read_result(write_result(tmp_path, content))
    assert sweep_lines(found) == {}
    whole, few = shots(found)
    assert whole.value == 0.9
    assert [(count, metric.value) for count, metric in few] == [(1, 0.5), (16, 0.8)]
    drawn = draw_pictures([found], build_table([found]), tmp_path)
    assert [path.name for path in drawn] == ["encoders.png", "shots.png"]


def test_classes_of_patches_are_shown_by_their_iou(tmp_path):
    tables = (
        {"a": {"value": 0.5, "n": 100}, "none": {"value": None, "n": 0}},
        {"a": {"value": 0.5, "n": 100, "iou": 0.4}, "none": {"value": None, "n": 0, "iou": 0.0}},
    )
    for per_class, expected in zip(tables, ((0.5, 0.05), (0.4, 0.0)), strict=True):  # sqrt(0.5 * 0.5 / 100)
        found = read_result(write_result(tmp_path, result(details={"per_class": per_class})))
        assert class_values(found) == {"a": expected}


def test_results_without_a_common_class(tmp_path, recwarn):
    """As of a few test images each."""
    contents = [
        result("timm:a", 0.9, details={"per_class": {"x": {"value": 1.0, "n": 1}, "y": {"value": None, "n": 0}}}),
        result("timm:b", 0.5, details={"per_class": {"x": {"value": None, "n": 0}, "y": {"value": 0.0, "n": 1}}}),
        result("timm:c", 0.4, details={"per_class": {"x": {"value": None, "n": 0}}}),
    ]
    results = [read_result(write_result(tmp_path, content)) for content in contents]
    drawn = draw_pictures(results, build_table(results), tmp_path)
    assert [path.name for path in drawn] == ["encoders.png", "per_class.png"]
    assert not [str(warning.message) for warning in recwarn]


@pytest.mark.parametrize(("name", "points"), [("C", [(1e-6, 0.2), (1e5, 0.4)]), ("k", [(10, 0.2), (20, 0.4)])])
def test_other_sweeps(tmp_path, name, points):
    sweep = [{name: x, "held_out": y} for x, y in points[::-1]]
    results = [read_result(write_result(tmp_path, result(details={"sweep": sweep})))]
    assert sweep_lines(results[0]) == {None: points}
    assert "sweep.png" in [path.name for path in draw_pictures(results, build_table(results), tmp_path)]


@pytest.mark.parametrize(
    "name",
    ["$", "$x$ \\frac{", "_hidden", "名前" * 40, "a\nb\tc\x1b[31m"],
    ids=["dollar", "tex", "_", "cjk", "control"],
)
def test_any_name_can_be_drawn(tmp_path, name, recwarn):
    per_class = {name: {"value": 0.5, "n": 4}, "b": {"value": 0.0, "n": 4}}
    layers = {"top1": entry(0.5), "top1@block_00": entry(0.5), "top1@block_01": entry(0.6)}
    content = result("timm:x", metrics=layers, details={"per_class": per_class})
    content["encoder"]["name"] = content["data"]["name"] = content["protocol"]["name"] = name
    path = write_result(tmp_path, result("timm:y"))
    path.write_text(json.dumps(content))
    results = [read_result(path)]
    drawn = draw_pictures(results, build_table(results), tmp_path)
    assert [path.name for path in drawn] == ["encoders.png", "layers.png", "per_class.png"]
    assert not [str(warning.message) for warning in recwarn]


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
    results = [read_result(write_result(tmp_path, result()))]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "aimv2\[eval\]"'):
        draw_pictures(results, build_table(results), tmp_path)
