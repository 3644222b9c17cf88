"""How a training set is divided: no Flower, no torch."""

import json
import subprocess
import sys

import numpy as np
import pytest

from savepoint.errors import ConfigError
from savepoint.federated import partition
from savepoint.federated.partition import Partition

LABELS = np.random.RandomState(0).randint(0, 10, 6000)
KINDS = ["Dirichlet", "Iid", "ByLabel"]


def divided(
    given="Dirichlet", number: int = 10, seed: int = 0, labels=LABELS, test_fraction: float = 0.2
) -> Partition:
    return Partition(labels, given, number, test_fraction, seed)


@pytest.mark.parametrize("kind", KINDS)
def test_each_sample_belongs_to_one_client(kind: str) -> None:
    made = divided(kind)
    every = np.concatenate([part for n in range(10) for part in (made.train(n), made.test(n))])
    assert sorted(every) == list(range(len(LABELS)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_divides_in_the_same_way(kind: str) -> None:
    assert divided(kind).sha256 == divided(kind).sha256
    assert divided(kind).sha256 != divided(kind, seed=1).sha256


def test_what_a_client_evaluates_on_it_never_trains_on() -> None:
    made = divided(test_fraction=0.25)
    for n in range(10):
        assert not set(made.train(n)) & set(made.test(n))
        assert len(made.test(n)) == round(0.25 * made.sizes()[n])


def test_a_small_alpha_gives_each_client_few_labels() -> None:
    few = divided({"class_path": "Dirichlet", "init_args": {"alpha": 0.1}}).counts()
    many = divided({"class_path": "Dirichlet", "init_args": {"alpha": 100.0}}).counts()
    assert (few > few.sum(1, keepdims=True) / 20).sum() < (
        many > many.sum(1, keepdims=True) / 20
    ).sum()


def test_by_label_gives_each_client_as_many_labels_as_shards_at_most() -> None:
    given = {"class_path": "ByLabel", "init_args": {"shards": 2}}
    counts = divided(given, number=5, labels=np.arange(6000) % 10).counts()
    assert ((counts > 0).sum(1) <= 2).all()


def test_a_division_that_is_not_found_ends_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partition, "MOST_SECS", 0.1)
    given = {"class_path": "Dirichlet", "init_args": {"alpha": 0.01, "min_partition_size": 50}}
    with pytest.raises(ConfigError, match=r"No such division was found.*alpha"):
        divided(given, number=100)


def test_a_division_that_cannot_be_is_refused_at_once() -> None:
    given = {"class_path": "Dirichlet", "init_args": {"min_partition_size": 5000}}
    with pytest.raises(ConfigError, match="No such division"):
        divided(given)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            "Dirichlett",
            "No such class for federated.partitioner: Dirichlett. Did you mean Dirichlet",
        ),
        (
            {"class_path": "Iid", "init_args": {"alpha": 1}},
            "Unknown key: federated.partitioner.alpha",
        ),
        ({"class_path": "Dirichlet", "init_args": {"alpha": 0}}, "alpha is 0"),
        ({"class_path": "Dirichlet", "init_args": {"alpha": "abc"}}, "alpha: abc. Expected float"),
        ({"init_args": {}}, "Not a class"),
    ],
)
def test_a_partitioner_that_is_wrong_is_said(given, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        divided(given)


def test_more_clients_than_samples_are_refused() -> None:
    with pytest.raises(ConfigError, match="Too many clients"):
        divided("Iid", number=4000)


def test_ten_thousand_clients_are_divided_without_torch() -> None:
    program = (
        "import sys, json, numpy as np; from savepoint.federated.partition import Partition;"
        "p = Partition(np.arange(60000) % 10, 'Iid', 10000, 0.2, 0);"
        "print(json.dumps([len(p), [m for m in ('torch', 'flwr', 'lightning') if m in sys.modules]]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == [10000, []]
