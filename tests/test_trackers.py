"""However often a run is started, it is one run in its tracker. With the trackers themselves: they
need the extras.
"""

import json
import os
from pathlib import Path

import pytest
from support import forked
from support.programs import LITTLE, ROOT

from savepoint.errors import ConfigError
from savepoint.trackers import RunMLFlowLogger, RunWandbLogger


@pytest.mark.parametrize("logger", [RunWandbLogger, RunMLFlowLogger])
def test_without_its_package_a_tracker_says_what_to_install(
    logger: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra = logger.__name__.removeprefix("Run").removesuffix("Logger").lower()
    monkeypatch.setattr(f"lightning.pytorch.loggers.{extra}._{extra.upper()}_AVAILABLE", False)
    with pytest.raises(
        ConfigError, match=rf"missing: {extra}\..*pip install 'savepoint-lightning\[{extra}\]'"
    ):
        logger()


@pytest.mark.filterwarnings("ignore")  # of MLflow's own
def test_in_mlflow_each_start_of_a_run_is_the_same_run(tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason="needs: make extras")
    ids = []
    for run in ("one", "one", "another"):
        logger = RunMLFlowLogger("tests", f"sqlite:///{tmp_path / 'mlflow.db'}")
        logger.join(run, tmp_path / run)
        # A parameter that was changed: MLflow would refuse it.
        logger.log_hyperparams({"lr": 0.1 * (len(ids) + 1)})
        logger.log_metrics({"loss": 1.0}, step=len(ids))
        logger.finalize("success")
        ids.append(logger.run_id)
    assert ids[0] == ids[1] != ids[2]
    assert [metric.step for metric in logger.experiment.get_metric_history(ids[0], "loss")] == [
        0,
        1,
    ]


@pytest.mark.filterwarnings("ignore")  # of MLflow's own
def test_mlflow_goes_where_its_environment_variable_leads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow", reason="needs: make extras")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'theirs.db'}")
    RunMLFlowLogger().log_metrics({"loss": 1.0}, step=0)
    assert (tmp_path / "theirs.db").is_file()
    assert not (tmp_path / "outputs").exists()


@pytest.mark.filterwarnings("ignore")  # of wandb's own
def test_in_wandb_each_start_of_a_run_is_the_same_run(tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb", reason="needs: make extras")
    wandb.finish()  # what another test left open would be taken for this run
    for _ in range(2):
        logger = RunWandbLogger(offline=True)
        logger.join("one", tmp_path)
        logger.log_metrics({"loss": 1.0}, step=1)
        assert logger.experiment.id == "one"
        wandb.finish()
    assert list((tmp_path / "wandb").glob("offline-run-*-one"))


@pytest.mark.slow  # tests/test_project.py resumes both by their configs, too
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_resume_by_the_config_goes_on_with_the_run_of_the_tracker(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = pytest.importorskip(name, reason="needs: make extras")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    configs = ["--config", "configs/fast.yaml", "--config", f"configs/logger/{name}.yaml"]
    for key in [key for key in os.environ if key.startswith("WANDB")]:
        monkeypatch.delenv(key)
    for script, *words in (
        ("train.py", *configs, "--run_name", "run", *LITTLE),
        ("resume.py", "outputs/run", "--trainer.max_epochs", "2"),
    ):
        code, said = forked.run([script, *words], tmp_path / "said.txt", at=tmp_path)
        assert code == 0, said
    run_id = json.loads((tmp_path / "outputs/run/run.json").read_text())["id"]
    if name == "wandb":
        started = list((tmp_path / "outputs/run/wandb").glob("offline-run-*"))
        assert len(started) == 2
        assert {path.name.split("-")[-1] for path in started} == {run_id}
        return
    client = module.MlflowClient(f"sqlite:///{tmp_path / 'outputs/mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("savepoint").experiment_id])
    assert run.data.tags["savepoint.run"] == run_id
    assert [one.step for one in client.get_metric_history(run.info.run_id, "train/loss_step")] == [
        0,
        1,
        2,
        3,
    ]
