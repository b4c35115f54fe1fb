"""Updates as kernels for TPUs: the same bits in Pallas's interpreter, one kernel in a program for a TPU, else none."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import duotone.jax as dj
from duotone.jax.optim import pieces, tpu_kernel

# two blocks of rows, the last of them not full; dimensions in front; and what stays with XLA
SHAPES = {"two": (48, 256), "more": (3, 16, 128), "odd": (48, 200), "flat": (4096,), "bias": (7,)}
IN_KERNELS = ("two", "more")


@pytest.fixture
def in_kernels(monkeypatch):
    """Make updates kernels, of small arrays and in small blocks too, whatever devices this process has."""
    monkeypatch.setattr(tpu_kernel, "_ELEMENTS", 1 << 13)
    monkeypatch.setattr(tpu_kernel, "_LEAST", 1 << 12)
    monkeypatch.setattr(pieces, "are_possible", lambda: False)
    monkeypatch.setattr(pieces, "kernels_are_possible", lambda: True)


@pytest.fixture
def interpreted(monkeypatch, in_kernels):
    """Run those kernels in Pallas's interpreter, on this CPU, and count them."""
    found = set()
    update = tpu_kernel.update

    def counted(part, *rest):
        found.add(part.shape)
        return update(part, *rest, interpret=True)

    monkeypatch.setattr(tpu_kernel, "update", counted)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *operands, default, tpu: tpu(*operands))
    return found


def after_steps(inner, policy="bf16", **settings):
    """Return masters and state after three steps of which the second overflows."""
    generator = np.random.default_rng(0)
    params = {name: jnp.asarray(generator.standard_normal(shape), jnp.float32) for name, shape in SHAPES.items()}
    tx = dj.masters(inner, policy, **settings)
    state = tx.init(params)
    params = dj.cast(params, policy)

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for index in range(3):
        grads = {name: jnp.asarray(generator.standard_normal(shape), jnp.bfloat16) for name, shape in SHAPES.items()}
        if index == 1:
            grads["bias"] = grads["bias"].at[0].set(jnp.inf)
        params, state = step(params, state, grads)
    return params, state


def test_a_kernel_gives_the_bits_of_the_whole(request):
    # powers of two, so that whichever way XLA contracts multiply-adds nothing is rounded otherwise
    inner = optax.sgd(2.0**-6, momentum=0.5)
    expected = after_steps(inner)
    shapes = request.getfixturevalue("interpreted")
    found = after_steps(inner)
    assert shapes == {SHAPES[name] for name in IN_KERNELS}
    assert int(found[1].loss_scale.skipped) == 1
    jax.tree.map(lambda *both: np.testing.assert_array_equal(*both, strict=True), expected, found)


@pytest.mark.slow
def test_adamw_in_a_kernel_is_adamw(request):
    inner = optax.adamw(optax.cosine_decay_schedule(1e-2, 10))
    (params, state), _ = after_steps(inner), request.getfixturevalue("interpreted")
    found, found_state = after_steps(inner)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=3e-7)
    jax.tree.map(close, dj.master_weights(params, state), dj.master_weights(found, found_state))
    jax.tree.map(close, state.inner, found_state.inner)


def program_for_a_tpu(function, *arguments):
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",)).as_text()


def step_of(inner, policy, shapes, dtype=jnp.bfloat16):
    """Return an update, and what it takes, as shapes and dtypes."""
    tx = dj.masters(inner, policy)
    params = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    state = jax.eval_shape(tx.init, params)
    grads = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    return tx.update, grads, state, jax.eval_shape(lambda params: dj.cast(params, policy), params)


def test_a_program_for_a_tpu_has_one_kernel_for_an_array(in_kernels):
    text = program_for_a_tpu(*step_of(optax.adamw(1e-3), "bf16", SHAPES.values()))
    assert text.count("@tpu_custom_call(") == len(IN_KERNELS)
    # weight, tail and two moments, each in its own place
    assert text.count("#stablehlo.output_operand_alias<") == 4 * len(IN_KERNELS)


def of_every_primitive(x):
    """Return an elementwise function of an array that has every primitive which kernels are to take."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    bits = ((bits << 1) >> 2) | jax.lax.shift_right_logical(bits, 1)
    small = (x > 1) | ~(x >= 2) & (x < 3) ^ (x <= 4)
    either = jnp.where(small & (x != 5), jax.lax.clamp(-1.0, x, 1.0), jnp.exp(-x) / jnp.log1p(jnp.abs(x)))
    either = jnp.where(jnp.isfinite(either), either, jax.lax.integer_pow(x, 3) + jnp.tanh(jax.nn.sigmoid(x)))
    other = jnp.minimum(jnp.log(x), jax.lax.rsqrt(x)) - jnp.maximum(jnp.sqrt(x), jnp.square(x))
    return jnp.where(x == 0, either * other, bits.astype(jnp.float32))


def test_every_primitive_that_a_kernel_is_to_take_can_be_lowered(in_kernels):
    names = {equation.primitive.name for equation in jax.make_jaxpr(of_every_primitive)(jnp.ones(2)).eqns}
    own = {"add", "broadcast_in_dim", "convert_element_type", "select_n", "shift_right_arithmetic"}
    called = {"jit", "pjit", "logistic"}
    assert names - called | own == tpu_kernel.KNOWN - {"logistic"}
    inner = optax.chain(optax.stateless(lambda updates, _: jax.tree.map(of_every_primitive, updates)), optax.sgd(0.1))
    text = program_for_a_tpu(*step_of(inner, "bf16", [(48, 256)]))
    assert text.count("@tpu_custom_call(") == 1


def test_what_a_kernel_cannot_have_stays_with_xla(in_kernels):
    erf = optax.stateless(lambda updates, _: jax.tree.map(jax.lax.erf, updates))
    for inner, policy, dtype in [(optax.adamw(1e-3), "fp16", jnp.float32), (erf, "bf16", jnp.bfloat16)]:
        text = program_for_a_tpu(*step_of(inner, policy, [(48, 256)], dtype))
        assert "@tpu_custom_call(" not in text


def test_programs_for_other_platforms_and_derivatives_have_no_kernel(in_kernels):
    update, *arguments = step_of(optax.adamw(1e-3), "bf16", [(48, 256)])
    traced = jax.jit(update).trace(*arguments)
    for platform in ("cpu", "cuda"):
        assert "custom_call" not in traced.lower(lowering_platforms=(platform,)).as_text()

    def moved(rate):
        tx = dj.masters(optax.sgd(rate), "bf16")
        masters = {"w": jnp.ones((48, 256))}
        params = dj.cast(masters, "bf16")
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(masters), params)
        return dj.master_weights(optax.apply_updates(params, updates), state)["w"].sum()

    assert jax.jit(jax.grad(moved))(0.5) == -48 * 256
    assert "@tpu_custom_call(" in program_for_a_tpu(moved, 0.5)


def test_vmap_makes_one_kernel_of_several(in_kernels):
    update, *arguments = step_of(optax.adamw(1e-3), "bf16", [(48, 256)])
    stacked = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((3, *leaf.shape), leaf.dtype), arguments)
    assert program_for_a_tpu(jax.vmap(update), *stacked).count("@tpu_custom_call(") == 1


@pytest.mark.parametrize(
    ("platform", "devices", "are_possible"), [("tpu", 1, True), ("tpu", 4, False), ("gpu", 1, False)]
)
def test_kernels_wait_for_one_tpu(monkeypatch, platform, devices, are_possible):
    assert not pieces.kernels_are_possible()
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    assert pieces.kernels_are_possible() == are_possible
