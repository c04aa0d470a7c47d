"""Attention to chosen slots by the Hopper kernel against a float64 loop: interpreted, and native.

`pytest -m accelerator tests/ops/hopper_chosen_test.py` runs the native half on a GPU.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import gate, put, relative
from hopper_common import HOPPER, INTERPRET, SCALE, check
from jax.experimental.pallas import mosaic_gpu as plgpu

import mla_jax
from mla_jax import target
from mla_jax.cache import PAGE, Dense, Paged
from mla_jax.ops import dispatch, hopper
from mla_jax.ops.hopper import chosen as hopper_chosen
from mla_jax.ops.hopper import gathered, kernel, merge
from mla_jax.ops.hopper.schedule import BLOCK, ROW_COST, Column, equal_rows
from mla_jax.ops.seen import Seen

SPEC = dispatch.Call(
    "latent_attention", 2, 1, 4096, 128, (512, 64), 512, "bfloat16", ("chosen", "lengths")
)


pytestmark = pytest.mark.usefixtures("few_merged_at_once")


def make(seed, batch, tokens, slots, heads, rank, rope, count, dtype, first=0):
    """Standard normal operands, a choice and limits for each query; NaN where nobody may look.

    The choice is in no order. Some of it is nothing: -1, S, and slots at or above the limit. The
    first query sees `first` slots, the last one chooses all it can.
    """
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
    limits = rng.integers(1, slots + 1, (batch, tokens))
    chosen = np.stack([rng.permutation(slots + 2)[:count] - 1 for _ in range(batch * tokens)])
    chosen = chosen.reshape(batch, tokens, count)
    limits.flat[0], limits.flat[-1] = first, slots
    chosen[-1, -1] = rng.permutation(slots)[:count]
    arrays = [draw(batch, tokens, heads, width) for width in (rank, rope)]
    seen = np.zeros((batch, slots), bool)
    for b, t in np.ndindex(batch, tokens):
        seen[b, visible(chosen[b, t], limits[b, t])] = True
    bad = np.where(np.arange(slots) % 3 == 0, np.inf, np.nan)[None, :, None]
    arrays += [np.where(seen[..., None], draw(batch, slots, w), bad) for w in (rank, rope)]
    arrays = [put(a, dtype) for a in arrays]
    return arrays, put(chosen, np.int32), put(limits, np.int32)


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
    pages = [jax.device_put(a) for a in (pattern, q_rope, *pools)]
    return pages, put(table, np.int32)


def interpreted(arrays, chosen, limits, sms, table=None):
    return jax.block_until_ready(
        hopper_chosen.attend(
            *arrays, chosen, limits, table=table, scale=SCALE, interpret=INTERPRET, sms=sms, slack=0
        )
    )


CASES = [  # B, T, S, N, R, P, K, multiprocessors, pages
    (2, 2, 256, 3, 128, 16, 130, 2, True),
    (1, 1, 512, 70, 128, 64, 300, 6, False),  # three parts share a row
    (1, 1, 128, 5, 256, 0, 20, 1, False),
    (1, 1, 512, 70, 128, 64, 300, 6, True),
    (2, 2, 256, 3, 128, 16, 130, 2, False),
    (1, 1, 256, 5, 256, 0, 130, 2, True),
]


@pytest.mark.parametrize(
    "case",
    gate(CASES, 1),  # the test of vmap has pages, and rows of several blocks
    ids=lambda c: "B{}-T{}-S{}-N{}-R{}-P{}-K{}-sms{}-{}".format(*c),
)
def test_interpreted_is_the_loop(case):
    *shape, sms, pages = case
    arrays, chosen, limits = make(0, *shape, jnp.bfloat16)
    want = loop(arrays, chosen, limits)
    table = None
    if pages:
        arrays, table = paginate(arrays)
    check(interpreted(arrays, chosen, limits, sms, table), want, jnp.bfloat16)


SMALL = (2, 1, 256, 3, 128, 16, 130)


def _later_places(self, step):
    places = REAL["places"](self, step)
    return jnp.where(places < 0, places, jnp.minimum(places + 1, self.k_hbm.shape[0] - 1))


def _of_the_first_row(self, step):
    _, start, limit = REAL["step_start"](self, step)
    return jnp.int32(0), start, limit


def _without_limit(self, step):
    row, start, limit = REAL["step_start"](self, step)
    return row, start, jnp.where(limit > 0, self.shape.slots * 99, 0)


REAL = {
    "places": gathered.InterpretedGatheredPart.places,
    "step_start": gathered.GatheredPart.step_start,
}
PLANTED = {
    "off_by_one_slot": (gathered.InterpretedGatheredPart, "places", _later_places),
    "slots_of_the_first_row": (gathered.GatheredPart, "step_start", _of_the_first_row),
    "limits_ignored": (gathered.GatheredPart, "step_start", _without_limit),
    "nothing_masked": (gathered.GatheredPart, "mask", lambda self, s, *_: s),
    "maximum_not_joint": (kernel.Part, "rescale", lambda self, acc, alpha: None),
    "half_of_the_row_twice": (
        gathered.InterpretedGatheredPart, "places_of",
        lambda self, places, block: places[:BLOCK],
    ),
    "pieces_mixed_up": (
        merge, "piece", lambda part, tile, *_: ((part & ~1) * 2 + tile) * 0,
    ),
}  # fmt: skip


TRACED = (hopper_chosen._call,)


@pytest.mark.slow
@pytest.mark.parametrize("bug", [None, *PLANTED])
@pytest.mark.usefixtures("traced_anew")
def test_planted_bugs_are_noticed(bug, monkeypatch):
    arrays, chosen, limits = make(1, *SMALL, jnp.bfloat16, first=200)
    arrays[2:] = [jnp.nan_to_num(a, posinf=50, nan=50) for a in arrays[2:]]
    want = loop(arrays, chosen, limits)
    if bug is None:
        check(interpreted(arrays, chosen, limits, 4), want, jnp.bfloat16)
        return
    monkeypatch.setattr(*PLANTED[bug])
    with pytest.raises(AssertionError):
        check(interpreted(arrays, chosen, limits, 4), want, jnp.bfloat16)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_other_pages_are_noticed():
    """Every look into the table by a wrong row or place, in the program that is right without."""
    arrays, chosen, limits = make(2, *SMALL, jnp.bfloat16, first=200)
    pages, table = paginate(arrays)
    want = loop(arrays, chosen, limits)
    check(interpreted(pages, chosen, limits, 2, table), want, jnp.bfloat16)
    for wrong in (table[::-1], table[:, ::-1], jnp.arange(4, dtype=jnp.int32).reshape(2, 2)):
        with pytest.raises(AssertionError):
            check(interpreted(pages, chosen, limits, 2, wrong), want, jnp.bfloat16)


@pytest.mark.parametrize("seed", range(6))
def test_the_cut_of_equal_rows_covers_every_step_once(seed):
    """Parts follow each other, know their rows, and none is much longer than another."""
    rng = np.random.default_rng(seed)
    count, steps = int(rng.integers(1, 200)), int(rng.integers(1, 20))
    rows, sms = int(rng.choice([1, 64, 65, 128])), int(rng.choice([1, 2, 7, 66, 132]))
    slack = int(rng.choice([0, 2, 9]))
    s = equal_rows(count, steps, rows=rows, num_sms=sms, slack=slack)
    tiles = -(-rows // 64)
    parts = max(1, sms // tiles)
    assert s.part.shape == (parts, len(Column))
    assert s.arrivals.shape == (count * tiles,)
    np.testing.assert_array_equal(s.row_step, np.arange(count + 1) * steps)
    begin, end = s.part[:, Column.FIRST_STEP], s.part[:, Column.END_STEP]
    assert (begin[0], end[-1]) == (0, count * steps)
    np.testing.assert_array_equal(begin[1:], end[:-1])
    most = -(-count * (steps + ROW_COST) // parts) + max(slack, ROW_COST - 1)
    parts_of = [[] for _ in range(count)]
    for p in np.flatnonzero(begin < end):
        first, last = s.part[p, Column.FIRST_ROW], s.part[p, Column.LAST_ROW]
        assert (first, last) == (begin[p] // steps, (end[p] - 1) // steps)
        assert s.part[p, Column.FIRST_ROW_STEP] == first * steps
        assert s.part[p, Column.FIRST_ROW_LENGTH] == steps * 128
        assert s.part[p, Column.LAST_ROW_SHARED] == (s.row_parts[0, last] < s.row_parts[1, last])
        assert end[p] - begin[p] + ROW_COST * (last - first) <= most
        for row in range(first, last + 1):
            parts_of[row].append(p)
    for row, of_row in enumerate(parts_of):
        assert of_row == list(range(s.row_parts[0, row], s.row_parts[1, row] + 1))


def test_vmap_and_gradients_of_pages():
    """A pool for each call; pages gather the gradients of all slots that were chosen."""
    arrays, chosen, limits = make(3, 2, 1, 128, 2, 128, 0, 20, jnp.bfloat16, first=100)
    want = loop(arrays, chosen, limits)
    parts = [paginate([a[i : i + 1] for a in arrays], seed=i) for i in range(2)]
    stack = lambda pair: jax.device_put(np.stack(jax.device_get(pair)))  # noqa: E731
    pages = [stack(pair) for pair in zip(*(part[0] for part in parts), strict=True)]
    table = stack([part[1] for part in parts])

    def attend(*arrays):
        call = lambda p, q, c, k, table, chosen, limits: hopper_chosen.attend(  # noqa: E731
            p, q, c, k, chosen, limits, table=table, scale=SCALE, interpret=INTERPRET, sms=2
        )
        return jax.vmap(call)(*arrays, table, chosen[:, None], limits[:, None])

    @jax.jit
    def ours(pages, cotangents):
        got, pull = jax.vjp(attend, *pages)
        return got, pull(cotangents)

    @jax.jit
    def theirs(arrays, cotangents):
        by_xla = lambda *arrays: mla_jax.latent_attention(  # noqa: E731
            *arrays, lengths=limits, chosen=chosen, scale=SCALE, implementation="xla"
        )
        return jax.vjp(by_xla, *arrays)[1](cotangents)

    clean = [np.nan_to_num(np.asarray(a), posinf=0) for a in arrays]
    out, lse = (np.cos(np.arange(x.size)).reshape(x.shape) for x in want)
    cotangents = out.astype(jnp.bfloat16), lse.astype(np.float32)
    got, gradients = jax.device_get(ours(pages, tuple(x[:, None] for x in cotangents)))
    check([x[:, 0] for x in got], want, jnp.bfloat16)
    expected = jax.device_get(theirs(clean, cotangents))
    table = np.asarray(table)
    eps = float(jnp.finfo(jnp.bfloat16).eps)
    assert relative(gradients[0][:, 0], expected[0]) < 2 * eps
    of_rows = np.stack([x[t[0]] for x, t in zip(gradients[2], table[:, 0], strict=True)])
    assert relative(of_rows, expected[2]) < 2 * eps


def test_types_under_shard_map():
    """Each device has tokens, slots and choices of its own."""
    arrays, chosen, limits = make(4, *SMALL, jnp.bfloat16)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.PartitionSpec("x")
    local = jax.shard_map(
        lambda *a: hopper_chosen.attend(*a, scale=SCALE, sms=2),
        mesh=mesh, in_specs=rows, out_specs=rows,
    )  # fmt: skip
    out, lse = jax.eval_shape(local, *arrays, chosen, limits)
    assert (out.shape, lse.shape) == ((2, 1, 3, 128), (2, 1, 3))


def test_rows_on_a_mesh_are_served_and_split_slots_are_refused():
    """Explicit axes: a device chooses among a row's slots, so that it must hold all of them."""
    device = jax.sharding.AbstractDevice("NVIDIA H200", 132, "gpu")
    kinds = (jax.sharding.AxisType.Explicit,)
    mesh = jax.sharding.AbstractMesh((2,), ("x",), axis_types=kinds, abstract_device=device)
    shapes = [(2, 1, 3, 128), (2, 1, 3, 16), (2, 256, 128), (2, 256, 16)]

    def run(rows, slots):
        specs = [jax.P(rows), jax.P(rows), jax.P(rows, slots), jax.P(rows, slots), jax.P(rows)]
        dtypes = [jnp.bfloat16] * 4 + [jnp.int32]
        structs = [
            jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, spec))
            for shape, dtype, spec in zip([*shapes, (2, 1, 130)], dtypes, specs, strict=True)
        ]
        with jax.sharding.use_abstract_mesh(mesh):
            return jax.eval_shape(
                lambda *a: mla_jax.latent_attention(
                    *a[:4], lengths=None, chosen=a[4], scale=SCALE, implementation="pallas_gpu"
                ),
                *structs,
            )

    out, _ = run("x", None)
    assert out.sharding.spec[0] == "x"
    with pytest.raises(NotImplementedError, match=r"slots S are split over x.*no chosen slots"):
        run(None, "x")


