"""What FSDP gathers at a time, and what the parts of a spread model are."""

import torch
from torch import nn

from duotone.train.spread import Whole, spread, units_of
from duotone.train.tasks.gpt import GPT, Block, GPTConfig


def names_of_units(model: nn.Module) -> list[str]:
    names = {module: name for name, module in model.named_modules()}
    return [names[unit] for unit in units_of(model)]


def test_units_are_what_lies_in_lists_and_sequences():
    model = GPT(GPTConfig(layers=3, heads=2, width=32, context=16))
    assert names_of_units(model) == ["blocks.0", "blocks.1", "blocks.2"]
    assert all(isinstance(unit, Block) for unit in units_of(model))
    nested = nn.Sequential(nn.Embedding(4, 2), nn.Sequential(nn.Linear(2, 2), nn.GELU(), nn.Linear(2, 2)), nn.Flatten())
    assert names_of_units(nested) == ["0", "1.0", "1.2"]
    assert names_of_units(nn.Linear(2, 2)) == []


def test_a_module_that_shares_a_parameter_with_another_is_no_unit():
    model = nn.ModuleDict({"first": nn.Linear(2, 2), "second": nn.Linear(2, 2), "third": nn.Linear(2, 2)})
    model["second"].weight = model["first"].weight
    assert names_of_units(model) == ["third"]
    # tied within itself is no matter
    block = nn.TransformerEncoderLayer(2, 1, 2)
    block.linear2.weight = block.linear1.weight
    assert names_of_units(nn.Sequential(block, nn.Linear(2, 2))) == ["0", "1"]


def test_a_module_that_comes_twice_is_one_unit():
    shared = nn.Linear(2, 2)
    assert names_of_units(nn.Sequential(shared, nn.GELU(), shared)) == ["0"]


def test_the_only_process_has_the_model_as_it_is():
    model = nn.Linear(2, 1)
    whole = spread(model, "whole")
    assert isinstance(whole, Whole)
    assert whole.loss(lambda given, x: (given, x), torch.ones(1), is_last=True)[0] is model
    assert whole.evaluate(lambda given: {"is the model": given is model}) == {"is the model": True}
