"""States that were saved before optimizers declared their slots load, and go on to the same bits."""

import pytest
import torch

import duotone.torch as dt

from .saved_states import CASES, CHECKPOINTS, SAVED, made, read, stepped, tensors_of

pytestmark = pytest.mark.filterwarnings("ignore::duotone.errors.DuotoneWarning")
STATES = read()


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    """Compare names, dtypes, shapes and bits."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        assert found[name].flatten().view(torch.uint8).equal(value.flatten().view(torch.uint8)), name
    return True


def held(state_dict: dict) -> dict[str, torch.Tensor]:
    states = state_dict["state"].items()
    return {f"{index}.{name}": value for index, state in states for name, value in state.items() if value is not None}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("case", CASES)
def test_a_state_dict_of_before_goes_on(case, backend):
    model, optimizer = made(case)
    optimizer.backend = backend
    model.load_state_dict(STATES[case]["weights"])
    optimizer.load_state_dict(STATES[case]["optimizer"])
    own, saved = optimizer.state_dict(), STATES[case]["optimizer"]
    assert same(held(own), held(saved))
    assert {name: value for name, value in own.items() if name != "state"} == {
        name: value for name, value in saved.items() if name != "state"
    }
    stepped(model, optimizer, range(3, 6))
    assert same(tensors_of(model, optimizer), STATES[case]["three steps later"])


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_checkpoint_of_before_goes_on(case):
    model, optimizer = made(case)
    dt.load_checkpoint(SAVED / case, model, optimizer)
    assert same(held(optimizer.state_dict()), held(STATES[case]["optimizer"]))
    stepped(model, optimizer, range(3, 6))
    assert same(tensors_of(model, optimizer), STATES[case]["three steps later"])


@pytest.mark.parametrize("case", CASES)
def test_a_run_from_the_beginning_has_the_bits_of_before(case):
    model, optimizer = made(case)
    stepped(model, optimizer, range(6))
    assert same(tensors_of(model, optimizer), STATES[case]["three steps later"])
