"""The page that shows a run: its numbers, nothing from elsewhere, no name that acts, and no run too
damaged to be shown.
"""

import io
import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from fnmatch import fnmatch
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from support import chromium
from support.checkpoint_files import small_state
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import SummaryWriter

from savepoint import report as report_package
from savepoint import words
from savepoint.checkpoint import store
from savepoint.checkpoint.retention import Retention
from savepoint.checkpoint.store import CheckpointStore
from savepoint.commands import main
from savepoint.report.curves import Chart, series_of, steps_by
from savepoint.words import python

CONFIG = "model: {lr: 0.1}\ncheckpoint: {keep_last: 2, keep_best: 1, keep_every_n_epochs: null, mode: max}\n"
HOSTILE = (
    """<script>document.title='hacked'</script><img src=x onerror="document.title='hacked'">'"&"""
)


class Seen(HTMLParser):
    """What a page holds.

    Attributes:
        words: All text that is shown, each piece of white space as one space.
    """

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._text, self._within = list[str](), ""
        self.source = file.read_text(encoding="utf-8")
        self.feed(self.source)
        self.words = " ".join(" ".join(self._text).split())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        self._within = tag

    def handle_endtag(self, tag: str) -> None:
        self._within = ""

    def handle_data(self, data: str) -> None:
        if self._within not in ("style", "script"):
            self._text.append(data)

    def all(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        return [
            found
            for name, found in self.tags
            if name == tag and attributes.items() <= found.items()
        ]

    def charts(self) -> dict[str, dict[str, Any]]:
        """By name, what the script is given of each chart."""
        data = self.source.split('id="values">')[1].split("</script>")[0]
        names = [piece.split("</h3>")[0] for piece in self.source.split("<figcaption><h3>")[1:]]
        return dict(zip(names, json.loads(data)["charts"], strict=False))


def facts(step: int, score: float, **more: Any) -> dict[str, Any]:
    measured = {"val/accuracy": {"value": score, "step": step}}
    ranking = {
        "monitor": "val/accuracy",
        "mode": "max",
        "score": score,
        "best_score": max(score, 0.9),
    }
    made = {
        "created": "2026-11-21T14:55:00+00:00",
        "dataset": {"name": "MNIST", "fingerprint": "f00d"},
    }
    return (
        {"step": step, "epoch": step // 10, "metrics": measured, "at": "epoch", "reason": "epochs"}
        | ranking
        | made
        | more
    )


def began(checkpoint: str | None, step: int, **more: Any) -> dict[str, Any]:
    return {
        "time": "2026-11-21T14:53:44+00:00",
        "argv": ["train.py", "--run_name", "a name"],
        "git": {"commit": "24a1e8f9e2f0ee23", "dirty": True},
        "versions": {"python": "3.11.7", "torch": "2.15.0"},
        "host": "here",
        "hardware": "x86_64, 2 cores",
        "checkpoint": checkpoint,
        "step": step,
        "changed": {},
        "world_size": 1,
    } | more


def run_json(starts: list[dict[str, Any]]) -> str:
    return json.dumps({"id": "1", "name": "a", "created": "x", "starts": starts})


def make_run(directory: Path, pictures: bool = False) -> Path:
    """Finished at step 40: stopped at 20, damaged at 30 and taken up again at 20, rewound from 50."""
    checkpoints = directory / "checkpoints"
    kept = CheckpointStore(
        checkpoints, retention=Retention(keep_last=2), monitor="val/accuracy", mode="max"
    )
    for step, score in ((20, 0.9), (30, 0.85)):
        kept.add(small_state(), facts(step, score))
    kept.add(small_state(), facts(40, 0.88, reason="end", ended="max_epochs"))
    damaged = kept.path(30).with_name("step-00000030.ckpt.corrupt")
    damaged.write_bytes(kept.path(20).read_bytes()[:-200])
    store.write(
        directory / "rewound" / "20261121-1455-from-step-50" / "step-00000050.ckpt",
        small_state(),
        facts(50, 0.7),
    )
    starts = [
        began(None, 0, versions={"python": "3.11.7", "torch": "2.14.0"}),
        began("step-00000020.ckpt", 20, changed={"model.lr": [0.2, 0.1]}),
    ]
    (directory / "run.json").write_text(run_json(starts))
    summary = {
        "test/loss": 0.5,
        "test/accuracy": 0.9876,
        "steps": 40,
        "fit_secs": 75.2,
        "parameters": 1234,
    }
    (directory / "summary.json").write_text(
        json.dumps(summary | {"dataset": "MNIST", "samples_per_sec": 100})
    )
    (directory / "config.yaml").write_text(CONFIG)
    rows = ["step,time/secs,epoch,train/loss,val/loss,val/accuracy,lr"]
    rows += [
        f"{step},{step / 2},0,{1 / (step + 1)},{2 / (step + 1) if step % 10 == 9 else ''},,0.01"
        for step in range(40)
    ]
    rows += ["19,9.5,1,,,0.9,", "39,20,1,,,0.88,"]
    (directory / "metrics.csv").write_text("\n".join(rows) + "\n")
    if pictures:
        with SummaryWriter(str(directory)) as writer:
            writer.add_image("test/confusion", torch.zeros(3, 8, 8), 40)
    return directory


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("outputs") / "first", pictures=True)


@pytest.fixture
def run_dir(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "first"))


