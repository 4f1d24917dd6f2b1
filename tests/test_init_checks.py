"""What initial weights must have in common with a run beyond their sizes, and what is said of them."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_init_from import SHA256, TOKENIZER, build, copied, export, load, same, with_vision
from tiny_models import LIT, NATIVE, V2, random_encoder, random_lit, write

from aimv2.checkpoint import saved_fingerprints
from aimv2.config import ConfigError
from aimv2.data.transforms import CLIP_MEAN, CLIP_STD, TransformConfig
from aimv2.init_from import InitFrom, check_initial, load_initial
from aimv2.objectives.distill import DistillConfig
from aimv2.objectives.lit import LiTObjective, LiTObjectiveConfig

AS_EXPORTED = TransformConfig(mean=CLIP_MEAN, std=CLIP_STD)
OTHER = TransformConfig()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return export(build(seed=0), tmp_path_factory.mktemp("checks") / "export", tokenizer=TOKENIZER)


def lit(**changes) -> LiTObjective:
    return LiTObjectiveConfig(model=replace(LIT, vision=replace(V2, **changes))).build()


def test_nothing_is_read_to_check(folder, monkeypatch):
    def read(*_):
        raise AssertionError("a weight was read")

    monkeypatch.setattr("aimv2.weights.WeightFiles.__getitem__", read)
    check_initial(with_vision(image_size=84), InitFrom(source=str(folder)), tokenizer_sha256=SHA256)


def test_weights_that_lack_some_are_found_without_reading(folder, tmp_path):
    """The names and shapes of all of them are in the file's head."""
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.blocks.1.norm2.weight"], weights["decoder.bos"]
    other = tmp_path / "other"
    other.mkdir()
    save_file(weights, other / "model.safetensors")
    (other / "config.json").write_bytes((folder / "config.json").read_bytes())
    for parts in (None, ["encoder"]):
        with pytest.raises(ValueError, match="does not fit"):
            check_initial(build().config, InitFrom(source=str(other), parts=parts), tokenizer_sha256=SHA256)


def test_reading_draws_nothing(folder):
    """Rank 0 alone reads, and all go on with the same random numbers."""
    objective = build()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    load(objective, folder)
    assert torch.equal(torch.rand(3), expected)


# -- Positions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["learned", "interpolated", "sincos"])
def test_a_locked_tower_keeps_its_positions(folder, positions):
    """New ones would never be learned, and those that it has never seen never be got used to."""
    objective = lit(positions=positions)
    before = copied(objective)
    with pytest.raises(ConfigError, match=r"init_from\.positions=replace: a locked tower would never learn"):
        load(objective, folder, positions="replace")
    assert same(objective.state_dict(), before)


def test_a_locked_tower_is_not_offered_to_drop_its_positions(folder, tmp_path):
    with pytest.raises(ConfigError, match="learned positions") as error:
        load(lit(positions="sincos"), folder)
    assert "replace" not in str(error.value)
    with pytest.raises(ConfigError, match=r"fixed positions.*objective\.model\.vision\.positions=sincos$"):
        load(lit(), write(tmp_path / "native.safetensors", NATIVE, "apple"))


@pytest.mark.parametrize(
    ("objective", "key"),
    [
        (build, "objective.vision"),
        (lambda config: DistillConfig(student=config, teacher="nobody"), "objective.student.vision"),
    ],
)
def test_settings_are_named_as_they_are_typed(folder, objective, key):
    config = objective(with_vision(positions="sincos"))
    config = getattr(config, "config", config)
    with pytest.raises(ConfigError, match=rf"the learned ones, {key}\.positions=interpolated keeps"):
        check_initial(config, InitFrom(source=str(folder)), tokenizer_sha256=SHA256)


@pytest.mark.parametrize(
    ("stored", "scale", "size", "fits"),
    [
        (1.0, 1.0, 84, True),  # on
        (1.0, 2 / 3, 84, True),  # over the same range
        (2 / 3, 0.666667, 56, True),  # as the error says it
        (2 / 3, 1.0, 56, False),
        (1.0, 0.5, 84, False),
    ],
)
def test_scales_of_fixed_positions(tmp_path, stored, scale, size, fits):
    """56 px are 4x4 patches, 84 are 6x6."""
    source = export(build(with_vision(positions="sincos", position_scale=stored), 0), tmp_path, tokenizer=TOKENIZER)
    objective = build(with_vision(positions="sincos", position_scale=scale, image_size=size))
    if fits:
        load(objective, source)
        return
    words = (
        rf"scale {stored:g}.* for 4x4 patches, the run's {scale:g} for .*objective\.vision\.position_scale={stored:g}"
    )
    with pytest.raises(ConfigError, match=words):
        load(objective, source)
    load(objective, source, positions="replace")


