import os
import signal
from functools import partial

import pytest

from aimv2.data.processes import LostProcess, run_jobs


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


def test_no_workers():
    with pytest.raises(ValueError, match="workers is 0"):
        run_jobs(square, [1], workers=0)
