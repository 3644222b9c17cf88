"""A sweep: Optuna chooses values, each trial is a run of its own, in a process of its own. Needs
the extra `sweep`.

outputs/<sweep>/study.db          every trial and its result (SQLite): the same command goes on
                                  where it stopped
outputs/<sweep>/trial-000/        a run directory like any other; a trial that was cut off resumes
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
from pathlib import Path
from typing import Any

from savepoint import sweep_file
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
    path: Path, output_dir: str = "outputs", say: Callable[[str], None] = print
) -> dict[str, Any]:
    """All trials of a sweep file that are not done, one after the other; then the table of them,
    best first.

    Raises:
        ConfigError: the file, a missing package, or a trial that refused its values.
        RunExistsError: the study was begun with another file.
        RunLockedError: it runs in another process, or a trial of it is still being trained.
    """
    optuna = _optuna()
    refuse_url(output_dir, "output_dir")
    sweep = sweep_file.read(path)
    directory = Path(output_dir) / path.stem
    with _lock(directory).locked():
        return _run(optuna, sweep, path, directory, say)


def check(sweep: Sweep) -> None:
    """Has train.py read the config of two trials, as it alone knows the classes of the project.

    Raises:
        ConfigError: its words.
    """
    for values in sweep.ends():
        command = [sys.executable, "train.py", *sweep.arguments(values), "--print_config"]
        done = subprocess.run(command, cwd=project().root, capture_output=True, text=True)
        if done.returncode:
            raise ConfigError(done.stderr.strip())


def _run(
    optuna: Any, sweep: Sweep, path: Path, directory: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    study = _open(optuna, sweep, path, directory)
    _refuse_another(study, sweep, path, directory)
    if not study.trials:
        check(sweep)
    begun = [trial for trial in study.trials if trial.state.name == "RUNNING"]
    for trial in begun:  # a process that a killed sweep has left
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
    # A trial that was cut off is still open: it is gone on with before new ones begin.
    cut = [optuna.trial.Trial(study, trial._trial_id) for trial in begun]
    for place in range(todo):
        say(
            _run_trial(
                optuna, study, cut[place] if place < len(cut) else study.ask(), sweep, directory
            )
        )
    return _told(study, sweep, directory)


def _lock(directory: Path) -> Run:
    """The lock of a run, in a directory of its own: the sweep's is no run."""
    lock = Run(directory / ".sweep")
    lock.directory.mkdir(parents=True, exist_ok=True)
    if holder := lock.holder():
        raise RunLockedError(
            f"Another process runs this sweep: {directory}, held by {holder}. Expected it free. "
            "Wait for it or stop it."
        )
    return lock


def _open(optuna: Any, sweep: Sweep, path: Path, directory: Path) -> Any:
    from sqlalchemy.exc import SQLAlchemyError

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    database = directory / "study.db"
    try:
        return optuna.create_study(
            study_name=path.stem,
            storage=f"sqlite:///{database}",
            load_if_exists=True,
            direction="maximize" if sweep.mode == "max" else "minimize",
            pruner=optuna.pruners.MedianPruner(n_startup_trials=4)
            if sweep.prune
            else optuna.pruners.NopPruner(),
        )
    except (optuna.exceptions.OptunaError, SQLAlchemyError) as error:
        reason = str(getattr(error, "orig", None) or error).splitlines()[0]
        raise ConfigError(
            f"Not the record of a sweep: {database} ({reason}). Expected a study of Optuna. Move "
            "it away: the sweep begins anew, and what is there of each trial is gone on with."
        ) from None


def _sampler(optuna: Any, sweep: Sweep, number: int) -> Any:
    """Of one trial: so a sweep that is cut off goes on with the values that it would have had."""
    kind = optuna.samplers.TPESampler if sweep.sampler == "tpe" else optuna.samplers.RandomSampler
    return kind(seed=(10_007 * sweep.seed + number) % 2**32)


