import copy
import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aimv2.config import ConfigError, compare_configs, from_json, load_config, to_json, with_defaults


@dataclass(slots=True, kw_only=True)
class Source:
    name: str
    weight: float = 1.0

    def __post_init__(self):
        if self.weight <= 0:
            raise ValueError(f"weight {self.weight}: expected more than 0")


@dataclass(slots=True, kw_only=True)
class Vision:
    image_size: int = 224
    patch_size: int = 14

    def __post_init__(self):
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")


@dataclass(slots=True, kw_only=True)
class Pixels:
    vision: Vision = field(default_factory=Vision)
    pixel_weight: float = 0.4


@dataclass(slots=True, kw_only=True)
class Masked(Pixels):
    ratio: float = 0.75


@dataclass(slots=True, kw_only=True)
class Contrast:
    temperature: float = 0.07


@dataclass(slots=True, kw_only=True)
class Run:
    steps: int
    objective: Pixels | Contrast = field(default_factory=Pixels)
    train: list[Source] = field(default_factory=lambda: [Source(name="a"), Source(name="b")])
    validation: Source | None = None
    crop: tuple[float, float] | None = (0.4, 1.0)
    sizes: tuple[int, ...] = ()
    names: list[str] = field(default_factory=list)
    precision: Literal["fp32", "bf16"] = "bf16"
    stage: Literal[1, 2, 3] = 1
    compile: bool = False
    project: str | None = None
    limit: int | None = None
    every: int | str = 10
    out: Path = Path("runs")
    rates: dict[str, float] = field(default_factory=dict)
    other: Pixels | Contrast | None = None


