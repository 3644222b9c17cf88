"""The data: MNIST, Fashion-MNIST or the embedded digits, held whole as uint8 tensors and cut into
batches at once.

The official test set is the test set. One image in twelve of the training set (5,000 of 60,000),
always the same ones whatever the seed, is the validation set.
"""

import hashlib
import logging
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from project import sources
from project.sources import Images
from savepoint import Batches, ResumableLoader, resumable
from savepoint.errors import ConfigError, DataError

EMBEDDED = "embedded digits"
EMBEDDED_REPEATS = 10
"""Passes through the 1,319 embedded training images in an epoch, each with new shifts: 103 steps
instead of 11.
"""


class ImageData(LightningDataModule):
    """Batches of images (B, 1, 28, 28) uint8 and labels (B,) int64 from one of three data sets.

    Args:
        dataset: `mnist`, `fashion` (Fashion-MNIST) or `digits` (the 1,797 that ship with
            scikit-learn).
        root: Folder that holds `MNIST/raw` or `FashionMNIST/raw`. By default the environment's
            DATA_ROOT, else `data`. The fallback is only for runs that name no root.
        download: Whether a missing data set may be downloaded into the root.
        fallback: The data that replaces a missing data set, with a loud warning, where the download
            fails. Null: an error.
        batch_size: Images a batch, on each process.
        global_batch_size: Images an optimizer step, on all processes together: the same ones on any
            number of them that divides it. Null: as many batches as there are processes.
        shift: Training images move by up to this many pixels each way, anew in every epoch.
        in_memory: False reads image by image through a DataLoader: the pattern for data that does
            not fit in memory.
        num_workers: Worker processes of that DataLoader; any number gives the same batches.
    """

    name: str
    """The data that is really read: "MNIST", or "embedded digits" after a fallback."""
    fingerprint: str
    """The digest of the training images; empty before `setup`."""

    def __init__(
        self,
        dataset: Literal["mnist", "fashion", "digits"] = "mnist",
        root: str | None = None,
        download: bool = True,
        fallback: Literal["digits"] | None = "digits",
        batch_size: int = 128,
        shift: int = 1,
        in_memory: bool = True,
        num_workers: int = 0,
        global_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        for key, value, least in (
            ("batch_size", batch_size, 1),
            ("global_batch_size", 1 if global_batch_size is None else global_batch_size, 1),
            ("shift", shift, 0),
            ("num_workers", num_workers, 0),
        ):
            if value < least:
                raise ConfigError(
                    f"Too small: data.{key} is {value}. Expected {least} or more. Change "
                    f"--data.{key}."
                )
        self.dataset = dataset
        self.download = download
        self.fallback = fallback
        self.batch_size = batch_size
        self.shift = shift
        self.in_memory = in_memory
        self.num_workers = num_workers
        self.global_batch_size = global_batch_size

        from_environment = os.environ.get("DATA_ROOT")
        self.root = Path(root or from_environment or "data").expanduser()
        self.root_named_by = "DATA_ROOT" if from_environment else None
        if root:
            self.root_named_by = "--data.root"
        self.name = {"mnist": "MNIST", "fashion": "FashionMNIST", "digits": EMBEDDED}[dataset]
        self.classes = GARMENTS if dataset == "fashion" else DIGITS
        self.fingerprint = ""
        self.raw = self.root / self.name / "raw"
        self._parts: dict[str, Images] = {}
        self._once: Images | None = None  # the training images without repeats
        self._seed = 0
        self._not_downloaded = (
            "downloading was not tried" if download else "--data.download is false"
        )

    def prepare_data(self) -> None:
        if self._parts or self.dataset == "digits" or not self.download:
            return
        # A whole or a damaged data set: `setup` reads it.
        if len(sources.missing(self.raw)) < len(sources.FILES):
            return
        try:
            sources.download(self.name, self.raw)
        except (OSError, RuntimeError) as error:
            self._not_downloaded = "the download failed: " + " ".join(str(error).split())

    def setup(self, stage: str | None = None) -> None:
        if self._parts:  # Lightning calls this before fit, and again before test
            return
        train, test = self._load()
        # Frozen by NumPy: the same split in every version.
        order = np.random.RandomState(0).permutation(len(train))
        held_out = len(train) // 12
        val = train.pick(order[:held_out])
        train = train.pick(order[held_out:])
        self.fingerprint = _fingerprint(train)
        self._seed = torch.initial_seed()
        self._once = train
        repeats = EMBEDDED_REPEATS if self.name == EMBEDDED else 1
        self._parts = {"train": train.repeat(repeats), "val": val, "test": test}

    def train_dataloader(self) -> Batches | ResumableLoader:
        size = self.global_batch_size
        if self.trainer and self.trainer.overfit_batches:  # type: ignore[attr-defined]
            # The same batches again and again.
            return self._loader("train", global_batch_size=size)
        return self._loader("train", shuffle=True, shift=self.shift, global_batch_size=size)

    def val_dataloader(self) -> Batches | ResumableLoader:
        return self._loader("val")

    def test_dataloader(self) -> Batches | ResumableLoader:
        return self._loader("test")

    def _load(self) -> tuple[Images, Images]:
        missing = sources.missing(self.raw) if self.dataset != "digits" else []
        if self.dataset == "digits" or len(missing) == len(sources.FILES):
            if self.dataset != "digits":
                self._fall_back()
            self.name = EMBEDDED
            self.classes = DIGITS
            return sources.embedded_digits()
        train = sources.read(self.raw, "train")
        test = sources.read(self.raw, "t10k")
        if (len(train), len(test)) != (60_000, 10_000):
            self.name += f" of {len(train)} training and {len(test)} test images"
        return train, test

    def _fall_back(self) -> None:
        """Warns loudly that the embedded digits replace the data set.

        Raises:
            DataError: the user named a root, or allows no fallback.
        """
        where = f"No {self.name} in {self.raw} (the root is {self.root_named_by or 'the default'})"
        if self.root_named_by or not self.fallback:
            instead = "allow --data.fallback digits"
            if self.fallback:
                instead = f"leave {self.root_named_by} out"
            raise DataError(
                f"{where}, and {self._not_downloaded}. Expected {sources.FILES[0]} and three more, "
                "plain or .gz. Put them there, name another root with --data.root or DATA_ROOT, "
                f"or {instead} for the {EMBEDDED}."
            )
        _warn(
            f"WARNING: {where}, and {self._not_downloaded}. The {EMBEDDED} are used instead: this "
            f"is NOT {self.name}. Name a folder that holds {self.name}/raw with --data.root or "
            "DATA_ROOT."
        )

    # -- the two members that a federated run asks for ------------------------------------------

    @property
    def labels(self) -> Tensor:
        """(N,) int64, of the training images: clients divide them by label."""
        self.setup()
        assert self._once is not None
        return self._once.labels

    def part(self, indices: np.ndarray[Any, Any], seed: int | None) -> Batches | ResumableLoader:
        """Batches of the training images at `indices`: with a seed shuffled and shifted by it,
        without one in order and as they are.
        """
        self.setup()
        assert self._once is not None
        augment = RandomShift(self.shift) if self.shift and seed is not None else None
        data = self._once.pick(indices)
        size = self.batch_size
        # Of a single image batch norm has no statistics.
        while len(indices) > 1 and len(indices) % size == 1:
            size += 1
        return self._cut(data, seed or 0, seed is not None, augment, batch_size=size)

    def _loader(
        self,
        part: str,
        shuffle: bool = False,
        shift: int = 0,
        global_batch_size: int | None = None,
    ) -> Batches | ResumableLoader:
        self.setup()
        augment = RandomShift(shift) if shift else None
        data = self._parts[part]
        if self.trainer and self.in_memory and _fits(data, self.trainer.strategy.root_device):
            data = data.to(self.trainer.strategy.root_device)
        rank = self.trainer.global_rank if self.trainer else 0
        world_size = self.trainer.world_size if self.trainer else 1
        return self._cut(
            data,
            self._seed,
            shuffle,
            augment,
            rank,
            world_size,
            global_batch_size=global_batch_size,
        )

    def _cut(
        self,
        data: Images,
        seed: int,
        shuffle: bool,
        augment: "RandomShift | None",
        rank: int = 0,
        world_size: int = 1,
        batch_size: int | None = None,
        global_batch_size: int | None = None,
    ) -> Batches | ResumableLoader:
        batch_size = batch_size or self.batch_size
        if not self.in_memory:
            loader = DataLoader(
                OneByOne(data, augment),
                batch_size=batch_size,
                shuffle=shuffle,
                num_workers=self.num_workers,
            )
            return resumable(
                loader,
                seed=seed,
                rank=rank,
                world_size=world_size,
                global_batch_size=global_batch_size,
            )
        return Batches(
            data.images,
            data.labels,
            batch_size=batch_size,
            seed=seed,
            shuffle=shuffle,
            augment=augment,
            rank=rank,
            world_size=world_size,
            global_batch_size=global_batch_size,
        )


class RandomShift:
    """Moves each image (B, C, H, W) of a batch by its own random number of pixels, up to `reach`
    each way, with zeros at the edges.

    The offsets come from a CPU generator, so that they are equal for every device.
    """

    def __init__(self, reach: int) -> None:
        self.reach = reach

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        offsets = torch.randint(2 * self.reach + 1, (2, len(images)), generator=generator)
        down, right = offsets.to(images.device)
        height, width = images.shape[-2:]
        # A view (B, C, down, right, H, W) of each place of the frame on the padded image: no copy.
        frames = F.pad(images, [self.reach] * 4).unfold(2, height, 1).unfold(3, width, 1)
        return frames[torch.arange(len(images), device=images.device), :, down, right]


class OneByOne(Dataset[tuple[Tensor, Tensor]]):
    """One image at a time. Draws from torch's global generator, which `resumable` seeds from (seed,
    epoch, index).
    """

    def __init__(self, data: Images, augment: RandomShift | None) -> None:
        self.data = data
        self.augment = augment

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.data.images[index]
        label = self.data.labels[index]
        return self.augment(image[None])[0] if self.augment else image, label


DIGITS = tuple("0123456789")
GARMENTS = (
    "T-shirt",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Boot",
)

_warn = rank_zero_only(logging.getLogger(__name__).warning)


def _fits(data: Images, device: torch.device) -> bool:
    """Whether the data fits in a quarter of the free memory of a CUDA device. For other devices
    Lightning moves each batch.
    """
    if device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    return data.images.nbytes + data.labels.nbytes < free // 4


def _fingerprint(data: Images) -> str:
    digest = hashlib.sha256(data.images.numpy().data)
    digest.update(data.labels.numpy().data)
    return digest.hexdigest()[:16]
