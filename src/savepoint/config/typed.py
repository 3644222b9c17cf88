"""Typed configuration from `__init__` signatures: with `classes`, what knows jsonargparse and
LightningCLI.

`compose` lays files, groups and flags over each other as plain data; here that data meets the types
of the classes.
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Any, NoReturn

import yaml
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import (
    Callback,
    LightningDataModule,
    LightningModule,
    Trainer,
    seed_everything,
)
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from savepoint import job, words
from savepoint.checkpoint.callback import CheckpointCallback
from savepoint.config import compose, quick
from savepoint.config.classes import FIXED, Scalars, arguments_of, class_at, resolve_class
from savepoint.config.mistakes import explain, print_class_help, readable
from savepoint.errors import ConfigError, SavepointError
from savepoint.federated import federation
from savepoint.federated.federation import Federation

# jsonargparse writes defaults with yaml, and fails at an Enum: Lightning's Timer has one as the
# default of a text argument.
yaml.SafeDumper.add_multi_representer(
    Enum, lambda dumper, member: dumper.represent_data(member.value)
)


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
        print_class_help(composed.class_help, composed)
        raise SystemExit(0)
    check_keys(composed)
    with _quiet():
        federated = federation.is_wanted(composed.config, composed.flags)
        parser = _parser(federated=federated)
        plain, flags = _folded(composed) if federated else (composed.config, composed.flags)
        layers = ["--config", compose.to_yaml(plain)]
        try:
            config = parser.parse_args(layers + [f"--{key}={value}" for key, value in flags])
        except _ParseError as error:
            raise ConfigError(explain(str(error), composed)) from None
    _keep_whole_numbers(config, composed)
    _refuse_nulls(config, composed)
    _take_processes(config)
    if composed.wants_config:
        print(dump(config), end="")
        raise SystemExit(0)
    return config


def _take_processes(config: Namespace) -> None:
    """torchrun says how many processes there are, and another number after each restart where its
    hosts come and go (`--nnodes 1:4`).
    """
    processes = job.of_torchrun()
    devices = config.trainer.devices
    if processes is None or isinstance(devices, list) or "," in str(devices):
        return
    config.trainer.devices = processes[0]
    config.trainer.num_nodes = processes[1]


def _folded(composed: compose.Composed) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Config and flags, with the flags of a component of `federated` as its class and arguments:
    no class is imported for it, so that a config reads without Flower.
    """
    group = dict(composed.config.get("federated") or {})
    flags = []
    for key, value in composed.flags:
        name, _, argument = key.removeprefix("federated.").partition(".")
        if name not in federation.COMPONENTS or not key.startswith("federated."):
            flags.append((key, value))
            continue
        data = compose.parse_yaml(value, f"--{key}")
        given = group.get(name) or federation.COMPONENTS[name]
        if argument:
            chosen, arguments = federation.component(given, f"federated.{name}")
            data = {"class_path": chosen, "init_args": {**arguments, argument: data}}
        group[name] = data
    return {**composed.config, "federated": group}, flags


def _keep_whole_numbers(config: Namespace, composed: compose.Composed) -> None:
    """A whole number stays one where the Trainer takes both kinds. Python's `typing` remembers the
    union of int and float in the order in which a process has met it first: after `import flwr`,
    2 would be 2.0, and equal configs would differ.
    """
    group = composed.config.get("trainer") or {}
    given = {f"trainer.{name}": value for name, value in group.items()}
    given |= {key: compose.parse_yaml(value, f"--{key}") for key, value in composed.flags}
    for key, value in given.items():
        if key.startswith("trainer.") and type(value) is int and type(config.get(key)) is float:
            config[key] = value


