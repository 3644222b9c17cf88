"""A sweep: Optuna chooses values, each trial is a run of its own, in a process of its own. Needs the extra `sweep`.

outputs/<sweep>/study.db          every trial and its result (SQLite): the same command goes on where it stopped
outputs/<sweep>/trial-000/        a run directory like any other; a trial that was cut off resumes exactly
outputs/<sweep>/trials.csv, .png  the table and the plot
"""

import csv
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from savepoint import compose
from savepoint.checkpoint.retention import Mode
from savepoint.errors import ConfigError, RunExistsError
from savepoint.preemption import Preempted
from savepoint.run import plural, show

_POLL_SECS = 0.2
_SHAPES = "{low: 0.001, high: 0.1, log: true}, {low: 1, high: 8, step: 1} or {choices: [64, 128]}"


@dataclass
class Sweep:
    """The file of a sweep.

    Attributes:
        config: The config that every trial starts from; relative to the working directory.
        parameters: Config key -> {low, high, log, step} or {choices}.
        monitor: The metric to better, by its best value over the validations of a trial.
        mode: Whether a smaller or a larger value is better.
        trials: How many in all; a grid has its own number.
        sampler: tpe learns from the trials before, random does not, grid takes every combination of `choices`.
        prune: Whether a trial that is worse than the median of those before it at the same validation is stopped.
        seed: Of the sampler.
        overrides: Config key -> value, the same in every trial.
    """

    config: str
    parameters: Mapping[str, Mapping[str, Any]]
    monitor: str = "val/accuracy"
    mode: Mode = "max"
    trials: int = 20
    sampler: Literal["tpe", "random", "grid"] = "tpe"
    prune: bool = True
    seed: int = 0
    overrides: Mapping[str, Any] = field(default_factory=dict)


def read(path: Path) -> Sweep:
    """Raises ConfigError: what is wrong with the file, and where."""
    content = compose.read(path, "sweep file")
    known = [one.name for one in fields(Sweep)]
    if not isinstance(content, dict) or not {"config", "parameters"} <= content.keys():
        raise ConfigError(f"Not a sweep: {path}. Expected the keys `config` and `parameters`. See configs/sweep/.")
    for name in content:
        if name not in known:
            near = compose.nearest(str(name), known) or f" Expected one of {', '.join(known)}."
            raise ConfigError(f"Unknown key in {path}: {name}.{near}")
    sweep = Sweep(**content)
    for name, wanted in (("sampler", ("tpe", "random", "grid")), ("mode", ("min", "max"))):
        if getattr(sweep, name) not in wanted:
            raise ConfigError(
                f"Wrong value in {path}: {name} is {getattr(sweep, name)}. Expected {' or '.join(wanted)}."
            )
    for key, space in sweep.parameters.items():
        fits = isinstance(space, dict) and ("choices" in space or {"low", "high"} <= space.keys())
        if not fits or (sweep.sampler == "grid" and "choices" not in space):
            raise ConfigError(
                f"Wrong value in {path}: parameters.{key} is {space}. Expected {_SHAPES}; a grid has choices."
            )
    return sweep


def run(path: Path, output_dir: str = "outputs") -> int:
    """All trials of a sweep file that are not done, then the table. Returns the exit code.

    Raises:
        ConfigError: the file, or a missing package.
        RunExistsError: the study was begun with another file.
    """
    optuna = _optuna()
    sweep, directory = read(path), Path(output_dir) / path.stem
    directory.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        study_name=path.stem,
        storage=f"sqlite:///{directory / 'study.db'}",
        load_if_exists=True,
        direction="maximize" if sweep.mode == "max" else "minimize",
        sampler=(optuna.samplers.TPESampler if sweep.sampler == "tpe" else optuna.samplers.RandomSampler)(
            seed=sweep.seed
        ),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=4) if sweep.prune else optuna.pruners.NopPruner(),
    )
    _refuse_another(study, sweep, path, directory)
    number = sweep.trials
    if sweep.sampler == "grid":
        number = len(_grid(sweep))
        for values in _grid(sweep):
            study.enqueue_trial(values, skip_if_exists=True)
    done = _number_finished(study)
    print(f"sweep {show(directory.absolute())}: {plural(number, 'trial')}, {done} done", flush=True)
    # A trial that was cut off is still open: it is gone on with before new ones begin.
    for cut in [trial for trial in study.trials if trial.state.name == "RUNNING"]:
        _run_trial(optuna, study, optuna.trial.Trial(study, cut._trial_id), sweep, directory)
    while _number_finished(study) < number:
        _run_trial(optuna, study, study.ask(), sweep, directory)
    return _tell(study, sweep, directory)


def _number_finished(study: Any) -> int:
    return sum(trial.state.is_finished() for trial in study.trials)


def _run_trial(optuna: Any, study: Any, trial: Any, sweep: Sweep, directory: Path) -> None:
    values = {key: _suggest(trial, key, space) for key, space in sweep.parameters.items()}
    run_dir = directory / f"trial-{trial.number:03d}"
    pruned, code = _train(trial, {**sweep.overrides, **values}, sweep, run_dir)
    scores = _scores(run_dir, sweep.monitor)
    if pruned:
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        result = "pruned"
    elif code or not scores:
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
        result = f"failed, see {show(run_dir.absolute())}.log"
    else:
        best = max(scores) if sweep.mode == "max" else min(scores)
        study.tell(trial, best)
        result = f"{sweep.monitor} {best:.4f}"
    print(
        f"{run_dir.name}: {', '.join(f'{key} {_short(value)}' for key, value in values.items())}: {result}", flush=True
    )


