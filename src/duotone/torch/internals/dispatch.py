"""Private names of torch around the dispatcher: modes, autocast, and kernels by their inner names."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from duotone.torch.internals.lookup import find, has_all, refusal

# the function modes that are entered, the innermost last
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/csrc/autograd/init.cpp
mode_count: Callable[[], int] = find("torch._C:_len_torch_function_stack", lambda: 0)
mode_at: Callable[[int], Any] = find("torch._C:_get_function_stack_at")
# where modes cannot be seen, autocast has to tell whether a region is around
SEES_MODES = has_all("_torch_function_stack", "_get_function_stack_at")
if not SEES_MODES:
    mode_count = lambda: 0  # noqa: E731
# calls a function past all modes; without it, modes see the call and change nothing, but that takes longer
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/csrc/utils/disable_torch_function.cpp
past_modes: Callable[[], Any] = find("torch._C:DisableTorchFunction", nullcontext)
# the mode of torch.set_default_device, which torch.utils.checkpoint enters by itself; without it, it is entered twice
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/utils/_device.py#L68
_DeviceContext: Any = find("torch.utils._device:DeviceContext", ())


def function_modes() -> list[TorchFunctionMode]:
    """Return the function modes that are entered, the innermost last, but for that of a default device.

    >>> function_modes()
    []
    """
    modes = [mode_at(place) for place in range(mode_count())] if SEES_MODES else []
    return [mode for mode in modes if not isinstance(mode, _DeviceContext)]


def has_default_device() -> bool:
    """Return whether the mode of a default device is entered, which then is the outermost.

    >>> has_default_device()
    False
    """
    return mode_count() > 0 and isinstance(mode_at(0), _DeviceContext)


# how many modes see what the dispatcher does; without it, one is taken to do so always, and attention is torch's
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/csrc/utils/python_dispatch.cpp
_dispatch_mode_count: Callable[[], int] = find("torch._C:_len_torch_dispatch_stack", lambda: 1)


def has_dispatch_modes() -> bool:
    """Return whether a `TorchDispatchMode` is entered: one that counts, records, or makes fake tensors.

    >>> has_dispatch_modes()
    False
    """
    return _dispatch_mode_count() > 0


@contextmanager
def _autocast_off() -> Iterator[None]:
    with ExitStack() as stack:
        for device_type in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(device_type, torch.bfloat16, enabled=False))
        yield


# switches autocast off on all devices, several times faster than torch.autocast
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/csrc/autograd/init.cpp
without_autocast: Callable[[], Any] = find("torch._C:_DisableAutocast", _autocast_off)
# knows whether there is no CUDA, as torch.amp asks
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/cuda/amp/common.py#L10
_amp: Any = find("torch.cuda.amp:common")


def has_no_cuda() -> bool:
    """Return whether there is no CUDA, nor what torch.amp takes for it."""
    return not torch.cuda.is_available() if _amp is None else _amp.amp_definitely_not_available()


# the device type that an extension has registered; without it, one that has renamed itself is given autocast's dtypes
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/csrc/Module.cpp
extension_device: Callable[[], str] = find("torch._C:_get_privateuse1_backend_name", lambda: "privateuseone")
# whether this CPU multiplies matrices in FP16; without it, they are multiplied in FP32 arithmetic
# https://github.com/pytorch/pytorch/blob/v2.13.0/aten/src/ATen/native/mkldnn/Linear.cpp
has_half_products: Callable[[], bool] = find("torch:ops.mkldnn._is_mkldnn_fp16_supported", lambda: False)


def _multiply_each(tensors: list[Tensor], factor: Tensor) -> None:
    for tensor in tensors:
        tensor.mul_(factor)


# one launch for many tensors
# https://github.com/pytorch/pytorch/blob/v2.13.0/aten/src/ATen/native/native_functions.yaml
multiply_all: Callable[[list[Tensor], Tensor], Any] = find("torch:_foreach_mul_", _multiply_each)
# the derivative of log-softmax from its result, as torch takes it itself
# https://github.com/pytorch/pytorch/blob/v2.13.0/aten/src/ATen/native/native_functions.yaml
log_softmax_backward: Callable[[Tensor, Tensor, int, torch.dtype], Tensor] = find(
    "torch:ops.aten._log_softmax_backward_data",
    lambda grad, output, dim, dtype: grad - output.exp() * grad.sum(dim, keepdim=True),
)
# kernels that move or read, and compute nothing; without one, explain lists it as an operation
# https://github.com/pytorch/pytorch/blob/v2.13.0/aten/src/ATen/native/native_functions.yaml
MOVING_KERNELS = frozenset(
    find(f"torch:ops.aten.{name}") for name in ("_unsafe_view", "_reshape_alias", "_local_scalar_dense")
)
# what pads behind torch.nn.utils.rnn; without one, a padding value beyond FP16's range is an error or Inf there
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/nn/utils/rnn.py
_padding: Any = (find("torch._C._nn:pad_sequence"), find("torch:_pad_packed_sequence"))
PADDING: tuple[Callable[..., Any], ...] = tuple(function for function in _padding if function is not None)
# the kernel that casts; explain does not work without it
casting_kernel: Any = find("torch:ops.aten._to_copy")
# a kernel by its name alone, which no function of torch stands around; without it, explain finds no kind for one
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_ops.py
OperatorPacket: Any = find("torch._ops:OpOverloadPacket", ())
# a mode that sees kernels; explain does not work without it
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/utils/_python_dispatch.py#L72
_TorchDispatchMode: Any = find("torch.utils._python_dispatch:TorchDispatchMode", object)


class WatchingMode(_TorchDispatchMode):
    """A dispatch mode for a run in which nothing is compiled.

    Raises:
        BackendError: torch has no such modes, or casts by another kernel.
    """

    def __init__(self) -> None:
        for name in ("torch.utils._python_dispatch:TorchDispatchMode", "torch:ops.aten._to_copy"):
            if not has_all(name):
                refusal(name, "which explain needs to see what runs")()
        super().__init__()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch would import its compiler for seconds, only to keep it away from here
        # https://github.com/pytorch/pytorch/blob/v2.13.0/torch/utils/_python_dispatch.py#L212
        return False
