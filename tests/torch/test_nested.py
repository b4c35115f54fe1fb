"""Tensors are found wherever a model may put them, and what holds none is handed back itself."""

from collections import OrderedDict, defaultdict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch

from duotone.torch.nested import cast_floating, map_tensors, tensors_in

ONE = torch.ones(2)


class Pair(NamedTuple):
    first: Any
    second: Any


@dataclass(frozen=True)
class Output:
    logits: Any
    note: str = "kept"


@dataclass
class Derived:
    logits: torch.Tensor
    norm: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.norm = self.logits.norm()


def test_every_kind_of_container_keeps_its_type():
    value = [ONE, (ONE, 3), Pair(ONE, None), {"a": {1: ONE}}, Output(ONE)]
    got = map_tensors(torch.neg, value)
    assert isinstance(got, list)
    assert isinstance(got[1], tuple)
    assert isinstance(got[2], Pair)
    assert isinstance(got[4], Output)
    assert (got[1][1], got[2].second, got[4].note) == (3, None, "kept")
    for tensor in (got[0], got[1][0], got[2].first, got[3]["a"][1], got[4].logits):
        assert torch.equal(tensor, -ONE)
    # what was given is not changed
    assert all(torch.equal(tensor, ONE) for tensor in (value[0], value[2].first, value[3]["a"][1]))


def test_subclasses_of_dict_keep_what_they_carry():
    counts: defaultdict[str, Any] = defaultdict(list, x=ONE)
    got = map_tensors(torch.neg, counts)
    assert isinstance(got, defaultdict)
    assert got["missing"] == []
    got = map_tensors(torch.neg, OrderedDict(y=2, x=ONE))
    assert isinstance(got, OrderedDict)
    assert list(got) == ["y", "x"]
    assert torch.equal(got["x"], -ONE)


def test_what_a_dataclass_derives_is_derived_anew():
    got = map_tensors(lambda tensor: tensor * 2, Derived(ONE))
    assert torch.equal(got.norm, (ONE * 2).norm())


@pytest.mark.parametrize(
    "value", [None, "text", 3, Output, (), {}, [1, (2, None)], Output("no tensor"), {"a": torch.tensor([1])}]
)
def test_what_needs_no_change_is_returned_itself(value):
    assert cast_floating(value, torch.bfloat16) is value


@pytest.mark.parametrize("to", [torch.float32, torch.bfloat16, torch.float16])
def test_only_floating_point_of_at_most_32_bits_is_cast(to):
    kept = (torch.float64, torch.int64, torch.int8, torch.bool, torch.complex64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, *kept):
        tensor = torch.ones(2).to(dtype)
        got = cast_floating([tensor], to)[0]
        assert got.dtype == (dtype if dtype in kept else to)
        assert got is tensor or dtype != to


def test_a_tensor_that_occurs_twice_is_cast_once():
    x = torch.ones(1)
    one, other = cast_floating({"a": x, "b": [x]}, torch.bfloat16).values()
    assert one is other[0]


@dataclass
class Computed:
    """Fields that its constructor makes, and a dict besides, as the transformers library returns them."""

    x: torch.Tensor
    count: int = field(init=False, default=0)


class Locked(OrderedDict):
    """A dict that refuses to be updated."""

    def update(self, *_: object) -> None:
        raise TypeError("cannot be updated")


def test_what_a_constructor_made_is_kept():
    value = Computed(torch.ones(1))
    value.count = 7
    got = cast_floating(value, torch.bfloat16)
    assert (got.x.dtype, got.count, value.x.dtype) == (torch.bfloat16, 7, torch.float32)


def test_a_dict_that_refuses_updates_is_filled_all_the_same():
    got = cast_floating(Locked(x=torch.ones(1)), torch.bfloat16)
    assert type(got) is Locked
    assert got["x"].dtype == torch.bfloat16


@dataclass(slots=True)
class Slotted:
    x: torch.Tensor


@dataclass
class ModelOutput(OrderedDict):
    """A dataclass that is a dict as well, as the transformers library returns it."""

    x: Any = None
    y: Any = None

    def __post_init__(self) -> None:
        self["x"] = self.x


FORMS = {
    "dict": lambda x: {"x": x, "again": x},
    "OrderedDict": lambda x: OrderedDict(x=x, count=3),
    "tuple": lambda x: (x, (x, 2)),
    "list": lambda x: [x, [x + 1]],
    "named tuple": lambda x: Pair(x, None),
    "frozen dataclass": Output,
    "slotted dataclass": Slotted,
    "derived field": Derived,
    "model output": ModelOutput,
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_form_of_result_compiles_whole(form):
    def run(x: torch.Tensor) -> Any:
        return cast_floating(form(x), torch.bfloat16)

    torch.compiler.reset()
    got, expected = torch.compile(run, backend="eager", fullgraph=True)(ONE), run(ONE)
    assert type(got) is type(expected)
    assert repr(got) == repr(expected)
    assert [tensor.dtype for tensor in tensors_in(got)] == [torch.bfloat16] * len(tensors_in(expected))
