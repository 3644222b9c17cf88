"""Flower's simulation with Ray: each client in one of several processes."""

# mypy: disable-error-code="import-not-found,misc,no-any-return,unused-ignore,untyped-decorator"
# Without Flower, which is optional, its types are Any.

import os
import sys
import warnings
from typing import Any

from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from savepoint import preemption
from savepoint.federated import client_app
from savepoint.federated.server import Server
from savepoint.job import cores

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
}


def play(server: Server) -> None:
    """All rounds that are left. The server runs in a thread of this process.

    Raises: what `Server.run` raises.
    """
    app = ServerApp()
    raised: list[BaseException] = []

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            server.run(grid)
        # Flower would drop a SystemExit of the thread.
        except BaseException as error:  # noqa: BLE001
            raised.append(error)

    simulate(app, client_app.app, server.federation.num_clients, server.config)
    if raised:
        raise raised[0]


def simulate(server: ServerApp, clients: ClientApp, number: int, config: Any) -> None:
    """Flower's simulation of so many clients, each on one core of those that are there."""
    os.environ.update({key: os.environ.get(key, value) for key, value in QUIET.items()})
    from flwr.simulation import run_simulation

    gpus = 1.0 if config.trainer.accelerator in ("gpu", "cuda") else 0.0
    resources: Any = {"num_cpus": 1, "num_gpus": gpus}
    with warnings.catch_warnings(action="ignore"):
        _start_ray()
        run_simulation(server, clients, number, backend_config={"client_resources": resources})


def _start_ray() -> None:
    """As Flower starts it, but before Flower does: Ray puts a handler of SIGTERM in the place of
    ours, which ends the process in mid-round.
    """
    import ray

    if not ray.is_initialized():
        path = {"PYTHONPATH": os.pathsep.join(sys.path)}
        ray.init(num_cpus=cores(), include_dashboard=False, runtime_env={"env_vars": path})
    preemption.install()
