"""The TPU decode kernel in the interpreter; compiled for TPUs where libtpu is installed.

The interpreter finds races and reads out of bounds, and fills uninitialised memory with NaN.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import os
import pathlib
import subprocess
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import drawn, emptied, relative
from flax import nnx
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

import mla_jax
from mla_jax import MLAConfig, MultiHeadLatentAttention, target
from mla_jax.cache import PAGE, Dense, Paged
from mla_jax.ops import dispatch, tpu
from mla_jax.ops.seen import Seen
from mla_jax.ops.tpu import Plan, compute, copies, kernel, walk

SCALE = 0.11
# bfloat16: rounded weights and a rounded result, each within half a unit of the last place.
TOLERANCE = {jnp.float32: 3e-6, jnp.bfloat16: 2 * float(jnp.finfo(jnp.bfloat16).eps)}


@pytest.fixture(autouse=True)
def interpreter(request):
    cores = getattr(request, "param", 1)
    params = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=cores)
    with pltpu.force_tpu_interpret_mode(params):
        yield
    pltpu.reset_tpu_interpret_mode_state()


def draw(rng, batch, tokens, slots, heads, rank=128, rope=16, dtype=jnp.float32):
    shapes = ((batch, tokens, heads, rank), (batch, tokens, heads, rope))
    shapes += ((batch, slots, rank), (batch, slots, rope))
    return [jnp.asarray(rng.standard_normal(shape).astype(dtype)) for shape in shapes]


def ints(*values):
    return jnp.asarray(np.array(values, np.int32))


def poison(args, lengths):
    """NaN in every slot that no query sees."""
    batch, slots = args[2].shape[:2]
    last = np.asarray(lengths).reshape(batch, -1).max(1, keepdims=True)
    unseen = (np.arange(slots) >= last)[..., None]
    nan = lambda x: jnp.asarray(np.where(unseen, x.dtype.type(np.nan), x))  # noqa: E731
    return [*args[:2], *map(nan, args[2:])]


def run(args, lengths, *, block=128, ring=4, cores=1, piece=128, table=None):
    # `decode` is jitted: shapes and plans that a test has in common with another compile once.
    plan = Plan(block=block, ring=ring, cores=cores, piece=piece, vmem_bytes=2**25)
    got = jax.block_until_ready(tpu.decode(*args, lengths, SCALE, plan, table))
    assert not interpret_pallas_call.races.races_found
    return got


def exact(args, lengths):
    """The absorbed form in float64, whose lse is -inf where nothing is seen."""
    pattern, q_rope, latent, k_rope = (np.asarray(x).astype(np.float64) for x in args)
    (batch, tokens), slots = pattern.shape[:2], latent.shape[1]
    limits = np.full(batch, slots) if lengths is None else np.asarray(lengths)
    if limits.ndim == 1:
        limits = limits[:, None] - np.arange(tokens)[::-1]
    scores = np.einsum("BTNR,BSR->BTNS", pattern, latent, optimize=True)
    scores += np.einsum("BTNP,BSP->BTNS", q_rope, k_rope, optimize=True)
    unseen = np.arange(slots) >= limits[..., None]
    scores = np.where(unseen[:, :, None], -np.inf, SCALE * scores)
    top = scores.max(-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(top), top, 0))
    total = weights.sum(-1)
    out = np.einsum("BTNS,BSR->BTNR", weights, latent, optimize=True)
    with np.errstate(divide="ignore"):
        lse = np.log(total) + top[..., 0]
    return out / np.where(total > 0, total, 1)[..., None], lse


def check(args, lengths, pages=None, **plan):
    """The kernel on dense arrays, or on `pages` of the same rows, against the reference."""
    if pages is None:
        pages = (args if lengths is None else poison(args, lengths)), None
    out, lse = jax.device_get(run(pages[0], lengths, table=pages[1], **plan))
    want, want_lse = exact(args, lengths)
    assert out.dtype == args[0].dtype
    dtype = args[0].dtype.type
    if want.any():
        assert relative(out, want) < TOLERANCE[dtype]
    seen = np.isfinite(want_lse)
    np.testing.assert_array_equal(np.isfinite(lse), seen)
    np.testing.assert_allclose(lse[seen], want_lse[seen], atol=2e-5)
    assert (np.asarray(out, np.float32)[~seen] == 0).all()
    assert (np.asarray(lse)[~seen] == -np.inf).all()


SIZES = [
    (1, (512, 64), jnp.bfloat16), (8, (256, 64), jnp.float32), (8, (256, 32), jnp.bfloat16),
    (8, (128, 32), jnp.float32), (8, (512, 0), jnp.bfloat16), (20, (128, 16), jnp.float32),
    (20, (256, 0), jnp.float32),
]  # fmt: skip


@pytest.mark.parametrize(
    ("heads", "widths", "dtype"),
    [
        (128, (128, 16), jnp.float32),  # test_new_tokens_are_causal has one head, and bfloat16
        *(pytest.param(*each, marks=pytest.mark.slow) for each in SIZES),
    ],
)
def test_heads_widths_and_dtypes(heads, widths, dtype, rng):
    check(draw(rng, 2, 1, 256, heads, *widths, dtype), ints(77, 256))


@pytest.mark.slow
def test_lengths_around_blocks(rng):
    lengths = ints(119, 127, 128, 129, 133, 1001, 1023, 1024, 1025, 0, 1, 1152)
    args = draw(rng, len(lengths), 1, 1152, 4)
    check(args, lengths, block=128)
    check(args, lengths, block=512)  # 1152 is 2.25 blocks
    args = draw(rng, len(lengths), 1, 1536, 4)
    check(args, lengths, block=768, piece=256)
    check(args, lengths, block=768)


@pytest.mark.slow
def test_trimmed_copies_take_what_is_live_and_no_more(rng):
    """Every number of live tiles of a block, which is the size of its copy."""
    lengths = ints(*range(1, 896, 128), *range(0, 897, 128))
    args = draw(rng, len(lengths), 2, 896, 2)
    check(args, lengths, block=896, ring=3)
    check(args, lengths[::-1], block=1024, piece=256)  # 256, 512, 768 or 896 slots of a block


# Cores meet within a row, between rows, and where no row has slots.
ON_TWO_CORES = (130, 512, 0, 77), (0, 0, 512, 3), (0, 0, 0, 0)


@pytest.mark.slow  # test_pages_on_two_cores is of its kind
@pytest.mark.parametrize("interpreter", [2], indirect=True)
@pytest.mark.parametrize("plan", [{"block": 256}, {}], ids=str)
def test_two_cores_share_the_blocks(plan, rng):
    args = draw(rng, 4, 1, 512, 4)
    for lengths in ON_TWO_CORES:
        check(args, ints(*lengths), cores=2, **plan)


@pytest.mark.slow
@pytest.mark.parametrize("interpreter", [2], indirect=True)
def test_two_cores_share_one_row(rng):
    args = draw(rng, 1, 1, 1024, 4)
    check(args, ints(1000), cores=2)
    check(args, ints(1000), cores=2, block=512, piece=256)


def test_short_rows_share_blocks(rng):
    """More rows than places for queries, up to four in a block; their heads fill no tile."""
    args = draw(rng, 12, 1, 256, 20, 128, 0)
    check(args, ints(*rng.integers(0, 257, 12)), block=512, ring=3)


@pytest.mark.slow
def test_eight_short_rows_share_a_block(rng):
    lengths = ints(*rng.integers(0, 257, 40))
    args = draw(rng, 40, 1, 256, 4)
    check(args, lengths, block=1024, ring=3)
    check(args, lengths, block=1024, piece=256)


@pytest.mark.slow
def test_one_full_row_among_more_empty_ones(rng):
    args = draw(rng, 7, 1, 384, 4)
    check(args, ints(0, 0, 0, 384, 0, 0, 0), ring=3)
    check(args, ints(*[0] * 7), ring=3)


def loss(*results):
    return sum(jnp.sin(x).sum() for x in results), results


def test_new_tokens_are_causal(rng):
    """Of one head, whose queries fill no tile, and the widths of a large model."""
    args = draw(rng, 4, 3, 384, 1, 512, 64, jnp.bfloat16)
    check(args, ints(384, 1, 130, 0), block=256)
    check(args, ints(384, 257, 130, 0), block=256)  # 257: not all see the first block
    check(args, ints(0, 0, 384, 0), block=256)  # one row among empty ones
    check(args, ints(0, 0, 0, 0), block=256)


@pytest.mark.slow
def test_new_tokens_in_blocks_of_other_sizes(rng):
    args = draw(rng, 4, 3, 384, 4)
    check(args, ints(384, 1, 130, 0))
    check(args, None)
    limits = ints(*rng.integers(-1, 385, (4, 3)))
    check(args, limits)
    check(args, limits, block=256)


@pytest.mark.slow
def test_halves_merge(rng):
    args, lengths = draw(rng, 2, 1, 256, 4), ints(256, 140)
    parts = [
        run([*args[:2], *(a[:, part] for a in args[2:])], jnp.clip(lengths - first, 0, 128))
        for part, first in ((slice(0, 128), 0), (slice(128, 256), 128))
    ]
    merged = mla_jax.merge_attention(*parts)
    whole = run(args, lengths)
    np.testing.assert_allclose(merged[0], whole[0], atol=2e-6)
    np.testing.assert_allclose(merged[1], whole[1], atol=1e-5)


Walk, Copies, Compute = walk.Walk, copies.Copies, compute.Compute


@contextlib.contextmanager
def opening(broken):
    """Breaks where maxima and sums begin anew, but not whose queries are copied and waited for."""
    broken = functools.partialmethod(broken, real=Walk.opens)

    def within(method):
        def traced(*args, **options):
            with mock.patch.object(Walk, "opens", broken):
                return method(*args, **options)

        return traced

    changed = {name: within(getattr(Compute, name)) for name in ("score", "weigh")}
    with mock.patch.multiple(Compute, **changed):
        yield


PLANTED = {
    "off_by_one_slot": lambda: mock.patch.object(
        Walk, "limits", lambda self, row, real=Walk.limits: [n - 1 for n in real(self, row)]
    ),
    "future_token_visible": lambda: mock.patch.object(
        Walk, "limits", lambda self, row, real=Walk.limits: [real(self, row)[-1]] * 2
    ),
    "row_goes_on_from_the_last": lambda: opening(
        lambda self, step, number, at, real: real(self, step, number, at) & (at.row == 0)
    ),
    "only_the_last_piece": lambda: opening(lambda self, step, number, at, real: jnp.bool_(True)),
    "no_mask": lambda: mock.patch.object(Compute, "masked", lambda self, place, scores: scores),
    "tiles_not_cleared": lambda: mock.patch.object(Copies, "clear_tiles", return_value=None),
    "ends_not_cleared": lambda: mock.patch.object(Copies, "clear_ends", return_value=None),
    "whole_too_often": lambda: mock.patch.object(
        Walk, "whole",
        lambda self, at, real=Walk.whole: real(self, at._replace(piece=at.piece - 1)),
    ),
    "wait_forgotten": lambda: mock.patch.object(Copies, "wait", return_value=None),
    "stored_too_early": lambda: mock.patch.object(kernel.Core, "wait_stored", return_value=None),
    "queries_overwritten": lambda: mock.patch.object(kernel, "rows_held", return_value=1),
}  # fmt: skip


def paginate(args, lengths, rng, shared=None, count=None):
    """The rows on pages in random order, all else NaN: (arrays with a pool, table).

    The table says G, `count`, wherever a row has no page. `shared` (source, row, pages) gives a row
    the first pages of another, which are the same in both.
    """
    batch, slots = args[2].shape[:2]
    needed = -(-np.clip(np.asarray(lengths), 0, slots) // PAGE)
    count = int(needed.sum()) + 2 if count is None else count
    free = list(rng.permutation(count))
    table = np.full((batch, slots // PAGE), count, np.int32)
    for row, pages in enumerate(needed):
        table[row, :pages] = [free.pop() for _ in range(pages)]
    if shared is not None:
        source, row, pages = shared
        table[row, :pages] = table[source, :pages]
    pools = []
    for rows in poison(args, lengths)[2:]:
        pool = np.full((count, PAGE, rows.shape[2]), np.nan, np.float32)
        for row, page in np.argwhere(table < count):
            pool[table[row, page]] = rows[row, page * PAGE : (page + 1) * PAGE]
        pools.append(jnp.asarray(pool, rows.dtype))
    return [*args[:2], *pools], jnp.asarray(table)


# Rows that end on a page's border, one before and one behind; whole and mixed blocks.
AROUND_PAGES = 127, 768, 0, 128, 129, 255, 257, 1, 640, 767


@pytest.mark.slow  # test_pages_on_two_cores has the same rows
@pytest.mark.parametrize(
    "plan",
    [{"block": 512, "piece": 256}, {}, {"block": 768, "piece": 256, "ring": 3}],
    ids=str,
)
def test_pages_of_any_order(plan, rng):
    lengths = ints(*AROUND_PAGES)
    args = draw(rng, len(lengths), 1, 768, 4)
    check(args, lengths, paginate(args, lengths, rng), **plan)


@pytest.mark.slow
def test_pages_that_one_block_has_not_all_of(rng):
    """Where no page is copied the block's buffer has NaN, which scores are made of and masked."""
    args = draw(rng, 1, 2, 512, 4)
    for length in (130, 1, 512):
        lengths = ints(length)
        check(args, lengths, paginate(args, lengths, rng), block=512, piece=512)


