"""Image files and arrays of any size and colour, converted to the network's input: grey, 28x28,
white on black.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps

from savepoint.errors import DataError

SIDE = 28
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")

Invert = Literal["auto", "yes", "no"]
Pixels = np.ndarray[Any, np.dtype[Any]]


@dataclass
class Picture:
    """One image as the network takes it.

    Attributes:
        pixels: (28, 28) uint8, or float in 0..1.
        changes: The conversions, in words.
        index: Its place in a .npy file.
    """

    file: Path
    pixels: Pixels
    changes: list[str]
    index: int | None = None


def read(path: Path, invert: Invert = "auto") -> tuple[list[Picture], list[DataError]]:
    """The images of a file or a folder, by name, and what is wrong with those of a folder that
    cannot be read. Other files in a folder are left out.

    Raises:
        DataError: no file there, or none that can be read, or one of another shape.
    """
    try:
        if path.is_dir():
            return read_folder(path, invert)
        path.stat()
    except OSError as error:
        raise DataError(
            f"Cannot be read: {str(path)[:200]} ({error.strerror}). Expected an image, a folder of "
            "images or a .npy file. Check the path."
        ) from error
    is_array = path.suffix == ".npy"
    return read_array(path, invert) if is_array else [read_picture(path, invert)], []


def read_folder(path: Path, invert: Invert = "auto") -> tuple[list[Picture], list[DataError]]:
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
    if not files:
        raise DataError(
            f"No image in this folder: {path}. Expected files that end in {', '.join(SUFFIXES)}. "
            "Name another folder, or one file."
        )
    pictures = []
    broken = []
    for file in files:
        try:
            pictures.append(read_picture(file, invert))
        except DataError as error:
            broken.append(error)
    if not pictures:
        raise broken[0]
    return pictures, broken


def read_array(path: Path, invert: Invert = "auto") -> list[Picture]:
    try:
        with path.open("rb") as file:
            images: Pixels = np.lib.format.read_array(file, allow_pickle=False)
    except Exception as error:  # damaged bytes can raise anything
        raise DataError(
            f"Cannot be read: {path} ({_first_line(error)}). Expected an array as np.save writes "
            "it."
        ) from error
    shape = list(images.shape)
    if images.ndim == 2:
        images = images[None]
    if images.ndim == 4 and images.shape[1] == 1:
        images = images[:, 0]
    if images.ndim != 3 or images.shape[1:] != (SIDE, SIDE) or not len(images):
        raise DataError(
            f"An array of the wrong shape: {path} is {shape}. Expected (28, 28), (N, 28, 28) or "
            "(N, 1, 28, 28), N of 1 or more."
        )
    if images.dtype != np.uint8:
        is_float = np.issubdtype(images.dtype, np.floating)
        if not is_float or not ((images >= 0) & (images <= 1)).all():
            held = f"{images.dtype} outside 0..1" if is_float else str(images.dtype)
            raise DataError(
                f"Pixels of the wrong kind: {path} holds {held}. Expected uint8, or float in 0..1. "
                "Convert it."
            )
        images = images.astype(np.float32)
    return [Picture(path, *_inverted(image, invert), index) for index, image in enumerate(images)]


def read_picture(path: Path, invert: Invert = "auto") -> Picture:
    try:
        with Image.open(path) as opened:
            changes = ["first of its frames taken"] if getattr(opened, "n_frames", 1) > 1 else []
            pixels, greyed = _grey(ImageOps.exif_transpose(opened))
    except Exception as error:  # damaged bytes can raise anything
        raise DataError(
            f"Not a readable image: {path} ({_first_line(error)}). Expected PNG, JPEG or the like."
        ) from error
    pixels, inverted = _inverted(pixels, invert)
    pixels, resized = _resized(pixels)
    return Picture(path, pixels, changes + greyed + inverted + resized)


def _grey(image: Image.Image) -> tuple[Pixels, list[str]]:
    """An image of any mode as (H, W) uint8. Transparent parts become white or black, so that the
    others stand out.
    """
    if image.mode == "F":
        raise ValueError("pixels are floating-point numbers")
    if image.mode.startswith("I"):  # 16 bits, in one mode or another
        shades = np.asarray(image).astype(np.int64).clip(0, 65535) // 257
        return shades.astype(np.uint8), ["16 bits made 8"]
    changes = []
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        alpha = np.asarray(image)[..., 3] / 255
        ink = np.asarray(image.convert("L"))
        if (alpha < 1).any():
            paper = 0 if alpha.sum() and (ink * alpha).sum() / alpha.sum() > 127 else 255
            changes = [f"transparent parts made {'white' if paper else 'black'}"]
            image = Image.fromarray((ink * alpha + paper * (1 - alpha)).round().astype(np.uint8))
    if image.mode not in ("1", "L"):
        channels = np.asarray(image.convert("RGB"))
        changes += ["colours made grey"] if np.ptp(channels, axis=2).any() else []
    return np.asarray(image.convert("L")), changes


def _inverted(pixels: Pixels, invert: Invert) -> tuple[Pixels, list[str]]:
    """The image white on black. A light border marks ink on paper, which is inverted."""
    top = 255 if pixels.dtype == np.uint8 else 1
    if invert == "no" or (invert == "auto" and _border(pixels) <= top / 2):
        return pixels, []
    return (top - pixels).astype(pixels.dtype), ["inverted"]


def _border(pixels: Pixels) -> float:
    edges = (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1])
    return float(np.median(np.concatenate(edges)))


def _resized(pixels: Pixels) -> tuple[Pixels, list[str]]:
    """The whole image, as large as it fits, in the middle of 28x28, on the grey of its border."""
    changes = []
    longer = max(pixels.shape)
    border = round(_border(pixels))
    if longer != SIDE:
        width, height = (max(1, round(length * SIDE / longer)) for length in reversed(pixels.shape))
        pixels = np.asarray(
            Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)
        )
        changes = ["resized"]
    if pixels.shape != (SIDE, SIDE):
        height, width = pixels.shape
        top = (SIDE - height) // 2
        left = (SIDE - width) // 2
        square = np.full((SIDE, SIDE), border, np.uint8)
        square[top : top + height, left : left + width] = pixels
        pixels = square
        changes = [*changes, "padded to a square"]
    return pixels, changes


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