def _run_dir(directory: Path, trial: Any) -> Path:
    return directory / f"trial-{trial.number:03d}"


def _to_try_again(study: Any) -> list[dict[str, Any]]:
    """The values of trials that failed, of which no other trial has come or may come to an end."""
    failed = [trial.params for trial in study.trials if trial.state.name == "FAIL"]
    others = [
        {**trial.params, **trial.system_attrs.get("fixed_params", {})}
        for trial in study.trials
        if trial.state.name != "FAIL"
    ]
    return [
        values for place, values in enumerate(failed) if values not in [*others, *failed[:place]]
    ]


def _run_trial(optuna: Any, study: Any, trial: Any, sweep: Sweep, directory: Path) -> str:
    """Runs a trial to its end; what came of it."""
    study.sampler = _sampler(optuna, sweep, trial.number)
    values = {key: _suggest(trial, key, space) for key, space in sweep.parameters.items()}
    run_dir = _run_dir(directory, trial)
    known = (
        run_dir.with_suffix(".log").stat().st_size if run_dir.with_suffix(".log").exists() else 0
    )
    pruned, code = _train(trial, values, sweep, run_dir)
    last = _last_line(run_dir, known)
    scores = _scores(run_dir, sweep.monitor)
    log = show(run_dir.absolute()) + ".log"
    # Where the trial itself is refused it stays open: once the sweep is put right, it is the first
    # to go on.
    if code == 2:
        raise ConfigError(
            f"{run_dir.name} was refused: {last} Expected values that train.py takes. See {log}"
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
        result = f"failed ({last or f'exit code {code}'}), see {log}"
    else:
        best = max(scores) if sweep.mode == "max" else min(scores)
        study.tell(trial, best)
        result = f"{sweep.monitor} {best:.4f}"
    return f"{run_dir.name}: {', '.join(f'{key} {short(value)}' for key, value in values.items())}: {result}"


def _train(trial: Any, values: Mapping[str, Any], sweep: Sweep, run_dir: Path) -> tuple[bool, int]:
    """One trial as a process: (whether it was pruned, its exit code)."""
    command = [
        sys.executable,
        "train.py",
        *sweep.arguments(values),
        "--output_dir",
        str(run_dir.parent.absolute()),
    ]
    # --resume auto: what a trial had reached when the sweep was cut off is not trained again.
    command += ["--run_name", run_dir.name, "--resume", "auto"]
    told = len(trial.study.trials[trial.number].intermediate_values)
    pruned = False
    with run_dir.with_suffix(".log").open("ab") as log:
        process = subprocess.Popen(command, cwd=project().root, stdout=log, stderr=log)
    try:
        while process.poll() is None:
            time.sleep(_POLL_SECS)
            scores = _scores(run_dir, sweep.monitor)
            for step in range(told, len(scores)):
                trial.report(scores[step], step)
            told = max(told, len(scores))
            if not pruned and scores and trial.should_prune():
                pruned = True
                process.terminate()  # it saves, and could be gone on with by hand
    except BaseException:
        # Ctrl-C reached the trial too, SIGTERM did not: it saves and ends, and the same sweep goes
        # on with it.
        if process.poll() is None:
            process.terminate()
        process.wait()
        raise
    if process.returncode in (129, 130, 143) and not pruned:
        # Somebody stopped the trial: the sweep stops with it.
        raise Preempted(process.returncode - 128)
    return pruned, process.returncode


def _scores(run_dir: Path, monitor: str) -> list[float]:
    """The monitored metric of each validation so far, as metrics.csv has it."""
    try:
        with (run_dir / "metrics.csv").open(newline="", errors="replace") as file:
            return [float(row[monitor]) for row in csv.DictReader(file) if row.get(monitor)]
    except (FileNotFoundError, ValueError):  # not yet, or a row that is being written
        return []


def _columns(run_dir: Path) -> list[str]:
    try:
        with (run_dir / "metrics.csv").open(newline="", errors="replace") as file:
            return next(csv.reader(file), [])
    except FileNotFoundError:
        return []


def _last_line(run_dir: Path, known: int) -> str:
    """Of what came to the log after its first `known` bytes."""
    lines = (
        run_dir.with_suffix(".log")
        .read_bytes()[known:]
        .decode(errors="replace")
        .strip()
        .splitlines()
    )
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


def _refuse_another(study: Any, sweep: Sweep, path: Path, directory: Path) -> None:
    """Trials of another question would be mixed into this one's answer; more trials are the same
    question.
    """
    asked = json.dumps(
        {k: v for k, v in vars(sweep).items() if k != "trials"}, sort_keys=True, default=str
    )
    before = study.user_attrs.get("asked")
    if before not in (None, asked):
        raise RunExistsError(
            f"A sweep of this name was begun with other settings: {directory}. Expected those of "
            f"{path} to be the same (only `trials` may change). Give the file another name, or "
            "move that directory away."
        )
    study.set_user_attr("asked", asked)


def _told(study: Any, sweep: Sweep, directory: Path) -> dict[str, Any]:
    """Each trial with its values and result, the best first; as trials.csv and as a plot too."""
    finished = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
    finished.sort(key=lambda trial: trial.value, reverse=sweep.mode == "max")
    rest = [trial for trial in study.trials if trial.state.name != "COMPLETE"]
    trials = [
        {"trial": f"trial-{trial.number:03d}", "state": trial.state.name.lower(), "value": trial.value,
         "parameters": {key: trial.params.get(key) for key in sweep.parameters},
         "run_dir": _run_dir(directory, trial).absolute()}
        for trial in [*finished, *rest]
    ]  # fmt: skip
    text = io.StringIO()
    header = ["trial", *sweep.parameters, sweep.monitor, "state"]
    rows = [
        [one["trial"], *one["parameters"].values(), one["value"], one["state"]] for one in trials
    ]
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    with replacing(directory / "trials.csv") as file:
        file.write(text.getvalue().encode())
    plot = directory / "trials.png"
    if finished:
        _plot(study, list(sweep.parameters), sweep.monitor, plot)

    return {"directory": directory.absolute(), "monitor": sweep.monitor, "trials": trials, "failed": len(_to_try_again(study)),
            "plot": plot.absolute() if finished else None}  # fmt: skip


def _plot(study: Any, keys: Sequence[str], monitor: str, path: Path) -> None:
    """One panel a parameter: its value against the result. Trials that were pruned are hollow, at
    what they had reached.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(keys), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(keys), sharey=True, squeeze=False)[0]
    for panel, key in zip(panels, keys, strict=True):
        for state, face in (("COMPLETE", "#0b6e99"), ("PRUNED", "none")):
            shown = [
                trial
                for trial in study.trials
                if trial.state.name == state and trial.intermediate_values
            ]
            across = [trial.params[key] for trial in shown]
            if not all(isinstance(value, int | float) for value in across):
                across = [str(value) for value in across]
            reached = [
                trial.value if state == "COMPLETE" else list(trial.intermediate_values.values())[-1]
                for trial in shown
            ]
            panel.scatter(across, reached, s=26, facecolors=face, edgecolors="#0b6e99")
        distribution = next(
            (t.distributions[key] for t in study.trials if key in t.distributions), None
        )
        panel.set_xscale("log" if getattr(distribution, "log", False) else panel.get_xscale())
        panel.set_xlabel(key)
        panel.grid(alpha=0.25)
    panels[0].set_ylabel(monitor)
    with replacing(path) as file:
        figure.savefig(file, dpi=120, format="png")


def short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def _optuna() -> Any:
    try:
        import optuna
        from matplotlib import figure  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"A sweep needs a package that is missing: {error.name}. Expected it in this "
            "environment. Install it: pip install 'savepoint-lightning[sweep]'"
        ) from None
    return optuna