@pytest.mark.parametrize("interpreter", [2], indirect=True)
def test_pages_on_two_cores(rng):
    args = draw(rng, 10, 1, 768, 4, rope=0)
    for lengths in (AROUND_PAGES, *((*few, *[0] * 6) for few in ON_TWO_CORES)):
        pages = paginate(args, lengths, rng, count=30)
        check(args, ints(*lengths), pages, cores=2, block=512, piece=256)


def forked(rng, tokens=2):
    """Three rows, of which the last two share two pages: (dense arrays, lengths, pages)."""
    args, lengths = draw(rng, 3, tokens, 384, 4), ints(70, 384, 300)
    held = [np.array(x) for x in args[2:]]
    for x in held:
        x[2, : 2 * PAGE] = x[1, : 2 * PAGE]
    args = [*args[:2], *map(jnp.asarray, held)]
    return args, lengths, paginate(args, lengths, rng, shared=(1, 2, 2))


PLANTED_PAGES = {
    "page_of_the_wrong_row": lambda self, row, index, real: real(self, (row + 1) % 3, index),
    "off_by_one_page": lambda self, row, index, real: real(self, row, (index + 1) % 3),
    "page_before": lambda self, row, index, real: real(self, row, jnp.maximum(index - 1, 0)),
    "table_ignored": lambda self, row, index, real: row * 2 + index,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bug", "plan"),
    [("", {"block": 128}), *((bug, {"block": 256, "piece": 256}) for bug in ["", *PLANTED_PAGES])],
    ids=str,
)
@pytest.mark.usefixtures("traced_anew")
def test_planted_bugs_of_pages_are_noticed(bug, plan, rng):
    args, lengths, pages = forked(rng)
    if not bug:
        check(args, lengths, pages, **plan)
        return
    broken = functools.partialmethod(PLANTED_PAGES[bug], real=Copies.page)
    with mock.patch.object(Copies, "page", broken), pytest.raises(AssertionError):
        check(args, lengths, pages, **plan)


