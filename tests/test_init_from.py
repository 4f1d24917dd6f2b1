from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny_models import LIT, NATIVE, V2, random_encoder, random_lit, randomised, write
from torch import nn

from aimv2.config import ConfigError, override, to_json
from aimv2.data.tokenizer import Tokenizer
from aimv2.data.transforms import CLIP_MEAN, CLIP_STD
from aimv2.decoder import DecoderConfig
from aimv2.exports import export_model
from aimv2.init_from import InitFrom, load_initial, open_objective
from aimv2.layouts import LAYOUTS
from aimv2.objectives.aimv2 import AIMv2, AIMv2Config
from aimv2.objectives.distill import DistillConfig
from aimv2.objectives.lit import LiTObjectiveConfig
from aimv2.preprocessing import ProcessorConfig
from aimv2.pretrained import load_encoder, load_model
from aimv2.weights import ModelError

TOKENIZER = Path(__file__).parents[1] / "tokenizers" / "shapes"
SHA256 = Tokenizer(TOKENIZER).fingerprint
CONFIG = AIMv2Config(
    vision=V2, decoder=DecoderConfig(width=24, depth=2, heads=2, mlp_hidden=40, vocab_size=128, context_length=6)
)
PROCESSING = ProcessorConfig(image_size=56, patch_size=14, mean=CLIP_MEAN, std=CLIP_STD)


def with_vision(**changes) -> AIMv2Config:
    return replace(CONFIG, vision=replace(CONFIG.vision, **changes))


def with_decoder(**changes) -> AIMv2Config:
    return replace(CONFIG, decoder=replace(CONFIG.decoder, **changes))


def build(config: AIMv2Config = CONFIG, seed: int = 1) -> AIMv2:
    torch.manual_seed(seed)
    return randomised(config.build())


def export(model: nn.Module, folder: Path, **settings) -> Path:
    settings = {"config": model.config, "processing": PROCESSING} | settings
    return export_model(model, folder, **settings)


def copied(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def source() -> AIMv2:
    return build(seed=0)


@pytest.fixture(scope="module")
def folder(source, tmp_path_factory) -> Path:
    return export(source, tmp_path_factory.mktemp("source") / "export", tokenizer=TOKENIZER)


def load(objective: nn.Module, folder: Path, sha256: str | None = SHA256, **settings) -> str:
    config = getattr(objective, "settings", objective.config)
    return load_initial(objective, config, InitFrom(source=str(folder), **settings), tokenizer_sha256=sha256)


# -- What is copied ----------------------------------------------------------------------------------------------------


def test_everything(source, folder):
    objective = build()
    load(objective, folder)
    assert same(objective.state_dict(), source.state_dict())
    assert all(p.requires_grad and not p.is_inference() for p in objective.parameters())


def test_the_file_is_not_trained(folder):
    """Weights are mapped from the file: a step that wrote to them would change it, or fail."""
    before = (folder / "model.safetensors").read_bytes()
    objective = build()
    load(objective, folder)
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.add_(1)
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_one_part_leaves_the_other(source, folder, part):
    objective = build()
    before = copied(objective)
    load(objective, folder, parts=[part])
    for name, tensor in objective.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[name] if name.startswith(part) else before[name])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_encoders_of_every_layout(tmp_path, layout):
    objective = build()
    digest = load(objective, write(tmp_path / "weights.pth", V2, layout), None, parts=["encoder"])
    assert same(objective.encoder.state_dict(), random_encoder(V2).state_dict())
    assert digest == load(build(), write(tmp_path / "ours.safetensors", V2, "ours"), None, parts=["encoder"])


def test_objectives_without_a_decoder_and_sources_with_more(folder, tmp_path):
    """A LiT starts from an AIMv2's encoder, and an AIMv2 from a LiT's."""
    lit = random_lit(replace(LIT, vision=V2), seed=3)
    before = copied(lit.text_encoder)
    load(lit, folder, None)
    assert same(lit.encoder.state_dict(), load_model(folder).encoder.state_dict())
    assert same(lit.text_encoder.state_dict(), before)
    other = random_lit(seed=4)
    objective = build()
    load(objective, export(other, tmp_path / "lit", format="transformers"), None, parts=["encoder"])
    assert same(objective.encoder.state_dict(), other.encoder.state_dict())


