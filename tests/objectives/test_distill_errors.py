"""Teachers that can't teach a student, and data that neither can use: what is said about them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_aimv2 import CONFIG, VISION, P, counts_of, random_batch, random_model
from tiny_distill import MEAN, NATIVE, ROOT, STD, TEACHER, built, data_for, write_teacher

from aimv2 import pretrained
from aimv2.config import ConfigError, load_config, to_json
from aimv2.data.native import NativeConfig
from aimv2.exports import export_model
from aimv2.objectives.distill import DistillConfig
from aimv2.preprocessing import ProcessorConfig
from aimv2.weights import ModelError


def config_of(teacher: str, **settings) -> DistillConfig:
    return DistillConfig(student=CONFIG, teacher=teacher, **settings)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"feature_weight": -1.0}, "feature_weight -1.0: expected 0 or more"),
        ({"prediction_weight": -0.5}, "prediction_weight -0.5: expected 0 or more"),
        ({"feature_weight": 0.0, "prediction_weight": 0.0}, "are both 0: expected something to learn"),
        (
            {"teacher_image_size": 8},
            "teacher_image_size 8: expected at most .* 6, or a multiple of the 3 patches .*, and",
        ),
        ({"teacher_image_size": 0}, "teacher_image_size 0: expected"),
        ({"teacher": ""}, "teacher '': expected a path or a name of the hub"),
        ({"teacher": "none"}, "teacher 'none': expected a path or a name of the hub"),
    ],
)
def test_settings_that_make_no_sense(settings, expected):
    with pytest.raises(ValueError, match=expected):
        config_of(**{"teacher": "anywhere", **settings})


def test_there_is_no_teacher(tmp_path):
    config = config_of(str(tmp_path / "nothing"))
    config.check(data_for())  # it may be trained before this run starts
    with pytest.raises(ModelError, match="nothing: no such file or folder"):
        config.check_sources(data_for())
    with pytest.raises(ModelError, match="nothing: no such file or folder"):
        config.build()


@pytest.mark.parametrize(
    ("settings", "named", "offered"),
    [
        ({}, "objective.features=prefix", "objective.features=full"),
        (
            {"features": "full", "prediction_weight": 1.0},
            "objective.prediction_weight 1.0",
            "objective.prediction_weight=0",
        ),
    ],
)
def test_another_grid_can_be_compared_only_by_resizing(coarse, tmp_path, settings, named, offered):
    larger = replace(TEACHER, vision=replace(TEACHER.vision, image_size=8))
    for source, size, grid, right in ((coarse, 12, 4, 9), (write_teacher(tmp_path / "larger", larger), 12, 6, 6)):
        if settings and source == coarse:
            continue  # it predicts other patches, on whatever grid
        config = config_of(source, teacher_image_size=size, **settings)
        with pytest.raises(
            ConfigError, match=f"{grid}x{grid} patches in 12 px, the student 3x3, but {named} "
        ) as error:
            config.build()
        assert str(error.value).endswith(f"expected objective.teacher_image_size={right}, or {offered}")
    changes = {"features": "full", "prediction_weight": 0.0}  # as offered
    config_of(source, teacher_image_size=12, **changes).build()


def test_the_size_does_not_make_patches_of_the_teacher(coarse):
    with pytest.raises(ConfigError, match=r"patches of 3 px: expected .* a multiple, not 5, as 9") as error:
        config_of(coarse, teacher_image_size=5).build()
    assert "objective.teacher_image_size" in str(error.value)
    config_of(coarse, teacher_image_size=9).build()


@pytest.mark.parametrize("size", [9, 12])
def test_predictions_of_other_patches(coarse, size):
    """On the same grid, but of more pixels each; on another, that is not the first to be said: no size would do."""
    with pytest.raises(
        ConfigError, match=r"predicts for patch_size 3, but the student's is 2: .* objective.prediction_"
    ):
        config_of(coarse, teacher_image_size=size, prediction_weight=1.0).build()


def test_a_teacher_of_the_hub_is_asked_as_well(teacher, monkeypatch):
    """Its name is no path when the config is made; what the run asks before it begins finds all of it."""
    data, other = data_for(), data_for()
    other.transform.mean = (0.4, 0.5, 0.5)
    monkeypatch.setattr(pretrained, "download", lambda source, revision: Path(teacher))
    config = config_of("someone/teacher")
    config.check(other)
    config.check_sources(data)
    with pytest.raises(ConfigError, match=r"expects images of mean \(0.5, 0.5, 0.5\)"):
        config.check_sources(other)
    with pytest.raises(ConfigError, match="no tokenizer beside it"):
        config_of("someone/teacher", prediction_weight=1.0).check_sources(data)


def test_a_teacher_without_a_decoder(tmp_path):
    encoder = random_model(TEACHER, torch.float32).encoder
    processing = ProcessorConfig(image_size=VISION.image_size, patch_size=P, mean=MEAN, std=STD)
    export_model(encoder, tmp_path / "export", config=TEACHER.vision, processing=processing)
    with pytest.raises(ConfigError, match=r"has no decoder .*: expected another .* objective.prediction_weight=0"):
        config_of(str(tmp_path / "export"), prediction_weight=1.0).build()
    found = built(str(tmp_path / "export"), prediction_weight=0.0)(batch := random_batch(), counts_of(batch))
    assert found["feature_loss"].isfinite()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"vocab_size": 12}, "predicts for vocab_size 12, but the student's is 11"),
        ({"context_length": 5}, "context of 5 tokens, but the student's captions may have 6"),
    ],
)
def test_a_decoder_of_other_captions(tmp_path, changes, expected):
    source = write_teacher(tmp_path / "export", replace(TEACHER, decoder=replace(TEACHER.decoder, **changes)))
    with pytest.raises(ConfigError, match=expected):
        config_of(source, prediction_weight=1.0).build()
    config_of(source).build()


def test_captions_of_other_tokens(teacher, tmp_path):
    with pytest.raises(ConfigError, match=r"no tokenizer beside it, not data.tokenizer .*shapes"):
        config_of(teacher, prediction_weight=1.0).check_sources(data_for())
    config_of(teacher).check_sources(data_for())
    shapes = ROOT / "tokenizers" / "shapes"
    same = write_teacher(tmp_path / "same", tokenizer=shapes)
    config_of(same, prediction_weight=1.0).check_sources(data_for())
    changed = tmp_path / "tokenizer.model"
    changed.write_bytes((shapes / "tokenizer.model").read_bytes() + b"\n")
    other = write_teacher(tmp_path / "other", tokenizer=changed)
    with pytest.raises(
        ConfigError, match=r"the tokenizer of sha256 .* expected the same, or objective.prediction_weight=0"
    ):
        config_of(other, prediction_weight=1.0).check_sources(data_for())


def test_images_that_the_teacher_does_not_expect(teacher):
    data = data_for()
    data.transform.mean = (0.4, 0.5, 0.5)
    with pytest.raises(ConfigError, match=r"expects images of mean \(0.5, 0.5, 0.5\)"):
        config_of(teacher).check_sources(data)


def test_data_of_another_size(teacher):
    config = config_of(teacher, teacher_image_size=12, features="full")
    with pytest.raises(ValueError, match=r"data.transform.image_size 6: expected 12, the larger of .*") as error:
        config.check(data_for(6))
    for key in ("objective.student.vision.image_size 6", "objective.teacher_image_size 12"):
        assert key in str(error.value)
    config.check(data_for(12))
    with pytest.raises(ValueError, match=r"12 is not objective.student.vision.image_size 6"):
        config_of(teacher).check(data_for(12))
    with pytest.raises(ValueError, match=r"7 is more than objective.student.decoder.context_length"):
        config_of(teacher).check(data_for(context_length=7))


def test_native_data(native, coarse):
    def config(source: str, **settings) -> DistillConfig:
        return DistillConfig(student=NATIVE, teacher=source, **settings)

    data = data_for(native=NativeConfig(min_patches=4, max_patches=16))
    config(native).check(data)
    config(native).check_sources(data)
    with pytest.raises(ValueError, match=r"objective.teacher_image_size 12 with data.native: expected none"):
        config(native, teacher_image_size=12).check(replace(data, transform=replace(data.transform, image_size=12)))
    with pytest.raises(ConfigError, match=r"patches of 3 px, but data.native cuts images into the student's, 2 px"):
        config(coarse).check_sources(data)


def test_native_data_and_learned_positions(native):
    learned = replace(NATIVE, vision=replace(NATIVE.vision, positions="learned"))
    data = data_for(native=NativeConfig(min_patches=4, max_patches=16))
    with pytest.raises(ValueError, match=r"^objective\.student\.vision\.positions 'learned' with data\.native"):
        DistillConfig(student=learned, teacher=native).check(data)


def test_a_run_is_described_without_its_teacher(tmp_path):
    """That is done at every checkpoint, where a teacher that is damaged by then must not end the run."""
    damaged = tmp_path / "teacher"
    damaged.mkdir()
    run = load_config(ROOT / "tests" / "tiny_distilled.py", [f"objective.teacher={damaged}"])
    assert to_json(run)["objective"]["teacher"] == str(damaged)
