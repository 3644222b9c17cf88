"""A run's configuration as plain data: files, groups and flags laid over each other, before the
slow imports.

From weakest to strongest, in any order on the command line:

    the base            a checkpoint's config; else the project's default where no --config file
                        chooses a model or data
    --config FILE       any number of them, the later over the earlier
    --model, --data, --checkpoint, --trainer, --federated
                        a group: a file, a class name, or YAML text
    --model.lr 0.01     a single value; two of the same key: the later

Replace, never mix: a later `model` or `data` replaces the earlier one whole, so no value of one
class survives in another. `trainer`, `checkpoint` and `federated` belong to one class each and are
merged key by key; a value in them is replaced whole, unless a file writes the key with a plus, as
in `callbacks+`: then it is added to the list. A flag that names a class drops the values that the
files gave to the class before it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from savepoint.errors import ConfigError
from savepoint.words import nearest
from savepoint.workspace import project

REPLACED = ("model", "data")
MERGED = ("trainer", "checkpoint", "federated")
GROUPS = REPLACED + MERGED
SCALARS = (
    "seed_everything",
    "output_dir",
    "run_name",
    "init_from",
    "init_strict",
    "resume",
    "threads",
)
KEYS = SCALARS + GROUPS
CLASS_KEYS = {"class_path", "init_args", "dict_kwargs"}


@dataclass
class Composed:
    """The content of the files, the flags on top of it, and the origin of each key."""

    config: dict[str, Any] = field(default_factory=dict)
    flags: list[tuple[str, str]] = field(default_factory=list)
    origins: dict[str, str] = field(default_factory=dict)
    wants_help: bool = False
    wants_config: bool = False
    class_help: str | None = None
    name: str = ""  # of the last config file

    def origin(self, key: str) -> str:
        """The file or flag that gives the value of `key`."""
        if any(name.rstrip("+") == key for name, _ in self.flags):
            return f"--{key}"
        parts = key.split(".")
        prefixes = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
        return next((self.origins[p] for p in prefixes if p in self.origins), f"--{key}")

    def place(self, key: str) -> str:
        """`key` with its origin, for a message."""
        origin = self.origin(key)
        return origin if origin == f"--{key}" else f"{key} ({origin})"


def compose(argv: Sequence[str], *, base: str | None = None) -> Composed:
    """Lay out `argv` over `base`, the YAML text of a checkpoint's config.

    Raises:
        ConfigError: a file that is missing or malformed, or a command line that cannot be read.
    """
    configs, groups, composed = split(argv)
    if composed.wants_help:
        return composed
    files = [(_read_config(Path(name)), Path(name)) for name in configs]
    composed.name = config_name(argv, project().default_config)
    if base is not None:
        source = "the checkpoint's config"
        _lay(composed, parse_yaml(base, source), Path(), source)
    elif not any(key in config for config, _ in files for key in REPLACED):
        default = _default()
        files.insert(0, (_read_config(default), default))
    for config, path in files:
        _lay(composed, config, path.parent, _shown(path))
    for key, value in groups:
        _lay(composed, {key: _text(value)}, Path(), f"--{key}")
    for key, _ in composed.flags:
        _drop(composed.config, key)
    return composed


def _default() -> Path:
    """The config of a run that names none."""
    path = project().root / project().default_config
    if not path.is_file():
        raise ConfigError(
            f"No default config: {path}. The last line of train.py names it, for calls without a "
            f"whole config. Name another one there, or one here: --config FILE. "
            f"{_files_in(_where(path))}"
        )
    return path


def read(path: Path, what: str = "config file") -> Any:
    """The content of a YAML file; ConfigError with line and column where it is malformed."""
    if os.path.isdir(path):
        raise ConfigError(f"Not a {what} but a folder: {path}. {_files_in(path)}")
    if not os.path.exists(path):  # as pathlib, but False for a name that is too long
        raise ConfigError(
            f"No such {what}: {str(path)[:200]}. {_files_in(_where(path), near=path.name)}"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"A {what} that cannot be read: {path} ({error}). A config is YAML text in UTF-8. "
            "Mend the file, or name another one."
        ) from error
    return parse_yaml(text, _shown(path))


def flatten(text: str) -> dict[str, Any]:
    """The values of a dumped config under the names of their flags: "model" (the class),
    "model.lr", "model.net". A list is one value.
    """
    return dict(leaves(parse_yaml(text, "the config")))


def same(one: Any, other: Any) -> bool:
    """Whether two values of configs are equal, with a NaN equal to a NaN at any depth."""
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return False
        return all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other or (one != one and other != other))  # only a NaN is not itself


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict) or not value:
        yield key, value
        return
    if "class_path" in value:
        yield key, value["class_path"]
        value = {**(value.get("init_args") or {}), **(value.get("dict_kwargs") or {})}
    for name, inner in value.items():
        yield from leaves(inner, f"{key}.{name}" if key else str(name))


def config_name(argv: Sequence[str], default: str | Path) -> str:
    """The name of the last `--config` file, the default one's where none is given."""
    names = [after for before, after in pairwise(argv) if before in ("-c", "--config")]
    names += [flag.removeprefix("--config=") for flag in argv if flag.startswith("--config=")]
    return Path(names[-1] if names else default).stem


