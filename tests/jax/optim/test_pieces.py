"""Updates in pieces: the numbers of the whole in less memory, and no pieces where they would harm."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import duotone.jax as dj
from duotone.jax import primitives
from duotone.jax.optim import elementwise, pieces

# one that is not a number of pieces, and what a tree of parameters has besides
SHAPES = {"large": (37, 31), "bias": (7,), "empty": (0, 3), "scalar": ()}


@pytest.fixture
def in_pieces(monkeypatch):
    """Return a function that turns pieces, here of 64 elements, on and off, whatever devices this process has."""
    monkeypatch.setattr(pieces, "_SMALLEST_PIECE", 64)

    def turn(are_on: bool) -> None:
        monkeypatch.setattr(pieces, "are_possible", lambda: are_on)

    return turn


def trained(inner, policy, steps=3, **settings):
    """Return masters and state after some steps of which the second overflows, and the program of a step."""
    generator = np.random.default_rng(0)
    params = {name: jnp.asarray(generator.standard_normal(shape), jnp.float32) for name, shape in SHAPES.items()}
    params["norm"] = jnp.ones(16)
    tx = dj.masters(inner, f"{policy}; norm: param=float32", **settings)
    state = tx.init(params)
    params = dj.cast(params, f"{policy}; norm: param=float32")

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def drawn(leaf):
        return generator.standard_normal(leaf.shape).astype(leaf.dtype if policy == "bf16" else jnp.float32)

    lowered = jax.jit(step).lower(params, state, jax.tree.map(drawn, params))
    compiled = lowered.compile()
    for index in range(steps):
        grads = jax.tree.map(drawn, params)
        if index == 1:
            grads["bias"][0] = np.inf
        params, state = compiled(params, state, grads)
    return dj.master_weights(params, state), state, lowered.as_text()


def without_empty(params):
    return jax.tree.map(lambda leaf: "muon" if leaf.size else "adam", params)


def test_pieces_are_for_one_device_alone():
    assert pieces.are_possible() == (jax.device_count() == 1)


@pytest.mark.parametrize(
    ("inner", "policy", "settings"),
    [
        (optax.adamw(optax.cosine_decay_schedule(1e-2, 10)), "bf16", {}),
        (optax.sgd(0.1, momentum=0.9), "fp16", {"clip_norm": 1.0}),
        pytest.param(optax.chain(optax.clip_by_global_norm(0.1), optax.lamb(1e-2)), "fp16", {}, marks=pytest.mark.slow),
        pytest.param(optax.adam(1e-2, mu_dtype=jnp.bfloat16), "bf16", {}, marks=pytest.mark.slow),
        pytest.param(optax.lion(1e-3), "bf16", {"clip_norm": 1.0}, marks=pytest.mark.slow),
        pytest.param(optax.adafactor(1e-2), "bf16", {}, marks=pytest.mark.slow),
        # Muon itself divides by the lengths of each matrix
        pytest.param(
            optax.partition({"muon": optax.contrib.muon(1e-2), "adam": optax.adam(1e-2)}, without_empty),
            "fp16",
            {},
            marks=pytest.mark.slow,
        ),
        pytest.param(optax.contrib.schedule_free_adamw(1e-2), "bf16", {}, marks=pytest.mark.slow),
    ],
)
def test_pieces_give_what_the_whole_gives(in_pieces, inner, policy, settings):
    in_pieces(False)
    masters, state, _ = trained(inner, policy, **settings)
    in_pieces(True)
    again, state_again, program = trained(inner, policy, **settings)
    assert "stablehlo.while" in program
    assert int(state_again.loss_scale.skipped) == 1
    for one, other in zip(jax.tree.leaves((masters, state)), jax.tree.leaves((again, state_again)), strict=True):
        assert (one.dtype, one.shape, one.weak_type) == (other.dtype, other.shape, other.weak_type)
        if one.dtype != jnp.int16:
            # XLA's CPU compiler contracts other multiply-adds in other loops; a moment in BF16 is rounded after that
            rtol = 2.0**-7 if one.dtype == jnp.bfloat16 else 1e-5
            np.testing.assert_allclose(np.asarray(one, np.float64), np.asarray(other, np.float64), rtol=rtol, atol=3e-7)


def bytes_for_each_parameter(tx, policy, shapes, grad_dtype):
    """Return the bytes of arguments and of what XLA needs besides, for one step with donated weights and state."""
    params = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    state = jax.eval_shape(tx.init, params)
    if policy is not None:
        params = jax.eval_shape(lambda params: dj.cast(params, policy), params)
    grads = [jax.ShapeDtypeStruct(shape, grad_dtype) for shape in shapes]

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    memory = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, grads).compile().memory_analysis()
    count = sum(int(np.prod(shape)) for shape in shapes)
    assert memory.alias_size_in_bytes >= 12 * count
    return memory.argument_size_in_bytes / count, memory.temp_size_in_bytes / count


@pytest.mark.parametrize(
    ("policy", "clip_norm", "grad_dtype", "shapes"),
    [
        ("bf16", None, jnp.bfloat16, [(512, 512)]),
        pytest.param("fp16", 1.0, jnp.float32, [(511, 513)], marks=pytest.mark.slow),
        pytest.param("bf16", 1.0, jnp.bfloat16, [(128, 256)] * 8, marks=pytest.mark.slow),
        pytest.param("fp16", 1.0, jnp.float32, [(128, 256)] * 8, marks=pytest.mark.slow),
        pytest.param("bf16", None, jnp.bfloat16, [(64, 64)] * 32 + [(3,)] * 32, marks=pytest.mark.slow),
    ],
    ids=["one-bf16", "one-fp16", "eight-bf16", "eight-fp16", "many-bf16"],
)
def test_adamw_takes_14_bytes_for_each_parameter_and_at_most_one_more_than_fp32_besides(
    monkeypatch, in_pieces, policy, clip_norm, grad_dtype, shapes
):
    monkeypatch.setattr(pieces, "_SMALLEST_PIECE", 1 << 12)
    inner = optax.adamw(1e-3)
    float32_arguments, float32_besides = bytes_for_each_parameter(inner, None, shapes, jnp.float32)
    assert float32_arguments == pytest.approx(16, rel=1e-3)
    tx = dj.masters(inner, policy, clip_norm=clip_norm)
    in_pieces(True)
    arguments, besides = bytes_for_each_parameter(tx, policy, shapes, grad_dtype)
    assert arguments == pytest.approx(12 + jnp.dtype(grad_dtype).itemsize, rel=2e-3)
    assert besides <= float32_besides + 1
    if len(shapes) == 1:
        # and this would be seen
        in_pieces(False)
        assert bytes_for_each_parameter(tx, policy, shapes, grad_dtype)[1] > float32_besides + 4


def test_the_norm_is_one_loop_over_all_arrays_and_an_update_two_for_each(in_pieces):
    in_pieces(True)

    def loops(count):
        tx = dj.masters(optax.adamw(1e-3), "bf16")
        params = [jax.ShapeDtypeStruct((16, 16), jnp.float32)] * count
        state = jax.eval_shape(tx.init, params)
        params = jax.eval_shape(lambda params: dj.cast(params, "bf16"), params)
        return jax.jit(tx.update).trace(params, state, params).lower().as_text().count("stablehlo.while")

    # what compiling takes goes by their number
    assert [loops(count) for count in (1, 2, 6)] == [3, 5, 13]


def test_no_piece_is_updated_twice_where_sections_reach_behind_the_end(in_pieces):
    """512 elements are 8 pieces, in sections of 3: a ninth would begin where the eighth does."""
    weights = []
    for are_on in (False, True):
        in_pieces(are_on)
        params = dj.cast({"kernel": jnp.ones((16, 32))}, "bf16")
        tx = dj.masters(optax.sgd(0.25), "bf16")
        updates, _ = jax.jit(tx.update)({"kernel": jnp.ones((16, 32), jnp.bfloat16)}, tx.init(params), params)
        weights.append(np.asarray(optax.apply_updates(params, updates)["kernel"], np.float32))
    np.testing.assert_array_equal(weights[1], np.full((16, 32), 0.75))
    np.testing.assert_array_equal(*weights)


def test_a_program_for_another_platform_has_no_pieces(in_pieces):
    in_pieces(True)
    tx = dj.masters(optax.adam(1e-3), "bf16")
    params = {"w": jnp.ones((64, 64))}
    state = tx.init(params)
    params = dj.cast(params, "bf16")
    traced = jax.jit(tx.update).trace(params, state, params)
    for platform, has_loop in (("cpu", True), ("cuda", False), ("tpu", False)):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("stablehlo.while" in text) == has_loop
        assert "stablehlo.custom_call" not in text


def test_derivatives_and_vmap_go_through_an_update_in_pieces(in_pieces):
    def moved(rate, gradient):
        tx = dj.masters(optax.sgd(rate), "bf16; norm: param=float32")
        masters = {"w": jnp.ones((8, 32)), "norm": jnp.ones(8)}
        params = dj.cast(masters, "bf16; norm: param=float32")
        grads = {"w": jnp.full((8, 32), gradient, jnp.bfloat16), "norm": jnp.full(8, gradient)}
        updates, state = tx.update(grads, tx.init(masters), params)
        new = optax.apply_updates(params, updates)
        return new["norm"].sum(), dj.master_weights(new, state)["w"]

    in_pieces(True)
    rates = jnp.array([0.25, 0.5])
    _, masters = jax.jit(jax.vmap(moved, (0, None)))(rates, 0.5)
    np.testing.assert_array_equal(masters[:, 0, 0], 1 - 0.5 * rates)
    slope = jax.jit(jax.grad(moved, has_aux=True))(0.25, 0.5)[0]
    np.testing.assert_allclose(slope, -8 * 0.5)


def test_what_moves_elements_or_sums_them_is_not_taken_for_elementwise():
    square = jnp.ones((4, 4))
    for function in (jnp.transpose, jnp.cumsum, jnp.sort, jnp.flip, lambda x: x @ x, jax.nn.softmax, jnp.linalg.inv):
        jaxpr = jax.make_jaxpr(function)(square).jaxpr
        jaxpr = jax.make_jaxpr(lambda x, jaxpr=jaxpr: elementwise.flattened(jaxpr, [x]))(square).jaxpr
        parts = elementwise.find_parts(jaxpr, [True])
        # what is read is not what the function was given
        assert all(jaxpr.invars[0] not in part.arrays or len(part.arrays) > 1 for part in parts)


def test_elementwise_primitives_are_those_of_families_that_are_so():
    elements = {"remainder", "exponential", "steep", "mixed_operands", "quantization", "number", "bound", "cast"}
    known = {name for name, family in primitives.families().items() if family in elements}
    known |= primitives.POINTWISE | primitives.COMPARISONS | primitives.INTEGER
    # copies, what reads a bit pattern, and the sum of two cotangents
    assert elementwise.ELEMENTWISE - known == {"add_any", "bitcast_convert_type", "copy", "real", "stop_gradient"}
    # those of the families that look along a dimension, or make what no operand has the shape of
    assert {"argmax", "argmin", "iota", "random_bits", "reduce_and"}.isdisjoint(elementwise.ELEMENTWISE)