def test_pages_through_the_op_and_their_gradients(rng):
    """Pages that rows share gather the gradients of all; those that no row has get none.

    Tokens beyond a call come in groups: here two to a call of the kernel, the last alone.
    """
    args, lengths, (pages, table) = forked(rng, tokens=3)

    def paged(pattern, q_rope, latent, k_rope):
        store = Paged(Dense({"latent": latent, "k_rope": k_rope}), table)
        seen = Seen.of(lengths, batch=3, queries=3, slots=store.slots)
        return mla_jax.ops.attend_latents(
            (pattern, q_rope), store, seen, scale=SCALE, implementation="pallas_tpu"
        )

    def dense(*arrays):
        return mla_jax.latent_attention(
            *arrays, lengths=lengths, scale=SCALE, implementation="reference"
        )

    def slopes(pages, args):
        return [
            jax.grad(lambda *arrays, fn=attend: loss(*fn(*arrays)), range(4), has_aux=True)(*arrays)
            for attend, arrays in ((paged, pages), (dense, args))
        ]

    with mock.patch.object(tpu, "_MOST_ROWS", 2 * 4):
        (got, results), (want, _) = jax.device_get(jax.jit(slopes)(pages, args))
    for one, two in zip(results, exact(args, lengths), strict=True):
        np.testing.assert_allclose(one, two, atol=2e-5)
    for one, two in zip(got[:2], want[:2], strict=True):
        assert relative(one, two) < 2e-5
    for one, two in zip(got[2:], want[2:], strict=True):
        pool = np.zeros(one.shape)
        for row, page in np.argwhere(np.asarray(table) < len(pool)):
            pool[np.asarray(table)[row, page]] += two[row, page * PAGE : (page + 1) * PAGE]
        assert relative(one, pool) < 2e-5


