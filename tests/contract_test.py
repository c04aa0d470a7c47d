"""The contract: one parameter tree, two forms, any split into prefill and decode, one result."""

import contextlib
import dataclasses
import functools
import itertools
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import MICRO, PLAIN, drawn, relative
from flax import nnx

import mla_jax
from mla_jax import MLAConfig, MultiHeadLatentAttention, costs, rope
from mla_jax.cache import PAGE, Cache, Dense
from mla_jax.ops import dispatch

CONFIGS = {
    "micro": MICRO,
    "plain": PLAIN,
    "nope": MICRO.replace(mla_use_nope=True),
    "no_rotary": PLAIN.replace(qk_rope_head_dim=0),
    "only_rotary": PLAIN.replace(qk_nope_head_dim=0),
    "sinks_window": MICRO.replace(attention_sinks=True, sliding_window=3, output_gate="head"),
    "gated_query": MICRO.replace(
        output_gate="query",
        query_scale_ssmax=True,
        llama_4_scaling_beta=0.5,
        llama_4_original_max_position_embeddings=2,
        k_rope_norm=True,
    ),
    "sparse": MICRO.replace(index_topk=4, index_n_heads=2, index_head_dim=6, rope_scaling=None),
    "pooled": PLAIN.replace(
        index_topk=2, index_n_heads=2, index_head_dim=6, index_kpool=2, attention_sinks=True
    ),
    "no_norms": PLAIN.replace(
        latent_norm=False,
        output_gate="elementwise",
        attention_bias=("q_proj", "kv_a_proj"),
        sliding_window=1,
    ),
}
T = 7


def make(config=MICRO, **options):
    layer = drawn(lambda: MultiHeadLatentAttention(config, rngs=nnx.Rngs(0), **options))
    for name in ("sinks", "ssmax_scale", "ssmax_bias"):  # which start at 0 and 1
        if hasattr(layer, name):
            noise = np.random.default_rng(len(name)).standard_normal(config.num_attention_heads)
            held = np.asarray(getattr(layer, name)[...])
            setattr(layer, name, nnx.Param(jnp.asarray(held + 0.5 * noise, jnp.float32)))
    x = np.random.default_rng(1).standard_normal((2, T, config.hidden_size), np.float32)
    return layer, jnp.asarray(x)


def poisoned(cache):
    """NaN in every slot, which are all unused."""
    return cache.replace(
        stores=jax.tree.map(lambda held: jnp.full_like(held, jnp.nan), cache.stores)
    )


def cached_outputs(layer, x, form, splits):
    """Every row split at its own point: the first tokens prefilled, the rest decoded singly."""
    cache = poisoned(layer.init_cache(x.shape[0], T))
    splits = np.asarray(splits, np.int32)
    y, cache = prefill(layer, x, cache, jnp.asarray(splits), form)
    outputs = np.zeros(x.shape, np.float32)
    for b, n in enumerate(splits):
        outputs[b, :n] = y[b, :n]
        np.testing.assert_array_equal(y[b, n:], 0)
    for step in range(T - splits.min()):
        at = np.minimum(splits + step, T - 1)
        live = jnp.asarray(splits + step < T, jnp.int32)
        y, cache = prefill(layer, x[jnp.arange(len(at)), at][:, None], cache, live, form)
        for b, t in enumerate(at):
            if live[b]:
                outputs[b, t] = y[b, 0]
    return outputs


@functools.partial(jax.jit, static_argnames="form")
def prefill(layer, x, cache, lengths, form, positions=None):
    return layer.prefill(x, cache, lengths, positions=positions, form=form)


@functools.partial(jax.jit, static_argnames="form")
def whole(layer, x, form="auto", positions=None):
    return layer(x, positions=positions, form=form)


