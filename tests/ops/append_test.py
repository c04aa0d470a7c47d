"""A decode step's append by its kernels, interpreted on the CPU, against XLA's way."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import drawn, emptied, put, relative
from flax import nnx
from jax.experimental.pallas import mosaic_gpu as plgpu

import mla_jax
from mla_jax import target
from mla_jax.cache import PAGE, Dense, Paged, Scaled
from mla_jax.layers import maps
from mla_jax.layers.norm import RMSNorm
from mla_jax.ops import append
from mla_jax.ops.append import append_token

FP8 = "float8_e4m3fn"
SLOTS = 12
EPSILON = 1e-6


def problem(rng, shape=(4, 3, 128, 16), dtype=jnp.bfloat16, encoding=None, nope=None):
    """Operands of `append_token` but for epsilon; of B, N, R, P. The second token is dropped."""
    batch, heads, rank, rope = shape
    draw = lambda *shape: put(rng.standard_normal(shape), dtype)  # noqa: E731
    widths = {"latent": rank, "k_rope": rope}
    if encoding is None:
        store = Dense({name: draw(batch, SLOTS, width) for name, width in widths.items()})
    else:
        store = jax.eval_shape(lambda: Scaled.init(batch, SLOTS, widths, encoding, dtype))
        store = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), store)

    def marked(x):  # slots that nobody has written to hold anything, and keep it
        x = np.array(x)
        x[:, 1] = np.nan if jnp.issubdtype(x.dtype, jnp.inexact) else 0
        return jax.device_put(x)

    store = jax.tree.map(marked, store)
    place = rng.permutation(SLOTS)[:batch, None]
    place[1] = SLOTS
    place = put(place, np.int32)
    q_nope, q_rope = (draw(batch, 1, heads, width) for width in (nope or 2 * rope, rope))
    latent, k_rope = draw(batch, 1, rank), draw(batch, 1, rope)
    return q_nope, q_rope, 3 * latent, k_rope, draw(rank), store, place


def same(one, two):
    """Bit for bit, but for kinds of NaN, of which numpy knows none in 8 or 16 bits."""
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@jax.jit
def by_hand(q_nope, q_rope, latent, k_rope, scale, store, place):
    norm = RMSNorm(scale.size, epsilon=EPSILON, param_dtype=scale.dtype, rngs=nnx.Rngs(0))
    norm.scale.set_value(scale)
    return q_nope, q_rope, store.write(place, latent=norm(latent), k_rope=k_rope)


def by_kernel(*operands):
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        return jax.block_until_ready(append_token(*operands, EPSILON))


@pytest.mark.parametrize(
    ("shape", "dtype", "encoding", "nope"),
    [
        ((4, 3, 128, 16), jnp.bfloat16, None, 32),
        ((1, 1, 384, 64), jnp.float16, None, 40),  # which fill no lines
        ((3, 5, 256, 64), jnp.bfloat16, FP8, 64),
    ],
)
def test_the_kernel_writes_what_xla_writes(shape, dtype, encoding, nope, rng):
    batch = shape[0]
    problem_ = problem(rng, (max(batch, 2), *shape[1:]), dtype, encoding, nope)
    latent = problem_[2].at[0, 0, :128].multiply(1e-3)  # groups get scales of their own
    latent = latent.at[-1, 0, 5].set(jnp.nan)
    operands = (*problem_[:2], latent, *problem_[3:])
    same(by_kernel(*operands), by_hand(*operands))


def test_copies_of_the_only_token_are_left_out(rng):
    *arrays, scale, store, place = problem(rng, (2, 3, 128, 16))
    one = jax.tree.map(lambda x: x[:1], store)
    made = by_kernel(*arrays, scale, one, place[:1])
    same(made, by_hand(*(x[:1] for x in arrays), scale, one, place[:1]))


def test_derivatives_are_those_of_xlas_way(rng):
    *operands, place = problem(rng)
    operands[5] = jax.tree.map(lambda x: jnp.nan_to_num(x), operands[5])
    cotangents = jax.tree.map(lambda x: jnp.cos(x), by_hand(*operands, place))
    found = [
        jax.block_until_ready(jax.vjp(lambda *x: way(*x, place), *operands)[1](cotangents))  # noqa: B023
        for way in (by_kernel, by_hand)
    ]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-2, atol=1e-6), *found)


def test_fp8_has_no_derivative(rng):
    *operands, place = problem(rng, encoding=FP8)
    with pytest.raises(NotImplementedError, match="has no derivative"):
        jax.grad(lambda x: by_kernel(*operands[:2], x, *operands[3:], place)[1].sum())(operands[2])


def test_vmap_is_xlas_way(rng):
    operands = problem(rng, (4, 2, 128, 16))
    *arrays, scale, store, place = jax.tree.map(
        lambda x: x if x.ndim < 2 else x.reshape(2, 2, *x.shape[1:]), operands
    )
    axes = (0, 0, 0, 0, None, 0, 0)
    made = jax.vmap(by_kernel, in_axes=axes)(*arrays, scale, store, place)
    made = jax.tree.map(lambda x: x.reshape(4, *x.shape[2:]), made)
    same(made, by_hand(*operands))


def served(*operands):
    with plgpu.force_gpu_interpret_mode():
        return jax.eval_shape(lambda *x: append_token(*x, EPSILON), *operands) is not None


def test_what_it_serves(rng):
    *arrays, scale, store, place = problem(rng)
    assert served(*arrays, scale, store, place)
    assert append_token(*arrays, scale, store, place, EPSILON) is None  # on a CPU
    assert not served(*arrays, scale, Dense({**store.arrays, "index_key": store.k_rope}), place)
    pool = Dense(
        {name: jnp.zeros((8, PAGE, x.shape[2]), x.dtype) for name, x in store.arrays.items()}
    )
    assert not served(*arrays, scale, Paged(pool, jnp.zeros((4, 2), jnp.int32)), place)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), [*arrays, scale, store])
    assert not served(*wide, place)
    two = [jnp.concatenate([x, x], 1) for x in arrays]
    assert not served(*two, scale, store, jnp.concatenate([place, place], 1))
    assert not served(*problem(rng, (4, 3, 192, 16)))
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, found = jax.P("x"), []
    jax.eval_shape(
        jax.shard_map(
            lambda *x: found.append(served(*x)),
            mesh=mesh, in_specs=(*[rows] * 4, jax.P(), rows, rows), out_specs=None,
        ),
        *arrays, scale, store, place,
    )  # fmt: skip
    assert found == [False]
    assert not served(*problem(rng, encoding="int8"))


@pytest.mark.parametrize("encoding", [None, FP8])
def test_a_layer_decodes_as_by_xlas_way(encoding, monkeypatch, rng):
    config = mla_jax.MLAConfig.from_preset("tiny").replace(kv_lora_rank=128, qk_rope_head_dim=16)
    layer = drawn(
        lambda: mla_jax.MultiHeadLatentAttention(
            config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
        )
    )
    x = jnp.asarray(rng.standard_normal((2, 6, config.hidden_size)), jnp.bfloat16)
    cache = emptied(lambda: layer.init_cache(2, 64, encoding), 0)
    prefill = jax.jit(lambda layer, *arrays: layer.prefill(*arrays))
    _, cache = prefill(layer, x[:, :5], cache, jnp.array([5, 2]))
    decode = lambda layer, x, cache: layer.decode(x, cache)  # noqa: E731
    right = jax.block_until_ready(jax.jit(decode)(layer, x[:, 5:], cache))
    asked, own = [], maps.append_token
    monkeypatch.setattr(maps, "append_token", lambda *a: asked.append(own(*a)) or asked[-1])
    # Only the append is interpreted: the attention would take half a minute.
    here = target.Target("cpu", "cpu", interpret=plgpu.InterpretGPUParams())
    monkeypatch.setattr(append, "target", types.SimpleNamespace(current=lambda: here))
    again = jax.jit(lambda *arrays: decode(*arrays))  # traced anew
    same(jax.block_until_ready(again(layer, x[:, 5:], cache)), right)
    assert asked[0] is not None


@pytest.mark.accelerator
@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("encoding", [None, FP8])
@pytest.mark.parametrize("shape", [(2, 16, 512, 64), (7, 128, 512, 64), (3, 5, 384, 32)])
def test_native(shape, encoding, rng):
    """Numbers of one rounding more, as the squares are summed in another order."""
    operands = problem(rng, shape, encoding=encoding)
    assert not target.current().interpret
    made = jax.jit(lambda *x: append_token(*x, EPSILON))(*operands)
    right = by_hand(*operands)
    for queries, given in zip(made[:2], right[:2], strict=True):
        np.testing.assert_array_equal(queries, given)
    place = np.asarray(operands[-1])[:, 0]
    for store, other in ((made[2], right[2]), (right[2], made[2])):
        for name in store.arrays:
            one, two = (np.asarray(s.arrays[name], np.float32) for s in (store, other))
            untouched = np.arange(SLOTS)[None] != place[:, None]
            np.testing.assert_array_equal(one[untouched], two[untouched])
    values = [
        {name: np.asarray(x, np.float32) for name, x in store.block(0, SLOTS).items()}
        for store in (made[2], right[2])
    ]
    np.testing.assert_array_equal(values[0]["k_rope"], values[1]["k_rope"])
    rows = np.flatnonzero(place < SLOTS)
    one, two = (value["latent"][rows, place[rows]] for value in values)
    assert relative(one, two) < (2**-8 if encoding is None else 2**-5)
