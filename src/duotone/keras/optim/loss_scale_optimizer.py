"""`LossScaleOptimizer`: dynamic loss scaling around any Keras optimizer, with a floor, a ceiling and nothing silent.

    scaled loss -> gradients -> true = gradients / scale, in FP32 -> inner optimizer, or nothing after an overflow
    scale, counts = duotone.loss_scale.update(...)

It is a `keras.optimizers.LossScaleOptimizer` for `compile` and `fit`, which therefore do not wrap it again. A skipped
step leaves everything of the inner optimizer as it was: iterations, schedules, moments, accumulators, averages.
Source: Micikevicius et al., arXiv:1710.03740, section 3.2.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import keras

from duotone.errors import LossScaleError, OptimizerError
from duotone.keras import internals
from duotone.keras.backends import is_traced
from duotone.keras.internals import ops
from duotone.keras.loss_scale import LEAVES, after_step, create_state, numbers, read_settings, tensors
from duotone.keras.optim.gradients import Gradients, measured, true_gradients
from duotone.loss_scale import LossScale, update
from duotone.policy import Policy


@dataclass(frozen=True)
class StepReport:
    """What the last step did, in numbers of the host.

    Attributes:
        loss_scale: the scale that the loss was multiplied by; before the first step, that it will be.
        skipped: steps skipped since the start, because a gradient was Inf or NaN.
        skipped_in_a_row: steps skipped since the last one that was not.
        grad_norm: the norm of the true gradient, before clipping; not finite if the step was skipped.
        loss_is_finite: whether the last loss was a finite number before it was scaled; True where that is not known.
        overflows_at_floor: the last steps in a row that overflowed at the lowest loss scale.
    """

    loss_scale: float
    skipped: int
    skipped_in_a_row: int
    grad_norm: float
    loss_is_finite: bool = True
    overflows_at_floor: int = 0


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
        OptimizerError: the inner optimizer scales the loss itself.

    >>> import keras
    >>> import duotone.keras as dk
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, dtype="mixed_float16")])
    >>> model.compile(dk.LossScaleOptimizer(keras.optimizers.Adam(1e-3)), "mse")
    >>> model.optimizer.build(model.trainable_variables)
    >>> model.optimizer.report().loss_scale
    65536.0
    """

    def __init__(
        self,
        inner_optimizer: Any,
        policy: LossScale | Policy | str = "fp16-mixed",
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        settings = read_settings(policy)
        inner = keras.optimizers.get(inner_optimizer)
        super().__init__(inner, settings.init_scale, settings.growth_interval, name=name, **kwargs)
        self.settings = settings
        self.policy = policy if isinstance(policy, LossScale) else Policy.parse(policy)
        self.loss_was_scaled = False

    def build(self, var_list: Sequence[Any]) -> None:
        """Make the variables of the scale, and the inner optimizer's, for these trainable variables."""
        if self.built:
            return
        variables = list(var_list)
        self.scale_state = create_state(self.settings, self.add_variable)
        self.dynamic_scale = self.scale_state.scale
        self.last_scale = self._own("last_scale", "float32", self.settings.init_scale)
        self.grad_norm = self._own("grad_norm", "float32")
        self.loss_is_finite = self._own("loss_is_finite", "int32", 1)
        self.overflows_at_floor = self._own("overflows_at_floor", "int32")
        self.non_finite_gradients = self._own("non_finite_gradients", "int32", shape=(len(variables),))
        self.paths = tuple(getattr(variable, "path", variable.name) for variable in variables)
        self.inner_optimizer.build(variables)
        keras.optimizers.Optimizer.build(self, variables)

    def _own(self, name: str, dtype: str, start: float = 0, shape: tuple[int, ...] = ()) -> Any:
        # Keras says that it takes a text here, and takes an initializer too
        initializer: Any = keras.initializers.Constant(start)
        return self.add_variable(
            shape=shape,
            initializer=initializer,
            dtype=dtype,
            aggregation="only_first_replica",
            name=name,
        )

    @property
    def step_counter(self) -> Any:
        """Clean steps since the last overflow or full window, as Keras names them."""
        return self.scale_state.growth_tracker

    def scale_loss(self, loss: Any) -> Any:
        """Return the loss times the scale, in FP32; gradients are to be taken of it."""
        self.loss_was_scaled = True
        if self.settings.is_none:
            return loss
        scale = self.dynamic_scale if self.built else self.settings.init_scale
        return ops.cast(loss, "float32") * scale

    def apply(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
        """Update the variables with the gradients of a scaled loss, or nothing if one of them is Inf or NaN.

        Args:
            grads: one for each variable, in any floating-point format; None where there is none.
            trainable_variables: those that the gradients are of; None for all that the optimizer was built on.

        Raises:
            LossScaleError: the loss was not scaled.
            OptimizerError: gradients and variables do not fit each other.
        """
        grads = list(grads)
        if not grads:
            return
        if not self.built:
            if trainable_variables is None:
                raise OptimizerError(
                    "apply got gradients, but no variables, and this optimizer was not built; call "
                    "optimizer.build(model.trainable_variables) first, or optimizer.apply(gradients, variables)"
                )
            with keras.name_scope(self.name):
                self.build(list(trainable_variables))
        variables = internals.trained_variables(self) if trainable_variables is None else list(trainable_variables)
        if len(grads) != len(variables):
            raise OptimizerError(
                f"apply got {len(grads)} gradients for {len(variables)} variables; give one for each, None where "
                "there is none"
            )
        if not (self.loss_was_scaled or self.settings.is_none):
            raise LossScaleError(
                "gradients come to this optimizer, but no loss was scaled, so each update would be "
                f"{self.settings.init_scale:g} times too small; take the gradients of optimizer.scale_loss(loss)"
            )
        scale = None if self.settings.is_none else ops.convert_to_tensor(self.dynamic_scale)
        gradients = measured(true_gradients(grads, variables, scale), variables)
        if is_traced(gradients.non_finite):
            self._step_in_trace(gradients, variables)
        else:
            self._step_on_host(gradients, variables)

    def stateless_apply(
        self, optimizer_variables: Sequence[Any], grads: Sequence[Any], trainable_variables: Sequence[Any]
    ) -> tuple[list[Any], list[Any]]:
        """Return the values of variables and optimizer after a step, as `keras.optimizers.Optimizer` does."""
        # not Keras' own LossScaleOptimizer's, whose transition is another
        return keras.optimizers.Optimizer.stateless_apply(self, optimizer_variables, grads, trainable_variables)

    def _step_on_host(self, gradients: Gradients, variables: Sequence[Any]) -> None:
        """Update, or skip, by what the host has read: no operation runs that is not needed."""
        found = ops.convert_to_numpy(gradients.non_finite)
        overflow = bool(found.any())
        before = numbers(self.scale_state)
        if not overflow:
            self.inner_optimizer.apply(gradients.true, variables)
        after = update(self.settings, before, overflow)
        for name in LEAVES:
            if getattr(after, name) != getattr(before, name):
                getattr(self.scale_state, name).assign(getattr(after, name))
        self._record(gradients, variables, before.scale)

    def _step_in_trace(self, gradients: Gradients, variables: Sequence[Any]) -> None:
        """Update, or skip, without a number on the host."""
        overflow = ops.any(gradients.non_finite)
        before = tensors(self.scale_state)
        if keras.backend.backend() == "jax":
            self._apply_chosen(gradients.true, variables, overflow)
        else:
            ops.cond(overflow, lambda: None, lambda: self.inner_optimizer.apply(gradients.true, variables))
        after = after_step(self.settings, before, overflow, True)
        for name in LEAVES:
            variable = getattr(self.scale_state, name)
            variable.assign(ops.cast(getattr(after, name), variable.dtype))
        self._record(gradients, variables, before.scale)

    def _apply_chosen(self, true: list[Any], variables: Sequence[Any], overflow: Any) -> None:
        """Run the inner optimizer beside the variables, and choose their new values among its and the old."""
        held = [*internals.trained_variables(self), *self.inner_optimizer.variables]
        before = [variable.value for variable in held]
        with keras.StatelessScope(list(zip(held, before, strict=True)), initialize_variables=False) as scope:
            self.inner_optimizer.apply(true, variables)
        for variable, old in zip(held, before, strict=True):
            new = scope.get_current_value(variable)
            if new is not old:
                variable.assign(ops.where(overflow, old, new))

    def _record(self, gradients: Gradients, variables: Sequence[Any], scale: Any) -> None:
        self.last_scale.assign(scale)
        self.grad_norm.assign(gradients.grad_norm)
        flags = gradients.non_finite
        if len(variables) != len(self.paths) or variables is not internals.trained_variables(self):
            places = {internals.index_of(self, variable): place for place, variable in enumerate(variables)}
            flags = ops.stack(
                [flags[places[i]] if i in places else ops.zeros((), "bool") for i in range(len(self.paths))]
            )
        self.non_finite_gradients.assign(ops.cast(flags, "int32"))

    def report(self) -> StepReport:
        """Return what the last step did; it waits for the device.

        Raises:
            LossScaleError: the values are in the hands of a `fit` on JAX.
        """
        if not self.built:
            return StepReport(self.settings.init_scale, 0, 0, 0.0)
        return StepReport(
            loss_scale=self._number(self.last_scale),
            skipped=self._number(self.scale_state.skipped),
            skipped_in_a_row=self._number(self.scale_state.skipped_in_a_row),
            grad_norm=self._number(self.grad_norm),
            loss_is_finite=bool(self._number(self.loss_is_finite)),
            overflows_at_floor=self._number(self.overflows_at_floor),
        )

    def non_finite(self) -> list[str]:
        """Return the paths of the variables whose last gradient was not finite; it waits for the device."""
        if not self.built:
            return []
        flags = self._read(self.non_finite_gradients)
        return [path for path, flag in zip(self.paths, flags, strict=True) if flag]

    def _number(self, variable: Any) -> Any:
        return self._read(variable).item()

    def _read(self, variable: Any) -> Any:
        if internals.is_released(variable):
            raise LossScaleError(
                "the optimizer's values are with the fit that runs on JAX; call model.jax_state_sync() in the callback "
                "before you read them"
            )
        return ops.convert_to_numpy(variable.value)

    def get_config(self) -> dict[str, Any]:
        """Return what `from_config` makes the same optimizer of."""
        return {
            "name": self.name,
            "inner_optimizer": keras.saving.serialize_keras_object(self.inner_optimizer),
            "policy": asdict(self.policy) if isinstance(self.policy, LossScale) else str(self.policy),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> "LossScaleOptimizer":
        """Return the optimizer of a configuration."""
        config = dict(config)
        inner = keras.saving.deserialize_keras_object(config.pop("inner_optimizer"), custom_objects=custom_objects)
        policy = config.pop("policy")
        return cls(inner, LossScale(**policy) if isinstance(policy, dict) else policy, **config)
