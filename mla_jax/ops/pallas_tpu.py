"""Absorbed decode as one Mosaic TPU kernel: attention of all heads over a contiguous latent cache.

The kernel walks one list of blocks, those that hold a token, row after row. Copies from HBM run a
few blocks ahead in a ring, across rows. A step of the loop holds two independent halves, so that
the scheduler can fill one's waits with the other's work:

    score  item j+1: queries x block on the matrix unit, running maximum -> scores, top, fade
    mix    item j:   exp2, sum, weights x latents on the matrix unit     -> total, mixed

Of a row's last block only what is live is copied, and only the parts that hold it are computed.
Only a block that some query does not see in full is masked. Rows keep a running maximum and sum
(Milakov and Gimelshein 2018, arXiv 1805.02867) in base 2. Where a chip has two cores, each takes
half of the list; a row that straddles the halves is merged by lse.

HBM layout: XLA lays an array of 64 channels per slot out slot-minor, so k_rope goes in as [B P S]:
that transpose is a bitcast of what is stored, and its lanes hold no padding. XLA's tiles have 8
rows; arrays go in, and VMEM buffers are, as [.. /8 8 ..] so that the compiler uses the same tile in
VMEM, where it may prefer 16 rows, and a copy moves whole tiles (on tpu7x the other way takes three
times as long).

Letters: B batch, T query tokens, S cache slots, N heads, R latent, P rotary channels, M = T N
queries of a row, padded to whole tiles, C slots of a block.
"""

import dataclasses
import functools
import math
import tomllib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mla_jax.config import configs_dir
from mla_jax.ops import xla
from mla_jax.ops.reference import merge_attention