@pytest.mark.parametrize("name", CONFIGS)
def test_forms_agree_in_values_and_gradients(name):
    layer, x = make(CONFIGS[name])

    def loss(layer, x, form):
        y = layer(x, form=form)
        return (jnp.sin(y) * jnp.arange(x.size).reshape(x.shape)).sum(), y

    @jax.jit
    def both(layer, x):
        of = jax.grad(loss, (0, 1), has_aux=True)
        return [of(layer, x, form) for form in ("absorbed", "expanded")]

    (absorbed, y), (expanded, other) = both(layer, x)
    assert relative(y, other) < 1e-6
    chex.assert_trees_all_close(
        jax.tree.leaves(absorbed), jax.tree.leaves(expanded), rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize("form", ["absorbed", "expanded"])
@pytest.mark.parametrize(
    "name", ["micro", "plain", "sinks_window", "gated_query", "no_norms", "sparse", "pooled"]
)
def test_any_split_is_one_full_pass(name, form):
    layer, x = make(CONFIGS[name])
    full = whole(layer, x)
    for split in range(T + 1):
        got = cached_outputs(layer, x, form, [split, T - split])
        np.testing.assert_allclose(got, full, atol=3e-6)


def test_chunks_of_any_size(rng):
    layer, x = make()
    full = whole(layer, x)
    for form in ("absorbed", "expanded", "auto"):
        cache, outputs = layer.init_cache(2, 16), []
        for start, end in ((0, 3), (3, 5), (5, 7)):
            y, cache = prefill(layer, x[:, start:end], cache, None, form)
            outputs.append(y)
        np.testing.assert_allclose(jnp.concatenate(outputs, 1), full, atol=3e-6)


@pytest.mark.parametrize("form", ["absorbed", "expanded"])
def test_accuracy_against_float64(form):
    config = MLAConfig.from_preset("deepseek_v3").replace(
        hidden_size=96, num_attention_heads=2, q_lora_rank=64
    )
    layer, _ = make(config, precision="highest")
    x = np.random.default_rng(1).standard_normal((2, 33, 96))
    with jax.enable_x64(True):
        graph, state = nnx.split(layer)
        double = nnx.merge(graph, jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), state))
        double.precision, double.implementation = "highest", "reference"
        exact = np.asarray(whole(double, jnp.asarray(x), form))
        assert exact.dtype == np.float64
    got = whole(layer, jnp.asarray(x, jnp.float32), form)
    assert relative(got, exact) < 2e-6
    cached, _ = prefill(layer, jnp.asarray(x, jnp.float32), layer.init_cache(2, 40), None, form)
    assert relative(cached, exact) < 2e-6


# What a change could break, and the properties above would have to notice.
def _shifted_slot(real, self, at, **new):
    return real(self, jnp.where(at < self.slots, at + 1, at), **new)


def _call_with(change):
    def broken(real, queries, store, seen, call, *more, **named):
        return real(queries, store, *change(seen, call), *more, **named)

    return broken


def _seen_with(**changes):
    return _call_with(
        lambda seen, call: (
            dataclasses.replace(seen, **{k: change(seen) for k, change in changes.items()}), call
        )
    )  # fmt: skip


def _begun_with(**changes):
    def broken(real, cls, *args, **named):
        step = real(*args, **named)
        return dataclasses.replace(step, **{k: change(step) for k, change in changes.items()})

    return broken


_STEP = mla_jax.Step
PLANTED = {
    "off_by_one_slot": (Dense, "write", _shifted_slot),
    "missing_rope": (rope, "rotate", lambda real, x, by, config: x),
    "wrong_scale": (
        dispatch, "attend",
        _call_with(lambda seen, call: (seen, dataclasses.replace(call, scale=call.scale * 1.01))),
    ),
    "dropped_first_key": (dispatch, "attend", _seen_with(window=lambda seen: 4)),
    "future_token_visible": (
        dispatch, "attend", _seen_with(limits=lambda seen: jnp.where(seen.limits > 0, seen.limits +
        1, 0))
    ),
    "last_token_unseen": (dispatch, "attend", _seen_with(limits=lambda seen: seen.limits - 1)),
    "positions_from_zero": (
        _STEP, "begin", _begun_with(positions=lambda step: step.positions - step.start[:, None])
    ),
    "length_not_kept": (_STEP, "begin", _begun_with(length=lambda step: step.start + 1)),
    "stale_rotation": (_STEP, "rotation", lambda real, self, config: rope.rotation(
        jnp.zeros_like(self.positions), config, self.slots)),
}  # fmt: skip


@pytest.mark.parametrize("bug", [None, *PLANTED])
def test_planted_bugs_are_noticed(bug):
    layer, x = make()
    full = np.asarray(layer(x))
    with contextlib.ExitStack() as stack:
        if bug:
            owner, name, broken = PLANTED[bug]
            wrapped = functools.partial(broken, getattr(owner, name))
            if isinstance(owner, type):  # a method: keep the binding of self
                bound = wrapped
                wrapped = lambda self, *args, **named: bound(self, *args, **named)  # noqa: E731
                if name == "begin":
                    wrapped = classmethod(wrapped)
            stack.enter_context(mock.patch.object(owner, name, wrapped))
        cache, outputs = layer.init_cache(2, 16), []
        for t in (slice(0, 3), slice(3, 6), slice(6, 7)):  # several tokens: causal inside
            y, cache = layer.decode(x[:, t], cache, form="absorbed")
            outputs.append(y)
    worst = np.abs(np.concatenate(outputs, 1) - full).max()
    assert (worst > 1e-3) if bug else (worst < 3e-6)


# Pages: the same properties, with rows that end on a page's border, one before and one behind.
LONG = 2 * PAGE + 2
ENDS = (PAGE - 1, PAGE, PAGE + 1, 2 * PAGE, 0)


