"""Which modules `checkpoint_activations` takes, and what it says to patterns that take none."""

import pytest
import torch
from torch import nn

from duotone.errors import PolicyError
from duotone.torch.casting.activation_checkpointing import (
    CheckpointedForward,
    checkpoint_activations,
    checkpointed_forward_of,
)


class Block(nn.Module):
    """Two parts."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(1)])
        self.mix = nn.Linear(1, 1)
        self.mlp = nn.Sequential(nn.Linear(1, 1), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the parts make of it."""
        return self.mlp(self.mix(self.norms[0](x)))


class Model(nn.Module):
    """Blocks between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(1, 1)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(1, 1)


def checkpointed(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if checkpointed_forward_of(module) is not None]


def test_the_outermost_match_wins():
    model = Model()
    checkpoint_activations(model, "*.mlp", "blocks.*", "head")
    assert checkpointed(model) == ["blocks.0", "blocks.1", "head"]
    # a later choice stands in place of an earlier one
    checkpoint_activations(model, "blocks.1.mlp*", "blocks.0.m*")
    assert checkpointed(model) == ["blocks.0.mix", "blocks.0.mlp", "blocks.1.mlp"]
    checkpoint_activations(model)
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_list_leaves_it_to_the_modules_inside():
    assert checkpointed(checkpoint_activations(Model(), "*")) == ["embed", "blocks.0", "blocks.1", "head"]


def test_a_shared_module_has_several_names():
    shared = nn.Linear(1, 1)
    model = checkpoint_activations(nn.Sequential(shared, nn.Sequential(shared)), "1.0")
    assert checkpointed(model) == ["0"]
    assert not isinstance(model[0].forward.inner, CheckpointedForward)


def test_a_forward_that_the_user_had_set_comes_back():
    model = nn.Sequential(nn.Linear(1, 1))
    model[0].forward = own = lambda x: x * 2
    assert checkpoint_activations(model, "0")(torch.ones(1)) == 2
    assert checkpoint_activations(model)[0].forward is own


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (
            ["head", "block.*"],
            'pattern "block.*" matches no module inside this Model, whose modules are embed, blocks, blocks.0, '
            "blocks.0.norms, blocks.0.norms.0, ...; correct it",
        ),
        (
            ["blocks"],
            'pattern "blocks" matches "blocks", a ModuleList, which has no forward to run again; write "blocks.*" for '
            "the modules inside it",
        ),
        ([""], 'pattern "" matches no module inside this Model'),
        ([["blocks.*"]], "a pattern is a text such as \"blocks.*\", not ['blocks.*']; give several one by one"),
        ([], 'offload=True is for checkpointed modules; give their paths too, such as "blocks.*"'),
    ],
)
def test_a_choice_that_cannot_be_leaves_the_model_as_it_was(patterns, message):
    model = checkpoint_activations(Model(), "head")
    with pytest.raises(PolicyError) as caught:
        checkpoint_activations(model, *patterns, offload=True)
    assert str(caught.value).startswith(message)
    assert checkpointed(model) == ["head"]
