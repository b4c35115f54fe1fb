"""dt.autocast as a context and a decorator: what it lets torch see, restores, refuses, and which dtypes it gives."""

import copy
import pickle
import threading
import warnings
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode

import duotone.torch as dt
from duotone.errors import AutocastError, DuotoneError, DuotoneWarning
from duotone.torch.casting.half_on_cpu import cpu_has_half_products, say_once_how_half_runs_on_cpu

NARROW = [torch.bfloat16, torch.float16]
HALVES = pytest.mark.parametrize("dtype", NARROW, ids=["bf16", "fp16"])
AUTOCASTS = [torch.autocast, dt.autocast]


def x() -> Tensor:
    return torch.linspace(-2, 2, 24).view(4, 6)


def state(device_type: str = "cpu") -> tuple[object, ...]:
    return torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)


def everything() -> tuple[object, ...]:
    return *state(), torch.is_autocast_cache_enabled(), tuple(_get_current_function_mode_stack())


# --- what torch sees, and what is refused


CASES = [
    ("cpu",),
    ("cpu", None, False),
    ("cpu", torch.bfloat16),
    ("cpu", torch.float16),
    ("cpu", torch.float16, False),
    ("cpu", torch.float32),
    ("cpu", torch.float32, False),
    ("cpu", torch.float64),
    ("cpu", torch.int8),
    ("cpu:0",),
    ("cuda",),
    ("cuda", torch.bfloat16),
    ("cuda", None, False),
    ("mps", torch.float16),
    ("mps", torch.float32),
    ("meta",),
    ("nonsense",),
    ("",),
    (torch.device("cpu"),),
    (0,),
]


@pytest.mark.parametrize("arguments", CASES, ids=str)
def test_torch_sees_warns_and_refuses_as_under_torch_autocast(arguments):
    say_once_how_half_runs_on_cpu()
    outcomes: list[object] = []
    files = []
    for autocast in AUTOCASTS:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                with autocast(*arguments):
                    outcomes.append((*state(arguments[0]), (x() @ x().T).dtype))
            except Exception as error:
                outcomes.append(error)
        files.append([each.filename for each in caught])
        assert state() == (False, torch.bfloat16)
    theirs, ours = outcomes
    if isinstance(theirs, Exception):
        assert isinstance(ours, type(theirs))
        assert isinstance(ours, DuotoneError)
    else:
        assert ours == theirs
    assert files[0] == files[1]


def test_messages_say_what_is_allowed():
    for device_type, message in ((torch.device("cpu"), "write tensor.device.type"), ("meta", '"meta"; take "cpu"')):
        with pytest.raises(AutocastError, match=message):
            dt.autocast(device_type)
    for dtype in ("bfloat16", 16):
        with pytest.raises(AutocastError, match=r"the dtype of an autocast is torch\.bfloat16 or torch\.float16, not "):
            dt.autocast("cpu", dtype)
    with pytest.raises(TypeError, match=r'not 3; for a block of code write "with autocast\('):
        dt.autocast("cpu")(3)
    with pytest.raises(TypeError):
        dt.autocast()
    with pytest.warns(DuotoneWarning, match='autocast is off: "cpu" has no autocast in torch.float32, but in torch.bf'):
        dt.autocast("cpu", torch.float32)
    no_cuda = mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=True)
    with no_cuda, pytest.warns(DuotoneWarning, match="autocast is off: there is no CUDA here"):
        dt.autocast("cuda")


@pytest.mark.skipif(cpu_has_half_products(), reason="this CPU has FP16 products")
def test_float16_on_a_cpu_says_how_it_runs():
    say_once_how_half_runs_on_cpu.cache_clear()
    with pytest.warns(DuotoneWarning, match="no FP16 matrix products"):
        dt.autocast("cpu", torch.float16)


def test_autocast_in_an_unsupported_dtype_is_off():
    with pytest.warns(DuotoneWarning):
        off = dt.autocast("cpu", torch.float32)
    with dt.autocast("cpu", torch.bfloat16):
        with off:
            assert (x() @ x().T).dtype == torch.float32
            assert x().bfloat16().exp().dtype == torch.bfloat16
        assert (x() @ x().T).dtype == torch.bfloat16


