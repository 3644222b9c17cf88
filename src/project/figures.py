"""Pictures of a test: the confusion matrix and the worst mistakes, drawn after the test for
TensorBoard or a file.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from savepoint import replacing, table

INK = (30, 30, 30)
PAPER = (255, 255, 255)
RIGHT = (40, 110, 180)
WRONG = (205, 60, 40)
CELL = 44
"""Pixels a side of one cell of the confusion matrix."""


class TestFigures(Callback):
    """Collects the mistakes of a test. Needs a `test_step` that returns logits for a batch of
    (images, labels).

    With several processes the matrix counts all of them; the mistakes are those of rank 0.
    """

    __test__ = False  # pytest takes any class called Test... for a test

    def __init__(self, worst: int = 25) -> None:
        self.worst = worst
        self.confusion = torch.zeros(0)
        self.mistakes: list[tuple[Tensor, ...]] = []

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.confusion = torch.zeros(0)
        self.mistakes = []

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        if not isinstance(outputs, Tensor):
            return
        images, labels = batch
        guesses = outputs.argmax(1)
        classes = outputs.shape[1]
        counts = (labels * classes + guesses).bincount(minlength=classes**2).view(classes, classes)
        self.confusion = self.confusion + counts if len(self.confusion) else counts
        wrong = guesses != labels
        losses = F.cross_entropy(outputs[wrong].float(), labels[wrong], reduction="none")
        self.mistakes.append((losses, images[wrong], labels[wrong], guesses[wrong]))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        confusion = trainer.strategy.reduce(self.confusion, reduce_op="sum")
        writers = [
            logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)
        ]
        if not writers or not len(confusion) or not trainer.is_global_zero:
            return
        names = _names(trainer, len(confusion))
        losses, *rest = (torch.cat(parts) for parts in zip(*self.mistakes, strict=True))
        images, labels, guesses = (
            part[losses.argsort(descending=True)[: self.worst]].cpu() for part in rest
        )
        for writer in writers:
            step = trainer.global_step
            writer.add_image(
                "test/confusion",
                _pixels(draw_confusion(confusion.cpu(), names)),
                step,
                dataformats="HWC",
            )
            if len(images):
                grid = draw_mistakes(images, labels.tolist(), guesses.tolist(), names)
                writer.add_image("test/worst_mistakes", _pixels(grid), step, dataformats="HWC")

    def report(self, trainer: Trainer, directory: Path) -> tuple[str, dict[str, Any]]:
        """For `savepoint eval`, after a test in one process: a table of the classes, and
        confusion.png.
        """
        if not len(self.confusion):
            return "", {}
        counts = self.confusion.cpu()
        names = _names(trainer, len(counts))
        with replacing(directory / "confusion.png") as file:
            draw_confusion(counts, names).save(file, "PNG")
        rows = per_class(counts, names)
        shares = ("accuracy", "precision", "recall")
        lines = [
            [row["class"], str(row["count"]), *(_percent(row[key]) for key in shares)]
            for row in rows
        ]
        text = table(("class", "count", *(f"{key} %" for key in shares)), lines)
        legend = "accuracy: of this class against all others"
        return f"{text}\n{legend}", {"classes": rows, "confusion": counts.tolist()}


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}"


def per_class(counts: Tensor, names: Sequence[str]) -> list[dict[str, Any]]:
    """For each class the number of its images, its accuracy against all others, its precision and
    its recall.

    None where nothing was counted: the precision of a class that was never predicted.

    Args:
        counts: (classes, classes) int, `counts[true, predicted]`.
    """
    total = int(counts.sum())
    rows = []
    for index, name in enumerate(names):
        right = int(counts[index, index])
        true = int(counts[index].sum())
        predicted = int(counts[:, index].sum())
        row: dict[str, Any] = {"class": name, "count": true}
        row["accuracy"] = (total - true - predicted + 2 * right) / total
        row["precision"] = right / predicted if predicted else None
        row["recall"] = right / true if true else None
        rows.append(row)
    return rows


def draw_confusion(counts: Tensor, names: Sequence[str]) -> Image.Image:
    """One row for each true class, one column for each predicted one. Blue is right, red is wrong,
    and a stronger colour is a larger number.

    Args:
        counts: (classes, classes) int, `counts[true, predicted]`.
    """
    classes = len(counts)
    font = _font(15)
    left = 40 + max(round(font.getlength(name)) for name in names)
    top = 92
    picture = Image.new("RGB", (left + classes * CELL + 16, top + classes * CELL + 16), PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text(
        (16, 14), f"{int(counts.diagonal().sum()):,} of {int(counts.sum()):,} right", INK, _font(18)
    )
    draw.text((16, 40), "row: true, column: predicted", INK, _font(13))
    most_wrong = max(1, int((counts - counts.diagonal().diag()).max()))
    for row, name in enumerate(names):
        draw.text((left - 12, top + (row + 0.5) * CELL), name, INK, font, anchor="rm")
        draw.text((left + (row + 0.5) * CELL, top - 22), _short(name), INK, font, anchor="mm")
        in_row = max(1, int(counts[row].sum()))
        for column in range(classes):
            count = int(counts[row, column])
            color = _mix(WRONG, math.sqrt(count / most_wrong))
            if row == column:
                color = _mix(RIGHT, count / in_row)
            x = left + column * CELL
            y = top + row * CELL
            draw.rectangle((x, y, x + CELL - 2, y + CELL - 2), color)
            ink = PAPER if sum(color) < 450 else INK
            if count:
                draw.text((x + CELL / 2 - 1, y + CELL / 2 - 1), str(count), ink, font, anchor="mm")
    return picture


def draw_mistakes(
    images: Tensor, labels: Sequence[int], guesses: Sequence[int], names: Sequence[str]
) -> Image.Image:
    """A grid of images (N, 1, H, W) uint8, each under its true and its predicted class."""
    columns = min(len(images), 5)
    side = 112
    title = 26
    top = 32
    rows = math.ceil(len(images) / columns)
    picture = Image.new("RGB", (columns * (side + 12) + 12, top + rows * (side + title + 8)), PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text((12, 10), "true > predicted", INK, _font(13))
    for i, (image, label, guess) in enumerate(zip(images, labels, guesses, strict=True)):
        x = 12 + i % columns * (side + 12)
        y = top + i // columns * (side + title + 8)
        words = f"{names[label]} > {names[guess]}"
        font = _font(18 if len(words) < 9 else 11)
        draw.text((x + side / 2, y + title / 2), words, INK, font, anchor="mm")
        drawn = Image.fromarray(255 - image[0].numpy())
        drawn = drawn.resize((side, side), Image.Resampling.NEAREST)
        picture.paste(drawn, (x, y + title))
    return picture


def _names(trainer: Trainer, classes: int) -> Sequence[str]:
    data = getattr(trainer, "datamodule", None)
    return getattr(data, "classes", None) or list(map(str, range(classes)))


def _mix(color: tuple[int, int, int], share: float) -> tuple[int, int, int]:
    red, green, blue = (round(255 - (255 - channel) * share) for channel in color)
    return red, green, blue


def _short(name: str) -> str:
    return name if len(name) < 6 else name[:4] + "."


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _pixels(picture: Image.Image) -> np.ndarray[Any, Any]:
    return np.asarray(picture)
