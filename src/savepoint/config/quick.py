"""The checks and answers that need no `import lightning`, which takes three to four seconds:
`--help`, files, keys, run names, places to save to.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import yaml

from savepoint import files, words
from savepoint.checkpoint import manifest
from savepoint.config import compose
from savepoint.errors import CheckpointForeignError, ConfigError
from savepoint.federated import federation
from savepoint.job import rank, requeued
from savepoint.mirror.remote import require
from savepoint.run import Run, check_name, is_empty

_OF_TRAINER = ("callbacks", "logger", "plugins", "profiler", "strategy")

USAGE = """\
usage: python train.py [--config FILE]... [--KEY VALUE]...

  python train.py                                             the default config
  python train.py --config configs/fast.yaml --run_name first
  python train.py --model.lr 0.01 --trainer.max_epochs 3      single values, over all files
  python train.py --model configs/model/classic.yaml          a group by file: replaced whole
  python train.py --model.net ClassicNet                      a class by name
  python train.py --config configs/fast.yaml --config configs/debug/one_batch.yaml

keys: seed_everything, output_dir, run_name, init_from, init_strict, threads,
      resume (never, auto, must), model.*, data.*, trainer.* (Lightning's Trainer),
      checkpoint.* (when to save, which to keep), federated.* (with Flower, by many clients)

  --print_config                 every key with the value it has now
  --model.help CLASS             what a class takes; likewise --data.help, --trainer.logger.help ...

order: files, then groups, then single values, wherever they stand in the command; a later one wins.
"""


def check(argv: Sequence[str], *, base: str | None = None, usage: str = USAGE) -> compose.Composed:
    """Composes and checks the command line; answers `--help` (SystemExit 0).

    Raises:
        ConfigError: a mistake in `argv` or in a file that it names.
    """
    composed = compose.compose(argv, base=base)
    if composed.wants_help:
        print(usage, end="")
        raise SystemExit(0)
    check_keys(composed)
    if federation.is_wanted(composed.config, composed.flags) and not composed.wants_config:
        federation.require_flower(_federated(composed, "runtime"))
    if base is None:
        _check_start(composed)
    return composed


def _federated(composed: compose.Composed, key: str) -> str:
    """The value of a key of `federated`, by a flag or a file; "" for the default."""
    group = composed.config.get("federated") or {}
    return str(dict(composed.flags).get(f"federated.{key}") or group.get(key) or "")


def check_keys(composed: compose.Composed) -> None:
    """Raises ConfigError for unknown keys of the top level, a model or data without a class, and a
    place that nothing can be saved to.
    """
    for key in composed.config:
        if key not in compose.KEYS:
            known = f" It is none of {', '.join(compose.KEYS)}."
            near = words.nearest(str(key), compose.KEYS) or known
            raise ConfigError(f"Unknown key in {composed.origin(str(key))}: {key}.{near}")
    for key, _ in composed.flags:
        _check_flag(key)
    if composed.class_help is None:
        _check_chosen(composed)
    _check_saving(composed)


def _check_flag(key: str) -> None:
    group, *rest = key.rstrip("+").split(".")
    if (group in compose.GROUPS and rest) or (group in compose.SCALARS and not rest) or not rest:
        return  # `typed` checks a single word: it may be short for a key of a class
    known = [*compose.SCALARS, *(".".join([name, *rest]) for name in compose.GROUPS)]
    near = words.nearest(key, known, prefix="--") or " See --help."
    if group in _OF_TRAINER:  # which has no class before one is chosen
        near = f" Did you mean --trainer.{key}, beside --trainer.{group} CLASS?"
    raise ConfigError(f"Unknown flag: --{key}.{near}")


def _check_start(composed: compose.Composed) -> None:
    """Refuses the name of a run that exists already, or that trains at this moment, and weights
    that are none.
    """
    flags = [(key, value) for key, value in composed.flags if key in compose.SCALARS]
    values = composed.config | {key: yaml.safe_load(value) for key, value in flags}
    starts_training = not composed.wants_config and not composed.class_help
    if rank() or not starts_training:
        return
    is_new = (values.get("resume") or "never") == "never" and not requeued()
    name = values.get("run_name")
    if isinstance(name, str):
        _check_name(name, Path(str(values.get("output_dir") or "outputs")), is_new=is_new)
    if is_new and isinstance(weights := values.get("init_from"), str):
        _check_weights(weights)


def _check_name(name: str, output_dir: Path, *, is_new: bool) -> None:
    check_name(name)
    directory = output_dir / name
    if is_new and os.path.lexists(directory) and not is_empty(directory):
        raise Run(directory).taken(directory)
    Run(directory).refuse_if_held()


def _check_weights(path: str) -> None:
    """Looks at the end of the file alone."""
    try:
        manifest.read(path)
    except CheckpointForeignError as error:
        if not error.has_weights:
            raise


def _check_saving(composed: compose.Composed) -> None:
    """Refuses a URL as a place to save to, and a training without checkpoints."""
    values = dict(compose.leaves(composed.config)) | dict(composed.flags)
    for key in ("output_dir", "trainer.default_root_dir"):
        files.refuse_url(str(values.get(key)), key)
    if (mirror := values.get("checkpoint.mirror")) not in (None, "null", ""):
        require(str(mirror))
    if str(values.get("trainer.enable_checkpointing")).lower() == "false":
        raise ConfigError(
            "Saving cannot be off: trainer.enable_checkpointing is false. A run without a "
            "checkpoint cannot be resumed. To save less: --checkpoint.save_every_epochs N; "
            "--trainer.fast_dev_run true saves nothing."
        )


def _check_chosen(composed: compose.Composed) -> None:
    for group in compose.REPLACED:
        if not isinstance(composed.config.get(group), dict):
            origins = sorted(set(composed.origins.values()))
            files = [origin for origin in origins if not origin.startswith("--")]
            raise ConfigError(
                f"No class chosen for `{group}`: {', '.join(files) or 'no file'} names none. A run "
                f"needs one. Give `{group}:` in a config file, or --{group} FILE_OR_CLASS."
            )
