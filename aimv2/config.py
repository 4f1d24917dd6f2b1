"""A run is a Python file that returns typed dataclasses; this reads it, changes fields from text and keeps it as JSON.

Nothing here knows what is being trained. The annotations of the dataclasses are the only schema: the same checked
rebuild (`_build`) serves Python files, command-line overrides and JSON, so all three are refused for the same reasons.

Annotations understood: int, float, bool, str, Path, None, Literal, unions, list[X], tuple[X, ...], tuple[X, Y],
dict[str, X] and dataclasses. A dataclass field may hold a subclass, or one of a union of dataclasses: overrides follow
the actual value, JSON carries its class name under "type".
"""

import contextlib
import copy
import dataclasses
import difflib
import functools
import json
import sys
import traceback
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one line that names the key, its value and the cure."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Any:
    """Executes the Python file at `path`, calls its `config()` and applies `overrides` ("a.b.0.c=value").

    Returns a checked dataclass: every field has its annotated type and every `__post_init__` has seen the final
    values. Raises ConfigError. The file is code and is trusted; the overrides and everything they become are not.
    """
    path = Path(path)
    config = _execute(path)
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise ConfigError(f"{path}: config() returned {config!r}, expected a dataclass instance")
    return override(config, overrides)


def override(config: Any, overrides: Sequence[str]) -> Any:
    """A checked copy of a dataclass with fields changed by text, "a.b.0.c=value". Raises ConfigError."""
    config = copy.deepcopy(config)
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"override {text!r} is not of the form key.sub=value")
        _set(config, key.strip(), value.strip())
    return _build(type(config), config, "")


def to_json(config: Any) -> dict[str, Any]:
    """The dataclass as plain dicts, lists, strings and finite numbers, ready for `json.dump`."""
    config = _build(type(config), config, "")
    return _plain(config, type(config))


def from_json(cls: type, data: dict[str, Any]) -> Any:
    """The inverse of `to_json`: a `cls`, or ConfigError naming the key path, the value and the expected type.

    An unknown key is an error; a missing one takes the field's default, so old files can be read after a field is
    added. Only dataclasses named by the annotations of `cls`, or their subclasses, are ever built.
    """
    if not isinstance(data, dict):
        raise ConfigError(f"expected the fields of {cls.__name__} as a dict, got {_short(data)}")
    return _build(cls, data, "")


def with_defaults(annotation: Any, data: Any) -> Any:
    """JSON `data` of a dataclass, perhaps older than some of its fields, with their defaults; nothing is checked.

    Without a "type" where several are possible, it is of the first: once there was no other.
    """
    choices = _choices(annotation)
    if isinstance(data, list):
        kinds = next((_item_types(choice, len(data)) for choice in choices if get_origin(choice) in (list, tuple)), ())
        return [with_defaults(kind, item) for kind, item in zip(kinds, data, strict=True)] if kinds else data
    declared = [choice for choice in choices if dataclasses.is_dataclass(choice)]
    if not isinstance(data, dict) or not declared:
        return data
    if len(declared) > 1:
        data = {"type": declared[0].__name__, **data}
    try:
        cls, values = _resolve(choices, data, "")
    except ConfigError:
        return data
    hints = _hints(cls)
    filled = {name: with_defaults(hints[name], item) if name in hints else item for name, item in data.items()}
    for field in dataclasses.fields(cls):
        if field.name in hints.keys() - values.keys():
            if field.default_factory is not dataclasses.MISSING:
                filled[field.name] = _plain(field.default_factory(), hints[field.name])
            elif field.default is not dataclasses.MISSING:
                filled[field.name] = _plain(field.default, hints[field.name])
    return filled


def compare_configs(saved: dict[str, Any], current: dict[str, Any], may_change: set[str]) -> list[str]:
    """Differences between two `to_json` results as lines "key: saved X, now Y".

    A key in `may_change` excuses itself and everything under it ("data" excuses "data.workers").
    """
    before, after = dict(_flatten(saved)), dict(_flatten(current))
    differences = []
    for key in dict.fromkeys([*before, *after]):
        parts = key.split(".")
        if any(".".join(parts[:length]) in may_change for length in range(1, len(parts) + 1)):
            continue
        old, new = (json.dumps(values[key]) if key in values else "absent" for values in (before, after))
        if old != new:
            differences.append(f"{key}: saved {old}, now {new}")
    return differences


