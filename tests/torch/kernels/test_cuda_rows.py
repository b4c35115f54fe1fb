"""The machine code of kernels along rows, compiled ahead of time without a GPU: wide accesses, and nothing spilled."""

import pytest
import torch

pytest.importorskip("triton", reason="the cuda backend needs Triton")
from duotone.torch.kernels.cuda import cross_entropy, norms

from .ptx import ARCHITECTURES, compiled, instructions, registers_and_spilled

FORMATS = ("bf16", "fp16")
OF_LOGITS = {
    **dict.fromkeys(("each", "kept", "grad", "count", "weight", "sums"), "*fp32"),
    **dict.fromkeys(("rows", "classes", "ignore_index", "grad_stride"), "i32"),
    **dict.fromkeys(("stride", "out_stride"), "i64"),
    "target": "*i64",
}


def of_cross_entropy(name, architecture=90, number="bf16", classes=50_304, **constants):
    options = cross_entropy.options_of(classes)
    kernel = getattr(cross_entropy, name)
    given = {key: value for key, value in {**options, **constants}.items() if key in kernel.arg_names}
    types = {key: value for key, value in OF_LOGITS.items() if key not in constants}
    types |= {"logits": f"*{number}", "out": f"*{number}"}
    options = {"num_warps": options["num_warps"], "enable_fp_fusion": False}
    return compiled(kernel, types, given, options, architecture)


KERNELS = [
    ("rows_kernel", {}),
    ("rows_kernel", {"weight": None}),
    ("gradient_kernel", {"IS_BESIDE": True, "IS_INTERPRETED": False}),
    ("gradient_kernel", {"IS_BESIDE": True, "IS_INTERPRETED": False, "weight": None, "count": None}),
    ("reduce_kernel", {"IS_MEAN": True, "LANES": 1024}),
]


@pytest.mark.parametrize(
    ("architecture", "number"),
    [(90, "bf16"), *[pytest.param(a, n, marks=pytest.mark.slow) for a in ARCHITECTURES for n in FORMATS]],
)
@pytest.mark.parametrize(("name", "constants"), KERNELS)
def test_cross_entropy_spills_nothing(name, constants, architecture, number):
    registers, spilled = registers_and_spilled(of_cross_entropy(name, architecture, number, **constants))
    assert spilled == 0
    # two blocks of 256 threads fit, at least
    assert registers <= 128


@pytest.mark.parametrize("classes", [1000, 50_257])
def test_whole_tiles_of_logits_are_read_and_written_16_bytes_at_once(classes):
    found = instructions(of_cross_entropy("rows_kernel", classes=classes))
    # 16 logits a thread; the ragged first and last tile go one by one
    assert found["ld.global.v4.b32"] == 2
    found = instructions(of_cross_entropy("gradient_kernel", classes=classes, IS_BESIDE=True, IS_INTERPRETED=False))
    assert (found["ld.global.v4.b32"], found["st.global.v4.b32"]) == (2, 2)
    found = instructions(of_cross_entropy("gradient_kernel", classes=classes, IS_BESIDE=False, IS_INTERPRETED=False))
    assert (found["ld.global.v4.b32"], found["st.global.v4.b32"]) == (2, 0)
    # one instruction rounds two numbers
    assert found["cvt.rn.bf16x2.f32"] > 0


OF_NORMS = {
    **dict.fromkeys(("weight", "bias", "kept", "of_weight", "of_bias"), "*fp32"),
    **dict.fromkeys(("rows", "programs"), "i32"),
    "eps": "fp32",
}


def of_norm(name, architecture=90, number="bf16", width=768, **constants):
    data = torch.empty(1, width, dtype=torch.bfloat16)
    options = {**norms.options_of(data, data), "ALIGNED": True, "IS_INTERPRETED": False}
    kernel = getattr(norms, name)
    types = {**OF_NORMS, **dict.fromkeys(("x", "y", "grad", "of_x"), f"*{number}")}
    given = {key: value for key, value in {**options, **constants}.items() if key in kernel.arg_names}
    of_launch = {key: options[key] for key in ("num_warps", "enable_fp_fusion")}
    return compiled(
        kernel, {key: value for key, value in types.items() if key not in constants}, given, of_launch, architecture
    )


@pytest.mark.parametrize(
    ("architecture", "number", "width"),
    [
        (90, "bf16", 768),
        *[pytest.param(a, n, w, marks=pytest.mark.slow) for a in ARCHITECTURES for n in FORMATS for w in (1600, 8192)],
    ],
)
@pytest.mark.parametrize(
    ("name", "constants"),
    [
        ("normalize_kernel", {"IS_RMS": False}),
        ("normalize_kernel", {"IS_RMS": True, "bias": None}),
        ("gradients_kernel", {"IS_RMS": False}),
        ("gradients_kernel", {"IS_RMS": True, "of_bias": None}),
    ],
)
def test_norms_spill_nothing_and_access_16_bytes_at_once(name, constants, architecture, number, width):
    code = of_norm(name, architecture, number, width, **constants)
    registers, spilled = registers_and_spilled(code)
    assert spilled == 0
    assert registers <= 128
    found = instructions(code)
    assert found["ld.global.v4.b32"] > 0
    assert found["st.global.v4.b32"] > 0
    assert not [key for key in found if key.endswith("global.b16")]
