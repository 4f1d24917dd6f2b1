"""Result files of evaluations, read back and checked: what tables, plots and comparisons are made from."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from aimv2.evals.results import Metric
from aimv2.evals.run import FORMAT

SAMPLES = ".samples.jsonl"  # beside STEM.json
PARTS = ("protocol", "encoder", "data", "metrics")  # of a result, each a JSON object


@dataclass(frozen=True, slots=True)
class Result:
    """One result file. The dicts are as the evaluation wrote them."""

    path: Path
    hash: str
    protocol: dict  # "name" and the settings
    encoder: dict
    data: dict
    metrics: dict[str, Metric]  # the first is the one to quote
    details: dict
    environment: dict

    @property
    def headline(self) -> str:
        return next(iter(self.metrics))

    @property
    def is_floor(self) -> bool:
        """Whether the encoder is raw pixels, below which no trained encoder should be."""
        return self.encoder["spec"].split(":")[0].split("@")[0] == "pixels"

    @property
    def test(self) -> str:
        """The digest of keys, labels and sizes of the test set."""
        return self.data["test"]["identity"]

    @property
    def train(self) -> str | None:
        """The training set's; None for a protocol without one."""
        return (self.data.get("train") or {}).get("identity")

    @property
    def settings(self) -> dict:
        """Without the name. Of settings that are files there is the beginning of a digest too."""
        digests = {f"{name} digest": digest[:8] for name, digest in self.protocol.get("files", {}).items()}
        return {name: value for name, value in self.protocol.items() if name not in ("name", "files")} | digests

    @property
    def samples_path(self) -> Path:
        return self.path.with_name(self.path.stem + SAMPLES)


def read_result(path: str | Path) -> Result:
    """Read one result file. Raises ValueError that names the file and what is wrong with it."""
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}, expected a result file") from error
    except ValueError as error:  # broken JSON or broken UTF-8
        raise ValueError(f"{path}: not JSON ({error})") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise ValueError(f"{path}: format {found!r}, expected {FORMAT!r}")
    for name in PARTS:
        if not isinstance(content.get(name), dict) or not content[name]:
            raise ValueError(f"{path}: {name} {content.get(name)!r}, expected a JSON object")
    for place, key in (("protocol", "name"), ("encoder", "spec"), ("encoder", "name"), ("data", "name")):
        if not isinstance(content[place].get(key), str):
            raise ValueError(f"{path}: {place}.{key} {content[place].get(key)!r}, expected a string")
    test = content["data"].get("test")
    if not isinstance(test, dict) or "identity" not in test:
        raise ValueError(f"{path}: data.test {test!r}, expected an object with an identity")
    return Result(
        path=path,
        hash=str(content.get("hash", "")),
        protocol=content["protocol"],
        encoder=content["encoder"],
        data=content["data"],
        metrics={name: _metric(path, name, entry) for name, entry in content["metrics"].items()},
        details=content.get("details") or {},
        environment=content.get("environment") or {},
    )


def read_results(folders: Iterable[str | Path]) -> tuple[list[Result], list[str]]:
    """(results, one line for each *.json that is left out) of all folders.

    Of results with one hash, which are of the same evaluation, the first is taken; that another has other numbers, as
    from another machine, is a line.

    Raises ValueError for a folder that is not there, and if no file is a result.
    """
    folders = [Path(folder) for folder in folders]
    results, problems, first = [], [], {}
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"{folder}: expected a folder of results")
        for path in sorted(folder.glob("*.json")):
            try:
                result = read_result(path)
            except ValueError as error:
                problems.append(str(error))
                continue
            known = first.setdefault(result.hash or path, result)
            if known is result:
                results.append(result)
            elif difference := _difference(known, result):
                problems.append(f"{path}: the same evaluation as {known.path}, but {difference}")
    if not results:
        reason = f"; {problems[0]}" if problems else ""
        places = ", ".join(map(str, folders)) or "no folder"
        raise ValueError(f"{places}: no result among {len(problems)} JSON files, expected at least one{reason}")
    return results, problems


def _difference(first: Result, second: Result) -> str | None:
    """The first metric in which two results differ by more than rounding."""
    for name in first.metrics | second.metrics:
        one, other = (f"{r.metrics[name].value:.6f}" if name in r.metrics else "missing" for r in (first, second))
        if one != other:
            return f"{name} is {other}, not {one}"
    return None


def _metric(path: Path, name: str, entry: object) -> Metric:
    try:
        metric = Metric(entry["value"], entry["stderr"], entry["n"], entry.get("chance"))
        numbers = [metric.value, metric.stderr, metric.n] + [metric.chance] * (metric.chance is not None)
        fits = all(not isinstance(x, bool) and math.isfinite(x) for x in numbers)
    except (TypeError, KeyError, AttributeError):
        fits = False
    if not fits:
        raise ValueError(f"{path}: metric {name} {entry!r}, expected finite value, stderr, n and perhaps chance")
    return metric
