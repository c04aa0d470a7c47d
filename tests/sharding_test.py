"""Layouts on a mesh of eight devices against one device, and the rules that place arrays.

Letters: B rows, S slots, T tokens, D hidden size.
"""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as orbax
import pytest
from common import MICRO, drawn, emptied, relative, slow
from flax import nnx

from mla_jax import MultiHeadLatentAttention, sharding
from mla_jax.sharding import Rules

BOTH = ("data", "model")
LAYOUTS = {
    "data": Rules(B=BOTH),
    "tensor": Rules(B="data", N="model", F="model"),
    "fsdp": Rules(B="data", D="data"),
    "fsdp_tensor": Rules(B="data", D="data", N="model", F="model"),
    "data_core_of_split_heads": Rules(B=BOTH, N="model", F="model", A="model"),
    "experts": Rules(B="data", E=BOTH),
    "experts_tensor": Rules(B="data", N="model", F="model", E="data"),
    "helix": Rules(B="data", S="model", N="model", F="model"),
    "helix_experts": Rules(B="data", S="model", N="model", F="model", E=BOTH),
    "context": Rules(B="data", S="model"),
    "context_of_all": Rules(S=BOTH, N="model"),  # 2 devices have no head of their own
}
# An optional part of every kind, and widths that no axis divides but for the heads'.
GATED = MICRO.replace(
    num_attention_heads=4, attention_sinks=True, output_gate="head", query_scale_ssmax=True
)
MIXERS = {
    "all_parts": functools.partial(MultiHeadLatentAttention, GATED),
    "window": functools.partial(MultiHeadLatentAttention, GATED.replace(sliding_window=100)),
}
STORES = {"float32": {}}  # options of `init_cache`
B, S, D = 8, 1024, MICRO.hidden_size
HELD = np.array([0, S - 4, 126, 127, 128, 129, 255, 640], np.int32)  # the last ones fit exactly
COUNTS = np.array([0, 131, 127, 128, 129, 1, 130, 5], np.int32)
TOLERANCE = 5e-6  # float32, sums of up to 1024 products in another order
# The programs are tiny and many: what LLVM makes faster takes longer than they run.
FAST = {"xla_llvm_disable_expensive_passes": True, "xla_backend_optimization_level": 0}


def mesh():
    return jax.make_mesh((2, 4), BOTH)


def put(x, *entries):
    return jax.device_put(x, jax.NamedSharding(mesh(), sharding.pspec(*entries)))


def laid(module, place):
    """The module on the mesh. From the host: from one device each shape would be a program."""
    return jax.device_put(jax.device_get(module), place.of(module))


def inputs():
    """A prompt, a token, three drafts and a chunk, rows' padding NaN; what the cache holds."""
    random = np.random.default_rng(0)
    draw = lambda *shape: random.normal(size=shape).astype(np.float32)  # noqa: E731
    x = {"prompt": draw(B, 131, D), "one": draw(B, 1, D), "three": draw(B, 3, D)}
    x["prompt"][np.arange(131)[None] >= COUNTS[:, None]] = np.nan
    x["chunk"] = draw(B, 7, D)
    more = np.minimum(COUNTS, np.minimum(S - 4 - HELD, 7))
    x["chunk"][np.arange(7)[None] >= more[:, None]] = np.nan
    held = {"latent": draw(B, S, MICRO.kv_lora_rank), "k_rope": draw(B, S, MICRO.qk_rope_head_dim)}
    return x, more, held


def filled(cache, held, lengths):
    """A cache whose rows hold so many tokens, and NaN behind them."""
    stores = []
    slots = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32)[None], (B, S))
    for store in cache.stores:
        new = {
            name: jnp.where(slots[..., None] < lengths[:, None, None], held[name], jnp.nan)
            for name in store.arrays
        }
        stores.append(store.write(slots, **new))
    return cache.replace(stores=tuple(stores), length=jnp.asarray(lengths))


@functools.partial(jax.jit, compiler_options=FAST, static_argnames="ways")
def steps(layer, cache, x, more, held, ways):
    """Ways of calling a layer; what is not asked for is not compiled either."""
    y = {}
    if "prefill" in ways:
        y["prefill"] = layer.prefill(x["prompt"], cache.as_fresh(), COUNTS)[0]
    if "decode" in ways:
        cache = filled(cache, held, HELD)
        behind, cache = layer.prefill(x["chunk"], cache, more, form="expanded")
        y["decode_1"], cache = layer.decode(x["one"], cache)
        three, cache = layer.decode(x["three"], cache)
        y["lengths"] = cache.length
        y |= {"prefill_behind": behind} if "behind" in ways else {}
        y |= {"decode_3": three} if "three" in ways else {}
    if "gradient" in ways:
        ids = np.arange(7)[None] // 4 + np.arange(B)[:, None] * 0

        def loss(layer, chunk):
            return (jnp.sin(layer(chunk, segment_ids=ids)) ** 2).sum()

        chunk = jnp.where(jnp.isnan(x["chunk"]), 0.5, x["chunk"])
        y["gradient"] = jax.grad(loss, argnums=(0, 1))(layer, chunk)
    return y


def layer_of(mixer):
    return drawn(lambda: MIXERS[mixer](rngs=nnx.Rngs(1)), seed=1)


@functools.cache
def on_one_device(mixer, store):
    layer, (x, more, held) = layer_of(mixer), inputs()
    cache = emptied(lambda: layer.init_cache(B, S, **STORES[store]), 0)
    return jax.device_get(steps(layer, cache, x, more, held, ALL))


