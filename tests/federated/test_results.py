"""What a federated run leaves for others: JSON, weights, a report; and what it says without Flower."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.programs import ROOT

pytest.importorskip("flwr")

from support import federated, rounds
from support.run_dirs import flip, say

from savepoint.checkpoint import store
from savepoint.config import quick
from savepoint.errors import ConfigError
from savepoint.federated import federation, listing, results


def test_results_have_the_keys_of_flowers_example_then_ours(straight: Path) -> None:
    history = rounds.history(straight)
    assert [row["round"] for row in history] == [1, 2, 3, 4]
    flowers = ["round", "train_metrics", "evaluate_metrics_clientapp", "evaluate_metrics_serverapp"]
    assert list(history[0]) == [*flowers, "clients", "failures"]
    config = json.loads((straight / "config.json").read_text())
    assert (config["num-server-rounds"], config["fraction-train"], config["lr"]) == (4, 0.6, 0.05)


def test_each_client_has_its_samples_labels_and_newest_metrics(straight: Path) -> None:
    described = json.loads((straight / "clients.json").read_text())
    assert described["labels"] == list("0123456789")
    assert [row["client"] for row in described["clients"]] == list(range(5))
    assert sum(row["samples"] for row in described["clients"]) == 1319
    assert all(sum(row["labels"]) == row["samples"] for row in described["clients"])
    assert any("val/accuracy" in row["metrics"] for row in described["clients"])


def test_a_value_that_is_not_finite_is_json_that_any_program_reads(tmp_path: Path) -> None:
    measured = {"client": 0, "metrics": {"accuracy": math.inf}}
    results.write(tmp_path, [{"round": 1, "loss": math.nan}], {}, {"clients": [measured]})

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    read = [
        json.loads((tmp_path / name).read_text(), parse_constant=refuse) for name in results.NAMES
    ]
    assert read[0] == [{"round": 1, "loss": "nan"}]
    assert read[2] == {"clients": [{"client": 0, "metrics": {"accuracy": "inf"}}]}


def test_a_row_a_round_is_logged_with_the_modules_own_names(straight: Path) -> None:
    rows = federated.rows(straight)
    assert [row["step"] for row in rows[:4]] == ["1", "2", "3", "4"]
    assert {"val/accuracy", "train/loss", "clients/val/accuracy", "clients/failures"} <= rows[
        0
    ].keys()
    assert rows[-1]["test/accuracy"]


def test_weights_and_biases_gets_central_and_federated_metrics_in_one_run(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="needs: make extras")
    run = tmp_path / "run"
    tracked = ["--config", "configs/logger/wandb.yaml", "--federated.num_server_rounds", "1"]
    code, said = federated.train(run, *tracked)
    assert code == 0, said
    code, said = federated.resume(run, "--federated.num_server_rounds", "2")
    assert code == 0, said
    files = sorted(run.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    assert len({path.name for path in files}) == 1  # by the id of the run
    names = ("val/accuracy", "val/loss", "clients/val/accuracy", "clients/val/loss")
    assert all(name.encode() in path.read_bytes() for path in files for name in names)


@pytest.mark.parametrize("kind", ["npz", "state_dict"])
def test_the_global_model_is_read_by_numpy_or_torch_alone(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    file = tmp_path / "model"
    assert say(capsys, "export", straight, "--format", kind, "-o", file)[0] == 0
    if kind == "npz":
        with np.load(file, allow_pickle=False) as found:
            names = set(found.files)
    else:
        names = set(torch.load(file, weights_only=True))
    state, _ = store.load(federated.newest(straight))
    assert names == set(state["state_dict"])


def test_global_and_client_models_are_exported_with_their_facts(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = federated.newest(straight)
    assert say(capsys, "export", newest, "--format", "npz", "--clients", tmp_path / "all")[0] == 0
    versions = listing.versions_of(store.load(newest)[0])
    names = {f"{client:05d}.npz" for client in versions}
    assert {path.name for path in (tmp_path / "all/clients").iterdir()} == names
    client, version = next(iter(versions.items()))
    folder = straight / f"clients/partition-{client:05d}"
    own = store.load(folder / f"step-{version.round:08d}.ckpt")[0]["state_dict"]
    with (
        np.load(tmp_path / f"all/clients/{client:05d}.npz") as found,
        np.load(tmp_path / "all/global.npz") as shared,
    ):
        assert np.array_equal(found["net.classify.weight"], own["net.classify.weight"].numpy())
        assert not np.array_equal(found["net.classify.weight"], shared["net.classify.weight"])
        assert np.array_equal(found["net.features.0.weight"], shared["net.features.0.weight"])
    facts = json.loads((tmp_path / "all/facts.json").read_text())
    assert facts["clients"][str(client)]["digest"] == version.digest
    assert facts["hyper_parameters"]["federated"]["num_clients"] == 5
    assert len(facts["history"]) == facts["round"]


def test_ls_show_and_verify_know_the_clients(
    straight: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "states of 5 clients, newest round 4" in say(capsys, "ls", straight)[1]
    assert "state of round" in say(capsys, "show", straight, "--only", "clients")[1]
    assert "states of 5 clients: all verify" in say(capsys, "verify", straight)[1]


def test_verify_finds_a_damaged_and_a_lost_state(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(straight, tmp_path / "run")
    state, _ = store.load(federated.newest(tmp_path / "run"))
    (one, first), (other, second) = list(listing.versions_of(state).items())[:2]
    flip(tmp_path / f"run/clients/partition-{one:05d}/step-{first.round:08d}.ckpt")
    (tmp_path / f"run/clients/partition-{other:05d}/step-{second.round:08d}.ckpt").unlink()
    code, said, _ = say(capsys, "verify", tmp_path / "run")
    assert code == 1
    assert f"partition-{one:05d}/step-{first.round:08d}.ckpt does not verify" in said
    assert f"The state of client {other} is not the one" in said


def test_gc_deletes_the_states_that_no_checkpoint_names(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(straight, tmp_path / "run")
    old = tmp_path / "run/clients/partition-00000/step-00000000.ckpt"
    shutil.copy(next((tmp_path / "run/clients").rglob("step-*.ckpt")), old)
    before = len(list((tmp_path / "run/clients").rglob("*.ckpt")))
    assert say(capsys, "gc", tmp_path / "run", "--dry-run")[0] == 0
    assert len(list((tmp_path / "run/clients").rglob("*.ckpt"))) == before
    assert say(capsys, "gc", tmp_path / "run")[0] == 0
    assert not old.exists()
    assert say(capsys, "verify", tmp_path / "run")[0] == 0


def test_the_report_draws_the_labels_of_each_client(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert say(capsys, "report", straight, "-o", tmp_path / "page.html")[0] == 0
    page = (tmp_path / "page.html").read_text()
    assert page.count("of label 3</title>") >= 3
    assert "5 clients by number" in page
    assert ">round</text>" in page


def test_eval_of_a_federated_checkpoint_is_that_of_its_summary(
    straight: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = json.loads((straight / "summary.json").read_text())
    code, said, _ = say(capsys, "eval", straight, "--json", "-o", straight.parent / "eval")
    assert code == 0
    assert json.loads(said)["metrics"]["test/accuracy"] == summary["test/accuracy"]


def test_a_whole_model_of_each_client_is_kept_where_that_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        rounds.train(
            tmp_path / "run",
            "--federated.save_client_models",
            "2",
            "--federated.num_server_rounds",
            "2",
        )
        == 0
    )
    trained = rounds.history(tmp_path / "run")[1]["clients"]
    models = sorted((tmp_path / "run/clients").rglob("model-00000002.ckpt"))
    assert [int(path.parent.name[-5:]) for path in models] == trained
    assert say(capsys, "export", models[0], "--format", "npz", "-o", tmp_path / "model.npz")[0] == 0


def test_a_federated_config_says_what_to_install_before_the_slow_imports(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(federation.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"Not installed: flwr.*make extras-federated"):
        quick.check(["--config", "configs/federated/digits.yaml"])
    with pytest.raises(ConfigError, match=r"Not installed: flwr, ray.*federated-ray"):
        quick.check(["--config", "configs/federated/digits.yaml", "--federated.runtime", "ray"])
    quick.check(["--config", "configs/fast.yaml"])


def test_the_check_of_a_federated_config_loads_neither_torch_nor_flower() -> None:
    program = (
        "import sys; from savepoint.config import quick;"
        "quick.check(['--config', 'configs/federated/digits.yaml']);"
        "assert not {'torch', 'flwr', 'lightning'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
