import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import MICRO, drawn
from flax import nnx

from mla_jax import decode_loop, prefill_step
from mla_jax.models import Decoder, DecoderConfig

WORDS = 19
CONFIG = DecoderConfig(attention=MICRO, vocab_size=WORDS, intermediate_size=20)


@functools.cache
def make():
    return drawn(lambda: Decoder(CONFIG, rngs=nnx.Rngs(0)))


def prefilled(model, lengths=(3, 1)):
    tokens = jnp.arange(6).reshape(2, 3) % WORDS
    logits, cache = prefill_step(model, tokens, model.init_cache(2, 16), jnp.array(lengths))
    last = logits[jnp.arange(2), jnp.array(lengths) - 1].argmax(-1)
    return last.astype(jnp.int32), cache


def test_stop_tokens_end_rows_on_their_own():
    model = make()
    free, lengths, _ = decode_loop(model, *prefilled(model), steps=8)
    assert lengths.tolist() == [8, 8]
    stop = int(free[0, 2])
    written, lengths, cache = decode_loop(model, *prefilled(model), steps=8, stop_tokens=(stop,))
    for row, start in enumerate((3, 1)):
        found = np.flatnonzero(np.asarray(free[row]) == stop)
        end = int(found[0]) + 1 if found.size else 8
        if prefilled(model)[0][row] == stop:  # which has ended already
            end = 0
        assert lengths[row] == end
        np.testing.assert_array_equal(written[row, :end], free[row, :end])
        np.testing.assert_array_equal(written[row, end:], stop)
        assert cache.length[row] == start + end


def test_sampling_in_the_loop_repeats_with_its_key():
    model = make()
    draw = lambda seed: decode_loop(  # noqa: E731
        model, *prefilled(model), steps=8, key=jax.random.key(seed), temperature=1.5, top_k=9,
        top_p=0.95,
    )[0].tolist()  # fmt: skip
    assert draw(1) == draw(1) != draw(2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0"),
        ({"steps": 14}, r"steps=14 do not fit: rows hold \[3, 1\] of max_length=16"),
        ({"steps": 2, "temperature": 1.0}, "give key="),
        ({"steps": 2, "temperature": -1.0}, r"temperature=-1\.0"),
        ({"steps": 2, "top_k": 0}, "top_k=0"),
        ({"steps": 2, "top_p": 0.0}, r"top_p=0\.0"),
    ],
)
def test_bad_options(options, message):
    model = make()
    tokens, cache = prefilled(model)
    with pytest.raises(ValueError, match=message):
        decode_loop(model, tokens, cache, **options)
    with pytest.raises(ValueError, match="tokens is float32"):
        decode_loop(model, tokens.astype(jnp.float32), cache, steps=1)
