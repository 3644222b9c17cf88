"""`python -m project.predict`: images as people have them, named by a checkpoint alone."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import forked
from support.trained import Capture, altered, best, say, trained

from project import predict
from project.pictures import Pixels, read
from project.sources import embedded_digits
from savepoint.checkpoint import store
from savepoint.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def digits() -> tuple[Pixels, list[int]]:
    """The images (359, 28, 28) and labels of the test."""
    _, test = embedded_digits()
    return test.images[:, 0].numpy(), test.labels.tolist()


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_images_of_the_test_set_are_named_as_the_evaluation_counts_them(
    run_dir: Path, digits: tuple[Pixels, list[int]], tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "png").mkdir()
    for index, image in enumerate(digits[0]):
        Image.fromarray(image).save(tmp_path / "png" / f"{index:03d}.png")
    (tmp_path / "png" / "README").touch()
    assert predict.main([str(run_dir), str(tmp_path / "png"), "-o", str(tmp_path / "a.csv")]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "359 images: all taken as they are; 1 other file left out" in err
    confusion = np.zeros((10, 10), int)
    for label, row in zip(digits[1], rows(tmp_path / "a.csv"), strict=True):
        confusion[label, int(row["label"])] += 1
    say(capsys, "eval", str(run_dir), "-o", str(tmp_path))
    assert confusion.tolist() == json.loads((tmp_path / "metrics.json").read_text())["confusion"]


def as_float(images: Pixels) -> Pixels:
    return (images / 255).astype(np.float32)


@pytest.mark.parametrize(
    "change",
    [
        lambda images: images, lambda images: images[:, None], as_float, lambda images: images[0],
        lambda images: 255 - images, lambda images: 1 - as_float(images),
    ],
    ids=["(N, 28, 28)", "(N, 1, 28, 28)", "float", "(28, 28)", "inverted", "inverted float"],
)  # fmt: skip
def test_an_array_gives_what_its_images_give(
    digits: tuple[Pixels, list[int]], tmp_path: Path, change: Callable[[Pixels], Pixels]
) -> None:
    images = digits[0][:5]
    np.save(tmp_path / "a.npy", change(images))
    pictures, _ = read(tmp_path / "a.npy")
    assert [picture.index for picture in pictures] == list(range(len(pictures)))
    for picture, image in zip(pictures, images, strict=False):
        pixels = picture.pixels * 255 if picture.pixels.dtype == np.float32 else picture.pixels
        assert np.array_equal(np.round(pixels), image)


def on_paper(image: Image.Image) -> Image.Image:
    return Image.fromarray(255 - np.asarray(image))


def coloured(image: Image.Image) -> Image.Image:
    """White becomes a green that is as light."""
    return Image.merge(
        "RGB", [image.point(lambda value: value // 2), image, image.point(lambda value: value // 4)]
    )


def with_alpha(image: Image.Image) -> Image.Image:
    """White ink, transparent where there is none."""
    white = Image.new("L", image.size, 255)
    return Image.merge("RGBA", [white, white, white, image])


def ink_with_alpha(image: Image.Image) -> Image.Image:
    black = Image.new("L", image.size, 0)
    return Image.merge("RGBA", [black, black, black, image])


def in_16_bits(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(image).astype(np.uint16) * 257)


def opaque(image: Image.Image) -> Image.Image:
    return image.convert("RGBA")


def palette(image: Image.Image) -> Image.Image:
    return image.convert("P")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (on_paper, ["inverted"]),
        (with_alpha, ["transparent parts made black"]),
        (ink_with_alpha, ["transparent parts made white", "inverted"]),
        (in_16_bits, ["16 bits made 8"]),
        (opaque, []),
        (palette, []),
    ],
)
def test_the_same_image_in_another_form_is_the_same_to_the_network(
    digits: tuple[Pixels, list[int]],
    tmp_path: Path,
    change: Callable[[Image.Image], Image.Image],
    said: list[str],
) -> None:
    change(Image.fromarray(digits[0][0])).save(tmp_path / "a.png")
    (picture,), _ = read(tmp_path / "a.png")
    assert picture.changes == said
    assert np.array_equal(picture.pixels, digits[0][0])


def test_colours_become_their_lightness(digits: tuple[Pixels, list[int]], tmp_path: Path) -> None:
    coloured(Image.fromarray(digits[0][0])).save(tmp_path / "a.png")
    (picture,), _ = read(tmp_path / "a.png")
    assert picture.changes == ["colours made grey"]
    assert np.corrcoef(picture.pixels.flat, digits[0][0].flat)[0, 1] > 0.999


@pytest.mark.parametrize("size", [(56, 56), (280, 140), (10, 20), (28, 14), (1, 3000)])
def test_another_size_is_made_to_fit_and_keeps_its_shape(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    """A white frame on black, as large as the image but for a margin."""
    width, height = size
    pixels = np.zeros((height, width), np.uint8)
    pixels[height // 4 : height - height // 4, width // 4 : max(1, width - width // 4)] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (picture,), _ = read(tmp_path / "a.png", "no")
    assert picture.pixels.shape == (28, 28)
    assert ("resized" in picture.changes) == (max(size) != 28)
    assert ("padded to a square" in picture.changes) == (width != height)
    if min(size) > 1:
        down, across = np.nonzero(picture.pixels > 127)
        assert (np.ptp(down) + 1) / (np.ptp(across) + 1) == pytest.approx(height / width, rel=0.15)
        assert abs((down.min() + down.max()) / 2 - 13.5) <= 0.5


def test_a_photograph_stands_upright_and_of_an_animation_the_first_frame_counts(
    digits: tuple[Pixels, list[int]], tmp_path: Path
) -> None:
    image = Image.fromarray(digits[0][0])
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    image.rotate(90).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read(tmp_path / "a.png")[0][0].pixels, digits[0][0])
    image.save(tmp_path / "a.gif", save_all=True, append_images=[Image.fromarray(digits[0][1])])
    (picture,), _ = read(tmp_path / "a.gif")
    assert picture.changes == ["first of its frames taken"]
    assert np.array_equal(picture.pixels, digits[0][0])


@pytest.mark.parametrize(
    ("invert", "changes"), [("auto", ["inverted"]), ("yes", ["inverted"]), ("no", [])]
)
def test_inverting_can_be_left_to_the_user(tmp_path: Path, invert: Any, changes: list[str]) -> None:
    np.save(tmp_path / "a.npy", np.full((28, 28), 200, np.uint8))
    (picture,), _ = read(tmp_path / "a.npy", invert)
    assert picture.changes == changes
    assert picture.pixels[0, 0] == (55 if changes else 200)


def test_csv_and_json_hold_the_same_labels_and_probabilities(
    run_dir: Path, digits: tuple[Pixels, list[int]], tmp_path: Path, capsys: Capture
) -> None:
    np.save(tmp_path / "a.npy", digits[0][:3])
    words = [str(best(run_dir)), str(tmp_path / "a.npy")]
    assert predict.main([*words, "--all"]) == 0
    (tmp_path / "a.csv").write_text(capsys.readouterr().out)
    assert predict.main([*words, "-o", str(tmp_path / "a.json")]) == 0
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["digest"] == store.load(best(run_dir))[1]["digest"]
    for row, one in zip(rows(tmp_path / "a.csv"), found["predictions"], strict=True):
        assert (
            one["label"]
            == row["label"]
            == max(one["probabilities"], key=one["probabilities"].__getitem__)
        )
        assert one["probability"] == float(row["probability"]) == max(one["probabilities"].values())
        assert {name: float(row[name]) for name in "0123456789"} == one["probabilities"]
        assert sum(one["probabilities"].values()) == pytest.approx(1)


def test_neither_data_nor_a_run_directory_is_needed(
    run_dir: Path, digits: tuple[Pixels, list[int]], tmp_path: Path, capsys: Capture
) -> None:
    file = tmp_path / "alone.ckpt"
    config = store.load(best(run_dir))[0]["config"].replace("dataset: digits", "dataset: mnist")
    altered(best(run_dir), file, config=config.replace("root: null", "root: /nowhere"))
    Image.fromarray(digits[0][0]).save(tmp_path / "a.png")
    assert predict.main([str(file), str(tmp_path / "a.png")]) == 0
    assert capsys.readouterr().out.startswith("file,index,label,probability,changes\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "alone.ckpt"]


def test_the_program_ends_with_2_and_a_line_for_what_is_not_there(
    run_dir: Path, tmp_path: Path
) -> None:
    command = [predict.__file__, str(run_dir), "none.png"]
    code, said = forked.run(command, tmp_path / "said.txt", at=tmp_path)
    assert code == 2
    assert "Cannot be read: none.png (No such file or directory)" in said
    assert len(said.splitlines()) == 1


def an_array(array: Any) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        np.save(folder / "a.npy", array)
        return folder / "a.npy"

    return write


def a_file(name: str, content: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return write


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (an_array(np.zeros((5, 10), np.uint8)), r"wrong shape: .*a\.npy is \[5, 10\]"),
        (an_array(np.zeros((5, 3, 28, 28), np.uint8)), "wrong shape"),
        (an_array(np.zeros((0, 28, 28), np.uint8)), "wrong shape"),
        (an_array(np.zeros((28, 28), np.int64)), "holds int64. Expected uint8, or float in 0..1"),
        (an_array(np.full((28, 28), 255.0)), "holds float64 outside 0..1"),
        (an_array(np.full((28, 28), np.nan)), "outside 0..1"),
        (an_array(np.full((28, 28), "a")), "holds <U1"),
        (a_file("a.npy", b"no array"), "Cannot be read"),
        (a_file("a.npy", b"\x93NUMPY\x01\x00v\x00{'descr"), "Cannot be read"),
        (a_file("a.png", b"\x89PNG\r\n\x1a\nno image"), r"Not a readable image: .*a\.png"),
        (a_file("notes.txt", b"text"), r"Not a readable image: .*notes\.txt"),
        (lambda folder: folder, "No image in this folder"),
        (lambda folder: folder / "none", "No such file"),
        (lambda folder: folder / ("a" * 300), "File name too long"),
    ],
)
def test_what_is_no_image_is_named(tmp_path: Path, make: Callable[[Path], Path], said: str) -> None:
    with pytest.raises(DataError, match=said) as error:
        read(make(tmp_path))
    assert error.value.exit_code == 2
    assert len(str(error.value).splitlines()) <= 5


def test_a_broken_image_of_a_folder_is_named_and_the_others_are_predicted(
    run_dir: Path, digits: tuple[Pixels, list[int]], tmp_path: Path, capsys: Capture
) -> None:
    folder = tmp_path / "scans"
    folder.mkdir()
    for name in ("a.png", "c.png"):
        Image.fromarray(digits[0][0]).save(folder / name)
    (folder / "b.png").write_bytes(b"no image")
    code = predict.main([str(run_dir), str(folder), "-o", str(tmp_path / "a.csv")])
    _, err = capsys.readouterr()
    assert code == 1
    assert err.startswith(f"Left out. Not a readable image: {folder / 'b.png'}")
    assert "2 images: all taken as they are; 1 broken image left out, see above" in err
    assert [Path(row["file"]).name for row in rows(tmp_path / "a.csv")] == ["a.png", "c.png"]


def test_a_folder_of_broken_images_alone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "b.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"Not a readable image: .*b\.png"):
        read(tmp_path)


def test_a_pickle_in_an_array_file_is_not_loaded(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{}], object))
    with pytest.raises(DataError, match="Cannot be read"):
        read(tmp_path / "a.npy")


def test_a_model_for_other_inputs_and_a_file_of_another_kind_are_refused(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "a.npy", np.zeros((28, 28), np.uint8))
    words = [str(best(run_dir)), str(tmp_path / "a.npy")]
    with pytest.raises(ConfigError, match="Neither CSV nor JSON"):
        predict.main([*words, "-o", str(tmp_path / "a.txt")])
    made = predict.rebuild(best(run_dir))
    made.model.example_input_array = torch.zeros(2, 4)
    monkeypatch.setattr(predict, "rebuild", lambda *_, **__: made)
    with pytest.raises(
        ConfigError, match=r"Not a model for images of 1x28x28: .*whose input is \[4\]"
    ):
        predict.main(words)
