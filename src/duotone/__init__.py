"""Duotone: mixed precision training.

The neutral core: number formats, policies and loss-scale settings, and the reference rounder in `duotone.rounding`.
It imports no framework; `duotone.torch` holds the PyTorch side.
"""

from typing import TYPE_CHECKING as _TYPE_CHECKING

from duotone.formats import FORMATS, Format, get_format
from duotone.loss_scale import LossScale
from duotone.policy import Policy, Rule

__version__ = "0.1.0"

__all__ = ["FORMATS", "Format", "LossScale", "Policy", "Rule", "__version__", "get_format"]

if not _TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        where = "" if name.startswith("_") else "; what trains stands in duotone.torch: import duotone.torch as dt"
        raise AttributeError(f'duotone has no attribute "{name}"{where}')
