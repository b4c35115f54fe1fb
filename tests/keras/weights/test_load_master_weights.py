"""FP32 weights come into a model in 16 bits with every bit, from whatever holds them, or not at all."""

import warnings

import keras
import numpy as np
import pytest
from keras import ops

import duotone.keras as dk
from duotone.errors import DuotoneWarning, OptimizerError


def build(policy="fp32", units=5):
    with dk.policy(policy):
        layers = [
            keras.Input((4,)),
            keras.layers.Dense(units, activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Dense(2, name="head"),
        ]
        return keras.Sequential(layers)


def half(policy="bf16", **settings):
    model = build(policy, **settings)
    model.compile(dk.LossScaleOptimizer(dk.Masters(keras.optimizers.Adam(1e-3)), policy), "mse", run_eagerly=True)
    return model


@pytest.fixture
def trained():
    """Return a model in FP32, no weight of which is one of 16 bits."""
    model = build()
    draws = np.random.default_rng(5)
    model.set_weights([draws.uniform(0.1, 1, each.shape).astype(np.float32) for each in model.weights])
    return model


def is_exact(model, trained):
    found = dk.master_weights(model)
    for (path, master), weight, value in zip(found.items(), model.weights, trained.get_weights(), strict=True):
        np.testing.assert_array_equal(master, value, err_msg=path)
        # the weight itself is the nearest
        nearest = ops.convert_to_numpy(ops.cast(ops.cast(value, weight.dtype), "float32"))
        np.testing.assert_array_equal(ops.convert_to_numpy(ops.cast(weight, "float32")), nearest, err_msg=path)


@pytest.mark.parametrize("policy", ["bf16", "fp16"])
@pytest.mark.parametrize(
    "form", ["model", "list", "paths", "paths of Keras", "tensors", "float64", "keras", "h5", "old"]
)
def test_every_form_is_exact(policy, form, trained, tmp_path):
    model = half(policy)
    if form == "keras":
        trained.compile("adam", "mse")
        trained.optimizer.build(trained.trainable_variables)
        trained.save(tmp_path / "trained.keras")
    files = {"h5": "trained.weights.h5", "old": "trained.h5"}
    if form in files:
        trained.save_weights(tmp_path / files[form]) if form == "h5" else trained.save(tmp_path / files[form])
    given = {
        "model": lambda: trained,
        "list": trained.get_weights,
        "paths": lambda: dict(zip(dk.master_weights(model), trained.get_weights(), strict=True)),
        "paths of Keras": lambda: {w.path: v for w, v in zip(model.weights, trained.get_weights(), strict=True)},
        "tensors": lambda: [each.value for each in trained.weights],
        "float64": lambda: tuple(each.astype(np.float64) for each in trained.get_weights()),
        "keras": lambda: tmp_path / "trained.keras",
        "h5": lambda: str(tmp_path / "trained.weights.h5"),
        "old": lambda: tmp_path / "trained.h5",
    }[form]()
    dtypes = [each.dtype for each in model.weights]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        dk.load_master_weights(model, given)
    is_exact(model, trained)
    assert [each.dtype for each in model.weights] == dtypes
    assert sorted(set(dtypes)) == sorted({"bf16": ["bfloat16", "float32"], "fp16": ["float16", "float32"]}[policy])


def test_a_step_goes_on_from_there_as_in_fp32(trained):
    gradients = [np.full(each.shape, 0.5, np.float32) for each in trained.trainable_variables]
    model = half("bf16")
    dk.load_master_weights(model, trained)
    expected = keras.optimizers.Adam(1e-3)
    model.optimizer.apply([ops.convert_to_tensor(each) for each in gradients], model.trainable_variables)
    expected.apply([ops.convert_to_tensor(each) for each in gradients], trained.trainable_variables)
    is_exact(model, trained)


def test_masters_of_another_model_and_moments_that_stay(trained):
    one, other = half("bf16"), half("fp16")
    dk.load_master_weights(one, trained)
    other.optimizer.build(other.trainable_variables)
    moment = other.optimizer.inner_optimizer.inner_optimizer.variables[-1]
    moment.assign(ops.ones(moment.shape))
    dk.load_master_weights(other, one)
    is_exact(other, trained)
    assert bool(ops.all(moment == 1))


def test_an_optimizer_of_a_loop_of_ones_own(trained):
    model, optimizer = build("bf16"), dk.Masters(keras.optimizers.SGD(0.1))
    with pytest.raises(OptimizerError, match=r"or in a loop of your own give that optimizer: load_master_weights\("):
        dk.load_master_weights(model, trained)
    dk.load_master_weights(model, trained, optimizer=optimizer)
    found = dk.master_weights(model, optimizer=optimizer)
    assert all((mine == given).all() for mine, given in zip(found.values(), trained.get_weights(), strict=True))


def test_a_frozen_weight_is_rounded(trained):
    model = half("bf16")
    model.layers[0].trainable = False
    dk.load_master_weights(model, trained)
    kernel, exact = dk.master_weights(model), trained.get_weights()
    path = next(iter(kernel))
    assert 0 < np.abs(kernel[path] - exact[0]).max() <= 2.0**-9
    np.testing.assert_array_equal(kernel["head/kernel"], exact[-2])


def bits(model):
    values = [*model.weights, *model.optimizer.variables]
    return [ops.convert_to_numpy(ops.cast(each, "float32")).tobytes() for each in values]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda given: given.pop("head/bias"), 'the weight "head/bias" is missing; give all of them'),
        (
            lambda given: given.update(heat=given.pop("head/bias")),
            r'"head/bias" is missing \(known: heat\); give',
        ),
        (lambda given: given.update({"heat/bias": 0.0}), 'the model has no weight "heat/bias"; did you mean head/bias'),
        (
            lambda given: given.update({"head/bias": np.ones(3)}),
            r'"head/bias" has shape \(2,\), but what is given.* \(3,\)',
        ),
        (lambda given: given.update({"head/bias": np.array(["a", "b"])}), 'for the weight "head/bias" is <U1'),
        (
            lambda given: given.update({"head/bias": np.float32([7e4, 0])}),
            "would be 70000, beyond FP16's largest 65504",
        ),
    ],
)
def test_what_does_not_fit_is_said_and_nothing_is_written(change, said, trained):
    model = half("fp16")
    model.optimizer.build(model.trainable_variables)
    given = dict(zip(dk.master_weights(model), trained.get_weights(), strict=True))
    change(given)
    before = bits(model)
    with pytest.raises(OptimizerError, match=said):
        dk.load_master_weights(model, given)
    assert bits(model) == before


