from pathlib import Path

import pytest
from made_results import entry, result, write_result

from aimv2.evals.reports.files import read_result
from aimv2.evals.reports.table import Table, build_table


def table(folder: Path, *contents: dict) -> Table:
    return build_table([read_result(write_result(folder, content)) for content in contents])


def test_a_row_an_encoder_a_column_a_metric(tmp_path):
    found = table(
        tmp_path,
        result("pixels:32", 0.3),
        result("timm:vit", 0.5),
        result("aimv2:runs/a", 0.9),
        result("timm:vit", 0.4, on="digits"),
        result("timm:vit", 0.45, protocol={"name": "linear_probe"}),
    )
    assert found.rows == ["a", "vit", "32"]  # the best first, pixels last
    assert [(c.data, c.title) for c in found.headlines] == [
        ("digits", "knn top1"),
        ("shapes@shape", "knn top1"),
        ("shapes@shape", "linear_probe top1"),
    ]
    knn = found.of("shapes@shape")[0]
    assert {row: cell.metric.value for row, cell in knn.cells.items()} == {0: 0.9, 1: 0.5, 2: 0.3}
    assert knn.floor.value == 0.3
    assert (knn.n, knn.chance) == (400, 1 / 6)
    assert [row for row, cell in knn.cells.items() if cell.best] == [0]
    assert found.of("digits")[0].floor is None
    assert knn.with_stderr(knn.cells[1].metric) == "50.0 ± 2.5"
    assert found.footnotes == []


# Chance is 1/6; 400 samples have a standard error of sqrt(v (1 - v) / 400), 0.0195 at 0.19 and 0.0205 at 0.21, so that
# 2 of them above chance are 0.2057 and 0.2077.
@pytest.mark.parametrize(("value", "above"), [(0.1, False), (0.19, False), (0.21, True), (0.9, True)])
def test_what_is_not_above_chance_is_marked(tmp_path, value, above):
    cell = table(tmp_path, result(value=value)).columns[0].cells[0]
    assert cell.above_chance is above
    assert cell.above_floor  # there is none


# 0.5 and 0.54 have standard errors of 0.025 and 0.0249: together 0.0353, twice that 0.0706.
@pytest.mark.parametrize(("value", "above"), [(0.4, False), (0.56, False), (0.58, True)])
def test_what_is_not_above_the_pixels_is_marked(tmp_path, value, above):
    found = table(tmp_path, result("pixels:8", 0.4), result("pixels:32", 0.5), result(value=value))
    assert found.columns[0].floor.value == 0.5  # the best of them
    assert found.columns[0].cells[0].above_floor is above


def test_without_chance_nothing_is_marked_and_none_is_best(tmp_path):
    metrics = {"score": entry(0.01, chance=None)}
    found = table(tmp_path, result("timm:a", metrics=metrics), result("timm:b", metrics=metrics))
    assert all(cell.above_chance and not cell.best for cell in found.columns[0].cells.values())


def test_other_data_are_not_compared(tmp_path):
    others = {"data": {"test": {"n": 90, "identity": "another"}}, "metrics": {"top1": entry(0.95, 90)}}
    found = table(
        tmp_path,
        result("timm:a", 0.8),
        result("timm:b", 0.7),
        result("timm:c", **others),
        result("pixels:32", **others),
    )
    column = found.columns[0]
    cells = {found.rows[row]: cell for row, cell in column.cells.items()}
    assert [name for name, cell in cells.items() if not cell.comparable] == ["c", "32"]
    assert cells["a"].best
    assert not cells["c"].best  # though its value is the highest
    assert column.floor is None  # the pixels saw other images
    assert column.n == 400
    assert found.footnotes == ["Other test images or labels than the column's: n 90. Not comparable."]
    assert cells["c"].notes == [1]


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"data": {"train": {"n": 10, "identity": "few"}}}, "Trained on other images or labels"),
        (
            {"encoder": {"preprocessing": {"image_size": 224, "resize": "squash", "crop_pct": 0.9}}},
            "Sees images differently than the column's others: 224 pixels, squash, crop 0.9.",
        ),
        ({"data": {"across_duplicates": 7}}, "7 test images of shapes@shape are in its training set too"),
        ({"data": {"test": {"identity": "shapes@shape test", "unreadable": 3}}}, "3 test images of shapes@shape can't"),
        ({"metrics": {"top1": entry(0.5, chance=0.5)}}, "Another count or chance"),
    ],
)
def test_each_reservation_is_a_footnote(tmp_path, changes, note):
    found = table(tmp_path, result("timm:a"), result("timm:b"), result("timm:c", **changes))
    assert [text for text in found.footnotes if note in text]
    noted = {found.rows[row] for column in found.columns for row, cell in column.cells.items() if cell.notes}
    assert noted == {"c"}


