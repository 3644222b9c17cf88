"""Typed configuration from `__init__` signatures: the one file that knows jsonargparse and
LightningCLI.

`compose` lays files, groups and flags over each other as plain data; here that data meets the types
of the classes.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import re
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_type_hints

import docstring_parser
import yaml
from jsonargparse import ArgumentParser, Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import (
    Callback,
    LightningDataModule,
    LightningModule,
    Trainer,
    seed_everything,
)
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from torch import nn

from savepoint import words
from savepoint.checkpoint.callback import CheckpointCallback
from savepoint.config import compose, quick
from savepoint.errors import ConfigError, SavepointError
from savepoint.workspace import project

# jsonargparse writes defaults with yaml, and fails at an Enum: Lightning's Timer has one as the
# default of a text argument.
yaml.SafeDumper.add_multi_representer(
    Enum, lambda dumper, member: dumper.represent_data(member.value)
)

_LIBRARIES = ("torch", "torchvision", "torchmetrics", "lightning", "jsonargparse", "savepoint")


def parse(argv: Sequence[str], *, base: str | None = None) -> Namespace:
    """The resolved configuration. `base` is a checkpoint's config: files and flags of `argv` go on
    top of it.

    `--help`, `--print_config` and `--KEY.help` print and leave (SystemExit 0).

    Raises:
        ConfigError: one to five lines that name the file or the key.
    """
    composed = compose.compose(argv, base=base)
    if composed.wants_help:
        print(quick.USAGE, end="")
        raise SystemExit(0)
    quick.check_keys(composed)
    return resolve(composed)


def resolve(composed: compose.Composed) -> Namespace:
    """The configuration of a composed and checked command line, with the types of the classes.
    Raises and prints as `parse` does.
    """
    if composed.class_help is not None:
        _print_class_help(composed.class_help, composed)
        raise SystemExit(0)
    check_keys(composed)
    with _quiet():
        parser = _parser()
        layers = ["--config", compose.to_yaml(composed.config)]
        try:
            config = parser.parse_args(
                layers + [f"--{key}={value}" for key, value in composed.flags]
            )
        except _ParseError as error:
            raise ConfigError(_explain(str(error), composed)) from None
    _refuse_nulls(config, composed)
    if composed.wants_config:
        print(dump(config), end="")
        raise SystemExit(0)
    return config


def check_keys(composed: compose.Composed) -> None:
    """Raises ConfigError for unknown keys of `trainer` and `checkpoint`, and for flags that name
    nothing.
    """
    for group in compose.MERGED:
        for name in composed.config.get(group, {}):
            if name not in _members(group):
                near = words.nearest(str(name), _members(group), prefix=f"{group}.")
                hint = near or f" See --{group}.help for its keys."
                raise ConfigError(
                    f"Unknown key in {composed.origin(f'{group}.{name}')}: {group}.{name}.{hint}"
                )
    for key, _ in composed.flags:
        group, *rest = key.rstrip("+").split(".")
        if group in compose.MERGED and rest and rest[0] not in _members(group):
            near = words.nearest(rest[0], _members(group), prefix=f"--{group}.")
            raise ConfigError(f"Unknown flag: --{key}.{near or f' See --{group}.help.'}")
        if not rest and group not in compose.SCALARS:
            known = [*compose.SCALARS, "config", "print_config", "help", *compose.GROUPS]
            near = words.nearest(key, known, prefix="--") or _by_last_name(key, composed)
            raise ConfigError(f"Unknown flag: --{key}.{near}")


def _by_last_name(key: str, composed: compose.Composed) -> str:
    """Many write --epochs for --trainer.max_epochs, or --lr for --model.lr."""
    known = [f"{group}.{name}" for group in compose.MERGED for name in sorted(_members(group))]
    known += [
        f"{group}.{name}"
        for group in compose.REPLACED
        for name in _arguments(_class_at(group, composed))
    ]
    for ending in (f".{key}", f".max_{key}", f"_{key}"):
        matches = [name for name in known if name.endswith(ending)][:3]
        if matches:
            return f" Did you mean {' or '.join(f'--{name}' for name in matches)}?"
    return " See --help."


@functools.cache
def _members(group: str) -> frozenset[str]:
    return frozenset(inspect.signature(_FIXED[group]).parameters)


def dump(config: Namespace) -> str:
    """The whole configuration as YAML text, of which parse([], base=text) gives the same
    configuration.
    """
    with _quiet():
        # A key that is null must be written: it may stand against a default that is not.
        written = json.loads(
            _parser().dump(config, format="json", skip_unset=False, skip_validation=True)
        )
    return compose.to_yaml({key: _exact(config[key], written[key]) for key in compose.KEYS})


def _exact(value: Any, written: Any) -> Any:
    """`written` with every plain value restored: jsonargparse writes "1e-3" as a number."""
    if isinstance(written, dict) and isinstance(value, Namespace | dict):
        return {key: _exact(value[key], inner) for key, inner in written.items()}
    if isinstance(written, list) and isinstance(value, list | tuple):
        return [_exact(*pair) for pair in zip(value, written, strict=True)]
    is_plain = isinstance(value, str | int | float) and not isinstance(value, Enum)
    return value if is_plain else written


def instantiate(
    config: Namespace,
    *,
    callbacks: Iterable[Callback] = (),
    logger: Any = ...,
    plugins: Iterable[Any] = (),
    **trainer_overrides: Any,
) -> tuple[LightningModule, LightningDataModule, Trainer]:
    """Seed everything, then build model, data and trainer.

    `callbacks`, `plugins` and `logger` come after the configured ones; any other Trainer argument,
    such as `default_root_dir`, replaces the configured value.

    Raises:
        ConfigError: a Trainer argument has the right type and a value that Lightning refuses.
    """
    if logger is not ...:
        trainer_overrides["logger"] = logger
    with _quiet():
        cli = _Cli(
            config, callbacks=callbacks, plugins=plugins, trainer_overrides=trainer_overrides
        )
    return cli.model, cli.datamodule, cli.trainer


class _Scalars:
    """The keys of a config that belong to no group.

    Args:
        seed_everything: Of every random number of the run.
        output_dir: The folder that run directories go to.
        run_name: Default: <config>-<date>-<time>.
        init_from: A checkpoint whose weights to start from.
        init_strict: Whether these must fit the model exactly.
        resume: What a run directory that exists means: an error, a run to continue, or the only
            thing accepted. Null: auto in a job that SLURM requeued, else never.
        threads: That PyTorch computes with. Null: its own choice, at most the cores that this
            process may use; on a resume the checkpoint's, where there are so many.
    """

    def __init__(
        self,
        seed_everything: int = 0,
        output_dir: str = "outputs",
        run_name: str | None = None,
        init_from: str | None = None,
        init_strict: bool = True,
        resume: Literal["never", "auto", "must"] | None = None,
        threads: int | None = None,
    ) -> None: ...


# The groups whose class is not chosen.
_FIXED: dict[str, type] = {"": _Scalars, "trainer": Trainer, "checkpoint": CheckpointCallback}


class _ParseError(Exception): ...


class _Parser(LightningArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises without the usage of 450 lines, and without the exit."""
        raise _ParseError(message)