def _execute(path: Path) -> Any:
    """Runs the file as a module of its own and returns what its `config()` returns."""
    if not path.is_file():
        raise ConfigError(f"config file {path} does not exist")
    # Compiled here rather than imported: an import would leave __pycache__ behind and could serve a stale one.
    module = types.ModuleType(f"aimv2_config_{path.stem}_{abs(hash(path.resolve())):x}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # a dataclass defined in the file looks its annotations up there
    try:
        exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), module.__dict__)
        if not callable(getattr(module, "config", None)):
            raise ConfigError(f"{path} has no function config() that returns the run's dataclass")
        return module.config()
    except ConfigError:
        raise
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        if isinstance(error, SyntaxError) and error.filename == str(path):
            lines.append(error.lineno)
        place = f"{path}, line {lines[-1]}" if lines else str(path)
        raise ConfigError(f"{place}: {type(error).__name__}: {error}") from error


def _set(config: Any, key: str, text: str) -> None:
    """Writes the value spelled by `text` at the dotted `key`, in place; the rebuild that follows checks the whole."""
    *parents, last = key.split(".")
    owner, annotation, path = config, type(config), ""
    for name in parents:
        parent = owner
        owner, annotation = _member(parent, annotation, name, path, key)
        path = _join(path, name)
        declared = [choice for choice in _choices(annotation) if dataclasses.is_dataclass(choice)]
        if owner is None and len(declared) == 1:
            owner = {}  # which the rebuild makes what the annotation says
            _put(parent, name, owner)
        elif owner is None and declared:
            names = ", ".join(cls.__name__ for choice in declared for cls in _family(choice))
            raise ConfigError(f"unknown key {key}: {path} is None: expected {path}={{...}}, with a type of {names}")
    _put(owner, last, _parse(_member(owner, annotation, last, path, key)[1], text, key))


def _put(owner: Any, name: str, value: Any) -> None:
    if dataclasses.is_dataclass(owner):
        object.__setattr__(owner, name, value)  # frozen ones too: the deep copy is ours
    else:
        owner[int(name) if isinstance(owner, list) else name] = value


def _member(owner: Any, annotation: Any, name: str, path: str, key: str) -> tuple[Any, Any]:
    """(value, annotation) of the member `name` of `owner`, found at `path`; ConfigError listing what exists if none."""
    where = path or "the config"
    made = next(filter(dataclasses.is_dataclass, _choices(annotation)), None) if isinstance(owner, dict) else None
    if dataclasses.is_dataclass(owner) or made:
        hints = _hints(made or type(owner))
        if name in hints:
            return owner.get(name) if made else getattr(owner, name), hints[name]
        close = difflib.get_close_matches(name, hints, n=1) or _find(owner, name)
        hint = f"did you mean {_join(path, close[0])}? " if close else ""
        raise ConfigError(f"unknown key {key}: {hint}{where} has {', '.join(hints)}")
    if isinstance(owner, list):
        if name.isdecimal() and int(name) < len(owner):
            return owner[int(name)], get_args(_choice_of(annotation, list))[0]
        raise ConfigError(f"unknown key {key}: {where} is a list of {len(owner)}, counted from 0")
    if isinstance(owner, dict):
        return owner.get(name), get_args(_choice_of(annotation, dict))[1]
    raise ConfigError(f"unknown key {key}: {where} is {_short(owner)} and has no fields")


def _find(owner: Any, name: str) -> list[str]:
    """Where there is a field called `name` in the dataclass `owner` or below."""
    places = []
    if not dataclasses.is_dataclass(owner):
        return places
    for field in _hints(type(owner)):
        child = getattr(owner, field)
        places += [field] if field == name else []
        places += [f"{field}.{place}" for place in _find(child, name)]
    return places


