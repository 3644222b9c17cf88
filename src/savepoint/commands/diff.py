"""`savepoint diff A B`: exit code 0 if the two are equal, 1 if they differ, 2 if one cannot be
read, like diff(1).

What equal means, `comparing` says.
"""

import argparse
from collections.abc import Mapping
from typing import Any

from savepoint import find, words
from savepoint.checkpoint import manifest
from savepoint.commands import output
from savepoint.comparing import MAY_DIFFER, compare, differences

FACTS = (
    "step",
    "epoch",
    "exact",
    "dataset",
    "world_size",
    "versions",
    "threads",
    "processor",
    "device",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for name in "ab":
        parser.add_argument(
            name, metavar=f"{name.upper()}", help="a checkpoint, or a run directory: its newest one"
        )


def main(arguments: argparse.Namespace) -> int:
    paths = [find.file_or_latest(arguments.a), find.file_or_latest(arguments.b)]
    for path in paths:
        manifest.read(path)  # what is no checkpoint is said before the slow imports
    (state, facts), (other_state, other_facts) = map(find.load, paths)
    changes = compare(state, other_state)
    changes = {"a": paths[0], "b": paths[1], "equal": not changes["parts"], **changes}
    changes["facts"] = differences(
        {key: facts.get(key) for key in FACTS}, {key: other_facts.get(key) for key in FACTS}
    )
    changes["metrics"] = differences(facts.get("metrics", {}), other_facts.get("metrics", {}))
    if arguments.json:
        output.put_json(changes)
    else:
        output.put(_text(changes))
    return 0 if changes["equal"] else 1


def _text(changes: Mapping[str, Any]) -> str:
    if changes["equal"]:
        last = f"Equal: every value and every bit, but for {', '.join(MAY_DIFFER)} and the clock."
    else:
        last = f"Different in: {', '.join(changes['parts'])}"
    metrics = {name: list(map(_metric, pair)) for name, pair in changes["metrics"].items()}
    weights = [
        (one["name"], one["why"] or words.number(one["change"])) for one in changes["weights"]
    ]
    sections = [
        words.table((), [("A", words.show(changes["a"])), ("B", words.show(changes["b"]))]),
        _section("fact", changes["facts"]),
        _section("config", changes["config"]),
        _section("metric", metrics),
        words.table(("weights", "relative change"), weights) if weights else "",
        *(
            _section(f"optimizer {one['optimizer']}", one["changed"])
            for one in changes["optimizers"]
        ),
        last,
    ]
    return "\n\n".join(section for section in sections if section)


def _section(title: str, changed: Mapping[str, list[Any]]) -> str:
    rows = [(key, _value(was), _value(now)) for key, (was, now) in changed.items()]
    return words.table((title, "A", "B"), rows) if rows else ""


def _metric(one: Mapping[str, Any] | None) -> str:
    return "-" if one is None else f"{words.number(one['value'])} at step {one['step']}"


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {inner}" for key, inner in value.items())
    return "-" if value is None or value == [] else str(value)
