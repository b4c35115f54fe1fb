"""`save_pretrained` of a cast model says once that it loses masters, and only where it does."""

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import duotone.torch as dt
from duotone.errors import DuotoneWarning

MESSAGE = r"save_pretrained writes the weights of this Pretrained rounded to (bfloat16|float16), without their FP32 "
THIRD = 1 / 3
pytestmark = pytest.mark.filterwarnings("ignore:this CPU has no FP16")


class Pretrained(nn.Module):
    """Saves as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        self.head = nn.Linear(4, 2, bias=False)
        nn.init.constant_(self.head.weight, THIRD)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))

    def save_pretrained(self, state_dict: Any = None, **kwargs: Any) -> Any:
        if state_dict is None:
            state_dict = self._gather()
        return state_dict

    def _gather(self) -> Any:
        return self.state_dict()


class Peft(nn.Module):
    """Is around a model that was cast, and was not cast itself."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def save_pretrained(self, **kwargs: Any) -> Any:
        return self.state_dict() if kwargs.get("state_dict") is None else kwargs["state_dict"]


def said(save: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        save()
    return [str(each.message) for each in caught if "save_pretrained writes" in str(each.message)]


@pytest.mark.parametrize("policy", ["bf16", "fp16"])
def test_it_is_said_once_for_each_model_at_the_line_that_saves(policy: str) -> None:
    model = dt.cast(Pretrained(), policy)
    assert said(model.state_dict) == []
    with pytest.warns(DuotoneWarning, match=MESSAGE) as caught:
        saved = model.save_pretrained()
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert saved["head.weight"].dtype == model.head.weight.dtype
    assert said(model.save_pretrained) == []
    assert len(said(dt.cast(Pretrained(), policy).save_pretrained)) == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_say_it_too(copied: Any) -> None:
    assert len(said(copied(dt.cast(Pretrained(), "bf16")).save_pretrained)) == 1


def test_a_wrapper_and_a_part_are_models() -> None:
    outer = Peft(dt.cast(Pretrained(), "bf16"))
    assert "of this Peft rounded" in said(outer.save_pretrained)[0]
    whole = dt.cast(nn.Sequential(Pretrained(), nn.Linear(2, 2)), "bf16")
    assert len(said(whole[0].save_pretrained)) == 1


@pytest.mark.parametrize("policy", ["bf16-mixed", "bf16-true,rounding=stochastic", "fp32"])
def test_policies_that_lose_nothing_are_silent(policy: str) -> None:
    assert said(dt.cast(Pretrained(), policy).save_pretrained) == []


def test_weights_that_were_16_bit_before_and_frozen_ones_are_silent() -> None:
    assert said(dt.cast(Pretrained().bfloat16(), "bf16").save_pretrained) == []
    assert said(dt.cast(Pretrained().requires_grad_(False), "bf16").save_pretrained) == []


def test_the_ways_out_are_silent(tmp_path: Path) -> None:
    model = dt.cast(Pretrained(), "bf16")

    def save() -> None:
        with dt.full_precision(model):
            assert model.save_pretrained()["head.weight"][0, 0] == torch.tensor(THIRD)
        model.save_pretrained(state_dict=dt.master_weights(model))
        Peft(model).save_pretrained(state_dict=dt.master_weights(model))
        dt.export(model, tmp_path / "model.pt")
        dt.uncast(copy.deepcopy(model)).save_pretrained()

    assert said(save) == []


def test_uncast_takes_the_method_away() -> None:
    model = dt.uncast(dt.cast(Pretrained(), "bf16"))
    assert set(vars(model)) == set(vars(Pretrained()))


class Configured(Pretrained):
    """Has a config that says its dtype, as models of transformers have."""

    @property
    def dtype(self) -> torch.dtype:
        return next(param.dtype for param in self.parameters() if param.is_floating_point())

    def save_pretrained(self, state_dict: Any = None, **kwargs: Any) -> Any:
        self.config = str(self.dtype)
        return super().save_pretrained(state_dict, **kwargs)


@pytest.mark.parametrize("policy", ["bf16", "fp16,loss_scale=1", "bf16-mixed"])
def test_the_config_says_the_dtype_of_the_weights_that_are_given(policy: str) -> None:
    model = dt.cast(Configured(), policy)
    own = str(model.head.weight.dtype)
    for weights, expected in (
        (dt.master_weights(model), "torch.float32"),
        ({**model.state_dict(), **dt.master_weights(model)}, "torch.float32"),
        (dt.export(model), "torch.float32"),
        ({name: value.to(model.head.weight.dtype) for name, value in model.state_dict().items()}, own),
        ({}, own),
        (None, own),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.save_pretrained(state_dict=weights)
        assert model.config == expected
    assert str(model.dtype) == own
    assert next(model.parameters()) is model.body[0].weight
