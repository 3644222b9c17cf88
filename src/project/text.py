"""The other example: a language model of sums in words, `seven plus eight is fifteen`, letter by
letter.

It shows what the images do not: a training loader that never ends, whose place is its state, and a
metric that is best where it is smallest. `configs/text.yaml` names the classes with their package,
so that this file and that config are all of it.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics.text import Perplexity

from savepoint import Batches
from savepoint.errors import ConfigError

Batch = tuple[Tensor, Tensor]

LETTERS = "\n abcdefghijklmnopqrstuvwxyz"
"""A model reads and says numbers of letters: their places in this text."""

UP_TO_19 = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


def spelled(number: int) -> str:
    """A number from 0 to 199 in words."""
    if number < 20:
        return UP_TO_19[number]
    if number < 100:
        rest = f" {UP_TO_19[number % 10]}" if number % 10 else ""
        return TENS[number // 10 - 2] + rest
    return f"one hundred {spelled(number - 100)}" if number > 100 else "one hundred"


def sums(largest: int) -> list[str]:
    """The lines of the text: each sum of two numbers from 0 to `largest`."""
    numbers = range(largest + 1)
    return [
        f"{spelled(one)} plus {spelled(other)} is {spelled(one + other)}\n"
        for one in numbers
        for other in numbers
    ]


def encoded(texts: Sequence[str]) -> Tensor:
    """Numbers of letters (len(texts), length) int64, of texts of one length."""
    number = {letter: place for place, letter in enumerate(LETTERS)}
    return torch.tensor([[number[letter] for letter in text] for text in texts])


def draw(lines: Sequence[str], count: int, length: int, seed: int) -> Batch:
    """Texts of random lines, each from the beginning of a line and cut off at `length` letters, and
    the letter that follows on each: twice (count, length) int64.
    """
    generator = torch.Generator().manual_seed(seed)
    enough = length // min(map(len, lines)) + 1
    picks = torch.randint(len(lines), (count, enough), generator=generator).tolist()
    # The end of the line before: from it the first letter follows.
    texts = ["\n" + "".join(lines[pick] for pick in row) for row in picks]
    letters = encoded([text[: length + 1] for text in texts])
    return letters[:, :-1], letters[:, 1:]


class Stream:
    """Batches without an end. The batch is drawn from its number, so that the place in the stream
    is all of the state.

    Args:
        rank: Of this process, which takes every `world_size`-th batch.
    """

    def __init__(
        self,
        lines: Sequence[str],
        length: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.lines = lines
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.read = 0  # batches, by each process: equal for all

    def __iter__(self) -> Iterator[Batch]:
        while True:
            number = self.read * self.world_size + self.rank
            self.read += 1
            seed = (self.seed * 1_000_003 + number) % 2**63
            yield draw(self.lines, self.batch_size, self.length, seed)

    def state_dict(self) -> dict[str, Any]:
        return {"read": self.read}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.read = state["read"]


class SumsInWords(LightningDataModule):
    """Texts (B, length) int64 and the letter that follows on each of theirs, also (B, length).

    The training is a stream: `trainer.limit_train_batches` is the length of an epoch. Validation
    and test are texts that stay the same, whatever the seed.

    Args:
        largest: The largest number that is added, at most 99.
        length: Letters of a text.
        batch_size: Texts a batch, on each process.
        held_out: Texts of the validation, and as many of the test.
    """

    def __init__(
        self, largest: int = 20, length: int = 64, batch_size: int = 32, held_out: int = 512
    ) -> None:
        super().__init__()
        if not 0 <= largest <= 99:
            raise ConfigError(
                f"Out of range: data.largest is {largest}. Expected 0 to 99, whose sums have a "
                "name. Change --data.largest."
            )
        self.length = length
        self.batch_size = batch_size
        self.lines = sums(largest)
        self.name = f"sums of 0 to {largest} in words"
        # Negative: the stream's seeds are not.
        self.val = draw(self.lines, held_out, length, -1)
        self.test = draw(self.lines, held_out, length, -2)
        self.fingerprint = hashlib.sha256(self.val[1].numpy().tobytes()).hexdigest()[:16]
        self._seed = 0

    def setup(self, stage: str | None = None) -> None:
        self._seed = torch.initial_seed()

    def train_dataloader(self) -> Stream | Batches:
        if self.trainer and self.trainer.overfit_batches:  # type: ignore[attr-defined]
            # The same batches again and again.
            return self._same(draw(self.lines, len(self.val[0]), self.length, self._seed))
        rank = self.trainer.global_rank if self.trainer else 0
        world_size = self.trainer.world_size if self.trainer else 1
        return Stream(self.lines, self.length, self.batch_size, self._seed, rank, world_size)

    def val_dataloader(self) -> Batches:
        return self._same(self.val)

    def test_dataloader(self) -> Batches:
        return self._same(self.test)

    def _same(self, texts: Batch) -> Batches:
        return Batches(*texts, batch_size=self.batch_size, seed=0, shuffle=False)


class LanguageModel(LightningModule):
    """Reads a text letter by letter, and says at each one how likely every letter is to follow.

    Args:
        width: Of the recurrent layer's memory. 128: 106,268 parameters.
    """

    def __init__(self, width: int = 128, lr: float = 0.003) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.letters = nn.Embedding(len(LETTERS), width)
        self.memory = nn.GRU(width, width, batch_first=True)
        self.follows = nn.Linear(width, len(LETTERS))
        self.train_perplexity = Perplexity()
        self.val_perplexity = Perplexity()
        self.test_perplexity = Perplexity()
        self.example_input_array = encoded(["\none plus one is ", "\nzero plus two is"])

    def forward(self, text: Tensor) -> Tensor:
        """Logits (B, length, letters) of numbers of letters (B, length)."""
        remembered, _ = self.memory(self.letters(text))
        logits: Tensor = self.follows(remembered)
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        text, following = batch
        logits = self(text)
        loss = F.cross_entropy(logits.flatten(0, 1), following.flatten())
        self.train_perplexity.update(logits.detach(), following)
        self.log("train/loss_step", loss, prog_bar=True)
        self.log("train/perplexity", self.train_perplexity, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        text, following = batch
        self.val_perplexity.update(self(text), following)
        self.log("val/perplexity", self.val_perplexity, prog_bar=True)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        text, following = batch
        self.test_perplexity.update(self(text), following)
        self.log("test/perplexity", self.test_perplexity)

    def configure_optimizers(self) -> Optimizer:
        return torch.optim.AdamW(self.parameters(), self.lr)
