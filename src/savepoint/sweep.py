"""A sweep: Optuna chooses values, and each trial is a run in a process of its own. Needs the extra
`sweep`.

outputs/<sweep>/study.db          every trial and its result (SQLite): the same command goes on
                                  where it stopped
outputs/<sweep>/trial-000/        a run directory like any other; an interrupted trial resumes
                                  exactly
outputs/<sweep>/trials.csv, .png  the table and the plot
outputs/<sweep>/.sweep/lock       held while a process runs it
"""

# mypy: disable-error-code="import-not-found,import-untyped"

import csv
import io
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from savepoint.config import compose
from savepoint.errors import ConfigError, RunExistsError, RunLockedError
from savepoint.files import refuse_url, replacing
from savepoint.preemption import Preempted
from savepoint.run import Run
from savepoint.sweep_file import Sweep
from savepoint.words import plural, show
from savepoint.workspace import project

_POLL_SECS = 0.2
_DONE = ("COMPLETE", "PRUNED")


def run(
    sweep: Sweep, name: str, output_dir: str = "outputs", say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Runs the trials of a sweep that are not done, one after the other, and returns the results,
    best first.

    Raises:
        ConfigError: a missing package, or a trial that refused its values.
        RunExistsError: the study was begun with other settings.
        RunLockedError: another process runs the sweep, or still trains one of its trials.
    """
    optuna = require_optuna()
    refuse_url(output_dir, "output_dir")
    directory = Path(output_dir) / name
    if not sweep.monitor:
        sweep = _ranked_as_configured(sweep)
    with _lock(directory).locked():
        return _run(optuna, sweep, directory, say)


def _ranked_as_configured(sweep: Sweep) -> Sweep:
    """With the metric that the config of its first trial ranks checkpoints by."""
    checkpoint = compose.parse_yaml(_config(sweep, sweep.ends()[0]), "the config")["checkpoint"]
    if checkpoint["monitor"] is None:
        raise ConfigError(
            "No metric to rank the trials by: checkpoint.monitor is null. Name one that the "
            "validation logs: --checkpoint.monitor val/loss --checkpoint.mode min; in a sweep file "
            "`monitor` and `mode`."
        )
    return replace(sweep, monitor=checkpoint["monitor"], mode=checkpoint["mode"])


def check(sweep: Sweep) -> None:
    """Has train.py read the config of two trials: it alone knows the classes of the project.

    Raises:
        ConfigError: with the message of train.py.
    """
    for values in sweep.ends():
        _config(sweep, values)


def _config(sweep: Sweep, values: Mapping[str, Any]) -> str:
    command = [sys.executable, "train.py", *sweep.arguments(values), "--print_config"]
    done = subprocess.run(command, cwd=project().root, capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(done.stderr.strip())
    return done.stdout


def _run(optuna: Any, sweep: Sweep, directory: Path, say: Callable[[str], None]) -> dict[str, Any]:
    study = _open(optuna, sweep, directory)
    _refuse_another(study, sweep, directory)
    if not study.trials:
        check(sweep)
    begun = [trial for trial in study.trials if trial.state.name == "RUNNING"]
    for trial in begun:  # the process of a killed sweep may train it still
        Run(_run_dir(directory, trial)).refuse_if_held()
    number = sweep.trials
    if sweep.sampler == "grid":
        number = len(sweep.grid())
        for values in sweep.grid():
            study.enqueue_trial(values, skip_if_exists=True)
    for values in _to_try_again(study):
        study.enqueue_trial(values)
    todo = number - sum(trial.state.name in _DONE for trial in study.trials)
    say(f"sweep {show(directory.absolute())}: {plural(number, 'trial')}, {number - todo} done")
    # An interrupted trial is still open: these go on before new ones begin.
    interrupted = [optuna.trial.Trial(study, trial._trial_id) for trial in begun]
    for _ in range(todo):
        trial = interrupted.pop(0) if interrupted else study.ask()
        say(_run_trial(optuna, study, trial, sweep, directory, say))
    return _results(study, sweep, directory)


def _lock(directory: Path) -> Run:
    """The lock of a sweep: that of a run in a directory of its own, as a sweep's is no run."""
    lock = Run(directory / ".sweep")
    lock.directory.mkdir(parents=True, exist_ok=True)
    if holder := lock.holder():
        raise RunLockedError(
            f"Another process runs this sweep: {directory}, held by {holder}. Two would train the "
            "same trials. Wait for it or stop it."
        )
    return lock


def _open(optuna: Any, sweep: Sweep, directory: Path) -> Any:
    from sqlalchemy.exc import SQLAlchemyError

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    database = directory / "study.db"
    pruner = optuna.pruners.NopPruner()
    if sweep.prune:
        pruner = optuna.pruners.MedianPruner(n_startup_trials=4)
    try:
        return optuna.create_study(
            study_name=directory.name,
            storage=f"sqlite:///{database}",
            load_if_exists=True,
            direction="maximize" if sweep.mode == "max" else "minimize",
            pruner=pruner,
        )
    except (optuna.exceptions.OptunaError, SQLAlchemyError) as error:
        reason = str(getattr(error, "orig", None) or error).splitlines()[0]
        raise ConfigError(
            f"Not the record of a sweep: {database} ({reason}). Expected a study of Optuna. Move "
            "it away: the sweep begins anew, and trials that have a run directory go on."
        ) from None


def _sampler(optuna: Any, sweep: Sweep, number: int) -> Any:
    """The sampler of one trial, so that an interrupted sweep draws the same values."""
    kind = optuna.samplers.TPESampler if sweep.sampler == "tpe" else optuna.samplers.RandomSampler
    return kind(seed=(10_007 * sweep.seed + number) % 2**32)


def _run_dir(directory: Path, trial: Any) -> Path:
    return directory / f"trial-{trial.number:03d}"


def _to_try_again(study: Any) -> list[dict[str, Any]]:
    """The values of failed trials, without those that another trial has or gets."""
    failed = [trial for trial in study.trials if trial.state.name == "FAIL"]
    others = [trial for trial in study.trials if trial.state.name != "FAIL"]
    known = [{**trial.params, **trial.system_attrs.get("fixed_params", {})} for trial in others]
    again = []
    for trial in failed:
        if trial.params not in known:
            again.append(trial.params)
            known.append(trial.params)
    return again


def _run_trial(
    optuna: Any, study: Any, trial: Any, sweep: Sweep, directory: Path, say: Callable[[str], None]
) -> str:
    """Runs a trial to its end, and returns a line about its result."""
    study.sampler = _sampler(optuna, sweep, trial.number)
    values = {key: _suggest(trial, key, space) for key, space in sweep.parameters.items()}
    run_dir = _run_dir(directory, trial)
    log = run_dir.with_suffix(".log")
    known = log.stat().st_size if log.exists() else 0
    shown_log = show(log.absolute())
    chosen = ", ".join(f"{key} {short(value)}" for key, value in values.items())
    say(f"{run_dir.name}: {chosen}: trains, see {shown_log}")
    pruned, code = _train(trial, values, sweep, run_dir)
    last = _last_line(log, known)
    scores = _scores(run_dir, sweep.monitor)
    # A trial whose values are refused stays open: once the sweep file is corrected, it goes on
    # first.
    if code == 2:
        raise ConfigError(
            f"{run_dir.name} was refused: {last} Every trial is a run of train.py. See {shown_log}"
        )
    if code == 0 and not scores:
        raise ConfigError(
            f"{run_dir.name} measured no `{sweep.monitor}`. Expected a column of its metrics.csv: "
            f"{', '.join(_columns(run_dir)) or 'it has none'}. Name one as `monitor`."
        )
    if pruned:
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        result = "pruned"
    elif code:
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
        result = f"failed ({last or f'exit code {code}'}), see {shown_log}"
    else:
        best = max(scores) if sweep.mode == "max" else min(scores)
        study.tell(trial, best)
        result = f"{sweep.monitor} {best:.4f}"
    return f"{run_dir.name}: {chosen}: {result}"


def _train(trial: Any, values: Mapping[str, Any], sweep: Sweep, run_dir: Path) -> tuple[bool, int]:
    """One trial as a process: (whether it was pruned, its exit code)."""
    command = [sys.executable, "train.py", *sweep.arguments(values)]
    command += ["--output_dir", str(run_dir.parent.absolute())]
    # --resume auto: an interrupted trial goes on from its last checkpoint.
    command += ["--run_name", run_dir.name, "--resume", "auto"]
    reported = len(trial.study.trials[trial.number].intermediate_values)
    pruned = False
    with run_dir.with_suffix(".log").open("ab") as log:
        process = subprocess.Popen(command, cwd=project().root, stdout=log, stderr=log)
    try:
        while process.poll() is None:
            time.sleep(_POLL_SECS)
            scores = _scores(run_dir, sweep.monitor)
            for step in range(reported, len(scores)):
                trial.report(scores[step], step)
            reported = max(reported, len(scores))
            if not pruned and scores and trial.should_prune():
                pruned = True
                process.terminate()  # it saves, and can be resumed by hand
    except BaseException:
        # Ctrl-C reached the trial too, SIGTERM did not. The trial saves and ends; the same command
        # resumes it.
        if process.poll() is None:
            process.terminate()
        process.wait()
        raise
    if process.returncode in (129, 130, 143) and not pruned:
        # Somebody stopped the trial: the sweep stops with it.
        raise Preempted(process.returncode - 128)
    return pruned, process.returncode


def _scores(run_dir: Path, monitor: str) -> list[float]:
    """The monitored metric of each validation so far, from metrics.csv."""
    try:
        with (run_dir / "metrics.csv").open(newline="", errors="replace") as file:
            return [float(row[monitor]) for row in csv.DictReader(file) if row.get(monitor)]
    except (FileNotFoundError, ValueError):  # no file yet, or an unfinished row
        return []


def _columns(run_dir: Path) -> list[str]:
    try:
        with (run_dir / "metrics.csv").open(newline="", errors="replace") as file:
            return next(csv.reader(file), [])
    except FileNotFoundError:
        return []


def _last_line(log: Path, known: int) -> str:
    """The last line of a log after its first `known` bytes."""
    lines = log.read_bytes()[known:].decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


def _suggest(trial: Any, key: str, space: Mapping[str, Any]) -> Any:
    if "choices" in space:
        return trial.suggest_categorical(key, space["choices"])
    low = space["low"]
    high = space["high"]
    log = bool(space.get("log"))
    step = space.get("step")
    if all(isinstance(one, int) for one in (low, high, step or 1)):
        return trial.suggest_int(key, low, high, log=log, step=step or 1)
    return trial.suggest_float(key, low, high, log=log, step=step)


def _refuse_another(study: Any, sweep: Sweep, directory: Path) -> None:
    """Refuses a study that was begun with other settings; only `trials` may change."""
    settings = {key: value for key, value in vars(sweep).items() if key != "trials"}
    text = json.dumps(settings, sort_keys=True, default=str)
    before = study.user_attrs.get("asked")
    if before not in (None, text):
        raise RunExistsError(
            f"A sweep of this name was begun with other settings: {directory}. Only `trials` "
            "may change, as all trials are compared. Give the file another name, or move that "
            "directory away."
        )
    study.set_user_attr("asked", text)


def _results(study: Any, sweep: Sweep, directory: Path) -> dict[str, Any]:
    """Each trial with its values and result, the best first; also as trials.csv and as a plot."""
    finished = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
    finished.sort(key=lambda trial: trial.value, reverse=sweep.mode == "max")
    rest = [trial for trial in study.trials if trial.state.name != "COMPLETE"]
    trials = [_trial_facts(trial, sweep, directory) for trial in [*finished, *rest]]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["trial", *sweep.parameters, sweep.monitor, "state"])
    for one in trials:
        writer.writerow([one["trial"], *one["parameters"].values(), one["value"], one["state"]])
    with replacing(directory / "trials.csv") as file:
        file.write(text.getvalue().encode())
    plot = directory / "trials.png"
    if finished:
        _plot(study, list(sweep.parameters), sweep.monitor, plot)
    return {
        "directory": directory.absolute(),
        "monitor": sweep.monitor,
        "trials": trials,
        "failed": len(_to_try_again(study)),
        "plot": plot.absolute() if finished else None,
    }