# --- the command line ---


def split(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, str]], Composed]:
    """The config files, the groups, and all else with its flags."""
    configs: list[str] = []
    groups: list[tuple[str, str]] = []
    composed = Composed()
    tokens = iter(argv)
    for token in tokens:
        if token in ("-h", "--help"):
            composed.wants_help = True
        elif token == "--print_config":
            composed.wants_config = True
        elif token.split("=")[0].endswith(".help"):
            composed.class_help = _class_help(token, tokens)
        else:
            key, value = _flag(token, tokens)
            if key == "config":
                configs.append(value)
            elif key in GROUPS:
                groups.append((key, value))
            else:
                _add_flag(composed.flags, key, value)
    return configs, groups, composed


def _flag(token: str, tokens: Iterator[str]) -> tuple[str, str]:
    if not token.startswith("--") and not token.startswith("-c"):
        hint = f" Did you mean --config {token}?" if token.endswith((".yaml", ".yml")) else ""
        raise ConfigError(
            f"Unexpected word on the command line: {token}. Expected --KEY VALUE.{hint}"
        )
    name, equals, value = token.partition("=")
    if not equals:
        value = next(tokens, "--")
        if value.startswith("--"):
            example = "configs/fast.yaml" if name in ("--config", "-c") else "VALUE"
            raise ConfigError(f"A flag without its value: {name}. Expected {name} {example}.")
    key = "config" if name == "-c" else name.removeprefix("--").replace("init_args.", "")
    if not re.fullmatch(r"\w+(\.\w+)*\+?", key):
        raise ConfigError(
            f"Unknown flag: {name}. Expected --KEY VALUE, such as --trainer.max_epochs 3."
        )
    return key, value


def _class_help(token: str, tokens: Iterator[str]) -> str:
    name, equals, value = token.partition("=")
    value = value if equals else next(tokens, "")
    return f"{name}={value}" if value else name


def _add_flag(flags: list[tuple[str, str]], key: str, value: str) -> None:
    if not key.endswith("+"):
        inner = next((k for k, _ in flags if k.startswith(key + ".")), None)
        if inner is not None:
            raise ConfigError(
                f"--{key} would undo what stands before it: --{inner}. A flag that names a class "
                f"resets its values. Put --{key} first."
            )
        flags[:] = [flag for flag in flags if flag[0] != key]
    flags.append((key, value))


def _text(value: str) -> Any:
    """The data in YAML text of a mapping, or in `null`; any other text is a name."""
    if value == "null":
        return None
    return parse_yaml(value, "the command line") if value.lstrip().startswith("{") else value


# --- layers ---


def _lay(composed: Composed, layer: Any, folder: Path, source: str) -> None:
    """Puts one layer over the others; paths of group files in it are relative to `folder`."""
    for key, value in layer.items():
        if key not in GROUPS:
            composed.config[key] = value
            composed.origins[key] = source
        elif key in REPLACED:
            composed.config[key], composed.origins[key] = _class_group(key, value, folder, source)
        else:
            group, origin = _merged_group(key, value, folder, source)
            there = composed.config.setdefault(key, {})
            for name in [name for name in group if str(name).endswith("+")]:
                group[name[:-1]] = [*_as_list(there.get(name[:-1])), *_as_list(group.pop(name))]
            there.update(group)
            composed.origins.setdefault(key, origin)
            composed.origins.update({f"{key}.{name}": origin for name in group})


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


def _class_group(key: str, value: Any, folder: Path, source: str) -> tuple[Any, str]:
    if isinstance(value, str) and not _is_file(value):
        return {"class_path": value}, source
    group, origin = _from_file(key, value, folder, source)
    if group is None:
        return None, origin
    unknown = [name for name in group if name not in CLASS_KEYS]
    if key in unknown or {"trainer", "config"} & set(unknown):
        raise ConfigError(
            f"A whole configuration where a group was expected: {origin}, given as `{key}`. "
            "A group holds `class_path` and `init_args`. Give it with --config."
        )
    if unknown:
        near = nearest(unknown[0], CLASS_KEYS) or f" Did you mean init_args.{unknown[0]}?"
        raise ConfigError(
            f"Unknown key in `{key}`: {unknown[0]} ({origin}). Expected `class_path` and "
            f"`init_args`.{near}"
        )
    if not isinstance(group.get("class_path"), str):
        raise ConfigError(
            f"No class chosen by `{key}`: {origin}. A group replaces the one before it whole, so "
            "`class_path` was expected beside `init_args`. To change single values write "
            f"--{key}.NAME VALUE on the command line."
        )
    return group, origin


