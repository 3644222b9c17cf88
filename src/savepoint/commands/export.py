"""`savepoint export [CKPT] --format F`: the weights, or the model, for programs without Savepoint.

Exit code 1 if the file does not compute what the checkpoint computes: then it is not kept.
"""

import argparse
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from savepoint import entry, files, find, words
from savepoint.checkpoint import store
from savepoint.commands import output
from savepoint.errors import ConfigError
from savepoint.words import show

if TYPE_CHECKING:
    from savepoint.export import Parity

SUFFIXES = {
    "safetensors": ".safetensors",
    "npz": ".npz",
    "json": ".json",
    "state_dict": ".pt",
    "pt2": ".pt2",
    "onnx": ".onnx",
    "ckpt": ".ckpt",
}
WEIGHTS = ("npz", "state_dict", "safetensors")
ONNX = ("onnx", "onnxruntime", "onnxscript")
# Facts of how it lies on the disk: the file has its own.
_OF_A_FILE = ("format_version", "shards", "digest", "body")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    ckpt = "a file, or a run: its best; the newest run under outputs/"
    parser.add_argument("ckpt", metavar="CKPT", nargs="?", help=ckpt)
    kind = "pt2 and onnx: the model; json: facts; ckpt: all, in one file; else weights"
    parser.add_argument("--format", required=True, choices=SUFFIXES, help=kind)
    file = "default: in the run directory, by the step"
    parser.add_argument("-o", dest="file", metavar="FILE", type=Path, help=file)
    clients = "of a federated run: the global model and each client's, into a new directory"
    parser.add_argument("--clients", metavar="DIR", type=Path, help=clients)
    pieces = "safetensors in pieces of at most so many MB, with an index, into a new directory FILE"
    parser.add_argument("--pieces", metavar="MB", type=float, help=pieces)
    parser.add_argument("--force", action="store_true", help="replace FILE if it is there")
    allow = "go on though the model's code has changed"
    parser.add_argument("--allow", choices=["canary"], default="", help=allow)


def main(arguments: argparse.Namespace) -> int:
    path, source = find.file_or_best(arguments.ckpt)
    if arguments.clients:
        return _export_clients(arguments, path, source)
    if arguments.pieces is not None:
        return _export_pieces(arguments, path, source)
    target: Path = arguments.file or find.beside(path, path.stem + SUFFIXES[arguments.format])
    _check(target, arguments.format, force=arguments.force)
    if arguments.format == "ckpt":
        return _export_checkpoint(arguments, path, source, target)

    with entry.importing():
        from savepoint import export, rebuilding

    rebuilt = rebuilding.rebuild(path, allow=[arguments.allow])
    if arguments.format == "json":
        export.write_facts(rebuilt, target)
        output.put(f"{source}\nwritten: {show(target)}")
        return 0
    parity = export.export(rebuilt, target, arguments.format)
    metadata = export.describe(rebuilt)
    if arguments.json:
        facts = {"checkpoint": path, "file": target, "format": arguments.format}
        facts |= {"averaged": rebuilt.averaged, "parity": parity and vars(parity)}
        output.put_json(facts | {"metadata": metadata})
        return 0
    lines = [source]
    lines += ["weights: the averaged ones, as in the run's test"] if rebuilt.averaged else []
    lines += [_parity(parity) if parity else "parity: not checked, this checkpoint has no canary"]
    opset = f", opset {export.OPSET}" if arguments.format == "onnx" else ""
    lines += [f"written: {show(target)} ({words.megabytes(target.stat().st_size)}{opset})"]
    if shape := metadata.get("input"):
        lines += [f"input: {shape}, as the model's forward takes it"]
    output.put("\n".join(lines))
    return 0


