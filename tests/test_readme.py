"""What the README and its pages say works: every command is run, every link leads on."""

import json
import re
import shlex
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule
from support.limits import HANG_SECS
from support.programs import LITTLE, ROOT, as_a_new_process
from support.small import EveryPoint, fit, resume_differs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torchvision.utils import make_grid

import project  # noqa: F401
from savepoint import commands
from savepoint.checkpoint import store
from savepoint.config import quick
from savepoint.resume import request, start
from savepoint.training.logs import RunTensorBoardLogger


def commands_in(text: str) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    return [line.strip() for block in blocks for line in block.splitlines() if line.strip()]


README = (ROOT / "README.md").read_text()
# In the order in which the README names them: so they are read, and so their commands are run.
DOCS = list(dict.fromkeys(re.findall(r"\]\((docs/[\w-]+\.md)\)", README)))
PAGES = {name: (ROOT / name).read_text() for name in ["README.md", *DOCS, "CONTRIBUTING.md"]}
COMMANDS = {name: commands_in(text) for name, text in PAGES.items()}
PROMISES = re.split(
    r"(?m)^- ", PAGES["docs/exactness.md"].split("\n## Promises\n")[1].split("\n## ")[0]
)[1:]
FIGURES = [line for line in PAGES["docs/figures.md"].splitlines() if line.startswith("|")][2:]


def execute(words: list[str]) -> int:
    program, argv = words[1], words[2:]
    with as_a_new_process():
        if program == "train.py":
            quick.check(argv)
            return start.start(quick.check([*argv, *LITTLE]))
        if program == "resume.py":
            asked = request.requested(argv)
            assert asked is not None
            return start.resume(asked)
        assert words[1:3] == ["-m", "savepoint"]
        return commands.main(words[3:])


def programs(name: str) -> list[list[str]]:
    return [
        shlex.split(command, comments=True)
        for command in COMMANDS[name]
        if command.startswith("python ")
    ]


USING = "docs/using.md"