@functools.cache
def _parser() -> LightningArgumentParser:
    """The parser, made once: it reads the signatures of the Trainer and of its arguments."""
    return _Cli().parser


class _Cli(LightningCLI):
    """Without a config: the parser alone. With one, already parsed: also the objects."""

    def __init__(
        self,
        config: Namespace | None = None,
        *,
        callbacks: Iterable[Callback] = (),
        plugins: Iterable[Any] = (),
        trainer_overrides: dict[str, Any] | None = None,
    ) -> None:
        self._callbacks = list(callbacks)
        self._plugins = list(plugins)
        self._trainer_overrides = trainer_overrides or {}
        super().__init__(
            LightningModule,
            LightningDataModule,
            save_config_callback=None,
            seed_everything_default=0,
            parser_class=_Parser,
            parser_kwargs={"allow_abbrev": False, "exit_on_error": False, "dump_header": []},
            subclass_mode_model=True,
            subclass_mode_data=True,
            args=config,
            run=False,
            auto_configure_optimizers=False,
        )

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_class_arguments(_Scalars, instantiate=False)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(CheckpointCallback, "checkpoint")

    # LightningCLI does everything in its constructor. These are its steps; without a config they do
    # nothing. Its own parse_arguments warns about sys.argv, which must stay: the DDP launcher
    # starts the other ranks with it.

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        self.config = Namespace() if args is None else args  # type: ignore[no-untyped-call]

    def _set_seed(self) -> None:
        if self.config:
            seed_everything(self.config["seed_everything"], workers=True, verbose=False)

    def instantiate_classes(self) -> None:
        if not self.config:
            return
        try:
            super().instantiate_classes()
        except SavepointError:
            raise
        except ValueError as error:
            # jsonargparse takes an error of a class's own __init__ for a value of the wrong type,
            # and wraps it in a page of text.
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            if isinstance(cause, SavepointError):
                raise cause from None
            if cause is not error:
                raise ConfigError(
                    f"A class of the config refuses its arguments: {type(cause).__name__}: {cause}"
                ) from cause
            raise

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        configured = self._get(self.config_init, "trainer")
        added = {"callbacks": self._callbacks, "plugins": self._plugins}
        lists = {key: _as_list(configured[key]) + more for key, more in added.items()}
        if "logger" in self._trainer_overrides and not isinstance(
            given := configured["logger"], bool
        ):
            lists["logger"] = _as_list(self._trainer_overrides.pop("logger")) + _as_list(
                given
            )  # beside those of the run
        try:
            return super().instantiate_trainer(**{**lists, **self._trainer_overrides, **kwargs})
        except (MisconfigurationException, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"Lightning's Trainer refuses its settings: {' '.join(str(error).split())}"
            ) from error


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the deprecation warnings of jsonargparse about LightningCLI 2.6: no user can act on
    them.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", category=DeprecationWarning, module="jsonargparse|lightning"
        )
        warnings.filterwarnings(
            "ignore", message=r"(?s).*JsonargparseDeprecationWarning|.*deprecated in v4\."
        )
        yield


