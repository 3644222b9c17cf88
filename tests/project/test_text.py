import math
import re
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from support.programs import ROOT, begin, into
from support.run_dirs import say
from support.small import EveryPoint, fit, resume_differs
from torch import Tensor

from project.text import LETTERS, LanguageModel, Stream, SumsInWords, draw, spelled, sums
from savepoint.checkpoint import store
from savepoint.checkpoint.callback import CheckpointCallback
from savepoint.errors import ConfigError

Capture = pytest.CaptureFixture[str]
LINES = sums(20)
SMALL = partial(SumsInWords, length=24, batch_size=8, held_out=20)


def stream(**more: int) -> Stream:
    return Stream(LINES, length=24, batch_size=8, seed=3, **more)


def texts(batch: tuple[Tensor, Tensor]) -> list[str]:
    """What a model reads, with the last letter that follows."""
    text, following = batch
    letters = torch.cat([text, following[:, -1:]], 1).tolist()
    return ["".join(LETTERS[letter] for letter in row) for row in letters]


def uncertainty(text: str, lines: list[str]) -> float:
    """Minus the logarithm of the chance of a text, which begins at the end of a line."""
    *whole, last = text[1:].split("\n")
    begun = sum(line.startswith(last) for line in lines)
    return len(whole) * math.log(len(lines)) + math.log(len(lines) / begun)


# --- the text ---


def test_every_line_is_a_right_sum_in_words() -> None:
    number = {spelled(n): n for n in range(200)}
    assert len(number) == 200
    assert [spelled(n) for n in (13, 40, 87, 100, 101, 199)] == [
        "thirteen", "forty", "eighty seven", "one hundred", "one hundred one", "one hundred ninety nine"
    ]  # fmt: skip
    lines = sums(99)
    assert len(set(lines)) == 10_000
    for line in lines:
        one, other, both = re.split(" plus | is ", line.removesuffix("\n"))
        assert number[one] + number[other] == number[both]


def test_a_text_begins_with_a_line_and_what_follows_is_the_text_one_letter_on() -> None:
    text, following = draw(LINES, count=5, length=60, seed=0)
    assert (text.shape, text.dtype) == ((5, 60), torch.int64)
    assert torch.equal(text[:, 1:], following[:, :-1])
    for letters in texts((text, following)):
        first, *others, last = letters[1:].split("\n")
        assert letters[0] == "\n"
        assert all(f"{line}\n" in LINES for line in (first, *others))
        assert any(line.startswith(last) for line in LINES)


def test_the_held_out_texts_do_not_depend_on_the_seed_and_the_stream_does() -> None:
    held_out, first = [], []
    for seed in (0, 1):
        torch.manual_seed(seed)
        data = SMALL()
        data.setup()
        held_out.append(
            [texts(batch) for batch in (*data.val_dataloader(), *data.test_dataloader())]
        )
        first.append(texts(next(iter(data.train_dataloader()))))
    assert held_out[0] == held_out[1]
    assert [len(batch) for batch in held_out[0]] == [8, 8, 4, 8, 8, 4]
    assert first[0] != first[1]


def test_a_number_without_a_name_for_its_sums_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.largest is 100\. Expected 0 to 99"):
        SumsInWords(largest=100)


def test_the_config_says_what_the_text_itself_leaves_open() -> None:
    data = SumsInWords()
    every = [text for batch in data.test_dataloader() for text in texts(batch)]
    open_ = sum(uncertainty(text, data.lines) for text in every)
    least = math.exp(open_ / (len(every) * data.length))
    (said,) = re.findall(r"cannot be below ([\d.]+)", (ROOT / "configs/text.yaml").read_text())
    assert f"{least:.3f}" == said


# --- the stream ---


def test_a_stream_goes_on_where_another_one_was() -> None:
    straight = [texts(batch) for batch in islice(stream(), 7)]
    assert all(batch not in straight[:place] for place, batch in enumerate(straight))
    stopped, resumed = stream(), stream()
    list(islice(stopped, 3))
    resumed.load_state_dict(stopped.state_dict())
    assert [texts(batch) for batch in islice(resumed, 4)] == straight[3:]


