"""The power is cut under a real training, on real file systems: what was reported as saved is there
afterwards.

    python -m pytest -n 0 -m root -s tests/faults/test_power_cut.py

The kernel's shutdown call stands for the power cut: from then on nothing reaches the device,
whatever the page cache holds. After 12 s ext4 has put the names of new files on the device and not
yet their bytes, after 31 s XFS has: so long is the wait between the last save and the cut. A `sync`
of anybody on the machine in that time would hide a loss.
"""

import json
import random
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import pytest
from support.filesystems import disk, enter_private_namespace, require_tools
from support.forked import Program, run, without_fsync
from support.small import difference, final_state, rows, zip_rows

from savepoint.checkpoint import manifest, store
from savepoint.errors import CheckpointError

pytestmark = pytest.mark.root

# 14 MB of state, and 24 steps that take a second.
TRAINING = [
    "train.py", "--data", "configs/data/digits.yaml", "--data.batch_size", "16", "--model", "configs/model/classic.yaml",
    "--trainer.limit_train_batches", "12", "--trainer.max_epochs", "2", "--trainer.log_every_n_steps", "1",
]  # fmt: skip
KINDS = ("ext4", "xfs")
# Seconds from the report of a save to the cut; the longest waits begin first.
DELAYS = (31.0, 12.0, 0.2)
KEPT = {"the last": ["--checkpoint.keep_last", "1"], "three": ["--checkpoint.keep_last", "3"],
        "all": ["--checkpoint.keep_every_n_steps", "1"]}  # fmt: skip
NUMBER = {"the last": 1, "three": 3, "all": 10**6}


@dataclass
class Cut:
    """One cut: where, when, and what was found afterwards. No `delay`: at some moment while saves
    are made.
    """

    kind: str
    delay: float | None
    kept: str = "the last"
    async_save: bool = False
    before: Callable[[], None] | None = None
    reported: list[int] = field(default_factory=list)
    found: list[int] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    missing_rows: int = 0
    failure: str = ""  # of the resume, or why it was not tried

    @property
    def clean(self) -> bool:
        return bool(self.reported and self.found) and not (
            self.lost or self.damaged or self.missing_rows or self.failure
        )

    def command(self, run_dir: Path) -> list[str]:
        return [
            *TRAINING, *KEPT[self.kept], "--checkpoint.async_save", str(self.async_save).lower(), "--resume", "auto",
            "--checkpoint.save_every_steps", "1" if self.delay is None else "4",
            "--output_dir", str(run_dir.parent), "--run_name", run_dir.name,
        ]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def mounts() -> None:
    enter_private_namespace()
    for kind in KINDS:
        require_tools(kind)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, mounts: None) -> Path:
    """The same training, undisturbed."""
    run_dir = tmp_path_factory.mktemp("outputs") / "straight"
    code, said = run(Cut("", 0.2).command(run_dir), run_dir.parent / "log")
    assert code == 0, said
    return run_dir


def perform(cut: Cut, folder: Path, straight: Path) -> Cut:
    folder.mkdir(parents=True)
    with disk(folder, cut.kind, 400) as made:
        run_dir = made.directory / "run"
        with Program(cut.command(run_dir), folder / "log", cut.before) as program:
            if cut.delay is None:
                program.wait_for(lambda: program.saved)
                time.sleep(random.uniform(0.0, 0.8))
            else:
                program.wait_for(lambda: len(program.saved) >= 3)
                # The next save is not reported before the cut, perhaps begun.
                program.signal(signal.SIGSTOP)
                time.sleep(cut.delay)
            made.cut()
        cut.reported = program.saved
        made.unmount()
        made.mount()
        look(cut, run_dir, straight)
        go_on(cut, run_dir, folder / "log", straight)
    return cut


def look(cut: Cut, run_dir: Path, straight: Path) -> None:
    for path in sorted((run_dir / "checkpoints").glob("*.ckpt")):
        try:
            step = manifest.verify(path)["step"]
            cut.found += [step] if path.name.startswith("step-") else []
        except (CheckpointError, OSError) as error:
            cut.damaged.append(f"{path.name}: {error}")
    # Retention may have deleted one that enough newer ones follow.
    newer = {step: sum(other > step for other in cut.found) for step in cut.reported}
    cut.lost = [
        step for step in cut.reported if step not in cut.found and newer[step] < NUMBER[cut.kept]
    ]
    if cut.found and not cut.damaged:
        state, _ = store.load(run_dir / f"checkpoints/step-{max(cut.found):08d}.ckpt")
        counted = slice(state["logged_rows"])
        cut.missing_rows = sum(
            one != other for one, other in zip_rows(rows(straight)[counted], rows(run_dir)[counted])
        )