TRACED = (tpu.decode,)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bug", "piece"),
    [("", 128), *((bug, 256) for bug in ["", *PLANTED])],
)
@pytest.mark.usefixtures("traced_anew")
def test_planted_bugs_are_noticed(bug, piece, rng):
    args = draw(rng, 4, 2, 512, 4)
    lengths = ints(450, 300, 130, 512)
    if not bug:
        check(args, lengths, block=256, piece=piece)
        return
    noticed = (AssertionError, jax.errors.JaxRuntimeError)  # the latter of some races
    with PLANTED[bug](), pytest.raises(noticed, match=r"RACE|races_found|<|Not equal"):
        check(args, lengths, block=256, piece=piece)


def test_bugs_of_a_caller_are_noticed(rng):
    args, lengths = draw(rng, 2, 1, 256, 128), ints(130, 256)
    want, _ = exact(args, lengths)
    pattern, q_rope, latent, k_rope = map(np.asarray, args)
    moved = [np.concatenate([a[:, 1:], np.zeros_like(a[:, :1])], axis=1) for a in (latent, k_rope)]
    for broken in (
        (pattern, np.zeros_like(q_rope), latent, k_rope),  # no rotary part
        (pattern * np.float32(1.01), q_rope * np.float32(1.01), latent, k_rope),  # a wrong scale
        (pattern, q_rope, *moved),  # the first key dropped
    ):
        assert relative(run(list(map(jnp.asarray, broken)), lengths)[0], want) > 1e-3


