"""`savepoint eval [CKPT] [--KEY VALUE]...`: from the checkpoint alone, in one process, on the
device that is there.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from savepoint import entry, find, words
from savepoint.commands import output
from savepoint.errors import ConfigError, RunDirectoryError
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
    parser.add_argument(
        "--split",
        choices=["test", "val"],
        default="test",
        help="val: the validation, metrics alone",
    )
    parser.add_argument(
        "-o",
        dest="directory",
        metavar="DIR",
        type=Path,
        help="default: eval-STEP in the run directory",
    )
    parser.add_argument("--allow", choices=["canary", "dataset"], action="append", default=[], metavar="WHAT",
                        help="canary: the model's code has changed; dataset: on other data")  # fmt: skip
    parser.set_defaults(words=[])


def main(arguments: argparse.Namespace) -> int:
    target, overrides = _sorted_out(arguments.words)
    path, said = find.file_or_best(target)

    with entry.importing():
        from savepoint import evaluate, rebuilding

    made = rebuilding.rebuild(path, overrides, allow=arguments.allow)
    name = (
        f"eval-{made.manifest['step']:08d}"
        if path.parent.name == "checkpoints"
        else f"eval-{path.stem}"
    )
    directory = arguments.directory or find.beside(
        path, name if arguments.split == "test" else f"{name}-val"
    )
    try:
        facts, texts = evaluate.evaluate(
            made, arguments.split, directory, overrides=overrides, allow=arguments.allow
        )
    except OSError as error:
        if not str(error.filename).startswith(str(directory)):
            raise
        raise RunDirectoryError(
            f"Cannot write there: {directory} ({error.strerror}). Expected a directory that this "
            "user may write. Name another one: -o DIR"
        ) from error
    if arguments.json:
        output.put_json(facts | {"directory": directory})
        return 0
    on = f"{facts['split']} data of {facts['dataset']}, on {facts['device']}"
    output.put("\n".join([said, on, "", words.table((), words.metrics(facts["metrics"].items()))]))
    for text in texts:
        output.put(f"\n{text}")
    output.put(f"\nwritten: {show(directory.absolute())}/")
    return 0


def _sorted_out(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """CKPT, and the overrides: what follows a flag without `=` is its value."""
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
            raise ConfigError(
                f"Two checkpoints: {target} and {word}. Expected one. Name one of them."
            )
        else:
            target = word
    return target, overrides
