import html.parser
import re

import numpy as np
import pytest
from made_results import CLASSES, entry, result, write_result
from PIL import Image

from aimv2.evals.reports.pages import write_report
from aimv2.evals.reports.plots import PICTURES

NASTY = "timm:<script>alert(1)</script>|*b*`$x$`_y_\u202e\n"


def swept(spec: str, value: float, **changes) -> dict:
    """With layers, a sweep and classes."""
    layers = {f"top1@block_{i:02d}": entry(value - 0.05 * abs(i - 5)) for i in range(8)}
    layers |= {"top1@blocks_02-07": entry(value), "top1@output": entry(value)}
    sweep = [{"lr": lr, "weight_decay": wd, "held_out": value - lr} for lr in (1e-4, 1e-3) for wd in (0.05, 0.1)]
    per_class = {name: {"value": value, "n": 60} for name in CLASSES} | {"<b>empty</b>": {"value": None, "n": 0}}
    details = {"sweep": sweep, "per_class": per_class}
    shots = {f"top1_{count}_shot": entry(value / 2) for count in (1, 2, 4)}
    return result(spec, value, metrics={"top1": entry(value), **layers, **shots}, details=details, **changes)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    for content in (swept("aimv2:runs/a", 0.9), swept(NASTY, 0.3, encoder={"name": NASTY}), result("pixels:32", 0.25)):
        write_result(folder, content)
    write_result(folder, result("aimv2:runs/a", 0.1, on="digits|<i>"))
    (folder / "<i>broken.json").write_text("{")
    return write_report([folder], folder / "report")


class Reader(html.parser.HTMLParser):
    """Tags, and the texts between them."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.texts, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_all_files_are_there(report):
    assert {path.name for path in report.files} == {"report.md", "report.html", *PICTURES}
    assert report.results == 4
    assert len(report.problems) == 1
    for path in report.files[2:]:
        with Image.open(path) as image:
            assert np.asarray(image.convert("L")).std() > 5, path  # something is drawn


def test_the_page_is_whole_by_itself_and_escaped(report):
    page = Reader((report.folder / "report.html").read_text())
    assert page.open == []  # every tag is closed
    tags = {tag for tag, _ in page.tags}
    assert "script" not in tags
    assert "i" not in tags  # of the data's and the file's names
    references = [value for _, a in page.tags for name, value in a.items() if name in ("src", "href")]
    assert len(references) == len(PICTURES)
    assert all(reference.startswith("data:image/png;base64,") for reference in references)
    assert any("<script>alert(1)</script>|*b*`$x$`_y_\\u202e" in text for text in page.texts)
    assert any("<i>broken.json" in text for text in page.texts)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_the_markdown_table_has_its_columns_and_no_markup_of_names(report):
    text = (report.folder / "report.md").read_text()
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("| encoder")]
    for lines in tables:
        assert len({len(cells(line)) for line in lines}) == 1
    rows = {cells(line)[0]: cells(line)[1:] for line in tables[0]}
    assert cells(tables[0][0]) == ["encoder", "digits\\|\\<i\\>: knn top1", "shapes@shape: knn top1"]
    assert rows["a"] == ["10.0 ± 1.5°", "**90.0 ± 1.5**"]  # sqrt(0.1 * 0.9 / 400) is 0.015
    assert rows["*chance*"] == ["16.7", "16.7"]
    assert rows["*raw pixels*"] == ["", "25.0 ± 2.2"]
    assert rows["*n*"] == ["400", "400"]
    nasty = next(name for name in rows if "script" in name)
    assert nasty == "timm:\\<script\\>alert(1)\\</script\\>\\|\\*b\\*\\`\\$x\\$\\`\\_y\\_\\\\u202e"
    assert rows[nasty] == ["", "30.0 ± 2.3ᵖ"]  # 0.05 above the pixels, whose error and its own are 0.032 together
    assert "JSON files left out: 1" in text
    assert "\\<i\\>broken.json" in text


def test_only_pictures_with_something_to_show(tmp_path):
    write_result(tmp_path, result(details={"notes": ["none of it"]}))
    report = write_report([tmp_path], tmp_path / "report")
    assert [path.name for path in report.files] == ["report.md", "report.html", "encoders.png"]
