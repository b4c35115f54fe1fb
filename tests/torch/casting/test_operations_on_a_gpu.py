"""The operation table on CUDA: that torch lists kernels for all of it, and what they give where there is a GPU."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torchgen
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from duotone.torch.casting.region import Region

from .op_by_hand import CALLS, KINDS, NARROW, arguments, dtypes, narrow, run, wide
from .op_calls import is_random
from .test_operations import check

WITHOUT_KERNEL = {"histogram", "histogramdd"}
# what torch calls on a CPU alone, having other kernels of the same name's function for a GPU
OF_CPU = {"_scaled_dot_product_flash_attention_for_cpu", "mkldnn_rnn_layer"}
pytestmark = pytest.mark.filterwarnings("ignore")


class Operators(TorchDispatchMode):
    """Notes the names of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name().removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def declarations() -> dict[str, str]:
    """Return how torch declares each of its operators, by name."""
    path = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
    blocks = re.split(r"^- func: ", path.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return {block[: block.index("(")]: block for block in blocks}


def has_cuda_kernel(declarations: dict[str, str], name: str) -> bool:
    block = declarations[name]
    delegate = re.search(r"structured_delegate: (\S+)", block)
    if delegate:
        return has_cuda_kernel(declarations, delegate[1])
    _, has_kernels, kernels = block.partition("dispatch:")
    # what has no kernels of its own is made of others
    return not has_kernels or re.search(r"CUDA\b|Composite", kernels) is not None


def test_all_but_histograms_have_a_cuda_kernel(declarations):
    missing = set()
    for call in CALLS.values():
        with Operators() as operators:
            run(call, *arguments(call, torch.float32))
        if any(not has_cuda_kernel(declarations, name) for name in operators.names - OF_CPU):
            missing.add(call.name)
    assert missing == WITHOUT_KERNEL
    assert all(has_cuda_kernel(declarations, name) for name in ("add.Tensor", "native_layer_norm", "softmax.int"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name, call in CALLS.items() if KINDS[call.name] != "refused"])
def test_on_a_gpu(name):
    call = CALLS[name]
    if call.name in WITHOUT_KERNEL:
        with Region(torch.bfloat16).on("cuda"), pytest.raises(NotImplementedError):
            run(call, *arguments(call, torch.float32, "cuda"))
        return
    for dtype in NARROW:
        if KINDS[call.name] == "float32_inside":
            with Region(dtype).on("cuda"):
                got = run(call, *arguments(call, dtype, "cuda"))
            # statistics beside the data, as those of native_layer_norm, are FP32
            assert dtypes(tree_leaves(got)[0]) == {dtype}
            assert dtypes(got) <= {dtype, torch.float32}
            exact = narrow(run(call, *wide(arguments(call, dtype, "cuda"))), dtype)
            torch.testing.assert_close(got, exact, check_dtype=False)
        elif not is_random(call):
            check(name, dtype, dtype, "cuda")
