"""The updates for Triton, a file each, under the names of `kernels.updates` and operation by operation as there.

`coefficients` is FP64, over a block of parameters; `apply` is FP32, over a tile of elements, every operation rounded
once: `div` and `sqrt` without a suffix are approximations there.
"""
