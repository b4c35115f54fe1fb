"""Rules for operations whose 16-bit kernels are wrong or missing: each by its function and by its operator.

A case is what a function and an operator of `torch.ops.aten` are called with; both are to give FP32's result and
gradient, each rounded once.
"""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.ao import quantization
from torch.nn import functional as F

import duotone.torch as dt
from duotone.torch.casting.region import Region

ATEN = torch.ops.aten
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
pytestmark = pytest.mark.filterwarnings("ignore:Sparse")


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.5


FEW = torch.arange(3000) % 3
THETA = torch.tensor([[[0.9, 0.1, 0.05], [-0.1, 0.9, 0.0]]])
GRID = F.affine_grid(THETA, (1, 1, 40, 40), align_corners=False)
SAMPLES = torch.tensor([[[0.25, 0.75]]])
SPARSE = torch.sparse_coo_tensor(torch.stack([FEW, torch.arange(3000)]), rand(3000), (3, 3000)).coalesce()
IMAGE = rand(1, 1, 300, 300)
# name: the function, the operator, the operands
RULES = {
    "grid_sample": (
        lambda x: F.grid_sample(x, GRID, align_corners=False),
        lambda x: ATEN.grid_sampler_2d(x, GRID, 0, 0, False),
        (IMAGE,),
    ),
    "grid_sample with a grid that is rounded": (
        lambda x, grid: F.grid_sample(x, grid, align_corners=False),
        lambda x, grid: ATEN.grid_sampler_2d.default(x, grid, 0, 0, False),
        (IMAGE, GRID),
    ),
    "affine_grid": (
        lambda theta: F.affine_grid(theta, (1, 1, 90, 90), align_corners=False),
        lambda theta: ATEN.affine_grid_generator(theta, [1, 1, 90, 90], False),
        (THETA,),
    ),
    "fractional_max_pool2d": (
        lambda x: F.fractional_max_pool2d(x, 2, output_size=200, _random_samples=SAMPLES.to(x.dtype)),
        lambda x: ATEN.fractional_max_pool2d(x, [2, 2], [200, 200], SAMPLES.to(x.dtype))[0],
        (IMAGE,),
    ),
    "avg_pool2d over windows that overlap": (
        lambda x: F.avg_pool2d(x, 25, 1),
        lambda x: ATEN.avg_pool2d(x, [25, 25], [1, 1]),
        (IMAGE[..., :60, :60],),
    ),
    "avg_pool2d over more than FP16 counts": (
        lambda x: F.avg_pool2d(x, 300),
        lambda x: ATEN.avg_pool2d.default(x, [300, 300]),
        (IMAGE,),
    ),
    "adaptive_avg_pool3d": (
        lambda x: F.adaptive_avg_pool3d(x, 3),
        lambda x: ATEN.adaptive_avg_pool3d(x, [3, 3, 3]),
        (rand(1, 1, 20, 20, 20),),
    ),
    "max_pool2d": (
        lambda x: F.max_pool2d(x, 30, 1),
        lambda x: ATEN.max_pool2d(x, [30, 30], [1, 1]),
        (IMAGE[..., :90, :90],),
    ),
    "fold": (
        lambda x: F.fold(x, 40, 9),
        lambda x: ATEN.col2im(x, [40, 40], [9, 9], [1, 1], [0, 0], [1, 1]),
        (rand(1, 81, 1024),),
    ),
    "unfold": (
        lambda x: F.unfold(x, 15),
        lambda x: ATEN.im2col(x, [15, 15], [1, 1], [0, 0], [1, 1]),
        (IMAGE[..., :40, :40],),
    ),
    "Tensor.unfold": (lambda x: x.unfold(0, 300, 1), lambda x: ATEN.unfold(x, 0, 300, 1), (rand(900),)),
    "pad with copies of the edge": (
        lambda x: F.pad(x, (2000, 0), mode="replicate"),
        lambda x: ATEN.pad(x, [2000, 0], "replicate"),
        (rand(1, 1, 9),),
    ),
    "interpolate": (
        lambda x: F.interpolate(x, size=90, mode="bilinear", antialias=True),
        lambda x: ATEN._upsample_bilinear2d_aa(x, [90, 90], False),
        (IMAGE,),
    ),
    "var": (lambda x: x.var(-1), lambda x: ATEN.var(x, [-1]), (rand(4, 500) + 30,)),
    "std": (lambda x: torch.std(x, -1), lambda x: ATEN.std.dim(x, [-1]), (rand(4, 500) + 30,)),
    "nanmean": (torch.nanmean, ATEN.nanmean, (rand(90_000),)),
    "vector_norm": (
        lambda x: torch.linalg.vector_norm(x, 3, -1),
        lambda x: ATEN.linalg_vector_norm(x, 3, [-1]),
        (rand(4, 500),),
    ),
    "log_softmax": (lambda x: x.log_softmax(0), lambda x: ATEN.log_softmax(x, 0), (rand(70_000),)),
    "atan2": (torch.atan2, ATEN.atan2, (rand(500) / 3000, rand(500, seed=1) / 3000)),
    "atanh": (torch.atanh, ATEN.atanh, (rand(500) / 2,)),
    "sinc": (torch.sinc, ATEN.sinc, (rand(500),)),
    "remainder": (lambda x, y: x % y, ATEN.remainder, (rand(500) * 90, rand(500, seed=1))),
    "trapezoid": (torch.trapezoid, ATEN.trapezoid, (rand(3000), torch.linspace(0, 1, 3000))),
    "histc": (lambda x: torch.histc(x, 3), lambda x: ATEN.histc(x, 3), (rand(9000),)),
    "segment_reduce": (
        lambda x: torch.segment_reduce(x, "sum", lengths=torch.tensor([2900, 100])),
        lambda x: ATEN.segment_reduce(x, "sum", lengths=torch.tensor([2900, 100])),
        (rand(3000),),
    ),
    "index_put": (
        lambda x, y: x.index_put((FEW,), y, accumulate=True),
        lambda x, y: ATEN.index_put(x, [FEW], y, True),
        (rand(3), rand(3000)),
    ),
    "index_put_": (
        lambda x, y: x.clone().index_put_((FEW,), y, accumulate=True),
        lambda x, y: ATEN.index_put_.default(x.clone(), [FEW], y, True),
        (rand(3), rand(3000)),
    ),
    "put": (lambda x, y: x.put(FEW, y, True), lambda x, y: ATEN.put(x, FEW, y, True), (rand(3), rand(3000))),
    "index_reduce_": (
        lambda x, y: x.clone().index_reduce_(0, FEW, y, "mean"),
        lambda x, y: ATEN.index_reduce_(x.clone(), 0, FEW, y, "mean"),
        (rand(3, 2), rand(3000, 2)),
    ),
    "index": (lambda x: x[FEW], lambda x: ATEN.index(x, [FEW]), (rand(3, 2),)),
    "embedding": (lambda x: torch.embedding(x, FEW), lambda x: ATEN.embedding(x, FEW), (rand(3, 2),)),
    "sparse.mm": (lambda x: torch.sparse.mm(SPARSE, x), lambda x: ATEN._sparse_mm(SPARSE, x), (rand(3000, 2),)),
    "sparse @": (
        lambda x: SPARSE.bfloat16().to(x.dtype).to_sparse_csr() @ x,
        lambda x: SPARSE.bfloat16().to(x.dtype) @ x,
        (rand(3000, 2),),
    ),
    "sparse.sum": (
        lambda x: torch.sparse.sum(torch.sparse_coo_tensor(SPARSE.indices(), x, (3, 3000)), 1).to_dense(),
        lambda x: ATEN._sparse_sum(torch.sparse_coo_tensor(SPARSE.indices(), x, (3, 3000)), [1]).to_dense(),
        (rand(3000),),
    ),
    "coalesce": (
        lambda x: torch.sparse_coo_tensor(FEW[None], x, (3,)).coalesce().to_dense(),
        lambda x: torch.sparse_coo_tensor(FEW[None], x, (3,)).to_dense(),
        (rand(3000),),
    ),
    "fake_quantize": (
        lambda x: torch.fake_quantize_per_tensor_affine(x, 0.1, 3, 0, 255),
        lambda x: ATEN.fake_quantize_per_tensor_affine(x, 0.1, 3, 0, 255),
        (rand(500),),
    ),
    "batch_norm": (
        lambda x, w: torch.batch_norm(x, w, w, None, None, True, 0.1, 1e-5, False),
        lambda x, w: F.batch_norm(x, None, None, w, w, True),
        (rand(3, 4, 99), rand(4)),
    ),
    "searchsorted": (
        lambda x: torch.searchsorted(torch.arange(1000.0), x),
        lambda x: ATEN.searchsorted(torch.arange(1000.0), x.float()),
        (rand(500) * 900,),
    ),
}


