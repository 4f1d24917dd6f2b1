"""Imports run one way: a module of aimv2/ imports its own layer or lower ones, and nothing goes round in a circle."""

import ast
import graphlib
import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LAYERS = [
    {"patches", "masks", "positions", "layers", "losses", "config", "manifest", "ranks", "weights", "whole_files"},
    {
        "encoder",
        "decoder",
        "text_encoder",
        "lit",
        "flops",
        "data",
        "ingest",
        "optim",
        "logger",
        "preprocessing",
        "processor",
        "clip_tokens",
    },
    {
        "ingest",
        "objectives",
        "layouts",
        "features",
        "exports",
        "export_formats",
        "model_cards",
        "evals",
        "harnesses",
        "hub",
        "pretrained",
        "init_from",
        "tower",
    },
    {"engine", "checkpoint"},
    {"train", "train_config", "preparation"},
    {""},  # the package itself, whose conveniences may load anything and which no module may use
]


def layer_of(module: str) -> int:
    """The layer of "aimv2.data.batch" is that of "data"; KeyError if it has none."""
    name = f"{module}.".split(".")[1]
    for number, names in enumerate(LAYERS):
        if name in names:
            return number
    raise KeyError(module)


def modules(root: Path) -> dict[str, Path]:
    """Dotted name -> file of every module below root/aimv2."""
    found = {}
    for path in sorted((root / "aimv2").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(tree: ast.AST, package: str, known: dict[str, Path]) -> set[str]:
    """What a file imports, inside functions too: "from aimv2 import losses" is aimv2.losses where that is a module."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            names = {alias.name for alias in node.names}
            found |= {f"{base}.{name}" if f"{base}.{name}" in known else base for name in names}
    return found


def violations(root: Path) -> list[str]:
    """What is wrong with the package root/aimv2, one line each."""
    known = modules(root)
    problems: list[str] = []
    graph: dict[str, set[str]] = {}
    for module, path in known.items():
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        found = imports(tree, package, known)
        for name in sorted(found):
            if name.split(".")[0] == "argparse" or (name.split(".")[0] == "deepspeed" and module != "aimv2.engine"):
                problems.append(f"{module} imports {name}")
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                problems.append(f"{module} prints in line {node.lineno}")
        graph[module] = {name for name in found if name in known and name != module}
        try:
            layer = layer_of(module)
            higher = sorted(name for name in graph[module] if layer_of(name) > layer)
            problems += [f"{module} imports {name}, of a higher layer" for name in higher]
        except KeyError as error:
            problems.append(f"{error.args[0]} is in no layer, add it to LAYERS")
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        problems.append(f"circle: {' -> '.join(error.args[1])}")
    return problems


def write_package(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / "aimv2" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_the_package_keeps_its_layers():
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({"utils.py": ""}, "aimv2.utils is in no layer, add it to LAYERS"),
        ({"masks.py": "from aimv2.utils import x", "utils.py": ""}, "aimv2.utils is in no layer, add it to LAYERS"),
        ({"masks.py": "import aimv2.encoder", "encoder.py": ""}, "aimv2.masks imports aimv2.encoder, of a higher"),
        (
            {"masks.py": "def f():\n    from aimv2 import train", "train.py": ""},
            "aimv2.masks imports aimv2.train, of a",
        ),
        ({"data/loader.py": "from ..train import x", "train.py": ""}, "aimv2.data.loader imports aimv2.train, of a"),
        ({"masks.py": "from aimv2 import load_encoder"}, "aimv2.masks imports aimv2, of a higher layer"),
        ({"encoder.py": "from aimv2 import optim", "optim.py": "import aimv2.encoder"}, "circle: "),
        ({"train.py": "import deepspeed.comm"}, "aimv2.train imports deepspeed.comm"),
        ({"engine.py": "import argparse"}, "aimv2.engine imports argparse"),
        ({"masks.py": "def f():\n    print(1)"}, "aimv2.masks prints in line 2"),
    ],
)
def test_each_kind_of_violation_is_found(tmp_path, files, problem):
    write_package(tmp_path, {"__init__.py": "", **files})
    found = violations(tmp_path)
    assert any(line.startswith(problem) for line in found), found


def test_what_is_allowed_is_not_reported(tmp_path):
    files = {
        "__init__.py": "def load():\n    from aimv2.hub import load",
        "hub.py": "from aimv2 import losses\nfrom .objectives.aimv2 import AIMv2",
        "losses.py": "from aimv2.patches import patchify",
        "patches.py": "import math",
        "objectives/aimv2.py": "from aimv2 import losses as l",
        "engine.py": "import deepspeed",
    }
    write_package(tmp_path, files)
    assert violations(tmp_path) == []


def test_no_script_hides_a_library():
    """A script's folder comes first on sys.path, so one called like a library is what `import` finds."""
    libraries = importlib.metadata.packages_distributions().keys() | sys.stdlib_module_names
    scripts = [path for folder in ("scripts", "eval") for path in (ROOT / folder).glob("*.py")]
    assert scripts
    assert [path.name for path in scripts if path.stem in libraries] == []


def test_data_and_script_folders_are_no_packages():
    """`tokenizers` and `eval` would hide the package and the builtin of that name."""
    for folder in ("tokenizers", "eval", "scripts", "configs"):
        assert not list((ROOT / folder).rglob("__init__.py")), folder
    assert not list((ROOT / "tokenizers").rglob("*.py"))


def test_importing_the_package_is_cheap():
    code = "import sys, aimv2; print(*sorted({'torch', 'numpy', 'PIL', 'deepspeed'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