@pytest.mark.parametrize("name", [name for name in PAGES if programs(name) and name != USING])
def test_the_commands_of_a_page_run_in_their_order(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # runs go to its outputs/
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for words in programs(name):
        if "--print_config" in words:
            with pytest.raises(SystemExit, match="0"):
                execute(words)
        else:
            assert execute(words) == 0, words


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Of the page's programs, run in their order, after its commands."""
    at = tmp_path_factory.mktemp("using")
    (at / "configs").symlink_to(ROOT / "configs")
    names: dict[str, Any] = {"at": at}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(at)
        for words in programs(USING):
            assert execute(words) == 0, words
        for block in re.findall(r"```python\n(.*?)```", PAGES[USING], re.DOTALL):
            exec(block.replace("8000", "0"), names)
    yield names
    names["server"].server_close()


class TestUsingTheModel:
    def test_the_code_in_the_readme_of_a_copy_runs_too(
        self, names: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        text = (ROOT / "src/savepoint/template/README.md").read_text()
        (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        monkeypatch.chdir(names["at"])
        found: dict[str, Any] = {}
        exec(code, found)
        assert found["output"].shape == (8, 10)

    def test_the_model_is_the_best_of_the_run(self, names: dict[str, Any]) -> None:
        assert names["path"].name == "step-00000002.ckpt"
        assert not names["model"].training
        assert names["shares"].shape == (2, 10)

    def test_a_notebook_has_the_data_and_the_log(self, names: dict[str, Any]) -> None:
        assert names["wrong"].shape == names["labels"].shape
        assert [step for step, _ in names["curve"]] == [1]

    def test_the_service_answers_what_the_model_says(self, names: dict[str, Any]) -> None:
        images = names["images"][:2].float() / 255
        names["Answers"].log_message = lambda *_: None
        asking = threading.Thread(target=names["server"].handle_request)
        asking.start()
        at = f"http://127.0.0.1:{names['server'].server_port}"
        body = json.dumps(images.tolist()).encode()
        with urllib.request.urlopen(at, data=body, timeout=HANG_SECS) as answer:
            shares = torch.tensor(json.load(answer))
        asking.join()
        with torch.inference_mode():
            expected = names["model"](images).softmax(1)
        assert torch.allclose(shares, expected, atol=1e-5)

    def test_the_stream_resumes_exactly_from_inside_an_epoch(
        self, names: dict[str, Any], tmp_path: Path
    ) -> None:
        stream = names["Crops"]

        class Letters(LightningDataModule):
            def train_dataloader(self) -> Any:
                return stream(torch.arange(500) % 7)

        class Next(LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.table = nn.Embedding(7, 7)

            def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
                loss = F.cross_entropy(self.table(batch[0]).flatten(0, 1), batch[1].flatten())
                self.log("loss", loss)
                return loss

            def configure_optimizers(self) -> Any:
                return torch.optim.Adam(self.parameters(), 0.1)

        of_a_stream = {
            "model": Next, "data": Letters, "limit_train_batches": 5, "limit_val_batches": 0,
        }  # fmt: skip
        keep = EveryPoint(tmp_path / "kept", mode="min", monitor="val/loss")
        fit(tmp_path / "straight", checkpointing=keep, **of_a_stream)
        inside = [path for path in keep.kept if "batch" in path.name]
        assert len(inside) >= 10
        for file in inside[1::4]:
            assert store.load(file)[1]["unsaved"] == []
            assert resume_differs(tmp_path / "straight", file, tmp_path / "on", **of_a_stream) == []


def test_no_command_of_a_page_is_left_out() -> None:
    known = ("python ", "make ", "source .venv/bin/activate")
    assert [
        line for lines in COMMANDS.values() for line in lines if not line.startswith(known)
    ] == []
    assert sum(len(programs(name)) for name in PAGES) >= 25


@pytest.mark.parametrize(
    "command",
    sorted({line for lines in COMMANDS.values() for line in lines if line[:5] == "make "}),
)
def test_make_knows_the_targets_that_are_named(command: str) -> None:
    done = subprocess.run(
        [*shlex.split(command, comments=True), "--dry-run"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_every_page_is_named_by_the_readme() -> None:
    assert sorted(DOCS) == sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
    assert len(README.splitlines()) < 200


def headings(page: Path) -> list[str]:
    """As GitHub names them in an address."""
    found = re.findall(r"(?m)^#+ (.+)$", page.read_text())
    return [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in found]


@pytest.mark.parametrize(
    "name", [*PAGES, "CHANGELOG.md", "benchmarks/README.md", "src/savepoint/README.md"]
)
def test_every_link_leads_somewhere(name: str) -> None:
    page = ROOT / name
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        path, _, heading = link.partition("#")
        assert (page.parent / path).exists(), link
        assert not heading or heading in headings(page.parent / path), link


@pytest.mark.parametrize("name", PAGES)
def test_every_path_that_a_page_names_is_there(name: str) -> None:
    for path in re.findall(
        r"(?<![\w./])(?:src|tests|configs|docs|benchmarks)/[\w./-]*\w", PAGES[name]
    ):
        assert (ROOT / path).exists() or path == "configs/mine.yaml", path


def test_every_file_of_the_table_of_questions_is_there() -> None:
    table = PAGES["CONTRIBUTING.md"].split("| file in `src/savepoint/` |")[1].split("\n\n")[0]
    found = re.findall(r"`([\w/]+\.(?:py|toml))`", table)
    assert len(found) >= 20
    assert [name for name in found if not (ROOT / "src/savepoint" / name).is_file()] == []


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.split("**")[1])
def test_every_promise_names_a_test_that_holds_it(promise: str) -> None:
    assert re.findall(r"tests/(?:\w+/)?test_\w+\.py", promise)  # and it is there: the test above


def test_every_figure_has_a_command_that_is_there() -> None:
    assert len(FIGURES) >= 15
    for figure in FIGURES:
        command = figure.split("|")[-2].strip()
        made = r"(FULL=1 )?make (bench|drill|federate|setup|test)\b.*"
        programs = r"python benchmarks/\w+\.py.*|python -m savepoint \w+ .*"
        known = rf"`({made}|{programs}|cd tests; .* -m shapes\.runner( --few)?)`"
        assert re.fullmatch(known, command), figure


HEAD = """
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from savepoint import resumable
"""


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_the_edits_that_make_it_yours_train_and_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = PAGES["CONTRIBUTING.md"]
    code, config = (
        re.search(rf"```{kind}\n(.*?)```", text, re.DOTALL) for kind in ("python", "yaml")
    )
    assert code
    assert config
    (tmp_path / "mine.py").write_text(HEAD + code[1])
    (tmp_path / "mine.yaml").write_text(config[1])
    monkeypatch.syspath_prepend(str(tmp_path))
    import mine  # type: ignore[import-not-found]  # noqa: F401

    command = [
        "--config",
        str(tmp_path / "mine.yaml"),
        "--output_dir",
        str(tmp_path),
        "--run_name",
        "mine",
    ]
    with as_a_new_process():
        assert start.start(quick.check([*command, "--trainer.max_epochs", "2"])) == 0
        asked = request.requested([str(tmp_path / "mine"), "--trainer.max_epochs", "3"])
        assert asked is not None
        assert start.resume(asked) == 0
    latest = store.CheckpointStore(tmp_path / "mine" / "checkpoints").latest()
    assert latest is not None
    assert latest.epoch == 3
    assert latest.manifest["exact"] is True
    assert latest.manifest["monitor"] == "val/loss"


def test_the_hook_that_logs_a_picture_runs(tmp_path: Path) -> None:
    code = re.search(r"```python\n(.*?)```", PAGES["docs/runs.md"], re.DOTALL)
    assert code
    names: dict[str, Any] = {"make_grid": make_grid}
    exec(code[1], names)

    class Model:
        validation_z, current_epoch, logger = torch.zeros(2, 3), 4, RunTensorBoardLogger(tmp_path)

        def __call__(self, z: torch.Tensor) -> torch.Tensor:
            return z.view(2, 3, 1, 1)

    names["on_validation_epoch_end"](Model())
    Model.logger.save()
    tags = EventAccumulator(str(tmp_path)).Reload().Tags()
    assert (tags["images"], tags["tensors"]) == (["generated"], ["sample/text_summary"])
