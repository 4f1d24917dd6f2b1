"""One table for every encoder: a row an encoder, a column a metric of a protocol on a data set.

A column is comparable from top to bottom or says where it is not.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from aimv2.evals.reports.files import Result
from aimv2.evals.results import Metric

SIGMAS = 2  # standard errors above chance, or above the pixels, from which on a value counts as above


@dataclass(slots=True)
class Cell:
    """A value, and what has to be said of it."""

    result: Result
    metric: Metric
    above_chance: bool = True  # also where chance is unknown
    above_floor: bool = True
    comparable: bool = True  # measured on the column's own data
    best: bool = False
    notes: list[int] = field(default_factory=list)  # footnotes, from 1


@dataclass(slots=True)
class Column:
    """A metric of one protocol with one choice of settings on one data set. Cells are by row."""

    data: str
    protocol: str  # with the settings that tell it from others of its name
    metric: str
    headline: bool
    cells: dict[int, Cell]
    n: int = 0
    chance: float | None = None
    floor: Metric | None = None  # of the pixels, by the same protocol, on the same data

    @property
    def title(self) -> str:
        return f"{self.protocol} {self.metric}"

    @property
    def percent(self) -> bool:
        """Whether all values lie between 0 and 1; else they are shown as they are."""
        return all(0 <= cell.metric.value <= 1 for cell in self.cells.values())

    def format(self, value: float) -> str:
        return f"{100 * value:.1f}" if self.percent else f"{value:.3f}"

    def with_stderr(self, metric: Metric) -> str:
        return f"{self.format(metric.value)} ± {self.format(metric.stderr)}"


@dataclass(slots=True)
class Table:
    """Rows are encoders: the best first, raw pixels last."""

    rows: list[str]
    columns: list[Column]
    footnotes: list[str]

    def of(self, data: str) -> list[Column]:
        return [column for column in self.columns if column.data == data]

    @property
    def headlines(self) -> list[Column]:
        return [column for column in self.columns if column.headline]

    @property
    def data(self) -> list[str]:
        return list(dict.fromkeys(column.data for column in self.columns))


def build_table(results: Sequence[Result]) -> Table:
    """Sort results into rows and columns, find each column's chance and floor, and note what can't be compared.

    Metrics of single layers ("top1@block_03") are for the plots, unless such a one is the headline.
    """
    data, protocols = data_titles(results), protocol_titles(results)
    rows = _rows(results, data, protocols)
    columns: dict[tuple, Column] = {}
    for result, row in zip(results, rows, strict=True):
        for name, metric in result.metrics.items():
            if "@" in name and name != result.headline:
                continue
            key = (data[result.path], protocols[result.path], name)
            column = columns.setdefault(key, Column(*key, headline=False, cells={}))
            column.headline |= name == result.headline
            column.cells[row] = Cell(result, metric)
    ordered = sorted(columns.values(), key=lambda c: (c.data, c.protocol, not c.headline))
    footnotes: dict[str, int] = {}
    for column in ordered:
        _judge(column, footnotes)
    return _ordered(_labels(results, rows), ordered, list(footnotes))


def data_titles(results: Sequence[Result]) -> dict[Path, str]:
    """A result's path -> the name of its data; the spec, where different specs with different images share a name."""
    images: dict[str, dict[str, set]] = {}
    for r in results:
        images.setdefault(r.data["name"], {}).setdefault(_spec(r), set()).add((r.test, r.train))
    titles = {}
    for result in results:
        own, name = _spec(result), result.data["name"]
        same = [spec for spec, sets in images[name].items() if _overlap(sets, images[name][own])]  # a folder was moved
        titles[result.path] = name if len(same) == len(images[name]) else same[0]
    return titles


def _overlap(some: set[tuple], others: set[tuple]) -> bool:
    """Whether two (test, train) are the same images, as far as is known: a protocol may have no training set."""
    return any(
        one[0] == other[0] and (one[1] == other[1] or None in (one[1], other[1])) for one in some for other in others
    )


def _spec(result: Result) -> str:
    return str(result.data.get("spec", result.data["name"]))


def protocol_titles(results: Sequence[Result]) -> dict[Path, str]:
    """A result's path -> its protocol's name, and in brackets the settings in which results on these data differ."""
    data = data_titles(results)
    groups: dict[tuple[str, str], list[dict]] = {}
    for result in results:
        groups.setdefault((result.protocol["name"], data[result.path]), []).append(result.settings)
    titles = {}
    for result in results:
        rivals = groups[result.protocol["name"], data[result.path]]
        names = dict.fromkeys(name for settings in rivals for name in settings)
        different = [name for name in names if len({_text(settings.get(name)) for settings in rivals}) > 1]
        values = ", ".join(f"{name} {_text(result.settings.get(name))}" for name in different)
        titles[result.path] = result.protocol["name"] + (f" ({values})" if values else "")
    return titles


