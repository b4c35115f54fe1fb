"""dt.autocast with what else steers dtypes: torch.autocast, custom functions, keep_float32, cast models, compilers."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import duotone.torch as dt
from duotone.torch.casting import handlers, operation_table

NARROW = [torch.bfloat16, torch.float16]
HALVES = pytest.mark.parametrize("dtype", NARROW, ids=["bf16", "fp16"])


def x() -> Tensor:
    return torch.linspace(-2, 2, 24).view(4, 6)


def dtypes(half: Tensor) -> tuple[torch.dtype, ...]:
    return (x() @ x().T).dtype, half.exp().dtype, half.softmax(-1).dtype


@HALVES
def test_torch_autocast_inside_is_torchs(dtype):
    half, other = x().to(dtype), NARROW[NARROW.index(dtype) - 1]
    with dt.autocast("cpu", dtype):
        assert dtypes(half) == (dtype, torch.float32, dtype)
        with torch.autocast("cpu", other):
            assert dtypes(half)[:2] == (other, dtype)
        with torch.autocast("cpu", enabled=False):
            assert dtypes(half) == (torch.float32, dtype, dtype)
        # where it says nothing new, nothing changes
        with torch.autocast("cpu"):
            assert dtypes(half) == (dtype, torch.float32, dtype)
        assert dtypes(half) == (dtype, torch.float32, dtype)


@HALVES
def test_inside_of_torch_autocast_it_is_ours(dtype):
    half, weight = x().to(dtype), nn.Parameter(torch.ones(1, 1))
    with torch.autocast("cpu", torch.bfloat16):
        weight @ torch.ones(1, 1)
        with dt.autocast("cpu", dtype):
            assert dtypes(half) == (dtype, torch.float32, dtype)
            with torch.no_grad():
                weight.fill_(2.0)
            # not from the cache of the region around
            assert torch.ops.aten.linear(torch.ones(1, 1), weight).item() == 2.0
        assert dtypes(half)[:2] == (torch.bfloat16, dtype)
        assert torch.is_autocast_cache_enabled()


@HALVES
def test_keep_float32_and_op_rule_inside(dtype):
    half = x().to(dtype)
    with dt.autocast("cpu", dtype):
        with dt.keep_float32():
            assert dtypes(half) == (torch.float32,) * 3
            with dt.autocast("cpu", dtype):
                assert dtypes(half) == (dtype, torch.float32, dtype)
        with dt.op_rule({torch.exp: "as_given", torch.matmul: "float32"}):
            assert dtypes(half) == (torch.float32, dtype, dtype)
        assert dt.op_rule(lambda a, b: a + b, "compute")(x(), x()).dtype == dtype
        assert dt.keep_float32(lambda a: a @ a.T)(half).dtype == torch.float32
        assert dtypes(half) == (dtype, torch.float32, dtype)


@HALVES
@pytest.mark.parametrize("cast_inputs", [torch.float32, None])
def test_custom_fwd_functions_run_as_under_torch_autocast(cast_inputs, dtype):
    seen: list[torch.dtype] = []

    class Product(torch.autograd.Function):
        @staticmethod
        @torch.amp.custom_fwd(device_type="cpu", cast_inputs=cast_inputs)
        def forward(ctx, a, b):
            ctx.save_for_backward(a, b)
            seen.extend([a.dtype, (a @ b).dtype])
            return a @ b

        @staticmethod
        @torch.amp.custom_bwd(device_type="cpu")
        def backward(ctx, grad):
            a, b = ctx.saved_tensors
            seen.append((a @ a.T).dtype)
            return grad @ b.T, a.T @ grad

    found = []
    for autocast in (torch.autocast, dt.autocast):
        a, b = x().requires_grad_(), x().T.contiguous().requires_grad_()
        with autocast("cpu", dtype):
            loss = Product.apply(a * 1, b * 1).float().sum()
        loss.backward()
        found.append([*seen, a.grad.dtype, b.grad.dtype])
        seen.clear()
    assert found[0] == found[1]


# --- cast models


class Watched(nn.Module):
    """Says what dtypes operations have inside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 3)
        self.seen: list[torch.dtype] = []

    def forward(self, data: Tensor) -> Tensor:
        result = self.inner(data)
        self.seen = [result.dtype, (x() @ x().T).dtype, result.to(torch.bfloat16).exp().dtype]
        return result


@HALVES
@pytest.mark.parametrize("policy", ["bf16", "fp16", "bf16-mixed", "fp16-mixed", "fp32"])
def test_a_cast_model_keeps_its_policy_inside(policy, dtype, same_bits):
    torch.manual_seed(0)
    model = dt.cast(Watched(), policy)
    expected, seen = model(x()), model.seen
    part = model.inner(x())
    with dt.autocast("cpu", dtype):
        assert same_bits(model(x()), expected)
        assert model.seen == seen
        # a part of it that is called by itself, as well
        assert policy == "fp32" or same_bits(model.inner(x()), part)
        assert (x() @ x().T).dtype == dtype


def test_autocast_in_the_forward_of_a_cast_model_holds_there():
    class Inside(Watched):
        def forward(self, data: Tensor) -> Tensor:
            with dt.autocast("cpu", torch.float16):
                return super().forward(data)

    model = dt.cast(Inside(), "bf16")
    assert model(x()).dtype == torch.float32
    assert model.seen == [torch.float16, torch.float16, torch.float32]


