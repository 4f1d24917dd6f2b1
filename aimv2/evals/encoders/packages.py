"""Packages that only some encoders need."""

from importlib import import_module
from types import ModuleType


def optional(name: str) -> ModuleType:
    """Raises ValueError that says what to install."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ValueError(f'package {name} can\'t be imported ({error}): pip install "aimv2[eval]"') from error
