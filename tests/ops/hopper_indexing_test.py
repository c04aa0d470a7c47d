"""Sparse attention's choice on Hopper against numpy: interpreted here, native on a Hopper GPU.

`pytest -m accelerator tests/ops/hopper_indexing_test.py` runs the native half on a GPU.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import gate
from jax.experimental.pallas import mosaic_gpu as plgpu

from mla_jax import target
from mla_jax.cache import PAGE, Dense, Paged
from mla_jax.ops import choose_slots, dispatch, hopper, xla_choice
from mla_jax.ops.hopper import indexing
from mla_jax.ops.hopper.indexing import interpreted, scores, select
from mla_jax.ops.seen import Seen

INTERPRET = plgpu.InterpretGPUParams()
KERNELS = (("index_scores", "pallas_gpu"), ("best_slots", "pallas_gpu"))


def exact(scores, limits, count):
    """By numpy's stable sort: the best below the limits, the lowest slot first, then S."""
    slots = scores.shape[-1]
    chosen = np.full((*limits.shape, count), slots)
    for at in np.ndindex(limits.shape):
        row = scores[at][: limits[at]].astype(np.float64)
        row = np.where(np.isnan(row), 1e300, row)
        best = np.argsort(-row, kind="stable")[:count]
        best = np.sort(best[~np.isneginf(row[best])])
        chosen[at][: len(best)] = best
    return chosen


def mixed(rng, shape, limits):
    """Scores with many equal ones, both zeros, NaN of both signs and -inf; NaN past the limits."""
    made = np.round(rng.standard_normal(shape) * 3).astype(np.float32)
    made = np.where(made == 0, rng.choice(np.float32([0.0, -0.0]), shape), made)
    odd = np.float32([np.nan, -np.nan, -np.inf, 1e-40, -1e-40, 3e38])
    made = np.where(rng.random(shape) < 0.05, rng.choice(odd, shape), made)
    made[np.arange(shape[-1]) >= limits[..., None]] = np.nan
    return made.astype(np.float32)


def run_select(scores, limits, count, blocks, interpret=INTERPRET, **tuning):
    run = indexing.run_select
    chosen = run(
        jnp.asarray(scores), jnp.asarray(limits), count=count, sms=132, interpret=interpret,
        tuning=(() if blocks is None else (("blocks", blocks),)) + tuple(tuning.items()),
    )  # fmt: skip
    return jax.block_until_ready(chosen)


CHOICES = [  # limits [B T], S, K, blocks
    ([[2499], [0], [30]], 2500, 40, 1),
    ([[4600, 3000]], 4601, 100, 2),  # the second of four blocks' groups is not full
    ([[2100]], 2100, 2090, 2),  # nearly all are chosen
]


@pytest.mark.parametrize("case", gate(CHOICES, 1), ids=["one_block", "two_blocks", "nearly_all"])
def test_choice_interpreted_is_numpys(case, rng):
    limits, slots, count, blocks = case
    limits = np.asarray(limits)
    made = mixed(rng, (*limits.shape, slots), limits)
    got = run_select(made, limits, count, blocks)
    np.testing.assert_array_equal(got, exact(made, limits, count))


def test_xla_chooses_the_same(rng):
    """Both zeros are equal, and NaN is chosen first whatever its sign is."""
    limits = np.array([[200, 131], [0, 77]])
    made = mixed(rng, (2, 2, 200), limits)
    below = np.where(np.arange(200) < limits[..., None], made, -np.inf)
    call = dispatch.Call("best_slots", 2, 2, 200, 1, (0, 0), 60, "float32")
    got = xla_choice.best_slots(jnp.asarray(below), None, Seen(limits=jnp.asarray(limits)), call)
    np.testing.assert_array_equal(np.sort(got), exact(made, limits, 60))


def operands(rng, batch, tokens, slots, heads, width, limits, dtype=jnp.bfloat16):
    """Queries, weights and keys, which are NaN where no query of the row sees them."""
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    dead = (np.arange(slots)[None] >= np.max(limits, axis=1)[:, None])[..., None]
    keys = jnp.where(dead, jnp.nan, draw(batch, slots, width))
    query, weights = draw(batch, tokens, heads, width), draw(batch, tokens, heads)
    return query.astype(dtype), weights, keys.astype(dtype)


