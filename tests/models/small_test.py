"""The decoder: causal, its cached path equals one full pass, and it refuses bad input clearly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import MICRO, PLAIN, drawn, emptied, relative
from flax import nnx

from mla_jax.generation.steps import decode_loop, decode_step, prefill_step
from mla_jax.models import Decoder, DecoderConfig

WORDS = 31

_full = jax.jit(lambda model, tokens, **options: model(tokens, **options))


@functools.cache
def _model(attention=PLAIN, layers=1, **options):
    config = DecoderConfig(
        attention=attention.replace(num_hidden_layers=layers), vocab_size=WORDS,
        intermediate_size=20,
    )  # fmt: skip
    return drawn(lambda: Decoder(config, rngs=nnx.Rngs(0), **options))


@pytest.fixture
def tokens(rng):
    return rng.integers(0, WORDS, (3, 7), np.int32)


def test_logits_are_float32_and_causal(tokens):
    model = _model(dtype=jnp.bfloat16)
    logits = _full(model, tokens)
    assert logits.shape == (3, 7, WORDS)
    assert logits.dtype == jnp.float32
    other = tokens.copy()
    other[:, 4] = (tokens[:, 4] + 1) % WORDS
    logits, changed = np.asarray(logits), np.asarray(_full(model, other))
    np.testing.assert_array_equal(changed[:, :4], logits[:, :4])
    assert (changed[:, 4:] != logits[:, 4:]).any(-1).all()


@pytest.mark.parametrize(
    ("attention", "layers"), [(MICRO, 2), (PLAIN, 1)], ids=["micro, two layers", "plain"]
)
def test_ragged_prefill_and_decode_equal_one_pass(attention, layers, tokens):
    model = _model(attention, layers)
    full, lengths, rows = np.asarray(_full(model, tokens)), np.int32([5, 1, 3]), np.arange(3)
    cache = emptied(lambda: model.init_cache(3, 9))
    logits, cache = prefill_step(model, tokens[:, :5], cache, lengths)
    for row, length in enumerate(lengths):
        assert relative(np.asarray(logits)[row, :length], full[row, :length]) < 2e-5
    for at in (lengths, lengths + 1):
        logits, cache = decode_step(model, tokens[rows, at][:, None], cache)
        assert relative(np.asarray(logits)[:, 0], full[rows, at]) < 2e-5
    np.testing.assert_array_equal(cache.length, lengths + 2)


def test_greedy_loop_equals_full_passes(tokens):
    model = _model()
    cache = emptied(lambda: model.init_cache(3, 9))
    _, cache = prefill_step(model, tokens[:, :2], cache)
    written, lengths, _ = decode_loop(model, tokens[:, 2], cache, steps=4)
    full = np.asarray(_full(model, np.concatenate([tokens[:, :3], written], axis=1)))
    np.testing.assert_array_equal(written, full[:, 2:-1].argmax(-1))
    np.testing.assert_array_equal(lengths, [4, 4, 4])


def test_segments_do_not_see_each_other(tokens):
    model = _model()
    packed = np.asarray(_full(
        model, tokens, segment_ids=np.int32([[0] * 4 + [1] * 3] * 3), positions=np.r_[0:4, 0:3],
    ))  # fmt: skip
    behind = np.roll(tokens, -4, axis=1)  # what follows a text does not reach it
    assert relative(packed[:, :4], np.asarray(_full(model, tokens))[:, :4]) < 2e-6
    assert relative(packed[:, 4:], np.asarray(_full(model, behind))[:, :3]) < 2e-6


@pytest.mark.parametrize("jit", [jax.jit, nnx.jit], ids=["jax.jit", "nnx.jit"])
def test_jit_and_split_merge(jit, tokens):
    model, tokens = _model(), jax.device_put(tokens)
    expected = model(tokens)
    assert relative(jit(lambda m, t: m(t))(model, tokens), expected) < 2e-6
    assert relative(nnx.merge(*nnx.split(model))(tokens), expected) == 0


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (jnp.zeros((3,), jnp.int32), r"tokens is int32 of shape \(3,\)"),
        (jnp.zeros((3, 2), jnp.float32), r"tokens is float32"),
    ],
    ids=["rank", "dtype"],
)
def test_bad_tokens(bad, message):
    model = _model()
    with pytest.raises(ValueError, match=message):
        model(bad)
    with pytest.raises(ValueError, match=message):
        model.decode(bad, model.init_cache(3, 4))


def test_cache_of_another_depth(tokens):
    model, tokens = _model(layers=2), jax.device_put(tokens)
    cache = emptied(lambda: model.init_cache(3, 9))
    with pytest.raises(ValueError, match="cache has 1 stores of 3 rows: the model has 2"):
        model.prefill(tokens, cache.replace(stores=cache.stores[:1]))


def test_overflow_is_an_error_outside_jit(tokens):
    model, tokens = _model(), jax.device_put(tokens)
    with pytest.raises(ValueError, match="max_length=6"):
        model.prefill(tokens, emptied(lambda: model.init_cache(3, 6)))


@pytest.mark.parametrize("key", ["vocab_size", "intermediate_size"])
def test_config_names_the_bad_key(key):
    with pytest.raises(ValueError, match=f"{key}=0"):
        DecoderConfig(attention=MICRO, **{key: 0})
