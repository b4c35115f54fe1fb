"""FP32 masters around any Keras optimizer: 16-bit variables with 16-bit tails that only the optimizer sees.

    master = weight + tail                      (decoded, bit by bit)
    inner optimizer: (gradient in FP32, master) -> new master
    weight, tail = encode(new master)

The inner optimizer sees FP32 masters and FP32 gradients, and no difference to training in FP32: its weight decay,
clipping, constraints, accumulation, averages and schedules are its own. With AdamW that is 12 bytes for each parameter:
weight 2, tail 2, two FP32 moments 8. Source: Micikevicius et al., arXiv:1710.03740, section 3.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import keras

from duotone.call_site import warn
from duotone.errors import OptimizerError
from duotone.keras import internals
from duotone.keras.internals import ops
from duotone.keras.optim.slices import on_values
from duotone.keras.optim.stand_ins import Master
from duotone.keras.optim.tails import Tails
from duotone.keras.weights.codec import LARGEST_OF_FLOAT16


@keras.saving.register_keras_serializable("duotone")
class Masters(keras.optimizers.Optimizer):
    """An optimizer that updates FP32 masters of 16-bit variables with any Keras optimizer.

    A variable starts from its 16-bit value, which is what its initialiser or a file gave it. What others write into a
    variable later, `set_weights` or `load_weights`, is noticed at the next step, which takes it as it is.

    In FP16 a master that its weight cannot reach stays at the largest that it can, 65519.996, rather than at Inf;
    `at_limit()` names such variables, and the end of `fit` warns of them.

    Args:
        inner_optimizer: any Keras optimizer that is not built yet, or its name, but for `LossScaleOptimizer`, which
            goes around this one.
        name: of this optimizer.

    Raises:
        OptimizerError: `inner_optimizer` is no such optimizer.

    >>> layer = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones", dtype="bfloat16")
    >>> layer.build((None, 1))
    >>> optimizer = Masters(keras.optimizers.SGD(2.0**-10))
    >>> optimizer.build(layer.trainable_variables)
    >>> for _ in range(3):
    ...     optimizer.apply([ops.ones((1, 1), "bfloat16")])
    >>> float(layer.kernel[0, 0]), float(optimizer.masters[0][0, 0])
    (0.99609375, 0.9970703125)
    """

    def __init__(self, inner_optimizer: Any, name: str | None = None) -> None:
        inner = _checked(inner_optimizer)
        super().__init__(learning_rate=0.0, name=name)
        internals.forget_own_variables(self)
        self.inner_optimizer = inner

    def build(self, variables: Sequence[keras.Variable]) -> None:
        """Make the tails of the 16-bit variables, and the inner optimizer's own for their masters."""
        if self.built:
            return
        if self.inner_optimizer.built:
            raise OptimizerError(
                f"the {type(self.inner_optimizer).__name__} inside of Masters has been built already, on variables in "
                "16 bits; give Masters a new one"
            )
        tails = Tails(self, variables)
        if variables and not tails.masters:
            dtypes = sorted({keras.backend.standardize_dtype(variable.dtype) for variable in variables})
            warn(
                f"Masters has nothing to do: the {len(variables)} trainable variables are {' and '.join(dtypes)}, and "
                "only those in bfloat16 or float16 get masters; give layers such a dtype, or leave Masters out",
            )
        self._tails = tails
        internals.stand_in_exclusions(self.inner_optimizer, tails.stand_in, variables)
        self.inner_optimizer.build([tails.stand_in(variable) for variable in variables])
        super().build(variables)

    @property
    def variables(self) -> list[keras.Variable]:
        """The tails, their weights' checksums, and the inner optimizer's variables."""
        return super().variables + self.inner_optimizer.variables

    def apply(self, grads: Sequence[Any], trainable_variables: Iterable[keras.Variable] | None = None) -> None:
        """Update masters, and the variables that have none, with true gradients.

        Args:
            grads: in any floating format; None for variables that get none.
            trainable_variables: theirs; as at `build` if they are not given.
        """
        if len(grads) == 0:
            return
        if trainable_variables is None:
            if not self.built:
                raise OptimizerError("Masters knows no variables yet; call optimizer.build(model.trainable_variables)")
            variables = internals.trained_variables(self)
        else:
            variables = list(trainable_variables)
            if not self.built:
                with keras.name_scope(self.name, caller=self):
                    self.build(variables)
        wide = [grad if grad is None else on_values(_widened, grad) for grad in grads]
        with self._tails.step():
            self.inner_optimizer.apply(wide, [self._tails.stand_in(variable) for variable in variables])

    @property
    def masters(self) -> Sequence[Master]:
        """The FP32 masters of the 16-bit variables, which read as variables of Keras; none before `build`."""
        return self._tails.masters if self.built else ()

    @property
    def iterations(self) -> Any:
        """The inner optimizer's count of steps."""
        return self.inner_optimizer.iterations

    @property
    def learning_rate(self) -> Any:
        """The inner optimizer's."""
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: Any) -> None:
        self.inner_optimizer.learning_rate = learning_rate

    @property
    def loss_scale_factor(self) -> Any:
        """The inner optimizer's static loss scale, or None."""
        # on TensorFlow Keras sets an attribute only if it has another value
        self._refuse_scale_of_keras()
        return self.inner_optimizer.loss_scale_factor if hasattr(self, "inner_optimizer") else None

    @loss_scale_factor.setter
    def loss_scale_factor(self, loss_scale_factor: Any) -> None:
        self._refuse_scale_of_keras()
        # Keras' constructor sets it before there is one
        if hasattr(self, "inner_optimizer"):
            self.inner_optimizer.loss_scale_factor = loss_scale_factor

    def _refuse_scale_of_keras(self) -> None:
        if internals.is_wrapped_by_keras(self):
            name = type(self.inner_optimizer).__name__
            raise OptimizerError(
                "Keras' own LossScaleOptimizer does not go around Masters: its scale can reach 0 and Inf, and it "
                "divides gradients in 16 bits. `compile` puts it there where the dtype policy is mixed_float16; write "
                f'duotone.keras.LossScaleOptimizer(Masters({name}(...)), "fp16"), or for no loss scale '
                'compile(..., auto_scale_loss=False), or before load_model keras.config.set_dtype_policy("float32")'
            )

    def scale_loss(self, loss: Any) -> Any:
        """Return the loss as the inner optimizer scales it, whose `loss_scale_factor` may say so."""
        return self.inner_optimizer.scale_loss(loss)

    def exclude_from_weight_decay(self, var_list: Any = None, var_names: Any = None) -> None:
        """Leave variables out of the inner optimizer's weight decay, as Keras says it."""
        if self.built and var_list is not None:
            var_list = [self._tails.stand_in(variable) for variable in var_list]
        self.inner_optimizer.exclude_from_weight_decay(var_list, var_names)

    def finalize_variable_values(self, var_list: Sequence[keras.Variable]) -> None:
        """Let the inner optimizer set final values, such as averages of masters."""
        if any(internals.is_released(master.tail) for master in self.masters):
            # a step of `fit` on JAX has raised, and that error is the one to see
            return
        with self._tails.step():
            self.inner_optimizer.finalize_variable_values([self._tails.stand_in(each) for each in var_list])
        at_limit = self.at_limit()
        if at_limit:
            warn(
                f"FP16 weights have reached {LARGEST_OF_FLOAT16:g}, the largest number that they can hold, and masters "
                f"stop there: {', '.join(at_limit)}; give their layers a policy in bfloat16 or float32, or lower the "
                "learning rate",
            )

    def at_limit(self) -> list[str]:
        """Return the paths of the FP16 variables with a master that FP16 could not follow; it waits for the device."""
        return [
            master.path
            for master in self.masters
            if keras.backend.standardize_dtype(master.weight.dtype) == "float16"
            and bool(ops.convert_to_numpy(ops.any(ops.abs(master.read()) == LARGEST_OF_FLOAT16)))
        ]

    @property
    def optimizers(self) -> Sequence[Any]:
        """The optimizers inside, as `keras.optimizers.MultiOptimizer` names them: those that keep averages."""
        return getattr(self.inner_optimizer, "optimizers", [self.inner_optimizer])

    def save_own_variables(self, store: Any) -> None:
        """Save tails and checksums; the inner optimizer saves its own."""
        for index, variable in enumerate(super().variables):
            store[str(index)] = variable.numpy()

    def load_own_variables(self, store: Any) -> None:
        """Load tails and checksums; the inner optimizer loads its own.

        An optimizer that is not built yet is built for the model that is loaded.
        """
        if not store.keys():
            # saved before the first step, or without an optimizer
            return
        internals.build_for_loading(self)
        own = super().variables
        if len(store.keys()) != len(own):
            warn(
                f"a file holds {len(store.keys())} variables of Masters, but there are {len(own)}, so none is loaded "
                "and masters begin as the weights are; build the optimizer before you load, on the variables that it "
                "was saved with",
            )
            return
        for index, variable in enumerate(own):
            variable.assign(store[str(index)])

    def get_config(self) -> dict[str, Any]:
        """Return the name and the inner optimizer, serialized."""
        inner = keras.saving.serialize_keras_object(self.inner_optimizer)
        return {"name": self.name, "inner_optimizer": inner}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> "Masters":
        """Return an optimizer from what `get_config` returned."""
        inner = keras.saving.deserialize_keras_object(config["inner_optimizer"], custom_objects=custom_objects)
        return cls(inner, name=config["name"])


def _widened(values: Any) -> Any:
    """Return FP32 for 16-bit numbers, and others as they are."""
    return ops.cast(values, keras.backend.result_type(values.dtype, "float32"))


def _checked(inner: Any) -> Any:
    if isinstance(inner, str):
        inner = keras.optimizers.get(inner)
    if isinstance(inner, keras.optimizers.LossScaleOptimizer):
        raise OptimizerError(
            "Masters(LossScaleOptimizer(..)) would update masters with scaled gradients; the loss scale goes around: "
            'LossScaleOptimizer(Masters(..), "fp16")'
        )
    if isinstance(inner, Masters):
        raise OptimizerError("Masters(Masters(..)) has nothing to add; write Masters(keras.optimizers.AdamW(1e-3))")
    if not isinstance(inner, keras.optimizers.Optimizer):
        raise OptimizerError(
            f"Masters goes around a Keras optimizer, not {inner!r}; write Masters(keras.optimizers.AdamW(1e-3))"
        )
    return inner
