"""The README is true: its tree is the tree, its commands name what exists, its examples run."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from aimv2.config import load_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
SHELL = [line for kind, text in BLOCKS if kind == "sh" for line in text.replace("\\\n", " ").splitlines()]
TREE = next(text for kind, text in BLOCKS if kind == "" and "aimv2/\n" in text)


def tree_paths() -> list[str]:
    """Paths of the tree's lines: the indentation nests, the description follows two blanks or more."""
    folders: list[str] = []
    paths = []
    for line in filter(None, TREE.splitlines()):
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folders[depth:] = [name]
        paths.append("".join(folders))
    return paths


def test_every_path_of_the_tree_exists():
    missing = [path for path in tree_paths() if not (ROOT / path).exists()]
    assert not missing


@pytest.mark.parametrize("folder", ["aimv2", "scripts", "configs", "eval"])
def test_the_tree_has_every_module(folder):
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / folder).rglob("*.py") if p.name != "__init__.py"}
    assert modules <= set(tree_paths()), modules - set(tree_paths())


@pytest.mark.parametrize(
    "page", ["README.md", "eval/README.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_links_and_pictures_are_there(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    assert not [target for target in targets if not (ROOT / page).parent.joinpath(target).exists()]


def test_the_evaluation_page_names_all_there_is():
    from aimv2.evals.datasets.opening import BUNDLED, KINDS, PAPERS

    page = (ROOT / "eval/README.md").read_text(encoding="utf-8")
    scripts = {path.name for path in (ROOT / "eval").glob("*.py")} - {"arguments.py", "clip_benchmark_lit.py"}
    names = [*BUNDLED, *(f"{kind}:" for kind in KINDS), *PAPERS, *scripts]
    assert not [name for name in names if name not in page]


def test_commands_name_files_that_exist():
    named = {path for line in SHELL for path in re.findall(r"(?:scripts|configs|eval)/\w+\.py", line)}
    assert len(named) >= 4
    assert not [path for path in named if not (ROOT / path).is_file()]


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted({s for line in SHELL for s in re.findall(r"(?:scripts|eval)/\w+\.py", line)}))
def test_every_script_of_the_readme_has_help(script):
    result = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert "usage:" in result.stdout


def test_the_example_config_loads(tmp_path):
    example = next(text for kind, text in BLOCKS if kind == "python" and "def config()" in text)
    shutil.copy(ROOT / "configs/aimv2_large.py", tmp_path)
    (tmp_path / "mine.py").write_text(example)
    run = load_config(tmp_path / "mine.py")
    assert [source.weight for source in run.data.train] == [0.7, 0.3]
    assert run.data.validation is not None
