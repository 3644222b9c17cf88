"""Every ratio in one table: what is fast, what is not, against what people use today.

    DATA_ROOT=/path/to/data make bench
    DATA_ROOT=/path/to/data FULL=1 make bench                (adds states of 1 GB and two processes)

Calls the other programs here, one after the other, with few rounds; each says how it measures.
`ratio` is how many times better ours is, or, where a cost is asked for, ours over theirs, as the
aim beside it reads: `>=` or `<=`.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from report import machine, ratio, require_mnist, table

FULL = os.environ.get("FULL") == "1"


@dataclass(frozen=True)
class Row:
    """`at_least`: whether a larger ratio is better; else a smaller one. `aim`: None where there is
    none.
    """

    question: str
    ours: str
    against: str
    theirs: str
    ratio: float
    aim: float | None
    at_least: bool = True

    @property
    def cells(self) -> list[str]:
        cells = [self.question, self.ours, self.against, self.theirs, ratio(self.ratio)]
        if self.aim is None:
            return [*cells, "-", ""]
        reached = self.ratio >= self.aim if self.at_least else self.ratio <= self.aim
        sign = ">=" if self.at_least else "<="
        return [*cells, f"{sign} {ratio(self.aim)}", "" if reached else "missed"]


def secs(value: float) -> str:
    return f"{1000 * value:.1f} ms" if value < 0.1 else f"{value:.2f} s"


def classic_rows() -> Iterator[Row]:
    import classic

    rounds = [(classic.measure_fast(), classic.measure_classic(FULL and i == 0)) for i in range(2)]
    for key, question, aim in (
        ("wall", "to 99.0 %, whole process", 20.0),
        ("fit", "to 99.0 %, fit alone", 35.0),
    ):
        ours, theirs = (median(found[side][key] for found in rounds) for side in (0, 1))
        yield Row(
            question, secs(ours), "classic pipeline, scaled", secs(theirs), theirs / ours, aim
        )


def throughput_rows() -> Iterator[Row]:
    import throughput

    fit = throughput.measure_fit(epochs=1, rounds=4)
    ours, often, bare, stock = (
        fit[name] for name in ("ours", "ours, every 50 steps", "bare loop", "stock Trainer")
    )
    yield Row("images/s in fit", f"{ours:,.0f}", "bare loop", f"{bare:,.0f}", ours / bare, 0.90)
    yield Row(
        "time of a step",
        f"{ours:,.0f}/s",
        "stock Trainer, no saves",
        f"{stock:,.0f}/s",
        stock / ours,
        1.03,
        False,
    )
    yield Row(
        "  saved every 50",
        f"{often:,.0f}/s",
        "the same",
        f"{stock:,.0f}/s",
        stock / often,
        1.10,
        False,
    )
    loading = throughput.measure_batches(rounds=3)
    ours = loading["our batches"]
    theirs = loading["torchvision, 0 workers"]
    yield Row(
        "batches/s alone",
        f"{ours:,.0f}",
        "torchvision, DataLoader",
        f"{theirs:,.0f}",
        ours / theirs,
        10.0,
    )


def saves_rows() -> Iterator[Row]:
    import saves

    for megabytes, rounds in ((0.3, 30), (100.0, 7), *([(1000.0, 5)] if FULL else [])):
        found = saves.child("--megabytes", str(megabytes), "--rounds", str(rounds))
        size = found["sizes"]["state"] / 1e6
        waits = {name: median(row["waits"]) for name, row in found["found"].items()}
        memory = {
            name: median(row["memory"]) / found["sizes"]["state"]
            for name, row in found["found"].items()
        }

        def over(
            name: str,
            other: str,
            aim: float | None,
            at_least: bool,
            w: Any = waits,
            size: float = size,
        ) -> Row:
            value = w[other] / w[name] if at_least else w[name] / w[other]
            question = (
                f"save of {size:.1f} MB" if name == "ours" else f"  {name.removeprefix('ours, ')}"
            )
            return Row(question, secs(w[name]), other, secs(w[other]), value, aim, at_least)

        yield over("ours", "Lightning + fsync", None if megabytes < 10 else 3.0, True)
        if megabytes < 10:
            raw = waits["raw write + fsync"]
            yield over("ours", "raw write + fsync", (raw + 0.005) / raw, False)
        if megabytes >= 10:
            yield over("ours", "raw write + fsync", 0.8, True)
            yield over("ours", "torch.save + fsync", None, True)
            yield over("ours", "DCP", None, True)
            yield over("ours, async", "memcpy", 1.2, False)
            yield over("ours, async", "DCP async", None, True)
            taken = f"{100 * memory['ours']:.1f} %", f"{100 * memory['Lightning + fsync']:.0f} %"
            yield Row(
                "  memory, of the state",
                taken[0],
                "Lightning + fsync",
                taken[1],
                max(0.0, memory["ours"]),
                0.02,
                False,
            )
    steps = saves.child("--steps")
    slower = steps["ours, async"] / steps["alone"]
    yield Row(
        "a step while writing",
        secs(steps["ours, async"]),
        "the same alone",
        secs(steps["alone"]),
        slower,
        1.10,
        False,
    )


def starts_rows() -> Iterator[Row]:
    import starts

    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        found = starts.small(3, Path(folder))
        base = found["import lightning"]
        fresh = found["a fresh start"]
        for name, against, other, aim in (
            ("a wrong key", "import lightning", base, 0.5 / base),
            ("savepoint ls", "import lightning", base, 0.2 / base),
            ("savepoint verify", "import lightning", base, 0.2 / base),
            ("a fresh start", "import lightning", base, (base + 0.3) / base),
            ("a resume", "a fresh start", fresh, (fresh + 0.3) / fresh),
        ):
            question = (
                f"{name}, to step 1"
                if name.startswith(("a fresh", "a resume"))
                else f"{name}, to its end"
            )
            yield Row(
                question, secs(found[name]), against, secs(other), found[name] / other, aim, False
            )
        if FULL:
            found = starts.large(3, 1000.0, Path(folder))
            ours = found["a resume"]
            theirs = found["Lightning's resume"]
            yield Row(
                "resume of 1 GB, to step 1",
                secs(ours),
                "Lightning's",
                secs(theirs),
                theirs / ours,
                1.0,
            )
            ours -= found["a fresh start"]
            theirs -= found["Lightning's fresh start"]
            yield Row(
                "  after a fresh start",
                secs(ours),
                "Lightning's after its own",
                secs(theirs),
                theirs / ours,
                None,
            )


def growth_rows() -> Iterator[Row]:
    import growth

    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        grown = growth.by_bytes(3, Path(folder))
        small = grown[4]["save"]
        large = grown[64]["save"]
        yield Row(
            "save of 256 MB", secs(large), "one of 16 MB", secs(small), large / small, 20.0, False
        )
        counted = growth.by_count(3, Path(folder))
        few = counted[1]["save"]
        many = counted[100]["save"]
        yield Row(
            "save beside 100 kept", secs(many), "beside 1 kept", secs(few), many / few, 1.5, False
        )
        whole, _ = growth.listing(2, Path(folder))
        yield Row("ls of 10,000", secs(whole), "a second", "1 s", whole, 1.0, False)


def processes_rows() -> Iterator[Row]:
    import processes

    found = processes.measure(rounds=2)
    one = found["one process"]
    two = found["two processes"]
    yield Row(
        "images/s, two processes", f"{two:,.0f}", "one process", f"{one:,.0f}", two / one, 1.0
    )


PARTS: tuple[Callable[[], Iterator[Row]], ...] = (
    classic_rows,
    throughput_rows,
    saves_rows,
    starts_rows,
    growth_rows,
)


def main() -> int:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    require_mnist()
    print(f"On {machine()}", flush=True)
    rows = []
    begun = time.monotonic()
    for part in (*PARTS, *([processes_rows] if FULL else [])):
        print(
            f"{part.__name__.removesuffix('_rows')}, after {time.monotonic() - begun:.0f} s",
            flush=True,
        )
        rows += [row.cells for row in part()]
    print("\n" + table(["question", "ours", "against", "theirs", "ratio", "aim", ""], rows))
    print(
        f"{time.monotonic() - begun:.0f} s. A ratio of `>=` is how many times better ours is, one "
        "of `<=` ours over theirs."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
