"""Speculation by multi-token prediction: drafts of every round, what is accepted and written."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import MICRO, PLAIN
from flax import nnx
from numpy_decoder import NumpyDecoder

from mla_jax import generation
from mla_jax.generation import generate
from mla_jax.models import Decoder, DecoderConfig

WORDS = 5  # few, so that guesses of random weights are right now and then
RANDOM = DecoderConfig(
    attention=MICRO.replace(num_hidden_layers=1), vocab_size=WORDS, intermediate_size=20,
    num_nextn_predict_layers=1,
)  # fmt: skip
KEY, GREEDY = jax.random.key(0), {"temperature": 0.0, "top_k": None, "top_p": None}
PROMPTS = [[1, 4, 0, 2, 2, 3, 1], [3], [0, 4, 1, 1]]


@functools.cache
def model():
    model = Decoder(RANDOM, mtp=True, precision="highest", rngs=nnx.Rngs(4))
    random = np.random.default_rng(1)
    for path, parameter in nnx.iter_graph(model):
        if isinstance(parameter, nnx.Param) and path[-1] == "scale":
            parameter.set_value(jnp.asarray(1 + 0.3 * random.standard_normal(parameter.shape)))
    return model


def prophet(words: int, knowing: bool):
    """A model of one layer, and that layer again as predictor, on the text without its first token.

    Where it is not knowing, the predictor's weights are random.
    """
    config = DecoderConfig(
        attention=PLAIN.replace(num_hidden_layers=1), vocab_size=words, intermediate_size=20,
        num_nextn_predict_layers=1,
    )  # fmt: skip
    model = Decoder(config, mtp=True, precision="highest", rngs=nnx.Rngs(0))
    table = model.embed.embedding[...]
    # Rows that a norm leaves as they are.
    model.embed.embedding.set_value(table / jnp.sqrt((table**2).mean(-1, keepdims=True)))
    if knowing:
        nnx.update(model.predictor.block, nnx.state(model.blocks[0]))
        model.predictor.eh_proj.kernel.set_value(jnp.eye(48, 24))  # the embedding's half
    return model


@functools.cache
def exact():
    return NumpyDecoder(model())


@functools.cache
def greedy(text: tuple[int, ...], count: int) -> list[int]:
    """The next tokens by float64."""
    tokens = list(text)
    for _ in range(count):
        tokens.append(int(exact().logits(tokens)[-1].argmax()))
    return tokens[len(text) :]


@functools.cache
def guesses(text: tuple[int, ...], drafts: int) -> list[int]:
    return exact().guesses(text, drafts)


def rounds(prompt: list[int], drafts: int, count: int, stop: int | None = None) -> tuple[int, int]:
    """How many rounds a row takes for its tokens, and how many drafts are right, by float64."""
    text, taken, right = [*prompt, *greedy(tuple(prompt), 1)], 0, 0
    while len(text) < len(prompt) + count and stop not in text[len(prompt) :]:
        written = greedy(tuple(text), drafts + 1)
        wrong = [g != w for g, w in zip(guesses(tuple(text), drafts), written[:-1], strict=True)]
        agreed = wrong.index(True) if True in wrong else drafts
        text += written[: agreed + 1]
        taken, right = taken + 1, right + agreed
    return taken, right


# All prompts at once, in pieces, and two of the three at a time: the last chunk overlaps.
CHUNKS = (300, 6, 2 * max(map(len, PROMPTS)))


@pytest.mark.parametrize(("drafts", "chunk"), [(1, CHUNKS[0]), *((3, chunk) for chunk in CHUNKS)])
def test_nothing_changes_but_the_steps(drafts, chunk, monkeypatch):
    monkeypatch.setattr(generation, "_PREFILL_TOKENS", chunk)
    seen = [[], [], []]
    result = generate(
        model(), PROMPTS, max_new_tokens=16, speculate=drafts, draft="mtp", block=1,
        on_tokens=lambda row, tokens: seen[row].extend(tokens),
    )  # fmt: skip
    assert result.tokens == [greedy(tuple(prompt), 16) for prompt in PROMPTS] == seen
    taken, right = zip(*(rounds(prompt, drafts, 16) for prompt in PROMPTS), strict=True)
    assert 0 < sum(right) < drafts * sum(taken)
    assert result.accepted == sum(right) / (drafts * sum(taken))
    assert result.steps == max(taken)
    assert result.cache_bytes == 2 * 3 * 128 * (16 + 4) * 4  # a layer's and the predictor's


def run_rounds(drafts: int) -> float:
    """Checks every round's drafts against float64, from scratch; the share that was right."""
    count, counted = 12, np.zeros(2)
    clock, cache = generation._Clock(), model().init_cache(3, 32)
    draft_cache = model().init_draft_cache(3, 32)
    logits, state, cache, draft_cache = generation._prefill(
        model(), PROMPTS, cache, draft_cache, clock
    )
    text = generation._history(PROMPTS, logits.argmax(-1), 32)
    length = jnp.array([len(prompt) + 1 for prompt in PROMPTS], jnp.int32)
    goal = length - 1 + count
    carry = (text, length, cache, generation._ahead(state, draft_cache, drafts))

    @jax.jit
    def round_(model, goal, carry):
        text, length, _, ahead = carry
        draft, _ = generation._predict(model, text, length, ahead, drafts)
        block = generation._speculate_block.__wrapped__
        carry, counts, _ = block(model, goal, carry, KEY, drafts=drafts, steps=1, **GREEDY)
        return draft, carry, counts

    while (carry[1] < goal).any():
        before, length = np.asarray(carry[0]), np.asarray(carry[1])
        draft, carry, counts = round_(model(), goal, carry)
        counted += np.asarray(counts)
        for b in np.flatnonzero(length < goal):
            text = tuple(map(int, before[b, : length[b]]))
            assert draft[b].tolist() == guesses(text, drafts)
    return counted[1] / counted[0]


