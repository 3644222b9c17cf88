"""Other projects than the example, as files of src/project and configs."""

import re
import shutil
from pathlib import Path

from support.copies import commit
from support.programs import ROOT

WAVES = {
    "model.py": """
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import nn
from torchmetrics.classification import MulticlassAccuracy


class WaveClassifier(LightningModule):
    def __init__(self, width: int = 8, lr: float = 0.01) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Conv1d(2, width, 5), nn.BatchNorm1d(width), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(36 * width, 4)
        )
        self.accuracy = MulticlassAccuracy(4)
        self.example_input_array = torch.linspace(-1, 1, 160).view(2, 2, 40)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.accuracy(self(batch[0]), batch[1])
        self.log("val/accuracy", self.accuracy)

    def test_step(self, batch, batch_idx):
        self.accuracy(self(batch[0]), batch[1])
        self.log("test/accuracy", self.accuracy)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), self.hparams.lr)
""",
    "data.py": """
import torch
from lightning.pytorch import LightningDataModule

from savepoint import Batches


class Waves(LightningDataModule):
    name, fingerprint = "waves", "1"

    def __init__(self, batch_size: int = 16) -> None:
        super().__init__()
        self.batch_size = batch_size
        generator = torch.Generator().manual_seed(0)
        self.y = torch.randint(0, 4, (600,), generator=generator)
        time = torch.linspace(0, 6, 40) * (1 + self.y[:, None])
        self.x = torch.stack([time.sin(), time.cos()], 1) + torch.randn(600, 2, 40, generator=generator)

    def part(self, begin, end, shuffle=False):
        return Batches(self.x[begin:end], self.y[begin:end], batch_size=self.batch_size, seed=1, shuffle=shuffle)

    def train_dataloader(self):
        return self.part(0, 400, shuffle=True)

    def val_dataloader(self):
        return self.part(400, 500)

    def test_dataloader(self):
        return self.part(500, 600)
""",
    "__init__.py": (
        "from project.data import Waves\nfrom project.model import WaveClassifier\n"
        'LITTLE = ("--data.batch_size", "8")\n'
    ),
    "mine.yaml": """
model: {class_path: WaveClassifier}
data: {class_path: Waves}
trainer: {max_epochs: 8, log_every_n_steps: 5}
""",
}


# Two optimizers under manual optimization.
GAN = {
    "model.py": """
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import nn


class Gan(LightningModule):
    def __init__(self, noise: int = 4, lr: float = 0.01) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.painter = nn.Sequential(nn.Linear(noise, 16), nn.ReLU(), nn.Linear(16, 2))
        self.judge = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 1))

    def judged(self, points, real):
        said = self.judge(points)
        return F.binary_cross_entropy_with_logits(said, torch.full_like(said, float(real)))

    def training_step(self, batch, batch_idx):
        of_painter, of_judge = self.optimizers()
        painted = self.painter(torch.randn(len(batch[0]), self.hparams.noise))
        loss = self.judged(painted, True)
        of_painter.zero_grad()
        self.manual_backward(loss)
        of_painter.step()
        seen = self.judged(batch[0], True) + self.judged(painted.detach(), False)
        of_judge.zero_grad()
        self.manual_backward(seen)
        of_judge.step()
        self.log_dict({"train/painter": loss, "train/judge": seen})

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.judged(batch[0], True))

    def configure_optimizers(self):
        parts = (self.painter, self.judge)
        return [torch.optim.Adam(part.parameters(), self.hparams.lr) for part in parts]
""",
    "data.py": """
import torch
from lightning.pytorch import LightningDataModule

from savepoint import Batches


class Ring(LightningDataModule):
    def __init__(self, batch_size: int = 16) -> None:
        super().__init__()
        self.batch_size = batch_size
        angle = torch.rand(400, generator=torch.Generator().manual_seed(0)) * 6.28
        self.points = torch.stack([angle.cos(), angle.sin()], 1)

    def part(self, points, shuffle=False):
        return Batches(points, points, batch_size=self.batch_size, seed=1, shuffle=shuffle)

    def train_dataloader(self):
        return self.part(self.points[:320], shuffle=True)

    def val_dataloader(self):
        return self.part(self.points[320:])
""",
    "__init__.py": "from project.data import Ring\nfrom project.model import Gan\n",
    "mine.yaml": """
model: {class_path: Gan}
data: {class_path: Ring}
trainer: {max_epochs: 8, log_every_n_steps: 5}
checkpoint: {monitor: val/loss, mode: min}
""",
}


