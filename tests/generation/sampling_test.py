"""Sampling: the distribution that is drawn from, in transformers' order, in all modes of JAX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_jax import sample
from mla_jax.generation import check_sampling, mark_seen

PROBABILITIES = [0.1, 0.5, 0.15, 0.25]
DRAWS = 20_000
TOLERANCE = 5 * 0.5 / np.sqrt(DRAWS)  # five standard deviations at most


@functools.cache
def random_keys():
    return jax.random.split(jax.random.key(0), DRAWS)


@functools.cache
def draws(**options):
    """A program that draws from one row many times; one per options and number of words."""

    def program(keys, logits, seen):
        return jax.vmap(lambda key: sample(logits, key, seen=seen, **options))(keys)[:, 0]

    return jax.jit(program)


def frequencies(logits, seen=None, **options):
    """How often each word of one row is drawn."""
    drawn = draws(**options)(random_keys(), logits, seen)
    return np.bincount(np.asarray(drawn), minlength=logits.shape[1]) / DRAWS


def processed(logits, *, temperature, top_k=None, top_p=None, min_p=None, penalty=None, seen=()):
    """Probabilities by the processors that transformers has, in float64, one after the other."""
    scores = np.array(logits, np.float64)
    for token in seen if penalty else ():
        scores[token] = scores[token] * penalty if scores[token] < 0 else scores[token] / penalty
    scores /= temperature
    if top_k is not None:
        scores[scores < np.sort(scores)[::-1][: min(top_k, len(scores))][-1]] = -np.inf
    softmax = lambda scores: np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()  # noqa: E731
    if top_p is not None:
        order = np.argsort(scores)  # the least likely first
        remove = np.cumsum(softmax(scores)[order]) <= 1 - top_p
        remove[-1] = False
        scores[order[remove]] = -np.inf
    if min_p is not None:
        probabilities = softmax(scores)
        scores[probabilities < min_p * probabilities.max()] = -np.inf
    return softmax(scores)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"temperature": 1.0}, PROBABILITIES),
        ({"temperature": 0.5}, np.array([0.01, 0.25, 0.0225, 0.0625]) / 0.345),
        ({"temperature": 1.0, "top_k": 2}, [0, 2 / 3, 0, 1 / 3]),
        ({"temperature": 1.0, "top_k": 1}, [0, 1, 0, 0]),
        ({"temperature": 1.0, "top_k": 99}, PROBABILITIES),
        ({"temperature": 1.0, "top_p": 0.7}, [0, 2 / 3, 0, 1 / 3]),
        ({"temperature": 1.0, "top_p": 0.01}, [0, 1, 0, 0]),
        ({"temperature": 1.0, "top_p": 1.0}, PROBABILITIES),
        ({"temperature": 1.0, "min_p": 0.0}, PROBABILITIES),
        ({"temperature": 1.0, "min_p": 0.25}, np.array([0, 0.5, 0.15, 0.25]) / 0.9),
        ({"temperature": 1.0, "min_p": 0.4}, [0, 2 / 3, 0, 1 / 3]),
        ({"temperature": 1.0, "min_p": 1.0}, [0, 1, 0, 0]),
        # The temperature comes before min_p: at 2 the least likely is 0.447 of the most likely.
        ({"temperature": 2.0, "min_p": 0.4}, np.sqrt(PROBABILITIES) / np.sqrt(PROBABILITIES).sum()),
        # top_p comes before min_p: without its own cut min_p=0.4 would leave as many.
        ({"temperature": 1.0, "top_p": 0.4, "min_p": 0.4}, [0, 1, 0, 0]),
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.8, "min_p": 0.1}, [0, 2 / 3, 0, 1 / 3]),
    ],
)
def test_the_distribution(options, expected):
    logits = jnp.log(jnp.array([PROBABILITIES]))
    np.testing.assert_allclose(frequencies(logits, **options), expected, atol=TOLERANCE)


def test_the_penalty_divides_positive_logits_and_multiplies_negative_ones():
    logits = jnp.array([[2.0, -1.0, 1.0, -0.5]])
    seen = jnp.array([[True, True, False, False]])
    expected = np.exp([1.0, -2.0, 1.0, -0.5])
    expected /= expected.sum()
    found = frequencies(logits, temperature=1.0, repetition_penalty=2.0, seen=seen)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)
    expected = np.exp(np.array([1.0, -2.0, 1.0, -0.5]) / 0.5)  # then the temperature
    found = frequencies(logits, temperature=0.5, repetition_penalty=2.0, seen=seen)
    np.testing.assert_allclose(found, expected / expected.sum(), atol=TOLERANCE)


def test_the_penalty_counts_for_the_most_likely_token():
    logits = jnp.array([[2.0, 1.5, -3.0], [-1.0, -1.5, -3.0]])
    seen = mark_seen(jnp.zeros((2, 3), bool), jnp.array([[0], [0]]))
    assert sample(logits, None, repetition_penalty=1.2, seen=seen).tolist() == [0, 0]
    assert sample(logits, None, repetition_penalty=1.6, seen=seen).tolist() == [1, 1]
    assert sample(logits, None, repetition_penalty=1.0).tolist() == [0, 0]
    assert sample(-logits, None, repetition_penalty=0.5, seen=~seen).tolist() == [2, 2]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p", "penalty"),
    [
        (1.0, None, None, None, 1.3),
        (0.3, None, None, 0.03, 0.8),
        (1.7, None, 0.93, None, None),
        (1.0, 3, 0.51, None, 1.3),
        (0.7, 5, None, 0.37, 1.1),
        (1.3, 5, 0.9, 0.1, 1.2),
    ],
)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    numbers=st.lists(st.integers(-40, 40), min_size=6, max_size=6, unique=True),
    seen=st.lists(st.booleans(), min_size=6, max_size=6),
)
def test_what_is_drawn_is_what_transformers_leaves(
    temperature, top_k, top_p, min_p, penalty, numbers, seen
):
    logits = np.array(numbers) / 8
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    expected = processed(logits, **options, penalty=penalty, seen=np.flatnonzero(seen))
    found = frequencies(
        jnp.asarray(logits[None], jnp.float32), jnp.asarray([seen]), repetition_penalty=penalty,
        **options,
    )  # fmt: skip
    assert not found[expected == 0].any()
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)


def test_the_penalty_is_computed_in_float32():
    logits = jnp.array([[1.296875, 1.0]], jnp.bfloat16)  # 1.3 as a bfloat16 is the first of them
    seen = jnp.array([[True, False]])
    assert sample(logits, None, repetition_penalty=1.3, seen=seen).tolist() == [1]


_marked = jax.jit(mark_seen)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(-100, 12), max_size=5), min_size=3, max_size=3),
    cut=st.integers(0, 5),
)
def test_seen_tokens(rows, cut):
    words, width = 9, 5
    tokens = np.full((len(rows), width), 3)
    expected = np.zeros((len(rows), words), bool)
    lengths = [min(len(row), cut) for row in rows]
    for number, row in enumerate(rows):
        tokens[number, : len(row)] = row
        expected[number, [token for token in row[:cut] if 0 <= token < words]] = True
    tokens, seen = np.int32(tokens), np.zeros((len(rows), words), bool)
    found = np.asarray(_marked(seen, tokens, np.int32(lengths)))
    np.testing.assert_array_equal(found, expected)
    everything = np.asarray(_marked(found, tokens))
    assert (everything[:, 3] | (np.array(list(map(len, rows))) == width)).all()
    assert (everything | found == everything).all()  # nothing is forgotten


def test_a_loop_carries_what_was_seen():
    """Greedy with a large penalty and positive logits: no token comes twice."""
    logits = jnp.arange(1.0, 9.0)[None].repeat(2, axis=0)

    def step(seen, active):
        drawn = sample(logits, None, repetition_penalty=100.0, seen=seen)
        return mark_seen(seen, drawn[:, None], active), drawn

    active = jnp.array([[1, 1]] * 3 + [[1, 0]] * 5)  # the second row stops after three
    start = mark_seen(jnp.zeros((2, 8), bool), jnp.array([[7], [0]]))
    _, drawn = jax.jit(lambda seen: jax.lax.scan(step, seen, active))(start)
    assert drawn[:7, 0].tolist() == [6, 5, 4, 3, 2, 1, 0]
    assert drawn[:, 1].tolist() == [7, 6, 5] + [4] * 5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_strict_promotion_and_x64(dtype):
    options = {
        "temperature": np.float64(0.7), "top_k": np.int64(3), "top_p": np.float32(0.9),
        "min_p": 0.05, "repetition_penalty": np.float64(1.3),
    }  # fmt: skip
    with jax.enable_x64(), jax.numpy_dtype_promotion("strict"):
        logits = jnp.asarray([[0.5, 2.0, -1.0, 1.0]], dtype)
        seen = mark_seen(jnp.zeros((1, 4), bool), jnp.array([[1, 1]]), jnp.array([2]))
        drawn = jax.jit(lambda key: sample(logits, key, seen=seen, **options))(jax.random.key(0))
        greedy = sample(logits, None, repetition_penalty=1.3, seen=seen)
        for token in (drawn, greedy, sample(logits, jax.random.key(1), temperature=1.0)):
            assert (token.dtype, token.shape) == (jnp.int32, (1,))
        assert greedy.tolist() == [1]


def test_minus_infinity_is_never_drawn():
    logits = jnp.array([[-jnp.inf, 0.0, -jnp.inf, -1.0]])
    seen = jnp.ones((1, 4), bool)
    found = frequencies(logits, temperature=1.0, top_p=1.0, repetition_penalty=1.5, seen=seen)
    assert found[[0, 2]].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, r"temperature=-1\.0: it must be at least 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"temperature": "1"}, "temperature=1"),
        ({"temperature": 1.0, "key": None}, "give key="),
        ({"top_k": 0}, "top_k=0"),
        ({"top_k": 2.0}, r"top_k=2\.0"),
        ({"top_k": True}, "top_k=True"),
        ({"top_p": 0.0}, r"top_p=0\.0"),
        ({"top_p": 1.1}, r"top_p=1\.1"),
        ({"min_p": -0.1}, r"min_p=-0\.1: it must be at least 0 and at most 1"),
        ({"min_p": 1.1}, r"min_p=1\.1"),
        ({"min_p": True}, "min_p=True"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty=0\.0: it must be above 0"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty=nan"),
        ({"repetition_penalty": 1.1}, r"needs seen as bool of shape \(2, 5\), it is None"),
        (
            {"repetition_penalty": 1.1, "seen": jnp.zeros((2, 4), bool)},
            r"it is bool of shape \(2, 4\)",
        ),
        ({"repetition_penalty": 1.1, "seen": jnp.zeros((2, 5))}, "it is float32 of shape"),
    ],
)
def test_bad_options(options, message):
    options = {"key": jax.random.key(0)} | options
    with pytest.raises(ValueError, match=message):
        sample(jnp.zeros((2, 5)), **options)


def test_logits_without_words():
    with pytest.raises(ValueError, match="logits have no words"):
        sample(jnp.zeros((2, 0)), None)
    with pytest.raises(ValueError, match="logits have no words"):
        check_sampling(0, None, 0.0, None, None)
