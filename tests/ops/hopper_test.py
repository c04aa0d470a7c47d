"""The Hopper kernel against a float64 loop: interpreted here, native where there is a Hopper GPU.

`pytest -m accelerator tests/ops/hopper_test.py` runs the native half on a GPU.
"""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import gate, put, relative
from hopper_common import (
    HOPPER,
    INTERPRET,
    MARKS,
    SCALE,
    SPEC,
    check,
    loop,
    make,
    make_schedule,
    two_layers,
)  # fmt: skip
from jax.experimental.pallas import mosaic_gpu as plgpu

import mla_jax
from mla_jax import target
from mla_jax.cache import PAGE, Dense, Paged
from mla_jax.ops import dispatch, hopper
from mla_jax.ops.hopper import kernel, merge
from mla_jax.ops.hopper.schedule import ROW_COST, Column
from mla_jax.ops.seen import Seen

pytestmark = [*MARKS, pytest.mark.usefixtures("few_merged_at_once")]


@pytest.fixture(autouse=True)
def _schedules_are_one_program(monkeypatch):
    """Also those that the package makes, here outside a jitted function."""
    monkeypatch.setattr(hopper, "make_schedule", make_schedule)


def attend(arrays, lengths, sms, interpret=INTERPRET, table=None):
    tokens, heads = arrays[0].shape[1:3]
    slots = arrays[2].shape[1] if table is None else table.shape[1] * PAGE
    schedule = make_schedule(lengths, rows=tokens * heads, slots=slots, num_sms=sms, slack=0)
    return hopper.decode(*arrays, schedule, table=table, scale=SCALE, interpret=interpret)


def interpreted(arrays, lengths, sms, table=None):
    # The interpreter's callbacks run operations of their own: nothing else may be dispatched then.
    return jax.block_until_ready(attend(arrays, lengths, sms, table=table))


TRACED = (hopper._call,)
CASES = [  # B, T, S, N, R, P, lengths, multiprocessors
    (3, 1, 136, 16, 128, 32, (135, 0, 65), 2),
    (1, 1, 520, 20, 128, 16, (515,), 5),
    (2, 2, 136, 40, 128, 64, (130, 1), 4),
    (2, 8, 136, 1, 128, 0, (136, 5), 2),
    (1, 1, 136, 128, 256, 64, (135,), 4),
    (3, 1, 72, 80, 128, 16, (64, 72, 63), 3),
    (3, 1, 904, 40, 256, 16, (640, 1, 900), 4),  # the last part of the first row goes on
    (2, 150, 264, 1, 128, 0, (262, 70), 2),  # more tiles than multiprocessors; masks of 3 blocks
]


@pytest.mark.parametrize(
    "case", gate(CASES, 7), ids=lambda c: "B{}-T{}-S{}-N{}-R{}-P{}-{}-sms{}".format(*c)
)
def test_interpreted_is_the_loop(case):
    *shape, lengths, sms = case
    dtype = jnp.float16 if shape[1] == 150 or shape[3] == 80 else jnp.bfloat16
    arrays, lengths = make(0, *shape, lengths, dtype)
    check(interpreted(arrays, lengths, sms), loop(arrays, lengths), dtype)