PARENT = """
from {module} import *
def config():
    return Run(steps=10)
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "parent.py"
    path.write_text(PARENT.format(module=__name__))
    return path


def test_a_file_without_overrides(file):
    assert load_config(file) == Run(steps=10)


# -- Overrides: each against the value that Python itself would be given --------------------------------------------


@pytest.mark.parametrize(
    ("override", "read", "expected"),
    [
        ("steps=1000", lambda c: c.steps, 1000),
        ("steps=1_000", lambda c: c.steps, 1000),
        ("steps=1e6", lambda c: c.steps, 1_000_000),
        ("steps=12345678901234567890", lambda c: c.steps, 12345678901234567890),  # beyond float's 53 bits
        ("steps=-3", lambda c: c.steps, -3),
        ("objective.pixel_weight=1", lambda c: c.objective.pixel_weight, 1.0),
        ("objective.pixel_weight=4e-1", lambda c: c.objective.pixel_weight, 0.4),
        ("objective.vision.image_size=448", lambda c: c.objective.vision.image_size, 448),
        ("train.1.weight=0.3", lambda c: [s.weight for s in c.train], [1.0, 0.3]),
        ("train.0.name=x=y", lambda c: c.train[0].name, "x=y"),
        ("crop=0.2,0.8", lambda c: c.crop, (0.2, 0.8)),
        ("crop=(0.2, 1)", lambda c: c.crop, (0.2, 1.0)),
        ("crop=none", lambda c: c.crop, None),
        ("sizes=[1, 2,3]", lambda c: c.sizes, (1, 2, 3)),
        ("sizes=(7,)", lambda c: c.sizes, (7,)),
        ("sizes=()", lambda c: c.sizes, ()),
        ("names=a, b", lambda c: c.names, ["a", "b"]),
        ("names=['a']", lambda c: c.names, ["a"]),
        ("precision=fp32", lambda c: c.precision, "fp32"),
        ("stage=3", lambda c: c.stage, 3),
        ("compile=true", lambda c: c.compile, True),
        ("compile=True", lambda c: c.compile, True),
        ("compile=0", lambda c: c.compile, False),
        ("project=none", lambda c: c.project, None),
        ("project=nones", lambda c: c.project, "nones"),
        ("project=", lambda c: c.project, ""),
        ("limit=None", lambda c: c.limit, None),
        ("limit=5", lambda c: c.limit, 5),
        ("every=7", lambda c: c.every, 7),
        ("every=epoch", lambda c: c.every, "epoch"),
        ("validation=null", lambda c: c.validation, None),
        ("out=a/b", lambda c: c.out, Path("a/b")),
        ("rates.new=0.5", lambda c: c.rates, {"new": 0.5}),
    ],
)
def test_an_override_has_the_annotated_type(file, override, read, expected):
    value = read(load_config(file, [override]))
    assert value == expected
    assert type(value) is type(expected)


def test_overrides_that_are_valid_only_together(file):
    config = load_config(file, ["objective.vision.image_size=256", "objective.vision.patch_size=16"])
    assert config.objective.vision == Vision(image_size=256, patch_size=16)


def test_the_last_override_wins_and_the_file_is_read_afresh(file):
    assert load_config(file, ["steps=1", "steps=2"]).steps == 2
    assert load_config(file).steps == 10


def test_overrides_follow_the_actual_class_of_a_field(tmp_path):
    path = tmp_path / "masked.py"
    path.write_text(f"from {__name__} import *\ndef config(): return Run(steps=1, objective=Masked())")
    assert load_config(path, ["objective.ratio=0.5"]).objective == Masked(ratio=0.5)
    path.write_text(f"from {__name__} import *\ndef config(): return Run(steps=1, objective=Contrast())")
    assert load_config(path, ["objective.temperature=1"]).objective == Contrast(temperature=1.0)
    with pytest.raises(ConfigError, match=r"unknown key objective.ratio: objective has temperature$"):
        load_config(path, ["objective.ratio=0.5"])


def test_what_has_fields_is_set_as_json(file):
    config = load_config(file, ['train=[{"name": "x", "weight": 2}]', 'validation={"name": "v"}'])
    assert config.train == [Source(name="x", weight=2.0)] and config.validation == Source(name="v")
    assert load_config(file, ["train=[]"]).train == []


def test_what_is_none_is_made_where_its_fields_are_set(file):
    assert load_config(file, ["validation.name=v", "validation.weight=2"]).validation == Source(name="v", weight=2.0)
    assert load_config(file, ["validation.weight=2", "validation.name=v"]).validation == Source(name="v", weight=2.0)
    assert load_config(file, ["validation.name=v", "validation=none"]).validation is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps", "override 'steps' is not of the form key.sub=value"),
        ("stepz=1", "unknown key stepz: did you mean steps? the config has steps, objective, train, validation, "),
        ("pixel_weight=1", "unknown key pixel_weight: did you mean objective.pixel_weight? the config has steps"),
        ("objective.visionn=1", "did you mean objective.vision? objective has vision, pixel_weight"),
        ("steps.x=1", "unknown key steps.x: steps is 10 and has no fields"),
        ("project.name=x", "unknown key project.name: project is None and has no fields"),
        ("validation.nam=x", "unknown key validation.nam: did you mean validation.name? validation has name, weight"),
        ("validation.weight=2", "validation.name is missing: Source needs it"),
        ("other.temperature=1", "unknown key other.temperature: other is None: expected other={...}, with a type of "),
        ("other.temperature=1", "type of Pixels, Masked, Contrast"),
        ("train.2.name=x", "unknown key train.2.name: train is a list of 2, counted from 0"),
        ("train.-1.name=x", "train is a list of 2, counted from 0"),
        ("steps=0.5", "steps: expected int, got '0.5'"),
        ("steps=", "steps: expected int, got ''"),
        ("steps=inf", "steps: expected int, got 'inf'"),
        ("objective.pixel_weight=nan", "objective.pixel_weight: expected float, got nan"),
        ("compile=yes", "compile: expected bool, got 'yes'"),
        ("precision=fp16", "precision: expected 'fp32' | 'bf16', got 'fp16'"),
        ("crop=1,2,3", "crop: expected tuple[float, float] | None, got '1,2,3'"),
        ("sizes=1,x", "sizes: expected int, got 'x'"),
        (
            "objective=Contrast",
            "objective: cannot set Pixels | Contrast to 'Contrast', only its fields, objective.FIELD=",
        ),
        ("train=[x]", "train: cannot set list[Source] to '[x]', only its fields, train.FIELD=, or all of it as JSON"),
        ('train=[{"nam": "x"}]', "unknown key train.0.nam: Source has name, weight"),
        ("train.0=x", "train.0: cannot set Source to 'x'"),
        ("train.1.weight=-1", "train.1: weight -1.0: expected more than 0"),
        ("objective.vision.image_size=225", "objective.vision: image_size 225 is not a multiple of patch_size 14"),
    ],
)
def test_a_wrong_override_is_one_line_that_names_it(file, override, message):
    with pytest.raises(ConfigError) as caught:
        load_config(file, [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# -- Files --------------------------------------------------------------------------------------------------------


def test_a_derived_file_changes_its_parent(file):
    child = file.with_name("child.py")
    child.write_text(
        "from pathlib import Path\nfrom aimv2.config import load_config\n"
        "def config():\n"
        "    config = load_config(Path(__file__).with_name('parent.py'))\n"
        "    config.objective.vision.image_size = 448\n"
        "    return config\n"
    )
    config = load_config(child, ["steps=3"])
    assert config == Run(steps=3, objective=Pixels(vision=Vision(image_size=448)))


def test_a_dataclass_may_be_defined_in_the_file(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass(slots=True, kw_only=True)\nclass Own:\n    a: int | None = 1\n"
        "def config(): return Own()"
    )
    assert load_config(path, ["a=2"]).a == 2


def test_an_edited_file_is_never_served_stale(file):
    for steps in range(10, 15):  # the same second, the same size: a bytecode cache would not notice
        file.write_text(PARENT.format(module=__name__).replace("steps=10", f"steps={steps}"))
        assert load_config(file).steps == steps
    assert not list(file.parent.rglob("*.pyc"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "run.py does not exist"),
        ("x = 1", "run.py has no function config()"),
        ("config = 3", "run.py has no function config()"),
        ("def config(): return 3", "run.py: config() returned 3, expected a dataclass instance"),
        ("def config(): return Run", "expected a dataclass instance"),
        ("\ndef config(: pass", "run.py, line 3: SyntaxError"),
        ("import missing_library", "run.py, line 2: ModuleNotFoundError: No module named 'missing_library'"),
        ("def config(): return Run(stepz=1)", "run.py, line 2: TypeError: "),
        ("def config():\n  run = Run(steps=1)\n  run.stepz = 1", "run.py, line 4: AttributeError: 'Run' object has no"),
        ("def config(): return Run(steps=1, train=[Source(name='a', weight=0)])", "line 2: ValueError: weight 0"),
        ("def config(): return Run(steps='1')", "steps: expected int, got '1'"),
        ("def config(): return Run(steps=1.0)", "steps: expected int, got 1.0"),
        ("def config(): return Run(steps=True)", "steps: expected int, got True"),
        ("def config(): return Run(steps=1, objective=Source(name='a'))", "objective: expected Pixels | Contrast, got"),
        (
            "def config(): return Run(steps=1, objective=Pixels(pixel_weight=float('inf')))",
            "pixel_weight: expected float",
        ),
    ],
)
def test_a_wrong_file_is_one_line_that_names_it(tmp_path, text, message):
    path = tmp_path / "run.py"
    if text is not None:
        path.write_text(f"from {__name__} import *\n{text}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# -- JSON ---------------------------------------------------------------------------------------------------------

finite = st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
visions = st.builds(lambda n, p: Vision(image_size=n * p, patch_size=p), st.integers(1, 32), st.integers(1, 32))
sources = st.builds(Source, name=texts, weight=st.floats(1e-6, 1e6))
objectives = st.one_of(
    st.builds(Pixels, vision=visions, pixel_weight=finite),
    st.builds(Masked, vision=visions, ratio=finite),
    st.builds(Contrast, temperature=finite),
)
runs = st.builds(
    Run,
    steps=st.integers(),
    objective=objectives,
    train=st.lists(sources, max_size=3),
    validation=st.none() | sources,
    crop=st.none() | st.tuples(finite, finite),
    sizes=st.lists(st.integers()).map(tuple),
    names=st.lists(texts),
    precision=st.sampled_from(["fp32", "bf16"]),
    stage=st.sampled_from([1, 2, 3]),
    compile=st.booleans(),
    project=st.none() | texts,
    limit=st.none() | st.integers(),
    every=st.integers() | texts,
    out=st.sampled_from([Path("a"), Path("/b/c")]),
    rates=st.dictionaries(texts, finite),
)


def exact(config):
    """Dataclasses compare 1 and 1.0, or a class and its base with the same fields, as they should not here."""
    if dataclasses.is_dataclass(config):
        return type(config), {f.name: exact(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, list | tuple):
        return type(config), [exact(item) for item in config]
    if isinstance(config, dict):
        return {name: exact(item) for name, item in config.items()}
    return type(config), config


@given(runs)
def test_json_round_trip(run):
    text = json.dumps(to_json(run), allow_nan=False)
    assert exact(from_json(Run, json.loads(text))) == exact(run)


def test_json_says_the_class_only_where_the_annotation_does_not():
    data = to_json(Run(steps=1, objective=Masked(), validation=Source(name="v")))
    assert data["objective"] == {
        "type": "Masked",
        "vision": {"image_size": 224, "patch_size": 14},
        "pixel_weight": 0.4,
        "ratio": 0.75,
    }
    assert data["validation"] == {"name": "v", "weight": 1.0}
    assert "type" not in data


def test_a_field_added_since_takes_its_default():
    assert from_json(Run, {"steps": 3}) == Run(steps=3)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "expected the fields of Run as a dict, got []"),
        ({}, "steps is missing: Run needs it"),
        ({"steps": "1"}, "steps: expected int, got '1'"),
        ({"steps": 1.0}, "steps: expected int, got 1.0"),
        ({"steps": True}, "steps: expected int, got True"),
        ({"steps": 1, "stepz": 2}, "unknown key stepz: Run has steps, objective"),
        ({"steps": 1, "validation": {"name": "a", "x": 1}}, "unknown key validation.x: Source has name, weight"),
        ({"steps": 1, "validation": {"name": "a", "weight": math.nan}}, "validation.weight: expected float, got nan"),
        ({"steps": 1, "validation": {"name": "a", "weight": 10**400}}, "validation.weight: expected float, got 1000"),
        ({"steps": 1, "validation": {"name": "a", "weight": 0}}, "validation: weight 0.0: expected more than 0"),
        ({"steps": 1, "train": {"name": "a"}}, "train: expected list[Source], got"),
        ({"steps": 1, "train": [{"name": "a"}, {"name": 1}]}, "train.1.name: expected str, got 1"),
        (
            {"steps": 1, "objective": {"ratio": 0.5}},
            'objective: "type" is missing, expected one of Pixels, Masked, Con',
        ),
        (
            {"steps": 1, "objective": {"type": "os"}},
            "objective.type: expected one of Pixels, Masked, Contrast, got 'os'",
        ),
        ({"steps": 1, "objective": {"type": ["Pixels"]}}, "objective.type: expected one of"),
        ({"steps": 1, "objective": None}, "objective: expected Pixels | Contrast, got None"),
        ({"steps": 1, "crop": [0.1]}, "crop: expected tuple[float, float] | None, got [0.1]"),
        ({"steps": 1, "stage": True}, "stage: expected 1 | 2 | 3, got True"),
        ({"steps": 1, "rates": {"a": "b"}}, "rates.a: expected float, got 'b'"),
    ],
)
def test_wrong_json_is_one_line_that_names_it(data, message):
    with pytest.raises(ConfigError) as caught:
        from_json(Run, data)
    assert message in str(caught.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(texts | st.sampled_from(["type", "name"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from([f.name for f in dataclasses.fields(Run)]), json_values))
def test_any_json_gives_a_checked_config_or_a_config_error(data):
    try:
        run = from_json(Run, data)
    except ConfigError:
        return
    assert from_json(Run, to_json(run)) == run


@pytest.mark.parametrize("value", [math.nan, math.inf, "x", None])
def test_what_json_cannot_hold_is_refused(value):
    with pytest.raises(ConfigError, match=r"objective\.pixel_weight: expected float"):
        to_json(Run(steps=1, objective=Pixels(pixel_weight=value)))


# -- Comparison ---------------------------------------------------------------------------------------------------


def test_differences_are_named():
    saved, current = to_json(Run(steps=1)), to_json(Run(steps=2, names=["x"], objective=Contrast(), crop=None))
    assert compare_configs(saved, saved, set()) == []
    lines = compare_configs(saved, current, {"steps", "objective.vision"})
    assert lines == [
        'objective.type: saved "Pixels", now "Contrast"',
        "objective.pixel_weight: saved 0.4, now absent",
        "crop: saved [0.4, 1.0], now null",
        'names: saved [], now ["x"]',
        "objective.temperature: saved absent, now 0.07",
    ]
    assert compare_configs(saved, current, {"steps", "objective", "crop", "names"}) == []


def test_what_was_saved_before_a_field_was_added_has_its_default():
    current = to_json(Run(steps=1, validation=Source(name="v"), other=Masked()))
    saved = copy.deepcopy(current)
    del saved["rates"], saved["limit"], saved["objective"]["vision"]["patch_size"], saved["other"]["ratio"]
    del saved["train"][1]["weight"], saved["validation"]["weight"]
    assert len(compare_configs(saved, current, set())) == 6
    assert with_defaults(Run, saved) == current
    del saved["objective"]["type"]  # when there were no others
    assert with_defaults(Run, saved) == current
    saved["objective"]["vision"]["image_size"] = 225  # no place to be checked
    assert compare_configs(with_defaults(Run, saved), current, set()) == [
        "objective.vision.image_size: saved 225, now 224"
    ]
    for key, value in (("gone", {"x": 1}), ("steps", None), ("objective", {"type": "Gone"}), ("train", {"a": []})):
        damaged = saved | {key: value}
        assert with_defaults(Run, damaged)[key] == value  # for the comparison to name
    assert "steps: saved absent, now 1" in compare_configs(with_defaults(Run, {}), current, set())


def test_what_may_change_excuses_no_neighbour():
    saved, current = to_json(Run(steps=1)), to_json(Run(steps=1, train=[Source(name="c"), Source(name="b")]))
    assert compare_configs(saved, current, {"train.1", "tra"}) == ['train.0.name: saved "a", now "c"']