def test_drafts_of_every_round():
    assert 0 < run_rounds(3) < 1


@pytest.mark.parametrize("bug", ["guesses stay", "no shift", "wrong state", "prompt unseen"])
def test_a_planted_bug_is_noticed(bug, monkeypatch):
    predict, prefill = generation._predict, generation._prefill
    if bug == "guesses stay":  # the predictor's cache is not cut back

        def broken(model, text, length, ahead, drafts):
            draft, cache = predict(model, text, length, ahead, drafts)
            return draft, cache.replace(length=cache.length + drafts - 1)

        monkeypatch.setattr(generation, "_predict", broken)
    elif bug == "no shift":  # the token of a position, not the next one

        def broken(model, text, *arguments):
            return predict(model, jnp.roll(text, 1, axis=1), *arguments)

        monkeypatch.setattr(generation, "_predict", broken)
    elif bug == "wrong state":  # of the position before

        def broken(model, text, length, ahead, drafts):
            hidden, cache = ahead
            return predict(model, text, length, (jnp.roll(hidden, 1, axis=1), cache), drafts)

        monkeypatch.setattr(generation, "_predict", broken)
    else:  # nothing of it in the predictor's cache

        def broken(*arguments):
            logits, state, cache, draft_cache = prefill(*arguments)
            zero = jnp.zeros_like(draft_cache.latent), jnp.zeros_like(draft_cache.k_rope)
            return logits, state, cache, draft_cache.replace(latent=zero[0], k_rope=zero[1])

        monkeypatch.setattr(generation, "_prefill", broken)
    with pytest.raises(AssertionError):
        run_rounds(3)


