"""The pictures of a run: the newest of each tag in its TensorBoard events."""

import base64
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from savepoint import words

LARGEST_BYTES = 2_000_000
MOST = 12
KINDS = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif"}


class Picture(NamedTuple):
    """The newest image that was logged under a tag."""

    tag: str
    step: int
    url: str
    width: int
    height: int


def read(directory: Path, missing: list[str]) -> Iterator[Picture]:
    """Adds a sentence to `missing` for each picture that cannot be shown."""
    if not any(directory.glob("events.out.tfevents.*")):
        return
    # This import takes half a second.
    from tensorboard.backend.event_processing import (  # type: ignore[import-untyped]
        event_accumulator,
    )

    # TensorBoard warns about each resume and each damaged file.
    logging.getLogger("tensorboard").setLevel(logging.CRITICAL)
    try:
        kept = {"images": 1, "scalars": 1}
        events = event_accumulator.EventAccumulator(str(directory), kept).Reload()
        newest = [(tag, events.Images(tag)[-1]) for tag in sorted(events.Tags()["images"])]
    except Exception as error:  # noqa: BLE001 - TensorBoard raises anything for a damaged file
        what = f"The TensorBoard events cannot be read ({type(error).__name__})"
        missing.append(f"{what}: there are no pictures.")
        return
    for tag, image in newest[:MOST]:
        data = image.encoded_image_string
        kind = next((kind for magic, kind in KINDS.items() if data.startswith(magic)), None)
        if kind is None or len(data) > LARGEST_BYTES:
            why = f"has {words.megabytes(len(data))}" if kind else "is no PNG, JPEG or GIF"
            missing.append(f"The picture {tag} {why}: it is left out.")
            continue
        url = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
        yield Picture(tag, int(image.step), url, int(image.width), int(image.height))
    if len(newest) > MOST:
        missing.append(f"{len(newest) - MOST} more pictures are in the TensorBoard events only.")
