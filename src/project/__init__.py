"""The example, to be replaced by yours: the network in `model.py`, its pictures in `figures.py`,
its data in `data.py`.

Configs and flags may give the names below without a package path (`--model.net ClassicNet`).
"""

from project.data import ImageData
from project.model import ClassicNet, ConvNet, ImageClassifier

__all__ = ["ClassicNet", "ConvNet", "ImageClassifier", "ImageData"]

LITTLE = ("--data.dataset", "digits")
"""Flags that the tests add to each config: data without a download. Optional."""
