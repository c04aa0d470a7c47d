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
from common import MICRO, PLAIN, drawn, emptied, relative, slow
from flax import nnx
from numpy_decoder import NumpyDecoder

import mla_jax
from mla_jax import MLAConfig, MultiHeadLatentAttention, costs, rope
from mla_jax.cache import PAGE, Cache, Dense
from mla_jax.ops import dispatch

CONFIGS = {
    "micro": MICRO,
    "plain": PLAIN,
    "no_rotary": PLAIN.replace(qk_rope_head_dim=0),
    "only_rotary": PLAIN.replace(qk_nope_head_dim=0),
    "sinks_window_nope": MICRO.replace(
        attention_sinks=True, sliding_window=3, output_gate="head", mla_use_nope=True
    ),
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
WITH_SINKS = PLAIN.replace(attention_sinks=True)
T = 7
ROWS = T + 1  # so that each can be split at its own point


@functools.cache
def make(name="micro"):
    config = CONFIGS[name]
    layer = drawn(lambda: MultiHeadLatentAttention(config, rngs=nnx.Rngs(0)))
    for held in ("sinks", "ssmax_scale", "ssmax_bias"):  # which start at 0 and 1
        if hasattr(layer, held):
            noise = np.random.default_rng(len(held)).standard_normal(config.num_attention_heads)
            value = np.asarray(getattr(layer, held)[...]) + 0.5 * noise
            setattr(layer, held, nnx.Param(jax.device_put(np.float32(value))))
    x = np.random.default_rng(1).standard_normal((ROWS, T, config.hidden_size), np.float32)
    return layer, x


def empty(layer, slots=T, rows=ROWS):
    """NaN in every slot, which are all unused."""
    return emptied(lambda: layer.init_cache(rows, slots))


@functools.partial(jax.jit, static_argnames="form")
def prefill(layer, x, cache, lengths, form, positions=None):
    return layer.prefill(x, cache, lengths, positions=positions, form=form)


def same(count, rows=ROWS):
    """So many tokens for every row: lengths as an array, as ragged ones are, and one program."""
    return np.full(rows, count, np.int32)


_whole = jax.jit(lambda layer, x: layer(x))


@functools.cache
def in_both_forms(name):
    """Gradients and outputs, absorbed and expanded."""

    def loss(layer, x, form):
        y = layer(x, form=form)
        weights = np.arange(x.size, dtype=np.float32).reshape(x.shape) % 331
        return (jnp.sin(y) * weights).sum(), y

    @jax.jit
    def both(layer, x):
        of = jax.grad(loss, (0, 1), has_aux=True)
        return [of(layer, x, form) for form in ("absorbed", "expanded")]

    return jax.device_get(both(*make(name)))


OF_OTHERS = ("micro", "plain")  # whose options others have too


@functools.cache
def full(name="micro"):
    return np.asarray(_whole(*make(name))) if name in OF_OTHERS else in_both_forms(name)[0][1]


@pytest.mark.parametrize("name", [slow(name) if name in OF_OTHERS else name for name in CONFIGS])
def test_forms_agree_in_values_and_gradients(name):
    (absorbed, y), (expanded, other) = in_both_forms(name)
    assert relative(y, other) < 1e-6
    chex.assert_trees_all_close(
        jax.tree.leaves(absorbed), jax.tree.leaves(expanded), rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize(
    ("name", "prefilled", "decoded"),
    [
        slow("micro", "absorbed", "absorbed"), slow("micro", "expanded", "expanded"),
        ("gated_query", "expanded", "absorbed"), ("no_norms", "expanded", "expanded"),
        *(slow(name, "expanded", "absorbed") for name in ("plain", "no_norms")),
        ("sparse", "expanded", "absorbed"), ("pooled", "absorbed", "expanded"),
        ("sinks_window_nope", "absorbed", "expanded"),
    ],
)  # fmt: skip
def test_any_split_is_one_full_pass(name, prefilled, decoded):
    """Every row split at its own point: the first tokens prefilled, the rest decoded singly."""
    layer, x = make(name)
    splits = np.arange(ROWS, dtype=np.int32)
    y, cache = prefill(layer, x, empty(layer), splits, prefilled)
    got, row = np.array(y), np.arange(ROWS)
    for b, n in enumerate(splits):
        np.testing.assert_array_equal(got[b, n:], 0)
    for step in range(T):
        at, live = np.minimum(splits + step, T - 1), splits + step < T
        y, cache = prefill(layer, x[row, at][:, None], cache, np.int32(live), decoded)
        got[row[live], at[live]] = np.asarray(y)[live, 0]
    np.testing.assert_allclose(got, full(name), atol=3e-6)


def test_chunks_of_any_size():
    layer, x = make()
    for form in ("absorbed", "expanded", "auto"):
        cache, outputs = empty(layer), []
        for start, end in ((0, 3), (3, 6), (6, 7)):  # padded: one program
            chunk = np.pad(x[:, start:end], ((0, 0), (0, 3 - end + start), (0, 0)))
            y, cache = prefill(layer, chunk, cache, same(end - start), form)
            outputs.append(np.asarray(y)[:, : end - start])
        np.testing.assert_allclose(np.concatenate(outputs, 1), full(), atol=3e-6)


def test_accuracy_against_float64():
    config = MLAConfig.from_preset("deepseek_v3").replace(
        hidden_size=96, num_attention_heads=2, q_lora_rank=64
    )
    layer = drawn(lambda: MultiHeadLatentAttention(config, precision="highest", rngs=nnx.Rngs(0)))
    x = np.random.default_rng(1).standard_normal((2, 33, 96), np.float32)
    exact = np.stack([NumpyDecoder.attended(layer, row) for row in x])

    @jax.jit
    def run(layer, x, cache):
        forms = ("absorbed", "expanded")
        whole = [layer(x, form=form) for form in forms]
        return whole + [layer.prefill(x, cache, form=form)[0] for form in forms]

    for got in run(layer, x, empty(layer, 40, rows=2)):
        assert relative(got, exact) < 2e-6


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
    layer, x = make("plain")

    def run(layer, x, cache):
        def step(cache, new):
            y, cache = layer.decode(new, cache, form="absorbed")
            return cache, y

        return jax.lax.scan(step, cache, x)[1]

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
        steps = np.stack([x[:2, :3], x[:2, 3:6]])  # several tokens: causal inside
        first, second = jax.jit(run)(layer, steps, emptied(lambda: layer.init_cache(2, 16), 0))
    worst = np.abs(np.concatenate([first, second], 1) - full("plain")[:2, :6]).max()
    assert (worst > 1e-3) if bug else (worst < 3e-6)


# Pages: the same properties, with rows that end on a page's border, one before and one behind.
LONG = 2 * PAGE + 3
ENDS = (PAGE - 1, PAGE, PAGE + 1, 2 * PAGE, 0)


def paged(layer, rng):
    """A cache whose pages are NaN and come in random order."""
    rows = len(ENDS)
    cache = emptied(lambda: layer.init_cache(rows, 3 * PAGE, pages=3 * rows))
    free = rng.permutation(cache.pages.count).astype(np.int32)
    return cache.replace(pages=dataclasses.replace(cache.pages, free=free))


_fork, _truncate = jax.jit(Cache.fork), jax.jit(Cache.truncate)


@functools.cache
def long_pass(name):
    layer, _ = make(name)
    shape = len(ENDS), LONG, layer.config.hidden_size
    x = np.random.default_rng(5).standard_normal(shape, np.float32)
    return layer, x, np.asarray(_whole(layer, x))


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("micro", "absorbed"), slow("micro", "expanded"), slow("sinks_window_nope", "auto"),
        ("sinks_window_nope", "expanded"), ("sparse", "absorbed"),
    ],
)  # fmt: skip
def test_pages_are_one_full_pass(name, form, rng):
    layer, x, full = long_pass(name)
    cache, ends, rows = paged(layer, rng), np.array(ENDS, np.int32), np.arange(len(ENDS))
    y, cache = prefill(layer, x[:, : ends.max()], cache, ends, form)
    y = np.asarray(y)
    for b, end in enumerate(ends):
        np.testing.assert_allclose(y[b, :end], full[b, :end], atol=5e-6)
    for _ in range(2):  # over the border
        y, cache = prefill(layer, x[rows, ends][:, None], cache, None, form)
        np.testing.assert_allclose(np.asarray(y)[:, 0], full[rows, ends], atol=5e-6)
        ends = ends + 1
    assert cache.length.tolist() == ends.tolist()
    assert int(cache.pages.available) == 3 * len(ENDS) - int((-(-ends // PAGE)).sum())


def one_long_row(layer, x, rng):
    """Row 0 holds 257 tokens, the others a few; by the programs of the test above."""
    lengths = np.array([2 * PAGE, 5, 0, 0, 0], np.int32)
    _, cache = prefill(layer, x[:, : 2 * PAGE], paged(layer, rng), lengths, "absorbed")
    return prefill(layer, x[np.arange(5), lengths][:, None], cache, None, "absorbed")[1]


SECOND, TWO = np.arange(5) == 1, np.isin(np.arange(5), (1, 2))


@pytest.mark.parametrize(
    ("name", "length"),
    [*itertools.product(["micro"], [*ENDS, 2 * PAGE + 1]), ("sparse", PAGE + 1)],
)
def test_a_forked_row_goes_on_by_itself(name, length, rng):
    layer, x, full = long_pass(name)
    cache = _fork(one_long_row(layer, x, rng), 0, TWO, length)
    assert cache.length.tolist() == [2 * PAGE + 1, length, length, 1, 1]
    # The source and both copies go on: the copies with a text of their own.
    # Of one length, so that it is one program; what comes behind is not seen.
    text = np.concatenate([x[0, :length], x[3, :2], np.zeros_like(x[0, length + 2 :])])
    other = np.asarray(_whole(layer, np.stack([text] * len(x))))[0, length : length + 2]
    y, cache = prefill(
        layer, x[[0, 3, 3, 3, 3], [2 * PAGE + 1, *[0] * 4]][:, None], cache, None, "absorbed"
    )
    y = np.asarray(y)
    np.testing.assert_allclose(y[0, 0], full[0, 2 * PAGE + 1], atol=5e-6)
    np.testing.assert_allclose(y[1:3, 0], np.stack([other[0]] * 2), atol=5e-6)
    y, cache = prefill(layer, x[[0, 3, 3, 3, 3], 1][:, None], cache, None, "absorbed")
    np.testing.assert_allclose(np.asarray(y)[1:3, 0], np.stack([other[1]] * 2), atol=5e-6)


@pytest.mark.parametrize("name", ["micro", "sparse"])
def test_rows_forked_without_pages_go_on_by_themselves(name):
    """Row 7 holds all tokens but the last; each of the first four gets three of them."""
    layer, x = make(name)
    lengths = np.minimum(np.arange(ROWS), T - 1).astype(np.int32)
    _, cache = prefill(layer, x, empty(layer), lengths, "expanded")
    cache = _fork(cache, ROWS - 1, np.arange(ROWS) < 4, 3)
    assert cache.length.tolist() == [3, 3, 3, 3, 4, 5, 6, 6]
    new = np.stack([*[x[7, 3]] * 4, x[4, 4], x[5, 5], x[6, 6], x[7, 6]])[:, None]
    y, _ = prefill(layer, new, cache, same(1), "absorbed")
    wanted = full(name)[[7, 7, 7, 7, 4, 5, 6, 7], [3, 3, 3, 3, 4, 5, 6, 6]]
    np.testing.assert_allclose(np.asarray(y)[:, 0], wanted, atol=5e-6)


@pytest.mark.parametrize(
    ("name", "cut"),
    [*itertools.product(["micro"], [0, 1, PAGE - 1, PAGE, PAGE + 1]), ("sparse", PAGE + 1)],
)
def test_a_row_cut_within_a_shared_page_leaves_the_others_theirs(name, cut, rng):
    layer, x, full = long_pass(name)
    end = 2 * PAGE + 1
    cache = _fork(one_long_row(layer, x, rng), 0, SECOND, end)
    cache = _truncate(cache, np.array([LONG, cut, 0, 0, 0], np.int32))
    y, cache = prefill(layer, x[0, [end, cut, 0, 0, 0]][:, None], cache, None, "absorbed")
    np.testing.assert_allclose(np.asarray(y)[:, 0], full[0, [end, cut, 0, 0, 0]], atol=5e-6)


def test_a_padded_step_keeps_to_its_limits():
    layer, x = make()
    _, cache = prefill(layer, x[:, :3], empty(layer), same(3), "absorbed")
    counts = np.array([3, 1, *[0] * (ROWS - 2)], np.int32)
    y, cache = prefill(layer, x[:, 3:6], cache, counts, "absorbed")
    y = np.asarray(y)
    np.testing.assert_allclose(y[0], full()[0, 3:6], atol=3e-6)
    np.testing.assert_allclose(y[1, :1], full()[1, 3:4], atol=3e-6)
    np.testing.assert_array_equal(y[1, 1:], 0)
    assert cache.length.tolist() == [6, 4, *[3] * (ROWS - 2)]
    assert np.isnan(np.asarray(cache.latent)[1, 4:]).all()  # padding is not written
    limits = jax.jit(lambda cache, counts: mla_jax.Step.begin(cache, 2, counts).seen.limits)
    found = np.asarray(limits(cache, np.minimum(counts, 1) * (counts > 1)))
    assert found[:2].tolist() == [[7, 0], [0, 0]]  # and sees nothing


def compiled_step(config, batch, slots, dtype=jnp.float32, queries=1):
    layer = nnx.eval_shape(
        lambda: MultiHeadLatentAttention(config, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
    )
    cache = jax.eval_shape(lambda: layer.init_cache(batch, slots, dtype))
    x = jax.ShapeDtypeStruct((batch, queries, config.hidden_size), dtype)
    return mla_jax.decode_step.lower(layer, x, cache).compile()


def test_the_decode_step_stays_absorbed():
    config = MLAConfig.from_preset("deepseek_v2_lite")
    compiled = compiled_step(config, 2, 4096)
    flops = compiled.cost_analysis()["flops"]
    assert flops == pytest.approx(costs.decode_step(config, 2, 1, 4096).flops, rel=0.05)


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
    layer, x = make("plain")

    @functools.partial(jax.jit, donate_argnums=2)
    @chex.assert_max_traces(n=1)
    def step(layer, x, cache):
        return layer.decode(x, cache)

    cache, x = empty(layer, 1024, rows=2), jax.device_put(x[:2, :1])
    held = cache.latent
    for _ in range(1000):
        _, cache = step(layer, x, cache)
    assert cache.length.tolist() == [1000, 1000]
    assert held.is_deleted()  # donated


def test_overflow_is_never_silent():
    layer, x = make()
    _, cache = prefill(layer, x[:, :3], empty(layer), same(3) * (np.arange(ROWS) < 1), "absorbed")
    _, cache = prefill(layer, x[:, 3:6], cache, same(3) * (np.arange(ROWS) < 2), "absorbed")
    assert cache.length.tolist()[:3] == [6, 3, 0]
    with pytest.raises(ValueError, match=r"rows \[0\] would hold \[9\] tokens.*max_length=7"):
        layer.decode(jax.device_put(x[:, :3]), cache)
    before = np.asarray(cache.latent)
    _, after = prefill(layer, x[:, :3], cache, same(3), "absorbed")
    assert after.length.tolist()[:3] == [7, 6, 3]
    assert after.overflowed.tolist() == [True] + [False] * (ROWS - 1)
    np.testing.assert_array_equal(np.asarray(after.latent)[0, :6], before[0, :6])


def test_positions_of_cached_tokens():
    layer, x = make("gated_query")
    places = (5 + 4 * np.arange(ROWS)[:, None] + np.arange(6)).astype(np.int32)
    full = jax.jit(lambda layer, x, positions: layer(x, positions=positions))
    full = np.asarray(full(layer, x[:, :6], places))
    for form in ("absorbed", "expanded"):
        cache, outputs = empty(layer), []
        for part in (slice(0, 3), slice(3, 6)):
            y, cache = prefill(layer, x[:, part], cache, None, form, places[:, part])
            outputs.append(y)
        np.testing.assert_allclose(np.concatenate(outputs, 1), full, atol=3e-6)
    with pytest.raises(ValueError, match="positions is int32"):
        layer.decode(jax.device_put(x[:, :1]), empty(layer), positions=np.arange(2, dtype=np.int32))


def test_a_row_that_sees_nothing_has_finite_gradients_under_sinks():
    layer = drawn(lambda: MultiHeadLatentAttention(WITH_SINKS, rngs=nnx.Rngs(0)))
    _, x = make()
    mask = np.ones((ROWS, 1, T, T), bool)
    mask[:, :, 2] = False

    @jax.jit
    def both(layer, x, mask):
        loss = lambda layer, x, form: (layer(x, mask=mask, form=form) ** 2).sum()  # noqa: E731
        return [jax.grad(loss, (0, 1))(layer, x, form) for form in ("absorbed", "expanded")]

    for leaf in jax.tree.leaves(both(layer, x, mask)):
        assert np.isfinite(leaf).all()
