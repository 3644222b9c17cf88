"""Name the class of images of any size and colour, from a checkpoint alone: no data set is needed.

python -m project.predict outputs/first photo.png
python -m project.predict outputs/first/checkpoints/best.ckpt scans/ -o scans.csv

INPUT is an image file, a folder of them, or a .npy file: (28, 28), (N, 28, 28) or (N, 1, 28, 28),
uint8 or float in 0..1. The network knows grey, 28x28, white on black. The row of an image names the
changes that were made to it. A broken image of a folder is left out, with a line that names it, and
the exit code is 1.
"""

import argparse
import csv
import io
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from project.pictures import SIDE, SUFFIXES, Picture, Pixels, read
from savepoint import Parser, Rebuilt, entry, file_or_best, plural, rebuild, replacing
from savepoint.errors import CheckpointSaveError, ConfigError

BATCH = 256


def main(argv: Sequence[str]) -> int:
    arguments = _parse(argv)
    path, source = file_or_best(arguments.ckpt)
    pictures, broken = read(arguments.input, arguments.invert)
    for error in broken:
        print(f"Left out. {error}", file=sys.stderr)
    rebuilt = rebuild(path, allow=arguments.allow)
    names, shares = predict(rebuilt, [picture.pixels for picture in pictures])
    rows = [_row(picture, names, share) for picture, share in zip(pictures, shares, strict=True)]
    left_out = f"; {plural(len(broken), 'broken image')} left out, see above" if broken else ""
    summary = _summary(pictures, arguments.input)
    print(f"{source}\n{summary}{left_out}", file=sys.stderr)
    text = _csv(rows, names if arguments.all else [])
    if arguments.output is not None and arguments.output.suffix == ".json":
        text = _json(rebuilt, rows)
    if arguments.output is None:
        print(text, end="")
        entry.require_whole_output()
    else:
        try:
            with replacing(arguments.output) as file:  # a crash leaves what was there
                file.write(text.encode())
        except CheckpointSaveError as error:
            raise ConfigError(str(error)) from error
        print(f"written: {arguments.output}", file=sys.stderr)
    return 1 if broken else 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("python -m project.predict", description=(__doc__ or "").split("\n")[0])
    ckpt = "a checkpoint, or a run directory: its best; default: the newest run"
    parser.add_argument("ckpt", metavar="CKPT", nargs="?", help=ckpt)
    image = "an image, a folder of images, or a .npy file"
    parser.add_argument("input", metavar="INPUT", type=Path, help=image)
    file = ".csv or .json; without it CSV is printed"
    parser.add_argument("-o", dest="output", metavar="FILE", type=Path, help=file)
    border = "auto: where the border is light"
    parser.add_argument("--invert", choices=["auto", "yes", "no"], default="auto", help=border)
    every = "the probabilities of all classes in the CSV; JSON has them"
    parser.add_argument("--all", action="store_true", help=every)
    code = "though the model's code has changed"
    parser.add_argument("--allow", choices=["canary"], action="append", default=[], help=code)
    arguments = parser.parse_intermixed_args(argv)
    if arguments.output is not None and arguments.output.suffix not in (".csv", ".json"):
        raise ConfigError(
            f"Neither CSV nor JSON: {arguments.output}. Expected a name that ends in .csv or "
            ".json. Give another one: -o FILE"
        )
    return arguments


def predict(rebuilt: Rebuilt, images: Sequence[Pixels]) -> tuple[list[str], Tensor]:
    """The names of the classes, and the probability of each for each image: (N, classes).

    Raises:
        ConfigError: the checkpoint's model is not for such images.
    """
    example = rebuilt.model.example_input_array
    if isinstance(example, Tensor) and example.shape[1:] != (1, SIDE, SIDE):
        raise ConfigError(
            f"Not a model for images of 1x{SIDE}x{SIDE}: {rebuilt.path}, whose input is "
            f"{list(example.shape[1:])}. This program prepares such images alone. Write a "
            "predict.py for yours."
        )
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    model = rebuilt.model.to(device)
    logits = []
    with torch.no_grad():
        for start in range(0, len(images), BATCH):
            batch = torch.from_numpy(np.stack(images[start : start + BATCH]))[:, None]
            if batch.is_floating_point():
                batch = batch.to(model.dtype)
            logits.append(model(batch.to(device)).float().cpu())
    shares = torch.cat(logits).softmax(1)
    return rebuilt.classes or list(map(str, range(shares.shape[1]))), shares


# -- output --------------------------------------------------------------------------------------


def _row(picture: Picture, names: Sequence[str], shares: Tensor) -> dict[str, Any]:
    best = int(shares.argmax())
    return {
        # A name may be no text.
        "file": str(picture.file).encode(errors="backslashreplace").decode(),
        "index": picture.index,
        "label": names[best],
        "probability": round(float(shares[best]), 6),
        "changes": picture.changes,
        "probabilities": {
            name: round(share, 6) for name, share in zip(names, shares.tolist(), strict=True)
        },
    }


def _summary(pictures: Sequence[Picture], source: Path) -> str:
    counts = Counter(change for picture in pictures for change in picture.changes)
    changes = ", ".join(f"{count} {change}" for change, count in counts.items())
    line = f"{plural(len(pictures), 'image')}: {changes or 'all taken as they are'}"
    files = list(source.iterdir()) if source.is_dir() else []
    others = [file for file in files if file.suffix.lower() not in SUFFIXES]
    return f"{line}; {plural(len(others), 'other file')} left out" if others else line


def _json(rebuilt: Rebuilt, rows: Sequence[Mapping[str, Any]]) -> str:
    source = {
        "checkpoint": str(rebuilt.path),
        "digest": rebuilt.manifest["digest"],
        "step": rebuilt.manifest["step"],
    }
    return json.dumps({**source, "predictions": rows}, indent=2) + "\n"


def _csv(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "index", "label", "probability", "changes", *names])
    for row in rows:
        cells = [row[key] for key in ("file", "index", "label", "probability")]
        shares = [row["probabilities"][name] for name in names]
        writer.writerow([*cells, "; ".join(row["changes"]), *shares])
    return text.getvalue()


if __name__ == "__main__":
    entry.run(main, str(Path(__file__).parents[1]))  # src/ lies in the project, as train.py does