def report(run_dir: Path) -> Seen:
    assert main(["report", str(run_dir)]) == 0
    return Seen(run_dir / "report.html")


@pytest.fixture(scope="module")
def seen(made: Path) -> Seen:
    assert main(["report", str(made), "-o", str(made.parent / "seen.html")]) == 0
    return Seen(made.parent / "seen.html")


# -- what it says --------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [
    "first finished MNIST · 1,234 parameters · begun 2026-11-21 14:53 · 2 starts · ended by "
    "max_epochs",
    "test accuracy 98.76 %",
    "test loss 0.5000",
    "best val/accuracy 90.00 % at step 20",
    "steps 40 4 epochs",
    "time in training 1 min 15 s 100 samples/s",
    "resume.py",
    "--trainer.max_epochs 8",
    "Start 2 resumed from step-00000020.ckpt",
    "python train.py --run_name 'a name'",
    "Changed model.lr: 0.2 → 0.1",
    "commit 24a1e8f9e2f0, with changes that are not committed",
    "torch 2.15.0 (2.14.0 before)",
    "model: {lr: 0.1}",
    "Retention: keep_last 2, keep_best 1.",
])  # fmt: skip
def test_the_page_says(seen: Seen, words: str) -> None:
    assert words in seen.words


@pytest.mark.parametrize(("file", "fate"), [
    ("step-00000020.ckpt best 20 2 90.00 %", "kept: the best"),
    ("step-00000030.ckpt 30 3 85.00 %", "kept: 2nd newest"),
    ("step-00000040.ckpt latest 40 4 88.00 %", "kept: the newest"),
    ("step-00000030.ckpt.corrupt 30 -", "was quarantined: "),
    ("step-00000050.ckpt 50 5 70.00 %", "rewound: set aside in rewound/20261121-1455-from-step-50"),
])  # fmt: skip
def test_each_checkpoint_is_listed_with_its_fate(seen: Seen, file: str, fate: str) -> None:
    row = seen.words.split(file)[1].split(".ckpt")[0]
    assert fate in row


def test_each_checkpoint_stands_in_the_time_line(seen: Seen) -> None:
    (line,) = [
        found
        for found in seen.all("svg")
        if (found.get("aria-label") or "").startswith("Checkpoints by step")
    ]
    assert str(line["aria-label"]).endswith(
        "in the run: step 20, best, step 30, step 40, latest; damaged: step 30; rewound: step 50"
    )


def test_resumes_and_faults_are_marked_on_every_chart(seen: Seen) -> None:
    charts = len(seen.charts())
    assert charts == 3
    assert len(seen.all("line", **{"class": "mark resume"})) == charts
    assert len(seen.all("line", **{"class": "mark fault"})) == 2 * charts