REFUSED = {
    "mask": ({"options": ("chosen", "mask")}, "takes chosen slots and lengths, not mask"),
    "window": ({"options": ("chosen", "window")}, "not window"),
    "rank": ({"key_dims": (496, 64)}, "kv_lora_rank must be one of"),
    "heads": ({"heads": 129}, "1 to 128 heads, not 129"),
    "fp8": ({"encoding": "float8_e4m3fn"}, "no float8_e4m3fn latents with chosen slots"),
    "float32": ({"dtype": "float32"}, "not float32"),
    "slots": ({"batch": 2**12, "slots": 2**19}, "4096 rows of 524288 slots: too many"),
    "tokens": ({"queries": 2**23}, "16777216 tokens"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_serve(name):
    change, reason = REFUSED[name]
    assert reason in hopper.why_not(dataclasses.replace(SPEC, **change), HOPPER)


def test_where_it_runs():
    """Any number of tokens and of slots; limits for each of them; pages."""
    for change in (
        {},
        {"queries": 4096, "options": ("chosen", "lengths per query")},
        {"slots": 4097, "options": ("chosen",)},
        {"store": "paged"},
    ):
        assert hopper.why_not(dataclasses.replace(SPEC, **change), HOPPER) is None
    assert "needs an NVIDIA GPU" in hopper.why_not(SPEC, target.of(jax.devices("cpu")[0]))


def test_through_the_op(monkeypatch):
    """The op plans nothing for a choice, and hands over a paged store with its table."""
    monkeypatch.setattr(hopper, "_H200_SMS", 2)
    shape = (2, 2, 128, 2, 128, 0, 20)
    arrays, chosen, limits = make(5, *shape, jnp.bfloat16)
    pages, table = paginate(arrays)
    store = Paged(Dense({"latent": pages[2], "k_rope": pages[3]}), table)
    seen = Seen.of(limits, batch=2, queries=2, slots=128, chosen=chosen)
    call = dispatch.Call(
        "latent_attention", 2, 2, 128, 2, (128, 0), 128, "bfloat16", seen.options, "paged", SCALE
    )
    with plgpu.force_gpu_interpret_mode():
        assert dispatch.choose(call) == "pallas_gpu"
        assert dispatch.plan(seen, call).plan is None
        got = jax.block_until_ready(dispatch.attend(tuple(pages[:2]), store, seen, call))
    check(got, loop(arrays, chosen, limits), jnp.bfloat16)


# ---- on a Hopper GPU

NATIVE = [  # B, T, S, N, R, P, K, dtype
    (3, 2, 1000, 128, 512, 64, 300, "bfloat16"),
    (1, 1, 5000, 128, 512, 64, 2048, "bfloat16"),  # shared by all parts
    (2, 3, 640, 40, 256, 0, 130, "float16"),
    (2, 1, 512, 20, 384, 16, 511, "bfloat16"),
    (5, 40, 384, 16, 128, 32, 127, "bfloat16"),  # whole rows to each part
]


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