# A character language model: an embedding, a causal transformer, random crops of a text.
LETTERS = {
    "model.py": """
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import nn


class Writer(LightningModule):
    def __init__(self, letters: int = 128, width: int = 16, context: int = 24, lr: float = 0.003) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.letter = nn.Embedding(letters, width)
        self.place = nn.Parameter(torch.zeros(context, width))
        layer = nn.TransformerEncoderLayer(width, 2, 4 * width, dropout=0.1, batch_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, letters)
        self.example_input_array = torch.zeros(2, context, dtype=torch.long)

    def forward(self, text):
        length = text.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=text.device)
        hidden = self.letter(text) + self.place[:length]
        return self.head(self.blocks(hidden, mask=mask, is_causal=True))

    def loss(self, batch):
        text, following = batch
        return F.cross_entropy(self(text).flatten(0, 1), following.flatten())

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss(batch))

    def configure_optimizers(self):
        decayed = [p for p in self.parameters() if p.dim() > 1]
        others = [p for p in self.parameters() if p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, self.hparams.lr)
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.hparams.lr, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
""",
    "data.py": """
import string
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from savepoint import resumable


class Crops(Dataset):
    def __init__(self, text, context, number):
        self.text, self.context, self.number = text, context, number

    def __len__(self):
        return self.number

    def __getitem__(self, index):
        begin = int(torch.randint(len(self.text) - self.context - 1, ()))
        crop = self.text[begin : begin + self.context + 1]
        return crop[:-1], crop[1:]


class Source(LightningDataModule):
    def __init__(self, context: int = 24, batch_size: int = 16) -> None:
        super().__init__()
        self.context, self.batch_size = context, batch_size

    def setup(self, stage):
        text = Path(string.__file__).read_text(encoding="utf-8")
        letters = torch.tensor([ord(letter) % 128 for letter in text])
        self.parts = letters[: len(letters) * 9 // 10], letters[len(letters) * 9 // 10 :]

    def loader(self, part, number, shuffle=False):
        crops = Crops(self.parts[part], self.context, number)
        return resumable(DataLoader(crops, batch_size=self.batch_size, shuffle=shuffle))

    def train_dataloader(self):
        return self.loader(0, 320, shuffle=True)

    def val_dataloader(self):
        return self.loader(1, 64)
""",
    "__init__.py": "from project.data import Source\nfrom project.model import Writer\n",
    "mine.yaml": """
model: {class_path: Writer}
data: {class_path: Source}
trainer: {max_epochs: 4, log_every_n_steps: 5, gradient_clip_val: 1.0}
checkpoint: {monitor: val/loss, mode: min}
""",
}


def sums() -> dict[str, str]:
    """The regression of CONTRIBUTING.md: its four edits."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    code, config = (
        re.search(rf"```{kind}\n(.*?)```", text, re.DOTALL) for kind in ("python", "yaml")
    )
    assert code
    assert config
    model, data = re.split(r"\n(?=class Sums)", code[1])
    imports = (
        "import torch\nimport torch.nn.functional as F\nfrom lightning.pytorch import "
        "LightningDataModule, LightningModule\n"
        "from torch import nn\nfrom torch.utils.data import DataLoader, TensorDataset\nfrom "
        "savepoint import resumable\n"
    )
    names = "from project.data import Sums\nfrom project.model import Regression\n"
    return {
        "model.py": imports + model,
        "data.py": imports + data,
        "__init__.py": names,
        "mine.yaml": config[1],
    }


PROJECTS = {"waves": WAVES, "gan": GAN, "letters": LETTERS, "sums": sums()}


def make_it_yours(copy: Path, project: dict[str, str]) -> None:
    for path in (copy / "src/project", copy / "configs"):
        shutil.rmtree(path)
        path.mkdir()
    for name, text in project.items():
        folder = "configs" if name.endswith(".yaml") else "src/project"
        (copy / folder / name).write_text(text)
    commit(copy)
