from pathlib import Path

import pytest
from shapes_run import write_run, write_shapes

from aimv2.data.loader import DataConfig


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> DataConfig:
    return write_shapes(tmp_path_factory.mktemp("shapes"))


@pytest.fixture
def run(shapes, tmp_path) -> Path:
    return write_run(tmp_path / "run", shapes)
