"""A report of many results: report.md, report.html, which is one file with its pictures inside, and the pictures."""

import base64
import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from aimv2.evals.reports.files import Result, read_results
from aimv2.evals.reports.plots import PICTURES, draw_pictures
from aimv2.evals.reports.table import Cell, Column, Table, build_table
from aimv2.whole_files import whole_file

TITLE = "Frozen encoders"
MARKS = {"above_chance": "°", "above_floor": "ᵖ"}
LEGEND = (
    "Value ± standard error over the test samples, in per cent. **Bold**: the highest of its column. "
    f"{MARKS['above_chance']}: not above chance by 2 standard errors. "
    f"{MARKS['above_floor']}: not above raw pixels by 2 standard errors. "
    "Raw pixels: the best `pixels` encoder by the same protocol on the same images."
)
FOOT = ("chance", "raw pixels", "n")
FIRST_HASH = 8  # characters of a digest that are shown

STYLE = """
:root { color-scheme: light; --ink: #1d2330; --faint: #6b7385; --line: #dfe3ea; --bar: #e2ecf9; --best: #bfd9f5; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); margin: 2rem auto; max-width: 80rem; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem; }
p { max-width: 52rem; } .faint, footer { color: var(--faint); } img { max-width: 100%; border: 1px solid var(--line); }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { font-weight: 600; vertical-align: bottom; } thead th { border-bottom: 2px solid var(--ink); }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
tbody td { background: linear-gradient(to right, var(--bar) var(--share, 0%), transparent var(--share, 0%)); }
tbody td.best { background: linear-gradient(to right, var(--best) var(--share), transparent var(--share)); }
td.best .value { font-weight: 700; } td small, th small { color: var(--faint); font-weight: 400; }
sup { line-height: 0; } td.low .value { color: var(--faint); } tfoot td { color: var(--faint); background: none; }
tfoot tr:first-child td { border-top: 2px solid var(--ink); } li { margin: .15rem 0; }
"""


@dataclass(frozen=True, slots=True)
class Report:
    """What was written, and what was read for it."""

    folder: Path
    files: list[Path]
    results: int
    problems: list[str]  # one line for each JSON file that was left out


