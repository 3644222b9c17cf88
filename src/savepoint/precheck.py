"""What can be told before `import lightning`, which takes three to four seconds: `--help`, files, keys, flags."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from savepoint import compose
from savepoint.errors import ConfigError

USAGE = """\
usage: python train.py [--config FILE]... [--KEY VALUE]...

  python train.py                                             configs/mnist.yaml
  python train.py --config configs/fast.yaml --run_name first
  python train.py --model.lr 0.01 --trainer.max_epochs 3      single values, over all files
  python train.py --model configs/model/classic.yaml          a group by file: replaced whole
  python train.py --model.net ClassicNet                      a class by name
  python train.py --config configs/fast.yaml --config configs/debug/one_batch.yaml

keys: seed_everything, output_dir, run_name, init_from, init_strict, resume (never, auto, must),
      model.*, data.*, trainer.* (Lightning's Trainer), checkpoint.* (when to save, which to keep)

  --print_config                 every key with the value it has now
  --model.help ImageClassifier   what a class takes; likewise --data.help, --trainer.logger.help ...

order: files, then groups, then single values, wherever they stand in the command; a later one wins.
"""


def check(argv: Sequence[str], *, base: str | None = None, usage: str = USAGE) -> None:
    """Raise ConfigError for what is wrong with `argv` and the files it names; answer `--help` (SystemExit 0)."""
    composed = compose.compose(argv, base=base)
    if composed.wants_help:
        print(usage, end="")
        raise SystemExit(0)
    check_keys(composed)


def check_keys(composed: compose.Composed) -> None:
    """Unknown keys of the top level, of `trainer` and of `checkpoint`; a model and data that nobody chose."""
    for key in composed.config:
        if key not in compose.KEYS:
            near = compose.nearest(str(key), compose.KEYS) or f" Expected one of {', '.join(compose.KEYS)}."
            raise ConfigError(f"Unknown key in {composed.origin(str(key))}: {key}.{near}")
    for group in compose.MERGED:
        for name in composed.config.get(group, {}):
            if not _is_member(group, name):
                near = compose.nearest(str(name), members(group) or (), prefix=f"{group}.")
                hint = near or f" See --{group}.help for its keys."
                raise ConfigError(f"Unknown key in {composed.origin(f'{group}.{name}')}: {group}.{name}.{hint}")
    for key, _ in composed.flags:
        _check_flag(key)
    if composed.class_help is None:
        _check_chosen(composed)


def _check_flag(key: str) -> None:
    group, *rest = key.rstrip("+").split(".")
    if group in compose.MERGED and rest and _is_member(group, rest[0]):
        return
    if (group in compose.REPLACED and rest) or (group in compose.SCALARS and not rest):
        return
    if group in compose.MERGED and rest:
        near = compose.nearest(rest[0], members(group) or (), prefix=f"--{group}.")
        raise ConfigError(f"Unknown flag: --{key}.{near or f' See --{group}.help.'}")
    near = compose.nearest(key, [*compose.KEYS, "config", "print_config", "help"], prefix="--")
    raise ConfigError(f"Unknown flag: --{key}.{near or ' See --help.'}")


def _is_member(group: str, name: str) -> bool:
    known = members(group)
    return known is None or name in known


def _check_chosen(composed: compose.Composed) -> None:
    for group in compose.REPLACED:
        if not isinstance(composed.config.get(group), dict):
            files = sorted({origin for origin in composed.origins.values() if not origin.startswith("--")})
            raise ConfigError(
                f"No class chosen for `{group}`: {', '.join(files) or 'no file'} names none. "
                f"Expected `{group}:` in a config file, or --{group} FILE_OR_CLASS."
            )


@cache
def members(group: str) -> frozenset[str] | None:
    """The keys of `trainer` or `checkpoint`, read from the source; None where that fails, and cli.py will tell."""
    if group == "checkpoint":
        return _parameters(Path(__file__).parent / "checkpoint" / "callback.py", "CheckpointCallback")
    lightning = importlib.util.find_spec("lightning")
    if lightning is None or lightning.origin is None:
        return None
    return _parameters(Path(lightning.origin).parent / "pytorch" / "trainer" / "trainer.py", "Trainer")


def _parameters(source: Path, class_name: str) -> frozenset[str] | None:
    """The names of the `__init__` arguments of a class, without importing it."""
    try:
        tree = ast.parse(source.read_text(encoding="utf-8"))
    except (OSError, SyntaxError):
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            inits = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
            return frozenset(a.arg for n in inits for a in n.args.args + n.args.kwonlyargs) - {"self"}
    return None
