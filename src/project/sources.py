"""The sources of images: IDX files in torchvision's layout, its download, or the digits inside
scikit-learn.
"""

import gzip
import math
import os
import socket
import tempfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from savepoint.errors import DataError

FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
MEND = "Put an intact copy there, or delete the folder to have all four files downloaded anew."


@dataclass(frozen=True)
class Images:
    """Images (N, 1, 28, 28) uint8 and their labels (N,) int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def pick(self, indices: np.ndarray[Any, Any]) -> "Images":
        index = torch.from_numpy(indices)
        return Images(self.images[index], self.labels[index])

    def to(self, device: torch.device) -> "Images":
        return Images(self.images.to(device), self.labels.to(device))

    def repeat(self, times: int) -> "Images":
        return Images(self.images.repeat(times, 1, 1, 1), self.labels.repeat(times))


def missing(raw: Path) -> list[str]:
    """The names of the four files that `raw` lacks, both plain and as .gz."""
    return [name for name in FILES if _find(raw, name) is None]


def read(raw: Path, part: str) -> Images:
    """Reads `part` ("train" or "t10k") from `raw`.

    Raises:
        DataError: A file is missing or damaged, or the two do not fit each other.
    """
    image_file = _find(raw, f"{part}-images-idx3-ubyte")
    label_file = _find(raw, f"{part}-labels-idx1-ubyte")
    if image_file is None or label_file is None:
        raise DataError(
            f"Incomplete data set: {raw} lacks {', '.join(missing(raw))}. Expected four files. "
            f"{MEND}"
        )
    images = read_idx(image_file, dimensions=3)
    labels = read_idx(label_file, dimensions=1)
    if images.shape[1:] != (28, 28):
        size = "x".join(map(str, images.shape[1:]))
        raise DataError(
            f"Images of the wrong size: {image_file} holds {size}. Expected 28x28. {MEND}"
        )
    if len(images) != len(labels) or len(images) == 0:
        raise DataError(
            f"Images and labels do not match: {image_file} holds {len(images)}, {label_file} holds "
            f"{len(labels)}. Expected one label an image, and at least one. {MEND}"
        )
    if labels.max() > 9:
        raise DataError(
            f"A label out of range: {label_file} holds {labels.max()}. Expected 0 to 9. {MEND}"
        )
    return Images(torch.from_numpy(images)[:, None], torch.from_numpy(labels).long())


def read_idx(path: Path, dimensions: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Reads an IDX file of unsigned bytes, plain or .gz.

    The format: two zero bytes, 8 for "unsigned byte", the number of dimensions, the size of each
    dimension as a big-endian 32-bit number, the bytes.

    Raises:
        DataError: The file cannot be read, or its magic number or size is wrong.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"Truncated or damaged: {path} ({error}). Expected a whole gzip file. {MEND}"
        ) from error
    except OSError as error:
        raise DataError(
            f"Cannot be read: {path} ({error.strerror}). The images are read from it. {MEND}"
        ) from error
    magic = bytes([0, 0, 8, dimensions])
    head = 4 + 4 * dimensions
    if len(content) >= 4 and content[:4] != magic:
        raise DataError(
            f"Not an IDX file of {dimensions}-dimensional bytes: {path} begins with "
            f"{content[:4].hex()}. Expected the magic number {magic.hex()}. {MEND}"
        )
    shape = np.frombuffer(content[4:head], ">u4").tolist() if len(content) >= head else [0]
    whole = head + math.prod(shape)
    if len(content) != whole:
        what = "Truncated" if len(content) < whole else "Too long"
        least = "at least " if len(content) < head else ""
        raise DataError(
            f"{what}: {path} has {len(content):,} bytes. Expected {least}{whole:,}. {MEND}"
        )
    return np.frombuffer(bytearray(content), np.uint8, offset=head).reshape(shape)


@cache  # the fit and the test of a run ask for them
def embedded_digits() -> tuple[Images, Images]:
    """Training and test part (1,438 and 359) of scikit-learn's 8x8 digits, enlarged to 28x28.

    Three times as large, bilinear but in whole numbers, so that every machine gets the same bytes,
    with a margin of two.
    """
    # Imported here: it takes a second, and is rarely needed.
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    small, labels = load_digits(return_X_y=True)  # (1797, 64) of 0 to 16
    slope = torch.tensor([1.0, 2.0, 3.0, 2.0, 1.0])
    large = F.conv_transpose2d(
        torch.from_numpy(small).float().view(-1, 1, 8, 8),
        slope.outer(slope)[None, None],
        stride=3,
        padding=1,
    )  # 24x24 of 0 to 144: small whole numbers, exact in any order of summation
    data = Images(
        F.pad((large.long() * 255 // 144).to(torch.uint8), [2] * 4), torch.from_numpy(labels).long()
    )
    order = np.random.RandomState(0).permutation(len(data))
    held_out = len(data) // 5
    return data.pick(order[held_out:]), data.pick(order[:held_out])


def download(name: str, raw: Path) -> None:
    """Has torchvision download, unpack and check the four files of its data set `name`, and puts
    them into `raw`.

    A temporary folder takes the downloads: one that fails leaves nothing that looks like data.

    Raises:
        OSError: No network, or no place to write.
        RuntimeError: torchvision's, with one line for each server it tried.
    """
    # Imported here: it is slow, and needed once on a machine.
    import torchvision.datasets  # type: ignore[import-untyped]

    source = getattr(torchvision.datasets, name)
    _reach(f"{mirror}{source.resources[0][0]}" for mirror in source.mirrors)
    with (
        _made(raw) as folder,
        tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as scratch,
    ):
        with _patience(30):
            source(scratch, download=True)
        # A crash between two of these leaves an incomplete set, which the next start names.
        for file in FILES:
            os.replace(Path(scratch, name, "raw", file), raw / file)


def _find(raw: Path, name: str) -> Path | None:
    return next((path for path in (raw / name, raw / f"{name}.gz") if os.path.isfile(path)), None)


def _reach(urls: Iterable[str]) -> None:
    """Raises OSError within seconds if no server answers: torchvision would wait for ever."""
    problem: OSError = OSError("no server is known")
    for url in urls:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=3).close()
        except urllib.error.HTTPError as answer:
            answer.close()
            return  # the server answers; torchvision checks for the file
        except OSError as error:
            problem = error
        else:
            return
    raise problem


@contextmanager
def _patience(secs: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(secs)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


@contextmanager
def _made(folder: Path) -> Iterator[Path]:
    """The folder, made with its parents. If the block fails, new folders that are empty are removed
    again.
    """
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    except BaseException:
        for path in new:
            with suppress(OSError):  # a folder with another process's files stays
                path.rmdir()
        raise
