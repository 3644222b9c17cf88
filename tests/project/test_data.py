import gc
import gzip
import hashlib
import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.datasets
from lightning.pytorch import Trainer
from torch import Tensor

from project import ImageData, sources
from project.data import EMBEDDED_REPEATS, RandomShift
from savepoint.errors import ConfigError, DataError

TRAIN, TEST = 36, 6
# Tests change directory.
REAL_ROOT = os.environ.get("DATA_ROOT") and Path(os.environ["DATA_ROOT"]).resolve()


def idx(array: np.ndarray[Any, Any]) -> bytes:
    return (
        bytes([0, 0, 8, array.ndim])
        + np.array(array.shape, ">u4").tobytes()
        + array.astype(np.uint8).tobytes()
    )


def numbered(count: int, height: int = 28) -> np.ndarray[Any, Any]:
    """Image i is a dot of brightness i + 1 in the middle: it can be told from the others, also when
    moved.
    """
    images = np.zeros((count, height, 28), np.uint8)
    images[:, 14, 14] = np.arange(count) + 1
    return images


def write(raw: Path, train: int = TRAIN, test: int = TEST) -> Path:
    raw.mkdir(parents=True)
    for part, count in (("train", train), ("t10k", test)):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx(numbered(count)))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx(np.arange(count) % 10))
    return raw


def which(images: Tensor) -> list[int]:
    return [int(n) - 1 for n in images.amax((1, 2, 3))]


def everything(loader: Any) -> tuple[Tensor, Tensor]:
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


@pytest.fixture(autouse=True)
def _nothing_around(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty working directory, no DATA_ROOT, and servers that refuse at once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DATA_ROOT", raising=False)
    for dataset in (torchvision.datasets.MNIST, torchvision.datasets.FashionMNIST):
        monkeypatch.setattr(dataset, "mirrors", ["http://127.0.0.1:1/"])


def prepared(**arguments: Any) -> ImageData:
    data = ImageData(**arguments)
    data.prepare_data()
    data.setup("fit")
    return data


# --- reading ---


def test_plain_and_compressed_files_give_the_same_data(tmp_path: Path) -> None:
    plain, packed = write(tmp_path / "plain/MNIST/raw"), tmp_path / "packed/MNIST/raw"
    packed.mkdir(parents=True)
    for file in plain.iterdir():
        (packed / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
    assert prepared(root="plain").fingerprint == prepared(root="packed").fingerprint


def test_batches_are_uint8_images_and_int64_labels_and_the_last_one_is_shorter(
    tmp_path: Path,
) -> None:
    write(tmp_path / "data/MNIST/raw")
    batches = list(prepared(batch_size=8).train_dataloader())
    assert [len(labels) for _, labels in batches] == [8, 8, 8, 8, 1]
    images, labels = batches[0]
    assert (images.dtype, images.shape, labels.dtype) == (torch.uint8, (8, 1, 28, 28), torch.int64)


def test_images_keep_their_labels(tmp_path: Path) -> None:
    write(tmp_path / "data/MNIST/raw")
    data = prepared()
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        images, labels = everything(loader)
        assert labels.tolist() == [n % 10 for n in which(images)]


def test_training_and_validation_images_are_the_training_set_and_share_none(tmp_path: Path) -> None:
    write(tmp_path / "data/MNIST/raw")
    data = prepared()
    train, val = (
        which(everything(loader)[0]) for loader in (data.train_dataloader(), data.val_dataloader())
    )
    assert len(val) == TRAIN // 12
    assert sorted(train + val) == list(range(TRAIN))


def test_the_split_does_not_depend_on_the_seed_and_the_order_does(tmp_path: Path) -> None:
    write(tmp_path / "data/MNIST/raw")
    splits, orders = [], []
    for seed in (0, 1):
        torch.manual_seed(seed)
        data = prepared()
        splits.append(which(everything(data.val_dataloader())[0]))
        orders.append(which(everything(data.train_dataloader())[0]))
    assert splits[0] == splits[1]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])


def test_a_second_setup_changes_nothing(tmp_path: Path) -> None:
    raw = write(tmp_path / "data/MNIST/raw")
    data = prepared()
    before = (
        everything(data.test_dataloader())[0],
        everything(data.val_dataloader())[0],
        data.fingerprint,
    )
    for file in raw.iterdir():
        file.unlink()
    torch.manual_seed(99)
    data.setup("test")
    assert torch.equal(everything(data.test_dataloader())[0], before[0])
    assert torch.equal(everything(data.val_dataloader())[0], before[1])
    assert data.fingerprint == before[2]