def assert_close(actual, expected):
    chex.assert_trees_all_equal_structs(actual, expected)
    for (path, got), want in zip(
        jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        assert relative(got, want) <= TOLERANCE, jax.tree_util.keystr(path)


ALL = "prefill behind decode three gradient"
# Parts of other layouts are those of these, and each way is called where its split is its own.
CASES = [
    ("fsdp_tensor", "all_parts", "float32", "prefill gradient"),
    ("data_core_of_split_heads", "all_parts", "float32", "decode"),
    ("helix", "all_parts", "float32", "prefill decode three"),
    ("context_of_all", "all_parts", "float32", "behind decode"),
    *(slow(name, "all_parts", "float32", ALL) for name in LAYOUTS if "experts" not in name),
    slow("helix", "window", "float32", ALL),
]


@pytest.mark.parametrize(("layout", "mixer", "store", "ways"), CASES)
def test_a_layer_on_a_mesh_is_the_layer(layout, mixer, store, ways):
    place, (x, more, held) = LAYOUTS[layout], inputs()
    with jax.set_mesh(mesh()):
        layer = layer_of(mixer)
        layer = laid(layer, place)
        cache = layer.init_cache(B, S, **STORES[store], sharding=place)
        assert sharding.spec(cache.stores[0].latent)[:2] == (place.B, place.S)
        assert sharding.spec(layer.o_proj.kernel[...]) == (place.N, (), place.D)
        assert sharding.spec(layer.q_a_proj.kernel[...]) == (place.A, place.D)
        x = jax.tree.map(lambda x: put(x, place.B), x)
        y = steps(layer, cache, x, more, held, ways)
    if "decode" in ways:
        assert sharding.spec(y["decode_1"]) == (place.B, (), ())
    wanted, y = on_one_device(mixer, store), jax.device_get(y)
    if "decode" in ways:
        np.testing.assert_array_equal(y.pop("lengths"), wanted["lengths"])
    assert_close(y, {name: wanted[name] for name in y})


@pytest.mark.parametrize(
    ("rules", "letters", "shape", "words"),
    [
        ({"N": "modle"}, ("D", "N"), (8, 8), "N=('modle',): the mesh has the axes data, model"),
        ({"B": "data", "S": BOTH}, "BSR", (8, 512, 4), "the axis 'data' is given to B and to S"),
        ({"N": "model"}, (None, "N"), (8, 6), "kept: N = 6 does not divide over the 4 devices"),
        ({}, ("embed",), (8,), "kept: 'embed' is no letter: those that may be split are B, S, N"),
    ],
)  # fmt: skip
def test_misuse_is_named(rules, letters, shape, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        Rules(**rules).sharding(letters, shape, mesh(), "kept")


def test_rules_are_checked_and_letters_that_do_not_exist_refused():
    with pytest.raises(ValueError, match=re.escape("N=('a', 'a'): it must be one name")):
        Rules(N=("a", "a"))
    with pytest.raises(ValueError, match=re.escape("A=('a',): it must have the axes of N=('b',)")):
        Rules(A="a", N="b")
    with pytest.raises(TypeError, match="'X'"):
        Rules(X="data")
    with pytest.raises(ValueError, match="there is no mesh"):
        Rules().of(jnp.ones(3))
    assert Rules(B=["data"]) == Rules(B="data")
    assert hash(Rules(B=["data"])) == hash(Rules(B="data"))


def test_what_a_cache_cannot_be_on_a_mesh_is_named():
    layer = layer_of("all_parts")
    with jax.set_mesh(mesh()):
        with pytest.raises(ValueError, match=r"max_length=640: .* must be a multiple of 512"):
            layer.init_cache(B, 640, sharding=Rules(S="model"))
        with pytest.raises(ValueError, match="B = 6 does not divide"):
            layer.init_cache(6, S, sharding=Rules(B="model"))
        with pytest.raises(NotImplementedError, match="rows would share pages across devices"):
            layer.init_cache(B, S, pages=64, sharding=Rules(B="data"))
        cache = layer.init_cache(B, S, sharding=Rules(S="model"))
        with pytest.raises(NotImplementedError, match="take all 8 rows"):
            cache.rows(0, 4)


def test_parameters_and_their_moments_carry_letters(tmp_path):
    layer = layer_of("all_parts")  # made without a mesh
    place = Rules(B="data", D="data", N="model")
    specs = nnx.get_partition_spec(nnx.state(layer))
    assert specs.q_b_proj.kernel.get_value() == jax.P("D", "N", None)
    begin = lambda layer: nnx.state(nnx.Optimizer(layer, optax.adam(1e-3), wrt=nnx.Param))  # noqa: E731
    state = jax.device_get(jax.jit(begin)(layer))
    with jax.set_mesh(mesh()):
        moved = jax.device_put(state, place.of(state))
    moments = [leaf for leaf in jax.tree.leaves(moved) if leaf.shape == (12, 4, 11)]
    wanted = jax.P("data", "model", None)
    assert [leaf.sharding.spec for leaf in moments] == [wanted, wanted]
    saved = orbax.StandardCheckpointer()
    saved.save(tmp_path / "eight", jax.tree.map(lambda x: x, nnx.to_pure_dict(moved)))
    saved.wait_until_finished()
    few = jax.make_mesh((2, 2), BOTH, devices=jax.devices()[:4])
    shapes = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, place.of(state, few)
    )
    restored = saved.restore(tmp_path / "eight", nnx.to_pure_dict(shapes))
    chex.assert_trees_all_equal(restored, nnx.to_pure_dict(state))
    assert all(leaf.sharding.mesh == few for leaf in jax.tree.leaves(restored))
