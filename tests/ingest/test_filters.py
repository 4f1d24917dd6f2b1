import math

import numpy as np
import pytest

from aimv2.ingest.filters import Filter, check_columns, find_thresholds


@pytest.mark.parametrize(
    ("text", "column", "sign", "threshold", "quantile"),
    [
        ("aspect <= 3", "aspect", "<=", 3.0, None),
        ("clip>=0.28", "clip", ">=", 0.28, None),
        ("  a.b  !=  -1e-3 ", "a.b", "!=", -1e-3, None),
        ("n == 0", "n", "==", 0.0, None),
        ("n<inf", "n", "<", math.inf, None),
        ("clip > quantile:0.5", "clip", ">", None, 0.5),
        ("clip >= quantile:1", "clip", ">=", None, 1.0),
    ],
)
def test_filters_are_read(text, column, sign, threshold, quantile):
    f = Filter.parse(text)
    assert (f.column, f.operator, f.threshold, f.quantile) == (column, sign, threshold, quantile)
    assert Filter.parse(str(f)) == f


@pytest.mark.parametrize(
    "text",
    [
        *("", "clip", "clip 3", "clip => 3", "clip = 3", "clip >= three", ">= 3", "clip >= 3 4", "two words >= 3"),
        *("clip >= nan", "clip >= quantile:", "clip >= quantile:nan", "clip >= quantile:1.5", "clip < quantile:-0.1"),
    ],
)
def test_what_is_no_filter_is_named(text):
    with pytest.raises(ValueError, match=r"^filter .*: expected COLUMN >= \|") as error:
        Filter.parse(text)
    assert repr(text) in str(error.value) and "\n" not in str(error.value)


def test_operators():
    values = np.array([1.0, 2.0, 3.0, math.nan])
    passed = {sign: Filter.parse(f"x {sign} 2").passes(values).tolist() for sign in (">=", "<=", ">", "<", "==", "!=")}
    assert passed == {
        ">=": [False, True, True, False],
        "<=": [True, True, False, False],
        ">": [False, False, True, False],
        "<": [True, False, False, False],
        "==": [False, True, False, False],
        "!=": [True, False, True, False],
    }


def test_an_unknown_column_is_an_error_that_lists_those_there_are():
    check_columns([Filter.parse("a >= 1")], ["b", "a"])
    with pytest.raises(ValueError, match=r"filter 'c >= quantile:0\.5': no column 'c'; there are a, b"):
        check_columns([Filter.parse("a >= 1"), Filter.parse("c >= quantile:0.5")], ["b", "a"])


@pytest.fixture
def shards(monkeypatch):
    """Three shards without files: their columns."""
    rng = np.random.default_rng(0)
    tables = [{"x": rng.normal(size=n), "y": rng.integers(0, 5, n).astype(float)} for n in (30, 1, 70)]
    for table in tables:
        table["x"][rng.random(len(table["x"])) < 0.2] = np.nan
        table["empty"] = np.full(len(table["x"]), np.nan)
    monkeypatch.setattr("aimv2.ingest.filters.ShardColumns", lambda columns: columns)
    return tables


def test_thresholds_are_quantiles_of_all_values_there_are(shards):
    texts = [
        "x >= quantile:0.5",
        "y <= quantile:0.9",
        "x < quantile:0.123",
        "x >= 0.25",
        "y > quantile:0",
        "y < quantile:1",
    ]
    found = find_thresholds([Filter.parse(text) for text in texts], shards, samples=101)
    x, y = (np.concatenate([table[name] for table in shards]) for name in ("x", "y"))
    assert np.isnan(x).any()
    expected = [np.nanquantile(x, 0.5), np.quantile(y, 0.9), np.nanquantile(x, 0.123), 0.25, y.min(), y.max()]
    assert [f.threshold for f in found] == expected
    assert [str(f) for f in found] == texts  # the quantile, not its value, is what was asked for


def test_a_column_without_values_has_no_quantile(shards):
    with pytest.raises(ValueError, match="no sample has a value of empty"):
        find_thresholds([Filter.parse("empty > quantile:0.5")], shards, samples=101)
