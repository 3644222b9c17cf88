"""`savepoint eval`: what a checkpoint scores, from the file alone."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from PIL import Image
from support.programs import begin
from support.trained import Capture, best, say, trained
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from project.figures import draw_confusion, per_class
from savepoint.checkpoint import store
from savepoint.rebuilding import rebuild

NAMES = tuple("0123456789")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.getbasetemp())


@pytest.fixture
def run_dir(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "outputs" / "first"))


def directory(run_dir: Path) -> Path:
    return run_dir / f"eval-{store.load(best(run_dir))[1]['step']:08d}"


def found(where: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((where / "metrics.json").read_text())
    return facts


def test_the_metrics_are_those_that_the_training_ended_with(run_dir: Path, capsys: Capture) -> None:
    code, out, err = say(capsys, "eval", str(run_dir))
    assert (code, err) == (0, "")
    summary = json.loads((run_dir / "summary.json").read_text())
    metrics = found(directory(run_dir))["metrics"]
    assert metrics == {name: value for name, value in summary.items() if name.startswith("test/")}
    assert f"test accuracy  {100 * summary['test/accuracy']:.2f} %" in out
    assert found(directory(run_dir))["checkpoint"] == summary["tested_checkpoint"]
    assert f"written: {directory(run_dir)}/" in out


def test_classes_and_confusion_are_counted_and_drawn(run_dir: Path, capsys: Capture) -> None:
    code, out, _ = say(capsys, "eval", str(run_dir))
    assert code == 0
    made = rebuild(best(run_dir))
    made.data.setup("test")
    images, labels = made.data._parts["test"].images, made.data._parts["test"].labels
    with torch.no_grad():
        guesses = made.model(images).argmax(1)
    counts = torch.zeros(10, 10, dtype=torch.int64)
    for label, guess in zip(labels, guesses, strict=True):
        counts[label, guess] += 1
    assert found(directory(run_dir))["confusion"] == counts.tolist()
    assert found(directory(run_dir))["classes"] == per_class(counts, NAMES)
    drawn = Image.open(directory(run_dir) / "confusion.png")
    assert drawn.tobytes() == draw_confusion(counts, NAMES).tobytes()
    table = [line.split() for line in out.splitlines() if line[:1].isdigit()]
    assert [line[:2] for line in table] == [
        [name, str(int(row.sum()))] for name, row in zip(NAMES, counts, strict=True)
    ]


def test_accuracy_precision_and_recall_are_of_each_class_against_the_others() -> None:
    counts = torch.tensor([[3, 1, 0], [2, 4, 0], [0, 0, 0]])
    assert per_class(counts, ("cat", "dog", "bird")) == [
        {"class": "cat", "count": 4, "accuracy": 0.7, "precision": 0.6, "recall": 0.75},
        {"class": "dog", "count": 6, "accuracy": 0.7, "precision": 0.8, "recall": 4 / 6},
        {"class": "bird", "count": 0, "accuracy": 1.0, "precision": None, "recall": None},
    ]


def test_a_file_alone_is_enough(run_dir: Path, tmp_path: Path, capsys: Capture) -> None:
    alone = tmp_path / "elsewhere" / "mine.ckpt"
    alone.parent.mkdir()
    shutil.copy(best(run_dir), alone)
    summary = json.loads((run_dir / "summary.json").read_text())
    shutil.rmtree(run_dir)
    code, out, _ = say(capsys, "eval", str(alone), "--json")
    assert code == 0
    assert json.loads(out) == found(alone.parent / "eval-mine") | {
        "directory": str(alone.parent / "eval-mine")
    }
    assert json.loads(out)["metrics"]["test/loss"] == summary["test/loss"]


def test_the_validation_split_gives_what_was_logged_when_the_file_was_saved(
    run_dir: Path, capsys: Capture
) -> None:
    code, out, _ = say(capsys, "eval", str(run_dir), "--split", "val", "-o", str(run_dir / "here"))
    assert code == 0
    assert "class " not in out
    saved = store.load(best(run_dir))[1]["metrics"]
    metrics = found(run_dir / "here")["metrics"]
    assert metrics == {name: saved[name]["value"] for name in ("val/loss", "val/accuracy")}
    with (run_dir / "metrics.csv").open(newline="") as file:
        assert str(metrics["val/loss"]) in [row["val/loss"] for row in csv.DictReader(file)]


def test_a_key_of_the_config_can_be_given_in_both_ways_and_is_recorded(
    run_dir: Path, capsys: Capture
) -> None:
    flags = ["--trainer.limit_test_batches", "1", "--data.batch_size=16"]
    assert say(capsys, "eval", *flags, str(run_dir), "-o", str(run_dir / "here"))[0] == 0
    assert sum(row["count"] for row in found(run_dir / "here")["classes"]) == 16
    assert found(run_dir / "here")["overrides"] == flags


def test_other_data_is_refused_unless_it_is_meant(run_dir: Path, capsys: Capture) -> None:
    """The fingerprint in the file is made another one's: as if the digits stood in for MNIST here."""
    state, facts = store.load(best(run_dir))
    facts["dataset"] = {"name": "MNIST", "fingerprint": "0123456789abcdef"}
    file = store.write(run_dir.parent / "mnist.ckpt", state, facts).path
    code, out, err = say(capsys, "eval", str(file))
    assert (code, out) == (2, "")
    assert "Another data set: embedded digits" in err
    assert "trained on MNIST (0123456789abcdef)" in err
    assert not (run_dir.parent / "eval-mnist").exists()
    assert say(capsys, "eval", str(file), "--allow", "dataset")[0] == 0
    assert found(run_dir.parent / "eval-mnist")["dataset"] == "embedded digits"


