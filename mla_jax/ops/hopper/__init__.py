"""Absorbed decode on Hopper GPUs (H100, H200): one Pallas kernel in Mosaic GPU, no CUDA source.

`kernel.py` is the kernel, `merge.py` its end where parts share a row, `schedule.py` the cut of a
ragged batch into equal parts, `mosaic.py` what Pallas lacks. (`grouped.py` is another kernel, for
experts.) Forward only: derivatives are those of the XLA backend.

The kernel's thread blocks wait for each other where they share a batch row, so they must all be on
the device at once: their number never exceeds the multiprocessors that the device reports. Where
something else keeps multiprocessors from them for seconds (a limit set by MPS, say), the wait ends
in a device error instead of a hang.

Letters: B batch, T query tokens, S cache slots, N heads, R latent width, P rope width.
"""

import functools
import tomllib
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mla_jax.config import configs_dir
from mla_jax.ops import xla
from mla_jax.ops.hopper.schedule import BLOCK, SLACK, STEP, TILE, Schedule, make_schedule

try:
    from mla_jax.ops.hopper import kernel
except ImportError:  # a jax without Mosaic GPU
    kernel = None
_kernel: Any = kernel

_RANKS, _ROPES = (128, 256, 384, 512), (0, 16, 32, 64)
_H200_SMS = 132  # where no GPU is there to ask: compiling for one, and the interpreter


def why_not(spec, device) -> str | None:
    """Why the kernel cannot serve `spec` on `device`, or None."""
    return not_hopper(device) or unsupported(spec)


def not_hopper(device) -> str | None:
    """Why no kernel of this folder runs on `device`, or None."""
    if device.platform != "gpu" or "NVIDIA" not in device.device_kind.upper():
        return f"needs an NVIDIA GPU, this is {device.device_kind} ({device.platform})"
    capability = str(getattr(device, "compute_capability", "0"))
    if not capability.startswith("9."):
        return f"needs compute capability 9.x (Hopper), this is {capability}"
    if _kernel is None:
        return "this version of jax has no Mosaic GPU"
    return None


def multiprocessors(device) -> int:
    """How many of a device a kernel may take; an H200's where only the device's shape is known."""
    known = getattr(device, "core_count", None) if device.platform == "gpu" else None
    return known or _H200_SMS


def unsupported(spec) -> str | None:
    """Why the kernel cannot serve `spec` on any device, or None."""
    (rank, rope), slots, batch = spec.key_dims, spec.slots, spec.batch
    if spec.dtype not in ("bfloat16", "float16"):
        return f"takes bfloat16 and float16, not {spec.dtype}"
    options = [name for name in spec.options if name != "lengths"]
    if options:
        return f"takes lengths [B] only, not {', '.join(options)}"
    if rank not in _RANKS:
        return f"kv_lora_rank must be one of {_RANKS}, not {rank}"
    if rope not in _ROPES:
        return f"qk_rope_head_dim must be one of {_ROPES}, not {rope}"
    if not 1 <= spec.queries <= 8:
        return f"takes 1 to 8 query tokens, not {spec.queries}"
    if not 1 <= spec.heads <= 128:
        return f"takes 1 to 128 heads, not {spec.heads}"
    if slots % 8:
        return f"the cache must hold a multiple of 8 slots, not {slots}: choose its max_length so"
    if batch * slots < BLOCK:
        return f"the cache must hold at least {BLOCK} slots in all, not {batch} x {slots}"
    rows = batch * spec.queries * spec.heads
    if batch * slots >= 2**31 - STEP or max(rows, 2 * batch * TILE) * rank >= 2**31:
        return f"{batch} rows of {slots} slots: indices would not fit 32 bits"
    return None


def decode_schedule(
    lengths: Int[Array, "B"], *, queries: int, heads: int, slots: int, slack: int | None = None
) -> Schedule:
    """The cut of the batch for `latent_attention(..., schedule=)`: once per step for all layers.

    Args:
        lengths: slots in use, the T new tokens included.
        queries, heads, slots: T, N, S of the calls.
        slack: see `make_schedule`; None takes the device's from `configs/tuning`.
    """
    rows, device = queries * heads, _device()
    if slack is None:
        slack = tuned(device.device_kind, rows).get("slack", SLACK)
    sms = multiprocessors(device)
    return make_schedule(lengths, rows=rows, slots=slots, num_sms=sms, slack=slack)


@functools.cache
def tuned(device_kind: str, rows: int) -> dict[str, int]:
    """What `benchmarks/tune.py` found for this kind of device and T N query rows of a batch row.

    A device without a table gets {}: the defaults of `schedule.py`, which are the H200's.
    """
    for path in sorted((configs_dir() / "tuning").glob("*.toml")):
        table = tomllib.loads(path.read_text())
        if table.get("device_kind") == device_kind:
            fitting = [entry for entry in table["latent_attention"] if rows <= entry["rows"]]
            return min(fitting, key=lambda entry: entry["rows"], default={})
    return {}


