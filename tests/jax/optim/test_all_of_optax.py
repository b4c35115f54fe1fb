"""All of Optax around `masters`, after it and inside of it: FP32 training's numbers, or a sentence with the way out."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax
import pytest

import duotone.jax as dj
from duotone.errors import OptimizerError

from .two_leaves import INNER, MASK, gradients, parameters

LABELS = {"dense": "a", "LayerNorm_0": "b"}
ARGUMENTS = {
    "b1": 0.9,
    "clipping": 0.1,
    "decay": 0.9,
    "eta": 0.1,
    "gamma": 0.5,
    "k": 2,
    "key": 0,
    "learning_rate": 0.125,
    "mask": MASK,
    "max_delta": 0.25,
    "max_norm": 0.25,
    "seed": 0,
    "step_size": 0.5,
    "step_size_fn": lambda count: 0.5,
    "threshold": 0.25,
    "weight_decay": 0.125,
}


def train(tx: Any, policy: str | None = "bf16", steps: int = 2) -> Any:
    params = parameters()
    state = tx.init(params)
    params = params if policy is None else dj.cast(params, policy)
    for seed in range(steps):
        updates, state = tx.update(gradients(seed), state, params)
        params = optax.apply_updates(params, updates)
    return params if policy is None else dj.master_weights(params, state)


def assert_exact(tx: Any, reference: Any) -> None:
    for one, other in zip(jax.tree.leaves(train(tx)), jax.tree.leaves(train(reference, None)), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2.0**-20)


def functions() -> Iterator[tuple[str, Callable[..., Any], inspect.Signature]]:
    """Yield every public function of Optax once, with what it takes."""
    seen = set()
    for module in (optax, optax.transforms, optax.contrib):
        for name, function in vars(module).items():
            is_function = inspect.isfunction(function) or inspect.isclass(function)
            if not name.startswith("_") and is_function and name not in seen:
                seen.add(name)
                yield f"{module.__name__}.{name}", function, inspect.signature(function)


def wrappers_of_optax() -> set[str]:
    """Return the names of what takes another transformation."""
    return {
        name.rpartition(".")[2]
        for name, _, signature in functions()
        if any(
            "GradientTransformation" in str(each.annotation) and each.default is each.empty
            for each in signature.parameters.values()
        )
    }


def transformations_of_optax() -> dict[str, optax.GradientTransformation]:
    """Return what needs no other transformation, made with some arguments."""
    found = {}
    for name, function, signature in functions():
        given = [
            each.name
            for each in signature.parameters.values()
            if each.name in ARGUMENTS
            and (each.default is each.empty or each.name == "learning_rate" or each.default == 0)
        ]
        needed = {each.name for each in signature.parameters.values() if each.default is each.empty and each.kind < 2}
        if needed <= set(given) and name.rpartition(".")[2] not in wrappers_of_optax():
            made = None if inspect.isclass(function) else function(**{each: ARGUMENTS[each] for each in given})
            if isinstance(made, optax.GradientTransformation):
                found[name] = made
    return found


TRANSFORMATIONS = transformations_of_optax()
# what is exact around `masters`
EXACT: dict[str, Callable[[Any], Any]] = {
    "MultiSteps": lambda inner: optax.MultiSteps(inner, 2),
    "chain": optax.chain,
    "inject_hyperparams": lambda inner: optax.inject_hyperparams(lambda rate: inner)(rate=0.5),
    "inject_stateful_hyperparams": lambda inner: optax.inject_stateful_hyperparams(lambda rate: inner)(rate=0.5),
    "masked": lambda inner: optax.chain(
        optax.masked(inner, MASK), optax.masked(optax.set_to_zero(), jax.tree.map(lambda flag: not flag, MASK))
    ),
    "multi_transform": lambda inner: optax.multi_transform({"a": inner, "b": optax.sgd(0.5)}, LABELS),
    "named_chain": lambda inner: optax.named_chain(("first", optax.clip(0.5)), ("second", inner)),
    "partition": lambda inner: optax.partition({"a": inner, "b": inner}, LABELS),
    "selective_transform": lambda inner: optax.selective_transform(
        inner, freeze_mask={"dense": False, "LayerNorm_0": True}
    ),
    "split_real_and_imaginary": optax.contrib.split_real_and_imaginary,
    "with_extra_args_support": optax.with_extra_args_support,
}
# what is refused around it, and exact inside of it
REFUSED: dict[str, Callable[[Any], Any]] = {
    "apply_if_finite": lambda inner: optax.apply_if_finite(inner, 3),
    "conditionally_mask": lambda inner: optax.conditionally_mask(inner, lambda step: step % 2 == 0),
    "conditionally_transform": lambda inner: optax.conditionally_transform(inner, lambda step: step % 2 == 0),
    "flatten": optax.flatten,
    "mechanize": optax.contrib.mechanize,
    "sam": lambda inner: optax.contrib.sam(inner, optax.sgd(0.5)),
    "schedule_free": lambda inner: optax.contrib.schedule_free(inner, 0.25),
}
# takes other parameters, or measures and passes on
OTHERS = {"lookahead", "monitor", "apply_updates", "tree_map_params"}


def test_every_wrapper_of_optax_is_here() -> None:
    assert wrappers_of_optax() - OTHERS <= EXACT.keys() | REFUSED.keys()
    assert len(TRANSFORMATIONS) > 80


@pytest.mark.parametrize("name", EXACT)
def test_a_wrapper_around_masters_is_exact(name: str) -> None:
    assert_exact(EXACT[name](dj.masters(INNER, "bf16")), EXACT[name](INNER))


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrapper_is_refused_around_masters_and_exact_inside(name: str) -> None:
    for tx in (dj.masters(INNER, "bf16"), optax.chain(optax.identity(), dj.masters(INNER, "bf16"))):
        with pytest.raises(
            OptimizerError, match=rf"optax\S*\.{name} cannot stand around masters.*; put it inside, masters"
        ):
            train(REFUSED[name](tx))
    assert_exact(dj.masters(REFUSED[name](INNER), "bf16"), REFUSED[name](INNER))
    # of FP32 weights updates are arrays
    tx, reference = REFUSED[name](dj.masters(INNER, "bf16-mixed")), REFUSED[name](INNER)
    params = parameters()
    for one, other in zip(
        *(jax.tree.leaves(each.update(gradients(0), each.init(params), params)[0]) for each in (tx, reference)),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, rtol=0, atol=2.0**-20)


def test_lookahead_is_refused_for_16_bit_weights_alone() -> None:
    params = optax.LookaheadParams.init_synced(parameters())
    with pytest.raises(OptimizerError, match=r'lookahead takes two sets of weights.*"bf16-mixed"'):
        optax.lookahead(dj.masters(INNER, "bf16"), 5, 0.5).init(params)
    tx = optax.lookahead(dj.masters(INNER, "bf16-mixed"), 5, 0.5)
    assert jax.tree.leaves(tx.update(gradients(0), tx.init(params), params)[0])


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_a_transformation_after_masters_is_exact_or_refused(name: str) -> None:
    after = TRANSFORMATIONS[name]
    tx = optax.chain(dj.masters(INNER, "bf16"), after)
    if after.update.__qualname__.startswith(("identity.", "named_chain.")):
        assert_exact(tx, INNER)
        return
    with pytest.raises(OptimizerError, match=r"optax\.\S+ stands after masters in a chain.*; put it inside, masters\("):
        train(tx, steps=1)
    nested = optax.named_chain(("one", optax.chain(dj.masters(INNER, "bf16"))), ("two", after))
    with pytest.raises(OptimizerError, match="stands after masters in a chain"):
        jax.jit(nested.update)(gradients(0), nested.init(parameters()), dj.cast(parameters(), "bf16"))


@pytest.mark.parametrize(
    "after",
    [
        optax.freeze(MASK),
        optax.masked(optax.set_to_zero(), MASK),
        optax.masked(optax.set_to_zero(), lambda params: MASK),
        optax.masked(optax.scale(0.5), MASK),
        optax.partition({"a": optax.set_to_zero(), "b": optax.identity()}, LABELS),
        optax.chain(optax.identity(), optax.trace(0.5)),
    ],
)
def test_what_stops_a_weight_and_not_its_master_is_refused(after: optax.GradientTransformation) -> None:
    with pytest.raises(OptimizerError, match=r"stands after masters.*; put it inside, masters\(optax.chain"):
        train(optax.chain(dj.masters(INNER, "bf16"), after))
    assert_exact(dj.masters(optax.chain(INNER, after), "bf16"), optax.chain(INNER, after))


def test_a_freeze_of_fp32_weights_may_stand_after_masters() -> None:
    freeze = optax.freeze({"dense": False, "LayerNorm_0": True})
    assert_exact(optax.chain(dj.masters(INNER, "bf16"), freeze), optax.chain(INNER, freeze))


def test_a_function_of_ones_own_may_pass_updates_on() -> None:
    own = optax.stateless(lambda updates, params: updates)
    assert_exact(optax.chain(dj.masters(INNER, "bf16"), own), INNER)
    with pytest.raises(OptimizerError, match="can only be added to them"):
        train(
            optax.chain(
                dj.masters(INNER, "bf16"), optax.stateless(lambda updates, params: optax.tree.scale(2.0, updates))
            )
        )
