"""One watched forward pass: what ran, in which dtype, which casts came of whom, and where."""

import inspect
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import duotone.torch as dt
from duotone.errors import DuotoneError
from duotone.torch.explanation import Explanation, explain
from duotone.torch.explanation.records import OUTSIDE
from duotone.wording.records import Cast

HERE = Path(__file__).name


def line_of(function, text: str) -> int:
    lines, first = inspect.getsourcelines(function)
    return first + next(number for number, line in enumerate(lines) if text in line)


def calls(found: Explanation, name: str) -> dict[str, int]:
    return {each.compute_dtype: each.calls for each in found.operations if each.name == name}


def only_cast(found: Explanation, **fields: str) -> Cast:
    fitting = [each for each in found.casts if all(getattr(each, key) == value for key, value in fields.items())]
    assert len(fitting) == 1, found.casts
    return fitting[0]


class Upcasting(nn.Module):
    """Casts by itself, once, and puts a linear layer behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.last = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y = (y.float() * 2).to(y.dtype)
        return self.last(y)


@pytest.mark.parametrize("policy", ["bf16", "fp16", "bf16-mixed"])
def test_a_models_own_cast_is_told_from_an_inserted_one(policy):
    narrow = "float16" if policy == "fp16" else "bfloat16"
    model = dt.cast(Upcasting(), policy)
    found = explain(model, torch.ones(4, 8))
    assert found.policy == policy
    place = f"{HERE}:{line_of(Upcasting.forward, 'float()')}"
    upcast = only_cast(found, by="model", to_dtype="float32")
    assert (upcast.from_dtype, upcast.calls, upcast.result_bytes) == (narrow, 1, 4 * 8 * 4)
    assert (upcast.operation, upcast.module) == ("float", "")
    assert upcast.source_line is not None
    assert upcast.source_line.endswith(place)
    downcast = only_cast(found, by="model", to_dtype=narrow)
    assert (downcast.operation, downcast.result_bytes) == ("to", 4 * 8 * 2)
    # the result leaves in FP32, by the policy
    leaving = [each for each in found.casts if each.by == "duotone" and each.operation is None]
    assert ("float32", "", 4 * 8 * 4) in [(each.to_dtype, each.module, each.result_bytes) for each in leaving]
    assert {each.by for each in found.casts} == {"model", "duotone"}


def test_with_float32_weights_every_operand_is_cast_where_it_is_needed():
    model = dt.cast(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), "bf16-mixed")
    found = explain(model, torch.ones(4, 8))
    for path in ("0", "1"):
        inserted = [
            each for each in found.casts if (each.module, each.by, each.operation) == (path, "duotone", "linear")
        ]
        weight_and_bias = 8 * 8 * 2 + 8 * 2
        assert sum(each.result_bytes for each in inserted) == weight_and_bias + (4 * 8 * 2 if path == "0" else 0)


def test_autocast_around_an_uncast_model():
    with torch.autocast("cpu", torch.bfloat16):
        found = explain(nn.Linear(8, 8), torch.ones(4, 8))
    assert found.policy is None
    assert {each.by for each in found.casts} == {"autocast"}
    assert calls(found, "linear") == {"bfloat16": 1}
    assert "torch.autocast made 3 casts" in found.findings[0]


def test_a_cast_inside_of_an_operation_is_torchs():
    found = explain(nn.Softmax(-1), run=lambda: torch.softmax(torch.ones(4, dtype=torch.bfloat16), -1, torch.float32))
    assert [(each.by, each.operation, each.module) for each in found.casts] == [("torch", "softmax", OUTSIDE)]


def test_operations_have_the_names_that_users_write():
    w = torch.ones(4, 4, requires_grad=True)

    def run() -> Tensor:
        x = torch.ones(2, 4)
        x = 1 + F.layer_norm(x @ w, (4,)) - x
        x += 1
        return F.cross_entropy(F.linear(x, w)[:, 0].view(2, 1).expand(2, 4).contiguous(), torch.tensor([0, 1]))

    found = explain(nn.Identity(), run=run)
    names = {each.name: each.calls for each in found.operations}
    assert names == {
        "add": 2, "sub": 1, "matmul": 1, "layer_norm": 1, "linear": 1, "contiguous": 1, "cross_entropy": 1
    }  # fmt: skip


def test_mixed_operands_are_noted_with_the_dtype_they_are_widened_to():
    x = torch.ones(4, dtype=torch.bfloat16)
    found = explain(nn.Identity(), run=lambda: (x + torch.ones(4), x + x, x * torch.tensor(2.0)))
    noted = {(each.name, each.compute_dtype, each.output_dtype, each.mixed) for each in found.operations}
    assert noted == {
        ("add", "float32", "float32", True),
        ("add", "bfloat16", "bfloat16", False),
        # a number beside a tensor widens nothing
        ("mul", "bfloat16", "bfloat16", False),
    }


class Shared(nn.Module):
    """One layer in two places, called three times; a tied weight; named inputs and a nested output."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 8)
        self.one = nn.Linear(8, 8)
        self.parts = nn.ModuleDict({"again": self.one, "unused": nn.Linear(2, 2)})
        self.head = nn.Linear(8, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor, *, scale: dict[str, Tensor]) -> dict[str, object]:
        x = self.one(self.one(self.embed(tokens)))
        x = self.parts["again"](x) * scale["by"]
        return {"logits": self.head(x), "hidden": (x,)}


