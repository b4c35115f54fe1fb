"""What a program saves for its backward pass when each of its segments is a checkpoint."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.extend import core
from jax.sharding import PartitionSpec

import duotone.jax as dj
from duotone.errors import AutocastError
from duotone.jax import primitives
from duotone.jax.casting.saving import check_save, run_saving, with_checkpoints
from duotone.jax.casting.segments import RECOMPUTED, segments_of

from .equations import counted
from .residuals import residual_bytes, residual_dtypes, residuals

TOKENS, CHANNELS, HEADS = 16, 32, 2
KEY = jax.random.key(0)
X = jax.random.normal(KEY, (TOKENS, CHANNELS))


def saving(function: Callable[..., Any], save: Any = "compute") -> Callable[..., Any]:
    """Return a function that saves for its backward pass what `save` says."""

    def saves(*args: Any) -> Any:
        tree = jax.tree.structure(jax.eval_shape(function, *args))

        def flat(*leaves: Any) -> list[Any]:
            return jax.tree.leaves(function(*jax.tree.unflatten(jax.tree.structure(args), leaves)))

        return jax.tree.unflatten(tree, run_saving(flat, jax.tree.leaves(args), save))

    return saves


def half(x: jax.Array) -> jax.Array:
    return x.astype(jnp.bfloat16)


def norm(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    x = x - x.mean(-1, keepdims=True)
    return half(x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5))


def block(weights: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """Return a pre-norm transformer block's result: products in BF16, norms, softmax and GELU in FP32."""
    heads = (TOKENS, HEADS, CHANNELS // HEADS)
    query, key, value = jnp.split(norm(x) @ half(weights["attention"]), 3, axis=-1)
    query, key, value = (part.reshape(heads).transpose(1, 0, 2) for part in (query, key, value))
    scores = (query @ key.swapaxes(1, 2)).astype(jnp.float32)
    scores = jnp.where(jnp.tri(TOKENS, dtype=bool), scores, -1e9)
    attended = half(jax.nn.softmax(scores)) @ value
    x = x + attended.transpose(1, 0, 2).reshape(x.shape) @ half(weights["projection"])
    hidden = (norm(x) @ half(weights["up"])).astype(jnp.float32)
    return x + half(jax.nn.gelu(hidden)) @ half(weights["down"])


def block_weights(layers: tuple[int, ...] = ()) -> dict[str, jax.Array]:
    c = CHANNELS
    shapes = {"attention": (c, 3 * c), "projection": (c, c), "up": (c, 4 * c), "down": (4 * c, c)}
    return {name: 0.1 * jax.random.normal(KEY, (*layers, *shape)) for name, shape in shapes.items()}


def block_loss(weights: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return block(weights, half(x)).astype(jnp.float32).sum()


def scanned_loss(weights: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return lax.scan(lambda h, w: (block(w, h), None), half(x), weights)[0].astype(jnp.float32).sum()


def unrolled_loss(weights: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    x = half(x)
    for layer in range(len(weights["up"])):
        x = block({name: w[layer] for name, w in weights.items()}, x)
    return x.astype(jnp.float32).sum()


# the results of products: attention 3 C, scores heads * tokens, attended C, projected C, hidden 4 C; input C
PER_TOKEN = 2 * (10 * CHANNELS + HEADS * TOKENS)


def assert_same(a: Any, b: Any) -> None:
    # XLA may fuse the same program in two ways, which differ in the last bits
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), a, b)


def test_a_block_saves_results_of_products_alone() -> None:
    args = (block_weights(), X)
    assert residual_dtypes(saving(block_loss), *args) <= {"bfloat16", "bool"}
    saved = residual_bytes(saving(block_loss), *args)
    assert saved <= TOKENS * PER_TOKEN + TOKENS * TOKENS
    assert saved < residual_bytes(block_loss, *args) / 4


@pytest.mark.parametrize("loss", [scanned_loss, unrolled_loss], ids=["scan", "unrolled"])
def test_layers_save_no_more_each(loss: Callable[..., jax.Array]) -> None:
    layers = 3
    args = (block_weights((layers,)), X)
    # the mask may be saved for each layer
    assert residual_bytes(saving(loss), *args) <= layers * (TOKENS * PER_TOKEN + TOKENS * TOKENS)


@pytest.mark.slow
@pytest.mark.parametrize("loss", [scanned_loss, unrolled_loss], ids=["scan", "unrolled"])
def test_gradients_of_layers_point_the_same_way(loss: Callable[..., jax.Array]) -> None:
    args = (block_weights((3,)), X)
    plain, saved = (
        np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(jax.jit(jax.grad(f))(*args))])
        for f in (loss, saving(loss))
    )
    assert plain @ saved > 0.9999 * np.linalg.norm(plain) * np.linalg.norm(saved)


