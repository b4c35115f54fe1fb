"""A call of every operation in the table, on small FP32 operands; matrix functions are in `op_calls_linalg`.

`CALLS` has the arguments by an operation's name, the same for its function, its method and its operator; `OTHERWISE`
those of functions that carry the name but take something else. Tests cast the FP32 tensors among the arguments.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import resolve_name

from duotone.torch.casting.operation_table import Function, functions_named, kinds_by_name

from .op_calls_linalg import OF_MATRICES, Arguments, signed, takes


@dataclasses.dataclass(frozen=True)
class Call:
    """A function of the table, the name that it stands there under, and arguments for it."""

    name: str
    function: Function
    arguments: Arguments


def positive(*shape: int) -> Tensor:
    """Return values in 0.1 to 0.9 that 16 bits do not hold."""
    return signed(*shape).abs() / 3 + 0.1


X, Y, W = signed(4, 6), signed(4, 6, seed=1), signed(5, 6, seed=2)
VECTOR, BIAS = signed(6, seed=3), signed(5, seed=4)
SQUARE, OTHER = signed(4, 4, seed=5), signed(4, 4, seed=6)
BATCH, BATCHES = signed(2, 4, 4, seed=7), signed(2, 4, 4, seed=8)
LINE, IMAGE, VOLUME = signed(2, 4, 8, seed=9), signed(1, 4, 6, 6, seed=10), signed(1, 2, 4, 4, 4, seed=11)
HEADS = signed(1, 2, 6, 8, seed=12)
P, Q = positive(4, 6), positive(4, 6) + 0.05
LABELS, TOKENS = torch.tensor([0, 3, 1, 2]), torch.tensor([[0, 3, 3], [1, 0, 2]])
MASK = X > 0
SIGNS = torch.tensor([1.0, -1.0, 1.0, -1.0])
PLACES, ROWS = torch.tensor([0, 2, 1, 1, 3, 0]).view(1, 6), torch.tensor([2, 0])
ALONG = PLACES.expand(2, 6)
STATISTICS = {"running_mean": torch.zeros(4), "running_var": torch.ones(4)}
OF_IMAGE = positive(4), signed(4, seed=13)
WINDOW = torch.hann_window(8)
SPARSE = torch.relu(signed(4, 4, seed=20)).to_sparse()
# of an observer: whether it observes, whether it quantizes, the least and the largest, step and zero
# of an observer: whether it observes and quantizes, the least and the largest, step, zero
OBSERVED = *[torch.ones(1, dtype=torch.int64)] * 2, *[torch.ones(1)] * 3, torch.zeros(1, dtype=torch.int32)
TWICE = torch.sparse_coo_tensor(torch.tensor([[0, 2, 0, 0]]), torch.tensor([1.0, 2, 3, 4]) / 3, (3,))
# input to hidden, hidden to hidden, and biases, for 4, 3 and 1 gates
GATED = {n: [signed(n * 3, 6, seed=14), signed(n * 3, 3, seed=15), signed(n * 3), signed(n * 3)] for n in (1, 3, 4)}
SEQUENCE, HIDDEN = signed(5, 2, 6, seed=16), signed(1, 2, 3, seed=17)
RECURRENT = (True, 1, 0.0, False, False, False)
ATTENTION = (signed(12, 4, seed=18), signed(12), None, None, False, 0.0, signed(4, 4, seed=19), signed(4))
GRID = signed(1, 3, 3, 2) / 2
GRID_3D = signed(1, 2, 2, 2, 3) / 2

# one operand
_ONE = """
    exp exp2 expm1 log log2 log10 log1p logit square rsqrt reciprocal softplus acos arccos asin arcsin cosh sinh tan
    erfinv lgamma digamma sum nansum prod logsumexp special.exp2 special.expm1 special.log1p special.logit
    special.entr special.erfcx special.erfinv special.gammaln special.digamma special.psi special.log_ndtr special.ndtr
    special.ndtri special.i0 special.i0e special.i1 special.i1e norm nuclear_norm normalize softmin gumbel_softmax
    mean nanmean var std var_mean std_mean pdist cov corrcoef special.airy_ai special.bessel_j0 special.bessel_j1
    special.bessel_y0 special.bessel_y1 special.modified_bessel_i0 special.modified_bessel_i1
    special.modified_bessel_k0 special.modified_bessel_k1 special.scaled_modified_bessel_k0
    special.scaled_modified_bessel_k1 special.spherical_bessel_j0 rrelu histogramdd special.sinc sinc
    atanh arctanh trapezoid trapz cumulative_trapezoid histc
