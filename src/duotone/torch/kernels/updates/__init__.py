"""The updates of optimizers, a file each: settings, slots, coefficients by name, and the arithmetic in plain torch.

`cpu/updates` and `cuda/updates` have the same two functions of each, under the same names, for compiled kernels.
"""