def test_what_happened_is_told_in_the_order_of_time(run_dir: Path) -> None:
    record = json.loads((run_dir / "run.json").read_text())
    record["starts"] = [
        began(None, 0),
        began(
            "step-00000020.ckpt",
            20,
            time="2026-11-21T15:00:00+00:00",
            took_over="pid 7 on here",
            reached=34,
        ),
        began("step-00000035.ckpt", 35, time="2026-11-21T16:00:00+00:00", reached=34),
    ]
    (run_dir / "run.json").write_text(json.dumps(record))
    for name, hour in (
        ("checkpoints/step-00000030.ckpt.corrupt", 14),
        ("rewound/20261121-1455-from-step-50", 17),
    ):
        when = datetime(2026, 11, 21, hour, tzinfo=UTC).timestamp()
        os.utime(run_dir / name, (when, when))
    told = report(run_dir).words.split("What happened ")[1]
    expected = (
        "1 step 30 step-00000030.ckpt.corrupt was quarantined: ",
        "2 step 34 Start 1 was killed at step 34 or later",
        "3 step 20 Start 2 resumed from step-00000020.ckpt: 14 steps or more trained again",
        "4 step 35 Start 3 resumed from step-00000035.ckpt",
        "5 step 50 The run was at step 50 and was rewound",
    )
    places = [told.find(text) for text in expected]
    assert places == sorted(places)
    assert places[0] == 0


def test_a_fork_names_the_run_that_it_began_from(run_dir: Path) -> None:
    record = json.loads((run_dir / "run.json").read_text())
    record["starts"] = [began("step-00000020.ckpt", 20, parent={"id": "1", "name": "origin"})]
    (run_dir / "run.json").write_text(json.dumps(record))
    assert "Start 1 began from step-00000020.ckpt of origin" in report(run_dir).words


@pytest.mark.parametrize(("name", "content", "said"), [
    ("summary.json", b"{", "summary.json is damaged: the results are not known."),
    ("config.yaml", b"\xff\xfe: [", "config.yaml is damaged."),
])  # fmt: skip
def test_a_damaged_record_is_told_apart_from_one_that_is_old_or_missing(
    run_dir: Path, name: str, content: bytes, said: str
) -> None:
    assert said not in report(run_dir).words
    (run_dir / name).write_bytes(content)
    assert said in report(run_dir).words


def test_train_and_val_of_a_quantity_stand_in_one_chart_and_that_of_the_monitor_comes_first(
    seen: Seen,
) -> None:
    charts = seen.charts()
    assert list(charts) == ["accuracy", "loss", "lr"]
    assert [series["role"] for series in charts["loss"]["series"]] == ["train", "val"]
    assert charts["loss"]["series"][1] == {
        "role": "val",
        "steps": [9, 19, 29, 39],
        "values": [0.2, 0.1, 0.06666667, 0.05],
    }


@pytest.mark.parametrize(("names", "quantity", "labels"), [
    ("train/loss val/loss", "loss", "train val"),
    ("loss val_loss", "loss", "loss val"),
    ("loss_train loss_val loss_test", "loss", "train val test"),
    ("loss/train loss/val", "loss", "train val"),
    ("Train.Loss Val.Loss", "Loss", "train val"),
    ("train_epoch/loss eval-loss testing/loss", "loss", "train eval testing"),
    ("avg_train_loss_epoch avg_val_loss", "avg_loss", "train val"),
    ("metrics/train/acc metrics/valid/acc", "metrics/acc", "train valid"),
    ("val/f1/dataloader_idx_0 val/f1/dataloader_idx_1", "f1", "val 0|val 1"),
    ("train/loss_step train/loss_epoch", "loss", "train|train each step"),
    ("loss_step loss_epoch", "loss", "loss_epoch loss_step"),
])  # fmt: skip
def test_one_quantity_stands_in_one_chart_whatever_the_parts_of_the_data_are_called(
    names: str, quantity: str, labels: str
) -> None:
    columns = [series_of(name) for name in names.split()]
    assert {one.quantity for one in columns} == {quantity}
    for one in columns:
        one.points.append((0, 0))
    drawn = Chart(quantity, columns).series
    assert [one.label for one in drawn] == labels.split("|" if "|" in labels else None)


@pytest.mark.parametrize(
    "name", ["std_dev", "train_val_gap", "trainer/x", "val", "test_epoch", "lr-Adam/pg1"]
)
def test_a_name_that_only_looks_like_one_of_a_part_of_the_data_is_its_own_label(name: str) -> None:
    one = series_of(name)
    assert (one.label, one.role) == (name, "other")


def test_where_only_the_validation_names_its_part_the_other_line_is_that_of_the_training() -> None:
    columns = [series_of("loss"), series_of("val_loss")]
    for one in columns:
        one.points.append((0, 0))
    assert [one.role for one in Chart("loss", columns).series] == ["train", "val"]


