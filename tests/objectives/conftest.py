"""Teachers for the tests of distillation."""

from dataclasses import replace

import pytest
from tiny_distill import TEACHER, write_teacher


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    return write_teacher(tmp_path_factory.mktemp("teacher") / "export")


@pytest.fixture(scope="module")
def coarse(tmp_path_factory) -> str:
    """A teacher of 4 x 4 patches of 3 px: the student's are 3 x 3 of 2 px."""
    config = replace(TEACHER, vision=replace(TEACHER.vision, image_size=12, patch_size=3))
    return write_teacher(tmp_path_factory.mktemp("coarse") / "export", config)


@pytest.fixture(scope="module")
def native(tmp_path_factory) -> str:
    config = replace(TEACHER, vision=replace(TEACHER.vision, positions="sincos"))
    return write_teacher(tmp_path_factory.mktemp("native") / "export", config)
