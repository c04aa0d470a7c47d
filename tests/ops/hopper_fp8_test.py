"""The Hopper kernel over fp8 latents against float64: interpreted here, native on a Hopper GPU.

The loop that it is compared with sees the numbers that bytes and scales stand for.
"""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import gate, relative
from hopper_common import (
    HOPPER,
    INTERPRET,
    MARKS,
    SCALE,
    SPEC,
    attend,
    check,
    loop,
    make,
    make_schedule,
    shuffled_pages,
    two_layers,
)  # fmt: skip

import mla_jax
from mla_jax import ops
from mla_jax.cache import Scaled
from mla_jax.cache.scaled import dequantise, quantise
from mla_jax.ops import hopper
from mla_jax.ops.hopper import scaled
from mla_jax.ops.seen import Seen

pytestmark = [*MARKS, pytest.mark.usefixtures("few_merged_at_once")]
FP8 = "float8_e4m3fn"
TRACED = (hopper._call,)
_VALUES = np.arange(256, dtype=np.uint8)
FINITE = _VALUES[(_VALUES & 127) != 127]


# One program each, where each of their operations would be one.
_quantise = jax.jit(quantise, static_argnums=1)
_dequantise = jax.jit(dequantise, static_argnums=2)


def encoded(arrays, lengths, seed=0):
    """(queries and cache with latents in fp8, their scales, the arrays that they stand for).

    Slots past a row's length hold any byte, and NaN and infinity for scales.
    """
    rng = np.random.default_rng(seed)
    pattern, q_rope, latent, k_rope = arrays
    latent = np.where(np.isfinite(np.asarray(latent)), latent, latent.dtype.type(0))
    # Groups differ in size, so that each needs its own scale.
    size = np.exp2(rng.integers(-3, 4, (*latent.shape[:2], latent.shape[2] // 128)))
    latent = latent * np.repeat(size, 128, axis=2).astype(latent.dtype)
    codes, scale = map(np.asarray, _quantise(latent, FP8))
    dead = (np.arange(latent.shape[1])[None] >= np.asarray(lengths)[:, None])[..., None]
    bad = rng.integers(0, 256, codes.shape, np.uint8).view(codes.dtype)
    bad_scale = np.where(rng.random(scale.shape) < 0.5, np.nan, np.inf).astype(np.float32)
    codes = jax.device_put(np.where(dead, bad, codes))
    scale = jax.device_put(np.where(dead, bad_scale, scale))
    held = [pattern, q_rope, codes, k_rope]
    return held, scale, [pattern, q_rope, _dequantise(codes, scale, pattern.dtype), k_rope]


LOOPS = {  # seed; B, T, S, N, R, P, lengths; multiprocessors
    # Each part has rows of several steps, and both have one.
    "two_parts": (1, (2, 2, 296, 3, 256, 16, (70, 290)), 3),
    # The kernel of few rows: one row that both have, and a row without a slot.
    "few_rows": (4, (3, 2, 264, 3, 512, 64, (70, 0, 257)), 2),
}


@pytest.mark.slow  # the tests of pages and of gradients are of its kind
@pytest.mark.parametrize("name", LOOPS)
def test_interpreted_is_the_loop(name):
    seed, shape, sms = LOOPS[name]
    arrays, lengths = make(seed, *shape, jnp.bfloat16)
    held, scale, whole = encoded(arrays, lengths)
    check(attend(held, lengths, sms, latent_scale=scale), loop(whole, lengths), jnp.bfloat16)


PAGED = {
    "general": (2, (2, 1, 256, 16, 128, 0, (129, 64)), 2),
    "few_rows": (5, (3, 1, 256, 16, 512, 64, (129, 64, 0)), 2),
}


@pytest.mark.parametrize("name", gate(PAGED, 1))
def test_pages_interpreted_are_the_loop(name):
    seed, shape, sms = PAGED[name]
    arrays, lengths = make(seed, *shape, jnp.bfloat16)
    held, scale, whole = encoded(arrays, lengths)
    (*pages, scales), table = shuffled_pages([*held, scale], lengths)
    got = attend(pages, lengths, sms, table=table, latent_scale=scales)
    check(got, loop(whole, lengths), jnp.bfloat16)


REAL = {name: getattr(scaled.ScaledPart, name) for name in ("extent", "place_after", "fetch")}


def _one_slot_too_many(self, place, block):
    source, live = REAL["extent"](self, place, block)
    return source, live + 1


def _scales_of_the_block_before(self, place, block):
    source, live = REAL["extent"](self, place, block)
    return source - 64 * (block == 1), live


def _left_half_twice(self, block, h, source):
    dense = types.SimpleNamespace(k_hbm=self.k_hbm, half=self.half, smem=self.smem)
    dense.raw = types.SimpleNamespace(at={2 * block: self.raw.at[2 * block + h]})
    dense.smem = {
        "raw_bar": types.SimpleNamespace(at={2 * block: self.smem["raw_bar"].at[2 * block + h]})
    }
    REAL["fetch"](dense, block, 0, source)


PLANTED = {
    "dead_slot_turned": ("extent", _one_slot_too_many),
    "scales_of_another_block": ("extent", _scales_of_the_block_before),
    "length_of_the_row_before": (
        "place_after",
        lambda self, g, place: REAL["place_after"](self, g, place)._replace(length=place.length),
    ),
    "left_half_twice": ("fetch", _left_half_twice),
}


@pytest.mark.slow
@pytest.mark.parametrize("bug", PLANTED)
@pytest.mark.usefixtures("traced_anew")
def test_planted_bugs_are_noticed(bug, monkeypatch):
    monkeypatch.setattr(scaled.ScaledPart, *PLANTED[bug])
    arrays, lengths = make(1, 2, 2, 296, 3, 256, 16, (70, 290), jnp.bfloat16)
    held, scale, whole = encoded(arrays, lengths)
    with pytest.raises(AssertionError):
        check(attend(held, lengths, 1, latent_scale=scale), loop(whole, lengths), jnp.bfloat16)


def test_results_are_the_loops_and_gradients_of_the_queries_those_of_xla():
    seed, (batch, tokens, slots, heads, rank, *more), sms = LOOPS["two_parts"]
    arrays, lengths = make(seed, batch, tokens, slots, heads, rank, *more, jnp.bfloat16)
    held, scale, whole = encoded(arrays, lengths)
    shape = batch, tokens, heads, rank
    weights = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)

    def loss(attend, pattern, q_rope):
        out, lse = attend(pattern, q_rope)
        return (out * weights).sum() + lse.sum(), (out, lse)

    def ours(pattern, q_rope):
        schedule = make_schedule(lengths, rows=tokens * heads, slots=slots, num_sms=sms, slack=0)
        return hopper.decode(
            pattern, q_rope, *held[2:], schedule,
            latent_scale=scale, scale=SCALE, interpret=INTERPRET,
        )  # fmt: skip

    def theirs(pattern, q_rope):
        seen = Seen.of(lengths, batch=batch, queries=tokens, slots=slots)
        store = Scaled(arrays_of(held, scale))
        return ops.attend_latents((pattern, q_rope), store, seen, scale=SCALE, implementation="xla")

    slopes = lambda f: jax.grad(functools.partial(loss, f), (0, 1), has_aux=True)  # noqa: E731
    (one, results), (two, _) = (
        jax.block_until_ready(jax.jit(slopes(f))(*held[:2])) for f in (ours, theirs)
    )
    check(results, loop(whole, lengths), jnp.bfloat16)
    for a, b in zip(one, two, strict=True):
        # Both go through XLA with the same cotangents; only the programs may differ.
        assert relative(a, b) < float(jnp.finfo(jnp.bfloat16).eps)


def arrays_of(held, scale):
    """The arrays of a `Scaled` store."""
    return {"latent": held[2], "k_rope": held[3], "latent_scale": scale}


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"encoding": "int8"}, "not int8"), ({"encoding": FP8, "dtype": "float16"}, "not float16")],
)
def test_what_it_cannot_serve(change, reason):
    assert reason in hopper.why_not(dataclasses.replace(SPEC, **change), HOPPER)


