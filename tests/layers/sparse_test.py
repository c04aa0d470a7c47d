"""Sparse attention layers: choices, what layers hand on, training the indexer, bad input."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import MICRO, drawn, relative
from flax import nnx

from mla_jax import Cache, MLAConfig, MultiHeadLatentAttention, Step, checkpoint
from mla_jax.layers.relay import Relay

TESTDATA = pathlib.Path(__file__).parents[1] / "testdata"
SPARSE = MICRO.replace(index_topk=4, index_n_heads=2, index_head_dim=6)
X = jnp.asarray(np.random.default_rng(1).standard_normal((2, 9, 24), np.float32))


def make(config=SPARSE, seed=0, **options):
    of = lambda: MultiHeadLatentAttention(  # noqa: E731
        config, precision="highest", rngs=nnx.Rngs(0), **options
    )
    return drawn(of, seed)


plain = jax.jit(lambda layer, x: layer(x))
_truncate = jax.jit(Cache.truncate)


@functools.partial(jax.jit, static_argnames="form")
def attend_all(layers, x, form="auto", **options):
    """What each of some layers returns, and what the last one hands on."""
    outputs, relay = [], None
    for layer in layers:
        y, relay = layer.attend(x, relay, form=form, **options)
        outputs.append(y)
    return outputs, relay


@functools.partial(jax.jit, static_argnames="form")
def extend_all(layers, x, cache, lengths=None, form="auto"):
    """What each of some layers returns for new tokens, and the cache with them."""
    step, relay = Step.begin(cache, x.shape[1], lengths, form=form), None
    outputs, stores = [], []
    for layer, store in zip(layers, cache.stores, strict=True):
        y, store, relay = layer.extend(x, store, step, relay)
        outputs.append(y)
        stores.append(store)
    return outputs, cache.end(stores, step)


@pytest.mark.parametrize("op", ["index_scores", "best_slots"])
def test_a_layer_asks_the_backend_of_the_choice_that_is_named(op):
    layer = make(implementation={op: "pallas_gpu"})
    with pytest.raises(NotImplementedError, match="'pallas_gpu': needs an NVIDIA GPU"):
        jax.eval_shape(layer, X)
    with pytest.raises(NotImplementedError, match="'pallas_gpu': needs an NVIDIA GPU"):
        jax.eval_shape(layer.indexer_loss, X)
    xla, default = (plain.lower(make(**of), X) for of in ({"implementation": {op: "xla"}}, {}))
    assert xla.as_text() == default.as_text()


@pytest.mark.parametrize("name", ["deepseek_v32_dsa", "glm_moe_dsa_full_shared"])
def test_the_choice_is_that_of_the_families_own_code(name):
    z = np.load(TESTDATA / f"{name}.npz")
    meta = json.loads(str(z["meta"]))
    several = len(meta["layer_ids"]) > 1
    hub, five = (json.loads(str(z[key])) for key in ("config_hub", "config"))
    layers = []
    for index in meta["layer_ids"]:
        config = MLAConfig.from_hf(hub, layer=index)
        assert config == MLAConfig.from_hf(five, layer=index)
        head = f"w/{index}/" if several else "w/"
        layer = make(config)
        checkpoint.load_attention(
            layer, {key.removeprefix(head): z[key] for key in z.files if key.startswith(head)}
        )
        layers.append(layer)
    x, real = jnp.asarray(z["in/hidden_states"]), z["in/attention_mask"] == 1
    batch, length = real.shape
    out = lambda kind, index: z[f"out/{kind}/{index}" if several else f"out/{kind}"]  # noqa: E731
    tolerance = {"atol": meta["atol"], "rtol": meta["rtol"]}
    for form in ("absorbed", "expanded"):
        got, relay = attend_all(
            layers, x, form, positions=z["in/position_ids"], mask=real[:, None, None]
        )
        for index, y in enumerate(got):
            np.testing.assert_allclose(np.asarray(y)[real], out("full", index)[real], **tolerance)
    selected = np.zeros((batch, length, length + 1), bool)
    np.put_along_axis(selected, np.asarray(relay.chosen), True, axis=-1)
    visible = np.tril(np.ones((length, length), bool)) & real[:, None]
    np.testing.assert_array_equal(
        selected[..., :length][real], (out("index_selected", 0) & visible)[real]
    )
    if not several:  # its cached pass is checkpoint/attention_test's
        return

    # The cached pass, rows moved to the left.
    padding = (~real).sum(1)
    cache = Cache.init(layers, batch, length)
    assert [tuple(store.arrays) for store in cache.stores] == [
        ("latent", "k_rope", "index_key"), ("latent", "k_rope")
    ]  # fmt: skip
    outputs, start = [np.zeros(x.shape) for _ in layers], 0
    for count in meta["schedule"]:
        end = start + count
        lengths = np.clip(end - np.maximum(start, padding), 0, count)
        # Of one length: the programs are one.
        chunk = np.zeros((batch, max(meta["schedule"]), x.shape[-1]), np.float32)
        for b, n in enumerate(lengths):
            chunk[b, :n] = x[b, end - n : end]
        grown, cache = extend_all(layers, chunk, cache, lengths)
        for index, y in enumerate(grown):
            for b, n in enumerate(lengths):
                outputs[index][b, end - n : end] = np.asarray(y)[b, :n]
        start = end
    for index, got in enumerate(outputs):
        np.testing.assert_allclose(got[real], out("cached", index)[real], **tolerance)


def test_a_cache_that_can_be_chosen_whole_is_dense():
    sparse = make(SPARSE.replace(index_topk=9))
    dense = make(MICRO)
    nnx.update(dense, nnx.state(sparse, lambda path, _: "indexer" not in path))
    full = plain(dense, X)
    np.testing.assert_array_equal(plain(sparse, X), full)
    np.testing.assert_array_equal(jax.jit(lambda f: f(X, dense=True))(make(SPARSE)), full)
    assert relative(plain(make(SPARSE), X), full) > 1e-3
    (y,), cache = extend_all([sparse], X[:, :5], Cache.init([sparse], 2, 9))
    np.testing.assert_allclose(y, full[:, :5], atol=3e-6)
    lowered = jax.jit(lambda layer, x, cache: layer.decode(x, cache)).lower(
        sparse, X[:, 5:6], cache
    )
    assert "top_k" not in lowered.as_text()  # nothing is scored
    (y,), cache = extend_all([sparse], X[:, 5:], cache)
    np.testing.assert_allclose(y, full[:, 5:], atol=3e-6)
    assert np.asarray(cache.stores[0].index_key).any()  # for a longer cache later on


def test_layers_attend_to_another_s_cache(rng):
    """Mistral Large 4: layer 0's cache serves layer 1, which chooses, and 2, which does not."""
    base = SPARSE.replace(q_lora_rank=None, mla_scale_q_lora=False, index_query_scale_ssmax=True)
    source = base.replace(kv_store_layer=0)
    configs = [source, base.replace(kv_source_layer=0),
               base.replace(kv_source_layer=0, indexer_type="shared")]  # fmt: skip
    layers = [make(config, seed) for seed, config in enumerate(configs)]
    assert not hasattr(layers[1], "kv_a_proj")
    cache = Cache.init(layers, 2, 256, pages=4)
    assert [list(store.arrays) for store in cache.stores[1:]] == [["index_key"], ["index_key"]]
    assert cache.stores[2].nbytes == 0

    # The same as layers with a cache of their own, made from what layer 0 reads.
    full, _ = attend_all(layers, X)
    alone = make(base)
    nnx.update(alone, nnx.state(layers[1]))
    alone.kv_a_proj, alone.kv_a_norm = layers[0].kv_a_proj, layers[0].kv_a_norm
    np.testing.assert_allclose(full[1], plain(alone, X), atol=1e-6)
    for form in ("absorbed", "expanded"):
        parts, held = [], cache
        for first, last in ((0, 7), (7, 8), (8, 9)):  # padded: one program
            chunk, lengths = np.zeros((2, 7, 24), np.float32), np.full(2, last - first, np.int32)
            chunk[:, : last - first] = X[:, first:last]
            (*_, y), held = extend_all(layers, chunk, held, lengths, form=form)
            held = _truncate(held, last)
            parts.append(np.asarray(y)[:, : last - first])
        np.testing.assert_allclose(np.concatenate(parts, 1), full[2], atol=3e-6)


