"""The scenarios of benchmarks/keras_faults.py: each is one function of a side, Keras as it is or with Duotone.

What a scenario returns was read from variables, histories, files and exceptions; nothing is assumed of either side.
"""

import math
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras_sides import Duotone, Keras

import duotone.keras as dk
from duotone.errors import DuotoneError, DuotoneWarning

# Keras declares no types, and those that are inferred are wrong
ops: Any = keras.ops

BATCH, BATCHES, CLASSES = 16, 4, 3
# the rows of one epoch: four batches
ROWS = np.random.default_rng(0).normal(size=(BATCH * BATCHES, 4)).astype("float32")
LABELS = np.random.default_rng(1).integers(0, CLASSES, BATCH * BATCHES)
# finite in FP32; their products are beyond 65504, the largest FP16 number
TOO_LARGE = ROWS * np.float32(1e6)


@dataclass(frozen=True)
class Found:
    """What a scenario found.

    Attributes:
        text: a cell of the table.
        sound: whether the result is right, or an error or a warning said that it is not.
    """

    text: str
    sound: bool


Scenario = Callable[[Keras], Found]


def network(side: Keras, policy: str, *, softmax: bool = False) -> Any:
    """Return a small classifier under a policy, the same weights every time."""
    keras.utils.set_random_seed(0)
    with side.policy(policy):
        head = keras.layers.Dense(CLASSES, activation="softmax" if softmax else None, name="head")
        hidden = keras.layers.Dense(8, activation="relu", name="hidden")
        return keras.Sequential([keras.Input((4,)), hidden, head], name="net")


def loss_of_logits() -> Any:
    """Return the loss of the classifier."""
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def fit(model: Any, rows: Any = ROWS, epochs: int = 1, callbacks: Any = ()) -> tuple[dict[str, list[float]], str]:
    """Train on whole epochs in their order; return the history, and what Duotone said where it ended the run."""
    try:
        history = model.fit(
            rows,
            LABELS[: len(rows)],
            batch_size=BATCH,
            epochs=epochs,
            shuffle=False,
            verbose=0,
            callbacks=list(callbacks),
        )
    except DuotoneError as error:
        return {}, f"{type(error).__name__}: {first_sentence(error)}"
    return history.history, ""


def number(value: Any) -> float:
    """Return a scalar variable or tensor on the host."""
    return float(ops.convert_to_numpy(value))


def first_sentence(message: object) -> str:
    """Return what an error says first, without the ways out after it."""
    line = (str(message).splitlines() or [""])[0]
    return line.split("; ")[0].split(". ")[0].replace("|", "/").rstrip(".")


def finite(model: Any) -> float:
    """Return the fraction of weights that are finite."""
    return float(np.mean(np.concatenate([np.isfinite(floats(each)).ravel() for each in model.get_weights()])))


def floats(array: Any) -> np.ndarray:
    """Return an array of any format in FP32."""
    return np.asarray(array).astype("float32")


def scale_of(optimizer: Any) -> str:
    """Return an optimizer's loss scale, as tables show it."""
    variable = getattr(optimizer, "dynamic_scale", None)
    if variable is None:
        return "none"
    scale = number(variable)
    is_large_power = 1024 < scale < math.inf and math.frexp(scale)[0] == 0.5
    return f"2^{math.log2(scale):.0f}" if is_large_power else f"{scale:g}"


def steep(factor: float) -> Callable[[Any, Any], Any]:
    """Return a loss, finite itself, whose gradient of each of 48 outputs is a 48th of `factor`."""

    def loss(_: Any, predictions: Any) -> Any:
        return ops.mean(ops.cast(predictions, "float32")) * factor

    return loss


def reaches_zero(side: Keras) -> Found:
    """200 steps whose gradients are not finite, then a clean epoch."""
    model = network(side, "mixed_float16")
    model.compile(side.scaled(keras.optimizers.Adam()), loss_of_logits())
    fit(model, TOO_LARGE, epochs=50)
    scale = scale_of(model.optimizer)
    fit(model)
    whole = finite(model)
    return Found(f"scale {scale}; then {whole:.0%} of the weights are finite", scale != "0" and whole == 1)


def reaches_infinity(side: Keras) -> Found:
    """240 clean steps, each of which doubles the scale, then an epoch more."""
    model = network(side, "mixed_float16")

    model.compile(side.scaled(keras.optimizers.SGD(1e-6), growth_interval=1), steep(0.0))
    fit(model, epochs=60)
    before = scale_of(model.optimizer)
    fit(model)
    after = scale_of(model.optimizer)
    return Found(f"scale {before}, an epoch later {after}", "inf" not in before + after)


def skips_in_silence(side: Keras) -> Found:
    """120 steps, all skipped: a root of 0 in the loss, whose gradients are NaN at every scale."""
    model = network(side, "mixed_float16")

    def root_of_zero(_: Any, predictions: Any) -> Any:
        return ops.mean(ops.sqrt(ops.cast(predictions, "float32") * 0.0))

    model.compile(side.scaled(keras.optimizers.Adam()), root_of_zero)
    history, said = fit(model, epochs=30, callbacks=side.callbacks())
    if said:
        return Found(f"`{said}`", True)
    taken = number(model.optimizer.iterations)
    return Found(f"a normal end after {taken:.0f} steps; the history has {', '.join(history)}", "skipped" in history)