def test_what_holds_no_weights_of_the_model(trained, tmp_path):
    model = half()
    model.optimizer.build(model.trainable_variables)
    before, dtypes = bits(model), [each.dtype for each in model.weights]
    with pytest.raises(OptimizerError, match="got 7 weights, but the model has 8"):
        dk.load_master_weights(model, trained.get_weights()[1:])
    with pytest.raises(OptimizerError, match="takes arrays by path, a list of arrays, a model or the path of a file"):
        dk.load_master_weights(model, 3)
    build(units=6).save_weights(tmp_path / "wider.weights.h5")
    with pytest.raises(OptimizerError, match=r"wider.weights.h5 does not hold the weights of this model \("):
        dk.load_master_weights(model, tmp_path / "wider.weights.h5")
    (tmp_path / "no.keras").write_text("no")
    with pytest.raises(OptimizerError, match=r"no.keras does not hold the weights of this model \("):
        dk.load_master_weights(model, tmp_path / "no.keras")
    with pytest.raises(FileNotFoundError):
        dk.load_master_weights(model, tmp_path / "nothing.weights.h5")
    unbuilt = keras.Sequential([keras.layers.Dense(2)])
    unbuilt.compile(dk.Masters("sgd"), "mse")
    with pytest.raises(OptimizerError, match="is not built, so it has no weights to write to"):
        dk.load_master_weights(unbuilt, trained)
    assert (bits(model), [each.dtype for each in model.weights]) == (before, dtypes)


def test_a_file_of_16_bits_says_that_it_has_no_more(tmp_path):
    half().save_weights(tmp_path / "half.weights.h5")
    with pytest.warns(DuotoneWarning, match="half.weights.h5 is one of 16 bits already"):
        dk.load_master_weights(half(), tmp_path / "half.weights.h5")