def test_frozen_weights_and_other_types(folder, source, tmp_path):
    small = export(source, tmp_path / "bf16", dtype=torch.bfloat16, tokenizer=TOKENIZER)
    objective = build().requires_grad_(False)
    load(objective, small)
    assert not any(p.requires_grad for p in objective.parameters())
    assert all(p.dtype == torch.float32 for p in objective.parameters())
    assert same(objective.state_dict(), {name: t.bfloat16().float() for name, t in source.state_dict().items()})


def test_every_objective(folder, source):
    """Distillation fills its student; LiT the tower that it locks, which stays locked."""
    distill = DistillConfig(student=CONFIG, teacher=str(folder)).build()
    digest = load(distill, folder)
    assert same(distill.student.state_dict(), source.state_dict())
    lit = LiTObjectiveConfig(model=replace(LIT, vision=V2)).build()
    before = copied(lit.model.text_encoder)
    assert load(lit, folder, None) != digest
    assert same(lit.model.encoder.state_dict(), source.encoder.state_dict())
    assert same(lit.model.text_encoder.state_dict(), before)
    assert not any(p.requires_grad for p in lit.model.encoder.parameters())


# -- Positions ---------------------------------------------------------------------------------------------------------


def test_a_larger_grid(source, folder):
    """The table as torch's own resampling of it as an image; all else, the decoder too, as it was."""
    objective = build(with_vision(image_size=84))
    load(objective, folder)
    table = source.encoder.positions.weight.view(1, 4, 4, 256).permute(0, 3, 1, 2)
    table = F.interpolate(table, (6, 6), mode="bicubic", antialias=True).permute(0, 2, 3, 1).reshape(1, 36, 256)
    expected = source.state_dict() | {"encoder.positions.weight": table}
    assert same(objective.state_dict(), expected)
    again = load_encoder(folder, image_size=84).encoder
    assert torch.equal(objective.encoder.positions.weight, again.positions.weight)


def test_learned_positions_go_on_as_those_of_any_size(folder, source):
    objective = build(with_vision(positions="interpolated", image_size=84))
    load(objective, folder)
    image = torch.randn(1, 3, 84, 84)
    assert torch.equal(objective.encoder(image), load_encoder(folder, image_size=84)(image))


@pytest.mark.parametrize(("positions", "image_size"), [("sincos", 56), ("learned", 56), ("learned", 84)])
def test_positions_that_are_replaced(source, folder, positions, image_size):
    objective = build(with_vision(positions=positions, image_size=image_size))
    before = copied(objective)
    load(objective, folder, positions="replace")
    table = "encoder.positions.weight"
    for name, tensor in objective.state_dict().items():
        assert torch.equal(tensor, before[name] if name == table else source.state_dict()[name])


def test_fixed_positions(tmp_path):
    """They have no weights: any size goes on from any other, and from them a table only if that is meant."""
    path = write(tmp_path / "native.safetensors", NATIVE, "apple")
    objective = build(with_vision(positions="sincos"))
    load(objective, path, None, parts=["encoder"])
    assert same(objective.encoder.state_dict(), random_encoder(NATIVE).state_dict())
    objective = build()
    before = copied(objective)
    with pytest.raises(ConfigError, match=r"fixed positions, but the run's are 'learned'.*=sincos.*=replace"):
        load(objective, path, None, parts=["encoder"])
    assert same(objective.state_dict(), before)
    load(objective, path, None, parts=["encoder"], positions="replace")
    assert torch.equal(objective.encoder.norm.weight, random_encoder(NATIVE).norm.weight)


def test_a_224_export_in_a_native_run(folder):
    words = r"learned positions, for 56 px, but the run's are fixed \('sincos'\).*=replace drops.*=interpolated keeps"
    with pytest.raises(ConfigError, match=words):
        load(build(with_vision(positions="sincos")), folder)


# -- The digest --------------------------------------------------------------------------------------------------------