def write_report(folders: Iterable[str | Path], out: str | Path) -> Report:
    """Write report.md, report.html and the pictures of all results in `folders` into the folder `out`.

    Raises ValueError for a folder that is not there, and if there is no result.
    """
    results, problems = read_results(folders)
    table, out = build_table(results), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    pictures = draw_pictures(results, table, out)
    files = []
    for name, text in (
        ("report.md", markdown(results, table, problems, [path.name for path in pictures])),
        ("report.html", page(results, table, problems, pictures)),
    ):
        with whole_file(out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
        files.append(out / name)
    return Report(out, [*files, *pictures], len(results), problems)


def sections(table: Table) -> list[tuple[str, list[Column]]]:
    """(heading, columns): the headlines of all data, then the data of which there is more than that."""
    parts = [("Headlines", table.headlines)]
    parts += [(name, table.of(name)) for name in table.data if not all(column.headline for column in table.of(name))]
    return parts


def markdown(results: Sequence[Result], table: Table, problems: Sequence[str], pictures: Sequence[str]) -> str:
    """As written to report.md."""
    parts = [f"# {TITLE}", f"{_counted(results, table, problems)} {LEGEND}"]
    for heading, columns in sections(table):
        heads = ["encoder", *(_in_markdown(_head(c, heading)) for c in columns)]
        rows = [
            [_in_markdown(label), *(_markdown_cell(c, c.cells.get(row)) for c in columns)]
            for row, label in enumerate(table.rows)
            if any(row in c.cells for c in columns)
        ]
        rows += [[f"*{name}*", *(_foot(c, name) for c in columns)] for name in FOOT]
        parts += [f"## {_in_markdown(heading)}", _markdown_table(heads, rows)]
    if table.footnotes:
        parts.append("\n".join(f"- [{i}] {_in_markdown(note)}" for i, note in enumerate(table.footnotes, 1)))
    parts += [f"## {PICTURES[name][0]}\n\n{PICTURES[name][1]}\n\n![{PICTURES[name][0]}]({name})" for name in pictures]
    parts += ["## Results", _markdown_table(*_provenance(results, _in_markdown))]
    if problems:
        parts += ["## Left out", "\n".join(f"- {_in_markdown(line)}" for line in problems)]
    return "\n\n".join(parts) + "\n"


def page(results: Sequence[Result], table: Table, problems: Sequence[str], pictures: Sequence[Path]) -> str:
    """As written to report.html: no other file and no network is needed."""
    legend = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", _in_html(LEGEND))
    legend = re.sub(r"`(.+?)`", r"<code>\1</code>", legend)
    parts = [f"<h1>{TITLE}</h1>", f"<p>{_in_html(_counted(results, table, problems))} {legend}</p>"]
    for heading, columns in sections(table):
        parts += [f"<h2>{_in_html(heading)}</h2>", _html_table(table, columns, heading)]
    if table.footnotes:
        notes = "".join(f"<li>{_in_html(note)}</li>" for note in table.footnotes)
        parts.append(f'<ol class="faint">{notes}</ol>')
    for path in pictures:
        title, words = (_in_html(text) for text in PICTURES[path.name])
        data = base64.b64encode(path.read_bytes()).decode()
        parts.append(f'<h2>{title}</h2><p>{words}</p><img alt="{title}" src="data:image/png;base64,{data}">')
    heads, rows = _provenance(results, _in_html)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    head = "".join(f"<th>{name}</th>" for name in heads)
    parts.append(f'<h2>Results</h2><div class="wide"><table><thead><tr>{head}</tr></thead>{body}</table></div>')
    if problems:
        lines = "".join(f"<li>{_in_html(line)}</li>" for line in problems)
        parts.append(f"<h2>Left out</h2><ul>{lines}</ul>")
    content = "\n".join(parts)
    head = f'<meta charset="utf-8"><title>{TITLE}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{content}\n</body></html>\n'


def _counted(results: Sequence[Result], table: Table, problems: Sequence[str]) -> str:
    text = f"{len(results):,} results of {len(table.rows):,} encoders on {len(table.data):,} data sets."
    return text + (f" JSON files left out: {len(problems):,}, named at the end." if problems else "")


def _head(column: Column, heading: str) -> str:
    return column.title if column.data == heading else f"{column.data}: {column.title}"


def _foot(column: Column, name: str) -> str:
    if name == "n":
        return f"{column.n:,}"
    if name == "chance":
        return "" if column.chance is None else column.format(column.chance)
    return "" if column.floor is None else column.with_stderr(column.floor)


def _marks(cell: Cell) -> str:
    return "".join(mark for name, mark in MARKS.items() if not getattr(cell, name))


def _markdown_cell(column: Column, cell: Cell | None) -> str:
    if cell is None:
        return ""
    text = column.with_stderr(cell.metric)
    notes = "".join(f"\\[{note}\\]" for note in cell.notes)
    return f"**{text}**{_marks(cell)}{notes}" if cell.best else f"{text}{_marks(cell)}{notes}"


def _markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned, to be read as it is: the first column to the left, the others to the right. Cells are escaped."""
    widths = [max(3, *map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = [
        [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        for row in (heads, *rows)
    ]
    lines.insert(1, ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _html_table(table: Table, columns: Sequence[Column], heading: str) -> str:
    head = "".join(f"<th>{_html_head(column, heading)}</th>" for column in columns)
    rows = [
        f"<tr><td>{_in_html(label)}</td>{''.join(_html_cell(c, c.cells.get(row)) for c in columns)}</tr>"
        for row, label in enumerate(table.rows)
        if any(row in c.cells for c in columns)
    ]
    foot = [f"<tr><td>{name}</td>{''.join(f'<td>{_foot(c, name)}</td>' for c in columns)}</tr>" for name in FOOT]
    return (
        f'<div class="wide"><table><thead><tr><th>encoder</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody><tfoot>{''.join(foot)}</tfoot></table></div>"
    )


def _html_head(column: Column, heading: str) -> str:
    data = "" if column.data == heading else f"{_in_html(column.data)}<br>"
    return f"{data}{_in_html(column.protocol)}<br><small>{_in_html(column.metric)}</small>"


def _html_cell(column: Column, cell: Cell | None) -> str:
    if cell is None:
        return "<td></td>"
    share = f' style="--share:{100 * cell.metric.value:.1f}%"' if column.percent else ""
    names = [
        name for name, true in (("best", cell.best), ("low", not (cell.above_chance and cell.above_floor))) if true
    ]
    kind = f' class="{" ".join(names)}"' if names else ""
    value, error = column.format(cell.metric.value), column.format(cell.metric.stderr)
    notes = f"<sup>{_marks(cell)}{','.join(map(str, cell.notes))}</sup>" if cell.notes or _marks(cell) else ""
    return f'<td{kind}{share}><span class="value">{value}</span> <small>± {error}</small>{notes}</td>'


def _provenance(results: Sequence[Result], escape) -> tuple[list[str], list[list[str]]]:
    """Heads and rows: where each result comes from."""
    heads = ["file", "encoder", "weights", "preprocessing", "test set", "torch", "device", "ranks", "seconds"]
    rows = []
    for result in results:
        encoder, environment = result.encoder, result.environment
        digests = (encoder.get("weights"), encoder.get("preprocessing_hash"), result.test)
        cells = [result.path.name, encoder["spec"], *(str(digest or "")[:FIRST_HASH] for digest in digests)]
        cells += [str(environment.get(name, "")) for name in heads[5:]]
        rows.append([escape(cell) for cell in cells])
    return heads, rows


def _clean(text: str) -> str:
    """On one line; characters that can't be seen, and could turn or hide what follows, as their numbers."""
    return "".join(c if c.isprintable() else " " if c in "\n\r\t" else ascii(c)[1:-1] for c in text)


def _in_html(text: str) -> str:
    return html.escape(_clean(text))


def _in_markdown(text: str) -> str:
    """As GitHub shows it, character by character."""
    text = re.sub(r"([\\`*\[\]<>|~$&#!])", r"\\\1", _clean(text))
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)
