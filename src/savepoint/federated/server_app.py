"""Flower's ServerApp: what `flwr run .` starts, in a simulation and in a deployment. It makes, or
goes on with, a run directory like that of train.py.

The run config (`[tool.flwr.app.config]` in pyproject.toml, `--run-config` on the command line)
names a config file of the project under `config`, a run to go on with under `resume`, any other
flag under `flags`; and any key of the group `federated`, in Flower's spelling. 0 and "" leave the
value of the file.
"""

# mypy: disable-error-code="import-not-found,misc,no-any-return,unused-ignore,untyped-decorator"
# Without Flower, which is optional, its types are Any.

import importlib
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from savepoint import entry, preemption, workspace
from savepoint.config import quick, typed
from savepoint.errors import ConfigError
from savepoint.federated import runtime
from savepoint.federated.federation import Federation
from savepoint.resume.request import requested
from savepoint.run import Run

app = ServerApp()
OURS = ("config", "resume", "flags")


@app.main()
def main(grid: Grid, context: Context) -> None:
    root = Path(str(importlib.import_module("project").__file__)).resolve().parents[2]
    os.chdir(root)
    workspace.enter(workspace.Project(root))
    entry.take_own_code(root)
    preemption.install()
    code = play(dict(context.run_config), lambda server: server.run(grid))
    if code:
        raise SystemExit(code)


def play(run_config: dict[str, Any], how: runtime.Play) -> int:
    """A new run, or one that goes on; returns the exit code."""
    flags = [*shlex.split(str(run_config.get("flags", ""))), *_flags(run_config)]
    target = str(run_config.get("resume", ""))
    words = ["resume.py", target] if target else ["train.py", "--config", str(run_config["config"])]
    sys.argv = [*words, *flags]  # the record keeps it, and Flower's own has a token in it
    if target:
        request = requested([target, *flags])
        assert request is not None  # only --help gives none
        run = Run.open(request.run_dir) if request.run_dir else None
        try:
            return runtime.go_on(request, None, run, how=how)
        finally:
            if run:
                run.unlock()
    composed = quick.check(["--config", str(run_config["config"]), *flags])
    config = typed.resolve(composed)
    if "federated" not in config:
        raise ConfigError(
            f"Not a federated config: {run_config['config']}. Flower runs one with a group "
            "`federated`. Name another one: flwr run . --run-config 'config=\"FILE\"'"
        )
    return runtime.train(config, composed.name, how=how)


def _flags(run_config: dict[str, Any]) -> list[str]:
    """Flower's spelling as flags of train.py."""
    known = vars(Federation())
    flags = []
    for key, value in run_config.items():
        name = key.replace("-", "_")
        if key not in OURS and name not in known:
            raise ConfigError(
                f"Unknown key of the run config: {key}. Expected {', '.join(OURS)}, or one of "
                "the group `federated`, as num-server-rounds."
            )
        if key not in OURS and value not in (0, ""):
            flags += [f"--federated.{name}", str(value)]
    return flags