def test_a_stream_goes_on_in_the_next_epoch() -> None:
    straight = [texts(batch) for batch in islice(stream(), 4)]
    twice = stream()
    assert [texts(batch) for _ in range(2) for batch in islice(twice, 2)] == straight


def test_processes_share_the_batches_and_keep_one_place() -> None:
    shares = [stream(rank=rank, world_size=2) for rank in range(2)]
    read = [[texts(batch) for batch in islice(share, 3)] for share in shares]
    alone = [texts(batch) for batch in islice(stream(), 6)]
    assert [batch for both in zip(*read, strict=True) for batch in both] == alone
    assert shares[0].state_dict() == shares[1].state_dict()


def test_overfitting_takes_the_same_batches_in_each_epoch() -> None:
    data = SMALL()
    data.trainer = Trainer(overfit_batches=2, logger=False, enable_checkpointing=False)
    loader = data.train_dataloader()
    assert [texts(batch) for batch in loader] == [texts(batch) for batch in loader]


# --- the model ---


def test_the_model_says_every_letter_from_those_before_it() -> None:
    model = LanguageModel()
    text = model.example_input_array
    logits = model(text)
    assert logits.shape == (*text.shape, len(LETTERS))
    changed = text.clone()
    changed[:, 9:] = 0
    assert torch.equal(model(changed)[:, :9], logits[:, :9])
    assert not torch.equal(model(changed)[:, 9:], logits[:, 9:])
    assert sum(parameter.numel() for parameter in model.parameters()) == 106_268


def test_perplexity_is_over_letters_and_not_over_batches(tmp_path: Path) -> None:
    model, data = LanguageModel(width=8), SMALL()
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path
    )
    (tested,) = trainer.test(model, data, verbose=False)
    text, following = data.test
    loss = F.cross_entropy(model(text).flatten(0, 1), following.flatten())
    assert tested == {"test/perplexity": pytest.approx(loss.exp().item(), rel=1e-5)}


def test_a_training_resumes_exactly_from_inside_an_epoch(tmp_path: Path) -> None:
    ranked = {"monitor": "val/perplexity", "mode": "min"}
    parts = {
        "model": partial(LanguageModel, width=8), "data": SMALL, "max_epochs": 2, "limit_train_batches": 3,
    }  # fmt: skip
    keep = EveryPoint(tmp_path / "kept", **ranked)
    fit(tmp_path / "straight", checkpointing=keep, **parts)
    inside = [path for path in keep.kept if "batch" in path.name]
    assert len(inside) >= 4
    for file in inside[1::2]:
        assert store.load(file)[1]["unsaved"] == []
        again = {"checkpointing": CheckpointCallback(**ranked), **parts}
        assert resume_differs(tmp_path / "straight", file, tmp_path / "on", **again) == []


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two steps."""
    outputs = tmp_path_factory.mktemp("outputs")
    few = [
        "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--trainer.log_every_n_steps", "1",
        "--trainer.accelerator", "cpu", "--model.width", "8",
    ]  # fmt: skip
    assert begin("--config", str(ROOT / "configs/text.yaml"), *few, *into(outputs)) == 0
    return outputs / "run"


def test_a_run_is_ranked_and_tested_by_perplexity_and_no_accuracy_is_named(
    run_dir: Path, capsys: Capture
) -> None:
    code, out, err = say(capsys, "eval", str(run_dir))
    assert (code, err) == (0, "")
    assert "test perplexity" in out
    code, out, _ = say(capsys, "ls", str(run_dir.parent))
    assert re.search(r"run +\S+ +val/perplexity [\d.]+ +perplexity [\d.]+ +2", out)
    said = (run_dir / "summary.json").read_text()
    assert "best_perplexity" in said
    assert "accuracy" not in said


@pytest.mark.parametrize("kind", ["pt2", "onnx"])
def test_an_export_computes_what_the_checkpoint_computes_and_warns_of_nothing(
    run_dir: Path, tmp_path: Path, capsys: Capture, kind: str
) -> None:
    if kind == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    target = tmp_path / f"a.{kind}"
    code, out, err = say(capsys, "export", str(run_dir), "--format", kind, "-o", str(target))
    assert (code, err) == (0, "")
    assert "parity: largest difference" in out
