"""What may be asked, and prompts of every form: each works or is refused in the project's words."""

import annotations
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mla_jax.generation import Request, Sampling, Tokenizer
from mla_jax.generation.request import cache_length, token_rows

BYTES = Tokenizer.bytes()


@pytest.mark.parametrize(
    "prompts",
    [
        np.array([[3, 1], [4, 1]]), jnp.array([[3, 1], [4, 1]]),
        np.array([[3, 1], [4, 1]], np.uint8),
        [[3, 1], [4, 1]], ((3, 1), (4, 1)), [np.array([3, 1]), jnp.array([4, 1])],
        [np.array([3, 1], np.int64), [np.int8(4), np.int32(1)]], ["\x03\x01", "\x04\x01"],
        (row for row in ([3, 1], [4, 1])), np.array(["\x03\x01", "\x04\x01"]),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_batches(prompts):
    rows = token_rows(prompts, 10, BYTES)
    assert [row.tolist() for row in rows] == [[3, 1], [4, 1]]
    assert all(row.dtype == np.int32 for row in rows)


@pytest.mark.parametrize(
    "prompt",
    [[3, 1], (3, 1), np.array([3, 1]), jnp.array([3, 1]), [np.int32(3), np.uint8(1)],
     range(3, 0, -2), "\x03\x01", ["\x03\x01"], [jnp.int32(3), 1]],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_one_prompt(prompt):
    assert [row.tolist() for row in token_rows(prompt, 10, BYTES)] == [[3, 1]]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([3, -100], "prompt 0 has token -100: the model's tokens are 0 to 9"),
        ([[3], [1, 10]], "prompt 1 has token 10"), (np.array([[2**40]]), f"has token {2**40}"),
        ([[]], "none may be empty"), ([], "at least one"), (np.zeros((2, 0), int), "be empty"),
        ([[1.0]], "prompt 0 is float64"), (np.ones((1, 2)), "prompt 0 is float64"),
        ([[True]], "prompt 0 is bool"), ([[[3]]], "prompt 0 is"), (None, "prompts=None"),
        (3, "prompts=3"), (np.int32(3), "prompts="), (b"ab", "prompts=b'ab'"), ({}, "prompts={}"),
        ([["a"]], "prompt 0 is"), ([[1], "a"], "texts among tokens"), ([None], "prompt 0 is"),
        (["", "a"], "none may be empty"), ([[2**70]], "prompt 0 is"), ([1, [2]], "prompt 0 is"),
    ],
    ids=str,
)  # fmt: skip
def test_prompts_that_are_none(prompts, message):
    with pytest.raises(ValueError, match=r"prompt") as caught:
        token_rows(prompts, 10, BYTES)
    assert message in str(caught.value)


def test_texts_need_a_tokenizer():
    with pytest.raises(ValueError, match="prompts are texts: give the tokenizer"):
        token_rows(["a"], 10, None)


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
    | st.binary(max_size=3) | st.sampled_from([np.int32(3), np.float32(1), np.array([1, 2])]),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner) | st.dictionaries(
        st.text(max_size=1), inner, max_size=2),
    max_leaves=6,
)  # fmt: skip


@settings(max_examples=50)
@given(ANY)
def test_anything_is_rows_of_words_or_a_value_error(value):
    try:
        rows = token_rows(value, 256, BYTES)
    except ValueError as error:
        assert "prompt" in str(error) or "texts[" in str(error)  # noqa: PT017
    else:
        assert all(row.ndim == 1 and row.size and row.dtype == np.int32 for row in rows)
        assert all((row >= 0).all() and (row < 256).all() for row in rows)


FIELDS = [*Request.__dataclass_fields__, *Sampling.__dataclass_fields__]


@settings(max_examples=50)
@given(st.sampled_from(FIELDS), ANY)
@example("draft", np.array([1, 2]))
def test_any_option_is_taken_or_a_value_error_that_names_it(name, value):
    try:
        with annotations.unchecked():
            request = Request.of(**{name: value})
    except ValueError as error:
        assert name in str(error)  # noqa: PT017
    else:
        hash(request)
        assert Request.of(request) == request


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"stop_tokens": 5}, Request(stop_tokens=(5,))),
        ({"stop_tokens": np.int64(5)}, Request(stop_tokens=(5,))),
        ({"stop_tokens": jnp.array([5, 6])}, Request(stop_tokens=(5, 6))),
        ({"stop_tokens": {5}}, Request(stop_tokens=(5,))),
        ({"stop_strings": "ab"}, Request(stop_strings=("ab",))),
        ({"max_new_tokens": np.int32(3), "seed": np.uint8(1)}, Request(max_new_tokens=3, seed=1)),
        ({"top_k": np.int32(3), "temperature": np.float32(0.5)},
         Request(sampling=Sampling(top_k=3, temperature=0.5))),
    ],
    ids=str,
)  # fmt: skip
def test_numbers_of_other_libraries(options, expected):
    found = Request.of(**options)
    assert found == expected
    assert type(found.max_new_tokens) is type(found.seed) is int


def test_options_change_a_request():
    asked = Request.of(temperature=0.5, top_k=3, seed=2)
    changed = Request.of(asked, top_k=4, block=2)
    assert (changed.sampling.temperature, changed.sampling.top_k) == (0.5, 4)
    assert (changed.seed, changed.block) == (2, 2)
    with pytest.raises(TypeError, match=r"no option 'top_q'\. Did you mean 'top_p'"):
        Request.of(top_q=1)


@given(st.integers(1, 10**6), st.integers(1, 10**6))
def test_a_cache_is_at_most_a_quarter_too_long_and_never_too_short(need, limit):
    slots = cache_length(need)
    assert need <= slots <= max(256, 2 * need)
    assert slots % 128 == 0
    assert need <= 4096 or slots < 1.25 * need + 1
    assert cache_length(slots) == slots
    within = cache_length(need, limit)
    assert need <= within <= slots
    assert within == slots or within < limit + 128
