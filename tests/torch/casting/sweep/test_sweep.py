"""Every function of torch in 16 bits on a CPU at the sizes of real data, forward and backward, against FP32.

A function is called in a region on 16-bit operands, and on the same numbers in FP32 outside. Its results and gradients
may be off by what one rounding does: 0.6 units of rounding in the mean square. What may be off by more stands in
`MORE`, with its reason; what is not called, in `NOT_CALLED`.
"""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, get_overridable_functions
from torch.utils._pytree import tree_leaves

from duotone.torch.casting.operation_table import kinds
from duotone.torch.casting.region import Region

from . import elementwise, images, lookups, others, products, reductions
from .data import CASES
from .not_called import NOT_CALLED

assert all((elementwise, images, lookups, others, products, reductions))
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
# units of one rounding, in the mean square; two roundings give 0.8
LIMIT = 0.9
# name: limit, and why it is higher
MORE = {
    "tanhshrink": (1.1, "a difference that cancels, from a rounded tanh"),
    "sigmoid big": (2.0, "the derivative of a sigmoid is taken from its rounded result, as under torch.amp"),
    "tanh big": (2.0, "the derivative of a tanh is taken from its rounded result, as under torch.amp"),
    "kron": (1.7, "a product of numbers and a sum, each rounded"),
    "embedding max_norm": (2.5, "the table itself is renormed in its 16 bits"),
    "interpolate trilinear": (1.1, "weights of eight corners, each product rounded once"),
    "ctc_loss": (2.6, "log-probabilities that are rounded before the loss"),
    "svd_lowrank": (1.5, "several products, each rounded"),
    "lstm": (1.5, "several products, each rounded"),
    "multi_head_attention": (1.5, "several products, each rounded"),
    "scatter_reduce_ mean": (1.1, "a sum and a quotient in 16 bits, in place"),
}


def floating(result: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def run(name: str, operands: list[Tensor], context: Any) -> tuple[Any, list[Tensor | None]]:
    """Return the result and the gradients, for positive gradients of the result: sums of them grow with their count."""
    function, result = CASES[name][0], None
    leaves = [operand.clone().requires_grad_() for operand in operands]
    try:
        with context():
            result = function(*leaves)
        results = [each for each in floating(result) if each.requires_grad]
        generator = torch.Generator().manual_seed(0)
        weights = [(torch.rand(each.shape, generator=generator) + 0.5).bfloat16().to(each.dtype) for each in results]
        grads = list(torch.autograd.grad(results, leaves, weights, allow_unused=True)) if results else []
    except (RuntimeError, NotImplementedError) as error:
        # no derivative, of one operand or at all
        if result is None and "derivative" not in str(error) and "differentiable" not in str(error):
            raise
        with context():
            return function(*operands), []
    return result, grads


def units(got: Tensor, exact: Tensor, dtype: torch.dtype) -> float:
    """Return how far a result is off in units of one rounding to `dtype`, in the mean square."""
    assert got.shape == exact.shape
    got, exact = got.detach().double(), exact.detach().double()
    # beyond the range lies Inf, and where FP16 has no normal number errors have a fixed size
    exact = exact.where(exact.abs() < torch.finfo(dtype).max, torch.inf * exact.sign())
    finite = exact.isfinite()
    assert got[finite].isfinite().all()
    off = ((got - exact)[finite].abs() - torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps).clamp(min=0)
    size = exact[finite].norm()
    # a few numbers may all be off by half a unit in the last place
    room = 1.2 if exact.numel() < 100 else 1.0
    return float(off.norm() / size / (torch.finfo(dtype).eps / 2) / room) if size else 0.0


@HALVES
@pytest.mark.parametrize("name", CASES)
def test_a_function_is_off_by_one_rounding(name, dtype):
    rounded = [operand.to(dtype) for operand in CASES[name][1]]
    expected, grads = run(name, [operand.float() for operand in rounded], nullcontext)
    limit = MORE.get(name, (LIMIT, ""))[0]
    for operands in (rounded, [operand.float() for operand in rounded]):
        got, got_grads = run(name, operands, lambda: Region(dtype).on("cpu"))
        for one, other in zip(tree_leaves(got), tree_leaves(expected), strict=True):
            if isinstance(one, Tensor) and one.is_floating_point():
                assert units(one, other, dtype) <= limit, "result"
            elif isinstance(one, Tensor):
                assert torch.equal(one, other)
        for place, (one, other) in enumerate(zip(got_grads, grads, strict=True)):
            if one is not None and other is not None:
                assert units(one, other, dtype) <= limit, f"gradient {place}"


def test_every_function_of_torch_is_called_or_named():
    called: set[str] = set()

    class Recording(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            called.add(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    for function, operands in CASES.values():
        with Recording(), torch.no_grad():
            function(*operands)
    listed = get_overridable_functions()
    spaces = (torch, torch.functional, F, Tensor, torch.linalg, torch.fft, torch.special)
    functions = {function for space in spaces for function in listed[space] if function.__name__ != "__get__"}
    # what the table casts has its own tests, bit for bit
    cast = {function.__name__ for function, kind in kinds().items() if kind not in ("as_given", "float32_inside")}
    names = {function.__name__ for function in functions if not isinstance(function, type)}
    # forms in place compute as the others do
    in_place = {name for name in names if name.endswith("_") and not name.endswith("__") and name[:-1] in names}
    assert names - called - cast - in_place - set(NOT_CALLED) == set()