def run(function, operands, context):
    leaves = [operand.detach().clone().requires_grad_() for operand in operands]
    with context:
        result = function(*leaves)
    if not result.requires_grad:
        return result, []
    weights = torch.linspace(0.5, 1.5, result.numel()).view(result.shape).to(torch.bfloat16).to(result.dtype)
    return result, torch.autograd.grad(result, leaves, weights, allow_unused=True)


def assert_rounded_once(got, exact, dtype):
    unit = torch.finfo(dtype).eps / 2
    size = exact.abs().max() if exact.numel() else 0
    # what FP16 has no normal number for is off by a fixed amount
    torch.testing.assert_close(got.float(), exact, rtol=1.1 * unit, atol=0.1 * unit * float(size) + 2.0**-24)


@HALVES
@pytest.mark.parametrize("name", RULES)
def test_a_rule_gives_the_numbers_of_float32_rounded_once(name, dtype):
    *functions, operands = RULES[name]
    operands = [operand.to(dtype) for operand in operands]
    for function in functions:
        expected, grads = run(function, [operand.float() for operand in operands], nullcontext())
        got, got_grads = run(function, operands, Region(dtype).on("cpu"))
        if not expected.is_floating_point():
            assert torch.equal(got, expected)
            continue
        assert_rounded_once(got, expected, dtype)
        for grad, exact in zip(got_grads, grads, strict=True):
            if exact is not None:
                assert grad.dtype == dtype
                assert_rounded_once(grad, exact, dtype)


