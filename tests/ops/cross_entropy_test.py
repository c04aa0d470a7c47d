"""Cross-entropy by chunks against float64 and optax, and what never stands in memory."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import relative

from mla_jax import linear_cross_entropy

D, W = 12, 37
EPS = {"float32": 2.0**-23, "bfloat16": 2.0**-7}  # spacing of numbers at 1


def problem(rng, lead=(3, 7), dtype=jnp.float32):
    """Hidden states, kernel, labels and the weights of a sum of losses, one in four of them 0."""
    hidden = jnp.asarray(2 * rng.standard_normal((*lead, D)), dtype)
    kernel = jnp.asarray(rng.standard_normal((D, W)), dtype)
    labels = jnp.asarray(rng.integers(0, W, lead), jnp.int32)
    weights = jnp.asarray(rng.uniform(0.5, 1.5, lead) * (rng.random(lead) > 0.25), jnp.float32)
    return hidden, kernel, labels, weights


def exact(hidden, kernel, labels, weights, scale):
    """Losses, and gradients of their weighted sum, in float64."""
    h, k = np.asarray(hidden, np.float64), np.asarray(kernel, np.float64)
    logits = scale * h @ k
    top = logits.max(-1, keepdims=True)
    lse = np.log(np.exp(logits - top).sum(-1, keepdims=True)) + top
    chosen = np.eye(W)[np.asarray(labels)]
    slopes = (np.exp(logits - lse) - chosen) * np.asarray(weights, np.float64)[..., None] * scale
    of_kernel = h.reshape(-1, D).T @ slopes.reshape(-1, W)
    return (lse - logits)[chosen == 1].reshape(labels.shape), slopes @ k.T, of_kernel


def weighted(hidden, kernel, labels, weights, **options):
    losses = linear_cross_entropy(hidden, kernel, labels, **options)
    return (weights * losses).sum(), losses


both = jax.jit(
    jax.value_and_grad(weighted, argnums=(0, 1), has_aux=True),
    static_argnames=("scale", "chunk", "precision"),
)


@pytest.mark.parametrize(
    ("lead", "chunk", "scale"),
    [((3, 7), 7, 0.7), ((3, 7), 2, 1.0), ((11,), 2048, 1.0)],
    ids=["padded chunks, scaled", "more rows than a chunk", "flat, one chunk"],
)
def test_losses_and_gradients_are_float64s_and_optaxs(rng, lead, chunk, scale):
    hidden, kernel, labels, weights = problem(rng, lead)
    losses, of_hidden, of_kernel = exact(hidden, kernel, labels, weights, scale)
    options = {"scale": scale, "chunk": chunk, "precision": "highest"}
    (_, got), slopes = both(hidden, kernel, labels, weights, **options)
    # A sum of n float32 products is off by n half spacings of the sum of their sizes at most.
    size = np.abs(np.asarray(hidden, np.float64)) @ np.abs(np.asarray(kernel, np.float64))
    bound = (D + W) * EPS["float32"] / 2 * size.max() * scale
    assert np.abs(np.asarray(got, np.float64) - losses).max() < bound
    # A share's relative error is its logit's absolute one, twice: in it and in lse.
    assert relative(slopes[0], of_hidden) < 2 * bound + W * EPS["float32"]
    assert relative(slopes[1], of_kernel) < 2 * bound + math.prod(lead) * EPS["float32"]

    def usual(hidden, kernel):
        logits = scale * jnp.einsum("...d,dw->...w", hidden, kernel, precision="highest")
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return (weights * losses).sum(), losses

    usual = jax.jit(jax.value_and_grad(usual, argnums=(0, 1), has_aux=True))
    (_, expected), of_usual = usual(hidden, kernel)
    np.testing.assert_allclose(got, expected, atol=2 * bound)
    assert relative(slopes[0], of_usual[0]) < 4 * bound
    assert relative(slopes[1], of_usual[1]) < 4 * bound


def test_bfloat16_sums_in_float32(rng):
    """Logits and losses are exact but for float32; gradients are rounded once or twice."""
    hidden, kernel, labels, weights = problem(rng, (4, 64), jnp.bfloat16)
    losses, of_hidden, of_kernel = exact(hidden, kernel, labels, weights, 1.0)
    (_, got), slopes = both(hidden, kernel, labels, weights, chunk=32)
    assert got.dtype == jnp.float32
    assert np.abs(np.asarray(got, np.float64) - losses).max() < 1e-4
    assert slopes[0].dtype == slopes[1].dtype == jnp.bfloat16
    # Summed over chunks in bfloat16, eight roundings would show.
    assert relative(slopes[0], of_hidden) < EPS["bfloat16"]
    assert relative(slopes[1], of_kernel) < EPS["bfloat16"] / 2
    wide = both(hidden, kernel.astype(jnp.float32), labels, weights, chunk=32)[1][1]
    assert wide.dtype == jnp.float32


def arrays_of(jaxpr):
    """Every array that a program makes, its inner programs' too."""
    for equation in jaxpr.eqns:
        yield from (var.aval for var in equation.outvars)
        for inner in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(inner, "jaxpr", inner)  # a closed one has its program inside
            yield from arrays_of(inner) if hasattr(inner, "eqns") else ()