def test_reading_draws_nothing_from_the_global_generator(tmp_path: Path) -> None:
    write(tmp_path / "data/MNIST/raw")
    before = torch.get_rng_state()
    everything(prepared().train_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


def test_the_root_is_the_argument_then_the_environment_then_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ImageData().raw == Path("data/MNIST/raw")
    monkeypatch.setenv("DATA_ROOT", "/from/environment")
    assert ImageData().raw == Path("/from/environment/MNIST/raw")
    assert ImageData("fashion", root="/given").raw == Path("/given/FashionMNIST/raw")


def test_the_fingerprint_changes_with_one_pixel(tmp_path: Path) -> None:
    raw = write(tmp_path / "data/MNIST/raw")
    before = prepared().fingerprint
    file = raw / "train-images-idx3-ubyte"
    content = bytearray(file.read_bytes())
    # In every image: one of them may be in the validation part.
    content[16::784] = bytes([1] * TRAIN)
    file.write_bytes(content)
    assert prepared().fingerprint != before


def test_a_set_of_another_size_is_not_called_mnist_alone(tmp_path: Path) -> None:
    write(tmp_path / "data/MNIST/raw")
    assert prepared().name == f"MNIST of {TRAIN} training and {TEST} test images"


@pytest.mark.skipif(not REAL_ROOT, reason="needs the real MNIST: set DATA_ROOT to its folder")
def test_mnist_is_55000_and_5000_and_10000_images() -> None:
    data = prepared(root=str(REAL_ROOT))
    sizes = [
        len(loader.tensors[1])
        for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    ]
    assert sizes == [55_000, 5_000, 10_000]
    assert data.name == "MNIST"
    assert data.fingerprint == "bacaa990967e83d3"


# --- damaged files ---


def cut(raw: Path, name: str, content: Callable[[bytes], bytes]) -> None:
    (raw / name).write_bytes(content((raw / name).read_bytes()))


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
DAMAGE = {
    "empty": (
        IMAGES,
        lambda b: b"",
        r"Truncated: .*train-images-idx3-ubyte has 0 bytes\. Expected at least 16",
    ),
    "header only": (IMAGES, lambda b: b[:9], r"Truncated: .*has 9 bytes\. Expected at least 16"),
    "one byte short": (
        IMAGES,
        lambda b: b[:-1],
        r"Truncated: .*has 28,239 bytes\. Expected 28,240",
    ),
    "one byte long": (
        IMAGES,
        lambda b: b + b"x",
        r"Too long: .*has 28,241 bytes\. Expected 28,240",
    ),
    "labels for images": (
        IMAGES,
        lambda b: idx(np.zeros(36)),
        r"Not an IDX file .*00000801.*Expected .*00000803",
    ),
    "a web page": (
        LABELS,
        lambda b: b"<html>moved</html>",
        r"labels-idx1-ubyte begins with 3c68746d",
    ),
    "an archive": (LABELS, gzip.compress, r"labels-idx1-ubyte begins with 1f8b"),
    "wrong size": (
        IMAGES,
        lambda b: idx(numbered(36, height=27)),
        r"wrong size: .*holds 27x28\. Expected 28x28",
    ),
    "too few labels": (
        LABELS,
        lambda b: idx(np.zeros(35)),
        r"do not match: .*holds 36, .*labels.* holds 35",
    ),
    "label 10": (
        LABELS,
        lambda b: idx(np.full(36, 10)),
        r"label out of range: .*labels.* holds 10\. Expected 0 to 9",
    ),
}


@pytest.mark.parametrize(("name", "content", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_an_error_that_names_it(
    tmp_path: Path, name: str, content: Callable[[bytes], bytes], message: str
) -> None:
    cut(write(tmp_path / "data/MNIST/raw"), name, content)
    with pytest.raises(DataError, match=message):
        prepared(fallback="digits")


def test_a_truncated_archive_is_an_error_that_names_it(tmp_path: Path) -> None:
    raw = write(tmp_path / "data/MNIST/raw")
    (raw / f"{LABELS}.gz").write_bytes(gzip.compress((raw / LABELS).read_bytes())[:-4])
    (raw / LABELS).unlink()
    with pytest.raises(DataError, match=rf"Truncated or damaged: .*{LABELS}\.gz"):
        prepared()


def test_a_set_with_a_file_missing_is_an_error_and_nothing_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = write(tmp_path / "data/MNIST/raw")
    (raw / LABELS).unlink()
    monkeypatch.setattr(
        sources, "download", lambda *_: pytest.fail("a damaged set is for the user to mend")
    )
    with pytest.raises(
        DataError, match=rf"Incomplete data set: {raw.relative_to(tmp_path)} lacks {LABELS}\."
    ):
        prepared()


@pytest.mark.parametrize("argument", [{"batch_size": 0}, {"shift": -1}, {"num_workers": -1}])
def test_a_number_that_is_too_small_is_an_error_that_names_its_key(
    argument: dict[str, int],
) -> None:
    with pytest.raises(
        ConfigError, match=rf"data\.{next(iter(argument))} is {next(iter(argument.values()))}"
    ):
        ImageData(**argument)


# --- data that is not there ---


def test_without_data_and_network_the_digits_are_used_and_that_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = prepared()
    data.prepare_data()  # Lightning asks for both again before a test
    data.setup("test")
    assert data.name == "embedded digits"
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert "No MNIST in data/MNIST/raw" in caplog.text
    assert "the download failed" in caplog.text
    assert "NOT MNIST" in caplog.text
    assert "--data.root or DATA_ROOT" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_the_digits_asked_for_by_name_are_used_without_a_word(
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = prepared(dataset="digits", fallback=None)
    assert data.name == "embedded digits"
    assert caplog.records == []


def test_without_a_fallback_missing_data_is_an_error() -> None:
    with pytest.raises(
        DataError, match=r"No FashionMNIST in data/FashionMNIST/raw .*allow --data\.fallback digits"
    ):
        prepared(dataset="fashion", fallback=None)


def test_a_root_that_was_named_is_an_error_if_nothing_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever names a root must not train on something else because of a typing error."""
    with pytest.raises(
        DataError,
        match=r"No MNIST in typo/MNIST/raw \(the root is --data\.root\), and the download failed",
    ):
        prepared(root="typo")
    monkeypatch.setenv("DATA_ROOT", "misspelt")
    with pytest.raises(
        DataError, match=r"No MNIST in misspelt/MNIST/raw \(the root is DATA_ROOT\)"
    ):
        prepared(download=False)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_downloaded_where_that_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "download", lambda *_: pytest.fail("download: false"))
    with pytest.raises(DataError, match=r"--data\.download is false"):
        prepared(download=False, fallback=None)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The four files of a small MNIST on a web server; what is in the folder can be changed."""
    served = tmp_path / "served"
    resources = []
    for file in write(served / "raw").iterdir():
        content = gzip.compress(file.read_bytes())
        (served / f"{file.name}.gz").write_bytes(content)
        resources.append((f"{file.name}.gz", hashlib.md5(content).hexdigest()))

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

    with HTTPServer(("127.0.0.1", 0), partial(Quiet, directory=served)) as http:
        thread = threading.Thread(target=http.serve_forever, args=[0.01])
        thread.start()
        monkeypatch.setattr(
            torchvision.datasets.MNIST, "mirrors", [f"http://127.0.0.1:{http.server_port}/"]
        )
        monkeypatch.setattr(torchvision.datasets.MNIST, "resources", resources)
        yield served
        http.shutdown()
        thread.join()


def test_missing_data_is_downloaded_once_into_the_root(server: Path, tmp_path: Path) -> None:
    data = prepared(root="new/root")
    assert data.name.startswith("MNIST of 36")
    assert sorted(path.name for path in (tmp_path / "new/root/MNIST/raw").iterdir()) == sorted(
        sources.FILES
    )
    assert [path.name for path in (tmp_path / "new/root").iterdir()] == ["MNIST"]
    for file in server.iterdir():
        if file.is_file():
            file.unlink()
    assert prepared(root="new/root").fingerprint == data.fingerprint


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"not what it was")])
def test_a_download_that_fails_half_way_leaves_nothing_behind(
    server: Path, tmp_path: Path, damage: Callable[[Path], Any]
) -> None:
    damage(max(server.glob("*.gz")))
    with warnings.catch_warnings():
        # Torchvision leaves the refused connection open.
        warnings.simplefilter("ignore", ResourceWarning)
        with pytest.raises(DataError, match="the download failed"):
            prepared(root="new/root", fallback=None)
        gc.collect()
    assert not (tmp_path / "new").exists()


# --- the embedded digits ---


def test_every_machine_gets_the_same_embedded_digits() -> None:
    data = prepared(dataset="digits")
    assert data.fingerprint == "1b16e9682671667c"


def test_the_embedded_digits_have_a_test_part_of_their_own() -> None:
    train, test = sources.embedded_digits()
    assert (len(train), len(test)) == (1438, 359)
    pictures = {image.numpy().tobytes() for image in train.images}
    assert not any(image.numpy().tobytes() in pictures for image in test.images)
    assert set(test.labels.tolist()) == set(range(10))


def test_an_epoch_goes_through_the_embedded_digits_several_times() -> None:
    data = prepared(dataset="digits", shift=0)
    images, _ = everything(data.train_dataloader())
    counts = np.unique(images.flatten(1).numpy(), axis=0, return_counts=True)[1]
    assert len(images) == EMBEDDED_REPEATS * (1438 - 1438 // 12)
    assert set(counts) == {EMBEDDED_REPEATS}


# --- augmentation ---


def test_each_image_moves_by_its_own_offset_within_reach_and_zeros_come_in() -> None:
    images = torch.randint(
        1, 256, (64, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    moved = RandomShift(2)(images, torch.Generator().manual_seed(1))
    down, right = torch.randint(5, (2, 64), generator=torch.Generator().manual_seed(1))
    assert (moved.dtype, moved.shape) == (images.dtype, images.shape)
    for i in range(64):
        padded = torch.zeros(32, 32, dtype=torch.uint8)
        padded[2:30, 2:30] = images[i, 0]
        assert torch.equal(moved[i, 0], padded[down[i] : down[i] + 28, right[i] : right[i] + 28])
    assert len({(int(d), int(r)) for d, r in zip(down, right, strict=True)}) > 15


def test_training_images_move_anew_in_every_epoch_and_others_do_not_move(tmp_path: Path) -> None:
    write(tmp_path / "data/MNIST/raw")
    data = prepared(shift=2)
    places = []
    loader = data.train_dataloader()
    for epoch in (0, 1):
        loader.sampler.set_epoch(epoch)
        images = everything(loader)[0]
        order = np.argsort(which(images))
        places.append([int(images[i].flatten().argmax()) for i in order])
    assert places[0] != places[1]
    middle = 14 * 28 + 14
    assert {int(place) for place in everything(data.test_dataloader())[0].flatten(1).argmax(1)} == {
        middle
    }
    assert max(abs(place // 28 - 14) for place in places[0]) == 2


def test_shift_0_leaves_images_where_they_are(tmp_path: Path) -> None:
    write(tmp_path / "data/MNIST/raw")
    images, _ = everything(prepared(shift=0).train_dataloader())
    assert set(images.flatten(1).argmax(1).tolist()) == {14 * 28 + 14}


def test_a_training_that_is_to_overfit_sees_the_same_unmoved_images_in_every_epoch(
    tmp_path: Path,
) -> None:
    write(tmp_path / "data/MNIST/raw")
    data = prepared(shift=2)
    data.trainer = Trainer(
        overfit_batches=1, accelerator="cpu", logger=False, enable_checkpointing=False
    )
    loader, epochs = data.train_dataloader(), []
    for epoch in (0, 1):
        loader.sampler.set_epoch(epoch)
        epochs.append(everything(loader)[0])
    assert torch.equal(*epochs)
    assert set(epochs[0].flatten(1).argmax(1).tolist()) == {14 * 28 + 14}


def test_reading_image_by_image_gives_the_same_batches_with_any_number_of_workers(
    tmp_path: Path,
) -> None:
    write(tmp_path / "data/MNIST/raw")
    given = []
    for workers in (0, 2):
        loader = prepared(in_memory=False, num_workers=workers, batch_size=8).train_dataloader()
        loader.sampler.set_epoch(3)
        given.append(everything(loader))
    assert torch.equal(given[0][0], given[1][0])
    assert torch.equal(given[0][1], given[1][1])
    assert len(set(given[0][0].flatten(1).argmax(1).tolist())) > 5


def test_reading_image_by_image_sees_the_same_images_as_reading_whole(tmp_path: Path) -> None:
    write(tmp_path / "data/MNIST/raw")
    for part in ("train", "val", "test"):
        whole, single = (
            sorted(which(everything(getattr(prepared(in_memory=way), f"{part}_dataloader")())[0]))
            for way in (True, False)
        )
        assert whole == single
