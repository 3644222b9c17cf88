"""The end of a federated run: the test of the best global model, summary.json, and a table."""

import sys
from collections.abc import Mapping
from typing import Any

from savepoint.checkpoint.state import loops
from savepoint.federated.server import Server
from savepoint.run import resume_command, test_metrics
from savepoint.training.summary import summarise
from savepoint.words import metrics, number, show


def finish(server: Server) -> int:
    """Tests, writes, prints. Returns the exit code."""
    training = server.training
    failure = server.saver.failure
    if failure is not None:
        print(f"The newest state of this run is not saved. {failure}", file=sys.stderr, flush=True)
    try:
        training.run.check()
        rounds = server.progress.round
        _set_counters(server)
        summary = summarise(training, rounds, rounds) | {
            "rounds": rounds,
            "clients": len(server.local.partition),
            "failures": sum(len(row["failures"]) for row in server.progress.history),
        }
        print(_table(server, summary), flush=True)
        training.run.write_summary(summary)
    except (OSError, ValueError) as error:
        if failure is None:
            raise
        print(f"Not tested: {error}", file=sys.stderr)
    return 1 if failure else 0


def _set_counters(server: Server) -> None:
    """For the step and the epoch in the test's log row, and for the speed."""
    training = server.training
    rounds = server.progress.round
    loops.set_steps(training.trainer, rounds)
    progress = training.trainer.fit_loop.epoch_progress
    for counts in (progress.current, progress.total):
        for name in ("ready", "started", "processed", "completed"):
            setattr(counts, name, rounds)
    training.last = {"state_dict": server.progress.state_dict}
    secs = server.progress.secs
    training.meter.load_state_dict({"samples": server.progress.samples, "secs": secs})


def _table(server: Server, summary: Mapping[str, Any]) -> str:
    training = server.training
    directory = show(training.run.directory)
    rows = metrics(test_metrics(summary).items())
    scores = training.checkpointing.scores
    if scores.best is not None:
        rows.append((f"best {scores.monitor}", f"{scores.best:.4f} in round {scores.best_step}"))
    longer = f"--federated.num_server_rounds {2 * max(1, summary['rounds'])}"
    rows += [
        ("data", f"{summary['dataset']}, in {summary['clients']} parts"),
        ("rounds", f"{summary['rounds']} in {summary['fit_secs']:.1f} s"),
        ("failures", number(summary["failures"])),
        ("run directory", directory),
        ("more rounds", f"{resume_command(training.run.directory)} {longer}"),
        ("look at it", training.run.command("-m", "savepoint", "report")),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(["", *(f"{name:<{width}}  {value}" for name, value in rows)])
