"""What a call of the table is to give in a region, written out by hand: nothing of `region` is used here."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.torch_version import TorchVersion
from torch.utils._pytree import tree_leaves, tree_map_only

from duotone.torch.casting.half_on_cpu import cpu_has_half_products
from duotone.torch.casting.operation_table import kinds_by_name, names_in
from duotone.torch.casting.products import is_sparse

from .op_calls import Call, all_calls, is_random

# torch 2.14 still has these names, and each raises
REMOVED = ("cholesky", "qr") if TorchVersion(torch.__version__) >= "2.14" else ()
CALLS = {name: call for name, call in all_calls().items() if call.name not in REMOVED}
KINDS = kinds_by_name()
NARROW = [torch.bfloat16, torch.float16]
# of float32_inside, those that run in torch's own 16-bit kernel; the others on widened operands, rounded once
OWN_KERNEL = {
    "batch_norm", "instance_norm", "native_layer_norm", "native_group_norm", "softmax", "softmin", "special.softmax",
    "mean",
}  # fmt: skip


def cast(value: Any, dtype: torch.dtype, of: tuple[torch.dtype, ...] = (torch.float32,), device: str = "cpu") -> Any:
    """Return a copy of arguments with the tensors in one of the dtypes cast."""
    return tree_map_only(
        Tensor,
        lambda tensor: tensor.detach().clone().to(device, dtype if tensor.dtype in of else None),
        value,
    )


def wide(value: Any) -> Any:
    """Widen 16-bit tensors; autograd sees it."""
    return tree_map_only(Tensor, lambda tensor: tensor.float() if tensor.dtype in NARROW else tensor, value)


def narrow(value: Any, dtype: torch.dtype) -> Any:
    """Round FP32 tensors; autograd sees it."""
    return tree_map_only(Tensor, lambda tensor: tensor.to(dtype) if tensor.dtype == torch.float32 else tensor, value)


def run(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if is_random(call):
        torch.manual_seed(0)
    result = call.function(*args, **kwargs)
    # an operation in place may return nothing
    return args[0] if result is None else result


def emulated(dtype: torch.dtype, device: str) -> bool:
    return dtype == torch.float16 and device == "cpu" and not cpu_has_half_products()


def by_hand(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], dtype: torch.dtype, device: str) -> Any:
    """Return what a region in `dtype` is to give for operands that are all in 16 bits or all in FP32."""
    kind = KINDS[call.name]
    is_wide = all(tensor.dtype not in NARROW for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor))
    if call.name == "linear_cross_entropy":
        x, weight, target = args
        logits = by_hand(Call("linear", F.linear, None), (x, weight), {}, dtype, device)
        return F.cross_entropy(logits.float(), target, **kwargs)
    if kind == "compute":
        is_summed_wide = call.name in names_in("sparse_product")
        args, kwargs = (args, kwargs) if is_summed_wide else narrow((args, kwargs), dtype)
        if is_summed_wide or emulated(dtype, device):
            return narrow(run(call, *wide((args, kwargs))), dtype)
        return run(call, args, kwargs)
    if kind == "float32":
        return run(call, *wide((args, kwargs)))
    if kind == "float32_inside" and not is_wide:
        return inside(call, args, kwargs, dtype)
    return run(call, args, kwargs)


def inside(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], dtype: torch.dtype) -> Any:
    """Return what an operation computed in FP32 inside is to give for 16-bit operands."""
    if call.function in (F.batch_norm, F.instance_norm):
        return with_wide_weights(call, args, kwargs)
    if call.function in (torch.batch_norm, torch.instance_norm):
        weights = args[1:3] if getattr(args[3], "dtype", None) in NARROW else wide(args[1:3])
        return run(call, (args[0], *weights, *args[3:]), kwargs)
    return run(call, args, kwargs) if call.name in OWN_KERNEL else narrow(run(call, *wide((args, kwargs))), dtype)


def with_wide_weights(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a norm with running statistics on FP32 weights, ones if it has none, unless the statistics are 16-bit."""
    names = ("input", "running_mean", "running_var", "weight", "bias")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    mean = given.get("running_mean")
    if mean is None or mean.dtype == torch.float32:
        given.update(wide({name: given.get(name) for name in ("weight", "bias")}))
        given["weight"] = torch.ones(given["input"].shape[1]) if given["weight"] is None else given["weight"]
    return call.function(**given, **dict(zip(("training",), args[5:], strict=False)))


def bits(result: Any) -> list[Any]:
    """Return dtypes, shapes and bits of the tensors in a result, and all else as it is."""
    found: list[Any] = []
    for leaf in tree_leaves(result):
        if not isinstance(leaf, Tensor):
            found.append(leaf)
            continue
        leaf = leaf.to_dense() if is_sparse(leaf) else leaf  # noqa: PLW2901
        real = torch.view_as_real(leaf.detach().resolve_conj()) if leaf.is_complex() else leaf.detach()
        same_size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[real.element_size()]
        found.append((leaf.dtype, tuple(leaf.shape), real.contiguous().view(same_size).tolist()))
    return found


def dtypes(result: Any) -> set[torch.dtype]:
    tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    return {tensor.dtype for tensor in tensors if tensor.is_floating_point() or tensor.is_complex()}


def arguments(call: Call, dtype: torch.dtype, device: str = "cpu") -> tuple[tuple[Any, ...], dict[str, Any]]:
    return cast((call.arguments.args, call.arguments.kwargs), dtype, device=device)
