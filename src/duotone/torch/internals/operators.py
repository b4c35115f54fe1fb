"""Private names of torch's operations: functions that a public one calls, and operators by their own names."""

from collections.abc import Callable, Mapping
from typing import Any

from duotone.torch.internals.lookup import find

# functions by the public name of the operation, which function modes see in place of it; without one, the operation
# runs as it is given
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/nn/functional.py
_FOUND: Mapping[str, Any] = {
    "grouped_mm": find("torch:_grouped_mm"),
    "scaled_grouped_mm": find("torch:_scaled_grouped_mm_v2"),
    "scaled_mm": find("torch:_scaled_mm_v2"),
    "sparse.sum": find("torch:_sparse_sum"),
    # what torch.distributions calls
    "standard_gamma": find("torch:_standard_gamma"),
    "sample_dirichlet": find("torch:_sample_dirichlet"),
}
HIDDEN_FUNCTIONS: Mapping[str, tuple[Callable[..., Any], ...]] = {
    name: (function,) for name, function in _FOUND.items() if function is not None
}
# names in torch.ops.aten
# https://github.com/pytorch/pytorch/blob/v2.13.0/aten/src/ATen/native/native_functions.yaml
OPERATORS: Mapping[str, str] = {
    "grouped_mm": "_grouped_mm",
    "sparse.mm": "_sparse_mm",
    "sparse.addmm": "_sparse_addmm",
    "sparse.sampled_addmm": "sparse_sampled_addmm",
    "sparse.sum": "_sparse_sum",
    "sparse.softmax": "_sparse_softmax",
    "sparse.log_softmax": "_sparse_log_softmax",
    "affine_grid": "affine_grid_generator",
    "fold": "col2im",
    "standard_gamma": "_standard_gamma",
    "sample_dirichlet": "_sample_dirichlet",
}
# antialiased resampling, which `F.interpolate` calls; without them, it is widened where that function is called alone
ANTIALIASED: tuple[Callable[..., Any], ...] = tuple(
    kernel
    for kernel in (find("torch:ops.aten._upsample_bilinear2d_aa"), find("torch:ops.aten._upsample_bicubic2d_aa"))
    if kernel is not None
)