def test_the_digest_tells_weights_apart_and_nothing_else(folder, tmp_path):
    digest = load(build(), folder)
    assert digest == load(build(with_vision(image_size=84)), folder) == load(build(seed=5), folder)
    parts = {load(build(), folder, parts=[part]) for part in ("encoder", "decoder")}
    assert len({digest, *parts}) == 3
    weights = load_file(folder / "model.safetensors")
    for name in ("encoder.blocks.1.norm2.weight", "decoder.bos"):
        other = tmp_path / name
        other.mkdir()
        (other / "config.json").write_bytes((folder / "config.json").read_bytes())
        tensor = weights[name].clone()
        tensor[0] += 1e-6
        save_file(weights | {name: tensor}, other / "model.safetensors")
        assert load(build(), other) != digest


# -- What does not fit -------------------------------------------------------------------------------------------------

OFFER = r"or init_from\.parts=\[encoder\], with a decoder that begins anew"


@pytest.mark.parametrize(
    ("config", "sha256", "words"),
    [
        (with_vision(heads=4, depth=2), SHA256, "encoder is not of the run's sizes: depth 3, not 2; heads 2, not 4$"),
        (with_vision(norm_eps=1e-6), SHA256, "norm_eps 1e-05, not 1e-06"),
        (with_vision(patch_size=28), SHA256, "patch_size 14, not 28"),
        (
            with_decoder(heads=4, context_length=9),
            SHA256,
            f"heads 2, not 4; context_length 6, not 9: expected the same, {OFFER}",
        ),
        (CONFIG, "0" * 64, f"the tokenizer of sha256 {SHA256[:12]}, the run's is of sha256 000000000000: .* {OFFER}"),
        (CONFIG, None, f"the run has none: expected the same, {OFFER}"),
    ],
)
def test_other_sizes_and_tokens(folder, config, sha256, words):
    objective = build(config)
    before = copied(objective)
    with pytest.raises(ConfigError, match=words):
        load(objective, folder, sha256)
    assert same(objective.state_dict(), before)  # the encoder would have fitted: all or nothing
    if OFFER in words:
        load(objective, folder, None, parts=["encoder"])


def test_a_decoder_for_another_encoder(folder):
    for vision, words in (
        (replace(V2, width=128, heads=1), "its decoder is for an encoder of width 256, but the run's has 128"),
        (replace(V2, patch_size=28), "its decoder is for an encoder of patch_size 14, but the run's has 28"),
    ):
        with pytest.raises(ConfigError, match=words):
            load(build(replace(CONFIG, vision=vision)), folder, parts=["decoder"])
    deeper = replace(CONFIG, vision=replace(V2, depth=4))
    load(build(deeper), folder, parts=["decoder"])


def test_sources_without_a_decoder(source, tmp_path):
    for name in ("apple", "transformers", "timm"):
        path = export(source, tmp_path / name, format=name)
        with pytest.raises(ModelError, match=f"is a bare encoder: expected an AIMv2 of ours, for its decoder, {OFFER}"):
            load(build(), path)
    lit = export(random_lit(), tmp_path / "lit")
    with pytest.raises(ModelError, match=f"is a LiT: expected an AIMv2 of ours, for its decoder, {OFFER}"):
        load(build(), lit)
    bare = export(source, tmp_path / "without_tokenizer")
    with pytest.raises(
        ConfigError, match=f"has no tokenizer beside it, the run's is of sha256 {SHA256[:12]}: .* {OFFER}"
    ):
        load(build(), bare)


def test_parts_that_the_objective_lacks(folder):
    with pytest.raises(ConfigError, match=r"init_from\.parts \['decoder'\]: expected what the objective has, encoder"):
        load(random_lit(), folder, parts=["decoder"])


def test_sources_that_are_not_there_or_damaged(folder, tmp_path):
    with pytest.raises(ModelError, match="no such file or folder"):
        load(build(), tmp_path / "nothing")
    run = tmp_path / "run" / "export"
    run.mkdir(parents=True)
    for file in ("config.json", "model.safetensors"):
        (run / file).write_bytes((folder / file).read_bytes())
    with pytest.raises(ModelError, match=f"did you mean {run}"):
        load(build(), run.parent)
    weights = run / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged"):
        load(build(), run)
    state = load_file(folder / "model.safetensors")
    del state["decoder.bos"]
    save_file(state, weights)
    objective = build()
    before = copied(objective)
    with pytest.raises(ModelError, match=r"decoder\.bos is missing"):
        load(objective, run)
    assert same(objective.state_dict(), before)


