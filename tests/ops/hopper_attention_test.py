"""The Hopper attention kernels, forward and backward, against float64: interpreted, and native.

`pytest -m accelerator tests/ops/hopper_attention_test.py` runs the native half on a GPU.
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import relative
from jax.experimental.pallas import mosaic_gpu as plgpu

from mla_jax.ops.hopper import attention
from mla_jax.ops.hopper.attention import backward, forward, plan, tiles
from mla_jax.target import Target, current

INTERPRET = plgpu.InterpretGPUParams()
NAMES = ("q_nope", "q_rope", "k_nope", "k_rope", "value")
pytestmark = [
    # NaN in slots that nobody sees meets zero, before the mask.
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]


def make(seed, batch, tokens, slots, heads, widths, dtype):
    """Standard normal operands, and cotangents of both results."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
    nope, rope, value = widths
    arrays = [draw(batch, tokens, heads, nope), draw(batch, tokens, heads, rope)]
    arrays += [draw(batch, slots, heads, nope), draw(batch, slots, rope)]
    arrays += [draw(batch, slots, heads, value)]
    cotangents = draw(batch, tokens, heads, value), draw(batch, tokens, heads)
    narrow = lambda x: jnp.asarray(x, dtype)  # noqa: E731
    return [narrow(x) for x in arrays], (narrow(cotangents[0]), jnp.asarray(cotangents[1]))


def poison(arrays, cotangents, seen):
    """NaN and infinity in slots past the last that any query sees, NaN in blind queries."""
    past = np.cumsum(seen.any(1)[:, ::-1], axis=1)[:, ::-1] == 0  # [B S]
    blind = ~seen.any(2)  # [B T]
    bad = lambda x, where: jnp.where(  # noqa: E731
        where.reshape(*where.shape, *[1] * (x.ndim - 2)), jnp.asarray(np.nan, x.dtype), x
    )
    queries, keys = [bad(x, blind) for x in arrays[:2]], [bad(x, past) for x in arrays[2:]]
    return [*queries, *keys], (bad(cotangents[0], blind), cotangents[1])


def visible(batch, tokens, slots, *, lengths=None, query_lengths=None, causal=True, window=None,
            segment_ids=None, limits=None):  # fmt: skip
    """bool [B T S] of the same options, one query at a time."""
    seen = np.zeros((batch, tokens, slots), bool)
    for b, t in np.ndindex(batch, tokens):
        used = slots if lengths is None else int(lengths[b])
        last = used - (tokens - 1 - t) if causal else used
        if limits is not None:
            last = int(limits[b, t])
        if query_lengths is not None and t >= query_lengths[b]:
            last = 0
        first = 0 if window is None else max(0, last - window)
        seen[b, t, first : max(last, 0)] = True
        if segment_ids is not None:
            seen[b, t] &= np.asarray(segment_ids[1][b]) == np.asarray(segment_ids[0][b, t])
    return seen


def exact(arrays, cotangents, seen, scale):
    """float64 results and gradients of one call, [B T S] visible."""
    q_nope, q_rope, k_nope, k_rope, value = (
        np.nan_to_num(np.asarray(a, np.float64), nan=0.0, posinf=0.0, neginf=0.0) for a in arrays
    )
    d_out, d_lse = (np.nan_to_num(np.asarray(c, np.float64)) for c in cotangents)
    scores = np.einsum("btnh,bsnh->bnts", q_nope, k_nope)
    scores += np.einsum("btnp,bsp->bnts", q_rope, k_rope)
    scores = np.where(seen[:, None], scores * scale, -np.inf)
    top = np.maximum(scores.max(-1, keepdims=True), -1e30)
    weights = np.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    lse = np.where(total > 0, np.log(np.where(total > 0, total, 1)) + top, -np.inf)[..., 0]
    weights /= np.where(total > 0, total, 1)
    out = np.einsum("bnts,bsnv->btnv", weights, value)
    d_weights = np.einsum("btnv,bsnv->bnts", d_out, value)
    delta = np.einsum("btnv,btnv->bnt", d_out, out) - d_lse.swapaxes(1, 2)
    d_scores = scale * weights * (d_weights - delta[..., None])
    gradients = [
        np.einsum("bnts,bsnh->btnh", d_scores, k_nope),
        np.einsum("bnts,bsp->btnp", d_scores, k_rope),
        np.einsum("bnts,btnh->bsnh", d_scores, q_nope),
        np.einsum("bnts,btnp->bsp", d_scores, q_rope),
        np.einsum("bnts,btnv->bsnv", weights, d_out),
    ]
    return out, lse.swapaxes(1, 2), gradients


def run(arrays, cotangents, scale, interpret=None, **options):
    """Results and gradients of the kernels."""
    call = functools.partial(
        attention.expanded_attention, scale=scale, interpret=interpret, **options
    )
    results, pull = jax.vjp(call, *arrays)
    # The interpreter's callbacks run operations of their own: nothing else may be dispatched then.
    return *jax.block_until_ready(results), jax.block_until_ready(pull(cotangents))


