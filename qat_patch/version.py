"""The version of the package. A literal, so that a build does not import torch."""

__version__ = "0.1.0"