def _refuse_nulls(config: Namespace, composed: compose.Composed) -> None:
    """Refuses a null that an argument does not take: jsonargparse takes null for any argument of a
    class.
    """
    values = compose.flatten(dump(config))
    for key, value in values.items():
        owner, _, name = key.rpartition(".")
        chosen = values.get(owner)
        if value is not None or key.split(".")[0] not in compose.REPLACED:
            continue
        arg = _arguments(_resolve(chosen, owner)).get(name) if isinstance(chosen, str) else None
        if arg and arg.default is not None and not re.search("None|Optional|Any", str(arg.type)):
            raise ConfigError(
                f"Wrong value of {composed.place(key)}: null. Expected {_readable(str(arg.type))}."
            )


# --- what a class takes ---


def _print_class_help(flag: str, composed: compose.Composed) -> None:
    """Prints the arguments of the class in `--KEY.help NAME`, or of the class chosen at KEY."""
    name, _, named = flag.partition("=")
    key = name.removeprefix("--").removesuffix(".help")
    chosen = _resolve(named, key) if named else _class_at(key, composed)
    if chosen is None:
        raise ConfigError(_unknown_class(key, named or "none chosen", f"--{key}.help"))
    print(
        f"{chosen.__module__}.{chosen.__qualname__} takes, as --{key}.NAME VALUE or under `{key}` "
        "in a config:"
    )
    texts = {p.arg_name: p.description or "" for c in chosen.__mro__ for p in _doc_params(c)}
    for arg in _arguments(chosen).values():
        default = "required" if arg.required else f"default {json.dumps(arg.default, default=str)}"
        text = " ".join(texts.get(arg.name, "").split())
        print(f"  {arg.name}: {_readable(str(arg.type))} ({default})  {text}".rstrip())


def _doc_params(chosen: type) -> list[docstring_parser.DocstringParam]:
    init = vars(chosen).get("__init__")
    texts = [text for text in (chosen.__doc__, init.__doc__) if text]
    return [param for text in texts for param in docstring_parser.parse(text).params]


@dataclass
class _Argument:
    name: str
    type: Any
    default: Any
    required: bool