class Totals(LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        x = torch.linspace(-1, 1, 96).view(24, 4)
        self.part = TensorDataset(x, x.sum(1, keepdim=True))

    def train_dataloader(self) -> Any:
        return DataLoader(self.part, batch_size=8)

    val_dataloader = test_dataloader = train_dataloader


class Line(LightningModule):
    """No classes, and its best is its smallest."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", nn.functional.mse_loss(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class LineWithTest(Line):
    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test/loss", nn.functional.mse_loss(self(batch[0]), batch[1]))


def regression(tmp_path: Path, model: str) -> Path:
    config = tmp_path / "mine.yaml"
    config.write_text(
        f"model: {{class_path: test_evaluate.{model}}}\ndata: {{class_path: test_evaluate.Totals}}\n"
        "trainer: {max_epochs: 2, log_every_n_steps: 1, accelerator: cpu}\ncheckpoint: {monitor: val/loss, mode: min}\n"
    )
    assert begin("--config", str(config), "--output_dir", str(tmp_path), "--run_name", "mine") == 0
    return tmp_path / "mine"


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_task_without_classes_has_its_metrics_alone(tmp_path: Path, capsys: Capture) -> None:
    run_dir = regression(tmp_path, "LineWithTest")
    code, out, _ = say(capsys, "eval", str(run_dir))
    assert code == 0
    assert "best of the run: val/loss" in out
    assert [path.name for path in directory(run_dir).iterdir()] == ["metrics.json"]
    assert found(directory(run_dir)).keys().isdisjoint({"classes", "confusion"})
    summary = json.loads((run_dir / "summary.json").read_text())
    assert found(directory(run_dir))["metrics"] == {"test/loss": summary["test/loss"]}


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_model_without_a_test_is_evaluated_on_its_validation(
    tmp_path: Path, capsys: Capture
) -> None:
    run_dir = regression(tmp_path, "Line")
    capsys.readouterr()
    code, out, err = say(capsys, "eval", str(run_dir))
    assert (code, out) == (2, "")
    assert "Line has no test_step" in err
    assert "--split val" in err
    assert say(capsys, "eval", str(run_dir), "--split", "val")[0] == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["RUN", "RUN"], "Two checkpoints"),
        (["RUN/none"], "Nothing there: RUN/none"),
        (["RUN", "--split", "all"], "all"),
        (["RUN", "--data.batch_sise", "3"], "Did you mean data.batch_size"),
        (["RUN", "--dta.root", "x"], "Unknown flag: --dta.root"),
        (["RUN/run.json"], "Not a checkpoint of Savepoint: RUN/run.json"),
    ],
)
def test_bad_input_is_one_to_five_lines_and_leaves_nothing(
    run_dir: Path, words: list[str], said: str, capsys: Capture
) -> None:
    code, out, err = say(capsys, "eval", *[word.replace("RUN", str(run_dir)) for word in words])
    assert (code, out) == (2, "")
    assert said.replace("RUN", str(run_dir)) in err
    assert 1 <= len(err.splitlines()) <= 5
    assert not list(run_dir.glob("eval-*"))


def test_a_place_that_cannot_be_written_is_named(run_dir: Path, capsys: Capture) -> None:
    code, out, err = say(capsys, "eval", str(run_dir), "-o", f"{run_dir}/run.json/x")
    assert (code, out) == (2, "")
    assert err.startswith(
        f"savepoint eval: Cannot write there: {run_dir}/run.json/x (Not a directory). The metrics"
    )


def test_a_damaged_checkpoint_is_named(run_dir: Path, capsys: Capture) -> None:
    data = bytearray(best(run_dir).read_bytes())
    data[len(data) // 2] ^= 1
    (run_dir.parent / "damaged.ckpt").write_bytes(data)
    code, _, err = say(capsys, "eval", str(run_dir.parent / "damaged.ckpt"))
    assert code == 2
    assert "does not verify" in err