@pytest.mark.parametrize("loss", [block_loss, scanned_loss], ids=["block", "scan"])
def test_no_product_is_computed_twice(loss: Callable[..., jax.Array]) -> None:
    args = (block_weights() if loss is block_loss else block_weights((3,)), X)
    plain, saved = (counted(jax.grad(f), *args) for f in (loss, saving(loss)))
    assert saved["dot_general"] == plain["dot_general"]
    assert saved["exp"] > plain["exp"]


def test_values_gradients_and_second_derivatives_are_the_same() -> None:
    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.tanh(jnp.exp(x @ w) @ w).sum()

    def derivatives(f: Callable[..., jax.Array]) -> Callable[..., Any]:
        def all_of_them(w: jax.Array, x: jax.Array) -> Any:
            by_row = jax.vmap(jax.grad(f), (None, 0))(w, x)
            return jax.value_and_grad(f)(w, x), jax.jvp(f, (w, x), (w, x)), by_row, jax.hessian(f)(w, x)

        return jax.jit(all_of_them)

    args = 0.1 * jax.random.normal(KEY, (3, 3)), X[:2, :3]
    assert_same(*(derivatives(f)(*args) for f in (loss, saving(loss))))


def test_dropout_saves_keys_and_no_masks() -> None:
    def f(w: jax.Array, x: jax.Array, key: jax.Array) -> jax.Array:
        for step in range(2):
            mask = jax.random.bernoulli(jax.random.fold_in(key, step), 0.5, x.shape)
            x = jnp.where(mask, half(x) @ half(w), 0) + x
        return x.sum()

    w = 0.1 * jax.random.normal(KEY, (CHANNELS, CHANNELS))
    assert_same(*(jax.jit(jax.value_and_grad(g))(w, X, KEY) for g in (f, saving(f))))
    shapes = [(aval.shape, str(aval.dtype)) for aval in residuals(saving(f), w, X, KEY)]
    assert (X.shape, "bool") in [(aval.shape, str(aval.dtype)) for aval in residuals(f, w, X, KEY)]
    assert all(shape != X.shape or dtype in ("bfloat16", "float32") for shape, dtype in shapes)