"""
_FURTHER: Mapping[str, tuple[Any, ...]] = {
    "logsumexp": (1,),
    "softmin": (1,),
    "rrelu": (0.1, 0.3, True),
    "histogramdd": ([2] * 6,),
    "nuclear_norm": ((0, 1),),
}
# two operands of one shape
_TWO = """
    xlogy logaddexp logaddexp2 special.xlogy special.xlog1py special.gammainc special.gammaincc dist pairwise_distance
    cosine_similarity mse_loss l1_loss smooth_l1_loss huber_loss kl_div hinge_embedding_loss soft_margin_loss
    binary_cross_entropy_with_logits polar complex atan2 arctan2 heaviside heaviside_ cdist linalg.vecdot binomial
    multilabel_soft_margin_loss binary_cross_entropy isclose allclose fmod remainder
"""
# by the name's end
_POLYNOMIALS = """
    chebyshev_polynomial_t chebyshev_polynomial_u chebyshev_polynomial_v chebyshev_polynomial_w hermite_polynomial_h
    hermite_polynomial_he laguerre_polynomial_l legendre_polynomial_p shifted_chebyshev_polynomial_t
    shifted_chebyshev_polynomial_u shifted_chebyshev_polynomial_v shifted_chebyshev_polynomial_w
"""
_SEQUENCES = "cat concat concatenate stack hstack vstack dstack column_stack row_stack"

CALLS: dict[str, list[Arguments]] = {
    **{name: [takes(P, *_FURTHER.get(name, ()))] for name in _ONE.split()},
    **{name: [takes(P, Q)] for name in _TWO.split()},
    **{f"special.{name}": [takes(P, torch.tensor([2.0, 3.0] * 3))] for name in _POLYNOMIALS.split()},
    **{name: [takes([X, Y])] for name in _SEQUENCES.split()},
    "linear": [takes(X, W), takes(X, W, BIAS), takes(BATCH, signed(3, 4), bias=signed(3))],
    "bilinear": [takes(X, Y, signed(3, 6, 6)), takes(X, Y, signed(3, 6, 6), signed(3))],
    "matmul": [takes(SQUARE, OTHER)],
    "mm": [takes(SQUARE, OTHER)],
    "bmm": [takes(BATCH, BATCHES)],
    "mv": [takes(X, VECTOR)],
    "addmm": [takes(SQUARE, SQUARE, OTHER), takes(SQUARE, SQUARE, mat2=OTHER, beta=0.5, alpha=2.0)],
    "addbmm": [takes(SQUARE, BATCH, BATCHES)],
    "addmv": [takes(signed(4), X, VECTOR)],
    "addr": [takes(SQUARE, SQUARE[0], OTHER[0])],
    "baddbmm": [takes(BATCH, BATCH, BATCHES)],
    "chain_matmul": [takes(X, W.T, W)],
    "einsum": [takes("ij,kj->ik", X, W)],
    "tensordot": [takes(BATCH, signed(4, 4, 3))],
    "inner": [takes(X, W)],
    "conv1d": [takes(LINE, signed(3, 4, 3)), takes(LINE, signed(3, 4, 3), signed(3), 2, padding="valid")],
    "conv2d": [takes(IMAGE, signed(3, 4, 3, 3), signed(3), padding=1)],
    "conv3d": [takes(VOLUME, signed(3, 2, 3, 3, 3))],
    "conv_transpose1d": [takes(LINE, signed(4, 3, 3), signed(3))],
    "conv_transpose2d": [takes(IMAGE, signed(4, 3, 3, 3))],
    "conv_transpose3d": [takes(VOLUME, signed(2, 3, 3, 3, 3))],
    "conv_tbc": [takes(SEQUENCE, signed(3, 6, 2), signed(2))],
    "convolution": [takes(LINE, signed(3, 4, 3), signed(3), [1], [0], [1], False, [0], 1)],
    "scaled_dot_product_attention": [
        takes(HEADS, HEADS * 0.5, -HEADS),
        takes(HEADS, HEADS, HEADS, attn_mask=signed(6, 6)),
        takes(HEADS, HEADS, HEADS, is_causal=True),
    ],
    "multi_head_attention_forward": [takes(BATCH, BATCH, BATCHES, 4, 2, *ATTENTION)],
    "lstm": [takes(SEQUENCE, [HIDDEN, HIDDEN * 0.5], GATED[4], *RECURRENT)],
    "gru": [takes(SEQUENCE, HIDDEN, GATED[3], *RECURRENT)],
    "rnn_tanh": [takes(SEQUENCE, HIDDEN, GATED[1], *RECURRENT)],
    "rnn_relu": [takes(SEQUENCE, HIDDEN, GATED[1], *RECURRENT)],
    "lstm_cell": [takes(SEQUENCE[0], [HIDDEN[0], HIDDEN[0] * 0.5], *GATED[4])],
    "gru_cell": [takes(SEQUENCE[0], HIDDEN[0], *GATED[3])],
    "rnn_tanh_cell": [takes(SEQUENCE[0], HIDDEN[0], *GATED[1])],
    "rnn_relu_cell": [takes(SEQUENCE[0], HIDDEN[0], *GATED[1])],
    "prelu": [takes(IMAGE, OF_IMAGE[0])],
    "layer_norm": [takes(X, (6,)), takes(X, (6,), VECTOR, bias=VECTOR * 2)],
    "group_norm": [takes(IMAGE, 2), takes(IMAGE, 2, *OF_IMAGE)],
    "rms_norm": [takes(X, (6,)), takes(X, (6,), weight=VECTOR)],
    "batch_norm": [takes(IMAGE, **STATISTICS), takes(IMAGE, None, None, *OF_IMAGE, training=True)],
    "instance_norm": [takes(IMAGE), takes(IMAGE, weight=OF_IMAGE[0], bias=OF_IMAGE[1])],
    "native_layer_norm": [takes(X, (6,), VECTOR, VECTOR * 2, 1e-5)],
    "native_group_norm": [takes(IMAGE, *OF_IMAGE, 1, 4, 36, 2, 1e-5)],
    "softmax": [takes(X, -1), takes(X, dim=0)],
    "log_softmax": [takes(X, -1), takes(X, dim=0)],
    "special.softmax": [takes(X, 1)],
    "special.log_softmax": [takes(X, 1)],
    "embedding": [takes(TOKENS, X), takes(TOKENS, X, padding_idx=3)],
    "embedding_bag": [takes(TOKENS, X), takes(TOKENS, X, mode="sum", per_sample_weights=positive(2, 3))],
    "index_select": [takes(X, 1, ROWS)],
    "gather": [takes(X, 0, PLACES)],
    "take": [takes(X, PLACES)],
    "take_along_dim": [takes(X, PLACES, 0)],
    "__getitem__": [takes(X, 0), takes(X, (ROWS, slice(1, 5))), takes(X, MASK), takes(X, [1, 2])],
    "index_add": [takes(X, 0, ROWS, Y[:2])],
    "index_reduce": [takes(X, 0, ROWS, Y[:2], "prod"), takes(X, 0, ROWS, Y[:2], "mean")],
    "scatter_add": [takes(X, 0, ALONG, Y[:2])],
    "scatter_reduce": [takes(X, 0, ALONG, Y[:2], "sum"), takes(X, 0, ALONG, Y[:2], "mean")],
    "pow": [takes(P, 3.0), takes(P, Q), takes(P, 2)],
    "mvlgamma": [takes(P + 2, 2)],
    "polygamma": [takes(1, P)],
    "special.polygamma": [takes(1, P)],
    "special.multigammaln": [takes(P + 2, 2)],
    "special.logsumexp": [takes(X, 1)],
    "special.zeta": [takes(P + 2, Q)],
    "sum": [takes(P), takes(P, 1), takes(P, dim=0, keepdim=True)],
    "cumsum": [takes(X, 1)],
    "cumprod": [takes(X, 1)],
    "logcumsumexp": [takes(X, 1)],
    "trace": [takes(SQUARE)],
    "dot": [takes(VECTOR, X[0])],
    "vdot": [takes(VECTOR, X[0])],
    "frobenius_norm": [takes(X, (0, 1))],
    "renorm": [takes(X, 2, 0, 1.0)],
    "acosh": [takes(P + 1)],
    "arccosh": [takes(P + 1)],
    "affine_grid": [takes(signed(1, 2, 3), (1, 1, 4, 4), align_corners=False)],
    "affine_grid_generator": [takes(signed(1, 2, 3), (1, 1, 4, 4), False)],
    "sum_to_size": [takes(X, (1, 6))],
    "multinomial": [takes(P, 3)],
    "standard_gamma": [takes(P)],
    "sample_dirichlet": [takes(P)],
    "constant_pad_nd": [takes(X, (1, 2), 0.5)],
    "bucketize": [takes(X, VECTOR.sort().values)],
    "searchsorted": [takes(VECTOR.sort().values, X)],
    "grouped_mm": [takes(signed(16, 8), signed(2, 8, 16), offs=torch.tensor([8, 16], dtype=torch.int32))],
    "sparse.mm": [takes(SPARSE, OTHER)],
    "sparse.addmm": [takes(SQUARE, SPARSE, OTHER)],
    "sparse.sampled_addmm": [takes(SPARSE.to_sparse_csr(), SQUARE, OTHER)],
    "hspmm": [takes(SPARSE, OTHER)],
    "smm": [takes(SPARSE, OTHER)],
    "sspaddmm": [takes(SPARSE, SPARSE, OTHER)],
    "sparse.sum": [takes(SPARSE, 0), takes(SPARSE)],
    "sparse.softmax": [takes(SPARSE, 1)],
    "sparse.log_softmax": [takes(SPARSE, 1)],
    "coalesce": [takes(TWICE)],
    "to_dense": [takes(TWICE), takes(X)],
    "segment_reduce": [takes(P, "sum", lengths=torch.tensor([1, 3])), takes(P, "mean", lengths=torch.tensor([1, 3]))],
    "fold": [takes(signed(1, 8, 9), (4, 4), 2)],
    "unfold": [takes(IMAGE, 2)],
    "interpolate": [
        takes(IMAGE, scale_factor=2),
        takes(IMAGE, (4, 4), mode="bilinear", antialias=True),
        takes(IMAGE, (4, 4), mode="area"),
    ],
    "fake_quantize_per_tensor_affine": [takes(X, 0.1, 1, -8, 7)],
    "fake_quantize_per_channel_affine": [takes(X, torch.full((4,), 0.1), torch.ones(4, dtype=torch.int32), 0, -8, 7)],
    "fused_moving_avg_obs_fake_quant": [takes(X, *OBSERVED, 0.1, -8, 7, -1, False, False)],
    "scaled_mm": [],
    "scaled_grouped_mm": [],
    "avg_pool1d": [takes(LINE, 2), takes(LINE, 5, 1)],
    "avg_pool2d": [takes(IMAGE, 2), takes(IMAGE, (4, 3), 1, padding=1)],
    "adaptive_avg_pool1d": [takes(LINE, 2)],
    "adaptive_avg_pool2d": [takes(IMAGE, 2), takes(IMAGE, (4, None))],
    "max_pool1d": [takes(LINE, 2), takes(LINE, 8, 1, padding=4)],
    "max_pool2d": [takes(IMAGE, 2), takes(IMAGE, 4, 1)],
    "max_pool1d_with_indices": [takes(LINE, 2)],
    "max_pool2d_with_indices": [takes(IMAGE, 4, 1)],
    "max_pool3d_with_indices": [takes(VOLUME, 3, 1)],
    "adaptive_max_pool1d": [takes(LINE, 2)],
    "adaptive_max_pool2d": [takes(IMAGE, 2)],
    "fractional_max_pool2d_with_indices": [takes(IMAGE, 2, output_size=3, _random_samples=torch.full((1, 4, 2), 0.5))],
    "fractional_max_pool3d_with_indices": [takes(VOLUME, 2, output_size=2, _random_samples=torch.full((1, 2, 3), 0.5))],
    "lp_pool1d": [takes(LINE, 2, 2)],
    "lp_pool2d": [takes(IMAGE, 2, 2)],
    "lp_pool3d": [takes(VOLUME, 2, 2)],
    "avg_pool3d": [takes(VOLUME, 2)],
    "local_response_norm": [takes(IMAGE, 2)],
    "cross_entropy": [
        takes(X, LABELS),
        takes(X, LABELS, VECTOR.abs(), reduction="sum", label_smoothing=0.1),
        takes(X, F.softmax(Y, -1)),
    ],
    "linear_cross_entropy": [takes(X, W, LABELS)],
    "nll_loss": [takes(X, LABELS)],
    "ctc_loss": [takes(F.log_softmax(SEQUENCE, -1), torch.tensor([[1, 2], [3, 1]]), (5, 5), (2, 2))],
    "poisson_nll_loss": [takes(X, P)],
    "gaussian_nll_loss": [takes(X, Y, P)],
    "cosine_embedding_loss": [takes(X, Y, SIGNS)],
    "margin_ranking_loss": [takes(X[:, 0], Y[:, 0], SIGNS)],
    "multi_margin_loss": [takes(X, LABELS)],
    "multilabel_margin_loss": [takes(X, torch.tensor([[0, 3, -1, 0, 0, 0]] * 4))],
    "triplet_margin_loss": [takes(X, Y, -X)],
    "triplet_margin_with_distance_loss": [takes(X, Y, -X)],
    "stft": [takes(signed(32), 8, window=WINDOW, return_complex=True)],
    "istft": [takes(torch.stft(signed(32), 8, window=WINDOW, return_complex=True), 8, window=WINDOW)],
    "view_as_complex": [takes(GRID)],
    "quantile": [takes(X, 0.3), takes(X, torch.tensor([0.1, 0.9]), dim=1)],
    "nanquantile": [takes(X, 0.3)],
    "histogram": [takes(X, 3)],
    "block_diag": [takes(X, Y)],
    "cartesian_prod": [takes(VECTOR, BIAS)],
    "meshgrid": [takes(VECTOR, BIAS, indexing="ij"), takes([VECTOR, BIAS], indexing="ij")],
    "addcdiv": [takes(X, Y, P, value=0.5)],
    "addcmul": [takes(X, Y, P)],
    "cross": [takes(X[:3], Y[:3], 0)],
    "linalg.cross": [takes(X[:, :3], Y[:, :3])],
    "lerp": [takes(X, Y, 0.3), takes(X, Y, P)],
    "lerp_": [takes(X, Y, 0.3), takes(X, Y, P)],
    "where": [takes(MASK, X, Y)],
    "grid_sample": [takes(IMAGE, GRID, align_corners=False)],
    "grid_sampler": [takes(IMAGE, GRID, 0, 0, False)],
    "grid_sampler_2d": [takes(IMAGE, GRID, 0, 0, False)],
    "grid_sampler_3d": [takes(VOLUME, GRID_3D, 0, 0, False)],
    "index_copy": [takes(X, 0, ROWS, Y[:2])],
    "index_put": [takes(X, (ROWS,), Y[:2]), takes(X, (ROWS,), Y[:2], accumulate=True)],
    "masked_scatter": [takes(X, MASK, Y)],
    "scatter": [takes(X, 0, PLACES, Y), takes(X, 0, PLACES, src=Y)],
    "put": [takes(X, torch.tensor([0, 5]), Y[0, :2])],
    "select_scatter": [takes(X, Y[0], 0, 1)],
    "slice_scatter": [takes(X, Y[:2], 0, 1, 3)],
    "diagonal_scatter": [takes(SQUARE, OTHER[0])],
    "index_add_": [takes(X, 0, ROWS, Y[:2])],
    "index_copy_": [takes(X, 0, ROWS, Y[:2])],
    "index_put_": [takes(X, (ROWS,), Y[:2])],
    "index_reduce_": [takes(X, 0, ROWS, Y[:2], "amax")],
    "scatter_": [takes(X, 0, PLACES, Y)],
    "scatter_add_": [takes(X, 0, ALONG, Y[:2])],
    "scatter_reduce_": [takes(X, 0, ALONG, Y[:2], "sum")],
    "masked_scatter_": [takes(X, MASK, Y)],
    "put_": [takes(X, torch.tensor([0, 5]), Y[0, :2])],
    "addmm_": [takes(SQUARE, SQUARE, OTHER)],
    "addbmm_": [takes(SQUARE, BATCH, BATCHES)],
    "addmv_": [takes(signed(4), X, VECTOR)],
    "addr_": [takes(SQUARE, SQUARE[0], OTHER[0])],
    "baddbmm_": [takes(BATCH, BATCH, BATCHES)],
    "__setitem__": [takes(X, 0, Y[0]), takes(X, (ROWS, slice(1, 3)), Y[:2, :2]), takes(X, MASK, 0.5)],
    "masked_fill": [takes(X, MASK, 0.5), takes(X, MASK, torch.tensor(0.5))],
    "masked_fill_": [takes(X, MASK, 0.5)],
    "pad": [takes(IMAGE, (1, 1, 1, 1), mode="reflect"), takes(X, (1, 2))],
    **{name: [takes(X, Y), takes(X, 0.5)] for name in ("add", "sub", "subtract", "rsub", "mul", "multiply")},
    **{name: [takes(X, Y), takes(X, 0.5)] for name in ("div", "divide", "true_divide")},
    **{name: [takes(X, Y), takes(X, 0.5)] for name in ("add_", "sub_", "subtract_")},
    **{name: [takes(X, -0.5, 0.5), takes(X, min=0.25)] for name in ("clamp", "clip", "clamp_", "clip_")},
    **{name: [takes(X, 0.5)] for name in ("clamp_min", "clamp_max", "clamp_min_", "clamp_max_")},
    "full": [takes((2,), 5)],
    "full_like": [takes(X, 0.5)],
    "new_full": [takes(X, (2,), 0.5)],
    "fill": [takes(X, 0.5)],
    "fill_": [takes(X, 0.5)],
    "fill_diagonal_": [takes(X, 0.5)],
    "index_fill": [takes(X, 0, ROWS, 0.5)],
    "index_fill_": [takes(X, 0, ROWS, 0.5)],
    "tensor": [takes(5)],
    "as_tensor": [takes(X)],
    "scalar_tensor": [takes(5, dtype=torch.int64)],
    "new_tensor": [takes(X, 0.5)],
    "nan_to_num": [takes(X, 0.5)],
    "nan_to_num_": [takes(X, 0.5)],
    "hardtanh": [takes(X, -0.5, 0.5)],
    "threshold": [takes(X, 0.5, 0.25)],
    "copy_": [takes(X, Y)],
    "to": [takes(X, torch.int64)],
    "half": [takes(X)],
    "bfloat16": [takes(X)],
    "type": [takes(X, torch.int64)],
    "type_as": [takes(X, LABELS)],
    "max_pool3d": [takes(VOLUME, 2)],
    "adaptive_avg_pool3d": [takes(VOLUME, 2)],
    "adaptive_max_pool3d": [takes(VOLUME, 2)],
    "max_unpool1d": [takes(*F.max_pool1d(LINE, 2, return_indices=True), 2)],
    "max_unpool2d": [takes(*F.max_pool2d(IMAGE, 2, return_indices=True), 2)],
    "max_unpool3d": [takes(*F.max_pool3d(VOLUME, 2, return_indices=True), 2)],
    "fractional_max_pool2d": [takes(IMAGE, 2, output_size=3, _random_samples=torch.full((1, 4, 2), 0.5))],
    "fractional_max_pool3d": [takes(VOLUME, 2, output_size=2, _random_samples=torch.full((1, 2, 3), 0.5))],
    **OF_MATRICES,
}

# functions that take other arguments than their namesakes
OTHERWISE: dict[Function, list[Arguments]] = {
    torch.batch_norm: [takes(IMAGE, *OF_IMAGE, *STATISTICS.values(), False, 0.1, 1e-5, False)],
    torch.instance_norm: [takes(IMAGE, *OF_IMAGE, None, None, True, 0.1, 1e-5, False)],
    torch.embedding: [takes(X, TOKENS)],
    torch.embedding_bag: [takes(X, TOKENS[0], torch.tensor([0, 2]))],
    torch.poisson_nll_loss: [takes(X, P, True, False, 1e-8, 1)],
    F.softmax: [takes(X, -1), takes(X, 0, dtype=None)],
    F.kl_div: [takes(P, Q, reduction="batchmean")],
    Tensor.__rtruediv__: [takes(P, 3.0), takes(P, 1)],
    Tensor.__rpow__: [takes(P, 2.0)],
    Tensor.polygamma: [takes(P, 1)],
    Tensor.where: [takes(X, MASK, Y)],
    Tensor.norm: [takes(X), takes(X, 1, dim=1)],
    Tensor.unfold: [takes(X, 1, 3, 1)],
    torch.adaptive_avg_pool1d: [takes(LINE, (2,))],
    torch.adaptive_max_pool1d: [takes(LINE, (2,))],
}


def all_calls() -> dict[str, Call]:
    """Return a call, or several, of every function of the table, by a name that says which."""
    found: dict[str, Call] = {}
    for name in kinds_by_name():
        for function in dict.fromkeys(functions_named(name)):
            full = resolve_name(function) or f"torch.{name}"
            # what a function of Python's calls inside may have no name of its own
            full = f"{full} {function.__name__}" if full in found else full
            # one function may stand in two namespaces
            if any(call.function is function for call in found.values()):
                continue
            for at, arguments in enumerate(OTHERWISE.get(function, CALLS.get(name, []))):
                found[f"{full} {at}" if at else full] = Call(name, function, arguments)
    return found


def is_random(call: Call) -> bool:
    """Return whether a call draws random numbers."""
    return call.name in ("gumbel_softmax", "rrelu", "binomial", "multinomial", "standard_gamma", "sample_dirichlet")
