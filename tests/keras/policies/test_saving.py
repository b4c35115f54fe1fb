"""Models made under a policy are saved, copied and loaded as Keras' own, by programs that have no Duotone."""

import json
import zipfile

import keras
import numpy as np
import pytest
from keras import layers, ops
from tests.keras.policies.models import INPUTS, Block, attention, functional, layers_inside, names, sequential

import duotone.keras as dk


def dtypes(layer) -> tuple[str, str]:
    return type(layer).__name__, layer.dtype_policy.name


TEXT = "bf16; head: float32"


@pytest.mark.parametrize("make", [sequential, functional])
def test_a_saved_model_does_not_need_duotone(tmp_path, make):
    with dk.policy(TEXT):
        model = make()
    path = str(tmp_path / "model.keras")
    model.save(path)
    assert "duotone" not in zipfile.ZipFile(path).read("config.json").decode()
    loaded = keras.models.load_model(path)
    assert names(loaded) == names(model)
    assert np.array_equal(*(ops.convert_to_numpy(ops.cast(each(INPUTS), "float32")) for each in (model, loaded)))


@pytest.mark.parametrize("make", [sequential, functional, attention])
def test_copies_have_the_same_policies_under_another_global_policy(make):
    with dk.policy(TEXT):
        model = make()
    keras.config.set_dtype_policy("mixed_float16")
    for copy in (keras.models.clone_model(model), type(model).from_config(model.get_config())):
        assert sorted(map(dtypes, layers_inside(copy))) == sorted(map(dtypes, layers_inside(model)))
    assert "duotone" not in json.dumps(model.get_config(), default=str)


def test_rules_for_layers_inside_one_of_keras_are_kept_by_a_map_of_keras():
    with dk.policy("bf16; attention.query: float32; *.lstm_cell: float32"):
        model = attention()
    config = json.dumps(model.get_config(), default=str)
    assert "DTypePolicyMap" in config
    assert "duotone" not in config
    copy = keras.Model.from_config(model.get_config())
    assert copy.get_layer("attention").dtype_policy.default_policy.name == "bfloat16"
    assert names(copy)["attention/query"] == "map_bfloat16"
    assert [keras.backend.standardize_dtype(each.dtype) for each in copy.get_layer("attention").weights] == [
        keras.backend.standardize_dtype(each.dtype) for each in model.get_layer("attention").weights
    ]
    assert len({variable.dtype for variable in copy.get_layer("attention").weights}) == 2


def test_a_layer_that_is_not_built_keeps_the_whole_policy_in_its_configuration():
    with dk.policy("bf16; type=Dense: bf16-mixed"):
        block = layers.Dense(4)
        copy = layers.Dense.from_config(block.get_config())
        assert copy.dtype_policy is block.dtype_policy
        copy(INPUTS)
    assert copy.dtype_policy == keras.DTypePolicy("mixed_bfloat16")
    later = layers.Dense.from_config(block.get_config())
    later(INPUTS)
    assert later.dtype_policy == copy.dtype_policy


def test_a_policy_is_copied_and_compared_by_its_text():
    import copy
    import pickle

    made = dk.policy("fp16; head: float32")
    assert made == dk.policy(str(made)) == copy.deepcopy(made) == pickle.loads(pickle.dumps(made))
    assert made != dk.policy("fp16")
    assert len({made, dk.policy(str(made))}) == 1
    assert dk.policy(made) is made
    assert eval(repr(made), {"policy": dk.policy}) == made


def test_layers_without_duotone_hold_no_reference_to_it():
    with dk.policy("bf16"):
        block = Block()
        block(INPUTS)
    assert type(block.dtype_policy) is type(block.norm.dtype_policy) is keras.DTypePolicy
