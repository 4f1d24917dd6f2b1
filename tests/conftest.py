"""What the tests of a whole run share."""

import os
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # two processes on two cores: one thread each, and in what they start
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from processes import TINY_RUN, arguments

from aimv2.config import load_config
from aimv2.data.shapes import write_shards


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """The folder of the data of tiny_run.py, written."""
    folder = tmp_path_factory.mktemp("tiny")
    write_shards(load_config(TINY_RUN, [f"data.made_by.folder={folder}"]).data.made_by)
    return folder


@pytest.fixture(scope="session")
def tiny_run(tiny_data):
    """`tiny_run(out, *changes, config=...)` -> the arguments of scripts/train_aimv2.py for that run."""
    return lambda out, *changes, **config: arguments(tiny_data, out, *changes, **config)
