"""Real processes for tests, one per rank as a launcher starts them: they can be killed, and share nothing with pytest.

They are forked from a process that has done nothing but the imports, so that each of them takes seconds less.
"""

import atexit
import multiprocessing
import os
import runpy
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "train_aimv2.py"
TINY_RUN = Path(__file__).parent / "tiny_run.py"

CONTEXT = multiprocessing.get_context("forkserver")
# The second is what DeepSpeed imports in `initialize` (torch's compiler), the third what draws the pictures.
CONTEXT.set_forkserver_preload(
    ["aimv2.train", "deepspeed.runtime.zero.muon.muon_optimizer", "matplotlib.backends.backend_agg"]
)


def arguments(data: Path, out: Path, *changes: str, config: Path = TINY_RUN) -> list[str]:
    """Those of scripts/train_aimv2.py for tiny_run.py, or what is derived from it, with its data in another folder."""
    place = [f"out={out}", f"data.made_by.folder={data}", f"data.train.0.shards={data}/train-*.tar"]
    return ["--config", str(config), *place, f"data.validation.shards={data}/validation-*.tar", *changes]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(function: Callable, *args, ranks: int = 1, log: Path) -> list:
    """Begin `function(*args)`, which must be at the top of a module, on all ranks; what they print goes to `log`."""
    everywhere = {"WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    processes = []
    for rank in range(ranks):
        place = {name: str(value) for name, value in {"RANK": rank, "LOCAL_RANK": rank, **everywhere}.items()}
        processes.append(CONTEXT.Process(target=_enter, args=(function, args, place, log)))
        processes[-1].start()
    return processes


def finish(processes: list, seconds: float = 180) -> list[int]:
    """Wait for all ranks to end by themselves and return their exit codes. AssertionError if one hangs."""
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    assert None not in codes, f"a rank hangs: {codes}"
    return codes


def train(arguments: list[str], sabotage: Callable, *args) -> None:
    """What `python scripts/train_aimv2.py ARGUMENTS` does after `sabotage(*args)`, but for the slow pictures."""
    import aimv2.train

    aimv2.train.draw_run = lambda *args, **kwargs: []
    sabotage(*args)
    sys.argv = [str(SCRIPT), *arguments]
    runpy.run_path(str(SCRIPT), run_name="__main__")


def nothing() -> None:
    """No sabotage."""


def _enter(function: Callable, args: tuple, place: dict[str, str], log: Path) -> None:
    import torch

    multiprocessing.set_start_method("fork", force=True)  # as in a process that was started, for the loader's workers
    os.environ.update(place)
    os.chdir(ROOT)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    try:
        function(*args)
    finally:
        atexit._run_exitfuncs()  # as any process does but those of multiprocessing
