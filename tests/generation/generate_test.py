"""Generation: plain, in batches, speculative; what it refuses."""

import functools

import jax
import numpy as np
import pytest
from common import PLAIN, drawn, slow
from flax import nnx

from mla_jax import Cache, Step
from mla_jax.generation import drafts, generate, prefill
from mla_jax.models import Decoder, DecoderConfig


@functools.cache
def model():
    attention = PLAIN.replace(num_hidden_layers=1, max_position_embeddings=1024)
    config = DecoderConfig(attention=attention, vocab_size=256, intermediate_size=20)
    return drawn(lambda: Decoder(config, precision="highest", rngs=nnx.Rngs(0)))


NO_WORD = (256,)  # programs are by how many tokens stop a text
PROMPTS = [list(b"abcabcabcab"), list(b"x"), list(b"one two three one two")]
_full = jax.jit(lambda model, tokens: model(tokens))


@functools.cache
def greedy(prompt: bytes, count: int):
    """By full passes, one token at a time."""
    tokens = list(prompt)
    for _ in range(count):
        padded = np.zeros((1, 48), np.int32)
        padded[0, : len(tokens)] = tokens
        tokens.append(int(np.asarray(_full(model(), padded))[0, len(tokens) - 1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("block", [4, 100])
def test_a_ragged_batch_is_every_prompt_alone(block):
    seen = [[], [], []]
    result = generate(
        model(), PROMPTS, max_new_tokens=11, block=block, stop_tokens=NO_WORD,
        on_tokens=lambda row, tokens: seen[row].extend(tokens),
    )  # fmt: skip
    assert result.tokens == [greedy(bytes(prompt), 11) for prompt in PROMPTS] == seen
    assert (result.new_tokens, result.steps, result.accepted) == (33, 10, None)
    assert result.cache_bytes == 3 * 256 * 20 * 4  # 21 + 11 slots, rounded up
    assert result.tokens_per_second > 0


def test_prompts_in_chunks(monkeypatch):
    whole = [greedy(bytes(prompt), 5) for prompt in PROMPTS]
    monkeypatch.setattr(prefill, "WIDTHS", (4, 8))
    monkeypatch.setattr(prefill, "TOKENS", 16)  # of two rows at a time
    result = generate(model(), PROMPTS, max_new_tokens=5, block=4, stop_tokens=NO_WORD)
    assert result.tokens == whole


@pytest.mark.parametrize("drafts", [slow(1), 4])
def test_speculation_changes_nothing_but_the_steps(drafts):
    result = generate(model(), PROMPTS, max_new_tokens=20, speculate=drafts, block=4)
    assert result.tokens == [greedy(bytes(prompt), 20) for prompt in PROMPTS]
    assert 0 <= result.accepted <= 1


def test_speculation_saves_steps_where_text_repeats():
    class Parrot:
        """After token t comes t + 1 modulo 7, whatever was before."""

        def init_cache(self, rows, slots, dtype=None, pages=None):
            return Cache.init([model().blocks[0].attention], rows, slots, dtype, pages)

        def extend(self, tokens, cache, lengths=None):
            step = Step.begin(cache, tokens.shape[1], lengths)
            return jax.nn.one_hot((tokens + 1) % 7, 256), cache.end(cache.stores, step)

        def logits(self, hidden):
            return hidden

    jax.tree_util.register_static(Parrot)
    prompt = [0, 1, 2, 3, 4, 5, 6, 0, 1]
    expected = [(2 + i) % 7 for i in range(30)]
    for count, least in ((0, 29), (4, 6)):
        result = generate(Parrot(), [prompt], max_new_tokens=30, speculate=count, block=1)
        assert result.tokens == [expected]
        assert result.steps == least
    assert result.accepted == 1


def test_look_up():
    look_up = jax.jit(drafts.look_up, static_argnums=2)
    text = np.int32([[1, 2, 3, 9, 1, 2, 3, 0, 0, 0], [5, 6, 7, 8, 0, 0, 0, 0, 0, 0]])
    found = look_up(text, np.int32([7, 4]), 3)
    np.testing.assert_array_equal(found, [[9, 1, 2], [8, 8, 8]])
    # the longest match wins over the latest
    text = np.int32([[1, 2, 3, 4, 3, 8, 1, 2, 3, 0]] * 2)
    np.testing.assert_array_equal(look_up(text, np.int32([9, 9]), 3), [[4, 3, 8]] * 2)


def test_stop_tokens_end_rows():
    plain = [greedy(bytes(prompt), 11) for prompt in PROMPTS]
    stop = plain[0][3]
    result = generate(model(), PROMPTS, max_new_tokens=11, stop_tokens=(stop,), block=4)
    for got, full in zip(result.tokens, plain, strict=True):
        assert got == (full[: full.index(stop) + 1] if stop in full else full)


def test_sampling_is_seeded():
    options = {"max_new_tokens": 8, "temperature": 1.0, "top_k": 50, "top_p": 0.9}
    one, same, other = (generate(model(), PROMPTS, seed=s, **options).tokens for s in (1, 1, 2))
    assert one == same != other


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "at least one"),
        ([[1], []], {}, "none may be empty"),
        ([[1, 256]], {}, "prompt 0 has token 256: the model's tokens are 0 to 255"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0"),
        ([[1]], {"speculate": -1}, "speculate=-1"),
        ([[1] * 8], {"max_length": 9, "max_new_tokens": 4}, "max_length=9.*need 12 slots"),
        ([[1]], {"max_new_tokens": 5000}, "1024 positions"),
        ([[1]], {"temperature": -1.0}, "temperature=-1"),
    ],
)
def test_refusals(prompts, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model(), prompts, **options)
