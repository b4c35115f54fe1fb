"""The operation table as a list: complete beside torch.autocast's, without doubles, with a call for each name."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.torch_version import TorchVersion

from duotone.errors import OperationError
from duotone.operations import FAMILIES
from duotone.torch.casting.operation_table import functions_in, functions_like, functions_named, kinds, kinds_by_name

from .op_calls import CALLS, OTHERWISE, all_calls

# "Autocast Op Reference" of torch's documentation, by device and list
AUTOCAST = {
    ("cuda", "compute"): """
        __matmul__ addbmm addmm addmv addr baddbmm bmm linalg.multi_dot conv1d conv2d conv3d conv_transpose1d
        conv_transpose2d conv_transpose3d gru_cell linear lstm_cell matmul mm mv prelu rnn_tanh_cell rnn_relu_cell
    """,
    ("cuda", "float32"): """
        __pow__ __rdiv__ __rpow__ __rtruediv__ acos asin binary_cross_entropy_with_logits cosh cosine_embedding_loss
        cdist cosine_similarity cross_entropy cumprod cumsum dist erfinv exp expm1 group_norm hinge_embedding_loss
        kl_div l1_loss layer_norm log log_softmax log10 log1p log2 margin_ranking_loss mse_loss multilabel_margin_loss
        multi_margin_loss nll_loss norm normalize pdist poisson_nll_loss pow prod reciprocal rsqrt sinh smooth_l1_loss
        soft_margin_loss softmax softmin softplus sum renorm tan triplet_margin_loss
    """,
    ("cuda", "widest"): "addcdiv addcmul atan2 bilinear cross dot grid_sample index_put scatter_add tensordot",
    ("cuda", "refused"): "binary_cross_entropy",
    ("cpu", "compute"): """
        conv1d conv2d conv3d bmm mm linalg.vecdot baddbmm addmm addbmm linear matmul convolution conv_tbc
        lstm gru rnn_tanh rnn_relu conv_transpose1d conv_transpose2d conv_transpose3d prelu
        scaled_dot_product_attention multi_head_attention_forward
    """,
    ("cpu", "float32"): """
        avg_pool3d binary_cross_entropy grid_sampler grid_sampler_2d grid_sampler_3d polar prod quantile nanquantile
        stft cdist trace view_as_complex cholesky_inverse cholesky_solve inverse lu_solve orgqr ormqr pinverse
        max_pool3d max_unpool2d max_unpool3d adaptive_avg_pool3d reflection_pad1d reflection_pad2d replication_pad1d
        replication_pad2d replication_pad3d mse_loss cosine_embedding_loss nll_loss hinge_embedding_loss
        poisson_nll_loss cross_entropy l1_loss huber_loss margin_ranking_loss soft_margin_loss triplet_margin_loss
        multi_margin_loss ctc_loss kl_div multilabel_margin_loss binary_cross_entropy_with_logits fft.fft fft.ifft
        fft.fft2 fft.ifft2 fft.fftn fft.ifftn fft.rfft fft.irfft fft.rfft2 fft.irfft2 fft.rfftn fft.irfftn fft.hfft
        fft.ihfft linalg.cond linalg.matrix_rank linalg.solve linalg.cholesky linalg.svdvals linalg.eigvals
        linalg.eigvalsh linalg.inv linalg.householder_product linalg.tensorinv linalg.tensorsolve
        fake_quantize_per_tensor_affine geqrf lu qr svd triangular_solve fractional_max_pool2d fractional_max_pool3d
        adaptive_max_pool3d linalg.qr linalg.cholesky_ex linalg.svd linalg.eig linalg.eigh linalg.lstsq linalg.inv_ex
    """,
    ("cpu", "widest"): "cat stack index_copy",
}
# ours, and why
DIFFERENT = {
    "layer_norm group_norm softmax softmin": ("float32_inside", "16 bits at the border save memory"),
    "addr": ("widest", "an outer product, which sums nothing"),
    "bilinear tensordot": ("compute", "products"),
    "dot linalg.vecdot": ("float32", "sums of products that no tensor core computes, and scalars for the most part"),
    "scatter_add": ("float32_inside", "a sum"),
    "binary_cross_entropy": ("refused", "as on CUDA, on every device"),
    "grid_sample grid_sampler grid_sampler_2d grid_sampler_3d": (
        "float32_inside",
        "FP32 places, images as they are",
    ),
    "avg_pool3d adaptive_avg_pool3d": ("float32_inside", "computed so on CPUs, whose 16-bit kernels sum in 16 bits"),
    "max_pool3d": ("float32_inside", "gradients of windows that overlap are sums"),
    "fractional_max_pool2d fractional_max_pool3d": ("float32_inside", "windows are placed in FP32"),
    "max_unpool2d max_unpool3d adaptive_max_pool3d": (
        "as_given",
        "maxima and copies, which CPUs have since",
    ),
    "reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d replication_pad3d": (None, "inside pad"),
    "atan2": ("float32", "squares in its gradient, which vanish in FP16"),
    "fake_quantize_per_tensor_affine": ("float32_inside", "the data are 16-bit again behind it"),
}
OURS = {name: kind for names, (kind, _) in DIFFERENT.items() for name in names.split()}
LISTED = [(device, kind, name) for (device, kind), names in AUTOCAST.items() for name in names.split()]

WITHOUT_CALL = ["scaled_mm", "scaled_grouped_mm"]
# torch before 2.13 has no such function
NEWER = ("linear_cross_entropy",) if TorchVersion(torch.__version__) < "2.13" else ()
NAMES = {name: kind for name, kind in kinds_by_name().items() if name not in NEWER}


def kind_of(name: str) -> str | None:
    of_methods = {name: kinds().get(getattr(Tensor, name))} if name.startswith("__") else {}
    return {**kinds_by_name(), **of_methods}.get(name)


@pytest.mark.parametrize(("device", "kind", "name"), LISTED)
def test_what_autocast_lists_is_listed_here(device, kind, name):
    # one device's list may say otherwise than the other's
    assert kind_of(name) == OURS.get(name, kind)


def test_every_difference_is_one():
    for name, ours in OURS.items():
        theirs = {kind for _, kind, listed in LISTED if listed == name}
        assert theirs, name
        assert theirs != {ours}, name


def test_every_name_has_a_call_and_every_call_a_name():
    names = kinds_by_name()
    assert set(CALLS) == set(names)
    # CPUs have no products of groups in 8 bits, and those of two matrices are made in several steps
    assert [name for name, calls in CALLS.items() if not calls] == WITHOUT_CALL
    assert set(OTHERWISE) <= set(kinds())
    without_call = set(functions_named(*WITHOUT_CALL))
    assert {call.function for call in all_calls().values()} == set(kinds()) - without_call


def test_every_name_is_a_function_of_torch():
    for name in NAMES:
        found = list(functions_named(name))
        assert found, name
        assert all(callable(function) for function in found)


def test_a_family_has_its_functions():
    assert {torch.scatter_add, Tensor.index_add} <= set(functions_in("sum_by_index"))
    assert {function for family in FAMILIES for function in functions_in(family)} == set(kinds())


def test_no_function_has_two_kinds():
    for name, kind in NAMES.items():
        assert {kinds()[function] for function in functions_named(name)} == {kind}, name


def test_methods_and_operators_have_their_functions_kind():
    for function, method in ((torch.exp, Tensor.exp), (torch.matmul, Tensor.__matmul__), (torch.pow, Tensor.__rpow__)):
        assert kinds()[function] == kinds()[method]
    assert kinds()[torch.softmax] == kinds()[F.softmax] == kinds()[Tensor.softmax] == "float32_inside"
    assert torch.relu not in kinds()


def test_functions_like_finds_every_form():
    assert set(functions_like(torch.exp)) == {torch.exp, Tensor.exp}
    assert set(functions_like(Tensor.__matmul__)) == set(functions_like(torch.matmul))
    assert set(functions_like(torch.sigmoid)) == {torch.sigmoid, F.sigmoid, Tensor.sigmoid}
    with pytest.raises(OperationError, match=r"not a function of torch; give torch.exp for instance"):
        functions_like(print)
