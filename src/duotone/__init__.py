"""Duotone: mixed precision training.

The neutral core: number formats, rounding, policies and loss-scale settings. It imports no framework;
`duotone.torch` holds the PyTorch side.
"""

__version__ = "0.1.0"
