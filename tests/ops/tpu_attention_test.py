"""Attention of the expanded form on TPU, in the interpreter, against a float64 loop over queries.

The interpreter fills uninitialised memory with NaN and raises on what lies out of bounds. Blocks
are tiny here, so that few tokens meet whole blocks, diagonals, and blocks that are skipped.
"""

import dataclasses
import functools
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

import mla_jax
from mla_jax import ops, target
from mla_jax.cache import Dense, Paged
from mla_jax.ops import dispatch, pieces
from mla_jax.ops.seen import Seen
from mla_jax.ops.tpu import attention
from mla_jax.ops.tpu.attention import forward, plan, tiles

SCALE = 0.11
BLOCKS = plan.Sizes(rows=16, slots=16, columns=8, piece=16, vmem_bytes=2**25)
# Sums of 50 products of float32, of which each rounds once, in and after an exponential.
TOLERANCE = 64 * float(jnp.finfo(jnp.float32).eps)


@pytest.fixture(autouse=True)
def interpreter():
    """Tiny blocks, and nothing traced before or after with other ones."""
    clear = (attention._run_forward.clear_cache, attention._run_backward.clear_cache)
    [each() for each in clear]
    params = pltpu.InterpretParams(detect_races=True)
    small = mock.patch.object(attention, "make_sizes", return_value=(BLOCKS, BLOCKS))
    with small, pltpu.force_tpu_interpret_mode(params):
        yield
    [each() for each in clear]
    pltpu.reset_tpu_interpret_mode_state()


def oracle(arrays, seen, d_out, d_lse):
    """out, lse and the gradients of the five arrays, in float64, one query after the other.

    `seen` [B T S] is what each query sees; nothing else is read.
    """
    q_nope, q_rope, k_nope, k_rope, value = arrays = [np.asarray(x, np.float64) for x in arrays]
    gradients = [np.zeros_like(x) for x in arrays]
    batch, tokens, heads, _ = q_nope.shape
    out = np.zeros((batch, tokens, heads, value.shape[-1]))
    lse = np.full((batch, tokens, heads), -np.inf)
    for b, t, n in np.ndindex(batch, tokens, heads):
        s = np.flatnonzero(seen[b, t])
        if not s.size:
            continue
        keys = np.concatenate([k_nope[b, s, n], k_rope[b, s]], axis=1)
        query = np.concatenate([q_nope[b, t, n], q_rope[b, t, n]])
        scores = SCALE * keys @ query
        lse[b, t, n] = np.log(np.exp(scores).sum())
        weights = np.exp(scores - lse[b, t, n])
        out[b, t, n] = weights @ value[b, s, n]
        d_scores = value[b, s, n] @ d_out[b, t, n] - out[b, t, n] @ d_out[b, t, n] + d_lse[b, t, n]
        d_scores *= weights * SCALE
        nope = q_nope.shape[-1]
        gradients[0][b, t, n] = d_scores @ keys[:, :nope]
        gradients[1][b, t, n] = d_scores @ keys[:, nope:]
        gradients[2][b, s, n] += np.outer(d_scores, query[:nope])
        gradients[3][b, s] += np.outer(d_scores, query[nope:])
        gradients[4][b, s, n] += np.outer(weights, d_out[b, t, n])
    return out, lse, *gradients


def draw(rng, batch, tokens, slots, heads, widths=(16, 16, 32)):
    nope, rope, value = widths
    shapes = [(batch, tokens, heads, nope), (batch, tokens, heads, rope)]
    shapes += [(batch, slots, heads, nope), (batch, slots, rope), (batch, slots, heads, value)]
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def close(got, want):
    """Within the tolerance of the largest number that is wanted; the same infinities."""
    for one, two in zip(got, want, strict=True):
        finite = np.isfinite(two)
        chex.assert_trees_all_equal(np.isfinite(np.asarray(one)), finite)
        top = np.abs(two[finite]).max(initial=1e-30)
        np.testing.assert_allclose(np.asarray(one)[finite] / top, two[finite] / top, atol=TOLERANCE)
    assert not interpret_pallas_call.races.races_found


