"""`savepoint show [FILE|RUN_DIR]`: of a run, its newest checkpoint. Facts and metrics come from the manifest, without torch."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from savepoint import find, words
from savepoint.checkpoint import manifest
from savepoint.commands import output

if TYPE_CHECKING:
    from torch import Tensor

PARTS = ("facts", "metrics", "config", "tensors")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="FILE|RUN_DIR", nargs="?", help="default: the newest run under outputs/")
    parser.add_argument(
        "--only", choices=PARTS, help="one part, as in: savepoint show FILE --only config > config.yaml"
    )


def main(arguments: argparse.Namespace) -> int:
    path = find.file_or_latest(arguments.path)
    parts = [arguments.only] if arguments.only else list(PARTS)
    facts: dict[str, Any] = manifest.read(path)
    state: dict[str, Any] = {}
    if "config" in parts or "tensors" in parts:
        from savepoint.checkpoint import store  # and with its load, torch

        state, facts = store.load(path)
    found: dict[str, Any] = {"file": path}
    for part in parts:
        found[part] = _part(part, path, facts, state)
    if arguments.json:
        output.put_json(found)
    elif arguments.only:
        output.put(_text(arguments.only, found[arguments.only]))
    else:
        output.put("\n\n".join([str(path), *(_text(part, found[part]) for part in parts)]))
    return 0


def _part(part: str, path: Path, facts: Mapping[str, Any], state: Mapping[str, Any]) -> Any:
    if part == "facts":
        return {"bytes": path.stat().st_size} | {k: v for k, v in facts.items() if k != "metrics"}
    if part == "metrics":
        return facts.get("metrics", {})
    return state.get("config", "") if part == "config" else tensors(state)


def tensors(state: Mapping[str, Any]) -> dict[str, Any]:
    """`weights`: each tensor of the model; `others`: what else holds tensors, in sums."""
    import torch

    from savepoint.checkpoint import format

    weights = [
        {"name": name, "shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
        | {"norm": norm(value), "bytes": format.size_bytes(value)}
        for name, value in state.get("state_dict", {}).items()
        if isinstance(value, torch.Tensor)
    ]
    others = [
        {"name": key, "tensors": sum(isinstance(leaf, torch.Tensor) for _, leaf in format.leaves(value)), "bytes": size}
        for key, value in state.items()
        if key not in ("state_dict", "optimizer") and (size := format.size_bytes(value))
    ]
    return {"weights": weights, "others": others}


def norm(tensor: "Tensor") -> float:
    import torch

    from savepoint.checkpoint import format

    return float(format.dense(tensor).to(torch.complex128 if tensor.is_complex() else torch.float64).norm())


def _text(part: str, content: Any) -> str:
    if part == "facts":
        return words.table((), [(key, _fact(value)) for key, value in content.items()])
    if part == "metrics":
        rows = [(name, words.number(one["value"]), str(one["step"])) for name, one in content.items()]
        return words.table(("metric", "value", "measured at step"), rows)
    if part == "config":
        return str(content).rstrip()
    weights = [
        (one["name"], str(tuple(one["shape"])), one["dtype"], words.number(one["norm"]), str(one["bytes"]))
        for one in content["weights"]
    ]
    text = words.table(("weights", "shape", "dtype", "norm", "bytes"), weights)
    others = [(one["name"], str(one["tensors"]), str(one["bytes"])) for one in content["others"]]
    return f"{text}\n\n{words.table(('beside them', 'tensors', 'bytes'), others)}" if others else text


def _fact(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {inner}" for key, inner in value.items())
    return words.number(value)