def go_on(cut: Cut, run_dir: Path, log: Path, straight: Path) -> None:
    """By the same command, or by resume.py, in turn."""
    try:
        begun = len(json.loads((run_dir / "run.json").read_text())["starts"])
    except (OSError, ValueError) as error:
        cut.failure = f"run.json: {error}"
        return
    if not cut.found:
        cut.failure = "nothing to resume"
        return
    same = (max(cut.found) // 4) % 2
    code, said = run(cut.command(run_dir) if same else ["resume.py", str(run_dir)], log)
    begins = f"from step-{max(cut.found):08d}.ckpt", "Finished"
    if code or "Traceback" in said or not any(words in said for words in begins):
        cut.failure = said
        return
    other = final_state(run_dir) | {"config": ""}  # it says how often to save
    unequal = list(difference(final_state(straight) | {"config": ""}, other))
    unequal += ["rows differ"] if rows(straight) != rows(run_dir) else []
    unequal += ["no second start in run.json"] if begun != 1 else []
    unequal += [f"left: {path.name}" for path in run_dir.rglob(".*tmp*")]
    cut.failure = "; ".join(unequal)


def side_by_side(cuts: list[Cut], folder: Path, straight: Path, number: int = 12) -> list[Cut]:
    # The threads begin in the mount namespace of the one that makes them.
    with ThreadPoolExecutor(number) as pool:
        return list(
            pool.map(
                lambda item: perform(item[1], folder / str(item[0]), straight), enumerate(cuts)
            )
        )


def table(cuts: list[Cut]) -> str:
    groups: dict[tuple[str, str], list[Cut]] = defaultdict(list)
    for cut in cuts:
        groups[
            (cut.kind, "while saving" if cut.delay is None else f"{cut.delay:g} s after")
        ].append(cut)
    lines = [
        "file system  cut              cuts  reported  lost  damaged  rows missing  failed resumes"
    ]
    for (kind, when), group in sorted(groups.items()):
        counts = [
            len(group), sum(len(cut.reported) for cut in group), sum(len(cut.lost) for cut in group),
            sum(len(cut.damaged) for cut in group), sum(cut.missing_rows for cut in group),
            sum(bool(cut.failure) for cut in group),
        ]  # fmt: skip
        widths = (4, 8, 4, 7, 12, 14)
        numbers = "  ".join(
            f"{count:{width}d}" for count, width in zip(counts, widths, strict=True)
        )
        lines.append(f"{kind:<11}  {when:<15}  {numbers}")
    return "\n".join(lines)


def unclean(cuts: list[Cut]) -> Iterator[str]:
    for cut in cuts:
        if not cut.clean:
            yield f"{cut}"


def test_every_reported_save_outlives_a_power_cut(tmp_path: Path, straight: Path) -> None:
    """36 cuts: two file systems, three delays, saves at once and in a thread, three retentions."""
    plans = product(DELAYS, KINDS, KEPT, (False, True))
    cuts = side_by_side(
        [Cut(kind, delay, kept, later) for delay, kind, kept, later in plans], tmp_path, straight
    )
    print("\n" + table(cuts))
    assert len(cuts) == 36
    assert all(cut.clean for cut in cuts), "\n".join(unclean(cuts))


def test_a_power_cut_in_the_middle_of_saves_leaves_the_last_reported_one(
    tmp_path: Path, straight: Path
) -> None:
    """24 cuts, at random moments of a training that saves at every step."""
    plans = product(KINDS, ("the last", "three"), (False, True), range(3))
    cuts = side_by_side(
        [Cut(kind, None, kept, later) for kind, kept, later, _ in plans], tmp_path, straight, 4
    )
    print("\n" + table(cuts))
    assert len(cuts) == 24
    assert all(cut.clean for cut in cuts), "\n".join(unclean(cuts))


def test_without_fsync_the_same_cuts_lose_what_was_reported(tmp_path: Path, straight: Path) -> None:
    """The cuts are real: the tests above could fail."""
    plans = (("xfs", 31.0), ("ext4", 12.0), ("xfs", 0.2), ("ext4", 0.2))
    cuts = side_by_side(
        [Cut(kind, delay, before=without_fsync) for kind, delay in plans], tmp_path, straight
    )
    print("\n" + table(cuts))
    assert not any(cut.clean for cut in cuts), table(cuts)
    assert all(cut.lost for cut in cuts if cut.delay == 0.2), table(cuts)