def test_an_indexer_learns_what_the_attention_looks_at():
    """Of eight words in a text each looks at few: a layer that stays as it is, and its indexer."""
    config = MLAConfig(
        hidden_size=24, num_attention_heads=2, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8,
        qk_rope_head_dim=4, v_head_dim=8, index_topk=4, index_n_heads=4, index_head_dim=8,
        mla_use_nope=True, softmax_scale=1.0,
    )  # fmt: skip
    graph, untrained, rest = nnx.split(make(config), lambda path, _: "indexer" in path, ...)
    optimizer = optax.adam(1e-2)

    def text(key):
        kinds, noise = jax.random.split(key)
        words = jax.random.normal(jax.random.key(5), (8, 24))
        x = words[jax.random.randint(kinds, (4, 24), 0, 8)]
        return x + 0.1 * jax.random.normal(noise, x.shape)

    def train(params, keys, warmup):
        def step(carry, key):
            params, state = carry
            loss = lambda params: nnx.merge(graph, params, rest).indexer_loss(  # noqa: E731
                text(key), warmup=warmup
            )
            value, gradient = jax.value_and_grad(loss)(params)
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(params, updates), state), value

        (params, _), losses = jax.lax.scan(step, (params, optimizer.init(params)), keys)
        return params, losses

    @jax.jit
    def stages(params):
        keys = jax.random.split(jax.random.key(0), 90)
        warm, dense = train(params, keys[:60], True)
        after, sparse = train(warm, keys[60:], False)
        x = text(jax.random.key(1))
        missed = []  # of attention to all tokens, where attention is to the chosen ones
        for own in (untrained, warm, after):
            layer = nnx.merge(graph, own, rest)
            full = layer(x, dense=True)
            missed.append(jnp.linalg.norm(layer(x) - full) / jnp.linalg.norm(full))
        return dense, sparse, missed

    dense, sparse, missed = stages(untrained)
    assert dense[-5:].mean() < 0.4 * dense[0]
    assert sparse[-5:].mean() < sparse[:5].mean()
    assert max(missed[1:]) < 0.6 * missed[0]


