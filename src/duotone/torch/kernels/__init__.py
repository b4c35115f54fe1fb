"""The operations of an optimizer step, one signature for every backend.

`reference` is plain torch, runs anywhere and defines the bits. The fused CPU and CUDA backends will stand beside it and
be chosen here by device; whoever calls these functions will not notice.
"""

from duotone.torch.kernels.codec import SPLIT_DTYPES, decode, encode
from duotone.torch.kernels.reference import adamw, grad_stats, sgd
from duotone.torch.kernels.weights import Rounding, Weights

__all__ = ["SPLIT_DTYPES", "Rounding", "Weights", "adamw", "decode", "encode", "grad_stats", "sgd"]
