"""`savepoint replay RUN --step N [--to M]`: train a run again from its newest checkpoint before
step N, compare what is logged with its log, and look at step N.

The run is only read. Exit code 1 where a logged row differs.
"""

import argparse
import importlib.util
import sys
import tempfile
from contextlib import redirect_stdout
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import TYPE_CHECKING, Any

from savepoint import entry, files, find, words
from savepoint.commands import output
from savepoint.errors import ConfigError
from savepoint.run import Run
from savepoint.words import plural, show

if TYPE_CHECKING:
    from savepoint.replay.looking import Look
    from savepoint.replay.rows import Compared

SHOWN_INDICES = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    run = "a run directory; default: the newest run"
    parser.add_argument("run", metavar="RUN", nargs="?", help=run)
    parser.add_argument("--step", metavar="N", type=int, required=True, help="looked at")
    parser.add_argument("--to", metavar="M", type=int, help="train on to step M; default: N")
    batch = "writes the batch of step N, for torch.load"
    parser.add_argument("--save-batch", dest="batch", metavar="FILE", type=Path, help=batch)
    fork = "keep the state of the last step, as a checkpoint of a run NAME beside RUN"
    parser.add_argument("--fork", metavar="NAME", help=fork)
    code = "calls its function look(trainer, module, batch, batch_idx) at step N"
    parser.add_argument("--with", dest="code", metavar="FILE.py", type=Path, help=code)
    debug = "stop in a debugger in the training_step of step N"
    parser.add_argument("--debug", action="store_true", help=debug)
    add_allow(parser)


def add_allow(parser: argparse.ArgumentParser) -> None:
    allow = "canary: though the model computes something else; dataset: on other data"
    parser.add_argument(
        "--allow",
        choices=("canary", "dataset"),
        action="append",
        default=[],
        metavar="WHAT",
        help=allow,
    )
    code = "though Python files have changed since"
    parser.add_argument("--allow-code", action="store_true", help=code)


def main(arguments: argparse.Namespace) -> int:
    run = find.run(arguments.run)
    end = arguments.step if arguments.to is None else arguments.to
    _check(arguments, end)

    with entry.importing():
        from savepoint.replay import choice, looking, playing, rows

    checkpoint = choice.before(run, arguments.step)
    look = looking.StepLook(
        arguments.step, look=_user_function(arguments.code), debug=arguments.debug
    )
    source = choice.load(checkpoint.path, None if arguments.allow_code else run)
    config = choice.config_after(run, checkpoint)
    notes = list(choice.reservations(run, source, end, resumed=config is not None))
    skip = source.state.get("logged_rows") or 0
    # The result alone goes to standard output.
    with redirect_stdout(sys.stderr), tempfile.TemporaryDirectory(prefix="replay-") as scratch:
        steps = plural(end - checkpoint.step, "step")
        print(f"Replaying {steps} of {show(run.directory)}, from {checkpoint.path.name}")
        goal = playing.Goal(end, saves=arguments.fork is not None)
        place = run.directory.parent if arguments.fork else Path(scratch)
        played = playing.play(
            source,
            place,
            arguments.fork,
            goal,
            callbacks=[look],
            allow=arguments.allow,
            config=config,
        )
        log = run.directory / "metrics.csv"
        compared = rows.compare(log, skip, played.run.directory / "metrics.csv")
        if played.step < end or not look.found:
            playing.remove(played.run)
            raise ConfigError(
                f"Not reached: step {end}. {show(run.directory)} ends at step {played.step}, by "
                "the limits of its config. Give an earlier step."
            )
    if arguments.batch is not None:
        _save_batch(look.batch, arguments.batch)
    facts = {"run": run.directory, "checkpoint": checkpoint.path, "notes": notes}
    if arguments.json:
        output.put_json(facts | {"rows": vars(compared), "step": look.found})
    else:
        output.put(_text(run, notes, compared, look.found))
        if arguments.fork:
            output.put(f"\nkept: {show(played.run.directory)}")
    return 0 if compared.is_equal else 1


def _check(arguments: argparse.Namespace, end: int) -> None:
    if not 1 <= arguments.step <= end:
        raise ConfigError(
            f"No such steps: --step {arguments.step} --to {end}. Steps count from 1, and a replay "
            "goes forward. Give others."
        )
    if arguments.batch is not None and arguments.batch.is_dir():
        raise ConfigError(
            f"A directory, not a file: {show(arguments.batch)}. --save-batch writes the batch of "
            "the step there. Name a file."
        )


def _user_function(file: Path | None) -> "Look | None":
    if file is None:
        return None
    loader = SourceFileLoader(file.stem, str(file))
    spec = importlib.util.spec_from_loader(file.stem, loader)
    try:
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
        look: Look = module.look
        if not callable(look):
            raise TypeError("look is no function")
    except Exception as error:  # whatever the user's code raises
        why = str(error).partition("\n")[0] or type(error).__name__
        raise ConfigError(
            f"No function `look` in {show(file)} ({why}). A Python file was expected that has "
            "look(trainer, module, batch, batch_idx). Write one, or leave --with away."
        ) from error
    return look


def _save_batch(batch: Any, file: Path) -> None:
    import torch

    with files.replacing(file) as opened:
        torch.save(batch, opened)


# -- the text ------------------------------------------------------------------------------------


def _text(run: Run, notes: list[str], compared: "Compared", found: dict[str, Any]) -> str:
    lines = [f"note: {note}" for note in notes]
    lines += [_rows(compared), ""]
    lines.append(f"step {found['step']} of {show(run.directory)}: {_place(found)}")
    lines.append(f"batch {_batch(found)}")
    lines += ["", *_layers(found)]
    first = found["not_finite"]
    lines.append("")
    lines.append(
        f"not finite: the output of {first} is the first" if first else "all outputs are finite"
    )
    return "\n".join(lines)


def _rows(compared: "Compared") -> str:
    if compared.differing is None:
        if compared.first is None:
            return "rows: the log has none between the checkpoint and here"
        more = f"; {plural(compared.missing, 'row')} the log does not have" * bool(compared.missing)
        return f"rows {compared.first} to {compared.last}: equal to the log{more}"
    at = compared.differing["step"]
    names = list(compared.differing["values"].items())
    values = "; ".join(f"{name} {was} in the log, {now} now" for name, (was, now) in names[:3])
    return f"row of step {at}: DIFFERENT from the log, after {compared.equal} equal rows: {values}"


def _place(found: dict[str, Any]) -> str:
    loss = "" if found["loss"] is None else f", loss {found['loss']:.6g}"
    rates = ", ".join(f"{rate:.6g}" for rate in found.get("rates", []))
    return f"epoch {found['epoch'] + 1}, batch {found['batch'] + 1}{loss}, learning rate {rates}"


def _batch(found: dict[str, Any]) -> str:
    shapes = ", ".join(str(shape) for shape in found["shapes"])
    text = f"{shapes}, sha256 {found['digest'][:16]}"
    known = found["indices"]
    if known is None:
        return text
    shown = ", ".join(map(str, known[:SHOWN_INDICES]))
    return f"{text}, samples {shown}{', ...' if len(known) > SHOWN_INDICES else ''}"


def _layers(found: dict[str, Any]) -> list[str]:
    head = ("weights", "norm", "gradient", "update / weight")
    lines = []
    for name, row in found.get("layers", {}).items():
        numbers = [row["weight_norm"], row["gradient_norm"], row.get("update")]
        texts = ["-" if one is None else f"{one:.4g}" for one in numbers]
        lines.append((name, *texts, "" if row["finite"] else "not finite"))
    return [words.table((*head, ""), lines)] if lines else []
