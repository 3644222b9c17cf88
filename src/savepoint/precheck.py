"""What can be told before `import lightning`, which takes three to four seconds: `--help`, files, keys, flags."""

from __future__ import annotations

import ast
import importlib.util
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import yaml

from savepoint import compose, files, words
from savepoint.errors import ConfigError
from savepoint.job import rank, requeued
from savepoint.run import Run, check_name, is_empty

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
    if base is None:
        _check_name(composed)


def _check_name(composed: compose.Composed) -> None:
    """A run that is there already, or trains at this moment."""
    said = composed.config | {key: yaml.safe_load(value) for key, value in composed.flags if key in compose.SCALARS}
    if rank() or not isinstance(name := said.get("run_name"), str) or composed.wants_config or composed.class_help:
        return
    check_name(name)
    directory = Path(str(said.get("output_dir") or "outputs")) / name
    if (
        os.path.lexists(directory)
        and not is_empty(directory)
        and (said.get("resume") or "never") == "never"
        and not requeued()
    ):
        raise Run(directory).taken(directory)
    Run(directory).refuse_if_held()


def check_keys(composed: compose.Composed) -> None:
    """Unknown keys of the top level, of `trainer` and of `checkpoint`; a model and data that nobody chose."""
    for key in composed.config:
        if key not in compose.KEYS:
            near = words.nearest(str(key), compose.KEYS) or f" Expected one of {', '.join(compose.KEYS)}."
            raise ConfigError(f"Unknown key in {composed.origin(str(key))}: {key}.{near}")
    for group in compose.MERGED:
        for name in composed.config.get(group, {}):
            if not _is_member(group, name):
                near = words.nearest(str(name), members(group) or (), prefix=f"{group}.")
                hint = near or f" See --{group}.help for its keys."
                raise ConfigError(f"Unknown key in {composed.origin(f'{group}.{name}')}: {group}.{name}.{hint}")
    for key, _ in composed.flags:
        _check_flag(key)
    for group in compose.REPLACED:
        _check_arguments(composed, group)
    if composed.class_help is None:
        _check_chosen(composed)
    _check_saving(composed)


def _check_saving(composed: compose.Composed) -> None:
    """A place that nothing can be saved to; a training that is not to be saved at all."""
    said = dict(compose.leaves(composed.config)) | dict(composed.flags)
    for key in ("output_dir", "trainer.default_root_dir"):
        files.refuse_url(str(said.get(key)), key)
    if str(said.get("trainer.enable_checkpointing")).lower() == "false":
        raise ConfigError(
            "Saving cannot be off: trainer.enable_checkpointing is false. A run that can be resumed was expected. "
            "To save less: --checkpoint.save_every_epochs N; --trainer.fast_dev_run true saves nothing."
        )


def _check_arguments(composed: compose.Composed, group: str) -> None:
    """Of a class of this project; what other classes take is for cli.py to tell."""
    chosen = composed.config.get(group)
    if not isinstance(chosen, dict) or (known := _own_arguments(chosen.get("class_path"))) is None:
        return
    flags = (key.rstrip("+").split(".") for key, _ in composed.flags)
    for name in [*(chosen.get("init_args") or {}), *(parts[1] for parts in flags if parts[0] == group and parts[1:])]:
        if name not in known and name not in compose.CLASS_KEYS:
            hint = f" It takes {', '.join(sorted(known)) or 'no arguments'}."
            near = words.nearest(str(name), known, prefix=f"{group}.") or hint
            raise ConfigError(f"Unknown key: {composed.place(f'{group}.{name}')}.{near}")


def _check_flag(key: str) -> None:
    group, *rest = key.rstrip("+").split(".")
    if group in compose.MERGED and rest and _is_member(group, rest[0]):
        return
    if (group in compose.REPLACED and rest) or (group in compose.SCALARS and not rest):
        return
    if group in compose.MERGED and rest:
        near = words.nearest(rest[0], members(group) or (), prefix=f"--{group}.")
        raise ConfigError(f"Unknown flag: --{key}.{near or f' See --{group}.help.'}")
    known = [*compose.SCALARS, "config", "print_config", "help", *(".".join([name, *rest]) for name in compose.GROUPS)]
    near = words.nearest(key, known, prefix="--")
    raise ConfigError(f"Unknown flag: --{key}.{near or _by_last_name(key)}")


def _by_last_name(key: str) -> str:
    """Many write --epochs for --trainer.max_epochs, or --lr for --model.lr."""
    known = [f"{group}.{name}" for group in compose.MERGED for name in sorted(members(group) or ())]
    known += [f"{group}.{name}" for group, names in _own_names().items() for name in names]
    for ending in (f".{key}", f".max_{key}", f"_{key}"):
        if found := [name for name in known if name.endswith(ending)][:3]:
            return f" Did you mean {' or '.join(f'--{name}' for name in found)}?"
    return " See --help."


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


def _own_arguments(class_path: object) -> frozenset[str] | None:
    """What a class of this project takes; None where its source does not say it for certain."""
    package, _, name = str(class_path).rpartition(".")
    folders = [compose.ROOT / "src" / package.split(".")[0]] if package else sorted((compose.ROOT / "src").iterdir())
    sources = [source for folder in folders if folder.name != "savepoint" for source in sorted(folder.glob("*.py"))]
    found = [names for source in sources if (names := _parameters(source, name)) is not None]
    return found[0] if len(found) == 1 else None


def _own_names() -> dict[str, list[str]]:
    """What the classes of the default config take, by group."""
    default = compose.compose([]).config
    return {group: sorted(_own_arguments(default[group]["class_path"]) or ()) for group in compose.REPLACED}


def _parameters(source: Path, class_name: str) -> frozenset[str] | None:
    """The names of the `__init__` arguments of a class, without importing it; None where it has none of its own."""
    try:
        tree = ast.parse(source.read_text(encoding="utf-8"))
    except (OSError, SyntaxError):
        return None
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            inits = [n.args for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
            if len(inits) == 1 and not inits[0].kwarg:
                return frozenset(a.arg for a in inits[0].args + inits[0].kwonlyargs) - {"self"}
    return None
