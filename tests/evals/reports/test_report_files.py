import json

import pytest
from made_results import result, write_result

from aimv2.evals.reports.files import read_result, read_results
from aimv2.evals.results import Metric


def test_a_result_is_read_as_it_was_written(tmp_path):
    path = write_result(tmp_path, result("pixels:32@output", 0.5, hash="abc"))
    read = read_result(path)
    assert read.headline == "top1"
    assert read.metrics["top1"] == Metric(0.5, 0.025, 400, 1 / 6)  # sqrt(0.5 * 0.5 / 400)
    assert read.is_floor
    assert not read_result(write_result(tmp_path, result("timm:pixels"))).is_floor
    assert read.settings == {"k": [10, 20], "temperature": 0.07}
    assert (read.test, read.train) == ("shapes@shape test", "shapes@shape train")
    assert read.samples_path == path.with_suffix(".samples.jsonl")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("\udcff", "not JSON"),
        ("[1]", "format None"),
        (json.dumps({"format": "aimv2 preparation 1"}), "format 'aimv2 preparation 1', expected 'aimv2 evaluation 1'"),
        (json.dumps(result() | {"metrics": {}}), "metrics {}"),
        (json.dumps(result(encoder={"spec": 3})), "encoder.spec 3"),
        (json.dumps(result(data={"test": {"n": 3}})), "data.test"),
        (json.dumps(result(metrics={"top1": {"value": 0.5}})), "metric top1"),
        (json.dumps(result(metrics={"top1": 0.5})), "metric top1"),
        (json.dumps(result(metrics={"top1": {"value": float("nan"), "stderr": 0, "n": 3}})), "metric top1"),
    ],
)
def test_what_is_no_result_is_named(tmp_path, text, message):
    path = tmp_path / "x.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"x\.json") as raised:
        read_result(path)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_folders_are_read_once_and_problems_are_listed(tmp_path):
    for folder in ("a", "b"):
        write_result(tmp_path / folder, result(hash="same"))
    write_result(tmp_path / "b", result(hash="other"))
    (tmp_path / "b" / "broken.json").write_text("{")
    results, problems = read_results([tmp_path / "a", tmp_path / "b"])
    assert [r.hash for r in results] == ["same", "other"]
    assert len(problems) == 1
    assert "broken.json" in problems[0]


def test_one_evaluation_with_two_outcomes_is_a_problem(tmp_path):
    """As from two machines; the same up to rounding is not."""
    for folder, value in (("a", 0.8), ("b", 0.8 + 1e-9), ("c", 0.7)):
        write_result(tmp_path / folder, result(value=value, hash="same"))
    results, problems = read_results([tmp_path / name for name in "abc"])
    assert [r.metrics["top1"].value for r in results] == [0.8]
    (problem,) = problems
    assert problem.startswith(str(tmp_path / "c"))
    assert "the same evaluation as" in problem
    assert "top1 is 0.700000, not 0.800000" in problem


def test_files_among_the_settings_are_told_apart_by_digest(tmp_path):
    content = result(protocol={"name": "zero_shot", "templates": "t.txt", "files": {"templates": "abcdef0123456789"}})
    settings = read_result(write_result(tmp_path, content)).settings
    assert settings["templates"] == "t.txt"
    assert settings["templates digest"] == "abcdef01"
    assert "files" not in settings


def test_no_results_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="expected a folder"):
        read_results([tmp_path / "none"])
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"no result among 1 JSON files, expected at least one; .*broken\.json"):
        read_results([tmp_path])
