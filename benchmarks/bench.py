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
from importlib.util import find_spec
from pathlib import Path
from statistics import median

from report import alone, machine, ratio, require_mnist, table

FULL = os.environ.get("FULL") == "1"


@dataclass(frozen=True)
class Row:
    """`aim`: such as ">= 3", how many times better ours is to be, or "<= 1.2", how many times as
    costly it may be; the sign alone where there is no aim. `unit`: s, /s (more is better) or MB.
    """

    question: str
    ours: float
    against: str
    theirs: float
    aim: str = ">="
    unit: str = "s"

    @property
    def cells(self) -> list[str]:
        found = self.ours / self.theirs
        sign, _, aim = self.aim.partition(" ")
        if (sign == ">=") != (self.unit == "/s"):
            found = self.theirs / self.ours if self.ours else 0.0
        shown = [self.question, self.text(self.ours), self.against, self.text(self.theirs)]
        if not aim:
            return [*shown, ratio(found), "-", ""]
        reached = found >= float(aim) if sign == ">=" else found <= float(aim)
        return [*shown, ratio(found), f"{sign} {ratio(float(aim))}", "" if reached else "missed"]

    def text(self, value: float) -> str:
        if self.unit == "s":
            return f"{1000 * value:.1f} ms" if value < 0.1 else f"{value:.2f} s"
        return f"{value:,.0f}{self.unit}" if self.unit == "/s" else f"{value:,.1f} {self.unit}"


def classic_rows() -> Iterator[Row]:
    import classic

    rounds = [(classic.measure_fast(), classic.measure_classic(FULL and i == 0)) for i in range(2)]
    for key, question, aim in (
        ("wall", "to 99.0 %, whole process", ">= 30"),
        ("fit", "to 99.0 %, fit alone", ">= 35"),
    ):
        ours, theirs = (median(found[side][key] for found in rounds) for side in (0, 1))
        yield Row(question, ours, "classic pipeline, scaled", theirs, aim)


def throughput_rows() -> Iterator[Row]:
    import throughput

    fit = throughput.measure_fit(epochs=1, rounds=3, warm_steps=60)
    ours = fit["ours"]
    stock = fit["stock Trainer"]
    yield Row("images in fit", ours, "bare loop", fit["bare loop"], ">= 0.95", "/s")
    yield Row("a step, as images", ours, "stock Trainer, no saves", stock, "<= 1.03", "/s")
    often = fit["ours, every 50 steps"]
    yield Row("  saved every 50", often, "the same", stock, "<= 1.10", "/s")
    loading = throughput.measure_batches(rounds=2, workers=(0,))
    ours = loading["our batches"]
    theirs = loading["torchvision, 0 workers"]
    yield Row("batches alone, as images", ours, "torchvision, DataLoader", theirs, ">= 10", "/s")


def saves_rows() -> Iterator[Row]:
    import saves

    small = ["--only", "ours", "Lightning + fsync", "raw write + fsync"]
    kinds: list[tuple[float, int, list[str]]] = [(0.3, 20, small), (100.0, 7, [])]
    for megabytes, rounds, only in [*kinds, *([(1000.0, 5, [])] if FULL else [])]:
        found = saves.child("--megabytes", str(megabytes), "--rounds", str(rounds), *only)
        yield from saves_of(megabytes, found["sizes"]["state"] / 1e6, found["found"])
    steps = saves.child("--steps", "--only", "ours, async")
    writing = steps["ours, async"]
    yield Row("a step while 300 MB are written", writing, "alone", steps["alone"], "<= 1.10")


def saves_of(megabytes: float, size: float, found: dict[str, dict[str, list[float]]]) -> list[Row]:
    waits = {name: median(row["waits"]) for name, row in found.items()}

    def beside(other: str, aim: str = ">=", ours: str = "ours") -> Row:
        question = f"{'async ' if ours != 'ours' else ''}save of {size:,.1f} MB"
        return Row(question, waits[ours], other, waits[other], aim)

    if megabytes < 10:
        raw = waits["raw write + fsync"]
        return [
            beside("Lightning + fsync", ">= 1"),
            beside("raw write + fsync", f"<= {(raw + 0.005) / raw}"),
        ]
    memory = {name: median(row["memory"]) / 1e6 for name, row in found.items()}
    theirs = memory["Lightning + fsync"] / size
    state = f"the state (Lightning: {ratio(theirs)})"
    return [
        beside("Lightning + fsync", ">= 3"),
        beside("raw write + fsync", ">= 0.95"),
        beside("torch.save + fsync"),
        beside("DCP"),
        beside("memcpy", "<= 1.2", "ours, async"),
        beside("DCP async", ours="ours, async"),
        Row("  its memory", max(0.0, memory["ours"]), state, size, "<= 0.02", "MB"),
    ]


