"""Trained models: `load_encoder` and `load_model`, from files and folders of every layout and from the hub.

What a checkpoint is, is told by the names of its weights, and its sizes by their shapes; a config file only adds what
they don't say (heads, eps, preprocessing). `aimv2.layouts` has the names, `aimv2.exports` writes them.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from aimv2.config import ConfigError
from aimv2.data.transforms import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, TransformConfig
from aimv2.encoder import SIZES, VisionConfig, VisionEncoder, vision_config
from aimv2.exports import CONFIG, PREPROCESSOR, empty_model, export_architecture, read_export_config, shapes_of
from aimv2.features import FeatureEncoder, block_numbers
from aimv2.hub import download
from aimv2.layouts import Layout, find_lit, find_vision, infer_lit, infer_vision, misfits, parts, to_ours
from aimv2.lit import LiT, LiTConfig
from aimv2.objectives.aimv2 import AIMv2, AIMv2Config
from aimv2.positions import resize_positions
from aimv2.preprocessing import ProcessorConfig
from aimv2.processor import Processor
from aimv2.weights import ModelError, WeightFiles, find_weights

_RANDOM = "random:"


def load_encoder(
    source: str | Path,
    *,
    layer: int | Sequence[int] = -1,
    norm: bool = True,
    combine: str = "concat",
    image_size: int | str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    frozen: bool = True,
    checkpointing: bool = False,
    revision: str | None = None,
) -> FeatureEncoder:
    """A vision encoder, ready to be called with the images that its `.processor` prepares.

    Args:
        source: a folder or file of weights, of our exports, Apple's releases or trainer, transformers or timm; a name
            of the hub, as `aimv2-large-patch14-336`, `aimv2_large_patch14_336.apple_pt` or `aim-600M-2B-imgs`, or any
            `owner/repository`; or `random:large-336` for one without training.
        layer: the block whose output is taken, from 0, or from the last with negative numbers; or several. Blocks above
            the highest are neither read nor run.
        norm: apply the encoder's final norm to it.
        combine: of several layers: "concat" (along D, in the order given) or "mean".
        image_size: None: the checkpoint's own. Another number of pixels: learned positions are interpolated once
            (bicubic, anti-aliased), fixed ones laid over the range that they were trained on (of AIM v1 too; a native
            model's run on). "native": any size and shape that the patches divide; learned positions are then
            interpolated for each, fixed ones run on.
        dtype: of the weights; None: as stored.
        frozen: no gradients, and eval mode whatever `train()` is told.
        checkpointing: recompute each block in the backward pass.
        revision: branch, tag or commit of a hub repository.

    Raises:
        ModelError (a ValueError): nothing there, another layout, damaged, or names and shapes that don't fit, all
            listed.
    """
    _check_dtype(dtype)
    untrained = str(source).startswith(_RANDOM)
    if untrained:
        stored, processing = _random(str(source))
    else:
        checkpoint = open_checkpoint(source, revision=revision, device=device)
        stored, layout, prefix = checkpoint.vision()
        processing = checkpoint.processor_config(stored, layout)
    layers = block_numbers(layer, stored.depth)
    config = sized(replace(stored, depth=max(layers) + 1, checkpointing=checkpointing), image_size, processing)
    with outside_zero_init() as zero_dtype:
        if untrained:
            encoder = VisionEncoder(config).to(device=device, dtype=dtype or zero_dtype)
        else:
            encoder = checkpoint.read_vision(config, stored, layout, prefix, dtype or zero_dtype)
        processor = Processor(resized(processing, image_size))
        return FeatureEncoder(encoder, processor, layers=layers, norm=norm, combine=combine, frozen=frozen)


def load_model(
    source: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    revision: str | None = None,
) -> AIMv2 | LiT | VisionEncoder:
    """The whole of what a checkpoint holds, in eval mode: AIMv2 with its decoder, LiT, or else the bare encoder.

    A head on top of an encoder is left out. `source`, but for `random:`, and errors are those of `load_encoder`.
    """
    _check_dtype(dtype)
    return open_checkpoint(source, revision=revision, device=device).read_whole(dtype)


def load_configs(
    source: str | Path, *, image_size: int | str | None = None, revision: str | None = None
) -> tuple[VisionConfig, ProcessorConfig]:
    """What `load_encoder` would build and prepare images by, all blocks included, without reading a weight.

    Arguments and errors are `load_encoder`'s.
    """
    if str(source).startswith(_RANDOM):
        vision, processing = _random(str(source))
    else:
        checkpoint = open_checkpoint(source, revision=revision)
        vision, layout, _ = checkpoint.vision()
        processing = checkpoint.processor_config(vision, layout)
    return sized(vision, image_size, processing), resized(processing, image_size)


@dataclass(slots=True)
class Checkpoint:
    """Weights, and what lies beside them."""

    path: Path
    weights: WeightFiles
    config: dict  # config.json of whichever library, or empty
    preprocessor: dict | None  # preprocessor_config.json

    @property
    def is_ours(self) -> bool:
        return "format" in self.config

    def vision(self) -> tuple[VisionConfig, Layout, str]:
        """The encoder's config, the layout of its names, and what precedes them."""
        layout, prefix = self.named(find_vision, self.weights.shapes)
        if self.is_ours:
            config = self.named(export_architecture, self.config)
            return config if isinstance(config, VisionConfig) else config.vision, layout, prefix
        described = self.config.get("vision_config") or self.config
        width = self.weights.shapes[prefix + parts(layout.vision, "patch_embed.weight")[0]][0]
        if (other := described.get("hidden_size", width)) != width:
            raise ModelError(
                f"{self.path}: the {CONFIG} beside it is another model's, of hidden_size {other}, not {width}"
            )
        hints = _hints(described)
        return self.named(infer_vision, self.weights.shapes, layout.vision, prefix, hints=hints), layout, prefix

    def read_vision(
        self, config: VisionConfig, stored: VisionConfig, layout: Layout, prefix: str, dtype: torch.dtype | None
    ) -> VisionEncoder:
        """The encoder of `config`, which may have fewer blocks or another grid than the one that is stored."""
        encoder = self.named(empty_model, config)
        allowed = (prefix + layout.head,) if layout.head else ()
        self.check(shapes_of(empty_model(stored)), layout.vision, prefix, allowed)
        state = {}
        for name, shape in shapes_of(encoder).items():
            if name == "positions.weight":
                table = to_ours(self.weights, layout.vision, name, (1, stored.num_patches, stored.width), prefix)
                tensor = resize_positions(table, (stored.grid, stored.grid), (config.grid, config.grid))
            else:
                tensor = to_ours(self.weights, layout.vision, name, shape, prefix)
            state[name] = tensor.to(dtype=dtype)
        encoder.load_state_dict(state, assign=True)
        return encoder

    def whole(self) -> tuple[AIMv2Config | LiTConfig | VisionConfig, dict | None, str, tuple[str, ...]]:
        """The config of all there is, the names of its weights, what precedes them, and what may be there besides."""
        shapes = self.weights.shapes
        if self.is_ours:
            return self.named(export_architecture, self.config), None, "", ()
        if layout := find_lit(shapes):
            hints = {f"{tower}_hints": _hints(self.config.get(f"{tower}_config") or {}) for tower in ("vision", "text")}
            return self.named(infer_lit, shapes, layout.lit, **hints), layout.lit, "", ()
        config, layout, prefix = self.vision()
        return config, layout.vision, prefix, (prefix + layout.head,) if layout.head else ()

    def read_whole(self, dtype: torch.dtype | None = None) -> AIMv2 | LiT | VisionEncoder:
        """The model of `whole`, in eval mode."""
        config, names, prefix, allowed = self.whole()
        with outside_zero_init() as zero_dtype:
            model = self.named(empty_model, config)
            shapes, weights = shapes_of(model), self.weights
            self.check(shapes, names, prefix, allowed)
            state = {name: to_ours(weights, names, name, shape, prefix) for name, shape in shapes.items()}
            model.load_state_dict({k: tensor.to(dtype=dtype or zero_dtype) for k, tensor in state.items()}, assign=True)
        return model.eval()

    def processor_config(self, vision: VisionConfig, layout: Layout) -> ProcessorConfig:
        """What the checkpoint itself says; what is known of its origin where it says nothing."""
        try:
            if self.is_ours:
                return ProcessorConfig.from_preprocessing(self.config["preprocessing"], vision.patch_size)
            if self.preprocessor is not None:
                return ProcessorConfig.from_transformers(self.preprocessor, vision.patch_size)
            if self.config.get("pretrained_cfg"):
                return ProcessorConfig.from_timm(self.config["pretrained_cfg"], vision.patch_size)
        except ValueError as error:
            raise ModelError(f"{self.path}: preprocessing: {error}") from error
        return default_processing(vision, layout.name)

    def check_normalisation(self, transform: TransformConfig) -> None:
        """Raise ConfigError if a run's images are not normalised as the encoder was trained.

        Bare weights don't say how they were: then nothing is compared.
        """
        if not (self.is_ours or self.preprocessor is not None or self.config.get("pretrained_cfg")):
            return
        theirs = self.processor_config(*self.vision()[:2])
        if (theirs.mean, theirs.std) != (tuple(transform.mean), tuple(transform.std)):
            typed = {name: "[" + ",".join(map(str, getattr(theirs, name))) + "]" for name in ("mean", "std")}
            raise ConfigError(
                f"{self.path} expects images of mean {theirs.mean} and std {theirs.std}, but data.transform has "
                f"{transform.mean} and {transform.std}: expected data.transform.mean={typed['mean']} "
                f"data.transform.std={typed['std']}"
            )

    def check(self, expected: dict, names: dict | None, prefix: str, allowed: tuple[str, ...] = ()) -> None:
        """Raise ModelError with all that is missing, unexpected or of another shape than `expected`."""
        if problems := misfits(expected, self.weights.shapes, names, prefix, allowed):
            raise ModelError(f"{self.path} does not fit: {'; '.join(problems)}")

    def named(self, function, *args, **kwargs):
        """An error of `function` with the file's name."""
        try:
            return function(*args, **kwargs)
        except ValueError as error:
            raise ModelError(f"{self.path}: {error}") from error


def _check_dtype(dtype: torch.dtype | None) -> None:
    if not isinstance(dtype, torch.dtype | None):
        raise ValueError(f"dtype {dtype!r}: expected a torch.dtype, as torch.bfloat16")


def default_processing(vision: VisionConfig, layout: str) -> ProcessorConfig:
    """For weights without a word about it: AIM v1 and Apple's trainer as AIM evaluates, the rest as on the hub."""
    as_aim = vision.norm == "layernorm" or layout == "apple-trainer"
    native = vision.positions == "sincos" and not as_aim
    return ProcessorConfig(
        image_size=None if native else vision.image_size,
        patch_size=vision.patch_size,
        mean=IMAGENET_MEAN if as_aim else CLIP_MEAN,
        std=IMAGENET_STD if as_aim else CLIP_STD,
        resize="native" if native else "shortest_edge",
        crop_pct=0.875 if as_aim else 1.0,
    )


def sized(config: VisionConfig, image_size: int | str | None, processing: ProcessorConfig) -> VisionConfig:
    """The encoder for images of another size. Raises ValueError for a size that isn't one.

    Fixed positions are laid over the range that they were trained on, but for a native model, trained on many.
    """
    if image_size == "native":
        return replace(config, positions="interpolated") if config.positions == "learned" else config
    if image_size is None:
        return config
    if not isinstance(image_size, int) or image_size < 1:
        raise ValueError(f"image_size {image_size!r}: expected pixels, a multiple of {config.patch_size}, or 'native'")
    new = replace(config, image_size=image_size)
    if config.positions == "sincos" and processing.resize != "native":
        new.position_scale *= config.grid / new.grid
    return new


def resized(config: ProcessorConfig, image_size: int | str | None) -> ProcessorConfig:
    """The processor for images of another size; the share that the centre crop keeps stays as it is.

    A native model has been trained on whole images: at one size it is given them squashed.
    """
    if image_size == "native":
        return replace(config, image_size=None, resize="native")
    if image_size is None:
        return config
    resize = "squash" if config.resize == "native" else config.resize
    return replace(config, image_size=image_size, resize=resize)


def open_checkpoint(
    source: str | Path, *, revision: str | None = None, device: torch.device | str | None = None
) -> Checkpoint:
    """Find a checkpoint, downloading it if it is a name of the hub, and open its weights."""
    path = Path(source).expanduser()
    if not path.exists():
        path = download(str(source), revision)
    folder = path if path.is_dir() else path.parent
    if path.is_dir():
        if not any(folder.iterdir()):
            raise ModelError(f"{folder} is an empty folder")
        path = find_weights(folder)
    config = _read_json(folder / CONFIG) or {}
    if "format" in config:
        config = read_export_config(folder)
    return Checkpoint(path, WeightFiles(path, device), config, _read_json(folder / PREPROCESSOR))


def _random(source: str) -> tuple[VisionConfig, ProcessorConfig]:
    """Of `random:SIZE`, `random:SIZE-PIXELS` or `random:SIZE-native`."""
    size, _, pixels = source.removeprefix(_RANDOM).rpartition("-")
    if not size or not (pixels.isdigit() or pixels == "native"):
        size, pixels = source.removeprefix(_RANDOM), "224"
    if size not in SIZES:
        raise ModelError(f"{source}: expected random:SIZE-PIXELS or random:SIZE-native, SIZE one of {', '.join(SIZES)}")
    config = vision_config(size, positions="sincos") if pixels == "native" else vision_config(size, int(pixels))
    return config, default_processing(config, "random")


def _hints(config: dict) -> dict:
    """What the shapes don't tell, from a config of transformers, Apple or timm."""
    config = config | (config.get("model_args") or {})
    names = {
        "num_attention_heads": "heads",
        "num_heads": "heads",
        "rms_norm_eps": "norm_eps",
        "image_size": "image_size",
        "eos_token_id": "eos",
    }
    known = {ours: config[theirs] for theirs, ours in names.items() if isinstance(config.get(theirs), int | float)}
    return {name: value for name, value in known.items() if value > 0 or name == "eos"}


def _read_json(path: Path) -> dict | None:
    if not path.is_file():
        return None
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not JSON: {error}") from error
    if not isinstance(contents, dict):
        raise ModelError(f"{path}: expected an object, found {type(contents).__name__}")
    return contents


@contextmanager
def outside_zero_init() -> Iterator[torch.dtype | None]:
    """Modules are made whole here, even within `deepspeed.zero.Init`.

    That would share out their parameters first and leave the weights no place to go. `deepspeed.initialize` shares them
    out later, but wants them in the dtype that `zero.Init` gives all others: the value, None without it.
    """
    zero = sys.modules.get("deepspeed.runtime.zero.partition_parameters")
    if zero is None or zero.top_level_context is None:
        yield None
        return
    zero.shutdown_init_context()
    try:
        yield zero.top_level_context.dtype
    finally:
        zero.restore_init_context()
