"""What is wrong with a configuration, in our words, and what a class takes: `--KEY.help`."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docstring_parser

from savepoint import words
from savepoint.config import compose
from savepoint.config.classes import (
    arguments_of,
    base_at,
    below,
    class_at,
    components_in,
    fits,
    own_classes,
    resolve_class,
    takes_any_name,
)
from savepoint.errors import ConfigError
from savepoint.workspace import project


def explain(report: str, composed: compose.Composed) -> str:
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
    return class_at(key.rpartition(".")[0], composed)


def _mistake(key: str, value: Any, owner: type | None, composed: compose.Composed) -> str:
    """What is wrong with the value of an argument of the class `owner`; "" where nothing is, or
    where that class is not known.
    """
    outer, _, name = key.rpartition(".")
    if key in compose.REPLACED:
        return _wrong_class(key, value, (base_at(key),), composed)
    if owner is None:
        above = arguments_of(_owner(outer, composed)).get(outer.rpartition(".")[2])
        takes_keys = above is None or components_in(above.type) or "dict" in str(above.type).lower()
        return "" if takes_keys else unknown_key(key, owner, composed)
    arg = arguments_of(owner).get(name)
    if arg is None:
        return "" if takes_any_name(owner) else unknown_key(key, owner, composed)
    if fits(owner, name, value):
        return ""
    if components := components_in(arg.type):
        return _wrong_class(key, value, components, composed)
    return f"Wrong value of {composed.place(key)}: {value}. Expected {readable(str(arg.type))}."


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
        chosen = resolve_class(name, key)
        if chosen is None:
            return unknown_class(key, name, where)
        if not issubclass(chosen, bases):
            kinds = " or ".join(base.__name__ for base in bases)
            return f"Wrong class for {where}: {name}. Expected a {kinds}.{_known_classes(key)}"
        for argument, inner in arguments.items() if isinstance(item, dict) else ():
            if mistake := _mistake(f"{key}.{argument}", inner, chosen, composed):
                return mistake
        for arg in arguments_of(chosen).values():
            if arg.required and arg.name not in arguments:
                lacking = f"{key}.{arg.name}"
                what = f"No value for {composed.place(lacking)}"
                return f"{what}. Its class has no default for it. Give --{lacking} VALUE."
    return ""


def readable(kinds: str) -> str:
    """Types as a person writes them: `<class 'int'>` is int, NoneType is null."""
    kinds = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", kinds)
    kinds = re.sub(r"(?:typing\.)?Literal\[(.*?)\]", r"one of \1", kinds)
    kinds = re.sub(r"typing\.Optional\[(.*)\]", r"\1 | null", kinds)
    return re.sub(
        r"\b(?:[a-z_]+\.)+(?=\w)", "", kinds.replace("NoneType", "null").replace("None", "null")
    )


def unknown_key(key: str, owner: type | None, composed: compose.Composed) -> str:
    outer, _, name = key.rpartition(".")
    known = sorted(arguments_of(owner))
    hint = " See --print_config."
    if owner:
        hint = f" {owner.__name__} takes {', '.join(known) or 'no arguments'}."
    near = words.nearest(name, known, prefix=f"{outer}.")
    return f"Unknown key: {composed.place(key)}.{near or hint}"


def unknown_class(key: str, name: str, where: str) -> str:
    module, _, short = name.rpartition(".")
    because = ""
    try:
        importlib.import_module(module or "savepoint")
    except Exception as error:  # noqa: BLE001 - a module of the user may raise anything
        because = f" ({error})"
    files = Path("configs", key)
    near_files = [path.name for path in (project().root / files).glob("*.yaml")]
    everywhere = {c.__name__ for c in below(base_at(key)) if not c.__name__.startswith("_")}
    near = (
        words.nearest(short, own_classes(key))
        or words.nearest(short, near_files, prefix=f"{files}/")
        or words.nearest(short, everywhere)
    )
    return f"No such class for {where}: {name}{because}.{near or _known_classes(key)}"


def _known_classes(key: str) -> str:
    known = ", ".join(sorted(own_classes(key)))
    return f" Known here: {known}." if known else ""


def print_class_help(flag: str, composed: compose.Composed) -> None:
    """Prints the arguments of the class in `--KEY.help NAME`, or of the class chosen at KEY."""
    name, _, named = flag.partition("=")
    key = name.removeprefix("--").removesuffix(".help")
    chosen = resolve_class(named, key) if named else class_at(key, composed)
    if chosen is None:
        raise ConfigError(unknown_class(key, named or "none chosen", f"--{key}.help"))
    print(
        f"{chosen.__module__}.{chosen.__qualname__} takes, as --{key}.NAME VALUE or under `{key}` "
        "in a config:"
    )
    texts = {p.arg_name: p.description or "" for c in chosen.__mro__ for p in _doc_params(c)}
    for arg in arguments_of(chosen).values():
        default = "required" if arg.required else f"default {json.dumps(arg.default, default=str)}"
        text = " ".join(texts.get(arg.name, "").split())
        print(f"  {arg.name}: {readable(str(arg.type))} ({default})  {text}".rstrip())


def _doc_params(chosen: type) -> list[docstring_parser.DocstringParam]:
    init = vars(chosen).get("__init__")
    texts = [text for text in (chosen.__doc__, init.__doc__) if text]
    return [param for text in texts for param in docstring_parser.parse(text).params]