def rewritten(run_dir: Path, **more: Any) -> None:
    """The checkpoints of the run with more facts."""
    for path in (run_dir / "checkpoints").glob("step-*.ckpt"):
        state, known = store.load(path)
        changed = {key: value(known["step"]) for key, value in more.items()}
        store.write(path, state, known | changed)


def test_of_several_optimizers_curves_marks_and_files_have_one_unit(run_dir: Path) -> None:
    """Lightning logs under the number of batches, and counts the steps of every optimizer."""
    assert "Steps are those of the optimizers" not in report(run_dir).words
    rewritten(run_dir, logged_step=lambda step: step // 2)
    (run_dir / "metrics.csv").write_text(
        "step,train/loss\n" + "".join(f"{n},1\n" for n in range(20))
    )
    starts = [began(None, 0), began("step-00000020.ckpt", 20, took_over="pid 7", reached=15)]
    (run_dir / "run.json").write_text(run_json(starts))
    seen = report(run_dir)
    assert seen.charts()["loss"]["series"][0]["steps"] == [2 * number for number in range(20)]
    assert "Start 1 was killed at step 30 or later" in seen.words
    assert "Steps are those of the optimizers, 2 for each that metrics.csv" in seen.words
    assert "Start 2 resumed from step-00000020.ckpt" in seen.words


def test_a_step_between_two_checkpoints_lies_between_theirs_and_later_ones_go_on_like_the_last() -> (
    None
):
    to_step = steps_by([(10, 10), (20, 30), (40, 70)])
    assert list(map(to_step, (0, 5, 10, 15, 20, 30, 40, 50))) == [0, 5, 10, 20, 30, 50, 70, 90]


def test_what_the_test_of_the_best_logged_is_of_its_step(run_dir: Path) -> None:
    summary = json.loads((run_dir / "summary.json").read_text())
    summary["tested_checkpoint"] = "step-00000020.ckpt"
    (run_dir / "summary.json").write_text(json.dumps(summary))
    rows = "step,val/loss,test/loss,test/f1\n19,2,,\n39,1,,\n40,,0.5,0.25\n"
    (run_dir / "metrics.csv").write_text(rows)
    seen = report(run_dir)
    assert seen.charts()["loss"]["series"][1] == {"role": "test", "steps": [20], "values": [0.5]}
    assert "test/f1 0.2500 at step 20" in seen.words
    assert "Test confusion step 20" in seen.words


def test_a_result_is_one_of_the_test_whatever_it_is_called(run_dir: Path) -> None:
    (run_dir / "summary.json").write_text('{"steps": 40, "loss_test": 0.125}')
    assert "loss_test 0.1250" in report(run_dir).words


def test_the_axis_is_named_beside_its_numbers(seen: Seen) -> None:
    assert "step 0 10 20 30 40 50" in seen.words


def test_the_picture_is_in_the_page(seen: Seen) -> None:
    (image,) = seen.all("img")
    assert str(image["src"]).startswith("data:image/png;base64,iVBOR")
    assert "Test confusion step 40" in seen.words


def test_a_run_without_pictures_has_no_such_section(run_dir: Path) -> None:
    for file in run_dir.glob("events.out.*"):
        file.unlink()
    assert "Pictures" not in report(run_dir).words


# -- what it never does --------------------------------------------------------------------------


def test_the_page_needs_nothing_from_elsewhere(seen: Seen) -> None:
    fetched = [
        value
        for _, found in seen.tags
        for name, value in found.items()
        if name in ("src", "href", "srcset", "data")
    ]
    assert [value for value in fetched if not str(value).startswith("data:")] == []
    assert not {"link", "iframe", "object", "embed", "base"} & {tag for tag, _ in seen.tags}
    assert "http:" not in seen.source
    assert "https:" not in seen.source
    (policy,) = seen.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert str(policy["content"]).startswith("default-src 'none'; img-src data:;")


def test_the_templates_are_part_of_the_package() -> None:
    package = Path(report_package.__file__).parent
    project = tomllib.loads((package.parent / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["savepoint.report"]
    beside = {path.name for path in package.glob("[!_]*.*") if path.suffix != ".py"}
    assert {name for name in beside for one in patterns if fnmatch(name, one)} == beside != set()


def test_no_other_command_loads_the_templates(tmp_path: Path) -> None:
    program = (
        "import sys; from savepoint.commands import main; main(['ls', sys.argv[1]]); "
        "sys.exit('jinja2' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path], stdout=subprocess.DEVNULL)
    assert done.returncode == 0


def hostile_run(directory: Path) -> Path:
    """Markup wherever a name comes from: the log, the config, the command line, the run and its
    files.
    """
    run_dir = make_run(directory / HOSTILE.replace("/", "_"), pictures=True)
    header = f'step,"{HOSTILE.replace(chr(34), 2 * chr(34))}"'
    (run_dir / "metrics.csv").write_text(f"{header}\n1,2\n2,3\n")
    changed = {
        "argv": [HOSTILE],
        "changed": {HOSTILE: [HOSTILE, 1]},
        "host": HOSTILE,
        "versions": {HOSTILE: HOSTILE},
    }
    starts = [began(None, 0), began(HOSTILE, 20, **changed)]
    (run_dir / "run.json").write_text(run_json(starts))
    (run_dir / "config.yaml").write_text(f"{CONFIG}# </pre>{HOSTILE}\n")
    with SummaryWriter(str(run_dir), filename_suffix="2") as writer:
        writer.add_image(HOSTILE, torch.zeros(3, 8, 8), 40)
    return run_dir


def test_markup_in_a_name_is_text(tmp_path: Path, seen: Seen) -> None:
    hostile = report(hostile_run(tmp_path))
    assert {tag for tag, _ in hostile.tags} <= {tag for tag, _ in seen.tags}
    assert len(hostile.all("script")) == 2
    assert [name for _, found in hostile.tags for name in found if name.startswith("on")] == []
    assert hostile.words.count("<script>document.title='hacked'</script>") > 8


# -- curves --------------------------------------------------------------------------------------


def test_a_long_log_is_thinned_and_keeps_its_ends_and_extremes(run_dir: Path) -> None:
    rows = [
        f"{step},{-5 if step == 12_345 else 7 if step == 23_456 else step % 10 / 10}"
        for step in range(30_000)
    ]
    (run_dir / "metrics.csv").write_text("\n".join(["step,train/loss", *rows]) + "\n")
    seen = report(run_dir)
    (series,) = seen.charts()["loss"]["series"]
    assert len(series["steps"]) <= 1002
    assert (series["steps"][0], series["steps"][-1]) == (0, 29_999)
    assert (min(series["values"]), max(series["values"])) == (-5, 7)
    assert len(seen.source) < 100_000


def test_a_value_that_is_not_finite_breaks_the_line_and_is_said(run_dir: Path) -> None:
    (run_dir / "metrics.csv").write_text("step,train/loss\n0,1\n1,2\n2,nan\n3,inf\n4,3\n5,1\n")
    seen = report(run_dir)
    (line,) = seen.all("path", **{"class": "line train"})
    assert str(line["d"]).count("M") == 2
    assert "train/loss was NaN or infinite 2 times, first at step 2." in seen.words
    assert "NaN" not in seen.source.split('id="values">')[1]


def test_a_series_of_one_value_is_no_curve(run_dir: Path) -> None:
    (run_dir / "metrics.csv").write_text("step,train/loss,val/f1\n7,0.25,0.5\n")
    seen = report(run_dir)
    assert seen.charts() == {}
    assert "Measured once train/loss 0.2500 at step 7 val/f1 0.5000 at step 7" in seen.words


@pytest.mark.parametrize(
    "values",
    [[0, 0], [1e-300, 1e-300], [5e-324, 0], [-1e199, 1e199], [1e6, 1e6 + 1], [0.1, 0.1 + 2e-17]],
)
def test_any_range_of_values_has_an_axis(run_dir: Path, values: list[float]) -> None:
    (run_dir / "metrics.csv").write_text(f"step,loss\n0,{values[0]!r}\n9,{values[1]!r}\n")
    seen = report(run_dir)
    assert "nan" not in seen.source.split("<main>")[1].lower().replace("nan or", "")
    assert len(seen.all("text", **{"class": "tick end"})) >= 2


# -- damaged, unfinished -------------------------------------------------------------------------


def remove(*names: str) -> Callable[[Path], None]:
    def damage(run_dir: Path) -> None:
        for name in names:
            path = run_dir / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def write(name: str, content: str | bytes) -> Callable[[Path], None]:
    def damage(run_dir: Path) -> None:
        data = content.encode() if isinstance(content, str) else content
        for path in run_dir.glob(name):
            path.write_bytes(data)

    return damage


def record(data: bytes) -> bytes:
    file = io.BytesIO()
    RecordWriter(file).write(data)
    return file.getvalue()


def picture(data: bytes) -> bytes:
    value = Summary.Value(tag="test/confusion", image=Summary.Image(encoded_image_string=data))
    return record(Event(step=1, summary=Summary(value=[value])).SerializeToString())


# As far as it must be for an entry of run.json, and no further.
EDITED = {"time": "noon", "argv": [], "git": None, "changed": {"lr": 1}}
EDITED |= {"versions": [], "step": "a", "checkpoint": 3, "host": 7, "world_size": "x"}


@pytest.mark.parametrize(("damage", "said"), [
    (remove("metrics.csv"), "metrics.csv is missing: there are no curves."),
    (write("metrics.csv", ""), "metrics.csv has no row yet: there are no curves."),
    (write("metrics.csv", "step,train/loss\n"), "metrics.csv has no row yet: there are no curves."),
    (write("metrics.csv", "loss\n1\n2\n"), "metrics.csv has no column `step`: there are no curves."),
    (write("metrics.csv", "step,loss\n1,2\n,3\n2\n3,x\n4,5,6,7\n"), "metrics.csv is damaged: 1 row has no step."),
    (write("metrics.csv", "step,loss\n1,2\n2,x\n3,4\n"), "metrics.csv is damaged: 1 value is no number."),
    (write("metrics.csv", os.urandom(5000)), "metrics.csv"),
    (write("metrics.csv", 'step,loss\n1,2\n2,"' + "9" * 200_000), "metrics.csv is damaged after row 1: field larger"),
    (remove("run.json"), "run.json is missing or damaged: how and where the run was started is not known."),
    (write("run.json", "{"), "run.json is missing or damaged"),
    (write("run.json", '{"starts": [{"time": 3, "argv": "x"}]}'), "run.json is missing or damaged"),
    (write("run.json", run_json([EDITED])), "noon · from the beginning Changed lr: 1"),
    (remove("config.yaml"), "What retention keeps is not known"),
    (write("config.yaml", "checkpoint: {keep_last: x}"), "What retention keeps is not known"),
    (write("config.yaml", "checkpoint: [1"), "What retention keeps is not known"),
    (write("config.yaml", b"\xff\xfe"), "What retention keeps is not known"),
    (write("summary.json", '{"steps": 40, "test/loss": NaN, "fit_secs": NaN, "parameters": "x"}'), "test loss nan"),
    (write("checkpoints/*.ckpt", "x"), "first broken"),
    (remove("checkpoints"), "first broken"),
    (write("checkpoints/step-00000040.ckpt", b"PK"), "step-00000040.ckpt does not verify: "),
    (write("checkpoints/step-00000040.ckpt", "<html>"), "step-00000040.ckpt does not verify: an HTML page"),
    (write("events.out.*", os.urandom(3000)), "first finished"),
    (write("events.out.*", record(b"no event")), "The TensorBoard events cannot be read (DecodeError): there are no pictures."),
    (write("events.out.*", picture(b"<svg>")), "The picture test/confusion is no PNG, JPEG or GIF: it is left out."),
    (write("events.out.*", picture(b"GIF8" + bytes(3_000_000))), "The picture test/confusion has 3.00 MB: it is left out."),
    (remove("metrics.csv", "config.yaml", "summary.json", "checkpoints", "rewound"), "There is no checkpoint."),
])  # fmt: skip
def test_a_damaged_run_is_shown_with_what_is_missing(
    run_dir: Path, damage: Callable[[Path], None], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(run_dir)
    seen = report(run_dir)
    assert said in seen.words
    assert "Traceback" not in capsys.readouterr().err


def test_a_broken_run_says_how_to_see_what_is_wrong(run_dir: Path) -> None:
    write("checkpoints/*.ckpt", "x")(run_dir)
    assert f"-m savepoint verify {run_dir}" in report(run_dir).words


def test_the_results_of_an_earlier_end_are_not_shown(run_dir: Path) -> None:
    (run_dir / "summary.json").write_text('{"steps": 20, "test/loss": 0.125}')
    words = report(run_dir).words
    assert "summary.json tells of an earlier end of this run: its results are left out." in words
    assert "0.125" not in words


def test_a_stopped_run_says_how_to_go_on_and_counts_its_time_over_its_starts(run_dir: Path) -> None:
    (run_dir / "summary.json").unlink()
    (run_dir / "metrics.csv").write_text(
        "step,time/secs,loss\n1,1.5,1\n2,2.5,1\n3,1.0,1\n4,3.0,1\n"
    )
    words = report(run_dir).words
    assert "first stopped" in words
    assert f"Go on {python()} resume.py {run_dir} Curves" in words
    assert "time in training about 5.5 s" in words


def test_a_running_run_is_shown_without_disturbing_it(run_dir: Path) -> None:
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold, run_dir / "lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        seen = report(run_dir)
        assert holder.poll() is None
        holder.communicate(b"")
    assert "first running: " in seen.words
    assert f"Save now, and go on touch {run_dir}/save-now" in seen.words


# -- the command ---------------------------------------------------------------------------------


def test_the_command_names_the_file_and_its_size(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_dir / "config.yaml").unlink()
    report(run_dir)
    size = (run_dir / "report.html").stat().st_size
    assert capsys.readouterr().out.splitlines() == [
        "config.yaml is missing.", f"{run_dir}/report.html: {words.size(size)}",
    ]  # fmt: skip


def test_json_tells_the_same(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / "metrics.csv").unlink()
    assert main(["report", str(run_dir), "-o", str(run_dir / "x.html"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {
        "run_dir": str(run_dir), "file": str(run_dir / "x.html"), "bytes": (run_dir / "x.html").stat().st_size,
        "state": "finished", "missing": ["metrics.csv is missing: there are no curves."],
    }  # fmt: skip


@pytest.mark.parametrize("output", ["none/x.html", "checkpoints/step-00000020.ckpt/x.html"])
def test_a_place_that_cannot_be_written_exits_with_2(
    run_dir: Path, output: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(run_dir.iterdir())
    assert main(["report", str(run_dir), "-o", str(run_dir / output)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"savepoint report: Cannot write the report: {run_dir / output} (")
    assert said.endswith("Name another one: -o FILE\n")
    assert sorted(run_dir.iterdir()) == before


def test_only_a_report_is_ever_replaced_by_one(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report(run_dir)
    assert main(["report", str(run_dir)]) == 0
    for other in (run_dir / "run.json", run_dir / "checkpoints" / "last.ckpt", Path(os.devnull)):
        before = other.read_bytes()
        assert main(["report", str(run_dir), "-o", str(other)]) == 2
        assert f"There already, and no report: {other}" in capsys.readouterr().err
        assert other.read_bytes() == before
    assert not Path(os.devnull).is_file()
    assert main(["report", str(run_dir), "-o", str(run_dir / "checkpoints")]) == 2
    assert f"There already, and no report: {run_dir / 'checkpoints'}" in capsys.readouterr().err


def test_what_is_no_run_exits_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("savepoint report: Not a run directory")


# -- in a real browser ---------------------------------------------------------------------------

SIZES = """[...document.querySelectorAll('.plot > svg')].map((svg) => {
  const box = svg.getBoundingClientRect(), lines = [...svg.querySelectorAll('path.line')];
  return [box.width, box.height, lines.length, Math.max(0, ...lines.map((line) => line.getBoundingClientRect().width))];
})"""
# The least contrast of a text with what lies behind it, as WCAG counts it.
CONTRAST = """(() => {
  const linear = (c) => (c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4);
  const light = (color) => {
    const [red, green, blue] = color.match(/[\\d.]+/g).map((c) => linear(c / 255));
    return .2126 * red + .7152 * green + .0722 * blue;
  };
  const behind = (one) => {
    const color = getComputedStyle(one).backgroundColor;
    return color === 'rgba(0, 0, 0, 0)' ? behind(one.parentElement) : color;
  };
  const ratio = (one) => {
    const { fill, color } = getComputedStyle(one);
    const [dark, bright] = [light(one.closest('svg') ? fill : color), light(behind(one))].sort((a, b) => a - b);
    return (bright + .05) / (dark + .05);
  };
  const hasText = (one) => [...one.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
  const texts = [...document.querySelectorAll('body *')].filter((one) => one.checkVisibility() && hasText(one));
  return Math.min(...texts.map(ratio));
})()"""


TOUCHING = """[...document.querySelectorAll('svg[role=img]')].flatMap((svg) => {
  const ticks = [...svg.querySelectorAll('text.tick')].map((one) => [one.textContent, one.getBoundingClientRect()]);
  return ticks.flatMap(([name, a], i) => ticks.slice(i + 1)
    .filter(([, b]) => a.left < b.right + 4 && b.left < a.right + 4 && a.top < b.bottom && b.top < a.bottom)
    .map(([other]) => `${name} ${other}`));
})"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Browser]:
    if chromium.FOUND is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    with chromium.Browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_shows_it_whole_and_readable(
    browser: chromium.Browser, seen: Seen, made: Path, width: int, dark: bool
) -> None:
    browser.open(made.parent / "seen.html", width, dark=dark)
    text = browser.ask("document.body.innerText")
    for shown in (
        "first",
        "98.76 %",
        "Curves",
        "What happened",
        "Pictures",
        "Checkpoints",
        "kept: the best",
    ):
        assert shown in text
    assert browser.ask("document.documentElement.scrollWidth") == width
    *charts, time_line = browser.ask(SIZES)
    assert len(charts) == 3
    for wide, high, lines, longest in charts:
        assert (wide > 250, high, lines > 0, longest > 0.35 * wide) == (True, 190, True, True)
    assert time_line[0] > 250
    assert browser.ask("document.querySelector('img').naturalWidth") == 8
    assert browser.ask(CONTRAST) >= 4.5
    assert browser.ask("getComputedStyle(document.body).backgroundColor") == (
        "rgb(20, 23, 26)" if dark else "rgb(255, 255, 255)"
    )
    assert browser.said == []


@pytest.mark.slow
@pytest.mark.parametrize("last", [7, 430, 12_600, 980_000])
def test_no_number_of_an_axis_touches_another_on_a_narrow_screen(
    browser: chromium.Browser, run_dir: Path, last: int
) -> None:
    (run_dir / "metrics.csv").write_text(f"step,train/loss\n0,1\n{last},0.5\n")
    report(run_dir)
    browser.open(run_dir / "report.html", 400)
    assert browser.ask(TOUCHING) == []


@pytest.mark.slow
def test_the_values_under_the_pointer_are_told(
    browser: chromium.Browser, seen: Seen, made: Path
) -> None:
    browser.open(made.parent / "seen.html", 1400)
    box = browser.ask(
        "JSON.parse(JSON.stringify(document.querySelectorAll('.plot > "
        "svg')[1].getBoundingClientRect()))"
    )
    legend = "document.querySelectorAll('figcaption')[1].innerText.split(/\\s+/).join(' ')"
    before = browser.ask(legend)
    browser.point_at(box["x"] + 19 / 50 * box["width"], box["y"] + 20)
    assert browser.ask(legend) == "loss step 19 train 0.0500 val 0.1000"
    browser.point_at(1, 1)
    assert browser.ask(legend) == before == "loss last values train 0.0250 val 0.0500"
    assert browser.said == []


@pytest.mark.slow
def test_it_reads_the_same_without_a_script(
    browser: chromium.Browser, seen: Seen, made: Path
) -> None:
    browser.open(made.parent / "seen.html", 1400)
    text, sizes = browser.ask("document.body.innerText"), browser.ask(SIZES)
    browser.open(made.parent / "seen.html", 1400, script=False)
    assert (browser.ask("document.body.innerText"), browser.ask(SIZES)) == (text, sizes)


@pytest.mark.slow
def test_markup_in_a_name_does_nothing_in_a_browser(
    browser: chromium.Browser, tmp_path: Path
) -> None:
    run_dir = hostile_run(tmp_path)
    report(run_dir)
    browser.open(run_dir / "report.html", 400)
    assert browser.ask("document.title").endswith(": finished")
    assert browser.ask("document.querySelectorAll('script').length") == 2
    assert browser.ask("document.documentElement.scrollWidth") == 400
    assert browser.said == []


def test_clients_have_a_colour_of_their_own_and_times_are_of_the_clock() -> None:
    clients = series_of("clients/val/loss")
    assert (clients.quantity, clients.role, clients.label) == ("loss", "clients", "clients")
    assert Chart("time/train_secs", [series_of("time/train_secs")]).by_the_clock
    assert series_of("time/train_secs").quantity == "time/train_secs"