def check_keys(composed: compose.Composed) -> None:
    """Raises ConfigError for unknown keys of `trainer`, `checkpoint` and `federated`, and for flags
    that name nothing.
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
        for name in arguments_of(class_at(group, composed))
    ]
    for ending in (f".{key}", f".max_{key}", f"_{key}"):
        matches = [name for name in known if name.endswith(ending)][:3]
        if matches:
            return f" Did you mean {' or '.join(f'--{name}' for name in matches)}?"
    return " See --help."


@functools.cache
def _members(group: str) -> frozenset[str]:
    return frozenset(inspect.signature(FIXED[group]).parameters)


def dump(config: Namespace) -> str:
    """The whole configuration as YAML text, of which parse([], base=text) gives the same
    configuration.
    """
    with _quiet():
        # A key that is null must be written: it may stand against a default that is not.
        parser = _parser(federated="federated" in config)
        written = json.loads(
            parser.dump(config, format="json", skip_unset=False, skip_validation=True)
        )
    keys = [key for key in compose.KEYS if key in config]
    return compose.to_yaml({key: _exact(config[key], written[key]) for key in keys})


def _exact(value: Any, written: Any) -> Any:
    """`written` with every plain value restored: jsonargparse writes "1e-3" as a number."""
    if isinstance(written, dict) and isinstance(value, Namespace | dict):
        return {key: _exact(value[key], inner) for key, inner in written.items()}
    if isinstance(written, list) and isinstance(value, list | tuple):
        return [_exact(*pair) for pair in zip(value, written, strict=True)]
    is_plain = isinstance(value, str | int | float) and not isinstance(value, Enum)
    return value if is_plain else written


def federation_of(config: Namespace) -> Federation | None:
    """The group `federated` of a configuration; None where it has none."""
    return Federation(**config.federated.as_dict()) if "federated" in config else None


def local_trainer(config: Namespace, **overrides: Any) -> Trainer:
    """A Trainer of the group `trainer`, without logger and checkpoints, and with new callbacks.

    Raises:
        ConfigError: Lightning refuses a value.
    """
    with _quiet():
        chosen = Namespace(trainer=config.trainer.clone())  # type: ignore[no-untyped-call]
        arguments = _parser().instantiate_classes(chosen).trainer.as_dict()
        arguments |= {"logger": False, "enable_checkpointing": False} | overrides
        with _refused_by_lightning():
            return Trainer(**arguments)


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
            config,
            callbacks=callbacks,
            plugins=plugins,
            trainer_overrides=trainer_overrides,
            federated="federated" in config,
        )
    return cli.model, cli.datamodule, cli.trainer


class _ParseError(Exception): ...


class _Parser(LightningArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises without the usage of 450 lines, and without the exit."""
        raise _ParseError(message)


@functools.cache
def _parser(*, federated: bool = False) -> LightningArgumentParser:
    """The parser, made once: it reads the signatures of the Trainer and of its arguments."""
    return _Cli(federated=federated).parser


class _Cli(LightningCLI):
    """Without a config: the parser alone. With one, already parsed: also the objects."""

    def __init__(
        self,
        config: Namespace | None = None,
        *,
        callbacks: Iterable[Callback] = (),
        plugins: Iterable[Any] = (),
        trainer_overrides: dict[str, Any] | None = None,
        federated: bool = False,
    ) -> None:
        self._config = config
        self._federated = federated
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
            load_from_checkpoint_support=config is not None,
        )

    def setup_parser(self, *arguments: Any, **named: Any) -> None:
        if self._config is None:
            super().setup_parser(*arguments, **named)
            return
        # Shallow: what LightningCLI adds to it holds these objects, and goes with them.
        self.parser = copy.copy(_parser(federated=self._federated))

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_class_arguments(Scalars, instantiate=False)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(CheckpointCallback, "checkpoint")
        if self._federated:
            parser.add_class_arguments(Federation, "federated", instantiate=False)

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
        with _refused_by_lightning():
            return super().instantiate_trainer(**{**lists, **self._trainer_overrides, **kwargs})


@contextmanager
def _refused_by_lightning() -> Iterator[None]:
    try:
        yield
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
    given = config.as_dict()
    values = dict(compose.leaves({group: given.get(group) for group in compose.REPLACED}))
    for key, value in values.items():
        owner, _, name = key.rpartition(".")
        chosen = values.get(owner)
        if value is not None or not isinstance(chosen, str):
            continue
        arg = arguments_of(resolve_class(chosen, owner)).get(name)
        if arg and arg.default is not None and not re.search("None|Optional|Any", str(arg.type)):
            raise ConfigError(
                f"Wrong value of {composed.place(key)}: null. Expected {readable(str(arg.type))}."
            )
