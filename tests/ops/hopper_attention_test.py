"""The Hopper attention kernels, forward and backward, against float64: interpreted, and native.

`pytest -m accelerator tests/ops/hopper_attention_test.py` runs the native half on a GPU.
"""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import gate, relative
from hopper_common import HOPPER as H200
from hopper_common import INTERPRET, MARKS, SCALE

from mla_jax import remat_policy
from mla_jax.ops import blocks, dispatch
from mla_jax.ops.hopper import attention
from mla_jax.ops.hopper.attention import backend, backward, plan, tiles
from mla_jax.ops.seen import Seen
from mla_jax.target import Target, current

NAMES = ("q_nope", "q_rope", "k_nope", "k_rope", "value")
pytestmark = MARKS


def make(seed, batch, tokens, slots, heads, widths, dtype):
    """Standard normal operands, and cotangents of both results."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
    nope, rope, value = widths
    arrays = [draw(batch, tokens, heads, nope), draw(batch, tokens, heads, rope)]
    arrays += [draw(batch, slots, heads, nope), draw(batch, slots, rope)]
    arrays += [draw(batch, slots, heads, value)]
    cotangents = draw(batch, tokens, heads, value), draw(batch, tokens, heads)
    narrow = lambda x: jnp.asarray(x.astype(jnp.dtype(dtype)))  # noqa: E731
    return [narrow(x) for x in arrays], (narrow(cotangents[0]), jnp.asarray(cotangents[1]))


def poison(arrays, cotangents, seen):
    """NaN and infinity in slots past the last that any query sees, NaN in blind queries."""
    past = np.cumsum(seen.any(1)[:, ::-1], axis=1)[:, ::-1] == 0  # [B S]
    blind = ~seen.any(2)  # [B T]
    bad = lambda x, where: jnp.asarray(  # noqa: E731
        np.where(where.reshape(*where.shape, *[1] * (x.ndim - 2)), x.dtype.type(np.nan), x)
    )
    queries, keys = [bad(x, blind) for x in arrays[:2]], [bad(x, past) for x in arrays[2:]]
    return [*queries, *keys], (bad(cotangents[0], blind), cotangents[1])


def visible(batch, tokens, slots, *, lengths=None, query_lengths=None, causal=True, window=None,
            segment_ids=None, limits=None):  # fmt: skip
    """Which slots each query sees, [B T S], under the same options, one query at a time."""
    seen = np.zeros((batch, tokens, slots), bool)
    lengths, query_lengths, limits, segment_ids = jax.device_get(
        (lengths, query_lengths, limits, segment_ids)
    )
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
            seen[b, t] &= segment_ids[1][b] == segment_ids[0][b, t]
    return seen


def limited(batch, tokens, slots, options):
    """What is visible within limits; slots of a segment that no query has still hold numbers."""
    within = {name: value for name, value in options.items() if name != "segment_ids"}
    return visible(batch, tokens, slots, **within)


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

    # One program: the interpreter's callbacks run operations of their own, and wait for ever where
    # something else is dispatched while they do.
    @jax.jit
    def both(arrays, cotangents):
        results, pull = jax.vjp(call, *arrays)
        return *results, pull(cotangents)

    return jax.block_until_ready(both(arrays, cotangents))


def check(got, want, dtype):
    """Errors of rounding, of which one is 0.21 eps at the root mean square (uniform within half a
    unit in the last place, mantissas as logarithms fall) and n are 0.21 sqrt(n) eps.

    A result has two, of the weights and its own; a gradient up to four, of the weights or their
    gradient, of out within delta, of each head's part of the rotary key, and its own. Twice that
    covers small samples.
    """
    eps = float(jnp.finfo(dtype).eps)
    out, lse = (np.asarray(x, np.float64) for x in got[:2])
    blind = np.isneginf(want[1])
    assert np.isfinite(out).all()
    np.testing.assert_array_equal(np.isneginf(lse), blind)
    assert (out[blind] == 0).all()
    assert blind.all() or relative(out, want[0]) < 0.6 * eps
    # float32 sums of exponentials by approximate instructions
    np.testing.assert_allclose(lse[~blind], want[1][~blind], atol=2e-5)
    for name, one, two in zip(NAMES, got[2], want[2], strict=False):  # or no gradients
        assert np.isfinite(np.asarray(one, np.float64)).all(), name
        if two.any():
            assert relative(one, two) < 0.84 * eps, name
        else:
            assert not np.asarray(one).any(), name


def packed(rng, batch, tokens, count):
    """Ids of `count` segments of random lengths in each row, in order."""
    cuts = np.sort(rng.integers(0, tokens, (batch, count - 1)), axis=1)
    ids = (np.arange(tokens)[None, :, None] >= cuts[:, None]).sum(2).astype(np.int32)
    return ids


def options_of(kind, rng, batch, tokens, slots):
    """Named sets of options, drawn for a shape."""
    draw = lambda high, *shape: rng.integers(0, high + 1, shape or batch, np.int32)  # noqa: E731
    packs = lambda count: (packed(rng, batch, slots, count),)  # noqa: E731
    pair = lambda ids: (ids[:, slots - tokens :], ids)  # noqa: E731
    options = {
        "causal": {},
        "lengths": {"lengths": draw(slots)},
        "both": {"lengths": draw(slots), "query_lengths": draw(tokens), "causal": False},
        "full": {"causal": False},
        "limits": {"limits": draw(slots, batch, tokens)},
        "window": {"window": max(1, tokens // 3)},
        "window1": {"window": 1},
        "segments": {"segment_ids": pair(*packs(4))},
        "single": {"segment_ids": pair(np.tile(np.arange(slots, dtype=np.int32), (batch, 1)))},
        "scattered": {"segment_ids": (draw(2, batch, tokens), draw(2, batch, slots))},
        "planted": {"lengths": np.array([slots - 7]), "window": 150,
                    "query_lengths": np.array([tokens - 5]), "segment_ids": pair(*packs(3))},
        "everything": {"lengths": draw(slots), "window": max(1, tokens // 2),
                       "query_lengths": draw(tokens), "segment_ids": pair(*packs(3))},
    }[kind]  # fmt: skip
    return {
        name: value if isinstance(value, int) else jax.tree.map(jnp.asarray, value)
        for name, value in options.items()
    }


def in_one_program(make, options):
    """`make(**options)`, where each of its operations would be a program; as it is by now."""
    arrays = {name: value for name, value in options.items() if not isinstance(value, int)}
    known = {name: value for name, value in options.items() if name not in arrays}
    return jax.block_until_ready(jax.jit(lambda arrays: make(**arrays, **known))(arrays))


def compare(seed, kind, batch, tokens, slots, heads, widths, dtype, interpret=None, repeat=False):
    rng = np.random.default_rng(seed)
    arrays, cotangents = make(seed, batch, tokens, slots, heads, widths, dtype)
    options = options_of(kind, rng, batch, tokens, slots)
    arrays, cotangents = poison(arrays, cotangents, limited(batch, tokens, slots, options))
    got = run(arrays, cotangents, SCALE, interpret, **options)
    check(got, exact(arrays, cotangents, visible(batch, tokens, slots, **options), SCALE), dtype)
    if repeat:
        again = run(arrays, cotangents, SCALE, interpret, **options)
        for one, two in zip(jax.tree.leaves(got), jax.tree.leaves(again), strict=True):
            np.testing.assert_array_equal(one, two)


CASES = [  # options, B, T, S, N, (H, P, V), dtype
    ("causal", 1, 137, 137, 1, (32, 16, 32), "bfloat16"),
    ("limits", 1, 65, 129, 2, (24, 8, 40), "bfloat16"),
    ("scattered", 2, 66, 131, 1, (16, 0, 16), "bfloat16"),
    ("everything", 2, 130, 195, 1, (0, 16, 16), "float16"),
    ("causal", 1, 66, 130, 1, (192, 64, 256), "bfloat16"),  # dK and dV in a warpgroup each
]


@pytest.mark.parametrize(
    "case", gate(CASES, 3, 4), ids=lambda c: "{}-B{}-T{}-S{}-N{}-{}-{}".format(*c)
)
def test_interpreted_is_float64(case, monkeypatch):
    monkeypatch.setattr("mla_jax.ops.hopper._H200_SMS", 2)  # several tiles for each thread block
    compare(CASES.index(case), *case, interpret=INTERPRET)


def forward_alone(seed, kind, batch, tokens, slots, heads, widths, dtype):
    """As `compare`, without gradients: a third of the time."""
    rng = np.random.default_rng(seed)
    arrays, cotangents = make(seed, batch, tokens, slots, heads, widths, dtype)
    options = options_of(kind, rng, batch, tokens, slots)
    arrays, cotangents = poison(arrays, cotangents, limited(batch, tokens, slots, options))
    want = exact(arrays, cotangents, visible(batch, tokens, slots, **options), SCALE)
    call = functools.partial(
        attention.expanded_attention, scale=SCALE, interpret=INTERPRET, **options
    )
    got = jax.jit(call)(*arrays)
    check((*jax.block_until_ready(got), ()), want, dtype)


FORWARD = [
    ("lengths", 2, 70, 201, 1, (16, 32, 16), "float16"),
    ("both", 2, 133, 70, 1, (48, 16, 64), "bfloat16"),
    ("full", 1, 70, 130, 1, (16, 16, 16), "bfloat16"),
    ("window", 1, 300, 300, 1, (16, 16, 16), "bfloat16"),
    ("window1", 1, 130, 130, 1, (16, 16, 16), "bfloat16"),
    ("segments", 1, 260, 260, 1, (16, 16, 16), "bfloat16"),
    ("single", 1, 130, 130, 1, (16, 16, 16), "bfloat16"),
    ("limits", 1, 65, 129, 2, (24, 8, 40), "bfloat16"),
]


@pytest.mark.parametrize(
    "case", gate(FORWARD, 1, 7), ids=lambda c: "{}-B{}-T{}-S{}-N{}-{}-{}".format(*c)
)
def test_interpreted_forward(case):
    forward_alone(FORWARD.index(case), *case)


REAL = {
    "visible": tiles.Walk.visible, "runs": blocks.runs, "blocks": blocks.visible,
    "limits_of": plan.limits_of, "items": tiles.Walk.range,
}  # fmt: skip


def _ids_ignored(self, rows, start, ids, width):
    here = types.SimpleNamespace(shape=self.shape._replace(segments=False))
    return REAL["visible"](here, rows, start, ids, width)


def _late_start(some, whole, live):
    return REAL["runs"](some, whole, live).at[..., 0].add(1)


def _never_masked(*arguments):
    some, _ = REAL["blocks"](*arguments)
    return some, some


PLANTED = {
    "ids_ignored": (tiles.Walk, "visible", _ids_ignored),
    "dead_values_left": (tiles.Walk, "keep_slots", lambda self, refs, first, live: None),
    "wrong_scale": (tiles, "LOG2E", tiles.LOG2E * 1.05),
    "same_tile_again": (
        tiles.Walk, "range",
        lambda self, row, tile: REAL["items"](self, row, jnp.minimum(tile, 1))),
}  # fmt: skip


TRACED = attention._run_forward, attention._run_backward


CASE = ("planted", 1, 300, 306, 1, (16, 16, 16), "bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize("bug", PLANTED)
@pytest.mark.usefixtures("traced_anew")
def test_planted_bugs_are_noticed(bug, monkeypatch):
    monkeypatch.setattr(*PLANTED[bug])
    with pytest.raises(AssertionError):
        forward_alone(3, *CASE)


PLANS = {
    "future_token_visible": (
        plan, "limits_of", lambda *a, **k: REAL["limits_of"](*a, **k) + 1),
    "first_block_dropped": (blocks, "runs", _late_start),
    "never_masked": (blocks, "visible", _never_masked),
}  # fmt: skip


def test_planted_bugs_of_the_plan_are_noticed(monkeypatch):
    """One program for the right plan, which gives the right results, and for the wrong ones."""
    kind, batch, tokens, slots, heads, widths, dtype = CASE
    arrays, cotangents = make(3, batch, tokens, slots, heads, widths, dtype)
    options = options_of(kind, np.random.default_rng(3), batch, tokens, slots)
    arrays, cotangents = poison(arrays, cotangents, limited(batch, tokens, slots, options))
    want = exact(arrays, cotangents, visible(batch, tokens, slots, **options), SCALE)
    run = jax.jit(
        functools.partial(
            attention.expanded_attention, scale=SCALE, interpret=INTERPRET,
            segment_ids=options["segment_ids"],
        )
    )  # fmt: skip

    def planned(window, segment_ids, **options):
        limits = plan.limits_of(batch, tokens, slots, **options)
        return attention.plan_for(
            limits, slots, widths[:2], widths[2], window=window, segment_ids=segment_ids
        )

    def compare():
        made = in_one_program(planned, options)
        check((*jax.block_until_ready(run(*arrays, plan=made)), ()), want, dtype)

    compare()
    for bug in PLANS:
        with monkeypatch.context() as planted:
            planted.setattr(*PLANS[bug])
            with pytest.raises(AssertionError):
                compare()


BACKWARD = {
    "dead_queries_left": (backward._Keys, "keep_queries", lambda *a: None),
    "dead_keys_left": (tiles.Walk, "keep_slots", lambda *a: None),
}


@pytest.mark.slow
@pytest.mark.parametrize("bug", BACKWARD)
@pytest.mark.usefixtures("traced_anew")
def test_planted_bugs_of_the_backward(bug, monkeypatch):
    monkeypatch.setattr(*BACKWARD[bug])
    with pytest.raises(AssertionError):
        compare(0, "both", 1, 40, 70, 1, (16, 0, 16), "bfloat16", INTERPRET)


@pytest.mark.parametrize("seed", range(8))
def test_the_plan_covers_what_is_seen(seed):
    rng = np.random.default_rng(seed)
    batch, tokens, slots = 2, int(rng.integers(1, 400)), int(rng.integers(400, 700))
    kind = ("causal", "both", "limits", "window", "segments", "scattered", "everything", "single")
    options = options_of(kind[seed], rng, batch, tokens, slots)
    seen = visible(batch, tokens, slots, **options)
    sizes = plan.Sizes(forward=128, queries=64, keys=128)

    def planned(window=None, segment_ids=None, **options):
        limits = plan.limits_of(batch, tokens, slots, **options)
        return plan.make_plan(limits, slots, sizes, window=window, segment_ids=segment_ids)

    made = in_one_program(planned, options)
    for ranges, rows, size, matrix in (
        (made.forward, 128, 128, seen),
        (made.queries, 128, 64, seen),
        (made.keys, 128, 64, seen.swapaxes(1, 2)),
    ):
        ranges = np.broadcast_to(np.asarray(ranges), (batch, *ranges.shape[1:]))
        for b, tile in np.ndindex(ranges.shape[:2]):
            first, opened, close, last, live = ranges[b, tile]
            assert 0 <= first <= opened <= close <= last or (opened == close and first <= last)
            of_tile = matrix[b, tile * rows : (tile + 1) * rows]
            assert not of_tile[:, : first * size].any()
            assert not of_tile[:, last * size :].any()
            assert of_tile[:, opened * size : close * size].all()
            assert not seen[b, :, live:].any()


def test_packing_skips_blocks():
    """Segments of 512: no tile visits more than its own segment's blocks, and their neighbours'."""
    ids = np.arange(4096, dtype=np.int32)[None] // 512
    sizes = plan.Sizes(forward=128, queries=64, keys=128)
    make = lambda ids: plan.make_plan(  # noqa: E731
        plan.limits_of(1, 4096, 4096), 4096, sizes, segment_ids=(ids, ids)
    )
    made = in_one_program(make, {"ids": ids})
    first, opened, close, last, _ = np.asarray(made.forward)[0].T
    tile = np.arange(32)
    np.testing.assert_array_equal(first, tile // 4 * 4)
    np.testing.assert_array_equal(last, tile + 1)
    np.testing.assert_array_equal(close - opened, tile % 4)  # all but the diagonal


def test_one_plan_for_many_layers_and_vmap(monkeypatch):
    monkeypatch.setattr("mla_jax.ops.hopper._H200_SMS", 2)
    arrays, cotangents = make(5, 2, 72, 72, 1, (16, 16, 16), "bfloat16")
    made = in_one_program(
        lambda: attention.plan_for(plan.limits_of(2, 72, 72), 72, (16, 16), 16), {}
    )
    call = functools.partial(attention.expanded_attention, scale=SCALE, interpret=INTERPRET)
    want = exact(arrays, cotangents, visible(2, 72, 72), SCALE)
    planned = jax.block_until_ready(jax.jit(call)(*arrays, plan=made))
    check((*planned, ()), want, "bfloat16")
    each = jax.jit(jax.vmap(lambda *a: call(*(x[None] for x in a))))(*arrays)
    for one, two in zip(jax.block_until_ready(each), planned, strict=True):
        np.testing.assert_array_equal(np.asarray(one)[:, 0], two)


def test_as_a_backend(monkeypatch):
    """`Seen` says what a query sees: ragged rows, padded on the right, of two segments."""
    monkeypatch.setattr("mla_jax.ops.hopper._H200_SMS", 2)
    device = Target("cpu", "cpu", interpret=INTERPRET)
    monkeypatch.setattr(backend.target, "current", lambda: device)
    arrays, _ = make(7, 2, 72, 80, 1, (16, 16, 16), "bfloat16")
    ids = jnp.asarray(packed(np.random.default_rng(7), 2, 80, 2))
    lengths = jnp.asarray(np.array([80, 75]))
    seen = in_one_program(
        lambda **of: Seen.of(batch=2, queries=72, slots=80, window=40, **of),
        {"lengths": lengths, "segment_ids": ids},
    )
    call = dispatch.Call("expanded_attention", 2, 72, 80, 1, (16, 16), 16, "bfloat16", scale=SCALE)
    store = types.SimpleNamespace(k_nope=arrays[2], k_rope=arrays[3], value=arrays[4])
    plans, mask = in_one_program(
        lambda seen: (backend.plan(seen, call), seen.visible(jnp.arange(80))), {"seen": seen}
    )
    mask = np.asarray(mask)[:, 0]
    want = exact(arrays, (np.zeros((2, 72, 1, 16)), np.zeros((2, 72, 1))), mask, SCALE)
    for planned in (seen, seen.replace(plan=plans)):
        got = jax.jit(lambda x, p=planned: backend.expanded_attention(x, store, p, call))(
            arrays[:2]
        )
        check((*jax.block_until_ready(got), ()), want, "bfloat16")


def test_shard_map():
    """Types for several devices, gradients included."""
    arrays, _ = make(6, 2, 72, 72, 1, (16, 16, 16), "bfloat16")
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("x")
    call = functools.partial(attention.expanded_attention, scale=SCALE)

    def both(*arrays):
        results, pull = jax.vjp(call, *arrays)
        return results, pull(results)

    local = jax.shard_map(both, mesh=mesh, in_specs=spec, out_specs=spec)
    shapes = jax.eval_shape(local, *arrays)
    assert shapes[1][3].shape == (2, 72, 16)


CALL = dispatch.Call(
    "expanded_attention", 1, 4096, 4096, 128, (128, 64), 128, "bfloat16",
    ("lengths", "segment_ids", "window"),
)  # fmt: skip
REFUSED = {
    "float32": ({"dtype": "float32"}, "bfloat16 and float16"),
    "options": ({"options": ("mask", "window"), "soft_cap": 30.0}, "not mask, soft_cap"),
    "odd": ({"key_dims": (124, 64)}, "multiples of 8"),
    "wide": ({"key_dims": (256, 64)}, "up to 256 channels, not 320 and 128"),
    "wide_value": ({"value_dim": 512}, "up to 256 channels, not 192 and 512"),
    "no_value": ({"value_dim": 0}, "not 192 and 0"),
    "huge": ({"batch": 2**10}, "32 bits"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_serve(name):
    change, reason = REFUSED[name]
    assert reason in attention.why_not(dataclasses.replace(CALL, **change), H200)


def test_where_it_runs():
    assert attention.why_not(CALL, H200) is None
    assert "9.x (Hopper), this is 8.0" in attention.why_not(CALL, Target("gpu", "NVIDIA A100", 8.0))
    assert "needs an NVIDIA GPU" in attention.why_not(CALL, Target("cpu", "cpu"))
    assert "needs an NVIDIA GPU" in attention.why_not(CALL, Target("tpu", "TPU v6 lite"))
    interpreting = Target("cpu", "cpu", interpret=INTERPRET)
    assert attention.why_not(CALL, interpreting) is None


@pytest.mark.parametrize("rope", range(0, 257, 8))
def test_all_widths_have_blocks(rope):
    for value in (8, 64, 128, 136, 192, 200, 256):
        for nope in {0, 8, 128, 248 - rope, 256 - rope}:
            if nope < 0 or not 0 < nope + rope <= 256:
                continue
            arrays = (
                jax.ShapeDtypeStruct((1, 64, 1, w), jnp.bfloat16) for w in (nope, rope, value)
            )
            shape = attention.shape_of(*arrays, 1.0, True)
            assert backward.sizes(shape).forward in (64, 128)
            assert backward._key_stages(shape) >= 2


# ---- on a Hopper GPU

NATIVE = [
    ("causal", 1, 701, 701, 40, (128, 64, 128), "bfloat16"),  # many tiles for each thread block
    ("lengths", 3, 700, 1801, 2, (128, 64, 128), "float16"),
    ("both", 3, 1333, 700, 2, (128, 64, 128), "bfloat16"),
    ("limits", 2, 650, 1290, 2, (128, 64, 128), "bfloat16"),
    ("window", 2, 1500, 1500, 2, (128, 64, 128), "bfloat16"),
    ("window1", 1, 1300, 1300, 2, (64, 32, 64), "bfloat16"),
    ("segments", 2, 2601, 2601, 2, (128, 64, 128), "bfloat16"),
    ("single", 1, 1300, 1300, 2, (96, 64, 64), "bfloat16"),
    ("scattered", 2, 661, 1310, 2, (128, 64, 128), "bfloat16"),
    ("everything", 3, 301, 455, 20, (128, 64, 128), "float16"),
    ("everything", 2, 401, 501, 20, (192, 64, 256), "bfloat16"),
    ("causal", 1, 1201, 1201, 3, (256, 0, 256), "bfloat16"),
    ("everything", 2, 601, 1201, 3, (0, 32, 32), "bfloat16"),
    ("causal", 1, 601, 601, 5, (200, 56, 136), "float16"),
]


@pytest.fixture
def card():
    reason = attention.why_not(CALL, current())
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.accelerator
@pytest.mark.parametrize("case", NATIVE, ids=lambda c: "{}-B{}-T{}-S{}-N{}-{}-{}".format(*c))
@pytest.mark.usefixtures("card")
def test_native(case):
    compare(NATIVE.index(case), *case, repeat=True)


def names_in(jaxpr):
    """Names of the jitted functions that a program calls, as often as it does."""
    for equation in jaxpr.eqns:
        yield equation.params.get("name")
        for inner in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(inner, "jaxpr", inner)
            yield from names_in(inner) if hasattr(inner, "eqns") else ()


def test_a_policy_that_keeps_heads_and_lse_does_not_attend_again(monkeypatch):
    """Calls of the forward kernel are counted; tracing that of the backward takes as long."""
    arrays, _ = make(0, 1, 8, 8, 1, (32, 32, 32), jnp.bfloat16)

    def backward(arrays, plan, out, lse, *_):
        kept = out.sum().astype(jnp.float32) + lse.sum()  # so that it needs them
        return jax.tree.map(lambda x: x * kept.astype(x.dtype), arrays)

    monkeypatch.setattr(attention, "_run_backward", backward)

    def forward_calls(save):
        attend = functools.partial(attention.expanded_attention, scale=SCALE)  # traced, not run
        again = jax.checkpoint(lambda *arrays: attend(*arrays)[0], policy=remat_policy(save))
        loss = lambda *arrays: again(*arrays).astype(jnp.float32).sum()  # noqa: E731
        program = jax.make_jaxpr(jax.grad(loss))(*arrays)
        return list(names_in(program.jaxpr)).count("_run_forward")

    assert forward_calls("queries") == 2
    assert forward_calls("all") == 1
