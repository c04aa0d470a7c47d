"""What a step makes once for all layers, and for whom."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from common import MICRO, PLAIN, drawn
from flax import nnx

from mla_jax import Cache, MultiHeadLatentAttention, Step
from mla_jax.ops import dispatch
from mla_jax.ops.seen import Seen


def layers(*configs):
    make = lambda config: lambda: MultiHeadLatentAttention(config, rngs=nnx.Rngs(0))  # noqa: E731
    return [drawn(make(config), i) for i, config in enumerate(configs)]


def test_layers_with_one_rotary_embedding_share_its_rotation():
    cache = Cache.init(layers(MICRO), 2, 8)
    step = Step.begin(cache, 3)
    assert step.rotation(MICRO) is step.rotation(MICRO.replace(kv_lora_rank=4))
    other = step.rotation(MICRO.replace(rope_theta=7.0))
    assert not np.allclose(other[0], step.rotation(MICRO)[0])
    assert step.rotation(PLAIN.replace(mla_use_nope=True)) is None


def test_a_plan_is_made_once_for_each_kind_of_call(monkeypatch):
    made = []

    def plan(seen, call, implementation):
        made.append(call)
        return dataclasses.replace(seen, plan=len(made))

    monkeypatch.setattr(dispatch, "plan", plan)
    step = Step.begin(Cache.init(layers(MICRO), 2, 8), 1)
    call = dispatch.Call("latent_attention", 2, 1, 8, 3, (16, 4), 16, "float32", ("lengths",))
    wide = dataclasses.replace(call, heads=5)
    window = step.seen.replace(window=3)
    assert [
        step.planned(seen, of, None).plan
        for seen, of in ((step.seen, call), (step.seen, wide), (step.seen, call), (window, call))
    ] == [1, 2, 1, 3]
    assert step.planned(step.seen, call, {"latent_attention": "xla"}).plan == 4


def test_what_an_inner_transformation_made_stays_inside():
    first, second = layers(MICRO, MICRO)
    cache = Cache.init([first, second], 2, 8)
    x = jax.random.normal(jax.random.key(0), (2, 3, MICRO.hidden_size))

    @jax.jit
    def run(x, cache):
        step = Step.begin(cache, 3)
        inner = jax.checkpoint(lambda x, store: first.extend(x, store, step)[:2])
        y, store = inner(x, cache.stores[0])
        z, other, _ = second.extend(x + y, cache.stores[1], step)
        return y + z, cache.end([store, other], step)

    got, cache_after = run(x, cache)
    decode = jax.jit(lambda layer, x: layer.decode(x, layer.init_cache(2, 8))[0])
    y = decode(first, x)
    z = decode(second, x + y)
    np.testing.assert_allclose(got, y + z, atol=2e-6)
    assert cache_after.length.tolist() == [3, 3]


def test_a_step_goes_through_transformations_as_an_argument():
    (layer,) = layers(MICRO)
    cache = layer.init_cache(2, 8)
    x = jax.random.normal(jax.random.key(0), (2, 1, MICRO.hidden_size))
    lengths = jnp.array([1, 0])
    step = Step.begin(cache, 1, lengths)
    run = jax.jit(lambda x, store, step: layer.extend(x, store, step)[0])
    began = jax.jit(
        lambda x, cache: layer.extend(x, cache.stores[0], Step.begin(cache, 1, lengths))[0]
    )
    np.testing.assert_allclose(run(x, cache.stores[0], step), began(x, cache), atol=1e-6)
    assert isinstance(step.seen, Seen)