def test_own_checkpoint_stays_as_it_is() -> None:
    def inner(w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.tanh(jnp.tanh(x @ w) @ w)

    def f(w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.exp(jax.checkpoint(inner)(w, jnp.exp(x))).sum()

    w = 0.1 * jax.random.normal(KEY, (CHANNELS, CHANNELS))
    own = [eqn for eqn in jax.make_jaxpr(saving(f))(w, X).eqns if eqn.params.get("policy", 0) is None]
    assert [eqn.primitive.name for eqn in own] == ["remat2"]
    # both products again, as the checkpoint without a policy asks
    assert counted(jax.grad(saving(f)), w, X)["dot_general"] == counted(jax.grad(f), w, X)["dot_general"]
    assert_same(*(jax.grad(g)(w, X) for g in (f, saving(f))))


def test_custom_vjp_keeps_its_rule_and_residuals() -> None:
    @jax.custom_vjp
    def scale(x: jax.Array) -> jax.Array:
        return x * 2

    scale.defvjp(lambda x: (x * 2, x.astype(jnp.float16)), lambda saved, g: (g * 100 + saved.astype(jnp.float32),))

    def f(w: jax.Array, x: jax.Array) -> jax.Array:
        return scale(jnp.exp(x @ w)).sum()

    w = 0.1 * jax.random.normal(KEY, (CHANNELS, CHANNELS))
    assert_same(*(jax.grad(g)(w, X) for g in (f, saving(f))))
    assert "float16" in residual_dtypes(saving(f), w, X)


def test_effects_happen_once_and_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    def f(w: jax.Array, x: jax.Array) -> jax.Array:
        jax.debug.print("first {}", x[0, 0], ordered=True)
        h = jnp.exp(x @ w)
        jax.debug.print("second {}", h.shape[0], ordered=True)
        h = jnp.exp(h @ w)
        jax.debug.print("third {}", x[0, 1], ordered=True)
        return h.sum()

    w = jnp.zeros((CHANNELS, CHANNELS))
    jax.jit(jax.grad(saving(f)))(w, X)
    jax.effects_barrier()
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["first", "second", "third"]


def test_branches_loops_and_calls_inside_are_cut_too() -> None:
    def f(w: jax.Array, x: jax.Array) -> jax.Array:
        x = lax.cond(x.sum() > 0, lambda x: jnp.exp(jnp.sin(x @ w) @ w), lambda x: x, x)
        x = jax.jit(lambda x: jnp.sin(jnp.cos(x) @ w))(x)
        x = lax.fori_loop(0, 3, lambda _, x: jnp.sin(x @ w), x)
        return lax.map(lambda row: jnp.sin(row @ w), x).sum()

    w = 0.1 * jax.random.normal(KEY, (CHANNELS, CHANNELS))
    assert_same(*(jax.jit(jax.grad(g))(w, X) for g in (f, saving(f))))
    assert residual_bytes(saving(f), w, X) < residual_bytes(f, w, X)


def test_while_loops_and_integers_are_left_alone() -> None:
    def f(w: jax.Array, x: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array]:
        steps, _ = lax.while_loop(
            lambda c: c[1] < 1, lambda c: (c[0] + 1, c[1] + 0.3), (0, lax.stop_gradient(x[0, 0]) * 0)
        )
        return (jnp.exp(x @ w)[i] * steps).sum(), i @ i

    args = (jnp.ones((CHANNELS, CHANNELS)) / 99, X, jnp.array([1, 2]))
    assert_same(*(jax.value_and_grad(g, has_aux=True)(*args) for g in (f, saving(f))))


def test_collectives_under_shard_map_happen_once() -> None:
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

    def part(w: jax.Array, x: jax.Array) -> jax.Array:
        x = jnp.exp(lax.psum(jnp.sin(x @ w), "d") * (1 + lax.axis_index("d")))
        return lax.psum((jnp.sin(x) @ w).sum(), "d")

    inside = jax.shard_map(part, mesh=mesh, in_specs=(PartitionSpec(), PartitionSpec("d")), out_specs=PartitionSpec())
    outside = jax.shard_map(
        saving(part), mesh=mesh, in_specs=(PartitionSpec(), PartitionSpec("d")), out_specs=PartitionSpec()
    )
    w = 0.1 * jax.random.normal(KEY, (CHANNELS, CHANNELS))
    expected = jax.jit(jax.grad(inside))(w, X)
    for f in (saving(inside), outside):
        np.testing.assert_allclose(jax.jit(jax.grad(f))(w, X), expected, rtol=1e-5)
        name = next(n for n in counted(inside, w, X) if n.startswith("psum"))
        assert counted(jax.grad(f), w, X)[name] == counted(jax.grad(inside), w, X)[name]


def test_bodies_of_loops_have_no_barriers() -> None:
    def barriers(function: Callable[..., Any], *args: Any) -> int:
        return jax.jit(jax.grad(function)).lower(*args).as_text().count("optimization_barrier")

    assert barriers(saving(block_loss), block_weights(), X) > 0
    in_body = barriers(saving(unrolled_loss), block_weights((3,)), X) - barriers(
        saving(scanned_loss), block_weights((3,)), X
    )
    assert in_body > 2 * barriers(saving(scanned_loss), block_weights((3,)), X)


def test_saving_everything_is_plain_jax() -> None:
    args = (block_weights(), X)
    assert residual_bytes(saving(block_loss, "everything"), *args) == residual_bytes(block_loss, *args)
    assert counted(saving(block_loss, "everything"), *args)["remat2"] == 0


def test_a_policy_of_jax_is_carried_out() -> None:
    args = (block_weights(), X)
    assert residuals(saving(block_loss, jax.checkpoint_policies.nothing_saveable), *args) == []
    dots = jax.checkpoint_policies.dots_saveable
    assert residual_bytes(saving(block_loss, dots), *args) == residual_bytes(
        jax.checkpoint(block_loss, policy=dots), *args
    )


def test_other_words_are_refused() -> None:
    with pytest.raises(AutocastError, match="says nothing about the backward pass"):
        check_save("products")
    for save in ("compute", "everything", jax.checkpoint_policies.dots_saveable):
        check_save(save)


def test_segments_hold_every_equation_once_and_can_run() -> None:
    program = jax.make_jaxpr(jax.grad(block_loss))(block_weights(), X).jaxpr
    known, found = {*program.invars, *program.constvars}, []
    for segment in segments_of(program):
        for eqn in [*segment.together, *segment.apart]:
            assert known.issuperset(v for v in eqn.invars if not isinstance(v, core.Literal))
            known.update(eqn.outvars)
            found.append(id(eqn))
    assert sorted(found) == sorted(map(id, program.eqns))
    core.check_jaxpr(with_checkpoints(core.ClosedJaxpr(program, ())).jaxpr)


def test_sizes_may_be_symbolic() -> None:
    def f(w: jax.Array, x: jax.Array) -> jax.Array:
        product = half(x) @ half(w)
        return jnp.exp(product[:, :4].astype(jnp.float32)).sum() + jnp.sin(product.T.reshape(-1)).sum()

    rows, inner, columns = export.symbolic_shape("rows, inner, columns")
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((inner, columns), (rows, inner))]
    exported = export.export(jax.jit(jax.grad(saving(f))))(*shapes)
    assert exported.out_avals[0].shape == (inner, columns)


def test_no_tracer_leaks() -> None:
    with jax.checking_leaks():
        jax.jit(jax.grad(dj.autocast(lambda w, x: jnp.exp(x @ w).sum(), "bf16")))(jnp.ones((2, 2)), jnp.ones((2, 2)))


def test_no_primitive_is_recomputed_that_is_not_listed() -> None:
    assert primitives.known() >= RECOMPUTED
    families = ("exponential", "steep", "sum", "number", "bound")
    cheap = {name for name, family in primitives.families().items() if family in families} - {"polygamma"}
    assert not (cheap | primitives.POINTWISE | primitives.COMPARISONS) - RECOMPUTED
    products = "dot_general conv_general_dilated ragged_dot_general scatter-add sort top_k fft cholesky pallas_call"
    # sends something, has other numbers when it is run again, or is no one step
    others = "psum all_gather ppermute device_put rng_uniform random_gamma while scan"
    assert not RECOMPUTED & {*products.split(), *others.split()}


class TestUnderAutocast:
    """A block in FP32 that knows nothing of formats, as people write it, saves a sixth of FP32's bytes."""

    @staticmethod
    def loss(weights: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        heads = (TOKENS, HEADS, CHANNELS // HEADS)
        normed = jax.nn.standardize(x) * weights["gain"] + weights["shift"]
        query, key, value = jnp.split(normed @ weights["attention"] + weights["bias"], 3, axis=-1)
        query, key, value = (part.reshape(heads).transpose(1, 0, 2) for part in (query, key, value))
        scores = jnp.where(jnp.tri(TOKENS, dtype=bool), query @ key.swapaxes(1, 2) / heads[-1] ** 0.5, -1e9)
        attended = (jax.nn.softmax(scores) @ value).transpose(1, 0, 2).reshape(x.shape)
        x = x + attended @ weights["projection"] + weights["shift"]
        hidden = (jax.nn.standardize(x) * weights["gain"]) @ weights["up"]
        return (x + jax.nn.gelu(hidden) @ weights["down"] + weights["shift"]).sum()

    @staticmethod
    def args() -> tuple[dict[str, jax.Array], jax.Array]:
        weights = block_weights() | {"bias": jnp.ones(3 * CHANNELS)}
        return weights | {"gain": jnp.ones(CHANNELS), "shift": jnp.ones(CHANNELS)}, X

    @pytest.mark.parametrize("policy", ["bf16", "fp16"])
    def test_at_most_40_bytes_per_token_and_channel(self, policy: str) -> None:
        cast = dj.autocast(self.loss, policy)
        assert residual_dtypes(cast, *self.args()) == {dj.Policy.parse(policy).compute}
        per_token_and_channel = residual_bytes(cast, *self.args()) / X.size
        assert per_token_and_channel <= 20
        assert residual_bytes(self.loss, *self.args()) / X.size > 140
        assert residual_bytes(dj.autocast(self.loss, policy, save="everything"), *self.args()) / X.size > 140

    def test_no_product_is_computed_twice(self) -> None:
        plain, cast = (jax.grad(dj.autocast(self.loss, "bf16", save=save)) for save in ("everything", "compute"))
        assert counted(cast, *self.args())["dot_general"] == counted(plain, *self.args())["dot_general"]

    def test_a_checkpoint_around_computes_products_once_more(self) -> None:
        around = {save: jax.checkpoint(dj.autocast(self.loss, "bf16", save=save)) for save in ("everything", "compute")}
        assert residuals(around["compute"], *self.args()) == []
        products = {save: counted(jax.grad(function), *self.args())["dot_general"] for save, function in around.items()}
        assert products["compute"] <= products["everything"]

    def test_a_checkpoint_around_with_a_policy_saves_what_it_says(self) -> None:
        dots = jax.checkpoint(dj.autocast(self.loss, "bf16"), policy=jax.checkpoint_policies.dots_saveable)
        assert residual_bytes(dots, *self.args()) / X.size <= 40
        assert (
            counted(jax.grad(dots), *self.args())["dot_general"]
            == counted(jax.grad(self.loss), *self.args())["dot_general"]
        )