def latent_attention(
    pattern: Float[Array, "B T N R"],
    q_rope: Float[Array, "B T N P"],
    latent: Float[Array, "B S R"],
    k_rope: Float[Array, "B S P"],
    *,
    lengths: Int[Array, "B"] | None,
    scale: float,
    soft_cap=None,
    window=None,
    mask=None,
    segment_ids=None,
    precision=None,
    schedule: Schedule | None = None,
    interpret: Any = None,
) -> tuple[Float[Array, "B T N R"], Float[Array, "B T N"]]:
    """The absorbed form: see `dispatch.latent_attention`.

    `schedule` is `decode_schedule` of the same lengths and shapes; None makes it here. `interpret`
    runs the kernel on a CPU: a schedule for few multiprocessors keeps that short.
    """
    del soft_cap, window, mask, segment_ids, precision  # `why_not` keeps the options unset
    batch, tokens, heads, _ = pattern.shape
    slots = latent.shape[1]
    if lengths is None:
        lengths = jnp.full((batch,), slots, jnp.int32)
    if schedule is not None:
        tiles = -(-tokens * heads // TILE)
        if schedule.lengths.shape != (batch,) or schedule.arrivals.shape != (batch * tiles,):
            raise ValueError(
                f"schedule is for {schedule.lengths.shape[0]} rows and "
                f"{schedule.arrivals.size} tiles: this call has {batch} and {batch * tiles}."
            )
    arrays = (pattern, q_rope, latent, k_rope)
    return _attention(scale, interpret, arrays, lengths, schedule)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(scale, interpret, arrays, lengths, schedule):
    @jax.custom_batching.custom_vmap
    def call(arrays, lengths, schedule):
        return _call(scale, interpret, arrays, lengths, schedule)

    @call.def_vmap
    def _(size, mapped, arrays, lengths, schedule):
        # More rows of one batch, with a schedule of their own.
        del schedule
        spread = lambda x, is_mapped: (  # noqa: E731
            x if is_mapped else jnp.broadcast_to(x, (size, *x.shape))
        )
        join = lambda x, is_mapped: spread(x, is_mapped).reshape(-1, *x.shape[1 + is_mapped :])  # noqa: E731
        arrays = jax.tree.map(join, tuple(arrays), tuple(mapped[0]))
        results = _attention(scale, interpret, arrays, join(lengths, mapped[1]), None)
        return [x.reshape(size, -1, *x.shape[1:]) for x in results], [True, True]

    return tuple(call(arrays, lengths, schedule))


def _forward(scale, interpret, arrays, lengths, schedule):
    return _attention(scale, interpret, arrays, lengths, schedule), (arrays, lengths)


def _backward(scale, interpret, residuals, cotangents):
    del interpret
    arrays, lengths = residuals
    attend = lambda *arrays: xla.latent_attention(*arrays, lengths=lengths, scale=scale)  # noqa: E731
    _, backward = jax.vjp(attend, *arrays)
    return tuple(backward(cotangents)), None, None


_attention.defvjp(_forward, _backward)


# Jitted here too, so that the layers of a model share one lowering, which takes seconds.
@functools.partial(jax.jit, static_argnames=("scale", "interpret"))
def _call(scale, interpret, arrays, lengths, schedule):
    pattern, q_rope, latent, k_rope = arrays
    batch, tokens, heads, rank = pattern.shape
    slots, rope = k_rope.shape[1:]
    native = not interpret
    if schedule is None:
        schedule = decode_schedule(lengths, queries=tokens, heads=heads, slots=slots)
    # Copies want query rows in eights; the interpreter has no stores of part of a tile.
    unit = 8 if native else TILE
    rows = -(-tokens * heads // unit) * unit

    def flat(query):
        query = query.reshape(batch, tokens * heads, query.shape[-1])
        query = jnp.pad(query, ((0, 0), (0, rows - tokens * heads), (0, 0)))
        query = query.reshape(batch * rows, query.shape[-1])
        return jnp.pad(query, ((0, max(0, TILE - batch * rows)), (0, 0)))

    operands = [flat(pattern), flat(q_rope)]
    operands += [x.reshape(batch * slots, x.shape[-1]) for x in (latent, k_rope)]
    if not rope:
        operands = operands[::2]
    shape = _kernel.Shape(
        tokens=tokens, heads=heads, slots=slots, rank=rank, rope=rope, rows=rows,
        tiles=-(-tokens * heads // TILE), parts=schedule.part.shape[0],
        scale=float(scale), dtype=pattern.dtype, native=native,
    )  # fmt: skip
    out, lse = _kernel.decode(operands, schedule, shape, batch, interpret or None)
    out = out.reshape(batch, rows, rank)[:, : tokens * heads]
    lse = lse.reshape(batch, rows)[:, : tokens * heads]
    return [out.reshape(pattern.shape), lse.reshape(pattern.shape[:-1])]


def _device() -> Any:
    device = jax.config.jax_default_device
    return jax.devices(device)[0] if device is None or isinstance(device, str) else device
