"""Subjects that take turns: how long each takes in each round, and how they compare."""

import statistics
import time
from collections.abc import Callable
from operator import truediv

import torch
from tqdm import tqdm

WARM_UP = 2  # rounds
OURS = "ours"


def time_rounds(passes: dict[str, Callable], rounds: int, device: torch.device, title: str) -> dict[str, list[float]]:
    """Seconds of each pass in each round, after rounds of warming up. Each begins a round in its turn."""
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    names = list(passes)
    for number in tqdm(range(-WARM_UP, rounds), desc=title, unit="round", leave=False):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            duration = seconds_of(passes[name], device)
            if number >= 0:
                seconds[name].append(duration)
    return seconds


def seconds_of(run: Callable, device: torch.device) -> float:
    if device.type != "cuda":
        begun = time.perf_counter()
        run()
        return time.perf_counter() - begun
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def compare(seconds: dict[str, list[float]]) -> dict[str, dict]:
    """By name: the median, and median and quartiles of the ratio to our time of the same round."""
    compared = {}
    for name, times in seconds.items():
        low, ratio, high = statistics.quantiles(map(truediv, times, seconds[OURS]), n=4, method="inclusive")
        compared[name] = {
            "seconds": statistics.median(times),
            "ratio": ratio,
            "ratio_quartiles": [low, high],
            "rounds": times,
        }
    return compared