def starts_rows() -> Iterator[Row]:
    import starts

    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        found = starts.small(3, Path(folder), warm=False)
        base = found["import lightning"]
        for name, aim in (
            ("a wrong key", 0.5 / base),
            ("savepoint ls", 0.2 / base),
            ("savepoint verify", 0.2 / base),
        ):
            yield Row(f"{name}, to its end", found[name], "import lightning", base, f"<= {aim}")
        fresh = found["a fresh start"]
        resumed = found["a resume"]
        yield Row("a fresh start, to step 1", fresh, "import lightning", base, "<= 0.6")
        yield Row("a resume, to step 1", resumed, "a fresh start", fresh, f"<= {1 + 0.3 / fresh}")
        if FULL:
            found = starts.large(3, 1000.0, Path(folder))
            ours = found["a resume"]
            theirs = found["Lightning's resume"]
            yield Row("a resume of 1 GB, to step 1", ours, "Lightning's", theirs, ">= 1")
            ours -= found["a fresh start"]
            theirs -= found["Lightning's fresh start"]
            yield Row("  after a fresh start", ours, "Lightning's after its own", theirs)


def memory_rows() -> Iterator[Row]:
    import starts

    for megabytes in (100.0, *([1000.0] if FULL else [])):
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            found = starts.memory(megabytes, Path(folder))
        state = found["state"]
        against = f"the state (Lightning: {ratio(found['Lightning'] / state)})"
        question = f"memory of a resume, {megabytes:,.0f} MB"
        yield Row(question, found["ours"], against, state, "<= 1.1", "MB")


def growth_rows() -> Iterator[Row]:
    import growth

    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        grown = growth.by_bytes(3, Path(folder), (4, 64, *([256] if FULL else [])))
        small = grown[4]["save"]
        yield Row("save of 256 MB", grown[64]["save"], "one of 16 MB", small, "<= 20")
        largest = grown[max(grown)]
        size = "1 GB" if FULL else "256 MB"
        for name in ("verify", "load"):
            yield Row(f"{name} of {size}", largest[name], "one read", largest["read"], "<= 1.2")
        anew = largest["read anew"]
        yield Row(f"load of {size}", largest["load"], "one read into new memory", anew, "<=")
        counted = growth.by_count(3, Path(folder))
        few = counted[1]["save"]
        yield Row("save beside 100 kept", counted[100]["save"], "beside 1 kept", few, "<= 1.5")
        whole, _ = growth.listing(2, Path(folder))
        yield Row("ls of 10,000", whole, "a second", 1.0, "<= 0.3")


def ranks_rows() -> Iterator[Row]:
    """States that several processes save and load together."""
    ways = {"FSDP2": "shards", "DDP": "shared out (DDP)", "": "one file of the first rank"}
    for ranks in (2, 4):
        found = alone("shards", "measure", ranks, 300.0, 4, list(ways.values()))
        for kind, way in list(ways.items())[:2]:
            question = f"save of 300 MB in {ranks} shards, {kind}"
            yield Row(question, found[way]["secs"], "one file", found[ways[""]]["secs"], "<= 0.75")
        held = found["shards"]
        yield Row(
            "  memory of the first rank", held["memory"], "the state", held["state"], "<=", "MB"
        )
    single, *more = alone("processes", "measure_fits", [1, 2, 4], 50.0, 3)
    for one in more:
        of = f"{one['ranks']} processes"
        yield Row(f"save of 50 MB, {of}", one["save"], "one process", single["save"], "<=")
        yield Row(f"fit's resume, {of}", one["resume"], "fit, anew", one["fresh"], "<=")


def mirror_rows() -> Iterator[Row]:
    found = alone("mirror", "measure", 3, 40)
    for name, rate in found.items():
        if name != "no mirror":
            yield Row(f"steps, {name}", rate, "no mirror", found["no mirror"], "<= 1.02", "/s")


def federated_rows() -> Iterator[Row]:
    if not find_spec("flwr") or not find_spec("ray"):
        print("  left out: plain Flower needs make extras-federated", flush=True)
        return
    ours, *rivals = alone("federated", "compared", 1000, *((4, 3) if FULL else (2, 1)))
    for name, _, cpu in rivals:
        yield Row("CPU of a federated round", ours[2], name, cpu, ">= 5")


def processes_rows() -> Iterator[Row]:
    import processes

    found = processes.measure(rounds=2)
    one = found["one process"]
    yield Row("images, two processes", found["two processes"], "one process", one, ">= 1", "/s")


PARTS: tuple[Callable[[], Iterator[Row]], ...] = (
    classic_rows,
    throughput_rows,
    saves_rows,
    starts_rows,
    memory_rows,
    growth_rows,
    ranks_rows,
    mirror_rows,
    federated_rows,
    *([processes_rows] if FULL else []),
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [part.__name__.removesuffix("_rows") for part in PARTS]
    parser.add_argument("--parts", nargs="+", choices=names, default=names, help="default: all")
    asked = parser.parse_args()
    require_mnist()
    print(f"On {machine()}", flush=True)
    rows = []
    begun = time.monotonic()
    parts = [part for name, part in zip(names, PARTS, strict=True) if name in asked.parts]
    for part in parts:
        name = part.__name__.removesuffix("_rows")
        print(f"{name}, after {time.monotonic() - begun:.0f} s", flush=True)
        rows += [row.cells for row in part()]
    print("\n" + table(["question", "ours", "against", "theirs", "ratio", "aim", ""], rows))
    print(
        f"{time.monotonic() - begun:.0f} s. A ratio of `>=` is how many times better ours is, one "
        "of `<=` ours over theirs."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
