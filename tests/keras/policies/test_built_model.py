"""A policy for a model that is built: what can change still does, what cannot is refused, and the way back to text."""

import keras
import numpy as np
import pytest
from tests.keras.policies.models import INPUTS, Net, attention, functional, names, sequential

import duotone.keras as dk
from duotone.errors import PolicyError


def dtype_of(value) -> str:
    return keras.backend.standardize_dtype(value.dtype)


def built(make):
    model = make()
    if not model.built:
        model(INPUTS)
    return model


def test_what_a_built_model_computes_in_can_change():
    model = built(functional)
    model.compile("sgd", "mse", run_eagerly=True)
    model.fit(INPUTS, np.zeros((8, 3)), verbose=0)
    dk.policy("bf16-mixed; head: float32").apply(model)
    assert model.train_function is None
    assert names(model)["left"] == names(model)["norm"] == "mixed_bfloat16"
    assert dtype_of(model(INPUTS)) == "float32"
    dk.policy("mixed_float16").apply(model)
    assert dtype_of(model(INPUTS)) == "float16"
    assert {dtype_of(each) for each in model.weights} == {"float32"}


def test_variables_of_a_built_model_keep_their_dtype_and_nothing_changes():
    model = built(sequential)
    before = names(model)
    with pytest.raises(PolicyError, match=r"bfloat16 variables for hidden, whose kernel is float32.*set_weights"):
        dk.policy("bf16").apply(model)
    with pytest.raises(PolicyError, match="did you mean head"):
        dk.policy("bf16-mixed; haed: float32").apply(model)
    assert names(model) == before


@pytest.mark.parametrize("make", [sequential, functional, Net, attention])
@pytest.mark.parametrize("text", ["fp32", "bf16", "fp16-mixed", "bf16; head: float32", "fp32; type=Dense: bf16-mixed"])
def test_the_policy_of_a_model_makes_the_same_model(make, text):
    with dk.policy(text):
        model = built(make)
    found = dk.policy(model)
    assert len(found.policy.rules) <= 3
    with dk.policy(str(found)):
        again = built(make)
    dtypes = [[dtype_of(each) for each in every.weights] for every in (model, again)]
    assert dtypes[0] == dtypes[1]
    assert [layer.compute_dtype for layer in model.layers] == [layer.compute_dtype for layer in again.layers]


@pytest.mark.parametrize("text", ["bf16", "fp16-mixed", "bf16; head: param=float32,compute=float32"])
def test_text_that_is_shortest_comes_back(text):
    with dk.policy(text):
        model = built(sequential)
    assert str(dk.policy(model)) == text


def test_a_model_of_keras_own_policy_says_where_it_is_not_safe():
    keras.config.set_dtype_policy("mixed_bfloat16")
    text = str(dk.policy(built(sequential)))
    assert text == "bf16-mixed; probabilities: param=float32,compute=bfloat16"


def test_dtypes_that_no_policy_says():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, dtype="float64", name="wide")])
    with pytest.raises(PolicyError, match="wide has float64 variables and computes in float64, which no policy says"):
        dk.policy(model)