def schedule_moves_on(side: Keras) -> Found:
    """Six epochs of a step, the first of them skipped, under a learning rate that falls to a tenth in each."""
    model = network(side, "mixed_float16")
    # in FP16 gradients overflow where the scale is above 2^10
    model.compile(side.scaled(keras.optimizers.SGD(1.0)), steep(8.0))
    schedule = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.1 if epoch else rate)
    fit(model, ROWS[:BATCH], epochs=6, callbacks=[schedule, *side.callbacks()])
    rate, taken = number(model.optimizer.learning_rate), round(number(model.optimizer.iterations))
    right = 0.1 ** (taken - 1)
    text = f"{taken} of 6 steps taken, the last at {rate:.0e}" + (f"; {right:.0e} is right" if taken else "")
    return Found(text, taken > 0 and abs(rate / right - 1) < 1e-3)


def loads_another_optimizer(side: Keras) -> Found:
    """A compiled model, saved and loaded in a process whose global policy is float32."""
    model = network(side, "mixed_float16")
    model.compile(side.compiled(keras.optimizers.Adam()), loss_of_logits())
    fit(model)
    model.optimizer.dynamic_scale.assign(256.0)
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder) / "model.keras")
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            loaded: Any = keras.models.load_model(Path(folder) / "model.keras")
    saved, read = model.optimizer.variables, loaded.optimizer.variables
    # in the same order, and by names that Keras makes anew
    same = sum(map(_equal, saved, read)) if len(saved) == len(read) else 0
    kind, scale = type(loaded.optimizer).__name__, scale_of(loaded.optimizer)
    text = f"{kind}, loss scale {scale}, {same} of {len(saved)} variables as saved"
    text += "".join(f"; warned: `{first_sentence(each.message)}`" for each in said[:1])
    return Found(text, scale == "256" and same == len(saved))


def _equal(one: Any, other: Any) -> bool:
    return np.array_equal(floats(one), floats(other))


def layers_without_scaling(side: Keras) -> Found:
    """FP16 layers in a model that was put together under the global policy float32, compiled with Adam."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,))
    with side.policy("mixed_float16"):
        outputs = keras.layers.Dense(CLASSES)(inputs)
    model = keras.Model(inputs, outputs)
    model.compile("adam", loss_of_logits())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fit(model, callbacks=side.callbacks())
    ours = [first_sentence(each.message) for each in said if issubclass(each.category, DuotoneWarning)]
    scaled = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    text = f"{type(model.optimizer).__name__}, loss scale {scale_of(model.optimizer)}"
    return Found(text + "".join(f"; warned: `{each}`" for each in ours[:1]), scaled or bool(ours))


def weights_stand_still(side: Keras) -> Found:
    """40 steps of Adam at a learning rate of 1e-4 on BF16 weights, beside FP32 ones."""
    moved = {}
    for policy in ("float32", "bfloat16"):
        model = network(side, policy)
        inner = keras.optimizers.Adam(1e-4)
        model.compile(side.of_16_bit_weights(inner) if policy == "bfloat16" else inner, loss_of_logits())
        before = masters(side, model, policy)
        fit(model, epochs=10)
        after = masters(side, model, policy)
        moved[policy] = float(np.mean(before != after))
    text = f"{moved['bfloat16']:.0%} of the weights moved ({moved['float32']:.0%} in FP32)"
    return Found(text, abs(moved["bfloat16"] - moved["float32"]) < 0.1)


def masters(side: Keras, model: Any, policy: str) -> np.ndarray:
    """Return what the optimizer updates, flat, in FP32: the weights, or their masters."""
    if isinstance(side, Duotone) and policy == "bfloat16":
        model.optimizer.build(model.trainable_variables)
        weights = list(dk.master_weights(model).values())
    else:
        weights = model.get_weights()
    return np.concatenate([floats(each).ravel() for each in weights])


def forgets_to_scale(side: Keras) -> Found:
    """A custom loop that hands over gradients of a loss that nobody scaled: ones, at a learning rate of 0.1."""
    model = network(side, "mixed_float16")
    optimizer = side.scaled(keras.optimizers.SGD(0.1))
    optimizer.build(model.trainable_variables)
    before = floats(model.get_weights()[0])
    gradients = [ops.ones(each.shape) for each in model.trainable_variables]
    try:
        apply_gradients(optimizer, gradients, model)
    except DuotoneError as error:
        return Found(f"`{type(error).__name__}: {first_sentence(error)}`", True)
    update = float(np.abs(floats(model.get_weights()[0]) - before).max())
    return Found(f"an update of {update:.3g} where 0.1 is right", abs(update - 0.1) < 1e-3)


def apply_gradients(optimizer: Any, gradients: list[Any], model: Any) -> None:
    """Apply gradients as a custom loop of the backend does."""
    if keras.backend.backend() != "jax":
        optimizer.apply(gradients, model.trainable_variables)
        return
    weights, variables = optimizer.stateless_apply(
        [each.value for each in optimizer.variables], gradients, [each.value for each in model.trainable_variables]
    )
    for variable, value in zip([*model.trainable_variables, *optimizer.variables], [*weights, *variables], strict=True):
        variable.assign(value)


def applies_eagerly(side: Keras) -> Found:
    """`apply` outside of any compiled function, as a custom loop for all backends would call it."""
    model = network(side, "mixed_float16")
    optimizer = side.scaled(keras.optimizers.SGD(0.1))
    optimizer.build(model.trainable_variables)
    scale = number(optimizer.scale_loss(ops.convert_to_tensor(1.0)))
    before = floats(model.get_weights()[0])
    text = ""
    try:
        optimizer.apply([ops.ones(each.shape) * scale for each in model.trainable_variables], model.trainable_variables)
    except Exception as error:
        text = f"{type(error).__name__}; "
    try:
        update = float(np.abs(floats(model.get_weights()[0]) - before).max())
    except Exception as error:
        return Found(f"{text}reading the weights: {type(error).__name__}", False)
    return Found(f"{text}an update of {update:.3g} where 0.1 is right", not text and abs(update - 0.1) < 1e-3)


class Total(keras.layers.Layer):
    """A layer as people write them: it sums, and says nothing of formats."""

    def call(self, inputs: Any) -> Any:
        """Map (B, N) to the sums of its rows, (B,)."""
        return ops.sum(inputs, axis=-1)


def sums_overflow(side: Keras) -> Found:
    """A layer that sums 90,000 FP16 ones; no policy sees into its code, so a rule must name it."""
    totals = []
    for policy in ("mixed_float16", *side.with_rule("mixed_float16", "type=Total: float32")):
        with side.policy(policy):
            layer = Total()
        totals.append(number(ops.cast(layer(np.ones((1, 90_000), "float32")), "float32")[0]))
    text = f"{totals[0]:g}" + "".join(f"; {total:g} under the rule `type=Total: float32`" for total in totals[1:])
    return Found(text, totals[-1] == 90_000)


def norm_overflows(side: Keras) -> Found:
    """A layer of Keras' that divides by a norm: the squares of 300 are beyond FP16."""
    with side.policy("mixed_float16"):
        layer = keras.layers.UnitNormalization()
    norm = float(np.linalg.norm(floats(ops.convert_to_numpy(layer(np.full((1, 100), 300.0, "float32"))))))
    return Found(f"a norm of {norm:.3g}", abs(norm - 1) < 1e-3)


