"""Experiment trackers beside metrics.csv and TensorBoard. A run is one run in the tracker, however
often it was started.

They need an extra: `pip install 'savepoint-lightning[wandb]'` or `[mlflow]`. metrics.csv is the
record: rows that a resume logs again stand twice in a tracker, which cannot take rows back.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import MLFlowLogger, WandbLogger

from savepoint.errors import ConfigError

_TAG = "savepoint.run"
_LOCAL = "sqlite:///outputs/mlflow.db"


class RunWandbLogger(WandbLogger):
    """Weights & Biases.

    Args:
        project: Where the run is listed.
        offline: Write below the run directory, for `wandb sync` later; nothing is sent.
        entity: A user or a team; null for the default one.
    """

    def __init__(
        self, project: str = "savepoint", offline: bool = False, entity: str | None = None
    ) -> None:
        _needs(
            "wandb",
            lambda: super(RunWandbLogger, self).__init__(
                project=project, offline=offline, entity=entity
            ),
        )

    def join(self, run_id: str, directory: Path) -> None:
        """Every start of a run joins the same run of the tracker."""
        self._wandb_init.pop("anonymous", None)  # Weights & Biases warns of it at each start
        self._wandb_init |= {
            "id": run_id,
            "name": directory.name,
            "dir": str(directory),
            "resume": "allow",
        }
        self._id = run_id
        self._name = directory.name
        self._save_dir = str(directory)


class RunMLFlowLogger(MLFlowLogger):
    """MLflow.

    Args:
        experiment_name: Where the run is listed.
        tracking_uri: A server, or a local database; None: what MLFLOW_TRACKING_URI names, else
            sqlite:///outputs/mlflow.db.
    """

    def __init__(self, experiment_name: str = "savepoint", tracking_uri: str | None = None) -> None:
        where = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or _LOCAL
        _needs(
            "mlflow",
            lambda: super(RunMLFlowLogger, self).__init__(experiment_name, tracking_uri=where),
        )

    def join(self, run_id: str, directory: Path) -> None:
        """Every start of a run joins the same run of the tracker, which a tag identifies."""
        self._run_name = directory.name
        self.tags = {_TAG: run_id}
        experiment = self._mlflow_client.get_experiment_by_name(self._experiment_name)
        if experiment is not None:
            runs = self._mlflow_client.search_runs(
                [experiment.experiment_id], f"tags.`{_TAG}` = '{run_id}'"
            )
            self._run_id = runs[0].info.run_id if runs else None

    def log_hyperparams(self, params: Any) -> None:
        """Only at the first start: MLflow refuses a parameter that changes, which --allow permits.
        config.yaml has them all.
        """
        if self._run_id is None:
            super().log_hyperparams(params)


def _needs(extra: str, make: Callable[[], None]) -> None:
    try:
        make()
    except ModuleNotFoundError:
        raise ConfigError(
            f"A logger needs a package that is missing: {extra}. It is an extra of the library. "
            f"Install it: make extras, or pip install 'savepoint-lightning[{extra}]'"
        ) from None
