"""What a cast model takes and returns, of every kind, leaves the compiled graph whole (torch 2.11 to 2.14)."""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import duotone.torch as dt
from duotone.torch.nested import map_tensors


class Pair(NamedTuple):
    first: Any
    second: Any


@dataclass
class Plain:
    x: Any
    note: Any = None


@dataclass
class ModelOutput(OrderedDict):
    """A dataclass that is a dict besides, as the transformers library's models return them."""

    x: Any = None
    note: Any = None

    def __post_init__(self) -> None:
        for name in ("x", "note"):
            if getattr(self, name) is not None:
                super().__setitem__(name, getattr(self, name))


KINDS = {
    "tensor": lambda x: x,
    "dict": lambda x: {"x": x, "count": 3},
    "nested": lambda x: {"x": [x, (x + 1, None)]},
    "tuple": lambda x: (x, None),
    "list": lambda x: [x],
    "named tuple": lambda x: Pair(x, "text"),
    "dataclass": Plain,
    "model output": lambda x: ModelOutput(x=x),
    "twice": lambda x: (x, [x]),
    "nothing to cast": lambda x: {"where": x > 0},
}


class Model(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.kind = kind

    def forward(self, x: Tensor, given: Any = None) -> Any:
        return KINDS[self.kind](self.linear(x if given is None else x + given["pair"][0]))


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_given", [False, True])
def test_a_model_compiles_whole_and_returns_the_same(kind, is_given):
    torch.manual_seed(0)
    model = dt.cast(Model(kind), "bf16")
    x = torch.ones(2, 4)
    given = {"pair": (x, Pair(x, 1))} if is_given else None
    expected = model(x, given)
    got = torch.compile(model, backend="eager", fullgraph=True)(x, given)
    assert type(got) is type(expected)
    assert repr(got) == repr(expected)
    if isinstance(expected, dict):
        assert dict(got).keys() == dict(expected).keys()
    dtypes: list[torch.dtype] = []
    map_tensors(lambda tensor: dtypes.append(tensor.dtype) or tensor, got)
    assert dtypes
    assert set(dtypes) <= {torch.float32, torch.bool}


def test_a_tensor_that_is_returned_twice_stays_one():
    one, (other,) = torch.compile(dt.cast(Model("twice"), "bf16"), backend="eager", fullgraph=True)(torch.ones(2, 4))
    assert one is other
