"""Yours, replace it: what is trained. `model.py` and `figures.py` the network and its pictures,
`data.py` its data.

The names below are what configs and flags may say without a package path (`--model.net
ClassicNet`).
"""

from project.data import ImageData
from project.model import ClassicNet, ConvNet, ImageClassifier

__all__ = ["ClassicNet", "ConvNet", "ImageClassifier", "ImageData"]

LITTLE = ("--data.dataset", "digits")
"""What the tests lay over each config: data that needs no download. Optional."""
