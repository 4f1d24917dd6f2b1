"""DeepSpeed, and the little that talks to other ranks. The only file that imports it."""

import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")  # else it guesses, and warns

import deepspeed
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn

from aimv2.data.batch import Batch, Counts, count_targets
from aimv2.optim import OptimConfig, build_optimizer, learning_rate
from aimv2.ranks import sum_over_ranks

Engine = deepspeed.DeepSpeedEngine
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
ECHO = 1.0  # seconds
START_TIMEOUT = timedelta(hours=4)  # for rank 0 to write data while the others wait
STEP_TIMEOUT = timedelta(minutes=10)  # for everything afterwards


@dataclass(slots=True, kw_only=True)
class EngineConfig:
    batch_size: int  # images per optimizer step, over all ranks
    micro_batch: int  # images per rank and pass; accumulation follows
    zero_stage: Literal[1, 2, 3] = 1  # stage 0 takes a hidden step with bf16, and destroys fp32 weights on a NaN
    precision: Literal["fp32", "bf16"] = "bf16"
    offload: bool = False  # keep the optimizer's state in CPU memory
    compile: bool = False

    def __post_init__(self):
        for name in ("batch_size", "micro_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: expected 1 or more images")

    @property
    def micro_batches(self) -> int:
        """Of an optimizer step, over all ranks."""
        return self.batch_size // self.micro_batch

    def accumulation(self, world_size: int) -> int:
        """Micro-batches per optimizer step; raises ValueError if the batch doesn't divide."""
        steps, rest = divmod(self.batch_size, self.micro_batch * world_size)
        if rest or not steps:
            raise ValueError(
                f"engine.batch_size {self.batch_size} is not a multiple of engine.micro_batch {self.micro_batch} "
                f"x {world_size} ranks"
            )
        return steps


def deepspeed_config(config: EngineConfig, clip: float, world_size: int) -> dict:
    """DeepSpeed's own dictionary; everything in it follows from the run's config."""
    zero = {"stage": config.zero_stage, "contiguous_gradients": True, "overlap_comm": torch.cuda.is_available()}
    if config.zero_stage == 3:
        zero["memory_efficient_linear"] = False
    if config.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_batch_size": config.batch_size,
        "train_micro_batch_size_per_gpu": config.micro_batch,
        "gradient_accumulation_steps": config.accumulation(world_size),
        "gradient_clipping": clip,
        "bf16": {"enabled": config.precision == "bf16"},
        "zero_optimization": zero,
        # The optimizer is ours (torch's AdamW), so that nothing is compiled.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }


def start_distributed() -> torch.device:
    """Join the process group, alone if no launcher started this process, and return this rank's device.

    Raises ConnectionError, naming address and port, where the ranks can't meet.
    """
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in alone.items()})
    deepspeed_logger.setLevel(logging.WARNING)
    # Otherwise the first use on a CPU compiles an extension, which takes minutes and needs a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    cuda = torch.cuda.is_available()
    if not dist.is_initialized():
        try:
            deepspeed.init_distributed("nccl" if cuda else "gloo", timeout=START_TIMEOUT, verbose=False)
        except dist.DistNetworkError as error:
            meeting = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise ConnectionError(
                f"the ranks can't meet at {meeting}, a port that must be free for this run alone "
                f"(--master_port of the launcher chooses another): {str(error).splitlines()[0]}"
            ) from error
    if not cuda:
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return torch.device("cuda", torch.cuda.current_device())


def limit_waiting(timeout: timedelta = STEP_TIMEOUT) -> None:
    """From now on a rank that waits so long for another one fails."""
    if hasattr(dist, "set_timeout"):
        dist.set_timeout(timeout)
    else:  # an older torch
        dist.distributed_c10d._set_pg_timeout(timeout)


def build_engine(model: nn.Module, optim: OptimConfig, config: EngineConfig) -> Engine:
    if config.compile:
        model.compile()
    fused = torch.cuda.is_available() and not config.offload
    for p in model.parameters():
        if p.dim() == 0:  # DeepSpeed 0.19 can't broadcast it: while training it has one dimension
            p.data, p.was_scalar = p.data.reshape(1), True
        if not p.requires_grad and dist.get_rank() == 0:  # DeepSpeed rounds it with the rest, and keeps no fp32 copy
            p.as_given = p.detach().to("cpu", copy=True)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=build_optimizer(model, optim, fused=fused),
        config=deepspeed_config(config, optim.clip, dist.get_world_size()),
    )
    return engine


def set_learning_rate(engine: Engine, config: OptimConfig, step: int, steps: int) -> float:
    lr = learning_rate(config, step, steps)
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    return lr


def global_counts(micro_batches: Sequence[Batch], device: torch.device) -> Counts:
    """Targets of one optimizer step over all its micro-batches and all ranks; at least 1, so that empty is finite."""
    return Counts.of(sum_over_ranks(count_targets(micro_batches).to(device)).float())


def backward(engine: Engine, loss: Tensor) -> None:
    """Gradients add up over micro-batches and ranks: DeepSpeed's own division by both is undone."""
    engine.backward(loss * (dist.get_world_size() * engine.gradient_accumulation_steps()))


def look_ahead(engine: Engine, micro_batches: Sequence[Batch], counts: Counts) -> None:
    """Show a step's micro-batches, still on the CPU, to an objective whose loss is no sum over samples."""
    if hasattr(engine.module, "look_ahead"):
        engine.module.look_ahead(micro_batches, counts)


def full_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """All weights of a module of the engine in fp32 on the CPU, gathered from all ranks, which all call it.

    Frozen ones are what they were at the start on rank 0 alone; elsewhere they are as the engine rounded them.
    """
    return {name: _whole(p).cpu() for name, p in module.named_parameters()}


def _whole(parameter: nn.Parameter) -> Tensor:
    """The optimizer's fp32 copy; of frozen parameters, which have none, on rank 0 what they were at the start."""
    if parameter.requires_grad:
        whole = safe_get_full_fp32_param(parameter)
    else:
        with deepspeed.zero.GatheredParameters(parameter):  # every rank takes part; does nothing below ZeRO-3
            whole = parameter.as_given if hasattr(parameter, "as_given") else parameter.detach().float().clone()
    return whole.reshape(()) if hasattr(parameter, "was_scalar") else whole


def evaluation_model(engine: Engine, build: Callable[[], nn.Module]) -> nn.Module:
    """The module as it is; under ZeRO-3, where no rank can run its shards alone, a whole copy made by `build`."""
    if engine.zero_optimization_stage() < 3:
        return engine.module
    model = build()
    model.load_state_dict(full_state_dict(engine.module))
    parameter = next(engine.module.parameters())
    return model.to(parameter.device, parameter.dtype)


class Preemption:
    """SIGTERM or SIGINT asks for a last checkpoint; another one, more than a second later, ends the process at once."""

    def __init__(self, device: torch.device):
        self.device = device
        self.asked = False
        for number in STOP_SIGNALS:
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: object) -> None:
        if self.asked:
            return
        self.asked = True
        time.sleep(ECHO)  # meanwhile the same comes again: Ctrl-C reaches every rank by itself and from its launcher
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)

    def __call__(self) -> bool:
        """Whether any rank was asked; all ranks agree."""
        if dist.get_world_size() == 1:
            return self.asked
        asked = torch.tensor(float(self.asked), device=self.device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        return bool(asked)
