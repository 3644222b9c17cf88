"""The example, to be replaced by yours: `model.py` the network, `figures.py` its pictures, `data.py`
its data.

Configs and flags may give the names below without a package path (`--model.net ClassicNet`).
"""

from project.data import ImageData
from project.model import ClassicNet, ConvNet, ImageClassifier

__all__ = ["ClassicNet", "ConvNet", "ImageClassifier", "ImageData"]

LITTLE = ("--data.dataset", "digits")
"""Flags that the tests add to each config: data without a download. Optional."""
