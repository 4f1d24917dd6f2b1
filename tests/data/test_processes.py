import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial

import pytest

from aimv2.data.processes import LostProcess, _interrupts_wait, run_jobs


def square(number):
    return number * number


def fail(number):
    if number == 3:
        raise ValueError(f"no {number}")
    return number


def die(number):
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def counted(taken):
    for number in range(1000):
        taken.append(number)
        yield number


def test_every_job_is_done_once_here_or_elsewhere():
    expected = [n * n for n in range(50)]
    assert list(run_jobs(square, range(50))) == expected
    assert sorted(run_jobs(square, range(50), workers=2)) == expected
    assert list(run_jobs(square, [], workers=2)) == []
    assert sorted(run_jobs(partial(pow, 2), [1, 2], workers=2)) == [2, 4]


def test_jobs_are_made_when_they_are_needed():
    taken = []
    results = run_jobs(square, counted(taken), workers=2)
    next(results)
    assert len(taken) <= 8  # two ahead for each process, and as many that were done before the first was asked for
    results.close()


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_error_ends_all(workers):
    with pytest.raises(ValueError, match="no 3"):
        list(run_jobs(fail, range(1000), workers))


def test_a_killed_process_is_an_error_and_no_hang():
    with pytest.raises(LostProcess, match="was killed"):
        list(run_jobs(die, range(1000), workers=2))


SLOW_TO_START = """
import pathlib, signal, time
from aimv2.data.processes import run_jobs

if __name__ == "__mp_main__":  # in a process that is being started
    pathlib.Path("started").touch()
    time.sleep(0.5)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background begins without
    try:
        print(sum(run_jobs(abs, range(8), workers=2)))
    except KeyboardInterrupt:
        print("interrupted")
"""


def test_an_interrupt_while_processes_start_is_for_the_first_one_only(request, tmp_path):
    (tmp_path / "slow.py").write_text(SLOW_TO_START)
    options = {"cwd": tmp_path, "env": {"PYTHONPATH": str(request.config.rootpath)}, "start_new_session": True}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "slow.py"], **options, **pipes) as child:
        while not (tmp_path / "started").exists():
            assert child.poll() is None
            time.sleep(0.01)
        os.killpg(child.pid, signal.SIGINT)  # as a terminal does: to all of them
        assert child.communicate(timeout=60) == ("interrupted\n", "")


@pytest.fixture
def interruptible():
    """Ctrl-C is a KeyboardInterrupt, also where the tests are a job in the background, which begins without."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


def test_an_interrupt_that_another_thread_takes_waits_too(interruptible):
    """`os.kill` reaches any thread that lets it through, and Python would raise it in the first one."""
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    steps = []
    with pytest.raises(KeyboardInterrupt), _interrupts_wait():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
        steps.append("not interrupted")
    stop.set()
    thread.join()
    assert steps and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_no_workers():
    with pytest.raises(ValueError, match="workers is 0"):
        run_jobs(square, [1], workers=0)