def test_in_scan_and_shard_map(rng):
    args, lengths = draw(rng, 2, 1, 128, 4), ints(100, 128)
    want = exact(args, lengths)
    call = functools.partial(mla_jax.latent_attention, scale=SCALE, implementation="pallas_tpu")

    def scanned(*arrays):
        _, made = jax.lax.scan(
            lambda carry, _: (carry, call(*arrays[:4], lengths=carry)), arrays[4], length=2
        )
        return made

    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    of_heads, of_rows = PartitionSpec("x", None, "y"), PartitionSpec("x")
    in_specs = (of_heads, of_heads, of_rows, of_rows, of_rows)
    out_specs = PartitionSpec(None, *of_heads)
    made = jax.jit(jax.shard_map(scanned, mesh=mesh, in_specs=in_specs, out_specs=out_specs))(
        *args, lengths
    )
    for one, two in zip(made, want, strict=True):
        np.testing.assert_allclose(one[0], two, atol=1e-5)
        np.testing.assert_allclose(one[1], two, atol=1e-5)


def a_layer_s_step(pages, rng):
    """The layer by XLA, tokens, a cache, and the program of a step by the kernel."""
    config = MLAConfig.from_preset("tiny").replace(kv_lora_rank=128)
    layer, plain = (
        drawn(lambda name=name: MultiHeadLatentAttention(
            config, implementation=name, rngs=nnx.Rngs(0)
        ))
        for name in (None, "xla")
    )  # fmt: skip
    x = rng.standard_normal((2, 6, config.hidden_size), np.float32)
    cache = emptied(lambda: layer.init_cache(2, 128, pages=pages))
    decode = jax.jit(lambda layer, x, cache: layer.decode(x, cache, form="absorbed"))
    return layer, plain, x, cache, decode.lower(layer, x[:, :3], cache)