# -- Images ------------------------------------------------------------------------------------------------------------


def test_images_are_normalised_as_in_the_source(folder):
    init = InitFrom(source=str(folder))
    for objective in (build(), lit()):
        before = copied(objective)
        words = r"data\.transform\.mean=\[0\.48145466,0\.4578275,0\.40821073\] data\.transform\.std=\[0\.26862954,"
        with pytest.raises(ConfigError, match=words):
            load_initial(objective, objective.config, init, tokenizer_sha256=SHA256, transform=OTHER)
        assert same(objective.state_dict(), before)
        load_initial(objective, objective.config, init, tokenizer_sha256=SHA256, transform=AS_EXPORTED)


def test_nothing_is_known_of_bare_weights(tmp_path):
    init = InitFrom(source=str(write(tmp_path / "bare.safetensors", V2, "ours")), parts=["encoder"])
    for transform in (OTHER, AS_EXPORTED):
        check_initial(build().config, init, tokenizer_sha256=None, transform=transform)


# -- What is not loaded, and what is said ------------------------------------------------------------------------------


def test_a_lit_s_text_tower_is_not_left_behind_silently(tmp_path):
    source = export(random_lit(), tmp_path / "lit")
    with pytest.raises(ConfigError, match=r"is a LiT, whose text tower isn't loaded: .*parts=\[encoder\]"):
        load(lit(), source)
    objective = lit()
    load(objective, source, parts=["encoder"])
    assert same(objective.encoder.state_dict(), random_lit().encoder.state_dict())


def test_what_was_loaded_is_logged(folder, tmp_path, caplog):
    native = write(tmp_path / "native.safetensors", NATIVE, "apple")
    runs = [
        (build(), folder, {}, f"the encoder and decoder of {folder}/model.safetensors: learned positions, 4x4 to 4x4"),
        (build(with_vision(image_size=84)), folder, {}, "learned positions, 4x4 to 6x6 patches, interpolated"),
        (build(), folder, {"positions": "replace"}, "its learned positions are dropped, and learned ones begin anew"),
        (build(), folder, {"parts": ["decoder"]}, "the decoder of"),
        (build(with_vision(positions="sincos")), native, {"parts": ["encoder"]}, "16x16 to 4x4 patches, scale 1 to 1"),
    ]
    for objective, source, settings, words in runs:
        caplog.clear()
        with caplog.at_level(logging.INFO, "aimv2"):
            load(objective, source, **settings)
        assert words in caplog.text


def test_the_digest_tells_how_positions_were_laid(tmp_path):
    """A locked tower is read again when a run goes on: the same weights for another grid would see otherwise."""
    digests = {
        load(build(with_vision(positions="sincos")), write_at(tmp_path / f"{size}", size), None, parts=["encoder"])
        for size in (56, 112)
    }
    assert len(digests) == 2


def write_at(folder: Path, size: int) -> Path:
    config = replace(NATIVE, image_size=size)
    return export(random_encoder(config), folder, config=config, format="ours")


# -- A run that goes on ------------------------------------------------------------------------------------------------


def test_the_digest_of_a_run_that_goes_on(tmp_path):
    """A damaged manifest is passed over; where all are, it is not as if there were none."""
    assert saved_fingerprints(tmp_path) is None
    for step, text in ((1, '{"fingerprints": {"init_from": "a"}}'), (2, "{"), (10, "")):
        manifest = tmp_path / "checkpoints" / f"step_{step:08d}" / "MANIFEST.json"
        manifest.parent.mkdir(parents=True)
        manifest.write_text(text)
    (tmp_path / "checkpoints" / ".tmp-step_00000020").mkdir()
    assert saved_fingerprints(tmp_path) == {"init_from": "a"}
    (tmp_path / "checkpoints" / "step_00000001" / "MANIFEST.json").unlink()
    assert saved_fingerprints(tmp_path) == {}