@HALVES
def test_everything_is_restored_whatever_happens_inside(dtype):
    before = everything()
    for enabled in (True, False):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), dt.autocast("cpu", dtype, enabled):
            x() @ x()
        assert everything() == before
        with dt.autocast("cpu", dtype, enabled):
            assert enabled == (len(_get_current_function_mode_stack()) == 1)
            # whoever asks, there is no cache
            assert not torch.is_autocast_cache_enabled()
    with dt.autocast("cpu", dtype):
        inside = everything()
        with dt.autocast("cpu", enabled=False):
            # without a dtype, that of the region around
            assert state() == (False, dtype)
        with dt.autocast("cpu", NARROW[NARROW.index(dtype) - 1]):
            assert state() == (True, NARROW[NARROW.index(dtype) - 1])
        with dt.autocast("cpu"):
            assert state() == (True, dtype)
        assert everything() == inside
    assert everything() == before


@HALVES
def test_one_instance_is_entered_again_inside_of_itself(dtype):
    # torch.autocast is left switched on by this
    before, region = everything(), dt.autocast("cpu", dtype)
    with region as entered:
        assert entered is region
        with region, dt.autocast("cpu", enabled=False), region:
            assert (x() @ x().T).dtype == dtype
        assert (x() @ x().T).dtype == dtype
    assert everything() == before


@HALVES
def test_it_decorates_functions_and_methods(dtype):
    region = dt.autocast("cpu", dtype)

    class Doubling(nn.Linear):
        @region
        def forward(self, input: Tensor, times: int = 1) -> Tensor:
            """What it does."""
            assert state() == (True, dtype)
            return super().forward(input) if times == 1 else self(input, times=times - 1) * 2

    module = Doubling(6, 3)
    assert module(x(), times=3).dtype == dtype
    assert Doubling.forward.__doc__ == "What it does."
    assert not torch.is_autocast_enabled("cpu")
    off = dt.autocast("cpu", enabled=False)(lambda: (x() @ x().T).dtype)
    with region:
        assert off() == torch.float32
    assert copy.deepcopy(module)(x()).dtype == dtype


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda region: pickle.loads(pickle.dumps(region))])
def test_copies(twin):
    with twin(dt.autocast("cpu", torch.float16)):
        assert (x() @ x().T).dtype == torch.float16
        assert x().half().exp().dtype == torch.float32