def test_settings_are_checked_and_kept():
    @dataclass
    class Run:
        init_from: InitFrom | None = None

    run = Run(InitFrom(source="a"))
    changed = override(run, ["init_from.parts=[encoder]", "init_from.positions=replace"])
    assert changed.init_from == InitFrom(source="a", parts=["encoder"], positions="replace")
    assert override(Run(), ['init_from={"source": "a"}']) == run
    assert to_json(run) == {"init_from": {"source": "a", "parts": None, "positions": "interpolate"}}
    for text, words in (
        ("parts=[text]", "'encoder' | 'decoder'"),
        ("parts=[encoder, encoder]", "expected one or both"),
        ("positions=drop", "'interpolate' | 'replace'"),
    ):
        with pytest.raises(ConfigError, match=words.replace("|", r"\|")):
            override(run, [f"init_from.{text}"])
    with pytest.raises(ValueError, match="expected one or both of encoder, decoder"):
        InitFrom(source="a", parts=[])


# -- Reading a whole model for another size ----------------------------------------------------------------------------


@torch.no_grad()
def test_a_whole_model_at_another_size(source, folder):
    for size in (None, 56):
        assert same(open_objective(str(folder), size).state_dict(), source.state_dict())
    model = open_objective(str(folder), 84)
    assert model.config == with_vision(image_size=84) and not model.training
    images, text = torch.randn(2, 3, 84, 84), torch.randint(2, 128, (2, 4))
    features = load_encoder(folder, image_size=84)(images)
    assert torch.equal(model.encoder(images), features)
    for theirs, ours in zip(source.decoder(features, text), model.decoder(features, text), strict=True):
        assert torch.equal(theirs, ours)
    native = open_objective(str(folder), "native")
    assert native.config == with_vision(positions="interpolated")
    assert torch.equal(native.encoder(images), features)


@torch.no_grad()
def test_fixed_positions_at_another_size(tmp_path):
    """Those of a model for one size keep their range, on a finer grid; those of a native one go on."""
    model = build(with_vision(positions="sincos"))
    images = torch.randn(1, 3, 112, 112)
    folder = export(model, tmp_path / "fixed")
    wide = open_objective(str(folder), 112)
    assert wide.config == with_vision(positions="sincos", image_size=112, position_scale=0.5)
    coarse, fine = model.encoder.positions(4, 4), wide.encoder.positions(8, 8)
    assert torch.equal(fine.unflatten(0, (8, 8))[::2, ::2], coarse.unflatten(0, (4, 4)))
    assert open_objective(str(folder)).config == model.config
    assert same(open_objective(str(folder), "native").state_dict(), model.state_dict())
    folder = export(model, tmp_path / "native", processing=replace(PROCESSING, image_size=None, resize="native"))
    assert torch.equal(open_objective(str(folder), 112).encoder(images), model.encoder(images))


def test_fixed_positions_may_be_laid_otherwise(tmp_path):
    """The scale is the run's: it starts from any other."""
    source = build(with_vision(positions="sincos"), seed=0)
    folder = export(source, tmp_path / "fixed", tokenizer=TOKENIZER)
    objective = build(with_vision(positions="sincos", image_size=84, position_scale=2 / 3))
    load(objective, folder)
    assert same(objective.state_dict(), source.state_dict())
    assert objective.encoder.positions.scale == 2 / 3


def test_what_is_no_aimv2_or_no_size(folder, tmp_path):
    with pytest.raises(ModelError, match="is a bare encoder: expected an AIMv2 of ours"):
        open_objective(write(tmp_path / "bare.safetensors", V2, "ours"))
    with pytest.raises(ModelError, match="is a LiT: expected an AIMv2 of ours"):
        open_objective(export(random_lit(), tmp_path / "lit"))
    for size in (57, 0, "large"):
        with pytest.raises(ValueError, match=str(size)):
            open_objective(str(folder), size)
