"""Cast models in the hands of others: hooks, parametrizations, weights used outside of forward, copies, pickles."""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, skip_init
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.optim.swa_utils import AveragedModel

import duotone.torch as dt

from .computation import NARROW, Model, assert_right, by_hand, cast_model, data

POLICIES = pytest.mark.parametrize(
    ("policy", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)], ids=["bf16", "fp16"]
)


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 2))


# --- hooks


@POLICIES
def test_hooks_of_parts_compute_by_the_rules_of_the_model(policy, dtype):
    model, seen = dt.cast(chain(), policy), {}

    def before(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen["before"] = ((args[0].float() @ args[0].float().mT).dtype, args[0].to(dtype).exp().dtype)
        return (args[0] * 2,)

    def after(module: nn.Module, args: tuple[Tensor, ...], result: Tensor) -> Tensor:
        seen["after"] = (result.dtype, (result @ result.mT).dtype, result.sum().dtype)
        return result + 1

    model[3].register_forward_pre_hook(before)
    model[0].register_forward_hook(after)
    got = model(data())
    assert seen == {"before": (dtype, torch.float32), "after": (dtype, dtype, torch.float32)}
    hidden = F.linear(data().to(dtype).float(), *(each.float() for each in (model[0].weight, model[0].bias))).to(dtype)
    normal = F.layer_norm((hidden + 1).float(), (6,)).to(dtype)
    expected = F.linear(F.gelu(normal).float() * 2, model[3].weight.float(), model[3].bias.float())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=0.03, atol=0.03)


@POLICIES
def test_hooks_of_the_model_itself_compute_outside_of_it(policy, dtype):
    model, seen = dt.cast(chain(), policy), []

    def hook(module: nn.Module, args: tuple[Tensor, ...], result: Tensor) -> None:
        seen.extend([result.dtype, (result @ result.mT).dtype, result.to(dtype).exp().dtype])

    model.register_forward_hook(hook)
    model(data())
    assert seen == [torch.float32, torch.float32, dtype]


def test_hooks_for_all_modules(same_bits):
    model, names = dt.cast(chain(), "bf16"), []
    expected = model(data())
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, result: names.append(result.dtype))
    try:
        assert same_bits(model(data()), expected)
    finally:
        handle.remove()
    assert names == [torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.float32]


@POLICIES
def test_hooks_of_the_backward_pass(policy, dtype):
    model, seen = dt.cast(chain(), policy), []
    model[0].register_full_backward_hook(lambda module, into, out: seen.append(out[0].dtype))
    model[3].register_full_backward_pre_hook(
        lambda module, out: seen.append((out[0].float() @ out[0].float().mT).dtype)
    )
    model(data()).square().sum().backward()
    assert seen == [torch.float32, dtype]
    assert all(param.grad.isfinite().all() for param in model.parameters())


def test_an_error_in_a_hook_leaves_nothing_behind():
    model = dt.cast(chain(), "bf16")

    def hook(module: nn.Module, args: tuple[Tensor, ...], result: Tensor) -> None:
        raise ValueError("in a hook")

    handle = model[0].register_forward_hook(hook)
    with pytest.raises(ValueError, match="in a hook"):
        model(data())
    assert (data() @ data().T).dtype == torch.float32
    assert data().bfloat16().exp().dtype == torch.bfloat16
    handle.remove()
    assert model(data()).dtype == torch.float32


# --- weights that are computed, shared, or used elsewhere


class Symmetric(nn.Module):
    """A weight is the sum of itself and its transpose."""

    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).mT


@POLICIES
@pytest.mark.parametrize("kind", ["symmetric", "weight_norm", "spectral_norm", "orthogonal"])
def test_parametrizations_before_and_after_a_cast(kind, policy, dtype):
    def parametrized(model: nn.Sequential) -> nn.Sequential:
        if kind == "symmetric":
            parametrize.register_parametrization(model[0], "weight", Symmetric())
        else:
            getattr(parametrizations, kind)(model[0])
        return model

    exact = parametrized(chain())(data())
    models = [dt.cast(parametrized(chain()), policy)]
    # torch has no QR in 16 bits, with which that one starts
    if kind != "orthogonal":
        models.append(parametrized(dt.cast(chain(), policy)))
    for model in models:
        got = model.eval()(data())
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, exact, rtol=0.1, atol=0.1)
        got.square().sum().backward()
        assert all(param.grad.isfinite().all() for param in model.parameters() if param.requires_grad)


@POLICIES
def test_weights_outside_of_forward_are_tensors_like_others(policy, dtype):
    model = dt.cast(chain(), policy)
    weight = model[0].weight
    model(data())
    assert weight.dtype == dtype
    assert (weight @ weight.T).dtype == weight.exp().dtype == weight.softmax(-1).dtype == weight.sum().dtype == dtype
    decay = sum(param.float().square().sum() for param in model.parameters())
    (model(data()).sum() + decay).backward()
    assert decay.dtype == torch.float32
    assert all(param.grad is not None for param in model.parameters())


