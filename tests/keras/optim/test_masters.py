"""`Masters`: training in 16 bits is training in FP32, for every optimizer of Keras, in 12 bytes for each parameter."""

import keras
import numpy as np
import pytest
from keras import ops
from keras import optimizers as ko

import duotone.keras as dk
from duotone.errors import OptimizerError

from .masters_cases import OPTIMIZERS, gradients, model_in, numpy, same
from .stepping import WAYS, step_of

BACKEND = keras.backend.backend()
QUICK = ("sgd-nesterov", "adam-global-clipnorm", "adamw-accumulation", "adamw-average", "nadam", "lion", "muon")


def masters_of(optimizer):
    return [master.read() for master in optimizer.masters]


def quick_and_slow(names):
    """Return names to parametrize by; beyond torch each has many small programs to compile."""
    marks = [pytest.mark.slow] if BACKEND != "torch" else []
    return [name if name in QUICK else pytest.param(name, marks=marks) for name in names]


@pytest.mark.parametrize("name", quick_and_slow(OPTIMIZERS))
def test_masters_move_as_fp32_weights_do_bit_for_bit(name):
    model, twin = model_in("bfloat16"), model_in("float32")
    ours, theirs = dk.Masters(OPTIMIZERS[name]()), OPTIMIZERS[name]()
    for grads in gradients("bfloat16", 6):
        ours.apply(grads, model.trainable_variables)
        theirs.apply([ops.cast(grad, "float32") for grad in grads], twin.trainable_variables)
    same(masters_of(ours), twin.trainable_variables)
    # the optimizer's own state too: moments, accumulators, averages, counts
    same(ours.inner_optimizer.variables, theirs.variables)
    ours.finalize_variable_values(model.trainable_variables)
    theirs.finalize_variable_values(twin.trainable_variables)
    same(masters_of(ours), twin.trainable_variables)


def test_every_optimizer_of_keras_is_among_them():
    kinds = {type(make()) for make in OPTIMIZERS.values()}
    names = {
        name
        for name, kind in vars(ko).items()
        if isinstance(kind, type)
        and issubclass(kind, ko.Optimizer)
        and not any(issubclass(each, kind) for each in kinds)
    }
    assert names == {"LossScaleOptimizer"}


@pytest.mark.parametrize("constraint", ["max_norm", "non_neg"])
def test_constraints_are_of_masters(constraint):
    model, twin = (model_in(dtype, constraint) for dtype in ("bfloat16", "float32"))
    ours, theirs = dk.Masters(ko.SGD(0.1)), ko.SGD(0.1)
    for grads in gradients("bfloat16", 3):
        ours.apply(grads, model.trainable_variables)
        theirs.apply([ops.cast(grad, "float32") for grad in grads], twin.trainable_variables)
    same(masters_of(ours), twin.trainable_variables)


def test_float16_moves_as_fp32_but_for_its_grid_below_2_to_the_minus_16():
    model, twin = model_in("float16"), model_in("float32")
    ours, theirs = dk.Masters(ko.AdamW(1e-3)), ko.AdamW(1e-3)
    for grads in gradients("float16", 6):
        ours.apply(grads, model.trainable_variables)
        theirs.apply([ops.cast(grad, "float32") for grad in grads], twin.trainable_variables)
    for mine, other in zip(numpy(masters_of(ours)), numpy(twin.trainable_variables), strict=True):
        np.testing.assert_allclose(mine, other, rtol=0, atol=2.0**-38)
        large = np.abs(other) > 2.0**-6
        assert large.mean() > 0.5
        np.testing.assert_array_equal(mine[large], other[large])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_it_is_one_training_however_a_step_is_run(way, dtype):
    model, other = model_in(dtype), model_in(dtype)
    ours, theirs = dk.Masters(ko.SGD(2.0**-7, momentum=0.5)), dk.Masters(ko.SGD(2.0**-7, momentum=0.5))
    step = step_of(ours, model.trainable_variables, way)
    for grads in gradients(dtype, 4):
        step(grads)
        theirs.apply(grads, other.trainable_variables)
    # compilers contract multiplications and additions
    for mine, expected in zip(numpy(masters_of(ours)), numpy(masters_of(theirs)), strict=True):
        np.testing.assert_allclose(mine, expected, rtol=2e-6, atol=1e-7)
    assert int(ours.iterations) == 4
    assert any(ops.convert_to_numpy(master.tail).any() for master in ours.masters)


