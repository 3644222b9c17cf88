"""What a sweep tries, from its file or from flags, checked before anything runs."""

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from savepoint import words
from savepoint.checkpoint.retention import Mode
from savepoint.config import compose, quick
from savepoint.errors import ConfigError
from savepoint.workspace import project

SHAPES = "{low: 0.001, high: 0.1, log: true}, {low: 1, high: 8, step: 1} or {choices: [64, 128]}"
KINDS = {
    "config": str,
    "parameters": dict,
    "monitor": str,
    "trials": int,
    "prune": bool,
    "seed": int,
    "overrides": dict,
}
WORDS = {"sampler": ("tpe", "random", "grid"), "mode": ("min", "max")}
SPACE = ("choices", "low", "high", "log", "step")


@dataclass
class Sweep:
    """The file of a sweep.

    Attributes:
        config: The config that every trial starts from, relative to the project; from flags several
            or none, as for train.py.
        parameters: Config key -> {low, high, log, step} or {choices}.
        monitor: The metric to improve, by its best value over the validations of a trial. Empty:
            the one that the config ranks checkpoints by, with its mode.
        mode: Whether a smaller or a larger value is better.
        trials: Their number; a grid has its own.
        sampler: tpe learns from earlier trials, random does not, grid takes every combination of
            `choices`.
        prune: Whether to stop a trial that is worse than the median of the earlier ones at the same
            validation.
        seed: Of the sampler.
        overrides: Config key -> value, the same in every trial.
    """

    config: str | Sequence[str]
    parameters: Mapping[str, Mapping[str, Any]]
    monitor: str = ""
    mode: Mode = "max"
    trials: int = 20
    sampler: Literal["tpe", "random", "grid"] = "tpe"
    prune: bool = True
    seed: int = 0
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def grid(self) -> list[dict[str, Any]]:
        values = itertools.product(*(space["choices"] for space in self.parameters.values()))
        return [dict(zip(self.parameters, row, strict=True)) for row in values]

    def ends(self) -> list[dict[str, Any]]:
        """The values at the lower and at the upper end of each space."""
        spaces = {
            key: space.get("choices") or [space.get("low"), space.get("high")]
            for key, space in self.parameters.items()
        }
        return [{key: space[end] for key, space in spaces.items()} for end in (0, -1)]

    def arguments(self, values: Mapping[str, Any]) -> list[str]:
        """The arguments of train.py for a trial."""
        configs = [self.config] if isinstance(self.config, str) else self.config
        arguments = [word for one in configs for word in ("--config", str(project().root / one))]
        both = {**self.overrides, **values}
        # What names a class comes before the values of that class.
        for key, value in sorted(both.items(), key=lambda item: item[0].count(".")):
            text = value if isinstance(value, str) else json.dumps(value)
            arguments.append(f"--{key}={text}")
        return arguments


def read(path: Path) -> Sweep:
    """Raises ConfigError for a mistake in the file or in the config that it names."""
    content = compose.read(path, "sweep file")
    known = [field.name for field in fields(Sweep)]
    if not isinstance(content, dict) or not {"config", "parameters"} <= content.keys():
        raise ConfigError(
            f"Not a sweep: {path}. Expected the keys `config` and `parameters`. See configs/sweep/."
        )
    for name in content:
        if name not in known:
            near = words.nearest(str(name), known) or f" Expected one of {', '.join(known)}."
            raise ConfigError(f"Unknown key in {path}: {name}.{near}")
    sweep = Sweep(**content)
    for name, kind in KINDS.items():
        if not _is(getattr(sweep, name), kind):
            _refuse(path, name, getattr(sweep, name), f"a value of type {kind.__name__}")
    for name, choices in WORDS.items():
        if getattr(sweep, name) not in choices:
            _refuse(path, name, getattr(sweep, name), " or ".join(choices))
    if ("monitor" in content) != ("mode" in content):
        raise ConfigError(
            f"Half of a ranking in {path}: `monitor` and `mode` belong together, as in `monitor: "
            "val/loss` and `mode: min`. Name both, or neither: then those of the config count."
        )
    if sweep.trials < 1:
        _refuse(path, "trials", sweep.trials, "1 or more")
    if not sweep.parameters:
        _refuse(path, "parameters", sweep.parameters, "a config key or more to try values of")
    for key, space in sweep.parameters.items():
        if not _is_space(space) or (sweep.sampler == "grid" and "choices" not in space):
            _refuse(
                path, f"parameters.{key}", space, f"{SHAPES}, low below high; a grid has choices"
            )
    for values in sweep.ends():
        quick.check_keys(compose.compose(sweep.arguments(values)))
    return sweep


def of_flags(flags: Sequence[str]) -> tuple[Sweep, str]:
    """A grid of the flags that have several values, as in `--model.lr 0.01,0.003`, and a name for
    it; the others are the same in every trial.

    Raises:
        ConfigError: none has several, or a flag cannot be read.
    """
    configs, groups, composed = compose.split(flags)
    choices: dict[str, list[Any]] = {}
    for key, text in [*groups, *composed.flags]:
        values = compose.parse_yaml(f"[{text}]", f"--{key} {text}")
        choices[key] = [one for at, one in enumerate(values) if one not in values[:at]]
    several = {key: values for key, values in choices.items() if len(values) > 1}
    if not several:
        raise ConfigError(
            "Nothing to try: no flag has several values. Expected a sweep file, or values with "
            "commas between them: savepoint sweep --model.lr 0.01,0.003"
        )
    sweep = Sweep(
        config=[str(Path(name).absolute()) for name in configs],
        parameters={key: {"choices": values} for key, values in several.items()},
        sampler="grid",
        prune=False,
        overrides={key: values[0] for key, values in choices.items() if len(values) == 1},
    )
    digest = hashlib.sha256(json.dumps(vars(sweep), default=str).encode()).hexdigest()
    words_of = (key.rpartition(".")[2] for key in several)
    return sweep, f"sweep-{'-'.join(words_of)}-{digest[:6]}"


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and (kind is not int or not isinstance(value, bool))


def _is_space(space: Any) -> bool:
    if not isinstance(space, dict) or not space.keys() <= set(SPACE):
        return False
    if "choices" in space:
        return isinstance(space["choices"], list) and bool(space["choices"]) and len(space) == 1
    low, high, log, step = (space.get(name) for name in ("low", "high", "log", "step"))
    if any(not _is(end, int) and not isinstance(end, float) for end in (low, high)):
        return False
    if not low < high:  # type: ignore[operator]
        return False
    if log is not None and not isinstance(log, bool):
        return False
    if step is not None:  # Optuna takes no steps on a logarithmic scale
        return not log and (_is(step, int) or isinstance(step, float)) and step > 0
    return not log or low > 0  # type: ignore[operator]


def _refuse(path: Path, name: str, value: Any, expected: str) -> None:
    raise ConfigError(f"Wrong value in {path}: {name} is {value}. Expected {expected}.")
