"""What a generation leaves in its cache: conversations, samples, shared prefixes, pages."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import PLAIN, drawn, put, slow
from flax import nnx
from numpy_decoder import NumpyDecoder

from mla_jax import decode_loop, prefill_step
from mla_jax.generation import drafts, generate, resume
from mla_jax.models import Decoder, DecoderConfig

CONFIG = DecoderConfig(
    attention=PLAIN.replace(num_hidden_layers=1), vocab_size=40, intermediate_size=20,
    num_nextn_predict_layers=1,
)  # fmt: skip
TURNS = [
    [[3, 1, 4, 1, 5], [9, 2], [31], [8, 8, 8]],
    [[6, 5], [3, 5, 8, 9, 7], [2, 7], [1]],
    [[9], [3, 2, 3], [11, 12], [0]],
]
DRAFTS = [{}, {"speculate": 3}, {"speculate": 2, "draft": "mtp"}]


# Most prompts are of four rows, and all have as many stop tokens: so they share their programs.
SHARED = {"block": 4, "stop_tokens": 40}  # which is no word


def drawn_anew():
    return drawn(lambda: Decoder(CONFIG, mtp=True, precision="highest", rngs=nnx.Rngs(0)))


model = functools.cache(drawn_anew)


@pytest.mark.parametrize(
    ("drafts", "pages"), [(DRAFTS[0], None), (DRAFTS[1], None), (DRAFTS[2], 5)], ids=str
)
def test_a_conversation_goes_on_as_if_its_whole_text_were_the_prompt(drafts, pages):
    texts, cache = [[]] * 4, None
    first = generate(model(), TURNS[0], max_new_tokens=3, **SHARED).tokens
    options = {"max_new_tokens": 6, "block": 4, "stop_tokens": first[0][1]}  # within a block
    for turn in TURNS:
        rest = [[*text[-1:], *new] for text, new in zip(texts, turn, strict=True)]
        texts = [[*text, *new] for text, new in zip(texts, turn, strict=True)]
        more = {"pages": pages} if cache is None else {}
        result = generate(model(), rest, cache=cache, **options, **drafts, **more)
        assert result.tokens == generate(model(), texts, **options).tokens
        texts = [[*text, *new] for text, new in zip(texts, result.tokens, strict=True)]
        cache = result.cache
        assert cache.length.tolist() == [len(text) - 1 for text in texts]
        assert not cache.overflowed.any()


def test_the_dtype_of_the_cache():
    result = generate(model(), [[3, 1, 4]], max_new_tokens=1, max_length=128, cache_dtype="int8")
    assert [store.latent.dtype for store in result.cache.stores] == ["int8"]
    assert result.cache_bytes == 128 * (16 + 4 + 4 * 4)  # latents, scales, rotary keys
    (drafter,) = drafts.MultiToken(2).init(model(), 1, 128, dtype="int8")
    assert drafter.nbytes == result.cache_bytes


def test_resume_cuts_the_cache_to_what_is_still_said():
    first = generate(model(), TURNS[0], max_new_tokens=6, **SHARED)
    texts = [[*a, *b] for a, b in zip(TURNS[0], first.tokens, strict=True)]
    changed = [[*texts[0][:7], 1, 1, 1], [*texts[1], 2], *[[*text, 5] for text in texts[2:]]]
    expected = generate(model(), changed, max_new_tokens=4, **SHARED).tokens
    cache, rest = resume(first.cache, texts, changed)
    assert [len(row) for row in rest] == [3, 2, 2, 2]
    assert generate(model(), rest, max_new_tokens=4, cache=cache, **SHARED).tokens == expected
    with pytest.raises(ValueError, match="held has 1 rows, prompts 4, the cache 4"):
        resume(first.cache, texts[:1], changed)


@pytest.mark.parametrize(
    ("drafts", "pages"), [slow(DRAFTS[0], None), slow(DRAFTS[0], 5), (DRAFTS[2], 5)], ids=str
)
def test_samples_of_prompts_that_share_a_prefix(drafts, pages):
    common = list(np.arange(140) * 7 % 40)
    prompts = [[*common, 3, 1], [*common[:135], 4]]
    plain = generate(model(), prompts * 2, max_new_tokens=5, **SHARED).tokens
    options = {"max_new_tokens": 5, "samples": 2, "pages": pages, **drafts, **SHARED}
    result = generate(model(), prompts, **options)
    assert result.tokens == plain
    if pages:  # a page is shared by all; each row has a second one of its own
        assert int(result.cache.pages.available) == 0
        with pytest.raises(ValueError, match=r"pages=4: .* need 5 pages"):
            generate(model(), prompts, **options | {"pages": 4})
    else:
        sampled = generate(model(), prompts, temperature=2.0, **options).tokens
        assert all(sampled[row] != sampled[row + 2] for row in range(2))


@pytest.mark.parametrize(
    ("cache", "options", "message"),
    [
        (lambda: model().init_cache(2, 128), {}, "it must be a Cache of 1 rows"),
        (lambda: {}, {}, "it must be a Cache of 1 rows, one a prompt; it is {}"),
        (lambda: model().init_cache(1, 8), {"max_new_tokens": 9}, "max_length=8: a prompt"),
        (
            lambda: model().init_cache(1, 8).replace(overflowed=jnp.array([True])),
            {"max_new_tokens": 1}, "rows have overflowed",
        ),
    ],
    ids=["rows", "no_cache", "room", "overflowed"],
)  # fmt: skip
def test_a_cache_that_does_not_go_with_the_prompts(cache, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model(), [[3]], cache=cache(), **options)


def test_another_length_compiles_nothing(caplog):
    def programs(lengths, **options):
        caplog.clear()
        prompts = [list(np.arange(length) % 40) for length in (*lengths, 3, 2)]
        options = {"max_new_tokens": 9, **SHARED, **options}
        with jax.log_compiles():
            result = generate(model(), prompts, **options)
        return result, sum("Compiling" in message for message in caplog.messages)

    # No other test has blocks of five steps.
    for options in ({"block": 5}, DRAFTS[1]):
        assert programs((11, 40), **options)[1] > 0 or "block" not in options
        for lengths in ((37, 5), (90, 2), (128, 1)):
            result, count = programs(lengths, **options)
            assert count == 0
            assert result.compile_seconds == 0
    longer = {"max_length": 512, "max_new_tokens": 1}
    assert programs((300, 2), **longer)[1] > 0
    assert programs((500, 300), **longer)[1] == 0


def test_a_last_shorter_block_is_the_same_program(caplog):
    generate(model(), TURNS[0], max_new_tokens=5, **SHARED)  # one whole block
    with jax.log_compiles():
        result = generate(model(), TURNS[0], max_new_tokens=11, **SHARED)
    assert not [m for m in caplog.messages if "Compiling jit(run_block)" in m]
    assert result.steps == 10


def too_large():
    """A model whose MLP goes beyond float16 for one token."""
    types = {"dtype": jnp.float16, "param_dtype": jnp.float16}
    made = drawn(lambda: Decoder(CONFIG, **types, rngs=nnx.Rngs(0)))
    kernel = made.blocks[0].mlp.down_proj.kernel
    kernel.set_value(put(np.full(kernel.shape, 6e4), jnp.float16))
    return made


@pytest.mark.parametrize("drafts", DRAFTS[:2], ids=str)
def test_numbers_that_are_not_finite_name_row_and_step(drafts):
    plain, options = drawn_anew(), {"max_new_tokens": 8, **SHARED, **drafts}
    written = generate(plain, TURNS[0], **options).tokens
    known = {token for row in (*TURNS[0], written[0], *written[2:]) for token in row}
    written = written[1]
    token = next(token for token in written[:-1] if token not in known)
    # The head has weights of its own: the row reads the poisoned ones after it drew that token.
    table = np.array(plain.embed.embedding[...])
    table[token] = np.inf
    plain.embed.embedding.set_value(put(table, table.dtype))
    step = written.index(token) + 1
    with pytest.raises(FloatingPointError, match=f"row 1, step {step}: the logits are not finite"):
        generate(plain, TURNS[0], **options)
    if not drafts:
        with pytest.raises(FloatingPointError, match="row 0, step 0"):
            decode_loop(plain, put([token], np.int32), plain.init_cache(1, 16), steps=3)


def test_float16_beyond_its_range_is_an_error():
    with pytest.raises(FloatingPointError, match=r"row [01], step 0: .* float16 ends at 65504"):
        generate(too_large(), TURNS[0], max_new_tokens=1)


def test_drafts_in_bfloat16_are_right_up_to_rounding():
    """Every written word is the likeliest, up to the rounding of the logits that it was read from.

    A draft is verified among others, by matrices of another shape: so the logits differ from a
    plain step's, and two words that are as good as equal may change places. The difference of
    either to float64 says how much that is.
    """
    types = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    made = drawn(lambda: Decoder(CONFIG, **types, rngs=nnx.Rngs(1)))
    prompts = np.arange(32).reshape(16, 2) % 40
    result = generate(made, prompts, max_new_tokens=24, speculate=3)
    texts = np.array([[*p, *t] for p, t in zip(prompts, result.tokens, strict=True)])
    exact, width = NumpyDecoder(made), texts.shape[1]
    want = np.stack([exact.logits(text) for text in texts])
    rounding = np.zeros(want.shape[:2])
    for offset in range(4):  # the verified steps begin anywhere
        cache, at = made.init_cache(16, 64), 0
        while at < width:
            size = offset if at == 0 and offset else min(4, width - at)
            part = np.pad(texts[:, at : at + size], ((0, 0), (0, 4 - size)))
            got, cache = prefill_step(made, np.int32(part), cache, np.full(16, size, np.int32))
            got = np.asarray(got, np.float32)[:, :size]
            off = np.abs(got - want[:, at : at + size]).max(-1)
            rounding[:, at : at + size] = np.maximum(rounding[:, at : at + size], off)
            at += size
    chosen = np.take_along_axis(want[:, :-1], texts[:, 1:, None], axis=-1)[..., 0]
    gap = (want[:, :-1].max(-1) - chosen)[:, 1:]  # of what was written
    assert (gap <= 2 * rounding[:, 1:-1]).all()
