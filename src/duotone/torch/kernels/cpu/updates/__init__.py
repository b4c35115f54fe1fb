"""The updates for Numba, a file each, under the names of `kernels.updates` and operation by operation as there.

`coefficients` is compiled as it is. `apply`, given how many moments there are, returns a compiled function of gradient,
master, three moments, those that there are not being 0, and coefficients.
"""
