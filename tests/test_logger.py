import builtins
import json
import logging
import math
import struct
import sys
import time
import types
from fractions import Fraction

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from aimv2 import logger
from aimv2.logger import TIMINGS, Logger, logging_to, read_metrics


@pytest.fixture
def open_logger(tmp_path):
    opened = []

    def make(**changes):
        settings = {"steps": 20, "batch_size": 8, "every": 4, "tensorboard": False}
        opened.append(Logger(tmp_path, **{**settings, **changes}))
        return opened[-1]

    with logging_to(tmp_path):
        yield make
    for log in opened:
        log.close()


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves when told to."""

    class Clock:
        now = 1000.0

        def sleep(self, seconds):
            self.now += seconds

    clock = Clock()
    monkeypatch.setattr(logger.time, "monotonic", lambda: clock.now)
    return clock


def losses(step, micro_batch=0):
    """float32 values that are a function of the step, so that an undisturbed and a resumed run see the same."""
    generator = torch.Generator().manual_seed(100 * step + micro_batch)
    loss, pixel_loss = torch.rand(2, generator=generator)
    return {"loss": loss, "pixel_loss": pixel_loss}


def train(log, steps, micro_batches=2):
    for step in steps:
        for micro_batch in range(micro_batches):
            log.add(losses(step, micro_batch))
        log.step(step, lr=0.1 / step, grad_norm=torch.tensor(float(step)), skipped=0)


def without_timings(path):
    return [{k: v for k, v in json.loads(line).items() if k not in TIMINGS} for line in path.read_text().splitlines()]


# -- What is logged -----------------------------------------------------------------------------------------------


def test_a_loss_is_the_sum_over_micro_batches_and_the_mean_over_steps(open_logger, tmp_path):
    train(open_logger(steps=10), range(1, 11))
    lines, _ = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [4, 8, 10]  # the last step has a line though 10 is no multiple of 4
    for line, steps in zip(lines, (range(1, 5), range(5, 9), range(9, 11)), strict=True):
        # Exact rational arithmetic; the logged number is its nearest double but for one division.
        exact = sum(Fraction(losses(s, m)["loss"].item()) for s in steps for m in range(2)) / len(steps)
        assert line["loss"] == pytest.approx(float(exact), rel=1e-15)
        assert line["lr"] == 0.1 / steps[-1]
        assert line["grad_norm"] == steps[-1]
        assert line["skipped"] == 0


def test_samples_that_were_replaced_are_counted_between_lines(open_logger, tmp_path):
    log = open_logger(every=2, steps=6)
    for step, replaced in enumerate((3, 1, 0, 0, 0, 2), start=1):
        log.replaced(replaced)
        train(log, [step])
    lines, _ = read_metrics(tmp_path / "metrics.jsonl")
    assert [line.get("replaced") for line in lines] == [4, None, 2]


def test_a_share_is_that_of_all_steps_since_the_line_before(open_logger, tmp_path):
    log = open_logger(every=2, steps=4)
    for step, (part, whole) in enumerate([(1, 100), (2, 2), (0, 5), (0, 0)], start=1):
        log.share("padding", part, whole)
        train(log, [step])
    lines, _ = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["padding"] for line in lines] == [3 / 102, 0]


def test_every_digit_is_kept(open_logger, tmp_path):
    values = [0.1 + 0.2, 1 / 3, 5e-324, 1.7976931348623157e308]
    log = open_logger(every=1, steps=4)
    for step, value in enumerate(values, start=1):
        log.add({"loss": torch.tensor(value, dtype=torch.float64)})
        log.step(step, lr=value)
    lines, _ = read_metrics(tmp_path / "metrics.jsonl")
    for line, value in zip(lines, values, strict=True):
        assert struct.pack("d", line["loss"]) == struct.pack("d", line["lr"]) == struct.pack("d", value)


def test_add_keeps_no_graph_and_reads_nothing(open_logger, monkeypatch):
    log = open_logger()
    weight = torch.ones((), requires_grad=True)
    for name in ("item", "tolist", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, lambda self: pytest.fail("the device was read"))
    for step in (1, 2, 3):
        log.add({"loss": weight * 2})
        log.step(step, grad_norm=weight)
    assert not log._sums["loss"].requires_grad


@pytest.mark.gpu
def test_the_gpu_is_waited_for_once_per_line(open_logger, tmp_path):
    log = open_logger(every=4)
    value = torch.tensor(0.5, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in (1, 2, 3):
            log.add({"loss": value, "pixel_loss": value})
            log.step(step, grad_norm=value)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    log.add({"loss": value, "pixel_loss": value})
    log.step(4, grad_norm=value)
    (line,), _ = read_metrics(tmp_path / "metrics.jsonl")
    assert line["loss"] == 0.5 and line["grad_norm"] == 0.5 and line["memory_gib"] > 0


def test_a_discarded_step_leaves_no_trace_in_the_mean(open_logger, tmp_path):
    log = open_logger(every=4)
    for step, value in enumerate([1.0, math.nan, 3.0, 5.0], start=1):
        log.add({"loss": torch.tensor(value)})
        if math.isnan(value):
            log.discard()
        log.step(step)
    assert read_metrics(tmp_path / "metrics.jsonl")[0][0]["loss"] == 3.0


def test_what_is_not_finite_is_null(open_logger, tmp_path):
    log = open_logger(every=1)
    log.add({"loss": torch.tensor(math.nan)})
    log.step(1, grad_norm=math.inf, lr=None)
    log.evaluation(1, "validation", {"loss": math.nan, "accuracy": 0.5})
    (step,), (evaluation,) = read_metrics(tmp_path / "metrics.jsonl")
    assert step["loss"] is None and step["grad_norm"] is None and "lr" not in step
    assert evaluation == {"step": 1, "eval": "validation", "loss": None, "accuracy": 0.5}


def test_times(open_logger, tmp_path, clock):
    log = open_logger(every=4, batch_size=8, flops_per_image=5e9, peak_flops=1e11)
    for step in range(1, 9):
        with log.waiting():
            clock.sleep(0.5)
        clock.sleep(1.5)
        log.step(step)
        with log.paused():
            clock.sleep(100)
    first, second = read_metrics(tmp_path / "metrics.jsonl")[0]
    for line, time_passed in ((first, 308.0), (second, 716.0)):
        assert line["images_per_second"] == pytest.approx(4 * 8 / 8.0)  # 4 steps of 2 s; pauses don't count
        assert line["data_wait"] == pytest.approx(0.25)
        assert line["mfu"] == pytest.approx(4.0 * 5e9 / 1e11)
        assert line["time"] == pytest.approx(time_passed)
    # After step 8 there are 12 to go; since the end of the first step one took (716 - 2) / 7 s, pauses included.
    left = 714 / 7 * 12
    assert (
        f"step 8/20, 4.0 images/s, data wait 25%, mfu 20.0%, {int(left) // 60}:{int(left) % 60:02d} left"
        in (tmp_path / "train.log").read_text()
    )


# -- Resuming -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [3, 4, 7, 8, 19, 20])
def test_a_resumed_file_equals_an_undisturbed_one_but_for_times(tmp_path, stop):
    settings = {"steps": 20, "batch_size": 8, "every": 4, "tensorboard": False}

    def evaluate(log, steps):
        for step in steps:
            log.share("padding", step**2 % 7, 10 + step)
            train(log, [step])
            if step % 5 == 0:
                log.evaluation(step, "validation", {"loss": 1 / step})

    undisturbed = Logger(tmp_path / "a", **settings)
    evaluate(undisturbed, range(1, 21))
    undisturbed.close()

    killed = Logger(tmp_path / "b", **settings)
    evaluate(killed, range(1, stop + 1))
    pending = json.loads(json.dumps(killed.pending()))  # it travels through a checkpoint's manifest
    evaluate(killed, range(stop + 1, 21))  # what came after the checkpoint is lost
    killed.close()
    with open(tmp_path / "b" / "metrics.jsonl", "a") as file:
        file.write('{"step": 21, "lo')  # half a line
    with logging_to(tmp_path / "b"):
        resumed = Logger(tmp_path / "b", **settings, start=stop, pending=pending)
    evaluate(resumed, range(stop + 1, 21))
    resumed.close()

    expected = without_timings(tmp_path / "a" / "metrics.jsonl")
    assert without_timings(tmp_path / "b" / "metrics.jsonl") == expected
    assert len(expected) == 5 + 4
    assert "dropped a damaged line" in (tmp_path / "b" / "train.log").read_text()


def test_a_fresh_start_begins_a_new_file(open_logger, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "eval": "validation"}\n{"step": 4}\n')
    open_logger(start=0)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_reading_passes_over_half_a_last_line_only(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = '{"step": 1, "loss": 0.5}\n{"step": 1, "eval": "v", "loss": 2.0}\n{"step": 2, "loss": 0.25}\n'
    for length in range(len(whole) + 1):
        path.write_text(whole[:length])
        steps, evaluations = read_metrics(path)
        assert len(steps) + len(evaluations) == whole[:length].count("\n")
    assert [line["step"] for line in steps] == [1, 2]
    assert evaluations == [{"step": 1, "eval": "v", "loss": 2.0}]
    path.write_text('{"step": 1}\n{"st\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2: expected a JSON object, got '\{\"st'"):
        read_metrics(path)


# -- Ranks --------------------------------------------------------------------------------------------------------


def two_ranks(rank, folder, rendezvous):
    torch.set_num_threads(1)  # a forked process cannot use its parent's pool
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    log = Logger(folder, steps=4, batch_size=8, every=2, tensorboard=False, rank=rank)
    for step in range(1, 5):
        log.add(losses(step, rank))
        log.share("padding", rank, 3)
        if rank == 1:
            log._waited += 3600.0  # far more than rank 0 can wait
        log.step(step)
        if step == 3:
            assert log.pending()["loss"] == sum(losses(3, r)["loss"].item() for r in range(2))
    log.evaluation(4, "validation", {"loss": 1.0})
    log.close()
    dist.destroy_process_group()


def test_losses_are_summed_over_ranks_and_rank_0_writes(tmp_path):
    mp.start_processes(two_ranks, (tmp_path / "run", tmp_path / "rendezvous"), nprocs=2, start_method="fork")
    lines, evaluations = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [2, 4]
    for line, steps in zip(lines, ([1, 2], [3, 4]), strict=True):
        assert line["loss"] == sum(losses(s, r)["loss"].double().item() for s in steps for r in range(2)) / 2
        assert line["data_wait_rank"] == 1
        assert line["padding"] == 2 / 12
    assert len(evaluations) == 1


# -- Where it goes ------------------------------------------------------------------------------------------------


def test_plain_lines_without_a_terminal(open_logger, tmp_path, capsys):
    log = open_logger()
    train(log, range(1, 5))
    log.message("hello")
    logging.getLogger("aimv2.checkpoint").error("no checkpoint")
    shown = capsys.readouterr().err.splitlines()
    written = (tmp_path / "train.log").read_text().splitlines()
    assert len(shown) == len(written) == 3
    assert shown[0].startswith("step 4/20, ") and "loss " in shown[0] and "lr 0.025" in shown[0]
    for line, record in zip(shown, written, strict=True):
        assert record.endswith(line)
    assert " ERROR no checkpoint" in written[2]


def test_a_bar_on_a_terminal(open_logger, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    log = open_logger(steps=8)
    train(log, range(1, 9))
    log.message("hello")
    log.close()
    shown = capsys.readouterr().err
    assert "8/8" in shown and "images/s" in shown and "hello" in shown
    assert "step 8/8, " not in shown
    assert "step 8/8, " in (tmp_path / "train.log").read_text()


def test_other_ranks_write_nothing_and_show_warnings(tmp_path, capsys):
    with logging_to(tmp_path / "run", rank=1):
        log = Logger(tmp_path / "run", steps=4, batch_size=8, every=2, rank=1)
        train(log, range(1, 5))
        log.message("hello")
        log.evaluation(4, "validation", {"loss": 1.0})
        logging.getLogger("aimv2.data").warning("bad sample")
        log.close()
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().err == "rank 1: bad sample\n"


def test_logging_gives_the_package_its_silence_back(tmp_path):
    before = logger.PACKAGE.handlers[:], logger.PACKAGE.level
    with logging_to(tmp_path):
        assert len(logger.PACKAGE.handlers) == len(before[0]) + 2
    assert (logger.PACKAGE.handlers, logger.PACKAGE.level) == before


def test_what_ends_a_run_is_in_the_file_with_its_traceback(tmp_path, capsys):
    with pytest.raises(ZeroDivisionError), logging_to(tmp_path):
        _ = 1 / 0
    written = (tmp_path / "train.log").read_text()
    assert " CRITICAL ended by ZeroDivisionError: division by zero\nTraceback " in written
    assert "_ = 1 / 0" in written
    assert capsys.readouterr().err == ""


def test_a_full_disk_does_not_end_the_run(open_logger, tmp_path):
    log = open_logger(every=1)

    def fail():
        raise OSError(28, "No space left on device")

    real, log._metrics = log._metrics, types.SimpleNamespace(write=lambda text: None, flush=fail)
    train(log, [1])
    log._metrics = real
    train(log, [2])
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")[0]] == [2]
    assert "ERROR step 1 could not be logged: [Errno 28]" in (tmp_path / "train.log").read_text()


def test_tensorboard_holds_the_same_numbers(open_logger, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start in (0, 4):  # the second resumes from step 4 and writes 8 again
        log = open_logger(tensorboard=True, start=start)
        train(log, range(start + 1, 9))
        log.evaluation(8, "validation", {"loss": 2.0})
        log.close()
        time.sleep(1.1)  # event files are named and ordered by the second
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    lines, _ = read_metrics(tmp_path / "metrics.jsonl")
    found = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert found == [(line["step"], pytest.approx(line["loss"], rel=1e-7)) for line in lines]  # float32 there
    assert [event.value for event in events.Scalars("validation/loss")] == [2.0]


def test_a_missing_tensorboard_is_said_once(open_logger, tmp_path, monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if "tensorboard" in name:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    train(open_logger(tensorboard=True), range(1, 21))
    assert (tmp_path / "train.log").read_text().count("tensorboard") == 1


def test_wandb_on_request(open_logger, tmp_path, monkeypatch):
    calls = []

    class Run:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            calls.append("finished")

        def log(self, scalars, step):
            calls.append((step, scalars["train/loss"]))

    def init(**settings):
        calls.append(settings)
        return Run()

    fake = types.ModuleType("wandb")
    fake.__spec__, fake.init = object(), init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    log = open_logger(wandb="aim", steps=4)
    train(log, range(1, 5))
    log.close()
    settings, (step, loss), finished = calls
    assert settings["project"] == "aim" and settings["resume"] == "allow" and settings["dir"] == str(tmp_path)
    assert (step, loss) == (4, read_metrics(tmp_path / "metrics.jsonl")[0][0]["loss"])
    assert finished == "finished"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_missing_wandb_is_an_error_on_every_rank(tmp_path, monkeypatch, rank):
    monkeypatch.setattr(logger.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="wandb='aim' needs the package wandb, which is not installed"):
        Logger(tmp_path / "run", steps=1, batch_size=1, wandb="aim", rank=rank)
    assert not (tmp_path / "run").exists()


def test_every_is_checked(tmp_path):
    with pytest.raises(ValueError, match="every 0: expected at least 1"):
        Logger(tmp_path, steps=1, batch_size=1, every=0)
