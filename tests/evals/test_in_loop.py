"""Any protocol while a model trains: the same numbers as from the export afterwards, and no trace in the run itself."""

import json
from pathlib import Path

import pytest
import torch
from processes import finish, nothing, start, train

from aimv2.config import ConfigError, from_json, load_config, to_json
from aimv2.evals.datasets import open_dataset
from aimv2.evals.encoders import open_encoder
from aimv2.evals.few_shot import FewShot
from aimv2.evals.in_loop import FrozenEvaluation
from aimv2.evals.knn import KNN
from aimv2.evals.probes.attentive_probe import AttentiveProbe
from aimv2.evals.probes.linear_probe import LinearProbe
from aimv2.evals.run import shortened
from aimv2.evals.session import Session
from aimv2.evals.zero_shot import ZeroShot
from aimv2.train import TrainConfig

CONFIG = """
from pathlib import Path
from aimv2.config import load_config
from aimv2.evals.probes.attentive_probe import AttentiveProbe
from aimv2.evals.in_loop import FrozenEvaluation
from aimv2.evals.knn import KNN
from aimv2.evals.probes.linear_probe import LinearProbe

def config():
    run = load_config("TINY_RUN")
    small = {"dataset": "digits", "train": 61, "test": 23, "every": 2}
    run.evals += [
        FrozenEvaluation(protocol=KNN(k=(1, 5)), **small),
        FrozenEvaluation(protocol=LinearProbe(steps=6), **small),
        FrozenEvaluation(protocol=AttentiveProbe(epochs=2, warmup_epochs=1, mode="cached"), **small),
    ]
    return run
"""


def training_lines(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in ("step", "loss", "grad_norm", "lr")} for line in lines if "eval" not in line]


def evaluations(out: Path) -> dict[tuple[int, str], dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {(line.pop("step"), line.pop("eval")): line for line in lines if "eval" in line}


@pytest.fixture
def config_file(tmp_path) -> Path:
    path = tmp_path / "evaluated.py"
    path.write_text(CONFIG.replace("TINY_RUN", str(Path(__file__).parents[1] / "tiny_run.py")))
    return path


def run(arguments: list[str], config_file: Path, tmp_path: Path, ranks: int = 1) -> None:
    arguments = [str(config_file) if argument.endswith("tiny_run.py") else argument for argument in arguments]
    log = tmp_path / "terminal.log"
    codes = finish(start(train, arguments, nothing, ranks=ranks, log=log))
    assert codes == [0] * ranks, log.read_text()


def test_the_numbers_are_those_of_the_export(tiny_run, config_file, tmp_path):
    out = tmp_path / "run"
    run(tiny_run(out, "steps=4"), config_file, tmp_path)
    found = evaluations(out)
    assert {step for step, name in found if name == "knn digits"} == {2, 4}
    data = shortened(open_dataset("digits"), 61, 23)
    encoder = open_encoder(f"aimv2:{out / 'export'}")
    protocols = (KNN(k=(1, 5)), LinearProbe(steps=6), AttentiveProbe(epochs=2, warmup_epochs=1, mode="cached"))
    for protocol in protocols:
        outcome = protocol.run(encoder, data, Session(quiet=True))
        assert found[4, f"{protocol.name} digits"] == {name: metric.value for name, metric in outcome.metrics.items()}


def test_a_run_is_the_same_with_and_without_them(tiny_run, config_file, tmp_path):
    run(tiny_run(tmp_path / "with", "steps=4"), config_file, tmp_path)
    run(tiny_run(tmp_path / "without", "steps=4"), Path(__file__).parents[1] / "tiny_run.py", tmp_path)
    assert training_lines(tmp_path / "with") == training_lines(tmp_path / "without")
    weights = {(tmp_path / name / "export" / "model.safetensors").read_bytes() for name in ("with", "without")}
    assert len(weights) == 1


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_ranks_find_what_one_does_on_any_stage(stage, tiny_run, config_file, tmp_path):
    for ranks in (1, 2):
        changes = ["steps=2", f"engine.zero_stage={stage}", "engine.micro_batch=4"]
        run(tiny_run(tmp_path / str(ranks), *changes), config_file, tmp_path, ranks)
    one, two = (evaluations(tmp_path / str(ranks)) for ranks in (1, 2))
    assert one.keys() == two.keys()
    # The weights differ by the rounding of two ranks' sums, so a near tie among the 23 test images may fall otherwise.
    for key in one:
        if "digits" in key[1]:
            assert one[key] == pytest.approx(two[key], abs=1.5 / 23), key


def test_configs_keep_the_protocol(tmp_path):
    run = load_config(Path(__file__).parents[1] / "tiny_run.py")
    run.evals += [FrozenEvaluation(protocol=p, dataset="digits") for p in (KNN(), FewShot(), LinearProbe())]
    run.evals += [FrozenEvaluation(protocol=AttentiveProbe(), dataset="faces", every=3)]
    again = from_json(TrainConfig, json.loads(json.dumps(to_json(run))))
    assert again == run
    names = ["knn digits", "few_shot digits", "linear_probe digits", "attentive_probe faces"]
    assert [e.name for e in again.evals] == ["validation", *names]


def test_frozen_evaluations_need_no_validation_data():
    run = load_config(Path(__file__).parents[1] / "tiny_run.py")
    run.evals = [FrozenEvaluation(protocol=KNN(), dataset="digits")]
    run.data.validation = None
    assert from_json(TrainConfig, to_json(run)).data.validation is None


@pytest.mark.parametrize(("dataset", "message"), [("klingon", "klingon"), ("folder:nowhere", "nowhere")])
def test_a_dataset_that_is_not_there_is_refused_before_training(dataset, message):
    run = load_config(Path(__file__).parents[1] / "tiny_run.py")
    where = {"patch_size": 16, "seed": 0, "rank": 0, "world_size": 1, "device": torch.device("cpu")}
    with pytest.raises((ValueError, OSError), match=message):
        FrozenEvaluation(protocol=KNN(), dataset=dataset).build(run.data, **where)


def test_a_protocol_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="expected one of"):
        from_json(FrozenEvaluation, {"protocol": {"type": "Nearest"}, "dataset": "digits"})


@pytest.mark.parametrize(
    ("evals", "message"),
    [
        ([FrozenEvaluation(protocol=KNN(layers="pooled,7"), dataset="digits")], "'7' is not within blocks 0 to 0"),
        ([FrozenEvaluation(protocol=ZeroShot(), dataset="digits")], "no text tower, which zero_shot needs"),
        ([FrozenEvaluation(protocol=KNN(layers=at), dataset="digits") for at in ("0", "output")], "different names"),
    ],
)
def test_what_could_not_run_is_refused_before_training(evals, message):
    run = load_config(Path(__file__).parents[1] / "tiny_run.py")
    run.evals = evals
    with pytest.raises(ConfigError, match=message):
        from_json(TrainConfig, to_json(run))


def test_labels_tell_two_of_one_protocol_apart():
    run = load_config(Path(__file__).parents[1] / "tiny_run.py")
    run.evals = [FrozenEvaluation(protocol=KNN(layers=at), dataset="digits", label=at) for at in ("0", "output")]
    assert [e.name for e in from_json(TrainConfig, to_json(run)).evals] == ["0", "output"]
