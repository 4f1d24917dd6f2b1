import csv
import io
import json
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from aimv2.data.shard_writer import write_shards
from aimv2.data.shards import Shards
from aimv2.ingest.pairs import Packing
from aimv2.ingest.tables import ImageTable

ROWS = [
    {"path": "a.jpg", "alt": 'a &amp;#39;dog, "Rex"', "long": "a dog\nin a garden", "n": 1},
    {"path": "sub/b.png", "alt": "", "long": "kočka 🐈", "n": 2},
    {"path": "../outside.jpg", "alt": "a secret", "long": "", "n": 3},
    {"path": "https://host/c.jpg", "alt": "far away", "long": "", "n": 4},
    {"path": "missing.jpg", "alt": "nothing", "long": "", "n": 5},
    {"path": "", "alt": "nowhere", "long": "", "n": 6},
    {"path": "a.jpg", "alt": "★★★", "long": "", "n": 7},
]
REASONS = {
    "the image is outside the folder": 2,
    "the image is a URL: nothing is downloaded (img2dataset does that)": 3,
    "no such image": 4,
    "no image path": 5,
    "no caption after cleaning": 6,
}


@pytest.fixture
def images(tmp_path):
    root = tmp_path / "images"
    (root / "sub").mkdir(parents=True)
    Image.new("RGB", (64, 48), "red").save(root / "a.jpg")
    Image.new("RGB", (64, 48), "blue").save(root / "sub" / "b.png")
    Image.new("RGB", (64, 48)).save(tmp_path / "outside.jpg")
    return root


