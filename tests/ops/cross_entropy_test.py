"""Cross-entropy by chunks against float64 and optax, and what never stands in memory."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import relative

from mla_jax import linear_cross_entropy, mean_linear_cross_entropy

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


@pytest.mark.parametrize(
    ("lead", "chunk", "dtype"),
    [((3, 7), 7, "float32"), ((3, 7), 2, "float32"), ((4, 64), 32, "bfloat16")],
    ids=["padded chunks", "more rows than a chunk", "bfloat16"],
)
def test_the_mean_makes_the_same_gradients_with_the_loss(rng, lead, chunk, dtype):
    """Against float64, with a factor behind the mean, and labels that may be left out."""
    hidden, kernel, labels, weights = problem(rng, lead, jnp.dtype(dtype))
    counted, factor = weights > 0, 3.0
    mean_of = counted / counted.sum()
    losses, of_hidden, of_kernel = exact(hidden, kernel, labels, factor * mean_of, 0.7)
    wrong = jnp.where(counted, labels, -1)

    @jax.jit
    def step(hidden, kernel, labels, counted):
        options = {"scale": 0.7, "chunk": chunk, "precision": "highest"}

        def mean(hidden, kernel):
            return factor * mean_linear_cross_entropy(hidden, kernel, labels, counted, **options)

        return jax.value_and_grad(mean, argnums=(0, 1))(hidden, kernel), mean(hidden, kernel)

    (loss, slopes), alone = step(hidden, kernel, wrong, counted)
    size = np.abs(np.asarray(hidden, np.float64)) @ np.abs(np.asarray(kernel, np.float64))
    bound = (D + W) * EPS["float32"] / 2 * size.max()
    want = factor * (losses * np.asarray(mean_of)).sum()
    for value in (loss, alone):
        assert abs(float(value) - want) < factor * bound
    # A share's relative error is its logit's, twice; what bfloat16 holds is rounded to half a
    # spacing, slopes before their products and the result after them.
    rounded = 0 if dtype == "float32" else EPS["bfloat16"]
    for got, expected in zip(slopes, (of_hidden, of_kernel), strict=True):
        assert got.dtype == jnp.dtype(dtype)
        assert relative(got, expected) < 2 * bound + 256 * EPS["float32"] + rounded
    assert bool(jnp.isnan(step(hidden, kernel, wrong, jnp.ones(lead, bool))[0][0]))
    with pytest.raises(ValueError, match="labels has -1"):
        mean_linear_cross_entropy(hidden, kernel, wrong)
    with pytest.raises(ValueError, match=r"counted has shape \(2,\)"):
        mean_linear_cross_entropy(hidden, kernel, labels, jnp.ones(2, bool))


def test_the_mean_of_no_token_is_nothing(rng):
    hidden, kernel, labels, weights = problem(rng)
    loss, slope = jax.value_and_grad(mean_linear_cross_entropy)(
        hidden, kernel, labels, jnp.zeros_like(weights, bool)
    )
    assert float(loss) == 0
    assert not bool(slope.any())


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
    mean = lambda *a: mean_linear_cross_entropy(*a[:3], a[3] > 0, chunk=chunk)  # noqa: E731
    for program in (step, jax.grad(mean, argnums=(0, 1))):
        arrays = arrays_of(jax.make_jaxpr(program)(*arguments).jaxpr)
        assert max(array.size for array in arrays) <= chunk * words
        memory = jax.jit(program).lower(*arguments).compile().memory_analysis()
        assert memory.temp_size_in_bytes < tokens * words * 4 / 2


def products_of(jaxpr):
    """The shapes of the results of matrix products."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation.outvars[0].aval.shape
        for inner in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(inner, "jaxpr", inner)
            yield from products_of(inner) if hasattr(inner, "eqns") else ()


def test_the_mean_takes_three_products():
    arguments = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((8, D), (D, W))]
    labels = jax.ShapeDtypeStruct((8,), jnp.int32)
    of = {3: mean_linear_cross_entropy, 4: lambda *a: linear_cross_entropy(*a).mean()}
    for count, function in of.items():
        program = jax.make_jaxpr(jax.grad(function, argnums=(0, 1)))(*arguments, labels)
        assert len(list(products_of(program.jaxpr))) == count


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
        mean = jax.jit(jax.value_and_grad(
            lambda *a: mean_linear_cross_entropy(*a, placed[2], chunk=4), argnums=(0, 1)
        ))  # fmt: skip
        loss, of_mean = mean(*placed[:2])
    assert [jax.typeof(array).sharding.spec for array in got] == [
        jax.P("x", None, None), jax.P(None, "y")
    ]  # fmt: skip
    for one, want in zip(got, expected, strict=True):
        assert relative(one, want) < 1e-5
    (total, _), of_sum = both(hidden, kernel, labels, jnp.ones_like(weights))
    assert float(loss) == pytest.approx(float(total) / labels.size, rel=1e-5)
    for one, want in zip(of_mean, of_sum, strict=True):
        assert relative(one, want / labels.size) < 1e-5


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