def test_one_instance_serves_threads_at_once():
    region, other = dt.autocast("cpu", torch.bfloat16), dt.autocast("cpu", torch.float16)
    turns, failures = threading.Barrier(2), []

    def work(first: dt.autocast | nullcontext[None], turn: int, before: tuple[object, ...]) -> None:
        try:
            with first:
                # one is in and out again while the other is inside, who entered later
                for _ in range(turn):
                    turns.wait(10)
                with region:
                    for _ in range(2):
                        turns.wait(10)
                    assert (x() @ x().T).dtype == torch.bfloat16
                assert state() == before
                for _ in range(1 - turn):
                    turns.wait(10)
                assert state() == before
            assert state() == (False, torch.bfloat16)
        except BaseException as error:
            failures.append(error)
            turns.abort()

    works = ((nullcontext(), 0, (False, torch.bfloat16)), (other, 1, (True, torch.float16)))
    threads = [threading.Thread(target=work, args=arguments) for arguments in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    # a thread that enters nothing sees nothing
    with region:
        seen: list[object] = []
        thread = threading.Thread(target=lambda: seen.append((*state(), (x() @ x().T).dtype)))
        thread.start()
        thread.join()
    assert seen == [(False, torch.bfloat16, torch.float32)]


# --- dtypes


def results(device: str, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return the dtypes that operations give on FP32 weights, and on FP32 or 16-bit data."""
    wide, weight, vector = (torch.ones(*shape, device=device) for shape in ((4, 8), (8, 8), (8,)))
    half, image, rows = wide.to(dtype), torch.ones(2, 8, 4, 4, device=device), torch.zeros(4, device=device).long()
    found = {
        "linear": F.linear(wide, weight, vector),
        "matmul of both": half @ weight,
        "conv2d": F.conv2d(image, torch.ones(3, 8, 2, 2, device=device), torch.ones(3, device=device)),
        "attention": F.scaled_dot_product_attention(*[torch.ones(1, 2, 4, 8, device=device)] * 3),
        "layer_norm": F.layer_norm(half, (8,), vector, vector),
        "layer_norm of float32": F.layer_norm(wide, (8,), vector, vector),
        "rms_norm": F.rms_norm(half, (8,), vector),
        "group_norm": F.group_norm(image.to(dtype), 2, vector, vector),
        "softmax": half.softmax(-1),
        "softmax of float32": wide.softmax(-1),
        "exp": half.exp(),
        "sum": half.sum(),
        "pow": half**2,
        "norm": half.norm(),
        "cross_entropy": F.cross_entropy(half, rows),
        "mse_loss": F.mse_loss(half, half),
        "embedding": F.embedding(rows, weight),
        "cat": torch.cat([wide, half]),
        "gelu": F.gelu(half),
        "float64": wide.double() @ weight.double(),
    }
    return {name: result.dtype for name, result in found.items()}


NARROW_RESULTS = ["linear", "matmul of both", "conv2d", "attention", "layer_norm", "rms_norm", "group_norm"]


@HALVES
def test_the_same_rules_on_every_device(dtype):
    # torch.autocast gives exp, sum, pow and norm in 16 bits on a CPU, and norms and softmax in FP32 on CUDA
    there = mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False)
    with there, mock.patch("torch.cuda.is_bf16_supported", return_value=True):
        with FakeTensorMode(), dt.autocast("cuda", dtype):
            assert state("cuda") == (True, dtype)
            on_cuda = results("cuda", dtype)
            elsewhere = (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
        with FakeTensorMode(), dt.autocast("cuda", torch.float32):
            widened = results("cuda", dtype)
    with dt.autocast("cpu", dtype):
        on_cpu = results("cpu", dtype)
    expected = {
        **dict.fromkeys(on_cpu, torch.float32),
        **dict.fromkeys([*NARROW_RESULTS, "softmax", "gelu"], dtype),
        "float64": torch.float64,
    }
    assert on_cpu == on_cuda == expected
    assert elsewhere == torch.float32
    assert {name for name, each in widened.items() if each != torch.float32} == {"gelu", "float64"}


def test_a_number_of_a_device_does_not_matter():
    with dt.autocast("cpu:0", torch.bfloat16):
        assert x().bfloat16().exp().dtype == torch.float32


def test_tensors_on_other_devices_are_left_alone():
    with dt.autocast("cpu", torch.bfloat16):
        elsewhere = torch.ones(2, 2, device="meta")
        assert (elsewhere @ elsewhere).dtype == torch.float32
        assert elsewhere.bfloat16().exp().dtype == torch.bfloat16
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


MODULES = {
    "linear": lambda: nn.Linear(6, 3),
    "lstm": lambda: nn.LSTM(6, 3),
    "gru cell": lambda: nn.GRUCell(6, 3),
    "attention": lambda: nn.TransformerEncoderLayer(6, 2, 8, 0.0, batch_first=True),
    "batch norm": lambda: nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3)),
    "norms": lambda: nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6), nn.RMSNorm(6)),
    "prelu": lambda: nn.Sequential(nn.Linear(6, 6), nn.PReLU(6)),
}


@HALVES
@pytest.mark.parametrize("name", MODULES)
def test_modules_with_float32_weights(name, dtype):
    torch.manual_seed(0)
    module, grads, outputs = MODULES[name](), [], []
    for enabled in (False, True):
        module.zero_grad()
        with dt.autocast("cpu", dtype, enabled):
            output = module(x())
        output = output[0] if isinstance(output, tuple) else output
        (output.float() * torch.linspace(-1, 1, output.numel()).view(output.shape)).sum().backward()
        outputs.append(output)
        grads.append([param.grad for param in module.parameters()])
    torch.testing.assert_close(outputs[1].float(), outputs[0], rtol=0.05, atol=0.05)
    for exact, grad in zip(*grads, strict=True):
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad, exact, rtol=0.05, atol=0.1)


@HALVES
def test_products_reach_the_kernels_in_a_dtype_that_the_cpu_has(dtype):
    # torch.autocast multiplies FP16 in FP16 on a CPU that has no such product, many times slower
    seen = set()

    class Recording(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
                seen.update(arg.dtype for arg in args if isinstance(arg, Tensor))
            return func(*args, **(kwargs or {}))

    module = nn.TransformerEncoderLayer(6, 2, 8, 0.0, batch_first=True)
    with Recording():
        with dt.autocast("cpu", dtype):
            loss = module(x().view(1, 4, 6)).square().sum()
        loss.backward()
    assert seen == {torch.float32 if dtype == torch.float16 and not cpu_has_half_products() else dtype}