def untrained(spec: str, value: float, duplicates: int = 0) -> dict:
    content = result(spec, value, protocol={"name": "zero_shot"}, data={"across_duplicates": duplicates})
    del content["data"]["train"]
    return content


def test_a_protocol_without_a_training_set_has_no_footnotes_of_one(tmp_path):
    old = result("timm:c", 0.9, protocol={"name": "zero_shot"})  # as they were written once
    found = table(tmp_path, untrained("timm:a", 0.8, 7), untrained("timm:b", 0.7), old, result("timm:a", 0.6))
    assert found.footnotes == []
    assert found.data == ["shapes@shape"]
    assert all(cell.comparable for column in found.columns for cell in column.cells.values())


def test_the_same_images_elsewhere_without_a_training_set_are_the_same_data(tmp_path):
    moved = untrained("timm:b", 0.7)
    moved["data"]["spec"] = "shapes:moved"
    assert table(tmp_path, result("timm:a"), moved).data == ["shapes@shape"]


def test_notes_of_a_result_are_footnotes_of_its_headline(tmp_path):
    found = table(tmp_path, result("timm:a"), result("timm:b", details={"notes": ["k 200 left out"]}))
    assert found.footnotes == ["k 200 left out"]
    assert [len(column.cells[1].notes) for column in found.columns] == [1, 0]


def test_pixels_of_another_size_are_still_the_floor(tmp_path):
    small = {"image_size": 16, "resize": "squash", "crop_pct": 1.0}
    found = table(tmp_path, result("timm:a", 0.8), result("pixels:16", 0.3, encoder={"preprocessing": small}))
    assert found.footnotes == []
    assert found.columns[0].floor.value == 0.3


def test_other_settings_are_another_column(tmp_path):
    contents = [result(f"timm:{n}", protocol={"k": k}) for n, k in (("a", [5]), ("b", [5]), ("a", [20]))]
    found = table(tmp_path, *contents, result("pixels:32", protocol={"k": [20]}))
    headlines = {column.protocol: column for column in found.headlines}
    assert list(headlines) == ["knn (k [20])", "knn (k [5])"]
    assert headlines["knn (k [5])"].floor is None  # those pixels were looked at with another k
    assert headlines["knn (k [20])"].floor is not None


def test_data_of_one_name_from_different_places(tmp_path):
    easy = result("timm:a", on="shapes")
    hard = result("timm:a", on="shapes")
    hard["data"] |= {"spec": "shapes:hard", "test": {"n": 400, "identity": "hard"}}
    moved = result("timm:b", on="shapes")
    moved["data"] |= {"spec": "shapes:moved"}  # the same images elsewhere
    found = table(tmp_path, easy, hard, moved)
    assert found.data == ["shapes", "shapes:hard"]
    assert len(found.of("shapes")[0].cells) == 2


def test_equal_names_are_told_apart(tmp_path):
    contents = [result(spec) for spec in ("aimv2:runs/a", "random:runs/a", "timm:vit")]
    assert sorted(table(tmp_path, *contents).rows) == ["aimv2:runs/a", "random:runs/a", "vit"]
    later = result("timm:vit", encoder={"weights": "f00dfeed" * 8})
    assert "timm:vit f00dfeed" in table(tmp_path, *contents, later).rows


def test_a_second_result_of_a_cell_is_another_row(tmp_path):
    found = table(tmp_path, result(value=0.8), result(value=0.6))
    assert sorted(cell.metric.value for cell in found.columns[0].cells.values()) == [0.6, 0.8]
    assert len(set(found.rows)) == 2


def test_single_layers_are_left_to_the_plots(tmp_path):
    metrics = {"top1": entry(0.8), "top1@block_00": entry(0.2)}
    assert [c.metric for c in table(tmp_path, result(metrics=metrics)).columns] == ["top1"]
    assert [c.metric for c in table(tmp_path, result(metrics={"top1@block_00": entry(0.2)})).columns] == [
        "top1@block_00"
    ]


def test_values_that_are_no_shares_are_shown_as_they_are(tmp_path):
    column = table(tmp_path, result(metrics={"cider": entry(0.5) | {"value": 1.23, "stderr": 0.04}})).columns[0]
    assert column.with_stderr(column.cells[0].metric) == "1.230 ± 0.040"