@pytest.mark.parametrize("drafts", [1, 4])
def test_good_drafts_are_accepted_and_bad_ones_are_not(drafts, rng):
    prompts = [rng.integers(0, 40, length).tolist() for length in (9, 1, 23)]
    for knowing, least, most in ((True, 0.8, 1), (False, 0, 0.1)):
        model = prophet(40, knowing)
        options = {"max_new_tokens": 40, "block": 8}
        plain = generate(model, prompts, **options)
        drafted = generate(model, prompts, speculate=drafts, draft="mtp", **options)
        assert drafted.tokens == plain.tokens
        assert least <= drafted.accepted <= most
        if knowing:
            assert drafted.steps <= plain.steps / (1 + 0.7 * drafts) + options["block"]


def test_stop_tokens_end_rows():
    plain = generate(model(), PROMPTS, max_new_tokens=16).tokens
    stop = plain[0][5]
    result = generate(
        model(), PROMPTS, max_new_tokens=16, stop_tokens=(stop,), speculate=3, draft="mtp", block=1
    )
    for got, full in zip(result.tokens, plain, strict=True):
        assert got == (full[: full.index(stop) + 1] if stop in full else full)
    ends = [len(tokens) for tokens in result.tokens]
    assert min(ends) < max(ends)
    taken, right = zip(*(rounds(prompt, 3, 16, stop) for prompt in PROMPTS), strict=True)
    assert result.accepted == sum(right) / (3 * sum(taken))  # nothing drafted after a row's end


@pytest.mark.parametrize("draft", ["mtp", "prompt"])
def test_sampled_tokens_are_as_likely_as_the_model_says(draft):
    """The first three tokens of many rows, by a chi-squared test against float64."""
    prompt, rows, options = [1, 4, 0, 1, 4], 4096, {"temperature": 0.7, "top_k": 4}
    result = generate(
        model(), [prompt] * rows, max_new_tokens=3, max_length=16, speculate=2, draft=draft,
        block=3, **options,
    )  # fmt: skip
    counts, expected = np.zeros((2, WORDS, WORDS, WORDS))
    for tokens in result.tokens:
        counts[*tokens] += 1

    def chances(text):
        logits = exact().logits(text)[-1] / options["temperature"]
        weights = np.where(logits >= np.sort(logits)[-4], np.exp(logits - logits.max()), 0)
        return weights / weights.sum()

    for a, b in np.ndindex(WORDS, WORDS):
        first, second = chances(prompt)[a], chances([*prompt, a])[b]
        expected[a, b] = rows * first * second * chances([*prompt, a, b])
    assert not counts[expected == 0].any()
    often = expected > 5
    spread = ((counts - expected)[often] ** 2 / expected[often]).sum()
    freedom = often.sum() - 1
    assert often.sum() > 20
    assert spread < freedom + 4 * np.sqrt(2 * freedom)
    assert 0 < result.accepted < 1


def test_a_block_is_one_program_that_donates_both_caches():
    cache, draft_cache = model().init_cache(2, 64), model().init_draft_cache(2, 64)
    carry = (
        jnp.zeros((2, 65), jnp.int32), jnp.full(2, 3, jnp.int32), cache,
        generation._ahead(jnp.zeros((2, 24)), draft_cache, 3),
    )  # fmt: skip
    goal = jnp.full(2, 30, jnp.int32)
    arguments = (model(), goal, carry, KEY)
    compiled = generation._speculate_block.lower(*arguments, drafts=3, steps=8, **GREEDY).compile()
    least = sum(held.nbytes for held in (*cache, draft_cache))
    assert compiled.memory_analysis().alias_size_in_bytes >= least


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft": "mtp"}, "draft='mtp' drafts nothing with speculate=0"),
        ({"draft": "mlp", "speculate": 2}, "draft='mlp': it must be 'prompt' or 'mtp'"),
        ({"draft": "mtp", "speculate": 2, "temperature": -1.0}, "temperature=-1"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        generate(model(), [[1]], **options)


def test_a_model_without_a_predictor_says_what_to_do():
    bare = Decoder(RANDOM, rngs=nnx.Rngs(0))
    with pytest.raises(
        ValueError, match=r"load_decoder\(\.\.\., mtp=True\).*or use draft='prompt'"
    ):
        generate(bare, [[1]], speculate=2, draft="mtp")
