"""kNN, few-shot, zero-shot and retrieval: two ranks find what one does, where nothing is a multiple of two."""

from pathlib import Path

import numpy as np
import pytest
import torch
from known_features import KnownEncoder, KnownPair, dataset
from processes import finish, start
from test_retrieval import data_of, random_pair, uneven

from aimv2.evals import extraction, knn, retrieval
from aimv2.evals.few_shot import FewShot
from aimv2.evals.knn import KNN
from aimv2.evals.retrieval import Retrieval
from aimv2.evals.session import Session, launched_session
from aimv2.evals.zero_shot import ZeroShot

pytest.importorskip("sklearn")
pytest.importorskip("open_clip")


def outcomes(session: Session) -> dict[str, list]:
    """Of all four on noisy features, in blocks so small that both ranks have several and not as many."""
    extraction.CHUNK, knn.QUERIES, retrieval.TEXTS, retrieval.MOST_VALUES = 4, 3, 7, 300
    rng, labels = np.random.default_rng(3), np.random.default_rng(0).permutation(np.arange(143) % 5)
    features = np.eye(5)[labels] + rng.normal(size=(143, 5)) * 0.7
    encoder, data = KnownEncoder(rng.normal(size=(143, 5)), features), dataset(120, 23, labels, (4,), (7,))
    pair = KnownPair(features, lambda text: np.eye(5)[int(text[-2])] if text[-1] == "." else np.eye(5)[0])
    data.templates = ("a {}.", "the {}.")
    captions = uneven(33)
    found = {
        "knn": KNN(k=(1, 5, 10), layers="0,output").run(encoder, data, session),
        "few_shot": FewShot(shots=(1, 3), draws=2, strengths=(0.1, 10.0)).run(encoder, data, session),
        "zero_shot": ZeroShot().run(pair, data, session),
        "retrieval": Retrieval().run(random_pair(captions, 0.5), data_of(captions, bad=(5,)), session),
    }
    return {name: [outcome.metrics, outcome.samples, outcome.details] for name, outcome in found.items()}


def run_on_a_rank(out: Path) -> None:
    with launched_session("cpu", quiet=True) as session:
        torch.save(outcomes(session), out / str(session.rank))


@pytest.fixture
def sizes_are_put_back():
    before = extraction.CHUNK, knn.QUERIES, retrieval.TEXTS, retrieval.MOST_VALUES
    yield
    extraction.CHUNK, knn.QUERIES, retrieval.TEXTS, retrieval.MOST_VALUES = before


def test_two_ranks_find_what_one_does(tmp_path, sizes_are_put_back):
    codes = finish(start(run_on_a_rank, tmp_path, ranks=2, log=tmp_path / "log"))
    assert codes == [0, 0], (tmp_path / "log").read_text()
    alone = outcomes(Session(quiet=True))
    assert 0 < alone["knn"][0]["top1"].value < 1  # something is at stake
    for rank in "01":
        of_rank = torch.load(tmp_path / rank, weights_only=False)
        for name, expected in alone.items():
            assert of_rank[name] == expected, name