def paged(layer, batch, rng, spare=0):
    """A cache whose pages are NaN and come in random order."""
    cache = layer.init_cache(batch, 3 * PAGE, pages=3 * batch + spare)
    free = jnp.asarray(rng.permutation(cache.pages.count), jnp.int32)
    return poisoned(cache.replace(pages=dataclasses.replace(cache.pages, free=free)))


_fork, _truncate = jax.jit(Cache.fork), jax.jit(Cache.truncate)


@functools.cache
def long_pass(name):
    layer, _ = make(CONFIGS[name])
    x = jax.random.normal(jax.random.key(5), (len(ENDS), LONG, layer.config.hidden_size))
    return layer, x, np.asarray(whole(layer, x))


@pytest.mark.parametrize(
    ("name", "form"),
    [
        *itertools.product(["micro", "sinks_window"], ["absorbed", "expanded", "auto"]),
        ("sparse", "absorbed"),
    ],
)
def test_pages_are_one_full_pass(name, form, rng):
    layer, x, full = long_pass(name)
    cache, ends = paged(layer, len(ENDS), rng), np.array(ENDS)
    y, cache = prefill(layer, x[:, : ends.max()], cache, jnp.asarray(ends, jnp.int32), form)
    for b, end in enumerate(ends):
        np.testing.assert_allclose(y[b, :end], full[b, :end], atol=5e-6)
    for _ in range(2):  # over the border
        at = ends[:, None] + np.arange(1)[None]
        y, cache = prefill(layer, x[np.arange(len(ends))[:, None], at], cache, None, form)
        np.testing.assert_allclose(y[:, 0], full[np.arange(len(ends)), ends], atol=5e-6)
        ends = ends + 1
    assert cache.length.tolist() == ends.tolist()
    assert int(cache.pages.available) == 3 * len(ENDS) - int((-(-ends // PAGE)).sum())


@pytest.mark.parametrize(
    ("name", "length"),
    [*itertools.product(["micro"], [*ENDS, 2 * PAGE + 1]), ("sparse", PAGE + 1)],
)
def test_a_forked_row_goes_on_by_itself(name, length, rng):
    layer, x, full = long_pass(name)
    for cache in (paged(layer, 3, rng), poisoned(layer.init_cache(3, 3 * PAGE))):
        held = jnp.array([LONG - 1, 5, 0])
        _, cache = prefill(
            layer, jnp.stack([x[0], x[1], x[2]])[:, : LONG - 1], cache, held, "absorbed"
        )
        cache = _fork(cache, 0, jnp.array([False, True, True]), length)
        assert cache.length.tolist() == [LONG - 1, length, length]
        # The source and both copies go on: the copies with a text of their own.
        # Of one length, so that it is one program; what comes behind is not seen.
        text = np.concatenate([x[0, :length], x[3, :2], np.zeros_like(x[0, length:])])
        other = whole(layer, jnp.asarray(text)[None])[0, length : length + 2]
        new = jnp.stack([x[0, -1:], x[3, :1], x[3, :1]])
        y, cache = prefill(layer, new, cache, None, "absorbed")
        np.testing.assert_allclose(y[0, 0], full[0, -1], atol=5e-6)
        np.testing.assert_allclose(y[1:, 0], jnp.stack([other[0]] * 2), atol=5e-6)
        y, cache = prefill(layer, jnp.stack([x[0, :1], *[x[3, 1:2]] * 2]), cache, None, "absorbed")
        np.testing.assert_allclose(y[1:, 0], jnp.stack([other[1]] * 2), atol=5e-6)


@pytest.mark.parametrize(
    ("name", "cut"),
    [*itertools.product(["micro"], [0, 1, PAGE - 1, PAGE, PAGE + 1]), ("sparse", PAGE + 1)],
)
def test_a_row_cut_within_a_shared_page_leaves_the_others_theirs(name, cut, rng):
    layer, x, full = long_pass(name)
    cache = paged(layer, 2, rng)
    _, cache = prefill(layer, x[:2, : LONG - 1], cache, jnp.array([LONG - 1, 0]), "absorbed")
    cache = cache.fork(0, jnp.array([False, True]))
    cache = _truncate(cache, jnp.array([LONG, cut]))
    new = jnp.stack([x[0, -1:], x[0, cut : cut + 1]])
    y, cache = prefill(layer, new, cache, None, "absorbed")
    np.testing.assert_allclose(y[:, 0], full[0, [LONG - 1, cut]], atol=5e-6)


def test_a_padded_step_keeps_to_its_limits():
    layer, x = make(CONFIGS["micro"])
    full = layer(x)
    _, cache = layer.prefill(x[:, :3], poisoned(layer.init_cache(2, 16)))
    y, cache = layer.prefill(x[:, 3:6], cache, jnp.array([3, 1]), form="absorbed")
    np.testing.assert_allclose(y[0], full[0, 3:6], atol=3e-6)
    np.testing.assert_allclose(y[1, :1], full[1, 3:4], atol=3e-6)
    np.testing.assert_array_equal(y[1, 1:], 0)
    assert cache.length.tolist() == [6, 4]
    assert np.isnan(cache.latent[1, 4:]).all()  # padding is not written
    limits = mla_jax.Step.begin(cache, 2, jnp.array([1, 0])).seen.limits
    assert limits.tolist() == [[7, 0], [0, 0]]  # and sees nothing


def compiled_step(config, batch, slots, dtype=jnp.float32, queries=1):
    layer = nnx.eval_shape(
        lambda: MultiHeadLatentAttention(config, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
    )
    cache = jax.eval_shape(lambda: layer.init_cache(batch, slots, dtype))
    x = jax.ShapeDtypeStruct((batch, queries, config.hidden_size), dtype)
    return mla_jax.decode_step.lower(layer, x, cache).compile()


@pytest.mark.parametrize("slots", [1024, 4096])
def test_the_decode_step_stays_absorbed(slots):
    config = MLAConfig.from_preset("deepseek_v2_lite")
    compiled = compiled_step(config, 2, slots)
    flops = compiled.cost_analysis()["flops"]
    assert flops == pytest.approx(costs.decode_step(config, 2, 1, slots).flops, rel=0.05)


@pytest.mark.parametrize("batch", [1, 4])
def test_the_decode_step_holds_no_copy_of_the_cache(batch):
    config, slots = MLAConfig.from_preset("deepseek_v2_lite"), 32768
    compiled = compiled_step(config, batch, slots)
    memory = compiled.memory_analysis()
    cache_bytes = batch * slots * 576 * 4
    assert memory.alias_size_in_bytes >= cache_bytes  # donation
    scores = 4 * batch * config.num_attention_heads * slots
    # XLA on CPU lays a kernel out anew: kv_b_proj, or with some releases q_proj, the largest.
    kernel = 4 * 2048 * 16 * 192
    assert memory.temp_size_in_bytes < 2 * scores + kernel
    assert memory.temp_size_in_bytes < cache_bytes / 4
    for line in compiled.as_text().splitlines():
        copied = " copy(" in line or " transpose(" in line
        assert not (copied and f"[{batch},{slots},512]" in line.split("=")[1][:40]), line


def test_one_trace_for_a_thousand_steps():
    layer, x = make()

    @functools.partial(jax.jit, donate_argnums=2)
    @chex.assert_max_traces(n=1)
    def step(layer, x, cache):
        return layer.decode(x, cache)

    cache = layer.init_cache(2, 1024)
    held = cache.latent
    for _ in range(1000):
        _, cache = step(layer, x[:, :1], cache)
    assert cache.length.tolist() == [1000, 1000]
    assert held.is_deleted()  # donated


def test_overflow_is_never_silent():
    layer, x = make()
    cache = layer.init_cache(2, 8)
    _, cache = layer.prefill(x[:, :6], cache, jnp.array([6, 3]))
    with pytest.raises(ValueError, match=r"rows \[0\] would hold \[9\] tokens.*max_length=8"):
        layer.decode(x[:, :3], cache)
    before = np.asarray(cache.latent)
    _, after = jax.jit(lambda layer, x, cache: layer.decode(x, cache))(layer, x[:, :3], cache)
    assert after.length.tolist() == [8, 6]
    assert after.overflowed.tolist() == [True, False]
    np.testing.assert_array_equal(after.latent[0, :6], before[0, :6])


def test_positions_of_cached_tokens():
    layer, x = make(CONFIGS["gated_query"])
    places = jnp.array([[5], [9]]) + jnp.arange(T)[None]
    full = whole(layer, x, positions=places)
    for form in ("absorbed", "expanded"):
        cache = layer.init_cache(2, T)
        first, cache = prefill(layer, x[:, :4], cache, None, form, places[:, :4])
        rest, cache = prefill(layer, x[:, 4:], cache, None, form, places[:, 4:])
        np.testing.assert_allclose(jnp.concatenate([first, rest], 1), full, atol=3e-6)
    with pytest.raises(ValueError, match="positions is int32"):
        layer.decode(x[:, :1], layer.init_cache(2, T), positions=jnp.arange(2))


def test_a_row_that_sees_nothing_has_finite_gradients_under_sinks():
    layer, x = make(CONFIGS["sinks_window"])
    mask = jnp.ones((2, 1, T, T), bool).at[:, :, 2].set(False)
    for form in ("absorbed", "expanded"):
        loss = lambda layer, x, form=form: (layer(x, mask=mask, form=form) ** 2).sum()  # noqa: E731
        for leaf in jax.tree.leaves(jax.jit(jax.grad(loss, argnums=(0, 1)))(layer, x)):
            assert np.isfinite(leaf).all()