def test_only_the_indexer_has_gradients_of_its_loss_and_only_of_that():
    layer = make()
    names = lambda tree: {  # noqa: E731
        ".".join(map(str, path))
        for path, leaf in nnx.to_flat_state(tree)
        if np.asarray(leaf[...]).any()
    }
    for warmup in (True, False):
        loss = lambda layer: layer.indexer_loss(X, warmup=warmup)  # noqa: B023, E731
        own = names(nnx.state(jax.jit(jax.grad(loss))(layer)))
        kernels = {f"indexer.{name}.kernel" for name in ("wq_b", "wk", "weights_proj")}
        assert own == kernels | {"indexer.k_norm.scale", "indexer.k_norm.bias"}
    main = names(nnx.state(jax.jit(jax.grad(lambda layer: jnp.sin(layer(X)).sum()))(layer)))
    assert "kv_b_proj.kernel" in main
    assert not [name for name in main if "indexer" in name]


def _without_keys():
    layer = make()
    return layer.prefill(X, make(MICRO).init_cache(2, 16))


def _pooled_segments():
    layer = make(SPARSE.replace(index_kpool=2))
    return layer(X, segment_ids=jnp.zeros((2, 9), jnp.int32))


BAD = {
    "a cache without index keys": (_without_keys, r"cache\.index_key has shape None"),
    "a cache with needless keys": (
        lambda: make(MICRO).prefill(X, make().init_cache(2, 16)), "this store holds .*index_key"),
    "shared without a layer before": (
        lambda: make(SPARSE.replace(indexer_type="shared"))(X), "no layer with an indexer"),
    "another's cache without a layer before": (
        lambda: make(SPARSE.replace(kv_source_layer=3)).attend(X, Relay()),
        "kv_source_layer=3: that layer has handed no cache on"),
    "pools of packed sequences": (_pooled_segments, "segment_ids: index_kpool=2"),
    "a mask per head": (lambda: make()(X, mask=jnp.ones((1, 3, 9, 9), bool)), "must be .B 1 T T."),
    "a loss without an indexer": (lambda: make(MICRO).indexer_loss(X), "index_topk=None"),
    "a loss of pools": (
        lambda: make(SPARSE.replace(index_kpool=2)).indexer_loss(X), "index_kpool=2"),
    "a width that cannot turn": (lambda: SPARSE.replace(index_head_dim=3), "index_head_dim=3"),
    "a type": (lambda: SPARSE.replace(indexer_type="none"), "indexer_type='none'"),
    "heads without a choice": (lambda: SPARSE.replace(index_n_heads=None), "index_n_heads=None"),
    "a layer below zero": (lambda: SPARSE.replace(kv_source_layer=-1), "kv_source_layer=-1"),
    "a cache that is not one's own": (
        lambda: SPARSE.replace(kv_source_layer=1, kv_store_layer=2), "kv_store_layer=2"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_a_kernel_that_is_named_serves_or_raises():
    layer = make(implementation="pallas_gpu")
    with pytest.raises(NotImplementedError, match="pallas_gpu"):
        layer(X, form="absorbed")