PAGES = pytest.mark.parametrize("pages", [None, 3], ids=["dense", "pages"])


@PAGES
def test_a_layer_chooses_it(pages, rng):
    *_, lowered = a_layer_s_step(pages, rng)
    assert "pallas_tpu" in lowered.as_text(debug_info=True)


@pytest.mark.slow
@PAGES
def test_a_layer_decodes_with_it(pages, rng):
    layer, plain, x, cache, lowered = a_layer_s_step(pages, rng)
    full = jax.jit(lambda layer, x: layer(x, form="expanded"))(plain, x)
    program, parts = lowered.compile(), []
    for part in (x[:, :3], x[:, 3:]):
        y, cache = program(layer, part, cache)
        parts.append(y)
    np.testing.assert_allclose(np.concatenate(parts, 1), full, atol=1e-5)
    assert cache.length.tolist() == [6, 6]


SPEC = dispatch.Call("latent_attention", 2, 1, 256, 16, (512, 64), 512, "bfloat16", ("lengths",))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": "float16"}, "not float16"),
        ({"options": ("mask",)}, "no mask"),
        ({"heads": 256}, "up to 128 heads"),
        ({"key_dims": (500, 64)}, "multiple of 128"),
        ({"key_dims": (512, 8)}, "multiple of 16"),
        ({"slots": 100}, "multiple of 128, not 100"),
        ({"store": "paged", "batch": 256, "slots": 2**17}, "page table has 256 x 1024 entries"),
    ],
)
def test_why_not(change, reason):
    chip = target.Target("tpu", "TPU v6 lite")
    assert tpu.why_not(SPEC, chip) is None
    assert tpu.why_not(dataclasses.replace(SPEC, store="paged"), chip) is None
    assert reason in tpu.why_not(dataclasses.replace(SPEC, **change), chip)
    assert "needs a TPU" in tpu.why_not(SPEC, target.Target("cpu", "cpu"))


@pytest.mark.parametrize("kind", ["TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x", "TPU v9"])
def test_plans_fit(kind):
    for queries in (1, 16, 128, 1024):
        for size in (2, 4):
            plan = tpu.make_plan(64, queries, 32768, size, kind)
            assert plan.piece % 128 == 0
            assert plan.block % plan.piece == 0
            assert plan.vmem_bytes < 40 * 2**20  # of 64 MiB, or 128, that a core has
    assert tpu.make_plan(1, 16, 256, 2, kind).block == 256
    assert tpu.make_plan(4, 16, 256, 2, kind).block == 1024  # four rows
    assert tpu.make_plan(7, 16, 384, 2, kind).piece in (128, 256)


LIBTPU = pathlib.Path(sys.prefix, "tpu-aot")  # where `./run test` puts it


@pytest.mark.skipif(
    not (LIBTPU / "libtpu").exists() and importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: ./run test does it, where there is one",
)
@pytest.mark.parametrize(
    "parts",
    [
        # One process, since it takes long to begin.
        {"tpu7x": "--kernels", "v5e": "--programs"},
        *(pytest.param({one: part}, marks=pytest.mark.slow) for one, part in (
            *itertools.product(["v5e", "v5p", "v6e"], ["--kernels"]),
            *itertools.product(["v5p", "v6e", "tpu7x"], ["--programs"]),
            *itertools.product(["v5e", "v5p", "v6e", "tpu7x"], ["--sparse"]))),
    ],
    ids=lambda parts: ",".join(map("".join, parts.items())),
)  # fmt: skip
def test_compiles_without_a_device(parts):
    words = [["--short", part, generation] for generation, part in parts.items()]
    code = f"import sys, aot_tpu\nfor sys.argv[1:] in {words}:\n    aot_tpu.main()"
    paths = [os.environ.get("PYTHONPATH"), str(LIBTPU), "benchmarks"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    for generation in parts:
        assert done.stdout.count(f"{generation}: compiles, ") == 1, done.stdout + done.stderr