def test_many_pieces_and_shard_map(monkeypatch):
    """Types for several devices; the interpreter runs one device at a time."""
    monkeypatch.setattr(merge, "_FEW", (1, 2, 2))  # three are many; 32 would take a minute
    arrays, lengths = make(4, 2, 1, 264, 2, 256, 0, (260, 9), jnp.bfloat16)
    for devices, interpret in ((2, None), (1, INTERPRET)):
        mesh = jax.make_mesh((devices,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
        spec = jax.sharding.PartitionSpec("x")
        local = jax.shard_map(
            lambda *a: attend(a[:4], a[4], 4, interpret),  # noqa: B023
            mesh=mesh, in_specs=spec, out_specs=spec,
        )  # fmt: skip
        assert jax.eval_shape(local, *arrays, lengths)[0].shape == (2, 1, 2, 256)
    got = jax.block_until_ready(jax.jit(local)(*arrays, lengths))
    check(got, loop(arrays, lengths), jnp.bfloat16)


def _mask_without_causality(self, s, block, slot, length):
    tokenless = types.SimpleNamespace(shape=self.shape._replace(tokens=1), tile=self.tile)
    return REAL["mask"](tokenless, s, block, slot, length)


REAL = {"mask": kernel.Part.mask, "source_slot": kernel.source_slot, "piece": merge.piece}
PLANTED = {
    "future_token_visible": (kernel.Part, "mask", _mask_without_causality),
    "off_by_one_slot": (
        kernel.Part, "mask",
        lambda self, s, block, slot, length: REAL["mask"](self, s, block, slot, length - 1),
    ),
    "dead_values_left": (kernel.Part, "kill_dead_values", lambda self, ref, live: None),
    "dropped_first_block": (
        kernel, "source_slot",
        lambda row, slot, *rest: jnp.where(
            slot == 0, rest[2], REAL["source_slot"](row, slot, *rest)),
    ),
    "wrong_scale": (kernel, "LOG2E", kernel.LOG2E * 1.05),
    "pieces_mixed_up": (
        merge, "piece",
        lambda part, tile, began, shape: REAL["piece"](part & ~1, tile, began & False, shape),
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("bug", [None, *PLANTED])
@pytest.mark.usefixtures("traced_anew")
def test_planted_bugs_are_noticed(bug, monkeypatch):
    arrays, lengths = make(1, 2, 2, 296, 3, 128, 16, (70, 290), jnp.bfloat16)
    want = loop(arrays, lengths)
    if bug is None:
        check(interpreted(arrays, lengths, 4), want, jnp.bfloat16)  # parts 2 and 3 share a row
        return
    monkeypatch.setattr(*PLANTED[bug])
    with pytest.raises(AssertionError):
        check(interpreted(arrays, lengths, 4), want, jnp.bfloat16)


# ---- pages


def paginate(arrays, lengths, seed=0, spare=2, shared=()):
    """The rows of dense arrays on pages in random order: (arrays with a pool, table).

    Pages that no row has hold NaN and infinity, as the slots past a row's length do; the table says
    G wherever a row has no page. `shared` names pairs of rows of which the second has the full
    pages of the first up to where their caches differ.
    """
    rng = np.random.default_rng(seed)
    pattern, q_rope, *held = (np.asarray(a) for a in arrays)
    (batch, slots), per_row = held[0].shape[:2], -(-held[0].shape[1] // PAGE)
    needed = -(-np.asarray(lengths) // PAGE)
    count = int(needed.sum()) + spare
    free = list(rng.permutation(count))
    table = np.full((batch, per_row), count, np.int32)
    bad = np.where(np.arange(PAGE) % 3 == 0, np.inf, np.nan)[None, :, None]
    pools = [np.broadcast_to(bad, (count, PAGE, x.shape[2])).astype(x.dtype) for x in held]
    for row in range(batch):
        for page in range(needed[row]):
            slot, end = page * PAGE, min((page + 1) * PAGE, slots)
            full = (page + 1) * PAGE <= lengths[row]
            givers = [a for a, b in shared if b == row and full]
            givers = [a for a in givers if (held[0][a, slot:end] == held[0][row, slot:end]).all()]
            table[row, page] = table[givers[0], page] if givers else free.pop()
            for pool, x in zip(pools, held, strict=True):
                pool[table[row, page], : end - slot] = x[row, slot:end]
    arrays = [pattern, q_rope, *pools]
    return [jnp.asarray(a) for a in arrays], jnp.asarray(table)


def fork(arrays, source, row, slots):
    """The cache's first `slots` slots of a row copied to those of another."""
    held = [np.array(x) for x in arrays[2:]]
    for x in held:
        x[row, :slots] = x[source, :slots]
    return [*arrays[:2], *map(jnp.asarray, held)]


PAGED = [  # as CASES, with lengths around the border of a page
    (4, 1, 256, 3, 128, 16, (127, 256, 129, 0), 3),
    (6, 1, 384, 3, 128, 16, (127, 128, 129, 0, 257, 384), 3),
    (2, 2, 256, 20, 128, 32, (256, 255), 5),
    (2, 1, 384, 16, 256, 0, (383, 1), 2),
    (1, 3, 640, 20, 128, 64, (513,), 3),  # several parts share a row, and begin within it
]


@pytest.mark.parametrize(
    "case", gate(PAGED, 0), ids=lambda c: "B{}-T{}-S{}-N{}-R{}-P{}-{}-sms{}".format(*c)
)
def test_pages_interpreted_are_the_loop(case):
    *shape, lengths, sms = case
    arrays, lengths = make(8, *shape, lengths, jnp.bfloat16)
    pages, table = paginate(arrays, lengths, spare=1)
    check(interpreted(pages, lengths, sms, table), loop(arrays, lengths), jnp.bfloat16)


def forked():
    """Three rows, of which the last two share two full pages; (dense, pages, table, lengths)."""
    arrays, lengths = make(9, 3, 2, 384, 3, 128, 16, (70, 290, 257), jnp.bfloat16)
    arrays = fork(arrays, 1, 2, 256)
    pages, table = paginate(arrays, lengths, shared=[(1, 2)])
    assert (table[1, :2] == table[2, :2]).all()
    assert table[1, 2] != table[2, 2]
    assert table[0].tolist()[1:] == [pages[2].shape[0]] * 2  # holes past a row's end
    return arrays, pages, table, lengths


WRONG_TABLES = {
    "page_of_the_wrong_row": lambda table: jnp.roll(table, -1, axis=0),
    "off_by_one_page": lambda table: jnp.roll(table, -1, axis=1),
    "page_before": lambda table: table[:, [0, 0, 1]],
    "table_ignored": lambda table: jnp.arange(9, dtype=jnp.int32).reshape(3, 3),
}


@pytest.mark.slow
def test_other_pages_are_noticed():
    """Every look into the table by a wrong row or place, in the program that is right without."""
    arrays, pages, table, lengths = forked()
    want = loop(arrays, lengths)
    check(interpreted(pages, lengths, 2, table), want, jnp.bfloat16)
    for change in WRONG_TABLES.values():
        wrong = interpreted(pages, lengths, 2, change(table))
        with pytest.raises(AssertionError):
            check(wrong, want, jnp.bfloat16)


def loss(attend, *arrays):
    out, lse = attend(*arrays)
    weight = jnp.arange(out.size).reshape(out.shape)
    return (jnp.sin(out.astype(jnp.float32)) * weight).sum() + lse.sum(), (out, lse)


def test_pages_through_the_op_and_their_gradients(monkeypatch):
    """A paged store is served by name, whatever its table, and planned as a dense one.

    Pages that rows share gather the gradients of all; those that no row has get none.
    """
    monkeypatch.setattr(hopper, "_H200_SMS", 2)
    arrays, pages, table, lengths = forked()
    call = dataclasses.replace(spec(arrays), store="paged")

    def paged(pattern, q_rope, latent, k_rope):
        store = Paged(Dense({"latent": latent, "k_rope": k_rope}), table)
        seen = Seen.of(lengths, batch=3, queries=2, slots=store.slots)
        planned = dispatch.plan(seen, call)
        lengths_of.append(planned.plan.lengths)
        return dispatch.attend((pattern, q_rope), store, planned, call, "pallas_gpu")

    def ours(*pages):
        slopes, results = jax.grad(functools.partial(loss, paged), range(4), has_aux=True)(*pages)
        return slopes, results, lengths_of.pop()

    lengths_of = []
    with plgpu.force_gpu_interpret_mode():
        got, results, planned = jax.block_until_ready(jax.jit(ours)(*pages))
    assert planned.tolist() == [70, 290, 257]
    check(results, loop(arrays, lengths), jnp.bfloat16)
    dense = lambda *a: mla_jax.latent_attention(  # noqa: E731
        *a, lengths=lengths, scale=SCALE, implementation="xla")  # fmt: skip
    clean = [*arrays[:2], *(np.nan_to_num(np.asarray(a), posinf=0) for a in arrays[2:])]
    slopes = jax.jit(jax.grad(functools.partial(loss, dense), range(4), has_aux=True))
    want, _ = jax.device_get(slopes(*clean))
    eps = float(jnp.finfo(jnp.bfloat16).eps)
    for one, two in zip(got[:2], want[:2], strict=True):
        assert relative(one, two) < 2 * eps
    table = np.asarray(table)
    for one, two in zip(got[2:], want[2:], strict=True):
        pool = np.zeros(one.shape)
        for row, page in np.argwhere(table < len(pool)):
            pool[table[row, page]] += two[row, page * PAGE : (page + 1) * PAGE].astype(np.float64)
        assert relative(one, pool) < 2 * eps


@pytest.mark.slow
@pytest.mark.usefixtures("traced_anew")
def test_a_second_block_that_is_the_first_is_noticed(monkeypatch):
    arrays, pages, table, lengths = forked()
    same = lambda row, slot, *rest: REAL["source_slot"](row, slot // PAGE * PAGE, *rest)  # noqa: E731
    monkeypatch.setattr(kernel, "source_slot", same)
    with pytest.raises(AssertionError):
        check(interpreted(pages, lengths, 2, table), loop(arrays, lengths), jnp.bfloat16)


@pytest.mark.parametrize("pools", ["one_pool", "a_pool_each"])
def test_vmap_over_paged_rows(pools, monkeypatch):
    """Their shapes are those of the first case of pages, whose program serves."""
    (batch, *shape, lengths, sms), half = PAGED[0], 2
    monkeypatch.setattr(hopper, "_H200_SMS", sms)
    arrays, lengths = make(8, batch, *shape, lengths, jnp.bfloat16)
    want = loop(arrays, lengths)
    call = lambda p, q, c, k, table, n: attend((p, q, c, k), n, sms, table=table)  # noqa: E731
    halves = lambda x: np.asarray(x).reshape(2, half, *x.shape[1:])  # noqa: E731
    if pools == "one_pool":
        pages, table = paginate(arrays, lengths, spare=1)
        held, axis = pages[2:], None
        tables = halves(table)
    else:
        parts = [
            paginate([a[i : i + half] for a in arrays], lengths[i : i + half], seed=i, spare=spare)
            for i, spare in ((0, 0), (half, 1))  # as many pages each: of 3 and of 2
        ]
        held = [np.stack([np.asarray(part[0][i]) for part in parts]) for i in (2, 3)]
        tables, axis = np.stack([np.asarray(table) for _, table in parts]), 0
    got = jax.vmap(call, (0, 0, axis, axis, 0, 0))(
        halves(arrays[0]), halves(arrays[1]), *held, tables, halves(lengths)
    )
    got = jax.device_get(got)
    check([x.reshape(batch, *x.shape[2:]) for x in got], want, jnp.bfloat16)


def test_gradients_without_lengths(monkeypatch):
    """The backward is XLA's: so is the forward here, which the tests above compare."""

    def forward(scale, interpret, arrays, table, schedule):
        by_xla = functools.partial(mla_jax.latent_attention, implementation="xla")
        return list(by_xla(*arrays, lengths=schedule.lengths, scale=scale))

    monkeypatch.setattr(hopper, "_call", forward)
    arrays, lengths = make(2, 2, 1, 64, 2, 128, 16, (64, 64), jnp.bfloat16)
    ours = lambda *arrays: attend(arrays, lengths, 2)  # noqa: E731
    theirs = functools.partial(mla_jax.latent_attention, lengths=None, scale=SCALE)
    slopes = lambda f: jax.grad(functools.partial(loss, f), range(4), has_aux=True)  # noqa: E731
    got, results = jax.block_until_ready(jax.jit(slopes(ours))(*arrays))
    check(results, loop(arrays, lengths), jnp.bfloat16)
    for one, two in zip(got, jax.jit(slopes(theirs))(*arrays)[0], strict=True):
        assert relative(one, two) < 2 * float(jnp.finfo(jnp.bfloat16).eps)


def test_types_of_pages_under_shard_map():
    """Each device has rows, pages and a table of its own."""
    arrays, lengths = make(3, 4, 1, 256, 3, 128, 16, (70, 65, 256, 0), jnp.bfloat16)
    pools = [a.reshape(8, PAGE, a.shape[2]) for a in arrays[2:]]
    table = jnp.zeros((4, 2), jnp.int32)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("x")
    local = jax.shard_map(
        lambda *a: attend(a[:4], a[4], 2, None, a[5]), mesh=mesh, in_specs=spec, out_specs=spec
    )
    out, _ = jax.eval_shape(local, *arrays[:2], *pools, lengths, table)
    assert out.shape == (4, 1, 3, 128)


def spec(arrays):
    (batch, tokens, heads, rank), (slots, rope) = arrays[0].shape, arrays[3].shape[1:]
    return dispatch.Call(
        "latent_attention", batch, tokens, slots, heads, (rank, rope), rank,
        arrays[0].dtype.name, ("lengths",), scale=SCALE,
    )  # fmt: skip


def test_the_plan_is_of_the_rows_ends_and_other_backends_need_none(monkeypatch):
    monkeypatch.setattr(hopper, "_H200_SMS", 2)
    arrays, lengths = make(5, 2, 1, 136, 3, 128, 16, (65, 130), jnp.bfloat16)
    seen = Seen.of(lengths, batch=2, queries=1, slots=136)
    assert dispatch.plan(seen, spec(arrays), "xla").plan is None
    with plgpu.force_gpu_interpret_mode():
        planned = dispatch.plan(seen, spec(arrays))
        assert planned.plan.lengths.tolist() == [65, 130]


def test_rows_padded_on_the_right(monkeypatch):
    """What counts goes to the kernel as the row's last tokens; `vmap` over rows is that kernel."""
    monkeypatch.setattr(hopper, "_H200_SMS", 2)
    counts, ends = np.array([1, 3, 0]), np.array([65, 130, 9])
    arrays, _ = make(6, 3, 3, 136, 3, 128, 16, ends, jnp.bfloat16)
    limits = np.where(
        np.arange(3) < counts[:, None], (ends - counts)[:, None] + np.arange(3) + 1, 0
    )
    seen = Seen(*map(functools.partial(jnp.asarray, dtype=jnp.int32), (limits, ends, counts)))
    store = Dense({"latent": arrays[2], "k_rope": arrays[3]})
    with plgpu.force_gpu_interpret_mode():
        got = dispatch.attend(tuple(arrays[:2]), store, seen, spec(arrays), "pallas_gpu")
        got = jax.block_until_ready(got)
    for t in range(3):
        one = [arrays[0][:, t : t + 1], arrays[1][:, t : t + 1], *arrays[2:]]
        check([x[:, t : t + 1] for x in got], loop(one, limits[:, t]), jnp.bfloat16)
    ours = lambda n, *row: attend([x[None] for x in row], n[None], 2)  # noqa: E731
    with plgpu.force_gpu_interpret_mode():
        each = jax.device_get(jax.vmap(ours)(put(ends, np.int32), *arrays))
    check([x[:, 0] for x in each], loop(arrays, ends), jnp.bfloat16)


def test_tuning_tables(tmp_path, monkeypatch):
    (tmp_path / "tuning").mkdir()
    (tmp_path / "tuning" / "gpu.toml").write_text(
        'device_kind = "NVIDIA X"\n[[latent_attention]]\nrows = 1024\nslack = 7\n'
        "[[latent_attention]]\nrows = 64\nslack = 3\n"
    )
    monkeypatch.setattr(hopper, "configs_dir", lambda: tmp_path)
    hopper.tuned.cache_clear()
    assert hopper.tuned("NVIDIA X", 64)["slack"] == 3
    assert hopper.tuned("NVIDIA X", 65)["slack"] == 7
    assert hopper.tuned("NVIDIA Y", 64) == {}
    hopper.tuned.cache_clear()


@pytest.mark.parametrize("seed", gate(range(12), 0, 1))
def test_the_schedule_covers_every_step_once(seed):
    rng = np.random.default_rng(seed)
    batch, rows = int(rng.integers(1, 40)), int(rng.choice([1, 16, 64, 65, 128, 256, 1024]))
    lengths = rng.integers(0, 3000, batch) * (rng.random(batch) < rng.random())
    if seed % 3 == 0:
        lengths = np.full(batch, rng.integers(1, 3000))
    sms, slack = int(rng.choice([1, 2, 7, 66, 114, 132])), int(rng.choice([0, 2, 9]))
    s = make_schedule(jnp.asarray(lengths), rows=rows, slots=3000, num_sms=sms, slack=slack)
    s = jax.tree.map(np.asarray, s)
    tiles = -(-rows // 64)
    parts = max(1, sms // tiles)
    assert s.part.shape == (parts, len(Column))
    assert s.arrivals.shape == (batch * tiles,)
    assert not s.arrivals.any()
    steps = np.maximum(1, -(-lengths // 128))
    np.testing.assert_array_equal(s.row_step, np.concatenate([[0], np.cumsum(steps)]))
    begin, end = s.part[:, Column.FIRST_STEP], s.part[:, Column.END_STEP]
    assert begin[0] == 0
    assert end[-1] == steps.sum()
    np.testing.assert_array_equal(begin[1:], end[:-1])
    assert (end >= begin).all()
    many = s.row_parts[1] > s.row_parts[0]
    row_of, parts_of = np.repeat(np.arange(batch), steps), [[] for _ in range(batch)]
    each = -(-(steps.sum() + ROW_COST * batch) // parts)
    most = each + max(slack, ROW_COST - 1)  # a cut may fall into what a row costs to begin
    for p, part in enumerate(s.part):
        lo, hi = part[Column.FIRST_STEP], part[Column.END_STEP]
        if lo < hi:
            first, last = part[Column.FIRST_ROW], part[Column.LAST_ROW]
            assert (first, last) == (row_of[lo], row_of[hi - 1])
            assert part[Column.FIRST_ROW_STEP] == s.row_step[first]
            assert part[Column.FIRST_ROW_LENGTH] == lengths[first]
            assert part[Column.LAST_ROW_SHARED] == many[last]
            assert hi - lo + ROW_COST * (last - first) <= most
            for row in np.unique(row_of[lo:hi]):
                parts_of[row].append(p)
    for row, of_row in enumerate(parts_of):
        assert of_row == list(range(s.row_parts[0, row], s.row_parts[1, row] + 1))


REFUSED = {
    "float32": ({"dtype": "float32"}, "bfloat16 and float16"),
    "options": ({"options": ("lengths", "mask", "window")}, "not mask, window"),
    "per_query": ({"options": ("lengths per query",)}, "lengths per query"),
    "soft_cap": ({"soft_cap": 2.0}, "no soft_cap"),
    "rank": ({"key_dims": (496, 64)}, "kv_lora_rank"),
    "rope": ({"key_dims": (512, 24)}, "qk_rope_head_dim"),
    "tokens": ({"queries": 1025}, "1 to 1024 query tokens"),
    "heads": ({"heads": 129}, "1 to 128 heads"),
    "slots": ({"slots": 4095}, "multiple of 8 slots"),
    "tiny": ({"batch": 1, "slots": 56}, "at least 64 slots"),
    "huge": ({"batch": 2**16, "slots": 2**16}, "32 bits"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_serve(name):
    change, reason = REFUSED[name]
    assert reason in hopper.why_not(dataclasses.replace(SPEC, **change), HOPPER)


def test_where_it_runs():
    assert hopper.why_not(SPEC, HOPPER) is None
    assert hopper.why_not(dataclasses.replace(SPEC, store="paged"), HOPPER) is None
    ampere = dataclasses.replace(HOPPER, capability=8.0)
    assert "9.x (Hopper), this is 8.0" in hopper.why_not(SPEC, ampere)
    assert "needs an NVIDIA GPU" in hopper.why_not(SPEC, target.of(jax.devices("cpu")[0]))
    schedule = make_schedule(jnp.array([3]), rows=1, slots=64, num_sms=2)
    arrays, _ = make(0, 2, 1, 64, 2, 128, 16, (64, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match="schedule is for 1 rows"):
        hopper.decode(*arrays, schedule, scale=SCALE)


def test_queries_are_given_as_they_are():
    """A tile's copy goes past their end: no array of 64 rows is made of 16."""
    arrays, lengths = make(0, 1, 1, 136, 16, 128, 32, (135,), jnp.bfloat16)
    traced = jax.make_jaxpr(functools.partial(attend, sms=4, interpret=None))(arrays, lengths)
    before = str(traced).split("mpmd_map")[0]
    assert "bf16[16,128]" in before
    assert "bf16[64,128]" not in before


# ---- on a Hopper GPU

WIDTHS = ((512, 64), (256, 64), (256, 32), (128, 32), (512, 0))
HEADS = (1, 16, 20, 40, 64, 80, 96, 128)
NATIVE = [
    (n, 1 + (3 * i + j) % 8, *WIDTHS[(i + j) % 5], ("bfloat16", "float16")[(i + j // 2) % 2])
    for i, n in enumerate(HEADS)
    for j in range(3)
]
NATIVE += [(128, t, 512, 64, "bfloat16") for t in (1, 2, 8, 150)]
NATIVE += [(16, t, 512, 64, "bfloat16") for t in (1, 200)]


@pytest.mark.accelerator
@pytest.mark.parametrize("case", NATIVE, ids=lambda c: "N{}-T{}-R{}-P{}-{}".format(*c))
def test_native(case, card):
    heads, tokens, rank, rope, dtype = case
    seed = NATIVE.index(case)
    rng = np.random.default_rng(seed)
    batch, slots = int(rng.integers(1, 7)), int(rng.integers(9, 250)) * 8
    lengths = np.where(
        rng.random(batch) < 0.2, rng.integers(0, 10, batch), rng.integers(0, slots + 1, batch)
    )
    arrays, lengths = make(seed, batch, tokens, slots, heads, rank, rope, lengths, dtype)
    want = loop(arrays, lengths)

    @functools.partial(jax.jit, static_argnames="sms")
    def run(arrays, lengths, sms):
        return attend(arrays, lengths, sms, None)

    got = run(arrays, lengths, card.cores)
    check(got, want, dtype, tolerance=2e-3 if dtype == "bfloat16" else 3e-4)
    again = run(arrays, lengths, card.cores)
    for one, two in zip(got, again, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(two))
    sms = 8 * -(-tokens * heads // 64)
    if seed % 3 == 0 and sms <= card.cores:  # few parts: whole rows and long streams
        check(run(arrays, lengths, sms), want, dtype, tolerance=2e-3)


@pytest.mark.accelerator
@pytest.mark.parametrize("case", NATIVE[::3], ids=lambda c: "N{}-T{}-R{}-P{}-{}".format(*c))
def test_native_pages(case, card):
    """Pages in random order give bit for bit what the dense kernel gives."""
    heads, tokens, rank, rope, dtype = case
    seed = NATIVE.index(case)
    rng = np.random.default_rng(seed)
    batch, slots = int(rng.integers(2, 7)), int(rng.integers(1, 14)) * PAGE
    lengths = rng.integers(0, slots + 1, batch)
    border = rng.random(batch) < 0.5
    lengths = np.where(
        border, np.clip(lengths // PAGE * PAGE + rng.integers(-1, 2), 0, slots), lengths
    )
    arrays, lengths = make(seed, batch, tokens, slots, heads, rank, rope, lengths, dtype)
    arrays = fork(arrays, 0, 1, min(int(lengths[:2].min()), slots) // PAGE * PAGE)
    pages, table = paginate(arrays, lengths, seed, shared=[(0, 1)])

    @jax.jit
    def run(arrays, lengths, table=None):
        return attend(arrays, lengths, card.cores, None, table)

    got = run(pages, lengths, table)
    check(got, loop(arrays, lengths), dtype, tolerance=2e-3 if dtype == "bfloat16" else 3e-4)
    for one, two in zip(got, run(arrays, lengths), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(two))


@pytest.mark.accelerator
def test_native_in_the_layer(card):
    model, prompt, lengths = two_layers()
    results = []
    for implementation in (None, "xla"):
        for block in model.blocks:
            block.attention.implementation = implementation
        cache = model.init_cache(3, 128)
        logits, cache = mla_jax.prefill_step(model, prompt, cache, lengths)
        logits, cache = mla_jax.decode_step(model, prompt[:, :1], cache)
        text = mla_jax.decode_step.lower(model, prompt[:, :1], cache).compile().as_text()
        assert ("mosaic_gpu" in text) == (implementation is None)
        results.append(np.asarray(logits, np.float64))
    assert relative(*results) < 2e-2


@pytest.mark.accelerator
def test_native_in_a_scan_and_donated(card):
    """Steps inside `lax.scan` equal steps one by one, and no step copies the donated cache."""
    model, prompt, lengths = two_layers()
    texts = jax.random.randint(jax.random.key(1), (3, 9), 0, 256)

    def start():
        cache = model.init_cache(3, 1024)
        return mla_jax.prefill_step(model, prompt, cache, lengths)[1]

    @jax.jit
    def scanned(model, cache):
        def step(cache, token):
            logits, cache = model.decode(token[:, None], cache)
            return cache, logits[:, 0]

        return jax.lax.scan(step, cache, texts.T)[1]

    cache, apart = start(), []
    compiled = mla_jax.decode_step.lower(model, texts[:, :1], cache).compile()
    assert compiled.memory_analysis().alias_size_in_bytes >= cache.nbytes
    latent = "bf16[" + ",".join(map(str, cache.stores[0].latent.shape)) + "]"
    copies = [line for line in compiled.as_text().splitlines()
              if " copy(" in line and latent in line.split("=")[1]]  # fmt: skip
    assert not copies, copies
    for token in texts.T:
        logits, cache = mla_jax.decode_step(model, token[:, None], cache)
        apart.append(logits[:, 0])
    together = scanned(model, start())
    assert relative(together, jnp.stack(apart)) < float(jnp.finfo(jnp.bfloat16).eps)


@pytest.mark.accelerator
def test_native_under_shard_map(card):
    """Over the rows of a batch, on as many devices as there are."""
    devices = jax.device_count()
    lengths = np.resize((700, 65, 1, 0), 4 * devices)
    arrays, lengths = make(7, 4 * devices, 1, 704, 128, 512, 64, lengths, jnp.bfloat16)
    mesh = jax.make_mesh((devices,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("x")
    local = jax.shard_map(
        lambda *a: mla_jax.latent_attention(
            *a[:4], lengths=a[4], scale=SCALE, implementation="pallas_gpu"
        ),
        mesh=mesh, in_specs=spec, out_specs=spec,
    )  # fmt: skip
    check(jax.jit(local)(*arrays, lengths), loop(arrays, lengths), jnp.bfloat16, 2e-3)
