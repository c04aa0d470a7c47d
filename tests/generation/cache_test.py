"""What a generation leaves in its cache: conversations, samples, shared prefixes, pages."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import MICRO, drawn, slow
from flax import nnx

from mla_jax import decode_loop, prefill_step
from mla_jax.generation import drafts, generate, resume
from mla_jax.models import Decoder, DecoderConfig

CONFIG = DecoderConfig(
    attention=MICRO.replace(num_hidden_layers=2), vocab_size=40, intermediate_size=20,
    num_nextn_predict_layers=1,
)  # fmt: skip
TURNS = [[[3, 1, 4, 1, 5], [9, 2]], [[6, 5], [3, 5, 8, 9, 7]], [[9], [3, 2, 3]]]
DRAFTS = [{}, {"speculate": 3}, {"speculate": 2, "draft": "mtp"}]


@functools.cache
def model():
    return drawn(lambda: Decoder(CONFIG, mtp=True, precision="highest", rngs=nnx.Rngs(0)))


@pytest.mark.parametrize(
    ("drafts", "pages"), [(DRAFTS[0], None), (DRAFTS[1], 5), (DRAFTS[2], None)], ids=str
)
def test_a_conversation_goes_on_as_if_its_whole_text_were_the_prompt(drafts, pages):
    texts, cache = [[], []], None
    stop = generate(model(), TURNS[0], max_new_tokens=3).tokens[0][1]  # ends a row within a block
    options = {"max_new_tokens": 6, "stop_tokens": stop, "block": 4, **drafts}
    for turn in TURNS:
        rest = [[*text[-1:], *new] for text, new in zip(texts, turn, strict=True)]
        texts = [[*text, *new] for text, new in zip(texts, turn, strict=True)]
        more = {"max_length": 128, "pages": pages} if cache is None else {}
        result = generate(model(), rest, cache=cache, **options, **more)
        assert result.tokens == generate(model(), texts, **options).tokens
        texts = [[*text, *new] for text, new in zip(texts, result.tokens, strict=True)]
        cache = result.cache
        assert cache.length.tolist() == [len(text) - 1 for text in texts]
        assert not cache.overflowed.any()


def test_the_dtype_of_the_cache():
    result = generate(model(), [[3, 1, 4]], max_new_tokens=2, max_length=128, cache_dtype="int8")
    assert [store.latent.dtype for store in result.cache.stores] == ["int8"] * 2
    assert result.cache_bytes == 2 * 128 * (16 + 4 + 4 * 4)  # latents, scales, rotary keys
    (drafter,) = drafts.MultiToken(2).init(model(), 2, 128, dtype="int8")
    assert drafter.nbytes == result.cache_bytes


def test_resume_cuts_the_cache_to_what_is_still_said():
    first = generate(model(), TURNS[0], max_new_tokens=6)
    texts = [[*a, *b] for a, b in zip(TURNS[0], first.tokens, strict=True)]
    changed = [[*texts[0][:7], 1, 1, 1], [*texts[1], 2]]
    expected = generate(model(), changed, max_new_tokens=4).tokens
    cache, rest = resume(first.cache, texts, changed)
    assert [len(row) for row in rest] == [3, 2]
    assert generate(model(), rest, max_new_tokens=4, cache=cache).tokens == expected
    with pytest.raises(ValueError, match="held has 1 rows, prompts 2, the cache 2"):
        resume(first.cache, texts[:1], changed)


@pytest.mark.parametrize(
    ("drafts", "pages"), [slow(DRAFTS[0], None), (DRAFTS[0], 7), (DRAFTS[2], 7)], ids=str
)
def test_samples_of_prompts_that_share_a_prefix(drafts, pages):
    common = list(np.arange(140) * 7 % 40)
    prompts = [[*common, 3, 1], [*common, 9], [*common[:135], 4] * 1]
    plain = generate(model(), prompts, max_new_tokens=5).tokens
    options = {"max_new_tokens": 5, "samples": 2, "pages": pages, **drafts}
    result = generate(model(), prompts, **options)
    assert result.tokens == plain * 2
    if pages:  # a page is shared by all; each row has a second one of its own
        assert int(result.cache.pages.available) == 0
        with pytest.raises(ValueError, match=r"pages=6: .* need 7 pages"):
            generate(model(), prompts, **options | {"pages": 6})
    else:
        sampled = generate(model(), prompts, temperature=2.0, **options).tokens
        assert all(sampled[row] != sampled[row + 3] for row in range(3))


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
    words = CONFIG.replace(vocab_size=41)  # of which no other test compiled a program
    other = drawn(lambda: Decoder(words, mtp=True, precision="highest", rngs=nnx.Rngs(0)))

    def programs(lengths, **options):
        caplog.clear()
        prompts = [list(np.arange(length) % 40) for length in lengths]
        with jax.log_compiles():
            result = generate(other, prompts, max_new_tokens=9, **options)
        return result, sum("Compiling" in message for message in caplog.messages)

    for options in DRAFTS[:2]:
        assert programs((11, 40), **options)[1] > 0
        for lengths in ((37, 5), (90, 2), (128, 1)):
            result, count = programs(lengths, **options)
            assert count == 0
            assert result.compile_seconds == 0
        programs((300, 2), max_length=512, **options)
        assert programs((500, 300), max_length=512, **options)[1] == 0


def test_a_last_shorter_block_is_the_same_program(caplog):
    with jax.log_compiles():
        result = generate(model(), TURNS[0], max_new_tokens=11, block=4)
    blocks = [m for m in caplog.messages if "Compiling jit(run_block)" in m]
    assert len(blocks) <= 1
    assert result.steps == 10


def too_large():
    """A model whose MLP goes beyond float16 for one token."""
    types = {"dtype": jnp.float16, "param_dtype": jnp.float16}
    made = drawn(lambda: Decoder(CONFIG, **types, rngs=nnx.Rngs(0)))
    made.blocks[0].mlp.down_proj.kernel.set_value(
        jnp.full_like(made.blocks[0].mlp.down_proj.kernel[...], 6e4)
    )
    return made


@pytest.mark.parametrize("drafts", DRAFTS[:2], ids=str)
def test_numbers_that_are_not_finite_name_row_and_step(drafts):
    plain = drawn(lambda: Decoder(CONFIG, precision="highest", rngs=nnx.Rngs(0)))
    options = {"max_new_tokens": 8, "block": 16, **drafts}
    written = generate(plain, TURNS[0], **options).tokens[1]
    known = [*TURNS[0][0], *TURNS[0][1], *generate(plain, TURNS[0], **options).tokens[0]]
    token = next(token for token in written[:-1] if token not in known)
    # The head has weights of its own: the row reads the poisoned ones after it drew that token.
    plain.embed.embedding.set_value(plain.embed.embedding[...].at[token].set(jnp.inf))
    step = written.index(token) + 1
    with pytest.raises(FloatingPointError, match=f"row 1, step {step}: the logits are not finite"):
        generate(plain, TURNS[0], **options)
    if not drafts:
        _, cache = plain.prefill(jnp.array(TURNS[0][1:]), plain.init_cache(1, 16))
        with pytest.raises(FloatingPointError, match="row 0, step 0"):
            decode_loop(plain, jnp.array([token]), cache, steps=3)


def test_float16_beyond_its_range_is_an_error():
    with pytest.raises(FloatingPointError, match=r"row [01], step 0: .* float16 ends at 65504"):
        generate(too_large(), TURNS[0], max_new_tokens=3)


def test_drafts_in_bfloat16_are_right_up_to_rounding():
    """Every written word is the likeliest, up to the rounding of the logits that it was read from.

    A draft is verified among others, by matrices of another shape: so the logits differ from a
    plain step's, and two words that are as good as equal may change places. The difference of
    either to float32 says how much that is.
    """
    types = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    made = drawn(lambda: Decoder(CONFIG, **types, rngs=nnx.Rngs(1)))
    exact = drawn(lambda: Decoder(CONFIG, precision="highest", rngs=nnx.Rngs(1)))
    nnx.update(exact, jax.tree.map(lambda x: x.astype(jnp.float32), nnx.state(made)))
    prompts = np.arange(32).reshape(16, 2) % 40
    result = generate(made, prompts, max_new_tokens=24, speculate=3)
    texts = np.array([[*p, *t] for p, t in zip(prompts, result.tokens, strict=True)])
    want, width = np.asarray(jax.jit(Decoder.__call__)(exact, jnp.asarray(texts))), texts.shape[1]
    rounding = np.zeros(want.shape[:2])
    for offset in range(4):  # the verified steps begin anywhere
        cache, at = made.init_cache(16, 64), 0
        while at < width:
            size = offset if at == 0 and offset else min(4, width - at)
            got, cache = prefill_step(made, jnp.asarray(texts[:, at : at + size]), cache)
            off = np.abs(np.asarray(got, np.float32) - want[:, at : at + size]).max(-1)
            rounding[:, at : at + size] = np.maximum(rounding[:, at : at + size], off)
            at += size
    chosen = np.take_along_axis(want[:, :-1], texts[:, 1:, None], axis=-1)[..., 0]
    gap = (want[:, :-1].max(-1) - chosen)[:, 1:]  # of what was written
    assert (gap <= 2 * rounding[:, 1:-1]).all()