def _arguments(chosen: type | None) -> dict[str, _Argument]:
    if chosen is None:
        return {}
    parser = ArgumentParser(exit_on_error=False)
    names = [
        name.removeprefix("x.")
        for name in parser.add_class_arguments(chosen, "x", fail_untyped=False)
    ]
    defaults = parser.get_defaults(skip_validation=True)
    parameters = inspect.signature(chosen).parameters.values()
    required = {parameter.name for parameter in parameters if parameter.default is parameter.empty}
    kinds = _kinds(chosen)
    return {
        name: _Argument(name, kinds.get(name, ""), defaults.get(f"x.{name}"), name in required)
        for name in names
    }


def _kinds(chosen: type) -> dict[str, Any]:
    """The type of each argument of a class and of those that it inherits from; as text where its
    names are not known here.
    """
    kinds: dict[str, Any] = {}
    for owner in reversed(chosen.__mro__):
        init = vars(owner).get("__init__", object.__init__)
        try:
            kinds |= get_type_hints(init)
        except Exception:  # noqa: BLE001 - a name that only a type checker imports, say
            kinds |= inspect.get_annotations(init)
    return kinds


# --- what went wrong, in our words ---


def _explain(report: str, composed: compose.Composed) -> str:
    """The first mistake, in one line. Each value is tried alone, as jsonargparse reports a mistake
    once for each type that it tried.
    """
    for key, value in [*_flags(composed), *compose.leaves(composed.config)]:
        if mistake := _mistake(key, value, _owner(key, composed), composed):
            return mistake
    return f"Wrong configuration: {' '.join(report.split())[:400]}"


def _flags(composed: compose.Composed) -> Iterator[tuple[str, Any]]:
    """Each flag with its value: the text, or the list or dict that it is."""
    for key, text in composed.flags:
        data = compose.parse_yaml(text, f"--{key}")
        yield key.rstrip("+"), data if isinstance(data, list | dict) else text


def _owner(key: str, composed: compose.Composed) -> type | None:
    return _class_at(key.rpartition(".")[0], composed)


def _mistake(key: str, value: Any, owner: type | None, composed: compose.Composed) -> str:
    """What is wrong with the value of an argument of the class `owner`; "" where nothing is, or
    where that class is not known.
    """
    outer, _, name = key.rpartition(".")
    if key in compose.REPLACED:
        return _wrong_class(key, value, (_base(key),), composed)
    if owner is None:
        above = _arguments(_owner(outer, composed)).get(outer.rpartition(".")[2])
        takes_keys = above is None or _components(above.type) or "dict" in str(above.type).lower()
        return "" if takes_keys else _unknown_key(key, owner, composed)
    arg = _arguments(owner).get(name)
    if arg is None:
        return "" if _takes_any_name(owner) else _unknown_key(key, owner, composed)
    if _fits(owner, name, value):
        return ""
    if components := _components(arg.type):
        return _wrong_class(key, value, components, composed)
    return f"Wrong value of {composed.place(key)}: {value}. Expected {_readable(str(arg.type))}."


def _fits(owner: type, name: str, value: Any) -> bool:
    """Whether jsonargparse takes a value for one argument of a class."""
    parser = ArgumentParser(exit_on_error=False)
    others = _arguments(owner).keys() - {name}
    parser.add_class_arguments(owner, "x", skip=set(others), fail_untyped=False)
    try:
        if isinstance(value, str):
            parser.parse_args([f"--x.{name}={value}"])
        else:
            parser.parse_object({"x": {name: value}})
    except ArgumentError:
        return False
    return True


def _takes_any_name(owner: type) -> bool:
    kinds = [parameter.kind for parameter in inspect.signature(owner).parameters.values()]
    return inspect.Parameter.VAR_KEYWORD in kinds


def _components(kind: Any) -> tuple[type, ...]:
    """The classes in a type that a config names by `class_path`."""
    if isinstance(kind, type) and not get_args(kind):
        is_plain = kind.__module__.split(".")[0] in sys.stdlib_module_names
        return () if is_plain or issubclass(kind, Enum) else (kind,)
    return tuple(component for inner in get_args(kind) for component in _components(inner))


