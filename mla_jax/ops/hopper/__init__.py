"""Kernels for Hopper GPUs (H100, H200) in Mosaic GPU, no CUDA source; here the absorbed form.

The expanded form is in `attention/`, and `context.py` takes that one over cached latents; what
sparse attention does before it attends, scores and the choice of slots, is in `indexing/`.

`kernel.py` is the algorithm, `merge.py` its end where parts share a row, `schedule.py` the cut of a
ragged batch into equal parts, `places.py` the way from one step of a part to the next, `mosaic.py`
what Pallas lacks, and `interpreted.py` what the kernel does instead on a CPU. It reads dense
caches, and paged ones through their table. All are forward only: derivatives are those of XLA.
Which kernel serves a call follows from its query rows, T N of each batch row, and its latents:

    latents           T N <= 16, ranks (512, 64)                  all others
    in 16 bits        `few.py`, `columns.py`                      `kernel.py`
    in fp8            `few_scaled.py`, `fragments.py`,            `scaled.py`, `dequantise.py`
                      `queries.py`
    chosen slots      `gathered.py`, `copies.py`, called by `chosen.py`

So DeepSeek-V2-Lite, of 16 heads, decodes one token a row by `few.py`, and DeepSeek-V3, of 128, by
`kernel.py`. `append.py` normalises a token's latent and writes it to the cache; `mapped.py` makes
one call of those that vmap has; `order.py` and `widen.py` serve products with weights in 8 bits.

Thread blocks wait for each other where they share a batch row, so all of them must be on the device
at once: there are at most as many as multiprocessors. The one exception is a call with more tiles
of queries than these. It has one part, so that no two blocks share a row's tile, and none waits.
Where something else keeps multiprocessors from them for seconds (a limit set by MPS, say), the wait
ends in a device error instead of a hang.

Letters: B batch, T query tokens, S cache slots, N heads, R latent width, P rope width, C groups
of 128 latent channels; a paged cache has G pages of 128 slots, of which a row may have M.
"""

import functools
import importlib
import tomllib
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mla_jax import ops, target
from mla_jax.config import configs_dir
from mla_jax.ops import guard
from mla_jax.ops.hopper import chosen
from mla_jax.ops.hopper.mapped import joined
from mla_jax.ops.hopper.schedule import BLOCK, FEW_ROWS, SLACK, STEP, TILE, Schedule, make_schedule

_RANKS, _ROPES = (128, 256, 384, 512), (0, 16, 32, 64)
_MOST_QUERIES = 1024  # of a chunk: with more, the expanded form is faster at any width
_KERNELS = {  # by whether there are few rows, and whether latents are in fp8
    (False, False): "kernel",
    (False, True): "scaled",
    (True, False): "few",
    (True, True): "few_scaled",
}
_H200_SMS = 132  # taken where the device does not say: compiling for a GPU, and the interpreter


def why_not(call, device: target.Target) -> str | None:
    """Why the kernel cannot serve `call` on `device`, or None."""
    return not_hopper(device) or unsupported(call)


def not_hopper(device: target.Target) -> str | None:
    """Why no kernel of this folder runs on `device`, or None."""
    if device.partitioned:
        return device.partitioned
    if device.interprets == "gpu":
        return None
    if device.platform != "gpu" or device.capability is None:
        return f"needs an NVIDIA GPU, this is {device}"
    if int(device.capability) != 9:
        return f"needs compute capability 9.x (Hopper), this is {device.capability}"
    if _kernel() is None:
        return "this version of jax has no Mosaic GPU"
    return None


@functools.cache
def _kernel() -> Any:
    """The kernel's module, imported where it runs: Pallas takes a third of a second to import."""
    try:
        from mla_jax.ops.hopper import kernel
    except ImportError:
        return None
    return kernel


def multiprocessors(device: target.Target) -> int:
    """How many of a device a kernel may take; an H200's where that is not known."""
    return device.cores if device.platform == "gpu" and device.cores else _H200_SMS


