"""Speed and memory of our encoder beside transformers' and timm's AIMv2 of the same shape, and of a train step."""

import argparse
import copy
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from benchmark_rounds import compare, time_rounds
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from aimv2.data.batch import Batch, Counts, count_targets
from aimv2.decoder import DecoderConfig
from aimv2.encoder import VisionConfig, VisionEncoder, vision_config
from aimv2.flops import encoder_flops, peak_flops, training_flops
from aimv2.objectives.aimv2 import AIMv2Config
from aimv2.optim import OptimConfig, build_optimizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TINY = VisionConfig(width=64, depth=2, heads=2, mlp_hidden=128)  # to try this script
TINY_DECODER = DecoderConfig(width=64, depth=2, heads=2, mlp_hidden=128, vocab_size=128)
CAPTION_TOKENS = 77
PEERS = ("transformers", "timm")


@dataclass(slots=True, kw_only=True)
class Subject:
    """What is timed, and the tensors that outlast it."""

    run: Callable[[], Tensor | None]  # one pass; an encoder's returns the features
    tensors: Callable[[], list[Tensor]]


def ours(config: VisionConfig) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    encoder = VisionEncoder(config)
    return encoder, encoder


def transformers(config: VisionConfig) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    from transformers import Aimv2VisionConfig, Aimv2VisionModel

    settings = Aimv2VisionConfig(
        hidden_size=config.width,
        intermediate_size=config.mlp_hidden,
        num_hidden_layers=config.depth,
        num_attention_heads=config.heads,
        image_size=config.image_size,
        patch_size=config.patch_size,
        rms_norm_eps=config.norm_eps,
        use_head=False,
        attn_implementation="sdpa",
    )
    model = Aimv2VisionModel(settings)
    return model, lambda image: model(image).last_hidden_state


def timm(config: VisionConfig) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    from timm import create_model

    model = create_model(
        "aimv2_large_patch14_224",  # for its norms, MLP and biases: timm has no entry of base size
        img_size=config.image_size,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.heads,
        mlp_ratio=config.mlp_hidden / config.width,
    )
    return model, model.forward_features


def encoder_subjects(config: VisionConfig, dtype: str, backward: bool, arguments: argparse.Namespace) -> dict:
    """Ours and the peers that are installed. Raises ValueError if they are not the same architecture."""
    peers = [peer for peer in (transformers, timm) if importlib.util.find_spec(peer.__name__)]
    image = torch.randn(arguments.batch, 3, config.image_size, config.image_size)
    gradient = torch.randn(arguments.batch, config.num_patches, config.width)
    image, gradient = (tensor.to(arguments.device, DTYPES[dtype]) for tensor in (image, gradient))
    subjects, seen = {}, {}
    for make in [ours, *peers]:
        model, forward = make(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)
        model.to(arguments.device, DTYPES[dtype]).train(backward).requires_grad_(backward)
        if arguments.compile:
            forward = torch.compile(forward)
        subject = encoder_pass(model, forward, image, gradient if backward else None)
        subjects[make.__name__] = subject
        seen[make.__name__] = sum(p.numel() for p in model.parameters()), tuple(subject.run().shape)
    if len(set(seen.values())) > 1:
        raise ValueError(f"the models differ in (parameters, shape of the features): {seen}")
    return subjects


def encoder_pass(model: nn.Module, forward: Callable, image: Tensor, gradient: Tensor | None) -> Subject:
    """Forward, and backward from this gradient of the features if there is one."""

    def run() -> Tensor:
        with torch.set_grad_enabled(gradient is not None):
            features = forward(image)
        if gradient is not None:
            features.backward(gradient)
            model.zero_grad(set_to_none=True)
        return features

    return Subject(run=run, tensors=lambda: list(model.parameters()))


def train_subject(config: AIMv2Config, dtype: str, arguments: argparse.Namespace) -> Subject:
    """An optimizer step of AIMv2 on random images and full captions, without DeepSpeed."""
    model = config.build().to(arguments.device)
    masters = model if dtype == "fp32" else copy.deepcopy(model)
    weights, master_weights = list(model.to(DTYPES[dtype]).parameters()), list(masters.parameters())
    optimizer = build_optimizer(masters, OptimConfig(peak_lr=1e-4, warmup_steps=0), fused=True)
    batch = random_batch(config, arguments.batch).to(arguments.device)
    counts = Counts.of(count_targets([batch]).float().to(arguments.device))
    if arguments.compile:
        model.compile()

    def run() -> None:
        model(batch, counts)["loss"].backward()
        if masters is not model:
            for weight, master in zip(weights, master_weights, strict=True):
                master.grad, weight.grad = weight.grad.float(), None
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if masters is not model:
            with torch.no_grad():
                torch._foreach_copy_(weights, master_weights)

    def tensors() -> list[Tensor]:
        moments = [value for state in optimizer.state.values() for value in state.values()]
        return weights + moments + (master_weights if masters is not model else [])

    return Subject(run=run, tensors=tensors)


