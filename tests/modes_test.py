"""Layer and decoder in jax's modes: sizes that are symbols, strict dtypes, 64 bits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import MICRO, drawn, emptied, relative, slow
from flax import nnx
from jax import export

from mla_jax import MultiHeadLatentAttention
from mla_jax.models import Decoder, DecoderConfig

# One block, which has experts and, as the shared one, a gated MLP.
CONFIG = DecoderConfig.from_preset("tiny")
CONFIG = CONFIG.replace(
    attention=CONFIG.attention.replace(num_hidden_layers=1), first_k_dense_replace=0
)
MODULES = {
    "layer": drawn(lambda: MultiHeadLatentAttention(MICRO, rngs=nnx.Rngs(0))),
    "decoder": drawn(lambda: Decoder(CONFIG, rngs=nnx.Rngs(0))),
}
BATCH, TOKENS = 3, 9


@functools.cache
def inputs(name):
    random = np.random.default_rng(1)
    if name == "layer":
        return random.normal(size=(BATCH, TOKENS, MICRO.hidden_size)).astype(np.float32)
    return random.integers(0, CONFIG.vocab_size, (BATCH, TOKENS), np.int32)


@functools.cache
def outputs(name):
    """Of all rows and tokens, of which some rows' first tokens alone have the same."""
    return np.asarray(jax.jit(lambda module, x: module(x))(MODULES[name], inputs(name)))


def exported(name, call, *arguments):
    """The exported program with its parameters as arguments, put through its serialised form."""
    graph, state = nnx.split(MODULES[name])
    leaves, tree = jax.tree.flatten(state)  # plain arrays: what a serialised program can take
    run = lambda leaves, *args: call(nnx.merge(graph, jax.tree.unflatten(tree, leaves)), *args)  # noqa: E731
    shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    data = export.export(jax.jit(run))(shapes, *arguments).serialize()
    return functools.partial(export.deserialize(data).call, leaves)


def input_shape(name, batch, tokens):
    like = inputs(name)
    return jax.ShapeDtypeStruct((batch, tokens, *like.shape[2:]), like.dtype)


def cache_shapes(name, batch, slots):
    """A cache's shapes with B and S in place of 2 and 16."""
    symbols = {2: batch, 16: slots}
    rename = lambda a: jax.ShapeDtypeStruct(  # noqa: E731
        tuple(symbols.get(d, d) if axis < 2 else d for axis, d in enumerate(a.shape)), a.dtype
    )
    return jax.tree.map(rename, jax.eval_shape(lambda: MODULES[name].init_cache(2, 16)))


@pytest.mark.parametrize("name", MODULES)
def test_a_whole_pass_exports_for_any_batch_and_length(name):
    batch, tokens = export.symbolic_shape("B, T")
    run = exported(name, lambda module, x: module(x), input_shape(name, batch, tokens))
    for batch, tokens in ((1, 1), (3, 7)):
        y = run(inputs(name)[:batch, :tokens])
        assert relative(y, outputs(name)[:batch, :tokens]) < 2e-6


# Of tokens that are symbols the whole pass tells, too.
STEPS = [(False, "layer"), slow(False, "decoder"), slow(True, "layer"), (True, "decoder")]
STEPS = pytest.mark.parametrize(("decode", "name"), STEPS)


@STEPS
def test_cached_steps_export_for_any_batch_length_and_slots(decode, name):
    symbols = export.symbolic_shape("B, S" if decode else "B, S, T")
    batch, slots, tokens = symbols if len(symbols) == 3 else (*symbols, 1)
    run = exported(
        name, lambda module, x, cache: module.prefill(x, cache), input_shape(name, batch, tokens),
        cache_shapes(name, batch, slots),
    )  # fmt: skip
    cache = emptied(lambda: MODULES[name].init_cache(BATCH, 24))
    cuts = [(t, t + 1) for t in range(TOKENS)] if decode else [(0, 4), (4, 5), (5, 9)]
    parts = []
    for start, end in cuts:
        y, cache = run(inputs(name)[:, start:end], cache)
        parts.append(y)
    assert relative(np.concatenate(parts, 1), outputs(name)) < 5e-6
    np.testing.assert_array_equal(cache.length, TOKENS)


# Pages and a dense cache, each with one of the modules.
CACHED = pytest.mark.parametrize(("name", "pages"), [("layer", 4), ("decoder", None)])


@CACHED
def test_strict_dtype_promotion(name, pages):
    @jax.jit
    def run(module, x):
        cache = module.init_cache(2, 128, pages=pages)
        _, cache = module.prefill(x[:, :3], cache, jnp.array([3, 2]))
        cache = cache.truncate(2).fork(0, jnp.array([False, True]), 1)
        return module(x), module.decode(x[:, 2:], cache.truncate(1))[0]

    with jax.numpy_dtype_promotion("strict"):
        full, y = run(MODULES[name], inputs(name)[:2, :5])
    assert y.shape[:2] == (2, 3)
    assert full.dtype == y.dtype == jnp.float32
    assert np.isfinite(full).all()


@CACHED
def test_64_bits_enabled(name, pages):
    @jax.jit
    def run(module, x):
        y, cache = module.prefill(x[:, :3], module.init_cache(2, 128, pages=pages))
        rest, cache = module.decode(x[:, 3:], cache)
        cut = cache.truncate(2).fork(0, jnp.array([False, True])).reset(jnp.array([True, False]))
        return module(x), jnp.concatenate([y, rest], 1), cut.length

    with jax.enable_x64(True):
        whole, cached, length = run(MODULES[name], inputs(name)[:2, :5])
    full = outputs(name)[:2, :5]
    assert relative(whole, full) < 2e-6
    assert relative(cached, full) < 5e-6
    assert length.dtype == jnp.int32
    assert length.tolist() == [0, 2]