_LANES, _TILE = 128, 8
_MASKED = -1e30  # finite, so that masked minus masked is 0 and not NaN
_MOST_QUERIES = 8  # T; more tokens than this are a prefill, which another form serves


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the kernel is built: `plan` derives it from shapes, the tuning table and the chip.

    Attributes:
        block: C, slots of a block, a multiple of 128.
        ring: buffers of a block in VMEM; ring - 2 copies are under way during a step.
        cores: TensorCores that share the work.
        parts: of a row's last block as many of these parts are computed as hold what is live, and
            its scores are masked as they come. That takes branches, and code of parts x (parts + 1)
            steps; with 1 it is one step, and a last block is computed whole.
        vmem_bytes: limit on the scoped VMEM of the kernel.
    """

    block: int
    ring: int
    cores: int
    parts: int
    vmem_bytes: int


def why_not(spec, device) -> str | None:
    """Why the kernel cannot serve `spec` on `device`, or None."""
    if device.platform != "tpu":
        return f"needs a TPU, this is {device.device_kind} ({device.platform})"
    rank, rope = spec.key_dims
    if spec.dtype not in ("bfloat16", "float32"):
        return f"takes bfloat16 and float32, not {spec.dtype}"
    if others := set(spec.options) - {"lengths", "lengths per query"}:
        return f"no {', '.join(sorted(others))}"
    if spec.queries > _MOST_QUERIES:
        return f"decodes up to {_MOST_QUERIES} tokens at once, not {spec.queries}"
    if spec.heads > 128:
        return f"takes up to 128 heads on one chip, not {spec.heads}: shard them"
    if rank % _LANES or rank > 512:
        return f"kv_lora_rank must be a multiple of 128 up to 512, not {rank}"
    if rope % 16 or rope > _LANES:
        return f"qk_rope_head_dim must be a multiple of 16 up to 128, not {rope}"
    if spec.slots % _LANES:
        return f"the cache's slots must be a multiple of 128, not {spec.slots}"
    size = jnp.dtype(spec.dtype).itemsize
    needed = plan(spec.queries * spec.heads, spec.slots, size, device.device_kind).vmem_bytes >> 20
    limit = 60 if device.device_kind in _tuning() else 15  # a v4 core has 16 MiB
    if needed > limit:
        return f"needs {needed} MiB of VMEM, {device.device_kind} is known to have {limit}"
    return None


def latent_attention(
    pattern, q_rope, latent, k_rope, *, lengths, scale, soft_cap=None, window=None, mask=None,
    segment_ids=None, precision=None,
):  # fmt: skip
    """The absorbed form: see `api.latent_attention`. Differentiated, it runs XLA's backward."""
    del soft_cap, window, mask, segment_ids, precision  # `why_not` keeps them unset
    return _attention(pattern, q_rope, latent, k_rope, lengths, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(pattern, q_rope, latent, k_rope, lengths, scale):
    queries = math.prod(pattern.shape[1:3])
    chosen = plan(queries, latent.shape[1], jnp.dtype(latent.dtype).itemsize)
    return decode(pattern, q_rope, latent, k_rope, lengths, scale, chosen)


def _forward(pattern, q_rope, latent, k_rope, lengths, scale):
    arrays = (pattern, q_rope, latent, k_rope)
    return _attention(*arrays, lengths, scale), (arrays, lengths)


def _backward(scale, residuals: Any, cotangents: Any):
    arrays, lengths = residuals
    options = dict.fromkeys(("soft_cap", "window", "mask", "segment_ids", "precision"))
    core = functools.partial(xla.latent_attention, lengths=lengths, scale=scale, **options)
    return *jax.vjp(core, *arrays)[1](cotangents), None


_attention.defvjp(_forward, _backward)


@functools.cache
def _tuning() -> dict:
    return tomllib.loads((configs_dir() / "tuning" / "tpu.toml").read_text(encoding="utf-8"))


def plan(queries: int, slots: int, itemsize: int, kind: str | None = None) -> Plan:
    """The plan for M queries per row of S slots on a device kind (None: that of the target).

    `configs/tuning/tpu.toml` has a block size for 16 and for 128 queries; in between and beyond the
    block shrinks as M grows, so that a block's scores keep their size. A kind that is not there
    gets the smallest of its values.
    """
    if kind is None:
        kind = target().device_kind
    table = _tuning()
    tuned = table.get(kind, table["other"])
    few, many = tuned["block_of_16_queries"], tuned["block_of_128_queries"]
    block = few if queries <= 32 else many * _LANES // max(queries, _LANES)
    block = min(slots, max(_LANES, block * 2 // max(itemsize, 2) // _LANES * _LANES))
    ring, rows = tuned["ring"], max(16, queries)
    # At the widest R and P, whose lanes are padded in the queries. XLA keeps the limit free for the
    # kernel whether it is used or not, so it is what the buffers take and some for spills.
    buffers = ring * (block * 640 + rows * 640) * itemsize
    buffers += rows * (block * 4 + 512 * (4 + itemsize) + 5 * 4 * _LANES)
    parts = tuned["parts_of_16_queries" if queries <= 32 else "parts_of_128_queries"]
    parts = parts if queries <= _LANES else 1
    return Plan(block, ring, tuned["cores"], parts, buffers * 5 // 4 + 2**22)


def target():
    """The device being traced for: that of the abstract mesh, or the default one."""
    abstract = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return jax.devices()[0] if abstract is None else abstract


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """What the kernel knows at compile time beside the shapes of its refs."""

    tokens: int  # T
    heads: int  # N
    slots: int  # S
    per_query: bool  # lengths are [B T], not [B]
    scale: float  # in base 2
    plan: Plan
    known: Callable | None  # length of a row where lengths are no operand


# Jitted here too, so that the layers of a model share one lowering.
@functools.partial(jax.jit, static_argnames=("scale", "plan"))
def decode(pattern, q_rope, latent, k_rope, lengths, scale, plan: Plan):
    """Runs the kernel by `plan`; arguments and results as `api.latent_attention`."""
    batch, tokens, heads, rank = pattern.shape
    out, lse, *parts = launch(pattern, q_rope, latent, k_rope, lengths, scale, plan)
    lse = lse.reshape(batch, -1)
    if parts:
        row = _shared_row(lengths, latent.shape[1], batch, plan.block)
        out, lse = _join(out, lse, parts[0], parts[1], row)
    out = out[:, : tokens * heads].reshape(batch, tokens, heads, rank)
    return out, lse[:, : tokens * heads].reshape(batch, tokens, heads)


def launch(pattern, q_rope, latent, k_rope, lengths, scale, plan: Plan, known=None):
    """The kernel call: out [B M R], lse [B M/128 128] and, of two cores, parts of a shared row.

    With `lengths` None, control flow depends on nothing in memory: every row is full, or of length
    known(row). libtpu's static profiler needs that: to it, a length read at run time is 0.
    """
    (batch, tokens, heads, rank), (slots, rope) = pattern.shape, k_rope.shape[1:]
    dtype, queries = latent.dtype, tokens * heads
    rows = -(-queries // 16) * 16  # M: whole tiles, in either dtype
    groups = -(-rows // _LANES)

    def by_row(x):
        x = x.reshape(batch, queries, x.shape[-1])
        x = jnp.pad(x, ((0, 0), (0, rows - queries), (0, 0)))
        return x.reshape(batch, rows // _TILE, _TILE, x.shape[-1])

    arrays = {
        "pattern": by_row(pattern),
        "latent": latent.reshape(batch, slots // _TILE, _TILE, rank),
    }
    if rope:
        arrays["q_rope"] = by_row(q_rope)
        tiles = jnp.swapaxes(k_rope, 1, 2).reshape(batch, rope // _TILE, _TILE, -1, _LANES)
        arrays["k_rope"] = jnp.swapaxes(tiles, 2, 3)
    if lengths is not None:
        arrays["lengths"] = lengths.astype(jnp.int32).reshape(-1)

    # The cache is read from HBM even where XLA would have moved part of it to VMEM before.
    operands = [
        x if name == "lengths" else pltpu.with_memory_space_constraint(x, pltpu.HBM)
        for name, x in arrays.items()
    ]
    shaped = _shaped(arrays.values())
    results = {
        "out": shaped((batch, rows, rank), dtype),
        "lse": shaped((batch, groups, _LANES), jnp.float32),
    }
    if plan.cores > 1:  # of the row that two cores share, each core's part
        results |= {
            "part": shaped((plan.cores, rows, rank), jnp.float32),
            "part_lse": shaped((plan.cores, groups, _LANES), jnp.float32),
        }
    vmem = pltpu.VMEM
    scratch = {
        "pattern": vmem((plan.ring, rows // _TILE, _TILE, rank), dtype),
        "latent": vmem((plan.ring, plan.block // _TILE, _TILE, rank), dtype),
        "scores": vmem((rows, plan.block), jnp.float32),
        "top": vmem((2, rows, _LANES), jnp.float32),
        "fade": vmem((rows, _LANES), jnp.float32),
        "total": vmem((rows, _LANES), jnp.float32),
        "mixed": vmem((rows, rank), jnp.float32),
        "out": vmem((rows, rank), dtype),
        "lse": vmem((groups, _LANES), jnp.float32),
        "loaded": pltpu.SemaphoreType.DMA((plan.ring,)),
        "first": pltpu.SemaphoreType.DMA((2,)),
        "stored": pltpu.SemaphoreType.DMA(()),
    }
    if rope:
        scratch["q_rope"] = vmem((plan.ring, rows // _TILE, _TILE, rope), dtype)
        scratch["k_rope"] = vmem(
            (plan.ring, rope // _TILE, plan.block // _LANES, _TILE, _LANES), dtype
        )
    sizes = _Sizes(
        tokens, heads, slots, lengths is not None and lengths.ndim == 2, scale * math.log2(math.e),
        plan, known,
    )  # fmt: skip

    def kernel(*refs):
        names = [*arrays, *results]
        _Walk(sizes, dict(zip(names, refs, strict=False)), refs[len(names)]).run()

    work = batch * slots * rows
    size = jnp.dtype(dtype).itemsize
    specs = {name: pl.BlockSpec(memory_space=pl.ANY) for name in (*arrays, *results)}
    specs["lengths"] = pl.BlockSpec(memory_space=pltpu.SMEM)
    return pl.pallas_call(
        kernel,
        grid=(plan.cores,),
        in_specs=[specs[name] for name in arrays],
        out_specs=[specs[name] for name in results],
        out_shape=list(results.values()),
        scratch_shapes=[scratch],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=plan.vmem_bytes,
            # The interpreter covers both: one is a check at the kernel's end that libtpu's
            # profiler does not know on tpu7x, the other takes 100 cycles per block.
            disable_semaphore_checks=True, disable_bounds_checks=True,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * work * (2 * rank + rope), transcendentals=work,
            bytes_accessed=batch * (slots * (rank + rope) + rows * (2 * rank + rope)) * size,
        ),
        name="mla_decode",
    )(*operands)  # fmt: skip


def _shared_row(lengths, slots, batch, block):
    """The row that both cores worked on, or `batch` where the halves meet between rows."""
    if lengths is None:
        lengths = jnp.full((batch,), slots, jnp.int32)
    counts = pl.cdiv(jnp.clip(lengths.reshape(batch, -1).max(1), 0, slots), block)
    ends = jnp.cumsum(counts)
    half = (ends[-1] + 1) // 2
    shared = (ends > half) & (ends - counts < half)
    return jnp.where(shared.any(), jnp.argmax(shared), batch).astype(jnp.int32)


def _join(out, lse, part, part_lse, row):
    """Puts the merged parts of the shared row into it; a row of `batch` changes nothing."""
    parts = zip(part, part_lse.reshape(len(part), -1)[:, : part.shape[1]], strict=True)
    merged, merged_lse = merge_attention(*parts)
    merged_lse = jnp.pad(merged_lse, (0, lse.shape[1] - len(merged_lse)))
    out = out.at[row].set(merged.astype(out.dtype), mode="drop")
    return out, lse.at[row].set(merged_lse, mode="drop")


class _Item(NamedTuple):
    """A block of the list."""

    row: Any
    index: Any  # of the block in its row
    number: Any  # of rows before it on this core
    left: Any  # tiles of 128 slots of its row from here on


class _Walk:
    """The kernel: one core's walk over its blocks.

    `step` is an item's place in the list. What an item needs lies in ring buffers `step % ring`
    (blocks) and `number % ring` (queries). Item `count` and beyond do not exist: nothing is copied
    for them.
    """

    def __init__(self, sizes: _Sizes, hbm: dict, at: dict):
        self.sizes, self.plan, self.hbm, self.at = sizes, sizes.plan, hbm, at
        self.batch, self.rows, self.rank = hbm["out"].shape
        self.lengths: Any = hbm.get("lengths")
        self.full = self.lengths is None and sizes.known is None
        self.rope = "k_rope" in hbm
        self.half = -(-self.plan.block // (2 * _LANES)) * _LANES  # of a block
        part = -(-self.plan.block // (self.plan.parts * _LANES)) * _LANES
        self.portions = [*range(part, self.plan.block, part), self.plan.block]  # of a block
        self.core = pl.program_id(0) if self.plan.cores > 1 else 0
        exact = hbm["latent"].dtype == jnp.float32
        self.dot = functools.partial(
            lax.dot_general, preferred_element_type=jnp.float32,
            precision=lax.Precision.HIGHEST if exact else None,
        )  # fmt: skip

    # Which blocks.

    def limits(self, row):
        """Slots that each query token of a row may see."""
        sizes, tokens = self.sizes, range(self.sizes.tokens)
        if self.full:
            return [sizes.slots - (sizes.tokens - 1 - t) for t in tokens]
        row = jnp.minimum(row, self.batch - 1)
        if sizes.per_query:
            limits = [self.lengths[row * sizes.tokens + t] for t in tokens]
        else:
            length = self.lengths[row] if sizes.known is None else sizes.known(row)
            limits = [length - (sizes.tokens - 1 - t) for t in tokens]
        return [jnp.clip(limit, 0, sizes.slots) for limit in limits]

    def length(self, row):
        """Slots of a row up to the last that some query sees."""
        return functools.reduce(jnp.maximum, self.limits(row))

    def blocks(self, row):
        """How many blocks of a row hold a slot that some query sees."""
        return pl.cdiv(self.length(row), self.plan.block)

    def nonempty(self, row):
        """The first row from `row` on with a block."""
        if self.full:
            return row
        empty = lambda r: (r < self.batch) & (self.length(r) == 0)  # noqa: E731
        return lax.while_loop(empty, lambda r: r + 1, row)

    def tiles(self, row):
        """Tiles of 128 slots of a row that hold a slot that some query sees."""
        return pl.cdiv(self.length(row), _LANES)

    def following(self, item):
        tiles = self.plan.block // _LANES
        more = item.left > tiles
        row = self.nonempty(jnp.where(more, item.row, item.row + 1))
        same = _Item(row, item.index + 1, item.number, item.left - tiles)
        return jax.tree.map(
            functools.partial(jnp.where, more), same,
            _Item(row, 0, item.number + 1, self.tiles(row)),
        )  # fmt: skip

    def share(self):
        """This core's count of items and its first one."""
        zero = jnp.int32(0)
        total = lax.fori_loop(0, self.batch, lambda r, n: n + self.blocks(r), zero, unroll=4)
        if self.plan.cores == 1:
            row = self.nonempty(zero)
            return total, _Item(row, zero, zero, jnp.int32(self.tiles(row)))
        half = (total + 1) // 2

        def find(row, state):
            left, at_row, at_index = state
            here = (at_row == self.batch) & (left < self.blocks(row))
            return left - self.blocks(row), *(
                jnp.where(here, new, old) for new, old in ((row, at_row), (left, at_index))
            )

        start = (self.core * half, jnp.int32(self.batch), zero)
        _, row, index = lax.fori_loop(0, self.batch, find, start, unroll=4)
        first = _Item(row, index, zero, self.tiles(row) - index * (self.plan.block // _LANES))
        return jnp.where(self.core == 0, half, total - half), first

    def slot(self, step):
        return lax.rem(step, self.plan.ring)

    # Copies.

    def halves(self):
        """(first slot, slots) of the halves of a block, or the whole of one that has none."""
        rest = self.plan.block - self.half
        return [(0, self.half), (self.half, rest)] if rest else [(0, self.half)]

    def copy_live(self, names, item, slot, part, copy):
        """Copies what is live in a part, (first slot, slots), of an item's block, by 128 slots."""
        begin, slots = part
        most, left = slots // _LANES, item.left - begin // _LANES

        def go(tiles):
            for name in names:
                before, unit = ((), _TILE) if name == "latent" else ((slice(None),), _LANES)
                source = (item.index * self.plan.block + begin) // unit
                size = tiles * (_LANES // unit)
                copy(
                    self.hbm[name].at[(item.row, *before, pl.ds(source, size))],
                    self.at[name].at[(slot, *before, pl.ds(begin // unit, size))],
                )

        # To libtpu's linter, a copy of a size that it does not know is none.
        lax.cond(left >= most, lambda: go(most), lambda: pl.when(left > 0)(lambda: go(left)))

    def copy_queries(self, item, slot, copy):
        for name in ("pattern", "q_rope") if self.rope else ("pattern",):
            copy(self.hbm[name].at[item.row], self.at[name].at[slot])

    def copy_first(self, item, part, action):
        """`copy_in` of the first item, in halves, so that its scores begin with one of them."""
        copy = _copier(self.at["first"].at[part], action)
        self.copy_live(("latent",), item, 0, self.halves()[part], copy)
        if part == 0:
            self.copy_queries(item, 0, copy)
        if self.rope and part == len(self.halves()) - 1:
            self.copy_live(("k_rope",), item, 0, (0, self.plan.block), copy)

    def copy_in(self, step, item, action):
        """Starts, or waits for, the copies of an item: action is "start" or "wait"."""
        slot, queries = self.slot(step), lax.rem(item.number, self.plan.ring)
        copy = _copier(self.at["loaded"].at[slot], action)
        names = ("latent", "k_rope") if self.rope else ("latent",)
        self.copy_live(names, item, slot, (0, self.plan.block), copy)
        pl.when(item.index == 0)(lambda: self.copy_queries(item, queries, copy))

    def prefetch(self, step, item):
        pl.when(step < self.count)(lambda: self.copy_in(step, item, "start"))

    def copy_out(self, row, action):
        for name in ("out", "lse"):
            copy = pltpu.make_async_copy(self.at[name], self.hbm[name].at[row], self.at["stored"])
            getattr(copy, action)()

    # The score half of a step.

    def score(self, step, item, size, partial):
        """Scores of an item, and the running maximum; masked where partial."""
        at, slot, queries = self.at, self.slot(step), lax.rem(item.number, self.plan.ring)
        pattern, latent = _rows(at["pattern"][queries]), _rows(at["latent"][slot, : size // _TILE])
        scores = self.dot(pattern, latent, (((1,), (1,)), ((), ())))
        scores = self.add_rope(scores, slot, queries)
        self.keep(step, item, self.masked(item, scores) if partial else scores)

    def score_first(self, item):
        """`score` of the first item, as its halves come in."""
        at, scores = self.at, []
        for part, (begin, slots) in enumerate(self.halves()):
            self.copy_first(item, part, "wait")
            latent = _rows(at["latent"][0, pl.ds(begin // _TILE, slots // _TILE)])
            scores.append(self.dot(_rows(at["pattern"][0]), latent, (((1,), (1,)), ((), ()))))
        self.keep(0, item, self.add_rope(jnp.concatenate(scores, axis=1), 0, 0))

    def add_rope(self, scores, slot, queries):
        """Scaled scores: those of the latents given, the rotary part added."""
        if self.rope:
            q_rope = _rows(self.at["q_rope"][queries])
            tiles = [_rows(self.at["k_rope"][slot, :, i]) for i in range(scores.shape[1] // _LANES)]
            scores += self.dot(q_rope, jnp.concatenate(tiles, axis=1), (((1,), (0,)), ((), ())))
        return scores * self.sizes.scale

    def keep(self, step, item, scores):
        at = self.at
        opens = (item.index == 0) | (step == 0)  # the first of its row on this core
        last = jnp.where(opens, _MASKED, at["top"][lax.rem(step + 1, 2)])
        top = jnp.maximum(last, scores.max(-1, keepdims=True))
        at["scores"][:, : scores.shape[1]] = scores
        at["top"][lax.rem(step, 2)] = top
        at["fade"][...] = jnp.exp2(last - top)

    def partial(self, item):
        """Whether some query does not see an item's block in full."""
        low = functools.reduce(jnp.minimum, self.limits(item.row))
        return low < (item.index + 1) * self.plan.block

    def masked(self, item, scores):
        """Scores of an item, `_MASKED` where a query does not see the slot."""
        limits = [limit - item.index * self.plan.block for limit in self.limits(item.row)]
        token = lax.broadcasted_iota(jnp.int32, scores.shape, 0) // self.sizes.heads
        limit = functools.reduce(
            lambda rest, t: jnp.where(token >= t, limits[t], rest),
            range(1, self.sizes.tokens), limits[0],
        )  # fmt: skip
        where = lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        return jnp.where(where < limit, scores, _MASKED)

    def clean(self, step, item, size):
        """Zeros for those latents of an item that no query sees: 0 x NaN is NaN."""
        slot, live = self.slot(step), self.length(item.row) - item.index * self.plan.block
        begin, end, latents = pl.cdiv(live, _LANES), size // _LANES, self.at["latent"]
        tiles = lambda part: (slot, pl.ds(part * (_LANES // _TILE), _LANES // _TILE))  # noqa: E731

        def trim(part, _):
            held = latents[tiles(part)]
            tile, row = (lax.broadcasted_iota(jnp.int32, held.shape, axis) for axis in (0, 1))
            where = part * _LANES + tile * _TILE + row
            latents[tiles(part)] = jnp.where(where < live, held, jnp.zeros_like(held))
            return 0

        def zero(part, _):
            latents[tiles(part)] = jnp.zeros((_LANES // _TILE, *latents.shape[2:]), latents.dtype)
            return 0

        lax.fori_loop(live // _LANES, jnp.minimum(begin, end), trim, 0)
        lax.fori_loop(begin, end, zero, 0)

    def correct(self, step, item):
        """Does after `score` what a partial block needs."""

        @pl.when(self.partial(item))
        def _():
            self.keep(step, item, self.masked(item, self.at["scores"][...]))
            self.clean(step, item, self.plan.block)

    # The mix half of a step.

    def weigh(self, step, size):
        """Weights of an item from its scores, added to `total` (by lane); how much others fade."""
        at = self.at
        top, fade = at["top"][lax.rem(step, 2)], at["fade"][...]
        weights = jnp.exp2(at["scores"][:, :size] - _repeat(top, size))
        parts = [weights[:, i : i + _LANES] for i in range(0, size, _LANES)]
        at["total"][...] = at["total"][...] * fade + functools.reduce(jnp.add, parts)
        return weights.astype(at["latent"].dtype), fade

    def mix(self, step, weights, fade):
        """Adds an item's latents by their weights to `mixed`."""
        at = self.at
        latent = _rows(at["latent"][self.slot(step), : weights.shape[1] // _TILE])
        mixed = self.dot(weights, latent, (((1,), (0,)), ((), ())))
        at["mixed"][...] = at["mixed"][...] * _repeat(fade, self.rank) + mixed

    def clear(self):
        for name in ("total", "mixed"):
            self.at[name][...] = jnp.zeros_like(self.at[name])

    def result(self, step):
        """(out [M R] float32, lse by lane [groups 128]) of the row in `total` and `mixed`."""
        top = self.at["top"][lax.rem(step, 2)]
        total = jnp.broadcast_to(self.at["total"][...].sum(-1, keepdims=True), top.shape)
        some = top > _MASKED / 2
        share = jnp.where(some, 1 / total, 0.0)
        out = self.at["mixed"][...] * _repeat(share, self.rank)
        out = jnp.where(_repeat(share, self.rank) > 0, out, 0.0)
        lse = jnp.where(some, (top + jnp.log2(total)) * math.log(2), -jnp.inf)
        groups = []
        for i in range(0, self.rows, _LANES):
            part = lse[i : i + _LANES]
            diagonal = lax.broadcasted_iota(jnp.int32, part.shape, 0) == lax.broadcasted_iota(
                jnp.int32, part.shape, 1
            )
            groups.append(jnp.where(diagonal, part, 0.0).sum(0, keepdims=True))
        return out, jnp.concatenate(groups)

    def finish(self, step, item, pending):
        """After a row's last item on this core, stores its result; whether a copy is under way."""
        last = item.left <= self.plan.block // _LANES
        ends = last | (step == self.count - 1)
        whole = last & ((item.number > 0) | (self.first[1] == 0)) if self.plan.cores > 1 else last

        @pl.when(ends)
        def _():
            out, lse = self.result(step)
            self.clear()

            @pl.when(whole)
            def _():
                pl.when(pending)(lambda: self.copy_out(0, "wait"))
                self.at["out"][...] = out.astype(self.at["out"].dtype)
                self.at["lse"][...] = lse
                self.copy_out(item.row, "start")

            if self.plan.cores > 1:

                @pl.when(~whole)
                def _():
                    self.at["mixed"][...] = out
                    pltpu.sync_copy(self.at["mixed"], self.hbm["part"].at[self.core])
                    self.at["mixed"][...] = jnp.zeros_like(out)
                    pl.when(pending)(lambda: self.copy_out(0, "wait"))
                    self.at["lse"][...] = lse
                    pltpu.sync_copy(self.at["lse"], self.hbm["part_lse"].at[self.core])

        return jnp.where(ends, whole, pending)

    def zero_rows(self):
        """Rows with nothing to see: zeros and -inf."""
        self.at["out"][...] = jnp.zeros_like(self.at["out"])
        self.at["lse"][...] = jnp.full_like(self.at["lse"], -jnp.inf)
        for action in ("start", "wait"):

            def visit(row, _, action=action):
                mine = lax.rem(row, self.plan.cores) == self.core
                pl.when(mine & (self.blocks(row) == 0))(lambda: self.copy_out(row, action))
                return 0

            lax.fori_loop(0, self.batch, visit, 0)

    def run(self):
        self.count, self.first = self.share()
        pl.when(self.count > 0)(self.walk)
        if not self.full:
            self.zero_rows()

    def walk(self):
        items = [self.first]
        for _ in range(self.plan.ring - 1):
            items.append(self.following(items[-1]))

        for part in range(len(self.halves())):
            self.copy_first(items[0], part, "start")
        for step in range(1, self.plan.ring - 1):
            self.prefetch(jnp.int32(step), items[step])
        self.clear()
        self.score_first(items[0])
        self.correct(0, items[0])

        def body(j, state):
            items, pending = state  # items j, j+1 ... j + ring-1
            self.prefetch(j + self.plan.ring - 1, items[-1])
            self.copy_in(j + 1, items[1], "wait")

            def both(scored, partial, mixed):
                # Weights first: they leave the buffer of scores, and no half waits for the other.
                weighed = self.weigh(j, mixed)
                self.score(j + 1, items[1], scored, partial)
                self.mix(j, *weighed)
                if partial:
                    self.clean(j + 1, items[1], scored)
                elif partial is None:
                    self.correct(j + 1, items[1])

            def one(scored, partial):
                self.sized(items[0], functools.partial(both, scored, partial))

            self.scored(items[1], one)
            pending = self.finish(j, items[0], pending)
            return [*items[1:], self.following(items[-1])], pending

        last = self.count - 1
        items, pending = lax.fori_loop(0, last, body, (items, jnp.bool_(False)))
        self.sized(items[0], lambda size: self.mix(last, *self.weigh(last, size)))
        pending = self.finish(last, items[0], pending)
        pl.when(pending)(lambda: self.copy_out(0, "wait"))

    def sized(self, item, do):
        """do(size): how many slots of an item's block to compute, known at compile time."""

        def choose(sizes):
            size, *more = sizes
            if more:
                lax.cond(item.left <= size // _LANES, lambda: do(size), lambda: choose(more))
            else:
                do(size)

        choose(self.portions)

    def scored(self, item, do):
        """do(size, partial): also whether some query does not see all of them; None: not known."""

        def whole(size):
            for partial in (False, True):
                pl.when(self.partial(item) == partial)(functools.partial(do, size, partial))

        if len(self.portions) > 1:
            block = self.plan.block
            self.sized(item, lambda size: do(size, True) if size < block else whole(size))
        else:
            do(self.plan.block, None)


def _copier(semaphore, action):
    """Starts, or waits for, a copy that signals `semaphore`."""
    return lambda source, target: getattr(
        pltpu.make_async_copy(source, target, semaphore), action
    )()


def _repeat(x, width):
    """[M 128] to [M width] by whole vector registers: no data moves."""
    return jnp.concatenate([x] * (width // _LANES), axis=1)


def _rows(x):
    """[.. /8 8 K] to [.. K]."""
    return x.reshape(-1, x.shape[-1])


def _shaped(operands):
    """jax.ShapeDtypeStruct for results that vary over the mesh axes that some operand does."""
    manual: Any = [getattr(jax.typeof(x), "manual_axis_type", None) for x in operands]
    axes = frozenset().union(*(m.varying for m in manual if m is not None))
    if not axes:
        return jax.ShapeDtypeStruct
    return functools.partial(jax.ShapeDtypeStruct, manual_axis_type=type(manual[0])(varying=axes))