def _trial_facts(trial: Any, sweep: Sweep, directory: Path) -> dict[str, Any]:
    run_dir = _run_dir(directory, trial).absolute()
    return {
        "trial": run_dir.name,
        "state": trial.state.name.lower(),
        "value": trial.value,
        "parameters": {key: trial.params.get(key) for key in sweep.parameters},
        "run_dir": run_dir,
    }


def _plot(study: Any, keys: Sequence[str], monitor: str, path: Path) -> None:
    """One panel for each parameter: its value against the result. Pruned trials are hollow, at
    their last score.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(keys), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(keys), sharey=True, squeeze=False)[0]
    for panel, key in zip(panels, keys, strict=True):
        for state, face in (("COMPLETE", "#0b6e99"), ("PRUNED", "none")):
            shown = [trial for trial in study.trials if trial.state.name == state]
            shown = [trial for trial in shown if trial.intermediate_values]
            across = [trial.params[key] for trial in shown]
            if not all(isinstance(value, int | float) for value in across):
                across = [str(value) for value in across]
            reached = [list(trial.intermediate_values.values())[-1] for trial in shown]
            if state == "COMPLETE":
                reached = [trial.value for trial in shown]
            panel.scatter(across, reached, s=26, facecolors=face, edgecolors="#0b6e99")
        spaces = [trial.distributions.get(key) for trial in study.trials]
        if any(getattr(space, "log", False) for space in spaces):
            panel.set_xscale("log")
        panel.set_xlabel(key)
        panel.grid(alpha=0.25)
    panels[0].set_ylabel(monitor)
    with replacing(path) as file:
        figure.savefig(file, dpi=120, format="png")


def short(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def require_optuna() -> Any:
    """Raises ConfigError where the extra is missing."""
    try:
        import optuna
        from matplotlib import figure  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"A sweep needs a package that is missing: {error.name}. It belongs to an extra of the "
            "library. Install it: make extras, or pip install 'savepoint-lightning[sweep]'"
        ) from None
    return optuna