@pytest.mark.parametrize(
    "outer",
    [
        lambda x, y: torch.einsum("i,j->ij", x, y),
        lambda x, y: torch.tensordot(x, y, 0),
        lambda x, y: x[:, None] @ y[None],
        lambda x, y: torch.mm(x[:, None], y[None]),
        lambda x, y: torch.addr(x.new_zeros(9, 4), x, y),
        torch.outer,
        torch.ger,
        torch.kron,
    ],
)
def test_products_that_sum_nothing_stay_float32(outer):
    # angles of rotary positions: in BF16 they are off by 8 radians at 2,000
    places, frequencies = torch.linspace(0, 2000, 9), 1 / 10_000 ** (torch.arange(4) / 4)
    with dt.autocast("cpu", torch.bfloat16):
        got = outer(places, frequencies)
        summed = torch.einsum("ij,ij->i", places[:, None], places[:, None])
    assert got.dtype == torch.float32
    assert torch.equal(got, outer(places, frequencies))
    assert summed.dtype == torch.bfloat16


@pytest.mark.parametrize("version", [0, 1])
def test_fused_fake_quantization_trains(version):
    model = torch.nn.Sequential(quantization.QuantStub(), torch.nn.Linear(4, 2), quantization.DeQuantStub()).train()
    model.qconfig = quantization.get_default_qat_qconfig("fbgemm", version=version)
    quantization.prepare_qat(model, inplace=True)
    dt.cast(model, "bf16")
    model(torch.ones(2, 4)).sum().backward()
    assert model[1].weight.grad.isfinite().all()
    observer = model[1].weight_fake_quant.activation_post_process
    assert (observer.max_val - observer.min_val).min() > 0


def test_draws_are_those_of_float32_probabilities():
    # in FP16 torch draws classes of probability 0
    probabilities = (rand(1000).cumsum(0) / 1e6).half()
    torch.manual_seed(0)
    expected = torch.multinomial(probabilities.float(), 500)
    for draw in (torch.multinomial, Tensor.multinomial, ATEN.multinomial):
        torch.manual_seed(0)
        with dt.autocast("cpu", torch.float16):
            assert torch.equal(draw(probabilities, 500), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gamma_distributions_have_samples_with_gradients(dtype):
    # torch has no 16-bit kernels for them
    shape = (rand(100) + 0.5).to(dtype).requires_grad_()
    with dt.autocast("cpu", dtype):
        samples = torch.distributions.Gamma(shape, torch.ones(())).rsample()
        assert ATEN._standard_gamma(shape).dtype == torch.float32
    assert samples.dtype == torch.float32
    samples.sum().backward()
    assert shape.grad.isfinite().all()


def test_experts_are_products():
    x, weights = torch.ones(16, 8), torch.ones(2, 8, 4)
    ends = torch.tensor([8, 16], dtype=torch.int32)
    if hasattr(F, "grouped_mm"):
        with dt.autocast("cpu", torch.bfloat16):
            assert F.grouped_mm(x, weights.bfloat16(), offs=ends).dtype == torch.bfloat16


def test_gradients_through_a_layer_norm_may_be_batched():
    model = dt.cast(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 1)), "bf16")
    y = model(rand(8, 4)).squeeze()

    def gradient(v: Tensor) -> Tensor:
        return torch.autograd.grad(y, model[0].weight, v, retain_graph=True)[0]

    rows = torch.eye(8, dtype=y.dtype)
    torch.testing.assert_close(torch.vmap(gradient)(rows), torch.stack([gradient(row) for row in rows]))