def _parse(annotation: Any, text: str, key: str) -> Any:
    """The value of type `annotation` that `text` spells; dicts and dataclasses are JSON, in a union str is last."""
    takes_json = _has_dataclass(annotation) or any(get_origin(choice) is dict for choice in _choices(annotation))
    if takes_json and text[:1] in ("{", "["):
        with contextlib.suppress(json.JSONDecodeError, RecursionError):
            return _build(annotation, json.loads(text), key)
    for choice in sorted(_choices(annotation), key=lambda choice: choice is str):
        origin, arguments = get_origin(choice), get_args(choice)
        if choice in PARSERS:
            try:
                return PARSERS[choice](text)
            except (ValueError, KeyError, OverflowError):
                continue
        if origin is Literal:
            for literal in arguments:
                if str(literal) == text:
                    return literal
        if origin in (list, tuple) and not any(map(_has_dataclass, arguments)):
            bare = text[1:-1] if text[:1] + text[-1:] in ("()", "[]") else text
            items = [item.strip().strip("'\"") for item in bare.rstrip().removesuffix(",").split(",")] if bare else []
            kinds = _item_types(choice, len(items))
            if len(kinds) == len(items):
                return origin(_parse(kind, item, key) for kind, item in zip(kinds, items, strict=True))
    if _has_dataclass(annotation):
        raise ConfigError(
            f"{key}: cannot set {_name(annotation)} to {text!r}, only its fields, {key}.FIELD=, or all of it as JSON"
        )
    raise ConfigError(f"{key}: expected {_name(annotation)}, got {text!r}")


def _parse_int(text: str) -> int:
    """Also 1_000, 1e6 and 2.0, but never 0.5."""
    number = float(text)
    if not number.is_integer():
        raise ValueError(text)
    return int(number) if set(text.lower()) & {".", "e"} else int(text)


PARSERS = {
    bool: lambda text: {"true": True, "1": True, "false": False, "0": False}[text.lower()],
    int: _parse_int,
    float: float,
    str: str,
    Path: Path,
    types.NoneType: lambda text: {"none": None, "null": None}[text.lower()],
}


def _build(annotation: Any, value: Any, path: str) -> Any:
    """`value`, a Python value or JSON data, as `annotation`; dataclasses are made anew, from the leaves up."""
    choices = _choices(annotation)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        if any(isinstance(choice, type) and isinstance(value, choice) for choice in choices):
            return _build_dataclass(type(value), {f: getattr(value, f) for f in _hints(type(value))}, path)
    elif isinstance(value, dict) and any(map(dataclasses.is_dataclass, choices)):
        return _build_dataclass(*_resolve(choices, value, path), path)
    for choice in choices:
        origin, arguments = get_origin(choice), get_args(choice)
        if choice is float and type(value) in (int, float) and abs(value) <= sys.float_info.max:
            return float(value)
        if choice is Path and isinstance(value, str | Path):
            return Path(value)
        if isinstance(choice, type) and type(value) is choice and choice in PARSERS and choice is not float:
            return value
        if origin is Literal and any(value == literal and type(value) is type(literal) for literal in arguments):
            return value
        if origin in (list, tuple) and isinstance(value, list | tuple):
            kinds = _item_types(choice, len(value))
            if len(kinds) == len(value):
                pairs = enumerate(zip(kinds, value, strict=True))
                return origin(_build(kind, item, _join(path, str(i))) for i, (kind, item) in pairs)
        if origin is dict and isinstance(value, dict) and all(isinstance(name, str) for name in value):
            return {name: _build(arguments[1], item, _join(path, name)) for name, item in value.items()}
    raise ConfigError(f"{path}: expected {_name(annotation)}, got {_short(value)}")


def _build_dataclass(cls: type, values: dict[str, Any], path: str) -> Any:
    hints = _hints(cls)
    for name in values:
        if name not in hints:
            raise ConfigError(f"unknown key {_join(path, name)}: {cls.__name__} has {', '.join(hints)}")
    required = {f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING}
    for name in hints:
        if name in required and name not in values:
            raise ConfigError(f"{_join(path, name)} is missing: {cls.__name__} needs it")
    fields = {name: _build(hints[name], value, _join(path, name)) for name, value in values.items()}
    try:
        return cls(**fields)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{path}: {error}" if path else str(error)) from error