def write_table(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        text = io.StringIO()
        form = {} if path.suffix == ".csv" else {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "quotechar": None}
        writer = csv.DictWriter(text, list(rows[0]), **form)
        writer.writeheader()
        writer.writerows(rows)
        path.write_text(text.getvalue(), newline="")
    return path


def table(path, images, captions=("alt", "long"), **packing):
    return ImageTable(path=path, root=images, image_column="path", caption_columns=captions, packing=Packing(**packing))


def written(out, source):
    result = write_shards(out, source)
    return list(Shards(sorted(out.glob("*.tar")))), result


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_every_kind_of_table_gives_the_same(tmp_path, images, kind):
    long = "a dog in a garden" if kind == "tsv" else ROWS[0]["long"]  # where no text has two lines
    path = write_table(tmp_path / f"table.{kind}", [ROWS[0] | {"long": long}, *ROWS[1:]])
    samples, result = written(tmp_path / "out", table(path, images, samples_per_shard=2))
    number = str if kind in ("csv", "tsv") else int  # these know texts only
    place = {
        "csv": lambda n: f"line {n + 2 + (n > 0)}",  # names come first, and one text has two lines
        "tsv": lambda n: f"line {n + 2}",
        "jsonl": lambda n: f"line {n + 1}",
        "parquet": lambda n: f"row {n}",
    }[kind]
    assert [(s.key, s.image, s.text, json.loads(s.json)) for s in samples] == [
        (
            "000000000",
            (images / "a.jpg").read_bytes(),
            b'a &amp;#39;dog, "Rex"',
            {
                "source": f"table.{kind}: {place(0)}",
                "captions": ['a &amp;#39;dog, "Rex"', long],
                "path": "a.jpg",
                "n": number(1),
            },
        ),
        (
            "000000001",
            (images / "sub" / "b.png").read_bytes(),
            "kočka 🐈".encode(),
            {"source": f"table.{kind}: {place(1)}", "captions": ["kočka 🐈"], "path": "sub/b.png", "n": number(2)},
        ),
    ]
    assert result.examples == {reason: [f"table.{kind}: {place(n)}"] for reason, n in REASONS.items()}


def test_lists_of_captions(tmp_path, images):
    rows = [{"path": "a.jpg", "alt": ["a dog", "un chien"], "long": "ein Hund"}]
    samples, _ = written(tmp_path / "out", table(write_table(tmp_path / "t.parquet", rows), images))
    assert samples[0].text == b"a dog"
    assert json.loads(samples[0].json)["captions"] == ["a dog", "un chien", "ein Hund"]


def test_columns_of_bytes_are_left_out_and_said_to_be(tmp_path, images):
    rows = [{"path": "a.jpg", "alt": "a dog", "long": "", "raw": b"\xff"}]
    samples, result = written(tmp_path / "out", table(write_table(tmp_path / "t.parquet", rows), images))
    assert "raw" not in json.loads(samples[0].json)
    assert result.notes == {"column 'raw' of bytes left out": 1}


def test_jobs_can_be_done_by_other_processes(tmp_path, images):
    rows = [dict(row, path="a.jpg") for row in ROWS * 3]
    jobs = list(table(write_table(tmp_path / "t.jsonl", rows), images, samples_per_shard=4).jobs())
    assert [(job.name, job.candidates) for job in jobs][-2:] == [("000004", 4), ("000005", 1)]
    for job in jobs:
        assert list(pickle.loads(pickle.dumps(job)).read()) == list(job.read())


def test_damaged_rows_are_counted(tmp_path, images):
    path = tmp_path / "t.csv"
    path.write_text("path,alt\na.jpg,a dog\na.jpg\n\na.jpg,a dog,more\n")
    _, result = written(tmp_path / "csv", table(path, images, ["alt"]))
    assert result.kept == 1 and result.dropped == {"a row of another length than the first": 2}
    path = tmp_path / "t.jsonl"
    path.write_text('{"path": "a.jpg", "alt": "a dog"}\n[1]\n{"path": \n{"path": 7, "alt": "a dog"}\n')
    _, result = written(tmp_path / "jsonl", table(path, images, ["alt"]))
    assert result.kept == 1 and result.dropped == {"a line that is not a JSON object": 2, "no image path": 1}


def test_another_table_is_refused(tmp_path, images):
    path = write_table(tmp_path / "t.csv", ROWS)
    written(tmp_path / "out", table(path, images))
    write_table(path, ROWS[::-1])
    with pytest.raises(ValueError, match=r"the contents of .*t\.csv are others than when .*out was written: write to"):
        written(tmp_path / "out", table(path, images))


def test_a_quote_in_a_tsv_is_a_character_like_any_other(tmp_path, images):
    path = tmp_path / "t.tsv"
    path.write_text('path\talt\na.jpg\t"Rex" is a dog\na.jpg\t"a dog\n')
    samples, _ = written(tmp_path / "out", table(path, images, ["alt"]))
    assert [s.text for s in samples] == [b'"Rex" is a dog', b'"a dog']


def test_lines_of_json_may_have_different_columns(tmp_path, images):
    rows = [{"path": "a.jpg", "alt": "a dog"}, {"path": "a.jpg", "long": "a long dog"}]
    samples, _ = written(tmp_path / "out", table(write_table(tmp_path / "t.jsonl", rows), images))
    assert [s.text for s in samples] == [b"a dog", b"a long dog"]


def test_a_field_that_is_too_long_costs_its_row_only(tmp_path, images):
    path = tmp_path / "t.csv"
    path.write_text("path,alt\na.jpg," + "x" * (1 << 20) + "x\na.jpg,a dog\n")
    samples, result = written(tmp_path / "out", table(path, images, ["alt"]))
    assert [s.text for s in samples] == [b"a dog"]
    assert result.examples == {"a field of over 1 MiB": ["t.csv: line 2"]}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_encodings(tmp_path, images, encoding, kind):
    path = write_table(tmp_path / f"t.{kind}", [{"path": "a.jpg", "alt": "kočka 🐈"}])
    path.write_text(path.read_text(), encoding)
    samples, result = written(tmp_path / "out", table(path, images, ["alt"]))
    assert samples[0].text == "kočka 🐈".encode() and not result.notes


def test_bytes_of_another_encoding_are_noted(tmp_path, images):
    path = tmp_path / "t.csv"
    path.write_bytes("path,alt\na.jpg,a café\na.jpg,a dog\n".encode("latin-1"))
    _, result = written(tmp_path / "out", table(path, images, ["alt"]))
    assert result.notes == {"rows with U+FFFD, which stands for bytes that are not in the table's encoding": 1}


def test_table_errors(tmp_path, images):
    for name, text, message in (
        ("t.csv", 'path,alt\na.jpg,"a dog\n', "line 2: unexpected end of data"),
        ("t.csv", "path;alt\na.jpg;x\n", "it has 'path;alt': separated by a semicolon, where .csv has a comma?"),
        ("t.tsv", "path,alt\na.jpg,x\n", "it has 'path,alt': separated by a comma, where .tsv has a tab?"),
        ("t.csv", "path, alt\na.jpg,x\n", "it has 'path', ' alt': the spaces around a name are part of it"),
        ("t.csv", "path,alt,alt\na.jpg,x,y\n", "2 columns are called 'alt', expected each name once"),
        ("t.csv", "path,text\na.jpg,x\n", "no column 'alt'; it has 'path', 'text'"),
        ("t.csv", "path,alt\n", "no row"),
        ("t.csv", "", "no row"),
        ("t.parquet", "PAR1", "not a parquet file"),
        ("t.xlsx", "", "expected a file whose extension is one of .csv, .tsv, .jsonl, .parquet"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message) as error:
            table(tmp_path / name, images, ["alt"])
        assert str(error.value).startswith(str(tmp_path / name)) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"none\.csv: no such file"):
        table(tmp_path / "none.csv", images)
    with pytest.raises(ValueError, match="nowhere: not a folder"):
        table(write_table(tmp_path / "t.csv", ROWS), tmp_path / "nowhere")
