"""Speculation by multi-token prediction: drafts of every round, what is accepted and written."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import MICRO, PLAIN, drawn, slow
from flax import nnx
from numpy_decoder import NumpyDecoder

from mla_jax.generation import Sampling, bind, generate, loop, prefill
from mla_jax.generation.drafts import MultiToken
from mla_jax.models import Decoder, DecoderConfig

WORDS = 5  # few, so that guesses of random weights are right now and then
RANDOM = DecoderConfig(
    attention=MICRO.replace(num_hidden_layers=1), vocab_size=WORDS, intermediate_size=20,
    num_nextn_predict_layers=1,
)  # fmt: skip
PROMPTS = [[1, 4, 0, 2, 2, 3, 1], [3], [0, 4, 1, 1]]


@functools.cache
def model():
    model = drawn(lambda: Decoder(RANDOM, mtp=True, precision="highest", rngs=nnx.Rngs(4)))
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
    model = drawn(lambda: Decoder(config, mtp=True, precision="highest", rngs=nnx.Rngs(0)))
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
CHUNKS = (((128,), 16384), ((2, 4), 12), ((8,), 16))


@pytest.mark.parametrize(
    ("drafts", "chunk"), [slow(1, CHUNKS[0]), *((3, chunk) for chunk in CHUNKS)], ids=str
)
def test_nothing_changes_but_the_steps(drafts, chunk, monkeypatch):
    for name, value in zip(("WIDTHS", "TOKENS"), chunk, strict=True):
        monkeypatch.setattr(prefill, name, value)
    seen = [[], [], []]
    result = generate(
        model(), PROMPTS, max_new_tokens=16, speculate=drafts, draft="mtp", block=1,
        stop_tokens=(WORDS,),  # which is no word: one that is has the same program
        on_tokens=lambda row, tokens: seen[row].extend(tokens),
    )  # fmt: skip
    assert result.tokens == [greedy(tuple(prompt), 16) for prompt in PROMPTS] == seen
    taken, right = zip(*(rounds(prompt, drafts, 16) for prompt in PROMPTS), strict=True)
    assert 0 < sum(right) < drafts * sum(taken)
    assert result.accepted == sum(right) / (drafts * sum(taken))
    assert result.steps == max(taken)
    assert result.cache_bytes == 2 * 3 * 256 * (16 + 4) * 4  # a layer's and the predictor's


def begun(drafter: MultiToken, count: int) -> tuple[loop.Writing, dict]:
    """What the loop starts with, and what else it is given."""
    rows, width, slots = len(PROMPTS), RANDOM.attention.hidden_size, 32
    prompts = [np.array(prompt, np.int32) for prompt in PROMPTS]
    lengths = np.array([len(prompt) for prompt in PROMPTS], np.int32)
    last = np.zeros((rows, WORDS), np.float32), np.zeros((rows, width), np.float32)
    none = np.zeros(rows, np.int32)
    last, cache, state = prefill.prefill(
        bind(model()), prompts, model().init_cache(rows, slots), drafter.init(model(), rows, slots),
        drafter, none, last,
    )  # fmt: skip
    text = np.zeros((rows, slots), np.int32)
    for row, prompt in enumerate(prompts):
        text[row, : len(prompt)] = prompt
    fixed = {"drafter": drafter, "sampling": Sampling()}
    given = {"stops": np.zeros(0, np.int32), "prompt_lengths": lengths}
    writing, _ = loop.begin(
        last, text, held=none, goal=lengths + count, seen=None, key=jax.random.key(0), cache=cache,
        state=state, logprobs=False, samples=1, **given, **fixed,
    )  # fmt: skip
    return writing, given | fixed


def run_rounds(drafter: MultiToken) -> float:
    """Checks every round's drafts against float64, from scratch; the share that was right."""
    writing, given = begun(drafter, count=12)

    @jax.jit
    def round_(bound, writing):
        draft, _ = drafter.propose(bound.model, writing.text, writing.length, writing.state)
        return draft, loop.run_block.__wrapped__(bound, writing, steps=1, **given)[0]

    while writing.active.any():
        before, length, active = map(np.asarray, (writing.text, writing.length, writing.active))
        draft, writing = round_(bind(model()), writing)
        for b in np.flatnonzero(active):
            text = tuple(map(int, before[b, : length[b]]))
            assert draft[b].tolist() == guesses(text, drafter.count)
    return writing.drafted[1] / writing.drafted[0]


def test_drafts_of_every_round():
    assert 0 < run_rounds(MultiToken(3)) < 1


