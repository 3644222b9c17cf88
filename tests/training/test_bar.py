"""The bar of a terminal: one line at any width, below whatever is printed meanwhile."""

import contextlib
import io
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.small import fit

from savepoint import words
from savepoint.training import bar, notebook
from savepoint.training.bar import SPARE, Bar, StatusLine, line, shortened, width
from savepoint.training.progress import Lines, Meter

FACTS = ["1:05 left", "train/loss 0.0312", "val/accuracy 0.9912", "12345 samples/s"]


class Terminal(io.StringIO):
    """What a terminal shows of what was written: lines, of which `\\r` and `ESC[K` take one back."""

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        raise OSError  # no size

    def screen(self) -> list[str]:
        lines = self.getvalue().split("\n")
        return [one.rpartition("\r\x1b[K")[2] for one in lines]


@contextlib.contextmanager
def terminal() -> Iterator[Terminal]:
    """In the test itself: between a fixture and its test pytest puts its own streams back."""
    shown = Terminal()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
        yield shown


def test_a_line_is_never_wider_than_its_room() -> None:
    facts = [*FACTS, "train_epoch/masked_language_model 4.1", "正確度 0.5", "perplexity\n 3"]
    what = ["epoch 12/4000", "validation"]
    lines = {columns: line(what, 7, 12345, facts, columns) for columns in range(10, 200)}
    assert [one for columns, one in lines.items() if width(one) > columns or "\n" in one] == []


def test_with_room_for_all_the_bar_fills_it() -> None:
    assert line(["epoch 3/5"], 5, 10, FACTS, 200).split("  ") == [
        "epoch 3/5", " 5/10", "#" * 15 + "-" * 15, *FACTS,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("columns", "kept"), [(84, 4), (83, 3), (67, 3), (62, 2), (46, 2), (43, 1), (27, 1), (26, 0)]
)
def test_where_it_is_narrow_the_first_facts_stay(columns: int, kept: int) -> None:
    words = line(["epoch 3/5"], 5, 10, FACTS, columns).split("  ")
    assert words[:2] == ["epoch 3/5", " 5/10"]
    assert [word for word in words[2:] if not word.startswith("#")] == FACTS[:kept]


def test_a_fact_that_does_not_fit_leaves_its_place_to_a_shorter_one() -> None:
    text = line(["test"], 1, 2, ["a" * 60, "loss 1"], 40)
    assert text.endswith("  loss 1")


def test_a_stream_has_no_bar() -> None:
    assert line(["epoch 1"], 58, float("inf"), ["loss 1"], 80) == "epoch 1  batch 58  loss 1"


def test_a_long_name_keeps_the_end_that_tells_it_from_others() -> None:
    name = shortened("validation/of_the_second_loader/accuracy")
    assert name == "..second_loader/accuracy"


def test_what_is_printed_goes_above_the_line_which_stays_the_last() -> None:
    with terminal() as shown:
        status = StatusLine()
        status.open()
        status.show("epoch 1")
        print("saved")
        print("a warning", file=sys.stderr)
        status.show("epoch 2")
    assert shown.screen() == ["saved", "a warning", "epoch 2"]


def test_a_line_without_an_end_is_not_written_over() -> None:
    with terminal() as shown:
        status = StatusLine()
        status.open()
        status.show("epoch 1")
        print("loading ...", end="")
        status.show("epoch 2")
        print(" done")
    assert shown.screen() == ["loading ... done", "epoch 2"]


def test_at_the_end_nothing_is_left_of_it() -> None:
    with terminal() as shown:
        status = StatusLine()
        status.open()
        status.show("epoch 1")
        status.close()
        print("test accuracy 0.99")
        assert (sys.stdout, sys.stderr) == (shown, shown)
    assert shown.screen() == ["test accuracy 0.99", ""]


def test_a_worker_that_inherits_the_line_prints_as_it_would_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with terminal() as shown:
        status = StatusLine()
        status.open()
        status.show("epoch 1")
        before = shown.getvalue()
        monkeypatch.setattr(os, "getpid", lambda: 0)
        print("from a worker")
    assert shown.getvalue() == f"{before}from a worker\n"


def test_a_training_shows_the_sanity_check_epochs_and_validations_and_then_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bar, "EVERY_SECS", 0.0)
    meter = Meter()
    with terminal() as shown:
        fit(
            tmp_path,
            callbacks=lambda: [meter, Bar(meter)],
            enable_progress_bar=True,
            num_sanity_val_steps=1,
            max_epochs=2,
        )
    written = re.split(r"\r\x1b\[K|\n", shown.getvalue())
    drawn = [one for one in written if re.match(r"sanity check|epoch \d/", one)]
    for begin in ("sanity check  1/1", "epoch 1/2  0/6", "epoch 2/2  6/6", "epoch 2/2  validation"):
        assert [one for one in drawn if one.startswith(begin)], begin
    assert max(map(width, drawn)) <= 80 - SPARE
    assert shown.screen()[-1] == ""


def test_who_wants_no_bar_gets_the_lines_of_a_log_file() -> None:
    with terminal():
        assert [type(one) for one in bar.display(Meter())["callbacks"]] == [Meter, Bar]
        without = bar.display(Meter(), wants_bar=False)
    assert [type(one) for one in without["callbacks"]] == [Meter, Lines]


def test_the_columns_for_what_somebody_types_stay_free() -> None:
    assert len("^C") <= SPARE


def test_a_notebook_has_an_element_in_place_of_the_line() -> None:
    shown = notebook.element(["epoch 1/3"], 3, 10, ["0:01 left", "", "a<b 0.5"])
    assert 'value="3" max="10"' in shown
    assert "<code>epoch 1/3  3/10  0:01 left  a&lt;b 0.5</code>" in shown
    assert "value" not in notebook.element(["epoch 1"], 3, float("inf"), [])
    assert not notebook.is_attached()


def test_a_table_is_html_in_a_notebook() -> None:
    made = words.table(("a", "b"), [("x<y", "1")])
    shown = made._repr_html_()
    assert shown == (
        "<table><tr><th>a</th><th>b</th></tr><tr><td>x&lt;y</td><td>1</td></tr></table>"
    )
