"""Regions under what takes programs and tensors apart: torch.func, compilers, export, subclasses, sparse and nested."""

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from duotone.torch.casting.region import Region

NARROW = [torch.bfloat16, torch.float16]
HALVES = pytest.mark.parametrize("dtype", NARROW, ids=["bf16", "fp16"])


def x() -> Tensor:
    return torch.linspace(-1, 1, 24).view(4, 6)


class OneOfEach(nn.Module):
    """One operation of each kind, in a region."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 2, 36).view(6, 6).to(dtype))
        self.scale = nn.Parameter(torch.linspace(0.5, 1, 6))
        self.table = nn.Parameter(torch.linspace(0, 1, 24).view(4, 6).to(dtype))
        self.region = Region(dtype)

    def forward(self, data: Tensor) -> Tensor:
        with self.region.on("cpu"):
            hidden = F.linear(data, self.weight)
            normal = F.layer_norm(hidden, (6,), self.scale) + F.embedding(torch.tensor([0, 1, 1, 2]), self.table)
            wide = torch.cat([F.softmax(normal, -1).sum(0, keepdim=True), hidden.exp()])
            both = torch.cat([wide, normal])
            # one of torch's methods in Python, which a tracer does not follow in a mode
            both = both.unflatten(-1, (2, 3)).flatten(1)
            return torch.addcmul(both, both.square(), both[1:2].sigmoid()) @ self.weight.T


@HALVES
@pytest.mark.parametrize("backend", [pytest.param("eager", marks=pytest.mark.slow), "aot_eager"])
def test_compiled_whole_it_gives_the_same_bits(backend, dtype, same_bits):
    torch.compiler.reset()
    module = OneOfEach(dtype)
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    expected, got = module(x()), compiled(x())
    assert same_bits(got, expected)
    grads = []
    for result in (expected, got):
        module.zero_grad()
        (result.float() / 64).mean().backward()
        grads.append([param.grad for param in module.parameters()])
    assert all(one.dtype == other.dtype for one, other in zip(*grads, strict=True))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02)


METHODS = {
    "norm": lambda y: y.norm(),
    "2 ** y": lambda y: 2**y,
    "y ** 2": lambda y: y**2,
    "1 / y": lambda y: 1 / y,
    "y @ y": lambda y: y @ y.mT,
    "stft": lambda y: y.flatten().stft(4, window=torch.ones(4), return_complex=True).real,
    "unflatten": lambda y: y.unflatten(-1, (2, 3)),
    "split": lambda y: y.split(2, -1)[0],
}


@pytest.mark.parametrize("name", METHODS)
def test_methods_in_python_have_their_rules_when_compiled(name, same_bits):
    # of a result, which a tracer takes from another place than an input's
    region = Region(torch.bfloat16)

    def compute(data: Tensor) -> Tensor:
        with region.on("cpu"):
            return METHODS[name](data.abs())

    torch.compiler.reset()
    data = x().bfloat16()
    assert same_bits(torch.compile(compute, backend="eager", fullgraph=True)(data), compute(data))


@HALVES
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_gives_the_same_bits(strict, dtype, same_bits):
    module = OneOfEach(dtype).eval()
    with torch.no_grad():
        program = torch.export.export(module, (x(),), strict=strict)
        assert same_bits(program.module()(x()), module(x()))


@HALVES
def test_a_traced_graph_gives_the_same_bits(dtype, same_bits):
    module = OneOfEach(dtype)
    with torch.no_grad():
        graph = make_fx(module)(x())
        assert same_bits(graph(x()), module(x()))


def computation(dtype: torch.dtype):
    region = Region(dtype)

    def loss(data: Tensor) -> Tensor:
        with region.on("cpu"):
            rows = F.layer_norm(data @ data.new_ones(6, 3), (3,), torch.ones(3))
            return (rows[torch.tensor([0, 0, 1])].exp().sum(0) * F.softmax(rows, -1).mean(0)).sum()

    return loss


@HALVES
def test_functional_gradients_are_those_of_autograd(dtype, same_bits):
    loss, data = computation(dtype), x().to(dtype).requires_grad_()
    (expected,) = torch.autograd.grad(loss(data), data)
    got = torch.func.grad(loss)(data.detach())
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02)


@HALVES
def test_vmap_gives_what_a_loop_gives(dtype):
    loss = computation(dtype)
    data = torch.stack([x(), x() * 2, -x()]).to(dtype)
    expected = torch.stack([loss(each) for each in data])
    got = torch.func.vmap(loss)(data)
    assert got.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=0.01, atol=0.01)
    per_sample = torch.func.vmap(torch.func.grad(loss))(data)
    torch.testing.assert_close(
        per_sample, torch.stack([torch.func.grad(loss)(each) for each in data]), rtol=0.03, atol=0.03
    )


@HALVES
def test_a_jacobian_has_the_dtypes_of_the_operands(dtype):
    region = Region(dtype)

    def function(data: Tensor) -> Tensor:
        with region.on("cpu"):
            return (data @ data.T).exp().sum(0)

    data = x().to(dtype)
    got = torch.func.jacrev(function)(data)
    assert got.shape == (4, 4, 6)
    assert got.dtype == dtype
    expected = torch.func.jacrev(lambda data: (data @ data.T).exp().sum(0))(data.float())
    torch.testing.assert_close(got.float(), expected, rtol=0.05, atol=0.1)


@HALVES
def test_second_derivatives(dtype):
    region, data = Region(dtype), x().to(dtype).requires_grad_()
    with region.on("cpu"):
        (first,) = torch.autograd.grad((data @ data.T).square().sum(), data, create_graph=True)
        (second,) = torch.autograd.grad(first.float().sum(), data)
    exact = x().to(dtype).float().requires_grad_()
    (wide,) = torch.autograd.grad((exact @ exact.T).square().sum(), exact, create_graph=True)
    (expected,) = torch.autograd.grad(wide.sum(), exact)
    assert second.dtype == dtype
    torch.testing.assert_close(second.float(), expected, rtol=0.05, atol=0.5)


@HALVES
def test_inference_mode_gives_the_same_bits(dtype, same_bits):
    module = OneOfEach(dtype)
    expected = module(x()).detach()
    with torch.inference_mode():
        got = module(x())
        assert got.is_inference()
    assert same_bits(got.clone(), expected)


@pytest.mark.parametrize("operands", [torch.bfloat16, torch.float32])
def test_products_of_sparse_tensors_are_in_the_regions_dtype(operands):
    # torch multiplies sparse COO in BF16; torch.sparse.mm is not listed and takes one dtype
    coo, dense, exact = x().relu().to_sparse().to(operands), x().T.to(operands), x().relu() @ x().T
    with Region(torch.bfloat16).on("cpu"):
        for got in (coo @ dense, torch.mm(coo, dense)):
            assert got.dtype == torch.bfloat16
            torch.testing.assert_close(got.float(), exact, rtol=0.02, atol=0.02)
        got = torch.sparse.mm(coo, dense)
    torch.testing.assert_close(got.float(), exact, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("operands", [torch.float16, torch.float32])
def test_products_of_sparse_tensors_in_float16(operands):
    coo, dense, exact = x().relu().to_sparse().to(operands), x().T.to(operands), x().relu() @ x().T
    with Region(torch.float16).on("cpu"):
        got = coo @ dense
    assert got.dtype == torch.float16
    torch.testing.assert_close(got.float(), exact, rtol=0.01, atol=0.01)


@HALVES
def test_nested_tensors_take_part(dtype):
    ragged = torch.nested.nested_tensor([x()[:2], x()[:3]], layout=torch.jagged).to(dtype)
    weight = torch.ones(3, 6, dtype=dtype)
    with Region(dtype).on("cpu"):
        got = F.linear(ragged, weight)
        assert got.is_nested
        assert got.dtype == dtype
        assert ragged.exp().dtype == torch.float32
        assert F.layer_norm(ragged, (6,)).is_nested
    torch.testing.assert_close(
        got.values().float(), F.linear(ragged.values().float(), weight.float()), rtol=0.01, atol=0
    )


class Tagged(Tensor):
    """A subclass that torch keeps by itself."""


class Counting(Tensor):
    """A subclass with a say of its own."""

    calls = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.calls += 1
        return super().__torch_function__(func, types, args, kwargs)


class Wrapper:
    """No tensor, but something that torch's functions take."""

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return "wrapped", func.__name__, func(*(arg.inner if isinstance(arg, cls) else arg for arg in args))


@HALVES
@pytest.mark.parametrize("kind", [Tagged, Counting])
def test_subclasses_stay_what_they_are(kind, dtype):
    tagged = x().to(dtype).as_subclass(kind)
    with Region(dtype).on("cpu"):
        got = tagged @ tagged.T, tagged.exp(), F.layer_norm(tagged, (6,)), tagged.sum(), tagged[[0, 1]], tagged.float()
    assert [type(each) for each in got] == [kind] * 6
    assert [each.dtype for each in got] == [dtype, torch.float32, dtype, torch.float32, dtype, torch.float32]
    assert Counting.calls > 0 or kind is Tagged


@HALVES
def test_what_is_no_tensor_is_asked_itself(dtype):
    with Region(dtype).on("cpu"):
        tag, name, result = torch.exp(Wrapper(x().to(dtype)))
        assert (tag, name) == ("wrapped", "exp")
        assert torch.sum(Wrapper(x()))[0] == "wrapped"
    # what it calls is not under the mode, as in any function mode
    assert result.dtype in (dtype, torch.float32)