def unsupported(call) -> str | None:
    """Why the kernel cannot serve `call` on any device, or None."""
    (rank, rope), slots, batch = call.key_dims, call.slots, call.batch
    if not all(isinstance(size, int) for size in (batch, slots, call.queries)):
        return "needs sizes that are known when it is compiled"
    if call.soft_cap is not None:
        return "takes no soft_cap"
    if call.dtype not in ("bfloat16", "float16"):
        return f"takes bfloat16 and float16, not {call.dtype}"
    if call.encoding not in (None, "float8_e4m3fn"):
        return (
            f"takes latents in fp8 (float8_e4m3fn) or in the operands' dtype, not {call.encoding}"
        )
    if call.encoding is not None and call.dtype != "bfloat16":
        return f"takes fp8 latents with bfloat16 operands, not {call.dtype}"
    if rank not in _RANKS:
        return f"kv_lora_rank must be one of {_RANKS}, not {rank}"
    if rope not in _ROPES:
        return f"qk_rope_head_dim must be one of {_ROPES}, not {rope}"
    if not 1 <= call.heads <= 128:
        return f"takes 1 to 128 heads, not {call.heads}"
    if "chosen" in call.options:
        return chosen.unsupported(call)
    options = [name for name in call.options if name != "lengths"]
    if options:
        return f"takes lengths [B] only, not {', '.join(options)}"
    if not 1 <= call.queries <= _MOST_QUERIES:
        return f"takes 1 to {_MOST_QUERIES} query tokens, not {call.queries}"
    if slots % 8:
        return f"the cache must hold a multiple of 8 slots, not {slots}: choose its max_length so"
    if batch * slots < BLOCK:
        return f"the cache must hold at least {BLOCK} slots in all, not {batch} x {slots}"
    rows = batch * call.queries * call.heads
    if batch * slots >= 2**31 - STEP or max(rows, 2 * batch * TILE) * rank >= 2**31:
        return f"{batch} rows of {slots} slots: indices would not fit 32 bits"
    return None


def plan(seen, call, slack: int | None = None) -> Schedule | None:
    """The cut of the batch, once a pass for all layers. None for chosen slots, which need none.

    Args:
        seen, call: as `latent_attention` takes them.
        slack: as in `make_schedule`; None takes the device's from `configs/tuning`.
    """
    if seen.chosen is not None:
        return None
    rows, device = call.queries * call.heads, target.current()
    if slack is None:
        slack = tuned(device.kind, rows).get("slack", SLACK)
    sms = multiprocessors(device)
    return make_schedule(seen.row_ends, rows=rows, slots=call.slots, num_sms=sms, slack=slack)


@functools.cache
def tuned(device_kind: str, rows: int) -> dict[str, int]:
    """What `benchmarks/tune.py` found for this kind of device and T N query rows of a batch row.

    A device without a table gets {}: the defaults of `schedule.py`.
    """
    for path in sorted((configs_dir() / "tuning").glob("*.toml")):
        table = tomllib.loads(path.read_text())
        if table.get("device_kind") == device_kind:
            fitting = [entry for entry in table["latent_attention"] if rows <= entry["rows"]]
            return min(fitting, key=lambda entry: entry["rows"], default={})
    return {}


def latent_attention(queries, store, seen, call):
    """The absorbed form: see `ops.latent_attention`."""
    device = target.current()
    pattern, q_rope = queries
    if seen.chosen is not None:
        return chosen.attend(
            pattern,
            q_rope,
            store.latent,
            store.k_rope,
            seen.chosen,
            seen.limits,
            table=store.table if call.store == "paged" else None,
            scale=call.scale,
            interpret=device.interpret if device.interprets == "gpu" else None,
            sms=multiprocessors(device),
        )
    schedule: Any = plan(seen, call) if seen.plan is None else seen.plan
    out, lse = decode(
        seen.last(pattern),
        seen.last(q_rope),
        store.latent,
        store.k_rope,
        schedule,
        latent_scale=None if call.encoding is None else store.latent_scale,
        table=store.table if call.store == "paged" else None,
        scale=call.scale,
        interpret=device.interpret if device.interprets == "gpu" else None,
    )
    if seen.counts is None or call.queries == 1:
        return out, lse
    some = seen.limits[..., None] > 0  # queries that do not count were given slots all the same
    out, lse = jnp.where(some[..., None], seen.first(out), 0), seen.first(lse)
    return out, jnp.where(some, lse, -jnp.inf)