def check(rng, arrays, seen, gradients=True, **options):
    """The kernels on arrays with NaN in every slot that nobody sees, against `oracle`."""
    batch, tokens, heads, _ = arrays[0].shape
    d_out = rng.standard_normal((batch, tokens, heads, arrays[4].shape[-1])).astype(np.float32)
    d_lse = rng.standard_normal((batch, tokens, heads)).astype(np.float32)
    want = oracle(arrays, seen, d_out, d_lse)
    unseen = ~seen.any(axis=1)
    given = [*arrays[:2], *(np.where(unseen.reshape(*unseen.shape, *[1] * (x.ndim - 2)),
                                     np.nan, x) for x in arrays[2:])]  # fmt: skip
    attend = functools.partial(
        mla_jax.expanded_attention, scale=SCALE, implementation="pallas_tpu", **options
    )
    if not gradients:
        close(jax.jit(attend)(*given), want[:2])
        return

    @jax.jit
    def run(d_out, d_lse, *given):
        results, pull = jax.vjp(attend, *given)
        return *results, *pull((d_out, d_lse))

    close(run(d_out, np.where(np.isfinite(want[1]), d_lse, 0), *given), want)


def causal(tokens, slots):
    return np.arange(slots)[None] <= np.arange(tokens)[:, None] + slots - tokens


def test_causal_self_attention(rng):
    """Whole blocks, diagonals and a last block that is cut; long rows backward in passes."""
    with mock.patch.object(attention, "_MOST_BYTES", 32 * 4 * 16):
        check(rng, draw(rng, 1, 41, 41, 2), causal(41, 41)[None])


