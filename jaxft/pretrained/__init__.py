"""Pretrained weights: the catalogue, downloads, file formats, and conversion between torch's layout and Flax's."""

from jaxft.pretrained.load import load_pretrained, read_weights
from jaxft.pretrained.weights_file import Weights, write_weights
from jaxft.targets.classification import replace_head

__all__ = ["Weights", "load_pretrained", "read_weights", "replace_head", "write_weights"]
