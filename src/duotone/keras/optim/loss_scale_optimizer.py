"""`LossScaleOptimizer`: dynamic loss scaling around any Keras optimizer, with a floor, a ceiling and nothing silent.

    scaled loss -> gradients -> true = gradients / scale, in FP32 -> inner optimizer, or nothing after an overflow
    scale, counts = duotone.loss_scale.update(...)

It is a `keras.optimizers.LossScaleOptimizer` for `compile` and `fit`, which therefore do not wrap it again. A skipped
step leaves everything of the inner optimizer as it was: iterations, schedules, moments, accumulators, averages.
Source: Micikevicius et al., arXiv:1710.03740, section 3.2.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import keras

from duotone.errors import LossScaleError, OptimizerError
from duotone.keras import internals
from duotone.keras.backends import is_traced
from duotone.keras.internals import ops
from duotone.keras.loss_scale import create_state, read_settings
from duotone.keras.optim.gradients import measured, true_gradients
from duotone.keras.optim.inner_checks import check_inner, check_masters, refuse_narrow, refuse_settings_of_keras
from duotone.keras.optim.loss_note import LossNote
from duotone.keras.optim.replicas import in_replicas, step_on_replicas
from duotone.keras.optim.scaled_step import step_in_program, step_on_host
from duotone.keras.optim.step_record import StepReport, create_record
from duotone.keras.optim.stored_state import load_state, save_state, settings_of_keras
from duotone.loss_scale import LossScale
from duotone.policy import Policy


@keras.saving.register_keras_serializable("duotone")
class LossScaleOptimizer(keras.optimizers.LossScaleOptimizer):
    """Loss scaling around a Keras optimizer, which sees true FP32 gradients, and none of a step that overflowed.

    The outermost optimizer: masters, clipping, decay, accumulation and averages are the inner one's.

    Args:
        inner_optimizer: a Keras optimizer, or its name.
        policy: a policy's text, a `Policy`, or the settings of the scale as a `LossScale`. A policy that needs no loss
            scale, such as "bf16", is fine: then only steps with an Inf or a NaN are skipped.
        name: of the optimizer.

    Raises:
        PolicyError: the policy cannot be read.
        LossScaleError: `policy` is neither policy nor settings.
        OptimizerError: the inner optimizer has a loss scale of its own; or, at `build`, variables are kept in 16 bits,
            the policy has masters, and the inner optimizer none.

    >>> import keras
    >>> import duotone.keras as dk
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, dtype="mixed_float16")])
    >>> model.compile(dk.LossScaleOptimizer(keras.optimizers.Adam(1e-3)), "mse")
    >>> history = model.fit(keras.ops.zeros((8, 4)), keras.ops.ones((8, 3)), verbose=0)
    >>> model.optimizer.report().loss_scale, model.optimizer.non_finite()
    (65536.0, [])
    """

    def __init__(
        self,
        inner_optimizer: Any,
        policy: LossScale | Policy | str = "fp16-mixed",
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        settings = read_settings(policy)
        refuse_settings_of_keras(kwargs)
        inner = keras.optimizers.get(inner_optimizer)
        check_inner(inner)
        super().__init__(inner, settings.init_scale, settings.growth_interval, name=name, **kwargs)
        internals.forget_own_variables(self)
        self.settings = settings
        self.policy = policy if isinstance(policy, LossScale) else Policy.parse(policy)
        self.note = LossNote()
        self.loss_was_scaled = False

    def build(self, var_list: Sequence[Any]) -> None:
        """Make the variables of the scale, and the inner optimizer's, for these trainable variables."""
        if self.built:
            return
        variables = list(var_list)
        refuse_narrow(self.policy, self.inner_optimizer, variables)
        self.scale_state = create_state(self.settings, self.add_variable)
        self.dynamic_scale = self.scale_state.scale
        self.record = create_record(self.settings, len(variables), self.add_variable)
        self.paths = tuple(getattr(variable, "path", variable.name) for variable in variables)
        self.inner_optimizer.build(variables)
        keras.optimizers.Optimizer.build(self, variables)
        check_masters(self.policy, self, variables)

    @property
    def step_counter(self) -> Any:
        """Clean steps since the last overflow or full window, as Keras names them."""
        return self.scale_state.growth_tracker

    def scale_loss(self, loss: Any) -> Any:
        """Return the loss times the scale, in FP32; gradients are to be taken of it."""
        self.loss_was_scaled = True
        if not hasattr(loss, "dtype"):
            loss = ops.convert_to_tensor(loss, "float32")
        loss = self.note.watched(loss)
        if self.settings.is_none:
            return loss
        wide = ops.cast(loss, keras.backend.result_type(loss.dtype, "float32"))
        scale = self.dynamic_scale if self.built else self.settings.init_scale
        return wide * ops.cast(scale, wide.dtype)

    def apply(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
        """Update the variables with the gradients of a scaled loss, or nothing if one of them is Inf or NaN.

        Args:
            grads: one for each variable, in any floating-point format; None where there is none.
            trainable_variables: those that the gradients are of; None for all that the optimizer was built on.

        Raises:
            LossScaleError: the loss was not scaled.
            OptimizerError: gradients and variables do not fit each other, or this is in a program of JAX.
        """
        grads = list(grads)
        if not grads:
            return
        variables = self._variables_for(grads, trainable_variables)
        if not (self.loss_was_scaled or self.settings.is_none):
            raise LossScaleError(
                "gradients come to this optimizer, but no loss was scaled, so each update would be "
                f"{self.settings.init_scale:g} times too small; take the gradients of optimizer.scale_loss(loss)"
            )
        scale = None if self.settings.is_none else ops.convert_to_tensor(self.dynamic_scale)
        true = true_gradients(grads, variables, scale)
        loss_is_finite = self.note.take(next((grad for grad in true if grad is not None), scale))
        if in_replicas():
            step_on_replicas(self, true, variables, loss_is_finite)
            return
        gradients = measured(true, variables)
        if not is_traced(gradients.non_finite):
            step_on_host(self, gradients, variables, loss_is_finite)
            return
        if internals.would_leak_tracers():
            raise OptimizerError(
                "apply was called inside of a function that JAX traces, and would leave tracers in the variables; "
                "call optimizer.stateless_apply(optimizer_values, gradients, values) there and return what it returns"
            )
        step_in_program(self, gradients, variables, loss_is_finite)

    def _variables_for(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None) -> Sequence[Any]:
        """Return the variables that gradients are of, and build the optimizer if that is not done yet."""
        variables = None if trainable_variables is None else list(trainable_variables)
        if not self.built:
            if variables is None:
                raise OptimizerError(
                    "apply got gradients, but no variables, and this optimizer was not built; call "
                    "optimizer.build(model.trainable_variables) first, or optimizer.apply(gradients, variables)"
                )
            with keras.name_scope(self.name):
                self.build(variables)
        variables = internals.trained_variables(self) if variables is None else variables
        if len(grads) != len(variables):
            raise OptimizerError(
                f"apply got {len(grads)} gradients for {len(variables)} variables; give one for each, None where "
                "there is none"
            )
        return variables

    def stateless_apply(
        self, optimizer_variables: Sequence[Any], grads: Sequence[Any], trainable_variables: Sequence[Any]
    ) -> tuple[list[Any], list[Any]]:
        """Return the values of variables and optimizer after a step, as `keras.optimizers.Optimizer` does."""
        # not Keras' own LossScaleOptimizer's, whose transition is another
        return keras.optimizers.Optimizer.stateless_apply(self, optimizer_variables, grads, trainable_variables)

    def report(self) -> StepReport:
        """Return what the last step did; it waits for the device.

        Raises:
            LossScaleError: the values are in the hands of a `fit` on JAX.
        """
        if not self.built:
            return StepReport(self.settings.init_scale)
        return StepReport(
            loss_scale=self._read(self.record.last_scale).item(),
            skipped=self._read(self.scale_state.skipped).item(),
            skipped_in_a_row=self._read(self.scale_state.skipped_in_a_row).item(),
            grad_norm=self._read(self.record.grad_norm).item(),
            loss_is_finite=bool(self._read(self.record.loss_is_finite)),
            overflows_at_floor=self._read(self.record.overflows_at_floor).item(),
        )

    def non_finite(self) -> list[str]:
        """Return the paths of the variables whose last gradient was not finite; it waits for the device."""
        if not self.built:
            return []
        flags = self._read(self.record.non_finite)
        return [path for path, flag in zip(self.paths, flags, strict=True) if flag]

    def _read(self, variable: Any) -> Any:
        if internals.is_released(variable):
            raise LossScaleError(
                "the optimizer's values are with the fit that runs on JAX; call model.jax_state_sync() in the callback "
                "before you read them"
            )
        return ops.convert_to_numpy(variable.value)

    def exclude_from_weight_decay(self, var_list: Any = None, var_names: Any = None) -> None:
        """Exclude variables from the inner optimizer's weight decay."""
        self.inner_optimizer.exclude_from_weight_decay(var_list, var_names)

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Set all variables, the inner optimizer's too."""
        if len(weights) != len(self.variables):
            raise OptimizerError(
                f"set_weights got {len(weights)} arrays for {len(self.variables)} variables; build the optimizer "
                "first, and give one for each of optimizer.variables"
            )
        for variable, weight in zip(self.variables, weights, strict=True):
            variable.assign(weight)

    def save_own_variables(self, store: Any) -> None:
        """Write the values of the scale into a store of arrays by number; the inner optimizer writes its own."""
        save_state(self._own_variables(), store)

    def load_own_variables(self, store: Any) -> None:
        """Read the values of the scale from such a store, or from one that Keras' own LossScaleOptimizer wrote.

        An optimizer that is not built yet is built for the model that is loaded.
        """
        if not store.keys():
            # saved before the first step, or without an optimizer
            return
        internals.build_for_loading(self)
        if not load_state(self, self._own_variables(), store):
            # says how many variables there are, and how many there should be
            super().load_own_variables(store)

    def _own_variables(self) -> list[Any]:
        return self.variables[: len(self.variables) - len(self.inner_optimizer.variables)]

    def get_config(self) -> dict[str, Any]:
        """Return what `from_config` makes the same optimizer of."""
        return {
            "name": self.name,
            "inner_optimizer": keras.saving.serialize_keras_object(self.inner_optimizer),
            "policy": asdict(self.policy) if isinstance(self.policy, LossScale) else str(self.policy),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> "LossScaleOptimizer":
        """Return the optimizer of a configuration, of Keras' own LossScaleOptimizer too."""
        inner = keras.saving.deserialize_keras_object(config["inner_optimizer"], custom_objects=custom_objects)
        policy = config.get("policy", settings_of_keras(config))
        return cls(inner, LossScale(**policy) if isinstance(policy, dict) else policy, name=config.get("name"))