@pytest.mark.parametrize(
    "bug", [*map(slow, ["guesses stay", "no shift", "wrong state"]), "prompt unseen"]
)
def test_a_planted_bug_is_noticed(bug):
    propose, hear = MultiToken.propose, MultiToken.prefill

    def guesses_stay(self, model, text, length, state):  # the predictor's cache is not cut back
        draft, (cache, hidden) = propose(self, model, text, length, state)
        return draft, (cache.replace(length=cache.length + self.count - 1), hidden)

    def no_shift(self, model, text, *rest):  # the token of a position, not the next one
        return propose(self, model, jnp.roll(text, 1, axis=1), *rest)

    def wrong_state(self, model, text, length, state):  # of the position before
        cache, hidden = state
        return propose(self, model, text, length, (cache, jnp.roll(hidden, 1, axis=1)))

    def prompt_unseen(self, *rest):  # nothing of it in the predictor's cache
        (cache,) = hear(self, *rest)
        return (cache.replace(stores=jax.tree.map(jnp.zeros_like, cache.stores)),)

    broken = {
        "guesses stay": guesses_stay, "no shift": no_shift, "wrong state": wrong_state,
        "prompt unseen": prompt_unseen,
    }[bug]  # fmt: skip
    name = "prefill" if broken is prompt_unseen else "propose"
    drafter = type("Broken", (MultiToken,), {name: broken})(3)  # of another class, traced anew
    with pytest.raises(AssertionError):
        run_rounds(drafter)


@pytest.mark.parametrize("drafts", [slow(1), 2, slow(4)])
def test_good_drafts_are_accepted_and_bad_ones_are_not(drafts, rng):
    lengths = (9, 1, 23, *rng.integers(1, 20, 13))
    prompts = [rng.integers(0, 40, length).tolist() for length in lengths]
    for knowing, least, most in ((True, 0.8, 1), (False, 0, 0.1)):
        model = prophet(40, knowing)
        options = {"max_new_tokens": 40, "block": 8}
        drafted = generate(model, prompts, speculate=drafts, draft="mtp", **options)
        exact = NumpyDecoder(model)
        for prompt, tokens in zip(prompts, drafted.tokens, strict=True):
            logits = exact.logits([*prompt, *tokens[:-1]])[len(prompt) - 1 :]
            assert logits.argmax(-1).tolist() == tokens
        assert least <= drafted.accepted <= most
        if knowing:
            assert drafted.steps <= 39 / (1 + 0.7 * drafts) + options["block"]


def test_stop_tokens_end_rows():
    plain = [greedy(tuple(prompt), 16) for prompt in PROMPTS]
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


def test_a_repetition_penalty_is_for_the_drafts_before_too():
    knowing = prophet(40, knowing=True)
    exact, texts = NumpyDecoder(knowing), [[word, word + 20] for word in range(16)]
    result = generate(
        knowing, texts, speculate=2, draft="mtp", max_new_tokens=12, repetition_penalty=3.0
    )
    assert result.accepted > 0
    for text, written in zip(texts, result.tokens, strict=True):
        for token in written:
            logits = exact.logits(text)[-1]
            seen = np.isin(np.arange(40), text)
            logits = np.where(seen, np.where(logits < 0, logits * 3, logits / 3), logits)
            assert token == logits.argmax()
            text.append(token)


@pytest.mark.parametrize("draft", ["mtp", slow("prompt")])
def test_sampled_tokens_are_as_likely_as_the_model_says(draft, monkeypatch):
    """The first three tokens of many rows, by a chi-squared test against float64."""
    monkeypatch.setattr(prefill, "WIDTHS", (8,))  # no 123 slots of padding in every row
    prompt, rows, options = [1, 4, 0, 1, 4], 2048, {"temperature": 0.7, "top_k": 4}
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
    writing, given = begun(MultiToken(3), count=12)
    compiled = loop.run_block.lower(bind(model()), writing, steps=8, **given).compile()
    least = writing.cache.nbytes + writing.state[0].nbytes
    assert compiled.memory_analysis().alias_size_in_bytes >= least


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft": "mtp"}, "draft='mtp' drafts nothing with speculate=0"),
        (
            {"draft": "mlp", "speculate": 2},
            "draft='mlp': draft must be one of prompt, mtp. Did you mean 'mtp'",
        ),
        ({"draft": "mtp", "speculate": 2, "temperature": -1.0}, "temperature=-1"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        generate(model(), [[1]], **options)


def test_a_model_without_a_predictor_says_what_to_do():
    bare = drawn(lambda: Decoder(RANDOM, rngs=nnx.Rngs(0)))
    with pytest.raises(
        ValueError, match=r"load_decoder\(\.\.\., mtp=True\).*or use draft='prompt'"
    ):
        generate(bare, [[1]], speculate=2, draft="mtp")