def softmax_underflows(side: Keras) -> Found:
    """A softmax layer whose logits lie tens apart: probabilities down to 1e-30."""
    kernel = np.random.default_rng(2).normal(scale=8, size=(8, CLASSES))
    results = {}
    for policy in ("float32", "mixed_float16"):
        model = network(side, policy, softmax=True)
        model.layers[-1].kernel.assign(kernel)
        results[policy] = ops.convert_to_numpy(ops.cast(model(ROWS), "float32"))
    zeros = {policy: float(np.mean(values == 0)) for policy, values in results.items()}
    text = f"{zeros['mixed_float16']:.0%} of the probabilities are 0 ({zeros['float32']:.0%} in FP32)"
    return Found(text, zeros["mixed_float16"] <= zeros["float32"] + 0.05)


SCENARIOS: dict[str, Scenario] = {
    "the scale has no floor: 200 steps overflow, then an epoch is clean": reaches_zero,
    "it has no ceiling: 240 clean steps at a growth interval of 1": reaches_infinity,
    "120 steps of `fit`, all skipped: a root of 0 in the loss": skips_in_silence,
    "`LearningRateScheduler`, from 1 to a tenth in each of six epochs of one step": schedule_moves_on,
    "`load_model` under the global policy float32, saved at scale 256": loads_another_optimizer,
    'FP16 layers, global policy float32, `compile("adam")`': layers_without_scaling,
    "the `bfloat16` policy under Adam at 1e-4, 40 steps": weights_stand_still,
    "a custom loop that forgets `scale_loss`": forgets_to_scale,
    "`LossScaleOptimizer.apply`, not compiled": applies_eagerly,
    "a layer of one's own sums 90,000 FP16 ones": sums_overflow,
    "`UnitNormalization` of a hundred values of 300 in FP16": norm_overflows,
    "a `softmax` layer in FP16, large logits": softmax_underflows,
}


def found_by(side: Keras, names: Any = None) -> dict[str, Found]:
    """Run scenarios, all by default."""
    found = {}
    for name in names or SCENARIOS:
        keras.config.set_dtype_policy("float32")
        try:
            found[name] = SCENARIOS[name](side)
        except Exception as error:
            found[name] = Found(f"`{type(error).__name__}: {first_sentence(error)}`", False)
    return found