def decode(
    pattern: Float[Array, "B T N R"],
    q_rope: Float[Array, "B T N P"],
    latent: Float[Array, "B S R"] | Float[Array, "G 128 R"],
    k_rope: Float[Array, "B S P"] | Float[Array, "G 128 P"],
    schedule: Schedule,
    *,
    latent_scale: Float[Array, "B S C"] | Float[Array, "G 128 C"] | None = None,
    table: Int[Array, "B M"] | None = None,
    scale: float,
    interpret: Any = None,
) -> tuple[Float[Array, "B T N R"], Float[Array, "B T N"]]:
    """The kernel on arrays.

    Args:
        pattern, q_rope: queries.
        latent, k_rope: the cache; with a table, the pool's pages.
        schedule: the cut of the batch, whose `lengths` say what rows hold.
        latent_scale: of latents in fp8, which are then quantised as `cache.Scaled` does it: scales
            are powers of two. None where latents are in the queries' dtype.
        table: the page of every 128 slots of a row, G where it has none.
        scale: softmax temperature.
        interpret: parameters of Pallas's interpreter, which runs the kernel on a CPU. It takes
            less time with a schedule for few multiprocessors.

    Raises:
        ValueError: a schedule for other rows or tiles.
    """
    batch, tokens, heads, _ = pattern.shape
    tiles = -(-tokens * heads // TILE)
    if schedule.lengths.shape != (batch,) or schedule.arrivals.shape != (batch * tiles,):
        raise ValueError(
            f"schedule is for {schedule.lengths.shape[0]} rows and "
            f"{schedule.arrivals.size} tiles: this call has {batch} and {batch * tiles}."
        )
    arrays = (pattern, q_rope, latent, k_rope)
    if latent_scale is not None:
        arrays += (latent_scale,)
    return _attention(scale, interpret, guard.alike(*arrays), table, schedule)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(scale, interpret, arrays, table, schedule):
    @jax.custom_batching.custom_vmap
    def call(arrays, table, schedule):
        run = functools.partial(_call, scale, interpret)
        return guard.unsplit(run, "pallas_gpu", interpret)(arrays, table, schedule)

    @call.def_vmap
    def _(size, mapped, arrays, table, schedule):
        # The calls become one call of more rows, with a schedule of its own.
        of_arrays, of_table, of_schedule = mapped
        arrays, table, join = joined(size, arrays, of_arrays, table, of_table)
        queries, held = arrays[:2], arrays[2:]
        slots = held[0].shape[1] if table is None else table.shape[-1] * STEP
        tokens, heads = queries[0].shape[1:3]
        device = target.current()
        again = make_schedule(
            join(schedule.lengths, of_schedule.lengths),
            rows=tokens * heads,
            slots=slots,
            num_sms=multiprocessors(device),
            slack=tuned(device.kind, tokens * heads).get("slack", SLACK),
        )
        results = _attention(scale, interpret, (*queries, *held), table, again)
        return [x.reshape(size, -1, *x.shape[1:]) for x in results], [True, True]

    return tuple(call(arrays, table, schedule))


def _forward(scale, interpret, arrays, table, schedule):
    results = _attention(scale, interpret, arrays, table, schedule)
    return results, (arrays, table, schedule.lengths)


def _backward(scale, interpret, residuals, cotangents):
    del interpret
    arrays, table, lengths = residuals
    gradients = ops.latent_gradients(arrays, table, lengths, scale, cotangents)
    return tuple(gradients), None, None


_attention.defvjp(_forward, _backward)


# This is jitted, so that the layers of a model share one lowering, which takes seconds.
@functools.partial(jax.jit, static_argnames=("scale", "interpret"))
def _call(scale, interpret, arrays, table, schedule):
    pattern, q_rope, *held = arrays
    batch, tokens, heads, rank = pattern.shape
    slots, rope = held[1].shape[1:]
    if table is not None:
        slots = table.shape[1] * STEP
    encoded = len(held) > 2
    few = (rank, rope) == (512, 64) and tokens * heads <= FEW_ROWS
    # Copies take query rows by eights, and zeros for those of a tile that are past the array's end;
    # the interpreter copies and stores whole tiles only.
    unit = FEW_ROWS if few else TILE if interpret else 8
    rows = -(-tokens * heads // unit) * unit

    def flat(query):
        query = query.reshape(batch, tokens * heads, query.shape[-1])
        query = jnp.pad(query, ((0, 0), (0, rows - tokens * heads), (0, 0)))
        return query.reshape(batch * rows, query.shape[-1])

    operands = [flat(pattern), flat(q_rope)]
    operands += [x.reshape(x.shape[0] * x.shape[1], x.shape[2]) for x in held]
    if not rope:
        operands = operands[::2]
    shape = _kernel().Shape(
        tokens=tokens,
        heads=heads,
        slots=slots,
        rank=rank,
        rope=rope,
        rows=rows,
        tiles=-(-tokens * heads // TILE),
        parts=schedule.part.shape[0],
        scale=float(scale),
        dtype=pattern.dtype,
    )
    name = _KERNELS[few, encoded]
    if interpret:
        from mla_jax.ops.hopper import interpreted

        part = interpreted.PARTS[name]
        run = functools.partial(interpreted.decode, part=part, interpret=interpret)
    else:
        run = importlib.import_module(f"mla_jax.ops.hopper.{name}").decode
    out, lse = run(operands, schedule, table, shape, batch)
    out = out.reshape(batch, rows, rank)[:, : tokens * heads]
    lse = lse.reshape(batch, rows)[:, : tokens * heads]
    return [out.reshape(pattern.shape), lse.reshape(pattern.shape[:-1])]