# --- run again by torch.utils.checkpoint


def computation(data: Tensor, weight: Tensor) -> Tensor:
    hidden = F.linear(data, weight)
    # on a CPU torch.autocast has other dtypes for each of these
    return F.rms_norm(hidden.exp() * hidden.bfloat16().sum(-1, keepdim=True), (6,)).square().sum()


def gradients(device_type: str, dtype: torch.dtype, run) -> list[Tensor]:
    data, weight = x().requires_grad_(), torch.linspace(-1, 1, 36).view(6, 6).requires_grad_()
    with dt.autocast(device_type, dtype):
        loss = run(data, weight)
    loss.backward()
    assert not torch.is_autocast_enabled("cpu")
    return [loss, data.grad, weight.grad]


@HALVES
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_recomputes_with_the_same_rules(reentrant, dtype, same_bits):
    def once(data: Tensor, weight: Tensor) -> Tensor:
        return checkpoint(computation, data, weight, use_reentrant=reentrant)

    def within(data: Tensor, weight: Tensor) -> Tensor:
        return checkpoint(lambda *args: once(*args) * 1, data, weight, use_reentrant=reentrant)

    def in_modes(data: Tensor, weight: Tensor) -> Tensor:
        with dt.autocast("mps", torch.float16), dt.autocast("cpu", dtype):
            return once(data, weight)

    def entered_inside(data: Tensor, weight: Tensor) -> Tensor:
        def inside(*args: Tensor) -> Tensor:
            with dt.autocast("cpu", dtype):
                found = computation(*args)
            return found + data.bfloat16().sum()

        with dt.autocast("cpu", enabled=False):
            return checkpoint(inside, data, weight, use_reentrant=reentrant)

    expected = gradients("cpu", dtype, computation)
    for run in (once, within, in_modes):
        for one, other in zip(gradients("cpu", dtype, run), expected, strict=True):
            assert same_bits(one, other), run
    assert same_bits(gradients("cpu", dtype, entered_inside)[2], expected[2])


@HALVES
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_modules_recompute_with_the_same_rules(reentrant, dtype, same_bits):
    module = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Dropout(0.5), nn.Softmax(-1), nn.Linear(6, 2))
    found = []
    for run in (module, lambda data: checkpoint(module, data, use_reentrant=reentrant)):
        module.zero_grad()
        torch.manual_seed(0)
        with dt.autocast("cpu", dtype):
            loss = run(x().requires_grad_()).square().sum()
        loss.backward()
        found.append([loss, *(param.grad for param in module.parameters())])
    assert all(same_bits(one, other) for one, other in zip(*found, strict=True))


# --- compiled


@dt.autocast("cpu", torch.bfloat16)
def decorated(data: Tensor) -> tuple[Tensor, ...]:
    return data @ data.T, data.bfloat16().exp(), data.bfloat16().norm()


def within_one(data: Tensor) -> tuple[Tensor, ...]:
    with dt.autocast("cpu", torch.bfloat16):
        product = data @ data.T
        with dt.autocast("cpu", enabled=False):
            wide = data @ data.T
        return product, wide, (data @ data.T).exp()


def entered_twice(data: Tensor) -> tuple[Tensor, ...]:
    region = dt.autocast("cpu", torch.bfloat16)
    with region:
        with region:
            product = data @ data.T
        return product, product.sum()


def checkpointed(data: Tensor) -> tuple[Tensor, ...]:
    with dt.autocast("cpu", torch.bfloat16):
        return (checkpoint(computation, data, torch.ones(6, 6), use_reentrant=False),)


@pytest.mark.parametrize(
    ("function", "backend"),
    [(decorated, "eager"), (within_one, "aot_eager"), (entered_twice, "eager"), (checkpointed, "aot_eager")],
)
def test_compiled_whole_it_gives_the_same_bits(function, backend, same_bits):
    torch.compiler.reset()
    data, grads = x().requires_grad_(), []
    expected, got = function(data), torch.compile(function, backend=backend, fullgraph=True)(data)
    assert all(same_bits(one, other) for one, other in zip(got, expected, strict=True))
    for results in (expected, got):
        grads.append(torch.autograd.grad(sum(result.float().mean() for result in results), data)[0])
    torch.testing.assert_close(grads[0], grads[1], rtol=0.02, atol=0.02)


def test_the_first_region_of_a_process_may_be_compiled(monkeypatch, same_bits):
    expected = within_one(x())
    monkeypatch.setattr(handlers, "_made", {})
    monkeypatch.setattr(operation_table, "_same_operation", {})
    torch.compiler.reset()
    got = torch.compile(within_one, backend="eager", fullgraph=True)(x())
    assert all(same_bits(one, other) for one, other in zip(got, expected, strict=True))


def test_compiled_code_inside_follows_the_region_around():
    torch.compiler.reset()
    compiled = torch.compile(lambda data: (data @ data.T, data.bfloat16().exp()), backend="eager", fullgraph=True)
    for _ in range(2):
        assert [each.dtype for each in compiled(x())] == [torch.float32, torch.bfloat16]
        with dt.autocast("cpu", torch.bfloat16):
            assert [each.dtype for each in compiled(x())] == [torch.bfloat16, torch.float32]