def _merged_group(key: str, value: Any, folder: Path, source: str) -> tuple[dict[str, Any], str]:
    if isinstance(value, str) and not _is_file(value):
        raise ConfigError(
            f"Not a group file: {value} (`{key}`, {source}). {_files_in(project().configs / key)}"
        )
    group, origin = _from_file(key, value, folder, source)
    if group is None:
        raise ConfigError(
            f"Nothing in `{key}`: {origin}. A group holds keys, each with a value. Leave `{key}` "
            "out."
        )
    if key in group:
        raise ConfigError(
            f"A whole configuration where a group was expected: {origin}, given as `{key}`. Give "
            "it with --config."
        )
    return group, origin


def _from_file(
    key: str, value: Any, folder: Path, source: str
) -> tuple[dict[str, Any] | None, str]:
    if isinstance(value, str):
        path = folder / value
        value = read(path, f"{key} group file")
        source = _shown(path)
    if value is not None and not isinstance(value, dict):
        raise ConfigError(
            f"Not a group: `{key}` is {value!r} ({source}). Expected keys with values, or the name "
            "of a file."
        )
    return value, source


def _is_file(value: str) -> bool:
    return value.endswith((".yaml", ".yml", ".json")) or "/" in value


def _drop(config: dict[str, Any], key: str) -> None:
    """Drops the class at `key` and its values from the files' config: a flag names another one."""
    *path, last = key.split(".")
    node: Any = config
    for name in path:
        node = _inside(node).get(name) if isinstance(node, dict) else None
    if isinstance(node, dict) and isinstance(_inside(node).get(last), dict):
        del _inside(node)[last]


def _inside(node: dict[str, Any]) -> dict[str, Any]:
    inner = node.get("init_args") if "class_path" in node else node
    return inner if isinstance(inner, dict) else {}


# --- files ---


def _read_config(path: Path) -> dict[str, Any]:
    config = read(path)
    if not isinstance(config, dict) or not config:
        what = "A config file that is no mapping of keys to values"
        if config in (None, {}):
            what = "Empty config file"
        raise ConfigError(
            f"{what}: {_shown(path)}. Expected keys such as `model`, `data`, `trainer`."
        )
    if "class_path" in config:
        group = path.parent.name if path.parent.name in REPLACED else "model"
        raise ConfigError(
            f"A group file where a config was expected: {_shown(path)}. Give it with --{group}."
        )
    return config


def _shown(path: Path) -> str:
    """The path, relative to the project for a file in it."""
    full = path.resolve()
    root = project().root
    is_inside = path.is_absolute() and full.is_relative_to(root)
    return str(full.relative_to(root)) if is_inside else str(path)


def _where(path: Path) -> Path:
    """The folder to suggest files of: configs/ for a bare name where no YAML file is beside it."""
    here = [other for other in Path().glob("*.y*ml") if not other.name.startswith(".")]
    is_bare = str(path.parent) == "." and not here
    return project().configs if is_bare else path.parent


def _files_in(folder: Path, near: str = "") -> str:
    if not folder.is_dir():
        if near:
            return f"The folder {folder.absolute()} does not exist either."
        return f"There is no folder {folder}."
    names = sorted(p.name for p in folder.glob("*.y*ml"))
    if not names:
        return f"The folder {folder} holds no YAML file."
    return f"{_shown(folder)} has: {', '.join(names)}.{nearest(near, names)}"


class _Loader(yaml.SafeLoader):
    """YAML as jsonargparse reads it: 1e-3 is a number, a date is text. A double key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str | int) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} twice", key_node.start_mark
                )
            if isinstance(key, str | int):
                seen.add(key)
        return super().construct_mapping(node, deep=deep)


_Loader.yaml_implicit_resolvers = {}
for _first, _resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items():
    _Loader.yaml_implicit_resolvers[_first] = [
        (tag, regexp) for tag, regexp in _resolvers if not tag.endswith((":timestamp", ":float"))
    ]
_FLOAT = r"""^(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
    |[-+]?\.[0-9_]+(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"""
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(_FLOAT, re.X), list("-+0123456789.")
)


class _Dumper(yaml.SafeDumper):
    """Quotes what the loader would take for a number."""


_Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def to_yaml(data: Any) -> str:
    """Text that `parse_yaml` reads back to the same data, keys in their order."""
    # Escaped: PyYAML writes some characters (U+0085) plain and reads them back as others.
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=False, width=120)


def parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(
            f"Malformed YAML: {source}{where} ({error.problem}). Expected `key: value` lines. Mend "
            "that line."
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(
            f"Malformed YAML: {source} ({error}). Expected `key: value` lines."
        ) from error
