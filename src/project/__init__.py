"""The example, to be replaced by yours: the network in `model.py`, its pictures in `figures.py`,
its data in `data.py`.

Configs and flags may give the names below without a package path (`--model.net ClassicNet`); of
other classes they give the whole one.
"""

from savepoint import entry

with entry.importing():  # seconds, also before `python -m project.predict` has begun
    from project.data import ImageData
    from project.model import ClassicNet, ConvNet, ImageClassifier

__all__ = ["ClassicNet", "ConvNet", "ImageClassifier", "ImageData"]

LITTLE = {"ImageData": ("--data.dataset", "digits", "--data.batch_size", "16")}
"""Flags that the tests add to each config with such data: digits that need no download, few a step.
Optional; flags for every config may also stand here alone, without a class.
"""