def paged(keys, rng):
    """Keys on pages in random order: (pool, table)."""
    batch, slots, width = keys.shape
    order = rng.permutation(batch * slots // PAGE)
    pool = keys.reshape(-1, PAGE, width)[np.argsort(order)]
    return pool, jnp.asarray(order.reshape(batch, -1), jnp.int32)


def check_scores(got, query, weights, keys, limits):
    """Within what float32 sums of I and of J terms may lose: products of 16 bits are exact.

    Tensor cores cut digits off where they add, which loses twice what rounding does.
    """
    got = np.asarray(got, np.float64)
    query, weights, keys = (np.asarray(x, np.float64) for x in (query, weights, keys))
    for b, t in np.ndindex(limits.shape):
        n = limits[b, t]
        products = keys[b, :n] @ query[b, t].T
        terms = np.maximum(products, 0) * np.abs(weights[b, t])
        sums = np.abs(keys[b, :n]) @ np.abs(query[b, t]).T @ np.abs(weights[b, t])
        bound = 2.0**-23 * (query.shape[-1] * sums + (query.shape[2] + 2) * terms.sum(1))
        want = np.maximum(products, 0) @ weights[b, t]
        assert (np.abs(got[b, t, :n] - want) <= bound).all()
        assert np.isneginf(got[b, t, n:]).all()


def run_scores(query, weights, keys, limits, table=None, interpret=INTERPRET, **tuning):
    slots = keys.shape[1] if table is None else table.shape[1] * PAGE
    run = indexing.run_scores
    made = run(
        query, weights, keys, jnp.asarray(limits, jnp.int32), table, slots=slots, sms=2,
        interpret=interpret, tuning=tuple(tuning.items()),
    )  # fmt: skip
    return jax.block_until_ready(made)


SCORES = [  # B, T, S, J, I, limits, how it is cut
    (3, 1, 200, 8, 64, [[199], [0], [65]], {}),
    (1, 3, 330, 16, 128, [[300, 5, 301]], {"together": 2, "chunk": 256}),  # a last tile of one
    (2, 1, 200, 16, 64, [[130], [200]], {"warpgroups": 1, "chunk": 64, "depth": 1}),
]


@pytest.mark.parametrize("case", gate(SCORES, 0, 1), ids=["rows", "queries", "small_chunks"])
def test_scores_interpreted_are_numpys(case, rng):
    *shape, limits, tuning = case
    limits = np.asarray(limits)
    dtype = jnp.float16 if shape[1] > 1 else jnp.bfloat16
    arrays = operands(rng, *shape, limits, dtype)
    check_scores(run_scores(*arrays, limits, **tuning), *arrays, limits)


def test_a_step_on_pages_by_the_kernels(rng, monkeypatch):
    """Both through `choose_slots`, under vmap: the slots of float64 scores, the lowest first."""
    monkeypatch.setattr(hopper, "_H200_SMS", 2)
    limits = np.array([[256], [200]])
    query, weights, keys = operands(rng, 2, 1, 256, 8, 64, limits)
    pool, table = paged(keys, rng)

    def choose(query, weights, table, limits):
        store = Paged(Dense({"index_key": pool}), table)
        seen = Seen(limits=limits)
        return choose_slots(query, weights, store, seen, count=9, implementation=KERNELS)

    singly = lambda x: jnp.asarray(x)[:, None]  # noqa: E731
    with plgpu.force_gpu_interpret_mode():
        got = jax.vmap(choose)(*map(singly, (query, weights, table, limits)))
        jax.block_until_ready(got)
    for b in range(2):
        q, w, k = (np.asarray(x, np.float64) for x in (query[b, 0], weights[b, 0], keys[b]))
        want = np.maximum(k[: limits[b, 0]] @ q.T, 0) @ w
        want = np.sort(np.argsort(-want, kind="stable")[:9])
        np.testing.assert_array_equal(got[b, 0, 0], want)


def test_pools_are_chosen_by_the_kernels(rng, monkeypatch):
    """The same pools and the same tail as XLA's, of rows that end within a pool."""
    monkeypatch.setattr(hopper, "_H200_SMS", 2)
    limits, length = np.array([[1023, 700]]), 4
    query, weights, keys = operands(rng, 1, 2, 1024, 8, 64, limits)
    store = Dense({"index_key": jnp.concatenate([keys, jnp.ones_like(keys)], axis=-1)})
    seen, bias = Seen(limits=jnp.asarray(limits)), jnp.zeros((length, 64))
    options = {"count": 32, "pool_bias": bias}
    want = jax.jit(lambda *arrays: choose_slots(*arrays, store, seen, **options))(query, weights)
    with plgpu.force_gpu_interpret_mode():
        got = choose_slots(query, weights, store, seen, **options, implementation=KERNELS)
        jax.block_until_ready(got)
    np.testing.assert_array_equal(np.sort(got), np.sort(want))
    assert (np.asarray(got) < 1024).sum() == 2 * 32 + 3


def test_gradients_stop_at_the_choice(rng, monkeypatch):
    monkeypatch.setattr(hopper, "_H200_SMS", 2)
    limits = np.array([[128]])
    query, weights, keys = operands(rng, 1, 1, 128, 8, 64, limits)

    def loss(query, x):
        chosen = choose_slots(
            query, weights, Dense({"index_key": keys}), Seen(limits=jnp.asarray(limits)),
            count=4, implementation=KERNELS,
        )  # fmt: skip
        return x[chosen].sum() + 0 * query.astype(jnp.float32).sum()

    with plgpu.force_gpu_interpret_mode():
        got = jax.grad(loss, (0, 1))(query, jnp.ones(128))
        jax.block_until_ready(got)
    assert not np.asarray(got[0], np.float32).any()
    assert np.asarray(got[1]).sum() == 4


def test_types_on_a_mesh(monkeypatch):
    """Within `shard_map`, and on Explicit axes, where every device chooses for its own rows."""
    monkeypatch.setattr(hopper, "_H200_SMS", 2)
    shapes = ((4, 1, 8, 64), (4, 1, 8), (4, 256, 64), (4, 1))
    kinds = (jnp.bfloat16, jnp.float32, jnp.bfloat16, jnp.int32)
    kernels = []

    def choose(query, weights, keys, limits):
        store, seen = Dense({"index_key": keys}), Seen(limits=limits)
        return choose_slots(query, weights, store, seen, count=9, implementation=KERNELS)

    for axis in (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit):
        mesh = jax.make_mesh((2,), ("x",), axis_types=(axis,))
        split = jax.NamedSharding(mesh, jax.P("x"))
        arrays = [
            jax.ShapeDtypeStruct(shape, kind, sharding=split)
            for shape, kind in zip(shapes, kinds, strict=True)
        ]
        run = choose
        if axis == jax.sharding.AxisType.Auto:
            run = jax.shard_map(choose, mesh=mesh, in_specs=jax.P("x"), out_specs=jax.P("x"))
        with jax.set_mesh(mesh), plgpu.force_gpu_interpret_mode():
            kernels.append(jax.make_jaxpr(run)(*arrays))
            assert jax.eval_shape(run, *arrays).shape == (4, 1, 9)
    for jaxpr in map(str, kernels):
        assert "i32[2,9]" in jaxpr  # of one device's two rows


# ---- what must be noticed


REAL = {
    "key_of": select.key_of,
    "find": interpreted.InterpretedRow.find,
    "before": interpreted.InterpretedRow.before,
    "put": scores.Tile.put,
    "source_slot": scores.source_slot,
}
PLANTED = {
    "zeros_differ": (
        select, "key_of",
        lambda score, seen: REAL["key_of"](score, seen)
        + jnp.where((score == 0) & jnp.signbit(score), 1, 0),
    ),
    "the_rest_is_seen": (
        select, "key_of", lambda score, seen: REAL["key_of"](score, jnp.full_like(seen, True)),
    ),
    "a_digit_too_low": (
        interpreted.InterpretedRow, "find",
        lambda self, index, want: REAL["find"](self, index, want - (index == 2)),
    ),
    "equal_ones_from_the_second_on": (
        interpreted.InterpretedRow, "before",
        lambda self, group, flags: REAL["before"](self, group, flags)
        + jnp.where(flags == 1, 1, 0),
    ),
    "other_blocks_forgotten": (
        interpreted.InterpretedRow, "of_earlier_blocks",
        lambda self: (jnp.int32(0), jnp.int32(0)),
    ),
}  # fmt: skip
PLANTED_SCORES = {
    "negative_products_count": (jnp, "maximum", lambda a, b: a if a.ndim else jax.lax.max(a, b)),
    "scores_of_the_slot_before": (
        scores.Tile, "put",
        lambda self, q, slot, value: REAL["put"](self, q, slot, jnp.roll(value, 1)),
    ),
    "keys_of_another_row": (
        scores, "source_slot",
        lambda row, *rest: REAL["source_slot"](row * 0, *rest),
    ),
}  # fmt: skip


TRACED = indexing.run_select, indexing.run_scores


@pytest.mark.parametrize("bug", gate([*PLANTED], 3))
@pytest.mark.usefixtures("traced_anew")
def test_planted_bugs_of_the_choice_are_noticed(bug, monkeypatch):
    limits = np.array([[2400, 2399]])
    made = mixed(np.random.default_rng(3), (1, 2, 2500), limits)
    monkeypatch.setattr(*PLANTED[bug])
    blocks = 2 if bug == "other_blocks_forgotten" else 1
    got = run_select(made, limits, 1100, blocks)
    assert (np.asarray(got) != exact(made, limits, 1100)).any()


@pytest.mark.slow
@pytest.mark.parametrize("bug", [None, *PLANTED_SCORES])
@pytest.mark.usefixtures("traced_anew")
def test_planted_bugs_of_scores_are_noticed(bug, monkeypatch):
    limits = np.array([[190], [130]])
    arrays = operands(np.random.default_rng(4), 2, 1, 200, 8, 64, limits)
    if bug is None:
        check_scores(run_scores(*arrays, limits), *arrays, limits)
        return
    monkeypatch.setattr(*PLANTED_SCORES[bug])
    with pytest.raises(AssertionError):
        check_scores(run_scores(*arrays, limits), *arrays, limits)


# ---- which calls are served


def test_what_the_kernels_refuse():
    h200 = target.Target("gpu", "NVIDIA H200", 9.0, 132)
    call = dispatch.Call("index_scores", 2, 1, 4096, 64, (128, 0), 0, "bfloat16", ("lengths",))
    served = dict(dispatch.report(call, h200))
    assert served == {"pallas_gpu": None, "xla": None}
    for change, why in (
        ({"dtype": "float32"}, "takes bfloat16 and float16, not float32"),
        ({"options": ("mask",)}, "takes lengths only, not mask"),
        ({"key_dims": (96, 0)}, "index_head_dim must be one of"),
        ({"heads": 4}, "index_n_heads must be a multiple of 8"),
        ({"slots": 16}, "the cache must hold 64"),
        ({"batch": 2**10, "queries": 2**10, "slots": 2**12}, "would not fit 32 bits"),
        ({"op": "best_slots"}, "takes float32 scores, not bfloat16"),
        ({"op": "best_slots", "dtype": "float32", "slots": 2**19}, "takes up to 262144 slots"),
    ):
        asked = dispatch.dataclasses.replace(call, **change)
        assert why in (dict(dispatch.report(asked, h200))["pallas_gpu"] or "")
    cpu = target.Target("cpu", "cpu")
    assert "needs an NVIDIA GPU" in (dict(dispatch.report(call, cpu))["pallas_gpu"] or "")


def test_a_row_is_cut_over_blocks_while_there_are_few_rows():
    cut = lambda rows, slots: select.shape_of(rows, slots, 2048, 132)  # noqa: E731
    assert (cut(1, 131072).blocks, cut(16, 65536).blocks, cut(256, 32768).blocks) == (8, 4, 2)
    for rows, slots in ((1, 1), (3, 4096), (7, 65537), (300, 5000), (1, indexing.MOST_SLOTS)):
        shape = cut(rows, slots)
        assert shape.blocks * shape.part >= slots > shape.blocks * (shape.part - 2048)
        assert shape.part < 2**16


# ---- on a GPU


@pytest.fixture
def card():
    reason = hopper.not_hopper(target.current())
    if reason is not None:
        pytest.skip(reason)


NATIVE = [(3, 1, False), (2048, None, False), (5001, 2, True), (40000, 4, True), (40000, 8, False)]


@pytest.mark.accelerator
@pytest.mark.usefixtures("card")
@pytest.mark.parametrize(("slots", "blocks", "apart"), NATIVE)
def test_native_choice_is_numpys(slots, blocks, apart, rng):
    limits = rng.integers(0, slots + 1, (3, 3))
    limits[0, 0], limits[2, 2] = 0, slots
    made = mixed(rng, (3, 3, slots), limits)
    count = min(slots - 1, 500)
    got = run_select(made, limits, count, blocks, None, apart=apart)
    np.testing.assert_array_equal(got, exact(made, limits, count))


@pytest.mark.accelerator
@pytest.mark.usefixtures("card")
@pytest.mark.parametrize(
    ("tokens", "heads", "width"), [(1, 8, 64), (1, 64, 128), (5, 64, 128), (5, 8, 128)]
)
def test_native_scores_are_numpys(tokens, heads, width, rng):
    limits = rng.integers(0, 2049, (2, tokens))
    limits[0] = 0
    arrays = operands(rng, 2, tokens, 2048, heads, width, limits)
    got = run_scores(*arrays, limits, interpret=None)
    check_scores(got, *arrays, limits)
    pool, table = paged(arrays[2], rng)
    on_pages = run_scores(*arrays[:2], pool, limits, table, interpret=None)
    np.testing.assert_array_equal(on_pages, got)


@pytest.mark.accelerator
@pytest.mark.usefixtures("card")
def test_native_is_chosen_and_does_what_xla_does(rng):
    limits = np.array([[4000], [1], [3000]])
    *of_query, keys = operands(rng, 3, 1, 4096, 64, 128, limits)
    store, seen = Dense({"index_key": keys}), Seen(limits=jnp.asarray(limits))

    def choose(**options):
        return choose_slots(*of_query, store, seen, count=100, **options)

    kernels = str(jax.make_jaxpr(choose)())
    assert "mla_scores" in kernels
    assert "mla_select" in kernels
    through_xla = choose(implementation=(("index_scores", "xla"), ("best_slots", "xla")))
    for got, want in zip(np.asarray(choose()), np.asarray(through_xla), strict=True):
        # Sums in another order may swap two neighbours in rank at the border of the choice.
        assert len({*got[0].tolist()} ^ {*want[0].tolist()}) <= 2