def ragged():
    """Limits of 11 queries of three rows on 53 slots: some, all and none; ids; who sees what."""
    limits = np.stack([np.arange(20, 31), np.arange(43, 54), np.zeros(11, int)]).astype(np.int32)
    limits[0, 4] = 0
    ids = np.tile((np.arange(53) // 9 % 3).astype(np.int32), (3, 1))
    ids[1] = 7
    slot = np.arange(53)[None, None]
    seen = (slot < limits[..., None]) & (slot >= limits[..., None] - 9)
    return limits, ids, seen & (ids[:, None] == ids[:, -11:, None])


def test_limits_window_and_segments(rng):
    limits, ids, seen = ragged()
    check(rng, draw(rng, 3, 11, 53, 1), seen, lengths=limits, window=9, segment_ids=ids)


def with_bounds(*bounds):
    """`tiles.masked` that knows only these bounds of a query, in the order of all three."""
    real = tiles.masked
    return mock.patch.object(
        tiles, "masked",
        lambda of, shape, *more: real(of, shape._replace(bounds=bounds), *more),
    )  # fmt: skip


PLANTED = {
    "window_ignored": lambda: with_bounds("end", "", "id"),
    "segments_ignored": lambda: with_bounds("end", "start"),
    "off_by_one_slot": lambda: mock.patch.object(
        tiles, "masked",
        lambda of, shape, scores, unit, begin, diagonal, real=tiles.masked: real(
            of, shape, scores, unit, begin + 1, diagonal
        ),
    ),
    "unseen_not_cleaned": lambda: mock.patch.object(tiles, "cleaned", lambda x, scores: x),
    "never_masked": lambda: mock.patch.object(
        plan.blocks, "visible", lambda *a, real=plan.blocks.visible: (real(*a)[0],) * 2
    ),
    "last_block_forgotten": lambda: mock.patch.object(
        tiles, "run_of", lambda *a, real=tiles.run_of: (*real(*a)[:3], real(*a)[3] - 1)
    ),
}  # fmt: skip


QUICK = ["off_by_one_slot", "unseen_not_cleaned"]


@pytest.mark.parametrize(
    "bug",
    [*QUICK, *(pytest.param(bug, marks=pytest.mark.slow) for bug in PLANTED if bug not in QUICK)],
)
def test_planted_bugs_are_noticed(bug, rng):
    limits, ids, seen = (x[:1] for x in ragged())
    options = {"lengths": limits, "window": 9, "segment_ids": ids, "gradients": False}
    with PLANTED[bug](), pytest.raises(AssertionError):
        check(rng, draw(rng, 1, 11, 53, 1), seen, **options)


def test_a_gradient_of_lse_that_is_dropped_is_noticed(rng):
    def dropped(*arguments, real=attention._run_backward):
        return real(*arguments[:-1], jnp.zeros_like(arguments[-1]))

    broken = mock.patch.object(attention, "_run_backward", dropped)
    with broken, pytest.raises(AssertionError):
        check(rng, draw(rng, 1, 8, 8, 1), causal(8, 8)[None])


PLANTED_CONTEXT = {
    "pieces_before_forgotten": lambda: mock.patch.object(
        forward, "_begin", lambda of, shape, real=forward._begin: real(
            {name: ref for name, ref in of.items() if "before" not in name}, shape
        ),
    ),
    "gradient_of_pieces_before_dropped": lambda: mock.patch.object(
        attention, "_gradients_before", lambda before, *rest: tuple(map(jnp.zeros_like, before))
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("bug", PLANTED_CONTEXT)
def test_planted_bugs_of_pieces_are_noticed(bug, rng):
    with PLANTED_CONTEXT[bug](), pytest.raises(AssertionError):
        test_context_in_pieces_of_pages(rng)


def test_context_in_pieces_of_pages(rng):
    """Two pieces and a shorter last, pages in any order; one result and gradient with the op's."""
    batch, tokens, slots, rank = 2, 3, 384, 16
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    queries = draw(batch, tokens, 1, 16), draw(batch, tokens, 1, 16)
    kv_b = draw(rank, 1, 48)
    limits = jnp.array([[130, 256, 384], [0, 1, 90]], jnp.int32)
    unseen = np.arange(slots)[None] >= np.asarray(limits).max(1)[:, None]
    rows = {"latent": draw(batch, slots, rank), "k_rope": draw(batch, slots, 16)}
    table = jnp.array([[4, 0, 2], [1, 6, 6]], jnp.int32)  # the last row has one page
    of_row = [(0, 0), (0, 1), (0, 2), (1, 0)]

    def pool(x):
        x = np.where(unseen[..., None], np.nan, x).reshape(batch, 3, 128, -1)
        pages = np.full((6, *x.shape[2:]), np.nan, np.float32)
        for row, page in of_row:
            pages[table[row, page]] = x[row, page]
        return jnp.asarray(pages)

    def attend(name, store, queries, kv_b, window):
        seen = Seen(limits=limits, window=window)
        out, lse = ops.context_attention(
            queries, store, seen, kv_b, scale=SCALE, implementation=name
        )
        return jnp.sin(out).sum() + jnp.where(jnp.isfinite(lse), jnp.cos(lse), 0).sum(), (out, lse)

    def of_pool(arrays, queries, kv_b):
        return attend("pallas_tpu", Paged(Dense(arrays), table), queries, kv_b, 140)

    def of_rows(arrays, queries, kv_b):
        return attend("reference", Dense(arrays), queries, kv_b, 140)

    more = {"argnums": (0, 1, 2), "has_aux": True}
    wide = BLOCKS._replace(slots=128, piece=128, columns=16)  # the interpreter counts steps
    whole = mock.patch.object(attention, "make_sizes", return_value=(wide, wide))
    with whole, mock.patch.multiple(pieces, _WORKSPACE=1, _LEAST=256):
        got, result = jax.jit(jax.grad(of_pool, **more))(
            {n: pool(x) for n, x in rows.items()}, queries, kv_b
        )
    want, expected = jax.jit(jax.grad(of_rows, **more))(rows, queries, kv_b)
    close(result, [np.asarray(x) for x in expected])
    close(jax.tree.leaves(got[1:]), [np.asarray(x) for x in jax.tree.leaves(want[1:])])
    for name, x in want[0].items():
        gathered = np.zeros(got[0][name].shape)
        for row, page in of_row:
            gathered[table[row, page]] = np.asarray(x[row]).reshape(3, 128, -1)[page]
        close([got[0][name]], [gathered])


SPEC = dispatch.Call(
    "expanded_attention", 1, 4096, 4096, 128, (128, 64), 128, "bfloat16", ("segment_ids",)
)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": "float16"}, "not float16"),
        ({"options": ("mask",)}, "not mask"),
        ({"soft_cap": 30.0}, "not soft_cap"),
        ({"key_dims": (120, 64)}, "multiples of 16"),
        ({"key_dims": (256, 64)}, "up to 256"),
        ({"batch": 2**20}, "scalar memory"),
    ],
    ids=str,
)
def test_why_not(change, reason):
    chip = target.Target("tpu", "TPU v6 lite")
    assert attention.why_not(SPEC, chip) is None
    assert reason in attention.why_not(dataclasses.replace(SPEC, **change), chip)
    context = dataclasses.replace(SPEC, op="context_attention", slots=32768, options=("window",))
    assert dict(dispatch.report(context, chip))["pallas_tpu"] is None
    assert "needs a TPU" in attention.why_not(SPEC, target.Target("cpu", "cpu"))
