"""Which operations run in which dtype inside a cast module: one table for every device.

Six kinds, by what happens to FP32, BF16 and FP16 operands (any other dtype is left alone):

    compute          cast to the policy's `compute`, and so is the result
    float32_inside   taken and given as they come, computed and summed in FP32
    float32          cast to FP32, and the result stays FP32
    widest           cast to the widest among them; the in-place form casts to what it writes into
    refused          an error in 16 bits, with the way out
    as_given         taken as they come

What is not listed runs as it is given. Starting points are torch.autocast's lists for CUDA and the kernels' own
accumulators (torch 2.13); unlike there, norms and softmax keep 16 bits at their borders. Writing into `out=` and
in-place forms that are not listed are left alone. How a kind is carried out stands in `region`.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import get_overridable_functions

from duotone.errors import OperationError, nearest_names

Function = Callable[..., Any]
Kind = Literal["compute", "float32_inside", "float32", "widest", "refused", "as_given"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# names as in torch, torch.Tensor and torch.nn.functional; those of other namespaces with a prefix
_NAMES: Mapping[Kind, str] = MappingProxyType(
    {
        "compute": """
            linear bilinear matmul mm bmm mv addmm addbmm addmv addr baddbmm chain_matmul linalg.matmul
            linalg.multi_dot einsum tensordot inner
            conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d conv_tbc convolution
            scaled_dot_product_attention multi_head_attention_forward
            lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell prelu
        """,
        "float32_inside": """
            layer_norm group_norm rms_norm batch_norm instance_norm native_layer_norm native_group_norm
            softmax log_softmax softmin special.softmax special.log_softmax
            mean nanmean var std var_mean std_mean
            embedding embedding_bag index_select gather take take_along_dim __getitem__
            index_add index_reduce scatter_add scatter_reduce avg_pool3d rrelu
        """,
        "float32": """
            exp exp2 expm1 log log2 log10 log1p logit pow square rsqrt reciprocal softplus xlogy
            acos arccos asin arcsin cosh sinh tan erfinv lgamma digamma mvlgamma polygamma
            sum nansum prod cumsum cumprod logsumexp logcumsumexp logaddexp logaddexp2 trace dot vdot linalg.vecdot
            norm nuclear_norm frobenius_norm renorm normalize linalg.norm linalg.vector_norm linalg.matrix_norm
            lp_pool1d lp_pool2d lp_pool3d local_response_norm gumbel_softmax
            dist cdist pdist pairwise_distance cosine_similarity
            cross_entropy linear_cross_entropy nll_loss binary_cross_entropy_with_logits mse_loss l1_loss
            smooth_l1_loss huber_loss kl_div ctc_loss poisson_nll_loss gaussian_nll_loss hinge_embedding_loss
            cosine_embedding_loss margin_ranking_loss multi_margin_loss multilabel_margin_loss
            multilabel_soft_margin_loss soft_margin_loss triplet_margin_loss triplet_margin_with_distance_loss
            fft.fft fft.fft2 fft.fftn fft.ifft fft.ifft2 fft.ifftn fft.rfft fft.rfft2 fft.rfftn fft.irfft fft.irfft2
            fft.irfftn fft.hfft fft.hfft2 fft.hfftn fft.ihfft fft.ihfft2 fft.ihfftn stft istft
            polar complex view_as_complex quantile nanquantile histogram histogramdd cov corrcoef binomial
            cholesky cholesky_inverse cholesky_solve det logdet slogdet inverse pinverse svd qr geqrf orgqr ormqr
            lu lu_solve matrix_exp matrix_power triangular_solve
            linalg.cholesky linalg.cholesky_ex linalg.cond linalg.det linalg.eig linalg.eigh linalg.eigvals
            linalg.eigvalsh linalg.householder_product linalg.inv linalg.inv_ex linalg.ldl_factor
            linalg.ldl_factor_ex linalg.ldl_solve linalg.lstsq linalg.lu linalg.lu_factor linalg.lu_factor_ex
            linalg.lu_solve linalg.matrix_exp linalg.matrix_power linalg.matrix_rank linalg.pinv linalg.qr
            linalg.slogdet linalg.solve linalg.solve_ex linalg.solve_triangular linalg.svd linalg.svdvals
            linalg.tensorinv linalg.tensorsolve linalg.vander
            special.exp2 special.expm1 special.log1p special.logit special.logsumexp special.xlogy special.xlog1py
            special.entr special.erfcx special.erfinv special.gammainc special.gammaincc special.gammaln
            special.digamma special.psi special.polygamma special.multigammaln special.log_ndtr special.ndtr
            special.ndtri special.i0 special.i0e special.i1 special.i1e special.zeta
            special.airy_ai special.bessel_j0 special.bessel_j1 special.bessel_y0 special.bessel_y1
            special.modified_bessel_i0 special.modified_bessel_i1 special.modified_bessel_k0 special.modified_bessel_k1
            special.scaled_modified_bessel_k0 special.scaled_modified_bessel_k1 special.spherical_bessel_j0
            special.chebyshev_polynomial_t special.chebyshev_polynomial_u special.chebyshev_polynomial_v
            special.chebyshev_polynomial_w special.hermite_polynomial_h special.hermite_polynomial_he
            special.laguerre_polynomial_l special.legendre_polynomial_p special.shifted_chebyshev_polynomial_t
            special.shifted_chebyshev_polynomial_u special.shifted_chebyshev_polynomial_v
            special.shifted_chebyshev_polynomial_w
        """,
        "widest": """
            cat concat concatenate stack hstack vstack dstack column_stack row_stack block_diag cartesian_prod
            meshgrid addcdiv addcmul atan2 arctan2 cross linalg.cross lerp where heaviside isclose allclose
            grid_sample grid_sampler grid_sampler_2d grid_sampler_3d
            index_copy index_put masked_scatter scatter put select_scatter slice_scatter diagonal_scatter
            index_add_ index_copy_ index_put_ index_reduce_ scatter_ scatter_add_ scatter_reduce_ masked_scatter_
            put_ addmm_ addbmm_ addmv_ addr_ baddbmm_ lerp_ heaviside_ __setitem__
        """,
        "refused": "binary_cross_entropy",
        # autocast has FP32 for most of these on a CPU, and on no other device; a number beyond FP16's range that is to
        # be filled in, such as -1e9, is taken as its largest
        "as_given": """
            masked_fill masked_fill_ pad max_pool3d adaptive_avg_pool3d adaptive_max_pool3d
            max_unpool1d max_unpool2d max_unpool3d fractional_max_pool2d fractional_max_pool3d
        """,
    }
)
# operators and methods that are another spelling of an operation
_SPELLINGS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "matmul": ("__matmul__", "__rmatmul__"),
        "pow": ("__pow__", "__rpow__"),
        "reciprocal": ("__rtruediv__", "__rdiv__"),
    }
)
_NAMESPACES: Mapping[str, object] = MappingProxyType(
    {"linalg": torch.linalg, "fft": torch.fft, "special": torch.special}
)
_forms: dict[Function, list[Function]] = {}


def kinds_by_name() -> dict[str, Kind]:
    """Return the kind of every listed operation by its name, in the table's order.

    >>> kinds_by_name()["matmul"], kinds_by_name()["linalg.svd"]
    ('compute', 'float32')
    """
    return {name: kind for kind, names in _NAMES.items() for name in names.split()}


@functools.cache
def kinds() -> Mapping[Function, Kind]:
    """Return the kind of every listed function of torch; methods and operators are functions of their own.

    >>> kinds()[torch.exp], kinds()[torch.Tensor.exp]
    ('float32', 'float32')
    """
    return MappingProxyType(
        {function: kind for name, kind in kinds_by_name().items() for function in functions_of(name)}
    )


def functions_of(name: str) -> Iterator[Function]:
    """Yield the functions of torch that carry an operation's name, in each namespace that has it.

    >>> [function.__name__ for function in functions_of("bmm")]
    ['bmm', 'bmm']
    """
    prefix, _, inner = name.rpartition(".")
    if prefix not in ("", *_NAMESPACES):
        return
    for space in (_NAMESPACES[prefix],) if prefix else (torch, F, Tensor):
        for spelling in (inner, *_SPELLINGS.get(inner, ())):
            if hasattr(space, spelling):
                yield getattr(space, spelling)


def functions_like(function: Function) -> list[Function]:
    """Return a function of torch and its other forms: method, operator, and the same name in another namespace.

    Raises:
        OperationError: it is not a function of torch that can be intercepted.

    >>> torch.Tensor.exp in functions_like(torch.exp)
    True
    """
    found = forms().get(function)
    if found is None:
        raise OperationError(
            f"{function!r:.60} is not a function of torch; give torch.exp for instance, neither its name nor a "
            "module's class, and put functions of your own under a rule with op_rule(function, kind)"
        )
    return found


def forms() -> Mapping[Function, list[Function]]:
    """Return the forms of every function of torch that can be intercepted."""
    # not functools.cache, which torch.compile looks through
    if not _forms:
        # the rest are attributes of tensors
        namespaces = (torch, torch.functional, F, Tensor, torch.linalg, torch.fft, torch.special)
        listed = get_overridable_functions()
        for function in (function for namespace in namespaces for function in listed[namespace]):
            if function.__name__ != "__get__":
                same = list(functions_of(function.__name__))
                _forms[function] = same if function in same else [function]
        for name in kinds_by_name():
            same = list(functions_of(name))
            _forms.update(dict.fromkeys(same, same))
    return _forms


def check_kind(kind: str) -> Kind:
    """Return `kind` if it is one of those that users may give an operation.

    Raises:
        OperationError: it is not.
    """
    allowed = [each for each in KINDS if each != "refused"]
    if kind not in allowed:
        raise OperationError(f'an operation cannot be "{kind}"; {nearest_names(str(kind), allowed)}')
    return kind  # type: ignore[return-value]