def check(got, want, dtype):
    """Rounding of the weights (relative to the row's largest) and of the result: half a unit each.

    Each is uniform within half a unit in the last place, 0.29 eps at the root mean square, and at
    most twice that in a binade: two of them make at most 0.8 eps. Gradients carry a third, that of
    out within delta, and those of the rotary key a fourth, of each head's part.
    """
    eps = float(jnp.finfo(dtype).eps)
    out, lse = (np.asarray(x, np.float64) for x in got[:2])
    blind = np.isneginf(want[1])
    assert np.isfinite(out).all()
    np.testing.assert_array_equal(np.isneginf(lse), blind)
    assert (out[blind] == 0).all()
    assert relative(out, want[0]) < 0.8 * eps
    # float32 sums of exponentials by approximate instructions
    np.testing.assert_allclose(lse[~blind], want[1][~blind], atol=2e-5)
    for name, one, two in zip(NAMES, got[2], want[2], strict=True):
        assert np.isfinite(np.asarray(one, np.float64)).all(), name
        assert not two.size or relative(one, two) < 1.2 * eps, (name, relative(one, two))


def packed(rng, batch, tokens, count):
    """Ids of `count` segments of random lengths in each row, in order."""
    cuts = np.sort(rng.integers(0, tokens, (batch, count - 1)), axis=1)
    ids = (np.arange(tokens)[None, :, None] >= cuts[:, None]).sum(2).astype(np.int32)
    return jnp.asarray(ids)


def options_of(kind, rng, batch, tokens, slots):
    """Named sets of options, drawn for a shape."""
    draw = lambda high: jnp.asarray(rng.integers(0, high + 1, batch), jnp.int32)  # noqa: E731
    packs = lambda count: (packed(rng, batch, slots, count),)  # noqa: E731
    pair = lambda ids: (ids[:, slots - tokens :], ids)  # noqa: E731
    return {
        "causal": {},
        "lengths": {"lengths": draw(slots)},
        "both": {"lengths": draw(slots), "query_lengths": draw(tokens), "causal": False},
        "full": {"causal": False},
        "limits": {"limits": jnp.asarray(rng.integers(0, slots + 1, (batch, tokens)), jnp.int32)},
        "window": {"window": max(1, tokens // 3)},
        "window1": {"window": 1},
        "segments": {"segment_ids": pair(*packs(4))},
        "single": {"segment_ids": pair(jnp.asarray(np.tile(np.arange(slots), (batch, 1)), jnp.int32))},
        "scattered": {"segment_ids": (
            jnp.asarray(rng.integers(0, 3, (batch, tokens)), jnp.int32),
            jnp.asarray(rng.integers(0, 3, (batch, slots)), jnp.int32))},
        "everything": {"lengths": draw(slots), "window": max(1, tokens // 2),
                       "query_lengths": draw(tokens), "segment_ids": pair(*packs(3))},
    }[kind]  # fmt: skip


def compare(seed, kind, batch, tokens, slots, heads, widths, dtype, interpret=None, repeat=False):
    rng = np.random.default_rng(seed)
    arrays, cotangents = make(seed, batch, tokens, slots, heads, widths, dtype)
    options = options_of(kind, rng, batch, tokens, slots)
    seen = visible(batch, tokens, slots, **options)
    within = {k: v for k, v in options.items() if k != "segment_ids"}
    arrays, cotangents = poison(arrays, cotangents, visible(batch, tokens, slots, **within))
    scale = (widths[0] + widths[1]) ** -0.5
    got = run(arrays, cotangents, scale, interpret, **options)
    check(got, exact(arrays, cotangents, seen, scale), dtype)
    if repeat:
        again = run(arrays, cotangents, scale, interpret, **options)
        for one, two in zip(jax.tree.leaves(got), jax.tree.leaves(again), strict=True):
            np.testing.assert_array_equal(one, two)


CASES = [  # options, B, T, S, N, (H, P, V), dtype
    ("causal", 1, 137, 137, 2, (32, 16, 32), "bfloat16"),
    ("lengths", 2, 70, 201, 1, (16, 32, 16), "float16"),
    ("both", 2, 133, 70, 1, (48, 16, 64), "bfloat16"),
    ("limits", 1, 65, 129, 2, (24, 8, 40), "bfloat16"),
    ("window", 1, 200, 200, 1, (16, 16, 16), "bfloat16"),
    ("window1", 1, 130, 130, 1, (16, 0, 16), "bfloat16"),
    ("segments", 1, 260, 260, 1, (16, 16, 16), "bfloat16"),
    ("single", 1, 130, 130, 1, (0, 16, 16), "bfloat16"),
    ("scattered", 2, 66, 131, 1, (16, 16, 16), "bfloat16"),
    ("everything", 2, 130, 195, 1, (16, 16, 16), "float16"),
    ("causal", 1, 66, 130, 1, (192, 64, 256), "bfloat16"),  # dK and dV in a warpgroup each
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: "{}-B{}-T{}-S{}-N{}-{}-{}".format(*c))
def test_interpreted_is_float64(case, monkeypatch):
    monkeypatch.setattr(attention, "_H200_CORES", 2)  # several tiles for each thread block
    compare(CASES.index(case), *case, interpret=INTERPRET)