def random_batch(config: AIMv2Config, size: int) -> Batch:
    n = config.vision.num_patches
    return Batch(
        image=torch.randn(size, 3, config.vision.image_size, config.vision.image_size),
        text=torch.randint(config.decoder.vocab_size, (size, CAPTION_TOKENS)),
        text_length=torch.full((size,), CAPTION_TOKENS),
        prefix_length=torch.randint(1, n, (size,)),
        sample=torch.arange(size),
        num_patches=n,
    )


def memory(subject: Subject, device: torch.device) -> int:
    """Bytes of a subject that has run before, without what others hold at the same time."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        subject.run()
        growth = torch.cuda.max_memory_allocated(device) - before
    else:
        os.environ["KINETO_LOG_LEVEL"] = "99"  # the profiler would report its own start and end
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            subject.run()
        events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
        growth = max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())), default=0)
    return growth + sum(tensor.nbytes for tensor in subject.tensors())


def device_peak(dtype: str, arguments: argparse.Namespace) -> tuple[float, str]:
    """FLOP/s, and where the number comes from."""
    device = torch.device(arguments.device)
    if arguments.peak_tflops:
        return 1e12 * arguments.peak_tflops, "given"
    if known := peak_flops(device, DTYPES[dtype]):
        return known, "data sheet"
    n = 8192 if device.type == "cuda" else 2048
    a, b, out = torch.randn(3, n, n).to(device, DTYPES[dtype])
    seconds = time_rounds({"product": lambda: torch.mm(a, b, out=out)}, 10, device, "peak")
    return 2 * n**3 / min(seconds["product"]), "measured"


def measure(
    task: str, dtype: str, subjects: dict[str, Subject], flops: float, arguments: argparse.Namespace
) -> list[dict]:
    """A result for each subject; `flops` are those of an image."""
    device = torch.device(arguments.device)
    passes = {name: subject.run for name, subject in subjects.items()}
    compared = compare(time_rounds(passes, arguments.rounds, device, f"{task} {dtype}"))
    return [
        {
            "task": task,
            "dtype": dtype,
            "model": name,
            "images_per_second": arguments.batch / times["seconds"],
            "flops_per_second": flops * arguments.batch / times["seconds"],
            "memory_bytes": memory(subjects[name], device),
            **times,
        }
        for name, times in compared.items()
    ]


def results(arguments: argparse.Namespace) -> Iterator[dict]:
    """One for each dtype, task and model. Raises ValueError for a size or shape that isn't one."""
    if arguments.size == "tiny":
        vision, decoder = replace(TINY, image_size=arguments.image_size), TINY_DECODER
    else:
        vision, decoder = vision_config(arguments.size, arguments.image_size), DecoderConfig()
    objective, forward = AIMv2Config(vision=vision, decoder=decoder), encoder_flops(vision)
    if arguments.what == "train":
        step = training_flops(vision, decoder, CAPTION_TOKENS)
        tasks = [("train step", step, lambda dtype: {"ours": train_subject(objective, dtype, arguments)})]
    else:
        tasks = [
            ("forward", forward, lambda dtype: encoder_subjects(vision, dtype, False, arguments)),
            ("fwd+bwd", 3 * forward, lambda dtype: encoder_subjects(vision, dtype, True, arguments)),
        ][: 1 if arguments.forward_only else 2]
    for dtype in arguments.dtype:
        peak, source = device_peak(dtype, arguments)
        for task, flops, build in tasks:
            for result in measure(task, dtype, build(dtype), flops, arguments):
                yield result | {"peak_flops": peak, "peak_source": source, "mfu": result["flops_per_second"] / peak}


TITLE = f"{'task':10} {'dtype':5} {'model':12} {'ms':>9} {'images/s':>9} {'ratio (quartiles)':>23}   MFU     MiB"


def line(r: dict) -> str:
    """A result under TITLE."""
    ratio = "{:.3f} ({:.3f}-{:.3f})".format(r["ratio"], *r["ratio_quartiles"])
    return (
        f"{r['task']:10} {r['dtype']:5} {r['model']:12} {1e3 * r['seconds']:9.1f} {r['images_per_second']:9.2f} "
        f"{ratio:>23} {r['mfu']:5.0%} {r['memory_bytes'] / 2**20:7.0f}"
    )


def footer(found: list[dict]) -> str:
    """What the MFUs are relative to."""
    peaks = {f"{r['dtype']} {r['peak_flops'] / 1e12:.3g} TFLOP/s ({r['peak_source']})": None for r in found}
    return "MFU against " + ", ".join(peaks)
