"""An indexer's scores of cached slots: every index key is read once, and no product is stored.

A thread block takes a few queries of one row and a range of slots. Its warpgroups work apart from
each other, each on every other tile of 64 index keys: one matrix product of these with all heads of
the queries, [64 slots, queries x heads], whose positive part is weighted and summed over the heads
in registers. A warpgroup copies the keys of a later tile into a buffer as soon as it has read it.

With one query a call waits for memory, so that several small blocks share a multiprocessor; with
four queries it waits for the tensor core, and one warpgroup's sums run beside the other's product.

Slots that a query does not see get -inf, whatever their keys hold.

Letters: B rows, T queries of a row, S slots, J index heads, I index-key channels, M pages of a row.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mla_jax.ops.hopper import mosaic as hopper_mosaic
from mla_jax.ops.hopper.kernel import source_slot, tiled
from mla_jax.ops.hopper.merge import like
from mla_jax.ops.hopper.schedule import TILE

WG = plgpu.Layout.WGMMA
_ROW, _COLUMN = WG.reduce(1), WG.reduce(0)
WIDEST = 256  # columns of a matrix product: queries times heads
PAGE = 128


class Shape(NamedTuple):
    """What one kernel is compiled for.

    `together` queries make a tile; a block takes `chunk` slots, and each of its warpgroups has
    buffers for `depth` tiles of keys.
    """

    batch: int
    queries: int
    slots: int
    heads: int
    width: int
    dtype: Any
    together: int
    chunk: int
    warpgroups: int
    depth: int

    @property
    def tiles(self) -> int:
        """Tiles of queries in a row."""
        return -(-self.queries // self.together)

    @property
    def columns(self) -> int:
        """Columns of a matrix product."""
        return self.together * self.heads


def shape_of(
    batch,
    queries,
    slots,
    heads,
    width,
    dtype,
    *,
    sms,
    together=None,
    chunk=None,
    warpgroups=None,
    depth=None,
) -> Shape:
    """How a call is cut, where that is not said: into some blocks for every multiprocessor."""
    if together is None:
        together = min(queries, max(1, WIDEST // heads))
    few = together * heads <= 128
    warpgroups = warpgroups or 2
    depth = depth or (2 if few else 3)
    if chunk is None:
        unit = warpgroups * TILE
        tiles = batch * -(-queries // together)
        # About six blocks a multiprocessor, of eight tiles for each warpgroup at least.
        pieces = max(1, 6 * sms // tiles)
        chunk = max(8 * unit, -(-slots // (pieces * unit)) * unit)
        if -(-slots // chunk) * tiles < sms:  # then every one counts
            chunk = max(2 * unit, -(-slots // (max(1, 2 * sms // tiles) * unit)) * unit)
        chunk = min(chunk, -(-slots // unit) * unit)
    return Shape(batch, queries, slots, heads, width, dtype, together, chunk, warpgroups, depth)


def score(operands, limits, table, shape: Shape):
    """float32 [B, T, S] of flat operands: queries [B T J, I], weights [B T J], keys [B S, I].

    With a table [B M] the keys are those of the pool's pages, [G 128, I]. Limits are int32 [B T].
    """
    (scores,) = launch(Tile, operands, limits, table, shape, shape.slots)
    return scores.reshape(shape.batch, shape.queries, shape.slots)


def launch(kind, operands, limits, table, shape: Shape, stride: int, **options):
    """Runs the kernel of a class; scores of a query lie `stride` behind those of the one before."""

    def body(*refs, **smem):
        kind(refs, smem, shape, stride, table is not None).run()

    total = shape.batch * shape.queries * stride
    return hopper_mosaic.kernel(
        body,
        out_type=[like(operands[0], (total,), jnp.float32)],
        scratch_types=kind.scratch(shape),
        grid=(-(-shape.slots // shape.chunk), shape.batch * shape.tiles),
        grid_names=("chunk", "tile"),
        num_threads=shape.warpgroups,
        thread_name="wg",
        kernel_name="mla_scores",
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
        **options,
    )(*operands, limits, *(() if table is None else (table,)))


class Tile:
    """One warpgroup of a block: a tile of queries and every other tile of keys of a range."""

    def __init__(self, refs, smem, shape: Shape, stride: int, paged: bool):
        self.query, self.weights, self.keys, self.limits, *refs = refs
        self.table: Any = refs.pop(0) if paged else None
        (self.out,) = refs
        self.shape, self.smem, self.stride = shape, smem, stride
        self.wg = lax.axis_index("wg")
        tile = lax.axis_index("tile")
        self.row = lax.div(tile, jnp.int32(shape.tiles))
        self.first = lax.rem(tile, jnp.int32(shape.tiles)) * shape.together
        self.start = lax.axis_index("chunk") * shape.chunk

    @classmethod
    def scratch(cls, shape: Shape) -> dict[str, Any]:
        """Queries, and the buffers of every warpgroup."""
        buffers = shape.warpgroups * shape.depth
        return {
            "query": tiled((shape.columns, shape.width), shape.dtype),
            "keys": tiled((buffers, TILE, shape.width), shape.dtype),
            "query_bar": plgpu.Barrier(),
            "keys_bar": plgpu.Barrier(num_barriers=buffers),
        }

    def run(self):
        """Scores this warpgroup's tiles of keys, then says -inf of the rest of the range."""
        shape = self.shape
        number = [self.row * shape.queries + self.query_at(i) for i in range(shape.together)]
        limits = [jnp.minimum(self.limits[n] + 0, shape.slots) for n in number]
        most = limits[0]
        for limit in limits[1:]:
            most = jnp.maximum(most, limit)
        step = shape.warpgroups * TILE
        own = self.start + self.wg * TILE
        end = jnp.minimum(self.start + shape.chunk, shape.slots)
        count = lambda end: lax.div(jnp.maximum(end - own, 0) + (step - 1), jnp.int32(step))  # noqa: E731
        live, every = count(jnp.minimum(end, most)), count(end)

        @pl.when(most > self.start)
        def _():
            @pl.when(self.wg == 0)
            def _():
                at = (self.row * shape.queries + self.first) * shape.heads
                plgpu.copy_gmem_to_smem(
                    self.query.at[pl.ds(at, shape.columns)],
                    self.smem["query"],
                    self.smem["query_bar"],
                )

            for i in range(shape.depth):
                pl.when(i < live)(lambda i=i: self.fetch(jnp.int32(i), own, step))
            weights = self.load_weights((self.row * shape.queries + self.first) * shape.heads)
            plgpu.barrier_wait(self.smem["query_bar"])

            def one(i, _):
                buffer = self.buffer(i)
                plgpu.barrier_wait(self.smem["keys_bar"].at[buffer])
                products = self.product(self.smem["keys"].at[buffer], self.smem["query"])
                self.warpgroup_sync()
                pl.when(i + shape.depth < live)(lambda: self.fetch(i + shape.depth, own, step))
                slot = own + i * step
                weighed = jnp.maximum(products, 0) * weights
                for q in range(shape.together):
                    heads = lax.slice(weighed, (0, q * shape.heads), (TILE, (q + 1) * shape.heads))
                    slots = plgpu.layout_cast(lax.broadcasted_iota(jnp.int32, (TILE,), 0), _ROW)
                    seen = slots + slot < limits[q]
                    self.put(q, slot, jnp.where(seen, heads.sum(1), -jnp.inf))
                return ()

            lax.fori_loop(0, live, one, ())

        def nothing(i, _):
            value = plgpu.layout_cast(jnp.full((TILE,), -jnp.inf, jnp.float32), _ROW)
            for q in range(shape.together):
                self.put(q, own + i * step, value)
            return ()

        lax.fori_loop(live, every, nothing, ())

    def query_at(self, i):
        """The i-th query of the tile in its row; the last again where a row has no more."""
        return jnp.minimum(self.first + i, self.shape.queries - 1)

    def buffer(self, i):
        return self.wg * self.shape.depth + lax.rem(i, jnp.int32(self.shape.depth))

    def fetch(self, i, own, step):
        """Copies the keys of this warpgroup's i-th tile."""
        slot = own + i * step
        page = None if self.table is None else self.table[self.row, lax.div(slot, jnp.int32(PAGE))]
        shape, buffer = self.shape, self.buffer(i)
        source = source_slot(self.row, slot, slot + 1, shape.slots, self.keys.shape[0], page)
        plgpu.copy_gmem_to_smem(
            self.keys.at[pl.ds(source, TILE)],
            self.smem["keys"].at[buffer],
            self.smem["keys_bar"].at[buffer],
        )

    def put(self, q, slot, value):
        """Stores the scores of 64 slots, or of as many as there are, of the tile's q-th query."""
        shape, query = self.shape, self.first + q
        at = (self.row * shape.queries + query) * self.stride + slot
        count = jnp.where(query < shape.queries, jnp.minimum(shape.slots - slot, TILE), 0)
        self.store(at, value, count)

    # -- what the interpreter does in another way

    def load_weights(self, start):
        """The weights of all columns, in every row of a tile."""
        columns = self.shape.columns
        weights = plgpu.load(
            self.weights.at[pl.ds(start, columns)], layout=_COLUMN, optimized=False
        )
        return lax.broadcast_in_dim(weights, (TILE, columns), [1])

    def product(self, keys, query):
        """The product of keys and queries, all heads side by side."""

        def run(acc):
            plgpu.wgmma(acc, keys, query.T)
            return acc[...]

        return pl.run_scoped(run, plgpu.ACC((TILE, self.shape.columns), jnp.float32))

    def store(self, at, value, count):
        hopper_mosaic.store_row_values(self.out, value, at, count)

    def warpgroup_sync(self):
        hopper_mosaic.warpgroup_sync()


def flat(query, weights, keys, shape: Shape) -> list[jax.Array]:
    """The operands of `score`, of which no copy may begin so late that it needs more than there is.

    The last tile of queries of the last row may reach past the end.
    """
    query = query.reshape(-1, query.shape[-1])
    weights = weights.astype(jnp.float32).reshape(-1)
    beyond = (shape.tiles * shape.together - shape.queries) * shape.heads
    weights = jnp.pad(weights, (0, beyond))
    query = jnp.pad(query, ((0, max(0, shape.columns - query.shape[0])), (0, 0)))
    return [query, weights, keys.reshape(-1, keys.shape[-1])]
