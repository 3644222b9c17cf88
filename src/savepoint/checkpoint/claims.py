"""What a manifest may say: what the seal vouches for and no checkpoint of ours says is damage too.
Standard library only.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

SHARD_NAME = re.compile(r"shard-\d{5}(-[0-9a-f]{8})?\.ckpt")


def wrong(facts: Mapping[str, Any]) -> str:
    """What the seal vouches for and no checkpoint of ours says; "" where there is nothing.

    A key that is not named in `_FACTS` may hold anything.
    """
    for key, (fits, expected) in _FACTS.items():
        if key in facts and not fits(facts[key]):
            return f"its manifest says {key} {_shown(facts[key])}, not {expected}"
        if key not in facts and key in _REQUIRED:
            return f"its manifest says no {key}"
    for name, metric in facts.get("metrics", {}).items():
        if not _is_metric(metric):
            return f"its manifest says {name} {_shown(metric)}, not a value and the step it is of"
    return ""


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else f"{text[:60]}..."


def is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63  # true is no number here


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 1 << 63)


def _is_metric(value: Any) -> bool:
    if not isinstance(value, dict) or not {"value", "step"} <= value.keys():
        return False
    measured = value["value"]
    plain = measured is None or isinstance(measured, str) or _is_number(measured)  # "nan" is a text
    return plain and is_count(value["step"])


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_table(value: Any) -> bool:
    return value is None or isinstance(value, dict)


def _is_shards(value: Any) -> bool:
    return isinstance(value, dict) and all(
        SHARD_NAME.fullmatch(name)
        and isinstance(one, dict)
        and is_count(one.get("bytes"))
        and isinstance(one.get("digest"), str)
        for name, one in value.items()
    )


def _is_dataset(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and {"name", "fingerprint"} <= value.keys())


_REQUIRED = ("step", "body", "digest")
_TEXT = (_is_text, "a text")
_SCORE = (lambda value: value is None or _is_number(value), "a number")
# What is read from a manifest: what it may be, and that in words.
_FACTS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "step": (is_count, "a whole number from 0 on"),
    "logged_step": (is_count, "a whole number from 0 on"),
    "epoch": (lambda value: value is None or is_count(value), "a whole number from 0 on"),
    "body": (lambda value: isinstance(value, str), "a sha256"),
    "digest": (lambda value: isinstance(value, str), "a sha256"),
    **dict.fromkeys(
        ("at", "reason", "ended", "run_id", "parent", "created", "device", "processor", "elastic"),
        _TEXT,
    ),
    "exact": (lambda value: value is None or isinstance(value, bool), "true or false"),
    "unsaved": (
        lambda value: isinstance(value, list) and all(map(_is_text, value)),
        "a list of texts",
    ),
    "metrics": (lambda value: isinstance(value, dict), "a table"),
    "versions": (_is_table, "a table"),
    "dataset": (_is_dataset, "a name and a fingerprint"),
    "monitor": _TEXT,
    "mode": (lambda value: value in (None, "min", "max"), "min or max"),
    "score": _SCORE,
    "best_score": _SCORE,
    "world_size": (lambda value: is_count(value) and value > 0, "a whole number from 1 on"),
    "threads": (is_count, "a whole number from 0 on"),
    "shard": (is_count, "a whole number from 0 on"),
    "shards": (_is_shards, "a table of shards, each with its bytes and digest"),
}