def test_where_it_runs():
    assert hopper.why_not(dataclasses.replace(SPEC, encoding=FP8), HOPPER) is None


# ---- on a Hopper GPU

NATIVE = [  # B, T, S, N, R, P, lengths
    (5, 2, 1408, 40, 512, 64, (1399, 0, 65, 700, 1400)),
    (3, 1, 2048, 128, 512, 64, (2047, 129, 1)),
    (3, 1, 896, 16, 384, 32, (640, 1, 896)),
    (2, 3, 512, 20, 128, 0, (511, 64)),
    (2, 1, 1024, 64, 256, 64, (1000, 63)),
    (5, 1, 1408, 16, 512, 64, (1399, 0, 65, 700, 1400)),
    (3, 3, 1024, 5, 512, 64, (1023, 1, 130)),
]


@pytest.mark.accelerator
@pytest.mark.parametrize("case", NATIVE, ids=lambda c: "N{3}-T{1}-R{4}-P{5}".format(*c))
def test_native(case, card):
    """Against the loop, bit for bit again, and bit for bit on pages; few parts and many."""
    *shape, lengths = case
    arrays, lengths = make(NATIVE.index(case), *shape, lengths, jnp.bfloat16)
    held, scale, whole = encoded(arrays, lengths)
    want = loop(whole, lengths)
    run = jax.jit(functools.partial(attend, sms=card.cores, interpret=None))
    got = run(held, lengths, latent_scale=scale)
    check(got, want, jnp.bfloat16, tolerance=4e-3)
    (*pages, scales), table = shuffled_pages([*held, scale], lengths)
    again_on_pages = run(pages, lengths, table=table, latent_scale=scales)
    for again in (run(held, lengths, latent_scale=scale), again_on_pages):
        for one, two in zip(got, again, strict=True):
            np.testing.assert_array_equal(np.asarray(one), np.asarray(two))
    few = 4 * -(-shape[1] * shape[3] // 64)
    run = jax.jit(functools.partial(attend, sms=few, interpret=None))
    got = run(held, lengths, latent_scale=scale)
    check(got, want, jnp.bfloat16, tolerance=4e-3)


@pytest.mark.accelerator
@pytest.mark.parametrize(
    ("heads", "least", "most", "span"), [(16, -30, 60, 22), (20, -76, 117, 24)]
)
def test_native_turns_every_byte_exactly(heads, least, most, span, card):
    """Every finite number of e4m3 with scales of many sizes: out is the only latent.

    The largest scale of a latent is of 2^least to 2^most, its smallest 2^span times smaller.
    """
    rows, rank, slots = 64, 512, 128
    rng = np.random.default_rng(0)
    codes = np.zeros((rows, slots, rank), np.uint8)
    codes[:, 0] = rng.permuted(np.resize(FINITE, (rows, rank)), axis=1)
    largest = np.linspace(least, most, rows).round().astype(int)
    powers = rng.permuted(largest[:, None] - np.array([0, 1, span // 2, span]), axis=1)
    scale = np.full((rows, slots, 4), np.nan, np.float32)
    scale[:, 0] = np.ldexp(1.0, powers)
    latent = jnp.asarray(codes).view(FP8)
    want = dequantise(latent[:, 0], jnp.asarray(scale[:, 0]), jnp.bfloat16)
    zeros = lambda *shape: jnp.zeros(shape, jnp.bfloat16)  # noqa: E731
    held = [zeros(rows, 1, heads, rank), zeros(rows, 1, heads, 64), latent, zeros(rows, slots, 64)]
    lengths = jnp.ones(rows, jnp.int32)
    run = jax.jit(functools.partial(attend, sms=card.cores, interpret=None))

    def mixed(scale):
        out, _ = run(held, lengths, latent_scale=jnp.asarray(scale))
        return np.asarray(out.astype(jnp.float32))[:, 0]

    out = mixed(scale)
    for head in (0, heads - 1):
        np.testing.assert_array_equal(out[:, head], np.asarray(want.astype(jnp.float32)))
    scale[5, 0, 1] = np.nan  # a group that had no finite number
    out = mixed(scale)[:, 0]
    assert np.isnan(out[5, 128:256]).any()
    np.testing.assert_array_equal(np.isfinite(np.delete(out, 5, 0)), True)


@pytest.mark.accelerator
def test_native_queries_of_many_sizes(card):
    """One power of two serves all queries of a row, and what is not finite stays in its head."""
    arrays, lengths = make(7, 3, 2, 1024, 8, 512, 64, (1023, 65, 700), jnp.bfloat16)
    size = jnp.asarray(np.exp2(40.0 - 2 * np.arange(8)), jnp.bfloat16).reshape(1, 1, 8, 1)
    pattern, q_rope, latent, k_rope = arrays
    latent = latent * jnp.asarray(2.0**-40, jnp.bfloat16)
    held, scale, whole = encoded([pattern * size, q_rope, latent, k_rope], lengths)
    run = jax.jit(functools.partial(attend, sms=card.cores, interpret=None))
    got = run(held, lengths, latent_scale=scale)
    # Rounding of float16 and of weights, relative to the largest score of a head.
    check(got, loop(whole, lengths), jnp.bfloat16, tolerance=4e-3)
    for bad in (jnp.inf, jnp.nan):
        worse = [held[0].at[1, 0, 3, 5].set(bad), *held[1:]]
        out, lse = run(worse, lengths, latent_scale=scale)
        assert np.isnan(np.asarray(lse[1, 0, 3]))
        np.testing.assert_array_equal(
            np.isnan(np.asarray(out.astype(jnp.float32))).any(-1), np.isnan(np.asarray(lse))
        )
        keep = ~np.isnan(np.asarray(lse))
        assert keep.sum() == keep.size - 1
        np.testing.assert_array_equal(np.asarray(lse)[keep], np.asarray(got[1])[keep])


@pytest.mark.accelerator
def test_native_in_the_layer(card):
    """Steps over an fp8 cache run through the kernel and agree with XLA's."""
    model, prompt, lengths = two_layers()
    results = []
    for implementation in (None, "xla"):
        for block in model.blocks:
            block.attention.implementation = implementation
        cache = model.init_cache(3, 128, dtype=FP8)
        _, cache = mla_jax.prefill_step(model, prompt, cache, lengths)
        text = mla_jax.decode_step.lower(model, prompt[:, :1], cache).compile().as_text()
        assert ("mosaic_gpu" in text) == (implementation is None)
        logits, cache = mla_jax.decode_step(model, prompt[:, :1], cache)
        results.append(np.asarray(logits, np.float64))
    assert relative(*results) < 2e-2