def test_adamw_keeps_12_bytes_for_each_parameter_and_few_for_each_variable():
    layer = keras.layers.Dense(256, dtype="bfloat16")
    layer.build((None, 256))
    optimizer = dk.Masters(ko.AdamW(1e-3))
    optimizer.build(layer.trainable_variables)
    sizes = {"bfloat16": 2, "int16": 2, "float32": 4, "int32": 4, "int64": 8}
    held = [*layer.trainable_variables, *optimizer.variables]
    total = sum(int(np.prod(tuple(each.shape))) * sizes[keras.backend.standardize_dtype(each.dtype)] for each in held)
    parameters = 256 * 256 + 256
    # the count of steps, the learning rate and two checksums
    assert 0 < total - 12 * parameters <= 8 + 4 + 2 * 4


def test_the_pure_bfloat16_policy_moves_as_fp32_does():
    def moved(optimizer, dtype):
        model = model_in(dtype)
        variables = model.trainable_variables
        before = numpy(variables)
        for _ in range(40):
            optimizer.apply([ops.ones(variable.shape, dtype) for variable in variables], variables)
        after = masters_of(optimizer) if isinstance(optimizer, dk.Masters) else variables
        return np.concatenate([(new - old).ravel() for new, old in zip(numpy(after), before, strict=True)])

    assert (moved(ko.SGD(1e-4), "bfloat16") == 0).mean() > 0.9
    same([moved(dk.Masters(ko.SGD(1e-4)), "bfloat16")], [moved(ko.SGD(1e-4), "float32")])


def test_variables_in_fp32_pass_as_they_are():
    layers = [keras.layers.Dense(3, dtype="bfloat16", name="half"), keras.layers.Dense(2, name="whole")]
    model = keras.Sequential([keras.Input((3,)), *layers])
    optimizer = dk.Masters(ko.SGD(0.1))
    optimizer.build(model.trainable_variables)
    assert [master.path.split("/")[-2] for master in optimizer.masters] == ["half", "half"]
    before = numpy(model.trainable_variables)
    optimizer.apply([ops.ones(variable.shape) for variable in model.trainable_variables])
    same([model.trainable_variables[2]], [before[2] - np.float32(0.1)])


def test_a_gradient_of_none_leaves_its_master_and_nothing_else_as_it_was():
    model = model_in("bfloat16")
    optimizer = dk.Masters(ko.SGD(2.0**-12))
    optimizer.build(model.trainable_variables)
    before = numpy(masters_of(optimizer))
    with pytest.warns(UserWarning, match="first/bias"):
        optimizer.apply(
            [None if v.path.endswith("first/bias") else ops.ones(v.shape) for v in model.trainable_variables]
        )
    after = numpy(masters_of(optimizer))
    same([after[1]], [before[1]])
    same(after[2:], [values - np.float32(2.0**-12) for values in before[2:]])


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        (lambda: ko.LossScaleOptimizer(ko.SGD(0.1)), "the loss scale goes around"),
        (lambda: dk.Masters(ko.SGD(0.1)), "has nothing to add"),
        (lambda: 0.1, "goes around a Keras optimizer, not 0.1"),
    ],
)
def test_what_masters_cannot_go_around_is_refused(inner, message):
    with pytest.raises(OptimizerError, match=message):
        dk.Masters(inner())


def test_an_inner_optimizer_that_is_built_is_refused():
    model, inner = model_in("bfloat16"), ko.SGD(0.1)
    inner.build(model.trainable_variables)
    with pytest.raises(OptimizerError, match="has been built already"):
        dk.Masters(inner).build(model.trainable_variables)
    with pytest.raises(OptimizerError, match="knows no variables yet"):
        dk.Masters("sgd").apply([ops.ones(1)])


def test_keras_own_loss_scale_does_not_go_around():
    keras.config.set_dtype_policy("mixed_float16")
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    with pytest.raises(
        OptimizerError, match=r"Keras' own LossScaleOptimizer does not go around Masters.*Masters\(SGD\("
    ):
        model.compile(dk.Masters("sgd"), "mse")
    model.compile(dk.Masters("sgd"), "mse", auto_scale_loss=False)
    assert type(model.optimizer) is dk.Masters
    model.compile(dk.LossScaleOptimizer(dk.Masters("sgd")), "mse")
    optimizer = dk.Masters(ko.SGD(loss_scale_factor=8.0))
    assert optimizer.loss_scale_factor == 8.0
    optimizer.loss_scale_factor = None
    assert optimizer.inner_optimizer.loss_scale_factor is None
