"""Which operations run in which format inside a cast model: a kind for each family of operations, for every framework.

A kind says what happens to FP32, BF16 and FP16 operands; any other dtype is left alone:

    compute          cast to the policy's `compute`, and so is the result
    float32_inside   taken and given as they come, computed and summed in FP32
    float32          cast to FP32, and the result stays FP32
    widest           cast to the widest among them; the in-place form casts to what it writes into
    refused          an error in 16 bits, with the way out
    as_given         taken as they come

A framework lists the names of its operations by family (`torch.exp`, an overload such as `aten::exp`, the JAX primitive
`exp`), and `kinds_of` gives each its kind. What is in no list runs as it is given. How a kind is carried out is the
framework's part. Sources: torch.autocast's lists for CUDA, and what the kernels of torch accumulate in.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

from duotone.errors import OperationError, nearest_names

Kind = Literal["compute", "float32_inside", "float32", "widest", "refused", "as_given"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# what each kind means, in the order in which they are shown
MEANINGS: Mapping[Kind, str] = MappingProxyType(
    {
        "compute": "operands cast to the policy's compute dtype, and so is the result",
        "float32_inside": "16 bits in, 16 bits out; computed and summed in FP32",
        "float32": "operands cast to FP32, the result stays FP32",
        "widest": "operands cast to the widest among them; in place, to what is written into",
        "refused": "an error in 16 bits, with the way out",
        "as_given": "runs on what it is given; so does whatever is not listed: relu, gelu, view",
    }
)


@dataclass(frozen=True)
class Family:
    """Operations that have their kind for one reason.

    Attributes:
        kind: what happens to their operands.
        reason: why.
    """

    kind: Kind
    reason: str


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "product": Family("compute", "matrix products, which tensor cores sum in FP32"),
        "convolution": Family("compute", "products of patches"),
        "attention": Family("compute", "two products, with a softmax in FP32 between them in one kernel"),
        "sparse_product": Family("compute", "products with a sparse operand: summed in FP32, then rounded"),
        "recurrence": Family("compute", "layers and cells made of products"),
        "weighted_activation": Family("compute", "an activation with a weight, which takes one dtype"),
        "normalization": Family("float32_inside", "statistics of many elements, but a bounded result"),
        "softmax": Family("float32_inside", "a sum of exponentials, but a bounded result"),
        "log_softmax": Family("float32", "logarithms of probabilities: of -10, rounding to 16 bits takes up to 3 %"),
        "moment": Family("float32_inside", "means and variances: sums, but a result of the elements' own size"),
        "lookup": Family("float32_inside", "copies forward; the gradient of an element that was read often is a sum"),
        "remainder": Family("float32_inside", "what is left of a quotient, which its gradient takes"),
        "sparse_softmax": Family("float32_inside", "as softmax; without 16-bit kernels"),
        "sum_by_index": Family("float32_inside", "sums of many terms into few places"),
        "average_pool": Family("float32_inside", "means of windows, and sums of their gradients"),
        "maximum_pool": Family("float32_inside", "maxima of windows; where windows overlap, gradients are sums"),
        "random_window": Family("float32_inside", "maxima of windows whose places are computed in the data's dtype"),
        "overlap": Family("float32_inside", "copies; the gradient of what was copied often, or their sum, is a sum"),
        "interpolation": Family("float32_inside", "an image and where it is read; 16 bits tell 256 places apart"),
        "resampling": Family("float32_inside", "an image in another size, for which CPUs lack 16-bit kernels"),
        "quantization": Family("float32_inside", "rounds to a grid, whose steps are FP32"),
        "random_activation": Family("float32_inside", "an activation that has no 16-bit kernel on CPUs"),
        "exponential": Family("float32", "exponentials, logarithms and powers: they overflow or amplify rounding"),
        "steep": Family("float32", "functions with poles or steep slopes, which amplify rounding"),
        "coordinate": Family("float32", "places in an image, of which 16 bits tell 256 apart"),
        "sum": Family("float32", "sums and products of all elements, which outgrow 16 bits"),
        "vector_norm": Family("float32", "sums of powers"),
        "sampling": Family("float32", "noise made by logarithms of uniform numbers"),
        "distance": Family("float32", "differences that cancel, and their sums"),
        "loss": Family("float32", "sums over a batch, which gradients start from"),
        "fourier": Family("float32", "sums over a signal; few devices have them in 16 bits"),
        "complex": Family("float32", "complex numbers of two FP32 parts"),
        "statistic": Family("float32", "order, counts and covariances of many elements"),
        "factorization": Family("float32", "linear algebra beside products: ill-conditioned, no 16-bit kernels"),
        "special": Family("float32", "series and recurrences: gamma, error, Bessel functions, polynomials"),
        "join": Family("widest", "copies into one tensor, which has one dtype"),
        "mixed_operands": Family("widest", "elementwise, but its operands need one dtype"),
        "copy_by_index": Family("widest", "copies into a tensor, which keeps its dtype only if it is the widest"),
        "write": Family("widest", "writes into its first operand, whose dtype decides"),
        "loss_of_probabilities": Family("refused", "near 1, a 16-bit probability has no fraction left"),
        # autocast has FP32 for most of these on a CPU, and on no other device
        "number": Family("as_given", "elementwise; FP32 beside a number that 16 bits do not have, such as 1e-8"),
        "number_in_place": Family("as_given", "the same in place; such a number is taken as the nearest they have"),
        "bound": Family("as_given", "elementwise; FP32 with a bound that 16 bits move to 0 or 1, such as 1e-8"),
        "bound_in_place": Family("as_given", "the same in place; such a bound is taken as the next on its side"),
        "fill": Family("as_given", "copies; a number beyond the range, such as -1e9, is taken as the largest"),
        "cast": Family("as_given", "the user's own choice; constants beyond the range become the largest"),
        "pool": Family("as_given", "maxima and copies"),
        "scaled_product": Family("as_given", "products of 8-bit operands, whose FP32 scales stay as they are"),
    }
)


def kinds_of(names: Mapping[str, str]) -> dict[str, Kind]:
    """Return the kind of every operation that a framework lists.

    Args:
        names: family to names of operations with spaces between them; the order is kept.

    Raises:
        OperationError: there is no such family, or a name stands twice.

    >>> kinds_of({"product": "dot_general", "exponential": "exp log"})
    {'dot_general': 'compute', 'exp': 'float32', 'log': 'float32'}
    """
    kinds: dict[str, Kind] = {}
    for family, listed in names.items():
        if family not in FAMILIES:
            raise OperationError(f'there is no family of operations "{family}"; {nearest_names(family, FAMILIES)}')
        for name in listed.split():
            if name in kinds:
                raise OperationError(f'operation "{name}" stands twice; leave it in one family')
            kinds[name] = FAMILIES[family].kind
    return kinds


def check_kind(kind: str) -> Kind:
    """Return `kind` if it is one of those that users may give an operation.

    Raises:
        OperationError: it is not.

    >>> check_kind("float32")
    'float32'
    """
    allowed = [each for each in KINDS if each != "refused"]
    if kind not in allowed:
        raise OperationError(f'an operation cannot be "{kind}"; {nearest_names(str(kind), allowed)}')
    return kind  # type: ignore[return-value]