def _train(trial: Any, values: Mapping[str, Any], sweep: Sweep, run_dir: Path) -> tuple[bool, int]:
    """One trial as a process: (whether it was pruned, its exit code)."""
    flags = [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()]
    command = [sys.executable, "train.py", "--config", sweep.config, *flags, "--output_dir", str(run_dir.parent)]
    # --resume auto: what a trial had reached when the sweep was cut off is not trained again.
    command += ["--run_name", run_dir.name, "--resume", "auto"]
    told, pruned = 0, False
    with run_dir.with_suffix(".log").open("ab") as log:
        process = subprocess.Popen(command, cwd=compose.ROOT, stdout=log, stderr=log)
    try:
        while process.poll() is None:
            time.sleep(_POLL_SECS)
            scores = _scores(run_dir, sweep.monitor)
            for step in range(told, len(scores)):
                trial.report(scores[step], step)
            told = len(scores)
            if not pruned and told and trial.should_prune():
                pruned = True
                process.terminate()  # it saves, and could be gone on with by hand
    except BaseException:
        # Ctrl-C reached the trial too, SIGTERM did not: it saves and ends, and the same sweep goes on with it.
        if process.poll() is None:
            process.terminate()
        process.wait()
        raise
    if process.returncode in (129, 130, 143) and not pruned:
        raise Preempted(process.returncode - 128)  # somebody stopped the trial: the sweep stops with it
    return pruned, process.returncode


def _scores(run_dir: Path, monitor: str) -> list[float]:
    """The monitored metric of each validation so far, as metrics.csv has it."""
    try:
        with (run_dir / "metrics.csv").open(newline="", errors="replace") as file:
            return [float(row[monitor]) for row in csv.DictReader(file) if row.get(monitor)]
    except (FileNotFoundError, ValueError):  # not yet, or a row that is being written
        return []


def _suggest(trial: Any, key: str, space: Mapping[str, Any]) -> Any:
    if "choices" in space:
        return trial.suggest_categorical(key, space["choices"])
    low, high, log, step = space["low"], space["high"], bool(space.get("log")), space.get("step")
    if isinstance(low, int) and isinstance(high, int):
        return trial.suggest_int(key, low, high, log=log, step=step or 1)
    return trial.suggest_float(key, low, high, log=log, step=step)


def _grid(sweep: Sweep) -> list[dict[str, Any]]:
    return [dict(zip(sweep.parameters, values, strict=True))
            for values in itertools.product(*(space["choices"] for space in sweep.parameters.values()))]  # fmt: skip


def _refuse_another(study: Any, sweep: Sweep, path: Path, directory: Path) -> None:
    """Trials of another question would be mixed into this one's answer; more trials are the same question."""
    asked = json.dumps({k: v for k, v in vars(sweep).items() if k != "trials"}, sort_keys=True, default=str)
    before = study.user_attrs.get("asked")
    if before not in (None, asked):
        raise RunExistsError(
            f"A sweep of this name was begun with other settings: {directory}. Expected those of {path} to be the same "
            "(only `trials` may change). Give the file another name, or move that directory away."
        )
    study.set_user_attr("asked", asked)


def _tell(study: Any, sweep: Sweep, directory: Path) -> int:
    keys = list(sweep.parameters)
    finished = [trial for trial in study.trials if trial.value is not None and trial.state.name == "COMPLETE"]
    finished.sort(key=lambda trial: trial.value or 0.0, reverse=sweep.mode == "max")
    rest = [trial for trial in study.trials if trial not in finished]
    rows = [
        [f"trial-{trial.number:03d}", *(_short(trial.params.get(key)) for key in keys),
         "" if trial not in finished else f"{trial.value:.4f}", trial.state.name.lower()]
        for trial in [*finished, *rest]
    ]  # fmt: skip
    header = ["trial", *keys, sweep.monitor, "state"]
    with (directory / "trials.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in [header, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    if not finished:
        print(f"No trial came to an end: see the logs in {show(directory.absolute())}.", file=sys.stderr)
        return 1
    _plot(study, keys, sweep.monitor, directory / "trials.png")
    best = finished[0]
    flags = " ".join(f"--{key} {_short(value)}" for key, value in best.params.items())
    print(f"best: trial-{best.number:03d}, {sweep.monitor} {best.value:.4f}: {flags}")
    print(f"plot: {show((directory / 'trials.png').absolute())}")
    return 0


def _plot(study: Any, keys: Sequence[str], monitor: str, path: Path) -> None:
    """One panel a parameter: its value against the result. Trials that were pruned are hollow, at what they had reached."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(keys), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(keys), sharey=True, squeeze=False)[0]
    for panel, key in zip(panels, keys, strict=True):
        for state, face in (("COMPLETE", "#0b6e99"), ("PRUNED", "none")):
            shown = [trial for trial in study.trials if trial.state.name == state and trial.intermediate_values]
            across = [trial.params[key] for trial in shown]
            if not all(isinstance(value, int | float) for value in across):
                across = [str(value) for value in across]
            reached = [
                trial.value if state == "COMPLETE" else list(trial.intermediate_values.values())[-1] for trial in shown
            ]
            panel.scatter(across, reached, s=26, facecolors=face, edgecolors="#0b6e99")
        distribution = next((t.distributions[key] for t in study.trials if key in t.distributions), None)
        panel.set_xscale("log" if getattr(distribution, "log", False) else panel.get_xscale())
        panel.set_xlabel(key)
        panel.grid(alpha=0.25)
    panels[0].set_ylabel(monitor)
    figure.savefig(path, dpi=120)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _optuna() -> Any:
    try:
        import optuna
        from matplotlib import figure  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"A sweep needs a package that is missing: {error.name}. Expected it in this environment. "
            'Install it: pip install -e ".[sweep]"'
        ) from None
    return optuna