def test_shared_modules_named_inputs_and_nested_outputs():
    model = dt.cast(Shared(), "bf16")
    found = explain(model, torch.tensor([[1, 2]]), scale={"by": torch.tensor(1.0)})
    modules = {each.path: each for each in found.modules}
    assert modules["one"].calls == 3
    assert modules["parts.unused"].calls == modules["parts"].calls == 0
    assert "parts.again" not in modules
    assert modules["one"].parameter_dtypes == ("bfloat16",)
    assert modules[""].input_dtypes == ("int64", "float32")
    assert modules[""].output_dtypes == ("float32",)
    assert {each.shape for each in found.outputs} == {(1, 2, 5), (1, 2, 8)}
    assert {each.computed_dtype for each in found.outputs} == {"bfloat16"}
    # the tied weight, as the head's, and the linear layer's
    assert found.saved_for_backward.parameter_bytes["bfloat16"] == 2 * (5 * 8 + 8 * 8)


def test_saved_bytes_belong_to_the_innermost_module():
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Tanh()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).exp()

    model, x = Outer(), torch.ones(16, requires_grad=True)
    found = explain(model, run=lambda: model(x).sin())
    saved = {each.path: each.saved_bytes for each in found.modules}
    assert saved == {"": {"float32": 64}, "inner": {"float32": 64}}
    # sin saves what exp has saved already
    assert found.saved_for_backward.outside_bytes == {}
    assert found.saved_for_backward.activation_bytes == {"float32": 128}


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_part_keeps_its_input_alone(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.part, x * 1, use_reentrant=reentrant)  # type: ignore[return-value]

    model, x = Checkpointed(), torch.ones(4, 8, requires_grad=True)
    found = explain(model, x)
    assert found.saved_for_backward.activation_bytes == {"float32": 4 * 8 * 4}
    assert {each.path: each.calls for each in found.modules}["part.1"] == 1
    assert calls(found, "linear") == {"float32": 2}


def test_recomputation_in_a_backward_pass_inside_run_counts_nothing():
    part = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    x = torch.ones(4, 8, requires_grad=True)

    def loss() -> Tensor:
        return checkpoint(part, x, use_reentrant=False).sum()

    forward, both = explain(part, run=loss), explain(part, run=lambda: torch.autograd.grad(loss(), x))
    assert {each.name: each.calls for each in forward.operations} == {"linear": 1, "tanh": 1, "sum": 1}
    assert both.operations == forward.operations
    assert both.saved_for_backward.activation_bytes == forward.saved_for_backward.activation_bytes
    assert both.modules == forward.modules


def test_compiled_models_are_explained_as_written():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    plain = explain(model, torch.ones(4, 8))

    def refuse(graph, inputs):
        raise AssertionError("compiled")

    for compiled in (torch.compile(model, backend=refuse), nn.Sequential(torch.compile(model[0], backend=refuse))):
        found = explain(compiled, torch.ones(4, 8))
        assert (found.compiled, plain.compiled) == (True, False)
        assert "as written" in str(found)
        assert [each.path for each in found.modules][:2] == ["", "0"]
        assert calls(found, "linear") == {"float32": 1}
    assert explain(torch.compile(model, backend=refuse), torch.ones(4, 8)).modules == plain.modules


def test_no_attention_layer_is_one_opaque_operation():
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.ones(1, 3, 8)
    found = explain(layer, x, x, x)
    assert "multi_head_attention_forward" not in {each.name for each in found.operations}
    assert {"addmm", "softmax"} & {each.name for each in found.operations}


def test_a_cast_in_a_custom_function_is_placed():
    class Narrow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.to(torch.bfloat16)

        @staticmethod
        def backward(ctx, grad):
            return grad.float()

    found = explain(nn.Identity(), run=lambda: Narrow.apply(torch.ones(4, requires_grad=True)))
    cast = only_cast(found, by="model")
    assert cast.source_line is not None
    assert cast.source_line.endswith(f"{HERE}:{line_of(Narrow.forward, 'x.to')}")


def test_copies_into_another_dtype_are_casts_and_other_copies_are_not():
    def run() -> None:
        x = torch.zeros(4, dtype=torch.float16)
        x.copy_(torch.ones(4))
        x[:2] = torch.ones(2)
        x.clone().to("cpu", torch.float16, copy=True)
        torch.ones(4, dtype=torch.int64).float().long()

    found = explain(nn.Identity(), run=run)
    noted = sorted((each.from_dtype, each.to_dtype, each.calls, each.result_bytes) for each in found.casts)
    assert noted == [("float32", "float16", 1, 4), ("float32", "float16", 1, 8)]


def test_json_holds_every_field():
    found = explain(dt.cast(Upcasting(), "bf16"), torch.ones(4, 8))
    content = json.loads(found.to_json())
    assert set(content) == set(Explanation.__dataclass_fields__)
    assert content["modules"][1]["parameter_dtypes"] == ["bfloat16"]
    assert content["casts"][0]["result_bytes"] == found.casts[0].result_bytes
    assert content["saved_for_backward"]["activation_bytes"] == found.saved_for_backward.activation_bytes


def test_text_names_everything():
    text = str(explain(dt.cast(Upcasting(), "bf16"), torch.ones(4, 8)))
    for part in ("Upcasting under bf16", "first", "linear", "BF16  FP32", "Saved for the backward pass: "):
        assert part in text


@pytest.mark.parametrize(
    ("arguments", "run", "message"),
    [
        ((lambda x: x, torch.ones(2)), None, "got a function to explain; give a torch.nn.Module"),
        ((nn.ReLU(), torch.ones(2)), lambda: 1, "both a batch and run"),
        ((nn.ReLU(),), 3, r"run is a function without arguments, such as lambda: loss_fn\(model\(x\), y\), not 3"),
    ],
)
def test_bad_input_is_named(arguments, run, message):
    with pytest.raises(DuotoneError, match=message):
        explain(*arguments, run=run)