def _wrong_class(key: str, value: Any, bases: tuple[type, ...], composed: compose.Composed) -> str:
    """What is wrong with the class, or one of several, that is chosen at `key`."""
    where = composed.place(key)
    given = dict([*compose.leaves(composed.config), *_flags(composed)])
    for item in value if isinstance(value, list) else [value]:
        arguments = {name.removeprefix(f"{key}."): None for name in given}
        name = item
        if isinstance(item, dict):
            name = item.get("class_path")
            arguments = item.get("init_args") or {}
        if not isinstance(name, str):
            return f"Wrong value of {where}: {value}. Expected `class_path` and `init_args`."
        chosen = _resolve(name, key)
        if chosen is None:
            return _unknown_class(key, name, where)
        if not issubclass(chosen, bases):
            kinds = " or ".join(base.__name__ for base in bases)
            return f"Wrong class for {where}: {name}. Expected a {kinds}.{_known_classes(key)}"
        for argument, inner in arguments.items() if isinstance(item, dict) else ():
            if mistake := _mistake(f"{key}.{argument}", inner, chosen, composed):
                return mistake
        for arg in _arguments(chosen).values():
            if arg.required and arg.name not in arguments:
                lacking = f"{key}.{arg.name}"
                what = f"No value for {composed.place(lacking)}"
                return f"{what}. Its class has no default for it. Give --{lacking} VALUE."
    return ""


def _readable(kinds: str) -> str:
    """Types as a person writes them: `<class 'int'>` is int, NoneType is null."""
    kinds = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", kinds)
    kinds = re.sub(r"(?:typing\.)?Literal\[(.*?)\]", r"one of \1", kinds)
    kinds = re.sub(r"typing\.Optional\[(.*)\]", r"\1 | null", kinds)
    return re.sub(
        r"\b(?:[a-z_]+\.)+(?=\w)", "", kinds.replace("NoneType", "null").replace("None", "null")
    )


def _unknown_key(key: str, owner: type | None, composed: compose.Composed) -> str:
    outer, _, name = key.rpartition(".")
    known = sorted(_arguments(owner))
    hint = " See --print_config."
    if owner:
        hint = f" {owner.__name__} takes {', '.join(known) or 'no arguments'}."
    near = words.nearest(name, known, prefix=f"{outer}.")
    return f"Unknown key: {composed.place(key)}.{near or hint}"


def _unknown_class(key: str, name: str, where: str) -> str:
    module, _, short = name.rpartition(".")
    because = ""
    try:
        importlib.import_module(module or "savepoint")
    except Exception as error:  # noqa: BLE001 - a module of the user may raise anything
        because = f" ({error})"
    files = Path("configs", key)
    near_files = [path.name for path in (project().root / files).glob("*.yaml")]
    everywhere = {c.__name__ for c in _below(_base(key)) if not c.__name__.startswith("_")}
    near = (
        words.nearest(short, _own_classes(key))
        or words.nearest(short, near_files, prefix=f"{files}/")
        or words.nearest(short, everywhere)
    )
    return f"No such class for {where}: {name}{because}.{near or _known_classes(key)}"


def _known_classes(key: str) -> str:
    known = ", ".join(sorted(_own_classes(key)))
    return f" Known here: {known}." if known else ""


def _own_classes(key: str) -> set[str]:
    return {c.__name__ for c in _below(_base(key)) if c.__module__.split(".")[0] not in _LIBRARIES}


def _base(key: str) -> type:
    """The base of a class at `key`: a guess from the name, good enough for a hint."""
    bases: dict[str, type] = {"model": LightningModule, "data": LightningDataModule}
    bases |= {"trainer.callbacks": Callback, "trainer.logger": Logger}
    return bases.get(key, nn.Module)


def _class_at(key: str, composed: compose.Composed) -> type | None:
    """The class that is chosen at `key`, by a flag or a file."""
    if key in _FIXED:
        return _FIXED[key]
    name = dict(composed.flags).get(key) or dict(compose.leaves(composed.config)).get(key)
    return _resolve(name, key) if isinstance(name, str) else None


def _resolve(name: str, key: str) -> type | None:
    module, _, short = name.rpartition(".")
    if not module:
        return next((c for c in _below(_base(key)) if c.__name__ == name), None)
    try:
        chosen = getattr(importlib.import_module(module), short, None)
    except Exception:  # noqa: BLE001 - a module of the user may raise anything
        return None
    return chosen if isinstance(chosen, type) else None


def _below(base: type) -> set[type]:
    direct: list[type] = base.__subclasses__()
    return set(direct).union(*map(_below, direct))