def _rows(results: Sequence[Result], data: dict[Path, str], protocols: dict[Path, str]) -> list[int]:
    """A number for each result: of its encoder, and of a second row where two results would share a cell."""
    numbers: dict[tuple, int] = {}
    taken: set[tuple] = set()
    rows = []
    for result in results:
        encoder = result.encoder
        weights = (encoder["spec"], encoder.get("weights"), encoder.get("preprocessing_hash"))
        place = (data[result.path], protocols[result.path])
        repeat = 0
        while (*weights, repeat, *place) in taken:
            repeat += 1
        taken.add((*weights, repeat, *place))
        rows.append(numbers.setdefault((*weights, repeat), len(numbers)))
    return rows


def _labels(results: Sequence[Result], rows: Sequence[int]) -> dict[int, str]:
    """What each row is called: the name, else the spec, else with the weights' digest, else with a number."""
    encoders = {row: result.encoder for result, row in zip(results, rows, strict=True)}
    choices = {
        row: (e["name"], e["spec"], f"{e['spec']} {str(e.get('weights'))[:8]}", f"{e['spec']} ({row + 1})")
        for row, e in encoders.items()
    }
    labels = {}
    for row, names in choices.items():
        rivals = [other for number, other in choices.items() if number != row]
        labels[row] = next((n for i, n in enumerate(names) if all(n != other[i] for other in rivals)), names[-1])
    return labels


def _judge(column: Column, footnotes: dict[str, int]) -> None:
    """Fill in chance, floor, n and what has to be said of each cell; new footnotes get the next number."""
    cells = list(column.cells.values())
    trains = all(cell.result.train is not None for cell in cells)  # one protocol does or does not
    own = Counter(_data_key(cell, trains) for cell in cells).most_common(1)[0][0]
    seen = Counter(_geometry(cell.result) for cell in cells if not cell.result.is_floor).most_common(1)
    for cell in cells:
        cell.comparable = _data_key(cell, trains) == own
        notes = _reservations(cell, own, seen[0][0] if seen else None)
        for note in notes + [str(note) for note in cell.result.details.get("notes", ()) if column.headline]:
            cell.notes.append(footnotes.setdefault(note, len(footnotes) + 1))
    comparable = [cell for cell in cells if cell.comparable]
    column.n, column.chance = comparable[0].metric.n, comparable[0].metric.chance
    floors = [cell.metric for cell in comparable if cell.result.is_floor]
    column.floor = max(floors, key=lambda metric: metric.value, default=None)
    for cell in cells:
        value, error = cell.metric.value, cell.metric.stderr
        if cell.metric.chance is not None:
            cell.above_chance = value > cell.metric.chance + SIGMAS * error
        if column.floor is not None and not cell.result.is_floor:
            cell.above_floor = value > column.floor.value + SIGMAS * (error**2 + column.floor.stderr**2) ** 0.5
    if column.chance is not None and len(comparable) > 1:  # only then it is known that more is better
        highest = max(cell.metric.value for cell in comparable)
        for cell in comparable:
            cell.best = cell.metric.value == highest and cell.above_chance


def _data_key(cell: Cell, trains: bool) -> tuple:
    return cell.result.test, cell.result.train if trains else None, cell.metric.n, cell.metric.chance


def _geometry(result: Result) -> tuple | None:
    """What part of an image an encoder sees, at which size. Means and filters are the encoder's own affair."""
    p = result.encoder.get("preprocessing")
    return (p.get("image_size"), p.get("resize"), p.get("crop_pct")) if isinstance(p, dict) else None


def _reservations(cell: Cell, own: tuple, seen: tuple | None) -> list[str]:
    notes, result = [], cell.result
    test, train, n, chance = own
    if result.test != test:
        notes.append(f"Other test images or labels than the column's: n {cell.metric.n:,}. Not comparable.")
    elif (cell.metric.n, cell.metric.chance) != (n, chance):
        notes.append(f"Another count or chance than the column's: n {cell.metric.n:,}. Not comparable.")
    if train is not None and result.train != train:
        notes.append("Trained on other images or labels than the column's. Not comparable.")
    geometry = _geometry(result)
    if not result.is_floor and geometry != seen and geometry and seen:
        size, resize, crop = geometry
        notes.append(f"Sees images differently than the column's others: {size} pixels, {resize}, crop {crop}.")
    duplicates = result.data.get("across_duplicates")
    if duplicates and result.train is not None:
        notes.append(f"{duplicates:,} test images of {result.data['name']} are in its training set too.")
    unreadable = (result.data["test"] or {}).get("unreadable")
    if unreadable:
        notes.append(f"{unreadable:,} test images of {result.data['name']} can't be read and count as wrong.")
    return notes


def _ordered(labels: dict[int, str], columns: list[Column], footnotes: list[str]) -> Table:
    """Rows by their mean share of the best headline in their columns; pixels last."""
    shares: dict[int, list[float]] = {row: [] for row in labels}
    floors = set()
    for column in columns:
        highest = max(cell.metric.value for cell in column.cells.values())
        for row, cell in column.cells.items():
            if column.headline:
                shares[row].append(cell.metric.value / highest if highest > 0 else 0.0)
            if cell.result.is_floor:
                floors.add(row)
    order = sorted(labels, key=lambda row: (row in floors, -sum(shares[row]) / max(1, len(shares[row])), labels[row]))
    for column in columns:
        column.cells = {order.index(row): cell for row, cell in column.cells.items()}
    return Table([labels[row] for row in order], columns, footnotes)


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)
