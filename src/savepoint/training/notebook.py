"""The bar of a notebook: one element below the cell, which is drawn anew in its place."""

import html
import importlib
import sys
from collections.abc import Sequence
from typing import Any


def is_attached() -> bool:
    """Whether this process is the kernel of a notebook, which shows HTML."""
    if "IPython" not in sys.modules:
        return False
    shell = importlib.import_module("IPython").get_ipython()
    return shell is not None and hasattr(shell, "kernel")


def show(markup: str, handle: Any = None) -> Any:
    """Shows HTML below the cell, or in the place of `handle`, what an earlier call returned."""
    display = importlib.import_module("IPython.display")
    if handle is None:
        return display.display(display.HTML(markup), display_id=True)
    handle.update(display.HTML(markup))
    return handle


class Element:
    """In place of the last line of a terminal."""

    def __init__(self) -> None:
        self._handle: Any = None

    def open(self) -> None:
        self._handle = None

    close = open

    def draw(self, what: Sequence[str], done: int, total: float, facts: Sequence[str]) -> None:
        self._handle = show(element(what, done, total, facts), self._handle)


def element(what: Sequence[str], done: int, total: float, facts: Sequence[str]) -> str:
    has_end = 0 < total < float("inf")
    share = f'value="{done}" max="{int(total)}"' if has_end else ""
    batches = f"{done}/{int(total)}" if has_end else f"batch {done}"
    text = html.escape("  ".join([*what, batches, *filter(None, facts)]))
    return f'<progress {share} style="width: 16em"></progress> <code>{text}</code>'
