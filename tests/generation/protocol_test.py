"""A model of one's own: thirty lines, and everything that generates runs it."""

import functools
import pathlib

import jax
import numpy as np
import pytest
from common import PLAIN, drawn, put, slow
from flax import nnx

import mla_jax
from mla_jax.generation import Tokenizer, generate, score

EXAMPLE = pathlib.Path(__file__).parents[2] / "docs" / "examples" / "own_model.py"
PROMPTS = [[3, 1, 4, 1, 5, 1, 4], [9], [2, 6, 5, 3, 5, 8, 9, 7, 9]]
SHARED = {"block": 3, "logprobs": True}  # by one program


@functools.cache
def example():
    """The class that the page shows, without what the example does with it."""
    names: dict = {"__name__": "own_model"}
    exec(EXAMPLE.read_text().split("# --8<-- [end:model]")[0], names)
    return names["Model"]


def make(layers):
    return drawn(lambda: example()(PLAIN, layers=layers, words=50, rngs=nnx.Rngs(0)))


@functools.cache
def model():
    return make(layers=1)


@jax.jit
def _whole(model, tokens):
    hidden, _ = model.extend(tokens, model.init_cache(1, 64))
    return model.logits(hidden)[0]


@functools.cache
def logits(text):
    """Of every token of a text, in one pass; padded, which a causal model does not see."""
    padded = np.zeros((1, 64), np.int32)
    padded[0, : len(text)] = text
    return np.asarray(_whole(model(), padded))[: len(text)]


def log_softmax(logits):
    logits = np.float64(logits)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def greedy(prompt, count):
    text = [*prompt]
    for _ in range(count):
        text.append(int(logits(tuple(text))[-1].argmax()))
    return text[len(prompt) :]


@pytest.mark.parametrize("options", [{}, {"speculate": 3}, {"pages": 4}], ids=str)
def test_generate_ragged_and_streamed(options):
    seen = [[], [], []]
    result = generate(
        model(), PROMPTS, max_new_tokens=8,
        on_tokens=lambda row, tokens: seen[row].extend(tokens), **SHARED, **options,
    )  # fmt: skip
    assert result.tokens == [greedy(prompt, 8) for prompt in PROMPTS] == seen
    for prompt, tokens, found in zip(PROMPTS, result.tokens, result.logprobs, strict=True):
        each = log_softmax(logits((*prompt, *tokens)))
        expected = [each[len(prompt) - 1 + n, token] for n, token in enumerate(tokens)]
        np.testing.assert_allclose(found, expected, atol=1e-4)  # of numbers near 4, in float32


def test_score():
    for row, found in zip(PROMPTS, score(model(), PROMPTS), strict=True):
        each = log_softmax(logits(tuple(row)))
        np.testing.assert_allclose(
            found, [each[n, token] for n, token in enumerate(row[1:])], atol=1e-4
        )


def test_the_vocabulary_is_that_of_the_logits():
    with pytest.raises(ValueError, match="token 50: the model's tokens are 0 to 49"):
        generate(model(), [[50]])


def test_steps_and_loop():
    tokens, lengths = put([[3, 1, 4], [9, 0, 0]], np.int32), put([3, 1], np.int32)
    for step in (mla_jax.bind(model()), None):
        cache = model().init_cache(2, 16)
        if step is None:
            first, cache = mla_jax.prefill_step(model(), tokens, cache, lengths)
            second, cache = mla_jax.decode_step(model(), tokens[:, :1], cache)
        else:
            first, cache = step.prefill(tokens, cache, lengths)
            hidden, cache = step.extend(tokens[:, :1], cache)
            second = step.logits(hidden)
        first, second = np.asarray(first), np.asarray(second)
        np.testing.assert_allclose(first[0, 2], logits((3, 1, 4))[-1], atol=1e-5)
        np.testing.assert_allclose(second[1, 0], logits((9, 9))[-1], atol=1e-5)
    newest = put(second[:, 0].argmax(-1), np.int32)
    written, counts, _ = mla_jax.decode_loop(model(), newest, cache, steps=4)
    assert counts.tolist() == [4, 4]
    assert np.asarray(written)[1].tolist() == greedy((9, 9, int(newest[1])), 4)


def test_bound_models_generate_and_are_snapshots():
    own = mla_jax.bind(model())
    assert mla_jax.bind(own) is own
    result = generate(own, PROMPTS, max_new_tokens=3, **SHARED)
    assert result.tokens == [greedy(p, 3) for p in PROMPTS]
    made = make(layers=1)
    step = mla_jax.bind(made)
    before, _ = step.decode([[3]], step.init_cache(1, 8))
    made.embed.embedding.set_value(put(np.zeros(made.embed.embedding.shape), np.float32))
    after, _ = step.decode([[3]], step.init_cache(1, 8))
    np.testing.assert_array_equal(before, after)
    assert not mla_jax.bind(made).decode([[3]], step.init_cache(1, 8))[0].any()


def test_what_cannot_be_bound():
    with pytest.raises(TypeError, match="model has str 'model', which is no array"):
        mla_jax.bind("model")


def test_stop_strings():
    tokenizer = Tokenizer.bytes()
    plain = generate(model(), PROMPTS, tokenizer=tokenizer, max_new_tokens=8, **SHARED)
    stop = plain.texts[0][3:5]
    shown = ["", "", ""]

    def show(row, text):
        shown[row] += text

    result = generate(
        model(),
        PROMPTS,
        tokenizer=tokenizer,
        max_new_tokens=8,
        stop_strings=stop,
        on_text=show,
        **SHARED,
    )
    assert shown == result.texts
    for row, (text, whole) in enumerate(zip(result.texts, plain.texts, strict=True)):
        assert text == whole.split(stop)[0]
        count = len(text) + 2 if stop in whole else 8  # words are bytes of ASCII
        assert len(result.tokens[row]) == count
        assert result.cache.length[row] == len(PROMPTS[row]) + count - 1
    for options, what in (({"stop_strings": "a"}, "stop_strings"), ({"on_text": print}, "on_text")):
        with pytest.raises(ValueError, match=f"{what} needs? the tokenizer"):
            generate(model(), PROMPTS, **options)


@pytest.mark.parametrize("speculate", [0, 3])
def test_a_repetition_penalty(speculate):
    result = generate(model(), PROMPTS, max_new_tokens=9, repetition_penalty=1.4,
                      speculate=speculate)  # fmt: skip
    for prompt, tokens in zip(PROMPTS, result.tokens, strict=True):
        text = [*prompt]
        for token in tokens:
            last = logits(tuple(text))[-1].astype(np.float64)
            seen = np.isin(np.arange(50), text)
            last = np.where(seen, np.where(last < 0, last * 1.4, last / 1.4), last)
            assert token == last.argmax()
            text.append(token)


@pytest.mark.parametrize("speculate", [slow(0), 3])
def test_x64(speculate):
    with jax.enable_x64(True):
        result = generate(make(layers=1), PROMPTS, max_new_tokens=6, speculate=speculate)
    assert result.tokens == [greedy(prompt, 6) for prompt in PROMPTS]