def test_the_logits_never_stand_whole(rng):
    tokens, words, chunk = 512, 1000, 32
    shapes = [((2, tokens // 2, 8), jnp.bfloat16), ((8, words), jnp.float32)]
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    arguments += [jax.ShapeDtypeStruct((2, tokens // 2), t) for t in (jnp.int32, jnp.float32)]
    step = lambda *a: jax.grad(weighted, argnums=(0, 1), has_aux=True)(*a, chunk=chunk)  # noqa: E731
    largest = max(array.size for array in arrays_of(jax.make_jaxpr(step)(*arguments).jaxpr))
    assert largest <= chunk * words
    memory = jax.jit(step).lower(*arguments).compile().memory_analysis()
    assert memory.temp_size_in_bytes < tokens * words * 4 / 2


def test_under_shard_map_rows_are_apart_and_the_kernels_gradient_is_the_sum(rng):
    hidden, kernel, labels, weights = problem(rng, (4, 5))
    mesh = jax.make_mesh((2,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.P("rows")

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=(rows, jax.P(), rows, rows), out_specs=(rows, jax.P()))
    def step(hidden, kernel, labels, weights):
        of = lambda hidden, kernel: weighted(hidden, kernel, labels, weights, chunk=4)[0]  # noqa: E731
        return jax.grad(of, argnums=(0, 1))(hidden, kernel)

    expected = both(hidden, kernel, labels, weights)[1]
    for got, want in zip(step(hidden, kernel, labels, weights), expected, strict=True):
        assert relative(got, want) < 1e-5


def test_on_a_mesh_rows_and_words_may_be_split(rng):
    """Explicit axes: gradients lie where their arrays lie."""
    hidden, kernel, labels, weights = problem(rng, (4, 5))
    kernel = jnp.pad(kernel, [(0, 0), (0, 1)])
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    expected = both(hidden, kernel, labels, weights)[1]
    with jax.set_mesh(mesh):
        arrays = (hidden, jax.P("x")), (kernel, jax.P(None, "y")), (labels, jax.P("x"))
        placed = [jax.device_put(array, spec) for array, spec in arrays]
        got = both(*placed, jax.device_put(weights, jax.P("x")), chunk=4)[1]
    assert [jax.typeof(array).sharding.spec for array in got] == [
        jax.P("x", None, None), jax.P(None, "y")
    ]  # fmt: skip
    for one, want in zip(got, expected, strict=True):
        assert relative(one, want) < 1e-5


def test_a_label_that_is_no_word_is_an_error_or_nan_and_may_be_left_out(rng):
    hidden, kernel, labels, _ = problem(rng)
    wrong = labels.at[1, 2].set(-100).at[0, 0].set(W)
    with pytest.raises(ValueError, match="labels has 37: the head has 37 words"):
        linear_cross_entropy(hidden, kernel, wrong)
    valid = (wrong >= 0) & (wrong < W)
    left_out = lambda losses: jnp.where(valid, losses, 0).sum()  # noqa: E731

    @jax.jit
    @jax.value_and_grad
    def step(hidden, wrong):
        return left_out(linear_cross_entropy(hidden, kernel, wrong))

    losses = jax.jit(linear_cross_entropy)(hidden, kernel, wrong)
    np.testing.assert_array_equal(jnp.isnan(losses), ~valid)
    value, slopes = step(hidden, wrong)
    assert float(value) == pytest.approx(float(left_out(losses)))
    assert bool(jnp.isfinite(slopes).all())
    assert bool((slopes[1, 2] == 0).all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": jnp.ones((5, W))}, r"hidden has shape \(3, 7, 12\) and kernel \(5, 37\)"),
        ({"labels": jnp.zeros((3, 6), int)}, r"labels is int32 of shape \(3, 6\)"),
        ({"labels": jnp.zeros((3, 7))}, r"labels is float32"),
        ({"hidden": jnp.zeros((3, 7, 12), int)}, "hidden is int32: it must be floating"),
        ({"chunk": 0}, "chunk=0"),
    ],
    ids=["kernel", "labels", "label dtype", "hidden dtype", "chunk"],
)
def test_bad_arguments_are_named(rng, change, message):
    names = ("hidden", "kernel", "labels")
    given = dict(zip(names, problem(rng)[:3], strict=True)) | change
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**given)