def _export_checkpoint(arguments: argparse.Namespace, path: Path, source: str, target: Path) -> int:
    """One file of the same content: a resume takes it, and so does `load_from_checkpoint`."""
    state, facts = find.load(path)
    known = {key: value for key, value in facts.items() if key not in _OF_A_FILE}
    written = store.write(target, state, known)
    size = target.stat().st_size
    if arguments.json:
        output.put_json({"checkpoint": path, "file": target, "format": "ckpt", "bytes": size})
    else:
        where = f"written: {show(target)} ({words.megabytes(size)}, step {written.step})"
        output.put(f"{source}\n{where}")
    return 0


def _export_pieces(arguments: argparse.Namespace, path: Path, source: str) -> int:
    """Of a model that may be larger than the memory: it is not built."""
    if arguments.format != "safetensors" or arguments.pieces <= 0:
        raise ConfigError(
            f"Not in pieces: --format {arguments.format} --pieces {arguments.pieces:g}. Pieces are "
            "of safetensors, and of more than 0 MB. Give --format safetensors --pieces 5000"
        )
    folder: Path = arguments.file or find.beside(path, f"{path.stem}-safetensors")
    if folder.exists():
        raise ConfigError(
            f"There already: {show(folder)}. The pieces go into a new directory. Name one: -o DIR"
        )
    with entry.importing():
        from savepoint import export_pieces

    names = export_pieces.export(path, folder, int(arguments.pieces * 1e6))
    if arguments.json:
        output.put_json({"checkpoint": path, "directory": folder, "pieces": names})
        return 0
    size = words.megabytes(files.size(folder))
    output.put(
        f"{source}\nwritten: {words.plural(len(names), 'piece')} in {show(folder)}/ ({size})"
    )
    return 0


def _export_clients(arguments: argparse.Namespace, path: Path, source: str) -> int:
    """The global model and, for each client that keeps weights, its own."""
    folder: Path = arguments.clients
    if folder.exists() and any(folder.iterdir()) and not arguments.force:
        raise ConfigError(
            f"Not empty: {show(folder)}. The models of all clients go there. Name a new directory, "
            "or give --force"
        )
    if arguments.format not in WEIGHTS:
        raise ConfigError(
            f"Not for clients: --format {arguments.format}. Their weights are written as one of "
            f"{', '.join(WEIGHTS)}. Give one of them."
        )
    with entry.importing():
        from savepoint import export, rebuilding

    rebuilt = rebuilding.rebuild(path, allow=[arguments.allow])
    suffix = SUFFIXES[arguments.format]
    number = 0
    for name, model in export.clients_of(rebuilt):
        export.export(model, folder / f"{name}{suffix}", arguments.format)
        number += 1
    export.write_facts(rebuilt, folder / "facts.json")
    if arguments.json:
        output.put_json({"checkpoint": path, "directory": folder, "models": number})
    else:
        output.put(f"{source}\nwritten: {words.plural(number, 'model')} in {show(folder)}/")
    return 0


def _parity(parity: "Parity") -> str:
    allowed = f"{parity.allowed:.3g} at most" if parity.allowed else "0"
    other = ""
    if parity.saved:
        other = f"; the output in the checkpoint, of another device, by {parity.saved:.3g}"
    return f"parity: largest difference {parity.largest:.3g} (expected {allowed}){other}"


def _check(target: Path, kind: str, *, force: bool) -> None:
    """Raises ConfigError for the arguments, before the slow imports."""
    if target.is_dir():
        raise ConfigError(
            f"A directory, not a file: {target}. An export is one file. Give another name: -o FILE"
        )
    if target.exists() and not force:
        raise ConfigError(
            f"There already: {show(target)}. An export replaces a file only with --force. Give it, "
            "or another name: -o FILE"
        )
    lacking = [name for name in ONNX if importlib.util.find_spec(name) is None]
    if lacking and kind == "onnx":
        raise ConfigError(
            f"Not installed: {', '.join(lacking)}. The format onnx needs it. "
            "Install it: make extras, or pip install 'savepoint-lightning[onnx]'"
        )
