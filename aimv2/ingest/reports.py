"""What a preparation did: `report.json` for programs, `report.md` for people."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np

from aimv2.ingest.downloads import Download
from aimv2.ingest.selection import Selection
from aimv2.ingest.shard_columns import open_columns
from aimv2.whole_files import whole_file

FORMAT = "aimv2 preparation 1"
QUANTILES = {"lowest": 0, "1 %": 0.01, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "99 %": 0.99, "highest": 1}
MOST_VALUES = 100_000  # of a column, for pictures and summaries
FEWEST_READ = 100  # shards for these values, where there are more
MOST_LISTED = 20  # lines of one kind
NOT_LOOKED_FOR = "Images that repeat an earlier one were not looked for."
HYGIENE = {
    "escaped": "had HTML entities",
    "tags": "had HTML tags",
    "invisible": "had control, zero-width or bidirectional characters",
    "not_utf8": "were not valid UTF-8",
    "cut": "were too long and are cut",
    "empty": "are empty after cleaning; their samples are kept and trained on for the pixels only",
}


@dataclass(slots=True, kw_only=True)
class Report:
    """All that a preparation found and did."""

    folder: Path
    command: str
    tars: int
    download: Download | None  # None: not from img2dataset
    damage: list[str] = field(default_factory=list)  # lines `SHARD: byte OFFSET: REASON`
    selection: Selection = field(default_factory=lambda: Selection([], []))
    columns: dict[str, dict[str, float]] = field(default_factory=dict)  # name -> share with a value, quantiles
    ignored: Counter[str] = field(default_factory=Counter)  # members not read, by extension
    notes: list[str] = field(default_factory=list)  # lines on what may have gone unseen
    boxes: str = ""  # characters that samples.png cannot show
    left: bool = False  # the rows kept and the list are as they were

    @property
    def unfinished(self) -> list[str]:
        return self.download.unfinished if self.download else []

    @property
    def measured_caption(self) -> str | None:
        """Where the captions are that were measured; None if none were."""
        return next(iter(self.selection.captions), None)

    def summarise(self, values: dict[str, np.ndarray]) -> None:
        """Fill `columns` from a sample of their values."""
        for name, column in values.items():
            present = column[~np.isnan(column)]
            if present.size:
                quantiles = np.quantile(present, list(QUANTILES.values()))
                share = {"share": present.size / column.size}
                self.columns[name] = share | {k: float(v) for k, v in zip(QUANTILES, quantiles, strict=True)}

    def contents(self) -> dict:
        """As written to report.json."""
        selection = self.selection
        left, dropped = selection.samples, []
        for reason in selection.reasons.values():
            left -= reason.dropped
            dropped.append({**asdict(reason), "left": left})
        return {
            "format": FORMAT,
            "command": self.command,
            "shards": {"found": self.tars, "prepared": len(selection.shards), "unfinished": self.unfinished},
            "damage": self.damage,
            "download": self.download and {f.name: getattr(self.download, f.name) for f in fields(Download)},
            "samples": selection.samples,
            "kept": selection.kept,
            "dropped": dropped,
            "thresholds": [{**asdict(f), "filter": str(f)} for f in selection.filters],
            "duplicates": selection.duplicates,
            "captions": dict(selection.captions),
            "hygiene": dict(selection.hygiene),
            "formats": dict(selection.formats.most_common()),
            "ignored": dict(self.ignored.most_common()),
            "notes": self.notes,
            "columns": self.columns,
        }

    def summary(self) -> str:
        """Shards, what was dropped and why, thresholds: for a terminal, and the beginning of report.md."""
        selection = self.selection
        parts = [self._shards()]
        if self.download is not None:
            parts.append(_download(self.download))
        if self.left:
            parts.append(f"{selection.samples:,} samples.")
        elif selection.samples:
            parts.append(self._dropped())
            if any(f.quantile is not None for f in selection.filters):
                rows = [[str(f), f"{f.threshold:.6g}"] for f in selection.filters if f.quantile is not None]
                parts.append(table(["filter", "threshold"], rows))
            repeats = [f"{n:,} by {kind}" for kind, n in selection.duplicates.items()]
            parts.append(f"Images that repeat an earlier one: {', '.join(repeats)}." if repeats else NOT_LOOKED_FOR)
        if self.ignored:
            counts = [f"{n:,} {_extension(name)}" for name, n in self.ignored.most_common(MOST_LISTED)]
            parts.append(f"Members not read: {', '.join(counts)}{', ...' if len(self.ignored) > MOST_LISTED else ''}")
        parts += self.notes
        return "\n\n".join(parts)

    def markdown(self) -> str:
        """As written to report.md."""
        selection = self.selection
        command = f"```sh\n{self.command}\n```\n\n" if self.command else ""
        formats = [[name, f"{n:,}", _share(n, selection.samples)] for name, n in selection.formats.most_common()]
        captions = [[name, f"{n:,}", _share(n, selection.samples)] for name, n in selection.captions.items()]
        shown = {name: c for name, c in self.columns.items() if name.removeprefix("caption_") not in HYGIENE}
        columns = [[name, _share(c["share"], 1), *(f"{c[q]:.4g}" for q in QUANTILES)] for name, c in shown.items()]
        parts = [f"# {self.folder.resolve().name}\n\n{command}{self.summary()}"]
        if self.damage:
            parts.append("## Damage\n\n" + _listed([f"`{line}`" for line in self.damage]))
        parts.append("## Images\n\n" + table(["format", "samples", "share"], formats))
        if selection.captions:
            parts.append("## Captions\n\n" + table(["in", "samples", "share"], captions) + "\n\n" + self._hygiene())
        parts.append("## Columns\n\nBefore any filter.\n\n" + table(["column", "samples", *QUANTILES], columns))
        parts.append("![histograms](histograms.png)\n\n![samples](samples.png)")
        parts += [self.boxes] if self.boxes else []
        return "\n\n".join(parts) + "\n"

    def _shards(self) -> str:
        empty = self.download.empty if self.download else []
        damaged = self.tars - len(self.selection.shards) - len(self.unfinished) - len(empty)
        counts = [f"{len(self.selection.shards):,} of {self.tars:,} shards"]
        counts += [f"{damaged:,} left out as damaged"] if damaged else []
        counts += [f"{len(self.unfinished):,} unfinished"] if self.unfinished else []
        counts += [f"{len(empty):,} empty"] if empty else []
        return ", ".join(counts) + "."

    def _dropped(self) -> str:
        contents = self.contents()
        total = contents["samples"]
        rows = [["all", "", "", f"{total:,}", _share(total, total)]]
        for entry in contents["dropped"]:
            if entry["alone"] or entry["reason"].startswith("not "):  # a filter is shown even if it drops nothing
                left = entry["left"]
                rows.append(
                    [entry["reason"], f"{entry['alone']:,}", f"{entry['dropped']:,}", f"{left:,}", _share(left, total)]
                )
        rows.append(
            ["kept", "", f"{total - contents['kept']:,}", f"{contents['kept']:,}", _share(contents["kept"], total)]
        )
        return table(["samples", "concerned", "dropped", "left", "share"], rows)

    def _hygiene(self) -> str:
        where, counts = self.measured_caption, self.selection.hygiene
        rows = [
            [text, f"{counts[flag]:,}", _share(counts[flag], self.selection.captions[where])]
            for flag, text in HYGIENE.items()
        ]
        return f"Of the captions in {where}:\n\n" + table(["captions that", "number", "share"], rows)


def write_report(report: Report, folder: Path) -> None:
    """Write `folder`/report.json and report.md, each whole or not at all."""
    for name, text in (
        ("report.json", json.dumps(report.contents(), indent=1) + "\n"),
        ("report.md", report.markdown()),
    ):
        with whole_file(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def sample_values(selection: Selection, names: Sequence[str]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """({column: (n,) float32 with NaN}, (n,) bool whether kept) of about MOST_VALUES samples of all parts of the data.

    Of many shards some are read whole, which is much quicker than a little of each; of few, some rows of each.
    """
    beyond = -(-selection.samples // MOST_VALUES)
    numbers = range(0, len(selection.shards), min(beyond, max(1, len(selection.shards) // FEWEST_READ)))
    step = -(-sum(map(selection.rows, numbers)) // MOST_VALUES)
    values: dict[str, list[np.ndarray]] = {name: [] for name in names}
    kept, begin = [], 0
    for number, columns in zip(numbers, open_columns(selection.shards[n] for n in numbers), strict=True):
        rows = slice(-begin % step, None, step)
        for name in names:
            with np.errstate(over="ignore"):
                values[name].append(columns[name][rows].astype(np.float32))
        kept.append(selection.mask(number)[rows])
        begin += columns.rows
    whole = {name: np.concatenate(chunks) for name, chunks in values.items()}
    for column in whole.values():
        column[np.isinf(column)] = np.nan  # beyond float32
    return whole, np.concatenate(kept)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table that can be read as it is: the first column to the left, the others to the right."""
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (heads, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        for row in cells
    ]
    lines.insert(1, ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _download(download: Download) -> str:
    d = download
    rows = [["rows", f"{d.count:,}", ""], ["downloaded", f"{d.successes:,}", _share(d.successes, d.count)]]
    rows += [
        ["failed to download", f"{d.failed_to_download:,}", _share(d.failed_to_download, d.count)],
        ["failed to resize", f"{d.failed_to_resize:,}", _share(d.failed_to_resize, d.count)],
    ]
    rows += [[f"  {reason}", f"{n:,}", _share(n, d.count)] for reason, n in d.failures.most_common(MOST_LISTED)]
    lines = [
        f"{kind}: {', '.join(names[:MOST_LISTED])}{', ...' if len(names) > MOST_LISTED else ''}"
        for kind, names in (
            ("Unfinished", d.unfinished),
            ("Empty, every download had failed", d.empty),
            ("Finished, but the tar is gone", d.gone),
            ("Numbers without a shard", d.gaps),
        )
        if names
    ]
    return "\n\n".join(
        [table([f"{d.finished:,} finished shards of img2dataset", "number", "share"], rows), *lines, *d.unusable]
    )


def _listed(lines: Sequence[str]) -> str:
    more = [f"and {len(lines) - MOST_LISTED:,} more, see report.json"] if len(lines) > MOST_LISTED else []
    return "\n".join(f"- {line}" for line in (*lines[:MOST_LISTED], *more))


def _extension(name: str) -> str:
    return f".{name if name.isprintable() else ascii(name)[1:-1]}" if name else "without extension"


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else ""
