"""AIM and AIMv2 vision encoders: pre-training, evaluation and use as a vision tower.

`aimv2.load_encoder(folder)` gives an encoder, `aimv2.load_model(folder)` the whole model. Both come from
`aimv2.pretrained`
on first use, so that importing this package costs nothing.
"""

import importlib

__all__ = ["__version__", "load_encoder", "load_model"]


def __getattr__(name: str):
    if name in ("load_encoder", "load_model"):
        return getattr(importlib.import_module("aimv2.pretrained"), name)
    if name == "__version__":
        return _version()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _version() -> str:
    """What pyproject.toml says, through the installed package's metadata or, in a bare checkout, the file itself."""
    from importlib import metadata

    try:
        return metadata.version("aimv2")
    except metadata.PackageNotFoundError:
        import tomllib
        from pathlib import Path

        return tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text())["project"]["version"]
