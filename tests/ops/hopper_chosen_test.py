"""Attention to chosen slots by the Hopper kernel against a float64 loop: interpreted, and native.

`pytest -m accelerator tests/ops/hopper_chosen_test.py` runs the native half on a GPU.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import relative
from jax.experimental.pallas import mosaic_gpu as plgpu

from mla_jax import target
from mla_jax.cache import PAGE
from mla_jax.ops import dispatch, hopper
from mla_jax.ops.hopper import chosen as hopper_chosen

SCALE = 192**-0.5
INTERPRET = plgpu.InterpretGPUParams()
SPEC = dispatch.Call(
    "latent_attention", 2, 1, 4096, 128, (512, 64), 512, "bfloat16", ("chosen", "lengths")
)


def make(seed, batch, tokens, slots, heads, rank, rope, count, dtype):
    """Standard normal operands, a choice and limits for each query; NaN where nobody may look.

    The choice is in no order. Some of it is nothing: -1, S, and slots at or above the limit. The
    first query sees nothing at all, the last one chooses all it can.
    """
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
    limits = rng.integers(1, slots + 1, (batch, tokens))
    chosen = np.stack([rng.permutation(slots + 2)[:count] - 1 for _ in range(batch * tokens)])
    chosen = chosen.reshape(batch, tokens, count)
    limits.flat[0], limits.flat[-1] = 0, slots
    chosen[-1, -1] = rng.permutation(slots)[:count]
    arrays = [draw(batch, tokens, heads, width) for width in (rank, rope)]
    seen = np.zeros((batch, slots), bool)
    for b, t in np.ndindex(batch, tokens):
        seen[b, visible(chosen[b, t], limits[b, t])] = True
    bad = np.where(np.arange(slots) % 3 == 0, np.inf, np.nan)[None, :, None]
    arrays += [np.where(seen[..., None], draw(batch, slots, w), bad) for w in (rank, rope)]
    arrays = [jnp.asarray(a, dtype) for a in arrays]
    return arrays, *(jnp.asarray(x, jnp.int32) for x in (chosen, limits))


def visible(chosen, limit):
    return chosen[(chosen >= 0) & (chosen < limit)]


def loop(arrays, chosen, limits, scale=SCALE):
    """float64, one query token at a time."""
    pattern, q_rope, latent, k_rope = (np.asarray(a, np.float64) for a in arrays)
    chosen, limits = np.asarray(chosen), np.asarray(limits)
    out, lse = np.zeros(pattern.shape), np.full(pattern.shape[:-1], -np.inf)
    for b, t in np.ndindex(pattern.shape[:2]):
        at = visible(chosen[b, t], limits[b, t])
        if not len(at):
            continue
        scores = scale * (pattern[b, t] @ latent[b, at].T + q_rope[b, t] @ k_rope[b, at].T)
        top = scores.max(1, keepdims=True)
        weights = np.exp(scores - top)
        out[b, t] = weights @ latent[b, at] / weights.sum(1, keepdims=True)
        lse[b, t] = top[:, 0] + np.log(weights.sum(1))
    return out, lse


def paginate(arrays, seed=0):
    """The same cache on pages in random order, and the table; a page without a finite slot is G."""
    rng = np.random.default_rng(seed)
    pattern, q_rope, *held = (np.asarray(a) for a in arrays)
    batch, slots = held[0].shape[:2]
    per_row = slots // PAGE
    count = batch * per_row + 1
    place = rng.permutation(count)[: batch * per_row].reshape(batch, per_row)
    pools = []
    for x in held:
        pool = np.full((count, PAGE, x.shape[2]), np.nan, x.dtype)
        pool[place.reshape(-1)] = x.reshape(batch * per_row, PAGE, x.shape[2])
        pools.append(pool)
    used = np.isfinite(np.asarray(held[0], np.float32)).any(2).reshape(batch, per_row, PAGE).any(2)
    table = np.where(used, place, count)
    return [jnp.asarray(a) for a in (pattern, q_rope, *pools)], jnp.asarray(table, jnp.int32)


def check(got, want, dtype, tolerance=None):
    """As in `hopper_test`: half a unit of rounding for the weights, and one for the result."""
    out, lse = (np.asarray(x, np.float64) for x in got)
    dead = np.isneginf(want[1])
    assert np.isfinite(out).all()
    assert (np.isneginf(lse) == dead).all()
    assert (out[dead] == 0).all()
    assert relative(out, want[0]) < (tolerance or 0.8 * float(jnp.finfo(dtype).eps))
    np.testing.assert_allclose(lse[~dead], want[1][~dead], atol=2e-5)


def interpreted(arrays, chosen, limits, sms, table=None):
    return jax.block_until_ready(
        hopper_chosen.attend(
            *arrays, chosen, limits, table=table, scale=SCALE, interpret=INTERPRET, sms=sms, slack=0
        )
    )


CASES = [  # B, T, S, N, R, P, K, multiprocessors
    (2, 2, 256, 3, 128, 16, 130, 2),
    (1, 1, 512, 70, 128, 64, 300, 6),  # three parts share a row
    (1, 1, 128, 5, 256, 0, 20, 1),
]


@pytest.mark.parametrize("pages", [False, True])
@pytest.mark.parametrize(
    "case", CASES, ids=lambda c: "B{}-T{}-S{}-N{}-R{}-P{}-K{}-sms{}".format(*c)
)
def test_interpreted_is_the_loop(case, pages):
    *shape, sms = case
    arrays, chosen, limits = make(0, *shape, jnp.bfloat16)
    want = loop(arrays, chosen, limits)
    table = None
    if pages:
        arrays, table = paginate(arrays)
    check(interpreted(arrays, chosen, limits, sms, table), want, jnp.bfloat16)


# ---- on a Hopper GPU

NATIVE = [  # B, T, S, N, R, P, K, dtype
    (3, 2, 1000, 128, 512, 64, 300, "bfloat16"),
    (1, 1, 5000, 128, 512, 64, 2048, "bfloat16"),  # shared by all parts
    (2, 3, 640, 40, 256, 0, 130, "float16"),
    (2, 1, 512, 20, 384, 16, 511, "bfloat16"),
    (5, 40, 384, 16, 128, 32, 127, "bfloat16"),  # whole rows to each part
]


@pytest.fixture
def card():
    device = target.current()
    reason = hopper.why_not(SPEC, device)
    if reason is not None:
        pytest.skip(reason)
    return device


@pytest.mark.accelerator
@pytest.mark.parametrize("case", NATIVE, ids=lambda c: "B{}-T{}-S{}-N{}-R{}-P{}-K{}-{}".format(*c))
def test_native(case, card):
    """Dense and, where S is whole pages, paged: the same numbers bit for bit, each time."""
    *shape, dtype = case
    arrays, chosen, limits = make(NATIVE.index(case), *shape, dtype)

    @jax.jit
    def run(arrays, chosen, limits, table=None):
        return hopper_chosen.attend(
            *arrays, chosen, limits, table=table, scale=SCALE, sms=card.cores
        )

    got = run(arrays, chosen, limits)
    tolerance = 2e-3 if dtype == "bfloat16" else 3e-4
    check(got, loop(arrays, chosen, limits), dtype, tolerance)
    more = [run(arrays, chosen, limits)]
    if shape[2] % PAGE == 0:
        pages, table = paginate(arrays)
        more.append(run(pages, chosen, limits, table))
    for other in more:
        for one, two in zip(got, other, strict=True):
            np.testing.assert_array_equal(np.asarray(one), np.asarray(two))
