"""`savepoint eval [CKPT] [--KEY VALUE]...`: the test of a checkpoint, rebuilt from it alone, in one
process, on the device that is there.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from savepoint import entry, find, words
from savepoint.commands import output
from savepoint.errors import RunDirectoryError
from savepoint.words import show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = (
        "savepoint eval [CKPT] [--KEY VALUE]... [--split test|val] [-o DIR] [--allow WHAT] [--json]"
    )
    parser.epilog = (
        "CKPT is a file, or a run: its best; without it the newest run under outputs/. --KEY "
        "VALUE stands for any key of the config, as for train.py: --data.root DIR, "
        "--trainer.accelerator cpu."
    )
    split = "val: the validation, metrics alone"
    parser.add_argument("--split", choices=["test", "val"], default="test", help=split)
    place = "default: eval-STEP in the run directory"
    parser.add_argument("-o", dest="directory", metavar="DIR", type=Path, help=place)
    kinds = ["canary", "dataset"]
    allow = "canary: the model's code has changed; dataset: on other data"
    parser.add_argument(
        "--allow", choices=kinds, action="append", default=[], metavar="WHAT", help=allow
    )
    parser.set_defaults(words=[])


def main(arguments: argparse.Namespace) -> int:
    target, overrides = _split(arguments.words)
    path, source = find.file_or_best(target)

    with entry.importing():
        from savepoint import evaluate, rebuilding

    rebuilt = rebuilding.rebuild(path, overrides, allow=arguments.allow)
    name = f"eval-{path.stem}"
    if path.parent.name == "checkpoints":
        name = f"eval-{rebuilt.manifest['step']:08d}"
    suffix = "" if arguments.split == "test" else "-val"
    directory = arguments.directory or find.beside(path, name + suffix)
    try:
        facts, texts = evaluate.evaluate(
            rebuilt, arguments.split, directory, overrides=overrides, allow=arguments.allow
        )
    except OSError as error:
        if not str(error.filename).startswith(str(directory)):
            raise
        raise RunDirectoryError(
            f"Cannot write there: {directory} ({error.strerror}). The metrics are saved in it. "
            "Name another directory: -o DIR"
        ) from error
    if arguments.json:
        output.put_json(facts | {"directory": directory})
        return 0
    on = f"{facts['split']} data of {facts['dataset']}, on {facts['device']}"
    output.put(
        "\n".join([source, on, "", words.table((), words.metrics(facts["metrics"].items()))])
    )
    for text in texts:
        output.put(f"\n{text}")
    output.put(f"\nwritten: {show(directory.absolute())}/")
    return 0


def _split(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """CKPT, and the overrides: the word after a flag without `=` is its value."""
    target = None
    overrides = []
    todo = list(words)
    while todo:
        word = todo.pop(0)
        if word.startswith("-"):
            overrides.append(word)
            if "=" not in word and todo and not todo[0].startswith("--"):
                overrides.append(todo.pop(0))
        elif target is not None:
            raise find.two_checkpoints(target, word)
        else:
            target = word
    return target, overrides
