"""Many independent jobs on several processes."""

import itertools
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import TypeVar

Job, Result = TypeVar("Job"), TypeVar("Result")

_AHEAD = 2  # jobs for each process, so that none waits and jobs are not all made at once


class LostProcess(RuntimeError):
    """A process ended without a word: killed, most often for want of memory."""


def run_jobs(function: Callable[[Job], Result], jobs: Iterable[Job], workers: int = 1) -> Iterator[Result]:
    """`function` of every job, in the order in which they get done.

    Jobs are taken from `jobs` as they are needed. The first exception of any job ends all.

    Args:
        function: at the top of a module, or a partial of one that is: it is sent to the processes, as are the jobs.
        workers: processes; with 1 everything happens in this one.

    Raises:
        ValueError: fewer than one worker.
        LostProcess: a process was killed.
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}, expected at least 1")
    return map(function, jobs) if workers == 1 else _run_elsewhere(function, iter(jobs), workers)


def _run_elsewhere(function: Callable[[Job], Result], jobs: Iterator[Job], workers: int) -> Iterator[Result]:
    # spawn: the caller may hold threads and a CUDA context, which do not survive a fork.
    context = multiprocessing.get_context("spawn")
    resource_tracker.ensure_running()  # by now: its own start would let interrupts through again
    with ProcessPoolExecutor(workers, context, initializer=_ignore_interrupts) as pool:
        try:
            waiting = {_submit(pool, function, job) for job in itertools.islice(jobs, _AHEAD * workers)}
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
                    waiting |= {_submit(pool, function, job) for job in itertools.islice(jobs, 1)}
        except BrokenProcessPool:
            raise LostProcess("a worker process was killed (out of memory?); fewer workers need less") from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, function: Callable[[Job], Result], job: Job) -> Future:
    with _interrupts_wait():
        return pool.submit(function, job)


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Put off Ctrl-C, here and in the processes that are started meanwhile: these until they ignore it.

    Without this, Ctrl-C while a process still imports its modules is a traceback from each.
    """
    came, is_main = [], threading.current_thread() is threading.main_thread()
    # The mask is inherited. Another thread may take the signal all the same, and Python would raise it here.
    handler = signal.signal(signal.SIGINT, lambda *_: came.append(True)) if is_main else None
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if is_main:
            signal.signal(signal.SIGINT, handler)
        if came:
            signal.raise_signal(signal.SIGINT)


def _ignore_interrupts() -> None:
    """Ctrl-C reaches all processes of a terminal; only the one that gives out the jobs shall act on it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
