"""Layer and decoder in jax's modes: sizes that are symbols, strict dtypes, 64 bits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import MICRO, drawn, relative
from flax import nnx
from jax import export

from mla_jax import MultiHeadLatentAttention
from mla_jax.models import Decoder, DecoderConfig

LAYER = drawn(lambda: MultiHeadLatentAttention(MICRO, rngs=nnx.Rngs(0)))
MODEL = drawn(lambda: Decoder(DecoderConfig.from_preset("tiny"), rngs=nnx.Rngs(0)))


def exported(module, call, *arguments):
    """The exported program with its parameters as arguments, put through its serialised form."""
    graph, state = nnx.split(module)
    leaves, tree = jax.tree.flatten(state)  # plain arrays: what a serialised program can take
    run = lambda leaves, *args: call(nnx.merge(graph, jax.tree.unflatten(tree, leaves)), *args)  # noqa: E731
    shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    data = export.export(jax.jit(run))(shapes, *arguments).serialize()
    return functools.partial(export.deserialize(data).call, leaves)


def cache_shapes(module, batch, slots):
    """A cache's shapes with B and S in place of 2 and 16."""
    symbols = {2: batch, 16: slots}
    rename = lambda a: jax.ShapeDtypeStruct(  # noqa: E731
        tuple(symbols.get(d, d) if axis < 2 else d for axis, d in enumerate(a.shape)), a.dtype
    )
    return jax.tree.map(rename, jax.eval_shape(lambda: module.init_cache(2, 16)))


def inputs(module, batch, tokens):
    if module is LAYER:
        return jax.random.normal(jax.random.key(1), (batch, tokens, MICRO.hidden_size))
    return jax.random.randint(jax.random.key(1), (batch, tokens), 0, 256)


plain = jax.jit(lambda module, x: module(x))
MODULES = pytest.mark.parametrize("module", [LAYER, MODEL], ids=["layer", "decoder"])


@MODULES
def test_a_whole_pass_exports_for_any_batch_and_length(module):
    batch, tokens = export.symbolic_shape("B, T")
    like = inputs(module, 1, 1)
    shape = jax.ShapeDtypeStruct((batch, tokens, *like.shape[2:]), like.dtype)
    run = exported(module, lambda module, x: module(x), shape)
    for size in ((1, 1), (3, 7)):
        x = inputs(module, *size)
        assert relative(run(x), plain(module, x)) < 2e-6


@MODULES
@pytest.mark.parametrize("decode", [False, True], ids=["prefill", "decode"])
def test_cached_steps_export_for_any_batch_length_and_slots(module, decode):
    symbols = export.symbolic_shape("B, S" if decode else "B, S, T")
    batch, slots, tokens = symbols if len(symbols) == 3 else (*symbols, 1)
    like = inputs(module, 1, 1)
    shape = jax.ShapeDtypeStruct((batch, tokens, *like.shape[2:]), like.dtype)
    run = exported(
        module, lambda module, x, cache: module.prefill(x, cache), shape,
        cache_shapes(module, batch, slots),
    )  # fmt: skip
    x = inputs(module, 3, 9)
    full = plain(module, x)
    cache = module.init_cache(3, 24)
    cuts = [(t, t + 1) for t in range(9)] if decode else [(0, 4), (4, 5), (5, 9)]
    outputs = []
    for start, end in cuts:
        y, cache = run(x[:, start:end], cache)
        outputs.append(y)
    assert relative(jnp.concatenate(outputs, 1), full) < 5e-6
    np.testing.assert_array_equal(cache.length, 9)


# Pages and a dense cache, each with one of the modules.
CACHED = pytest.mark.parametrize(
    ("module", "pages"), [(LAYER, 4), (MODEL, None)], ids=["layer", "decoder"]
)


@CACHED
def test_strict_dtype_promotion(module, pages):
    @jax.jit
    def run(module, x):
        cache = module.init_cache(2, 128, pages=pages)
        _, cache = module.prefill(x[:, :3], cache, jnp.array([3, 2]))
        cache = cache.truncate(2).fork(0, jnp.array([False, True]), 1)
        return module(x), module.decode(x[:, 2:], cache.truncate(1))[0]

    with jax.numpy_dtype_promotion("strict"):
        full, y = run(module, inputs(module, 2, 5))
    assert y.shape[:2] == (2, 3)
    assert np.isfinite(full).all()


@CACHED
def test_64_bits_enabled(module, pages):
    @jax.jit
    def run(module, x):
        y, cache = module.prefill(x[:, :3], module.init_cache(2, 128, pages=pages))
        rest, cache = module.decode(x[:, 3:], cache)
        cut = cache.truncate(2).fork(0, jnp.array([False, True])).reset(jnp.array([True, False]))
        return module(x), jnp.concatenate([y, rest], 1), cut.length

    x = inputs(module, 2, 5)
    full = plain(module, x)
    with jax.enable_x64(True):
        whole, cached, length = run(module, x)
    assert relative(whole, full) < 2e-6
    assert relative(cached, full) < 5e-6
    assert length.dtype == jnp.int32
    assert length.tolist() == [0, 2]
