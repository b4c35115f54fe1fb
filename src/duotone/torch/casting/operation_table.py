"""torch's operations by family: the functions, methods and operators to which `duotone.operations` gives a kind.

One table for every device. Starting points are torch.autocast's lists for CUDA and the kernels' own accumulators (torch
2.13); unlike there, norms and softmax keep 16 bits at their borders. What is not listed runs as it is given. Left
alone: calls that write into `out=`, and in-place forms that are not listed. `handlers` carries the kinds out.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import get_overridable_functions

from duotone.errors import OperationError
from duotone.operations import Kind, kinds_of
from duotone.torch.internals.operators import HIDDEN_FUNCTIONS, OPERATORS

Function = Callable[..., Any]

# family to names as in torch, torch.Tensor and torch.nn.functional; those of other namespaces with a prefix
_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "product": """
            linear bilinear matmul mm bmm mv addmm addbmm addmv baddbmm chain_matmul linalg.matmul linalg.multi_dot
            einsum tensordot inner grouped_mm
        """,
        "convolution": "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d conv_tbc convolution",
        "attention": "scaled_dot_product_attention multi_head_attention_forward",
        "sparse_product": "sparse.mm sparse.addmm sparse.sampled_addmm hspmm smm sspaddmm",
        "recurrence": "lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell",
        "weighted_activation": "prelu",
        "normalization": "layer_norm group_norm rms_norm batch_norm instance_norm native_layer_norm native_group_norm",
        "softmax": "softmax softmin special.softmax",
        "log_softmax": "log_softmax special.log_softmax",
        "moment": "mean nanmean var std var_mean std_mean",
        "lookup": "embedding embedding_bag index_select gather take take_along_dim __getitem__",
        "sum_by_index": "index_add index_reduce scatter_add scatter_reduce segment_reduce coalesce to_dense",
        "remainder": "fmod remainder",
        "sparse_softmax": "sparse.softmax sparse.log_softmax",
        "average_pool": """
            avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
        """,
        "maximum_pool": """
            max_pool1d max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices
        """,
        "random_window": """
            fractional_max_pool2d fractional_max_pool3d fractional_max_pool2d_with_indices
            fractional_max_pool3d_with_indices
        """,
        "overlap": "fold unfold pad",
        "interpolation": "grid_sample grid_sampler grid_sampler_2d grid_sampler_3d",
        "resampling": "interpolate",
        "quantization": """
            fake_quantize_per_tensor_affine fake_quantize_per_channel_affine fused_moving_avg_obs_fake_quant
        """,
        "random_activation": "rrelu",
        "exponential": "exp exp2 expm1 log log2 log10 log1p logit pow square rsqrt reciprocal softplus xlogy",
        "steep": """
            acos arccos asin arcsin acosh arccosh atanh arctanh cosh sinh tan sinc erfinv lgamma digamma mvlgamma
            polygamma atan2 arctan2
        """,
        "coordinate": "affine_grid affine_grid_generator",
        "sum": """
            sum nansum prod cumsum cumprod logsumexp logcumsumexp logaddexp logaddexp2 trace dot vdot linalg.vecdot
            sum_to_size sparse.sum trapezoid trapz cumulative_trapezoid
        """,
        "vector_norm": """
            norm nuclear_norm frobenius_norm renorm normalize linalg.norm linalg.vector_norm linalg.matrix_norm
            lp_pool1d lp_pool2d lp_pool3d local_response_norm
        """,
        "sampling": "gumbel_softmax multinomial standard_gamma sample_dirichlet",
        "distance": "dist cdist pdist pairwise_distance cosine_similarity",
        "loss": """
            cross_entropy linear_cross_entropy nll_loss binary_cross_entropy_with_logits mse_loss l1_loss smooth_l1_loss
            huber_loss kl_div ctc_loss poisson_nll_loss gaussian_nll_loss hinge_embedding_loss cosine_embedding_loss
            margin_ranking_loss multi_margin_loss multilabel_margin_loss multilabel_soft_margin_loss soft_margin_loss
            triplet_margin_loss triplet_margin_with_distance_loss
        """,
        "fourier": """
            fft.fft fft.fft2 fft.fftn fft.ifft fft.ifft2 fft.ifftn fft.rfft fft.rfft2 fft.rfftn fft.irfft fft.irfft2
            fft.irfftn fft.hfft fft.hfft2 fft.hfftn fft.ihfft fft.ihfft2 fft.ihfftn stft istft
        """,
        "complex": "polar complex view_as_complex",
        "statistic": "quantile nanquantile histogram histogramdd histc cov corrcoef binomial",
        "factorization": """
            cholesky cholesky_inverse cholesky_solve det logdet slogdet inverse pinverse svd qr geqrf orgqr ormqr lu
            lu_solve matrix_exp matrix_power triangular_solve linalg.cholesky linalg.cholesky_ex linalg.cond linalg.det
            linalg.eig linalg.eigh linalg.eigvals linalg.eigvalsh linalg.householder_product linalg.inv linalg.inv_ex
            linalg.ldl_factor linalg.ldl_factor_ex linalg.ldl_solve linalg.lstsq linalg.lu linalg.lu_factor
            linalg.lu_factor_ex linalg.lu_solve linalg.matrix_exp linalg.matrix_power linalg.matrix_rank linalg.pinv
            linalg.qr linalg.slogdet linalg.solve linalg.solve_ex linalg.solve_triangular linalg.svd linalg.svdvals
            linalg.tensorinv linalg.tensorsolve linalg.vander
        """,
        "special": """
            special.exp2 special.expm1 special.log1p special.logit special.logsumexp special.xlogy special.xlog1py
            special.entr special.erfcx special.erfinv special.gammainc special.gammaincc special.gammaln special.digamma
            special.psi special.sinc special.polygamma special.multigammaln special.log_ndtr special.ndtr special.ndtri
            special.i0 special.i0e special.i1 special.i1e special.zeta special.airy_ai special.bessel_j0
            special.bessel_j1 special.bessel_y0 special.bessel_y1 special.modified_bessel_i0 special.modified_bessel_i1
            special.modified_bessel_k0 special.modified_bessel_k1 special.scaled_modified_bessel_k0
            special.scaled_modified_bessel_k1 special.spherical_bessel_j0 special.chebyshev_polynomial_t
            special.chebyshev_polynomial_u special.chebyshev_polynomial_v special.chebyshev_polynomial_w
            special.hermite_polynomial_h special.hermite_polynomial_he special.laguerre_polynomial_l
            special.legendre_polynomial_p special.shifted_chebyshev_polynomial_t special.shifted_chebyshev_polynomial_u
            special.shifted_chebyshev_polynomial_v special.shifted_chebyshev_polynomial_w
        """,
        "join": """
            cat concat concatenate stack hstack vstack dstack column_stack row_stack block_diag cartesian_prod meshgrid
        """,
        "mixed_operands": """
            addr addcdiv addcmul cross linalg.cross lerp where heaviside isclose allclose bucketize
            searchsorted
        """,
        "copy_by_index": """
            index_copy index_put masked_scatter scatter put select_scatter slice_scatter diagonal_scatter
        """,
        "write": """
            index_add_ index_copy_ index_put_ index_reduce_ scatter_ scatter_add_ scatter_reduce_ masked_scatter_ put_
            addmm_ addbmm_ addmv_ addr_ baddbmm_ lerp_ heaviside_ __setitem__
        """,
        "loss_of_probabilities": "binary_cross_entropy",
        "number": "add sub subtract rsub mul multiply div divide true_divide",
        "number_in_place": "add_ sub_ subtract_",
        "bound": "clamp clip clamp_min clamp_max",
        "bound_in_place": "clamp_ clip_ clamp_min_ clamp_max_",
        "fill": """
            masked_fill masked_fill_ full full_like new_full fill fill_ fill_diagonal_ index_fill index_fill_ tensor
            as_tensor scalar_tensor new_tensor nan_to_num nan_to_num_ hardtanh threshold copy_ constant_pad_nd
        """,
        "cast": "to half bfloat16 type type_as",
        "pool": """
            adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d max_unpool1d max_unpool2d max_unpool3d
        """,
        "scaled_product": "scaled_mm scaled_grouped_mm",
    }
)
# operators and methods that are another spelling of an operation
_SPELLINGS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "matmul": ("__matmul__", "__rmatmul__"),
        "pow": ("__pow__", "__rpow__"),
        "reciprocal": ("__rtruediv__", "__rdiv__"),
        "add": ("__add__", "__radd__"),
        "sub": ("__sub__",),
        "rsub": ("__rsub__",),
        "mul": ("__mul__", "__rmul__"),
        "div": ("__truediv__", "__div__"),
        "add_": ("__iadd__",),
        "sub_": ("__isub__",),
    }
)
_NAMESPACES: Mapping[str, object] = MappingProxyType(
    {"linalg": torch.linalg, "fft": torch.fft, "special": torch.special, "sparse": torch.sparse}
)
# a function of torch to all functions that are the same operation
_same_operation: dict[Function, list[Function]] = {}


@functools.cache
def kinds_by_name() -> Mapping[str, Kind]:
    """Return the kind of every listed operation by its name, in the table's order.

    >>> kinds_by_name()["matmul"], kinds_by_name()["linalg.svd"]
    ('compute', 'float32')
    """
    return MappingProxyType(kinds_of(_NAMES))


@functools.cache
def kinds() -> Mapping[Function, Kind]:
    """Return the kind of every listed function of torch; methods and operators are functions of their own.

    >>> kinds()[torch.exp], kinds()[torch.Tensor.exp]
    ('float32', 'float32')
    """
    return MappingProxyType(
        {function: kind for name, kind in kinds_by_name().items() for function in functions_named(name)}
    )


def functions_in(family: str) -> Iterator[Function]:
    """Yield the listed functions of a family.

    >>> torch.Tensor.scatter_add in functions_in("sum_by_index")
    True
    """
    yield from functions_named(*names_in(family))


def names_in(family: str) -> list[str]:
    """Return the names of the operations of a family.

    >>> names_in("weighted_activation")
    ['prelu']
    """
    return _NAMES[family].split()


def functions_named(*names: str) -> Iterator[Function]:
    """Yield the functions of torch that carry an operation's name, in each namespace that has it.

    >>> [function.__name__ for function in functions_named("bmm")]
    ['bmm', 'bmm']
    """
    for name in names:
        prefix, _, inner = name.rpartition(".")
        if prefix not in ("", *_NAMESPACES):
            continue
        for space in (_NAMESPACES[prefix],) if prefix else (torch, F, Tensor):
            for spelling in (inner, *_SPELLINGS.get(inner, ())):
                # torch.half is a dtype
                if callable(getattr(space, spelling, None)):
                    yield getattr(space, spelling)
        yield from HIDDEN_FUNCTIONS.get(name, ())


def overloads_named(*names: str) -> Iterator[Function]:
    """Yield the operators of `torch.ops.aten` that carry an operation's name, and their overloads.

    >>> [str(function) for function in overloads_named("grid_sampler_2d")]
    ['aten.grid_sampler_2d', 'aten.grid_sampler_2d.default']
    """
    for name in names:
        spelling = OPERATORS.get(name, name.replace(".", "_"))
        packet = getattr(torch.ops.aten, spelling, None)
        if packet is not None:
            yield packet
            # those with `out` write into what they are given
            yield from (getattr(packet, each) for each in packet.overloads() if "out" not in each)


def functions_like(function: Function) -> list[Function]:
    """Return the functions of torch that are one operation: method, operator, the same name in another namespace.

    Raises:
        OperationError: it is not a function of torch that can be intercepted.

    >>> torch.Tensor.exp in functions_like(torch.exp)
    True
    """
    same = same_operation().get(function)
    if same is None:
        raise OperationError(
            f"{function!r:.60} is not a function of torch; give torch.exp for instance, neither its name nor a "
            "module's class; for a function of your own, call what op_rule(function, kind) returns"
        )
    return same


def same_operation() -> Mapping[Function, list[Function]]:
    """Return, for every function of torch that can be intercepted, the functions that are the same operation."""
    # not functools.cache, which torch.compile looks through
    if not _same_operation:
        # the rest are attributes of tensors
        namespaces = (torch, torch.functional, F, Tensor, torch.linalg, torch.fft, torch.special)
        listed = get_overridable_functions()
        for function in (function for namespace in namespaces for function in listed[namespace]):
            if function.__name__ != "__get__" and not isinstance(function, type):
                same = list(functions_named(function.__name__))
                _same_operation[function] = same if function in same else [function]
        for name in kinds_by_name():
            same = list(functions_named(name))
            _same_operation.update(dict.fromkeys(same, same))
    return _same_operation