def _resolve(choices: tuple[Any, ...], data: dict[str, Any], path: str) -> tuple[type, dict[str, Any]]:
    """The dataclass meant by JSON `data` and its fields without the "type" tag."""
    named = {cls.__name__: cls for choice in choices if dataclasses.is_dataclass(choice) for cls in _family(choice)}
    declared = [choice for choice in choices if dataclasses.is_dataclass(choice)]
    if "type" not in data or any("type" in _hints(cls) for cls in declared):
        if len(declared) > 1:
            raise ConfigError(f'{path}: "type" is missing, expected one of {", ".join(named)}')
        return declared[0], data
    tag = data["type"]
    if not isinstance(tag, str) or tag not in named:
        raise ConfigError(f"{_join(path, 'type')}: expected one of {', '.join(named)}, got {_short(tag)}")
    return named[tag], {name: value for name, value in data.items() if name != "type"}


def _plain(value: Any, annotation: Any) -> Any:
    """JSON data of a checked value; a dataclass that its annotation does not determine gets a "type" tag."""
    if dataclasses.is_dataclass(value):
        hints = _hints(type(value))
        data = {name: _plain(getattr(value, name), hint) for name, hint in hints.items()}
        if [choice for choice in _choices(annotation) if dataclasses.is_dataclass(choice)] == [type(value)]:
            return data
        if "type" in hints:
            raise ConfigError(f'{type(value).__name__} has a field "type", where JSON needs the name of its class')
        return {"type": type(value).__name__, **data}
    if isinstance(value, list | tuple):
        kinds = _item_types(_choice_of(annotation, type(value)), len(value))
        return [_plain(item, kind) for item, kind in zip(value, kinds, strict=True)]
    if isinstance(value, dict):
        kind = get_args(_choice_of(annotation, dict))[1]
        return {name: _plain(item, kind) for name, item in value.items()}
    return str(value) if isinstance(value, Path) else value


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    """The annotated type of each field that `cls` takes when it is made."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def _choices(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the annotation alone."""
    return get_args(annotation) if get_origin(annotation) in (typing.Union, types.UnionType) else (annotation,)


def _choice_of(annotation: Any, kind: type) -> Any:
    """The first `kind[...]` among the choices."""
    return next(choice for choice in _choices(annotation) if get_origin(choice) is kind)


def _item_types(annotation: Any, length: int) -> tuple[Any, ...]:
    """One annotation per item of a list[X], tuple[X, ...] or tuple[X, Y]; the last has its own length."""
    arguments = get_args(annotation)
    if get_origin(annotation) is list or arguments[-1:] == (...,):
        return arguments[:1] * length
    return arguments


def _has_dataclass(annotation: Any) -> bool:
    return dataclasses.is_dataclass(annotation) or any(map(_has_dataclass, get_args(annotation)))


def _family(cls: type) -> list[type]:
    return [cls, *(member for child in cls.__subclasses__() for member in _family(child))]


def _name(annotation: Any) -> str:
    if len(_choices(annotation)) > 1:
        return " | ".join(map(_name, _choices(annotation)))
    if get_origin(annotation) is Literal:
        return " | ".join(map(repr, get_args(annotation)))
    if get_args(annotation):
        inner = ", ".join("..." if argument is ... else _name(argument) for argument in get_args(annotation))
        return f"{get_origin(annotation).__name__}[{inner}]"
    return "None" if annotation is types.NoneType else getattr(annotation, "__name__", str(annotation))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _flatten(data: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, leaf) pairs of JSON data; a list without dicts is a leaf."""
    if isinstance(data, list) and any(isinstance(item, dict) for item in data):
        data = dict(enumerate(data))
    if not data or not isinstance(data, dict):
        yield path, data
        return
    for name, item in data.items():
        yield from _flatten(item, _join(path, str(name)))