@POLICIES
def test_a_weight_that_is_shared_by_two_models(policy, dtype):
    first, second = chain(), chain()
    second[0].weight = first[0].weight
    both = dt.cast(nn.ModuleList([first, second]), policy)
    assert both[0][0].weight is both[1][0].weight
    (both[0](data()).sum() + both[1](data()).sum()).backward()
    exact = [chain(), chain()]
    exact[1][0].weight = exact[0][0].weight
    (exact[0](data()).sum() + exact[1](data()).sum()).backward()
    torch.testing.assert_close(first[0].weight.grad.float(), exact[0][0].weight.grad, rtol=0.1, atol=0.05)


# --- copies


@POLICIES
@pytest.mark.parametrize("inside", [False, True], ids=["outside", "in a region"])
@pytest.mark.parametrize(
    "twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies_compute_the_same(twin, inside, policy, dtype, same_bits):
    model = cast_model(policy)
    expected = model(data())
    with dt.autocast("cpu", dtype) if inside else torch.enable_grad():
        again = twin(model)
    assert same_bits(again(data()), expected)
    assert all(same_bits(again.results[name], model.results[name]) for name in model.results)
    with torch.no_grad():
        again.weight.zero_()
    assert same_bits(model(data()), expected)


@POLICIES
def test_a_model_that_is_saved_whole(policy, dtype, same_bits):
    model, file = cast_model(policy), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert same_bits(torch.load(file, weights_only=False)(data()), model(data()))


@pytest.mark.filterwarnings("ignore")
def test_an_averaged_copy_computes_by_the_rules():
    model = cast_model("bf16")
    average = AveragedModel(model)
    average.update_parameters(model)
    average(data())
    assert_right(average.module.results, by_hand(torch.bfloat16, data(), *average.module.parameters()), torch.bfloat16)


# --- models in models


@POLICIES
def test_a_cast_model_in_a_plain_one(policy, dtype):
    inner = cast_model(policy)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> tuple[torch.dtype, ...]:
            before = x.to(dtype).exp().dtype
            self.inner(x)
            return before, (x @ x.T).dtype, x.to(dtype).exp().dtype

    assert Outer()(data()) == (dtype, torch.float32, dtype)
    assert_right(inner.results, by_hand(dtype, data(), *inner.parameters()), dtype)


def test_a_model_of_one_format_in_one_of_another():
    inner = cast_model("fp16")

    class Outer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            product = x @ x.T
            inner(x)
            assert product.dtype == (x @ x.T).dtype == torch.bfloat16
            assert product.exp().dtype == torch.float32
            return product.sum()

    dt.cast(Outer(), "bf16")(data())
    assert_right(inner.results, by_hand(torch.float16, data(), *inner.parameters()), torch.float16)


@POLICIES
def test_a_model_that_calls_itself_and_its_parts(policy, dtype):
    class Recursive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step = nn.Linear(6, 6)
            self.seen: list[torch.dtype] = []

        def forward(self, x: Tensor, depth: int) -> Tensor:
            hidden = self.step(x)
            self.seen.append(hidden.dtype)
            result = self(hidden, depth - 1) if depth else hidden
            assert (x @ x.mT).dtype == dtype
            return result

    model = dt.cast(Recursive(), policy)
    assert model(data(), 3).dtype == torch.float32
    assert model.seen == [dtype] * 4


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU, nn.RNN])
@POLICIES
def test_recurrent_layers_of_packed_sequences(cell, policy, dtype):
    torch.manual_seed(0)

    class Packs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = cell(6, 5, batch_first=True, bidirectional=True)

        def forward(self, x: Tensor) -> Tensor:
            packed = pack_padded_sequence(x, torch.tensor([3, 2]), batch_first=True)
            return pad_packed_sequence(self.cell(packed)[0], batch_first=True)[0]

    x = torch.linspace(-1, 1, 36).view(2, 3, 6)
    model = Packs()
    exact = model(x)
    got = dt.cast(model, policy)(x)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, exact, rtol=0.02, atol=0.02)
    got.sum().backward()


def test_a_model_that_is_made_inside_of_a_region(same_bits):
    # initial values are what they are outside
    def made() -> list[Tensor]:
        torch.manual_seed(0)
        parts = nn.Linear(6, 6), nn.Embedding(3, 6), nn.Conv1d(2, 3, 3), nn.LSTM(6, 3), nn.MultiheadAttention(6, 2)
        tensors = [param.detach() for part in parts for param in part.parameters()]
        orthogonal = nn.init.orthogonal_(torch.empty(6, 6))
        return [*tensors, orthogonal, nn.init.trunc_normal_(torch.empty(9)), nn.init.dirac_(torch.empty(3, 3, 3))]

    expected = made()
    for dtype in NARROW:
        with dt.autocast("cpu", dtype):
            assert all(map(same_bits, made(), expected))
    assert isinstance(skip_init(nn.Linear, 6, 6), nn.Linear)


def test_a_plain_model_beside_a_cast_one(same_bits):
    plain, cast = Model(), cast_model("bf16")
    expected = plain(data())
    cast(data())
    assert same_bits(plain(data()), expected)
