"""Result files as an evaluation writes them, made up for tests of reports."""

import json
from pathlib import Path

import numpy as np

CLASSES = ("circle", "square", "triangle", "star", "cross", "heart")


def entry(value: float, n: int = 400, chance: float | None = 1 / 6) -> dict:
    return {"value": value, "stderr": (value * (1 - value) / n) ** 0.5, "n": n, "chance": chance}


def result(
    spec: str = "aimv2:runs/a", value: float = 0.8, *, on: str = "shapes@shape", n: int = 400, **changes
) -> dict:
    """One result as JSON, on the data of that name; `changes` replace its parts, or are merged into its dicts."""
    content = {
        "format": "aimv2 evaluation 1",
        "hash": "",
        "protocol": {"name": "knn", "k": [10, 20], "temperature": 0.07},
        "encoder": {
            "spec": spec,
            "name": spec.split(":")[-1].split("/")[-1],
            "depth": 8,
            "weights": f"{abs(hash(spec)):032x}",
            "preprocessing": {"image_size": 56, "resize": "squash", "crop_pct": 1.0},
            "preprocessing_hash": "c0ffee",
        },
        "data": {
            "spec": on,
            "name": on,
            "classes": len(CLASSES),
            "train": {"n": 2000, "identity": f"{on} train"},
            "test": {"n": n, "identity": f"{on} test"},
            "report": {},
        },
        "metrics": {"top1": entry(value, n), "mean_per_class": entry(value - 0.01, n)},
        "details": {},
        "environment": {"torch": "2.15.0", "device": "x86_64", "ranks": 1, "seconds": 12.3},
    }
    for name, change in changes.items():
        content[name] = content[name] | change if isinstance(change, dict) and name != "metrics" else change
    return content


def write_result(folder: Path, content: dict, correct: np.ndarray | None = None) -> Path:
    """Write it, and its samples if `correct` says which are right; the file's name and hash follow from the content."""
    folder.mkdir(parents=True, exist_ok=True)
    number = len(list(folder.glob("*.json")))
    path = folder / f"{content['protocol']['name']}-{number:03d}.json"
    path.write_text(json.dumps({**content, "hash": content["hash"] or str(path)}))
    if correct is not None:
        lines = [
            {
                "sample": f"{i:05d}",
                "label": i % 6,
                "prediction": i % 6 if right else (i + 1) % 6,
                "correct": bool(right),
            }
            for i, right in enumerate(correct)
        ]
        path.with_suffix(".samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
