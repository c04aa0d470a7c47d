"""Finds what the Hopper decode kernel should do on this device; prints a table for configs/tuning.

It tunes `slack`, the number of steps of 128 slots by which the longest part of a batch may exceed
the balanced cut where that keeps rows whole, since it takes time too to write and merge the parts
of a row. For batches of at most one row per part it times both cuts; slack is the largest excess
that was tried before whole rows were slower.
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
from decode import SCALE, P, R, timer

from mla_jax import target
from mla_jax.ops import hopper
from mla_jax.ops.hopper.schedule import ROW_COST, STEP

ROWS = {64: (64, 1), 1024: (128, 1)}  # up to so many query rows: the N and T that are timed
EXCESSES = (2, 4, 6, 8, 10, 12, 16)


def time_cuts(shape, slacks, last):
    """Seconds of a call with each slack."""
    batch, slots, heads, tokens = shape
    draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape, jnp.bfloat16)  # noqa: E731
    arrays = (draw(0, batch, tokens, heads, R), draw(1, batch, tokens, heads, P),
              draw(2, batch, slots, R), draw(3, batch, slots, P))  # fmt: skip
    lengths = jnp.full((batch,), slots, jnp.int32)
    sms = hopper.multiprocessors(target.current())
    schedules = [
        hopper.make_schedule(lengths, rows=tokens * heads, slots=slots, num_sms=sms, slack=slack)
        for slack in slacks
    ]

    def step(state):
        arrays, schedule, _ = state
        results = hopper.decode(*arrays, schedule, scale=SCALE)
        return arrays, schedule, results

    start = (arrays[0], jnp.zeros(arrays[0].shape[:-1], jnp.float32))
    measured = timer(step, 1e-4, last)
    return [measured((arrays, schedule, start))[0] for schedule in schedules]


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slots", type=int, default=4096)
    parser.add_argument("--last", type=float, default=0.06, help="seconds of a timed loop")
    parser.add_argument("--write", type=pathlib.Path, help="the table's file")
    options = parser.parse_args()
    device = jax.devices()[0]
    steps = options.slots // STEP
    text = f"# Made by benchmarks/tune.py, jax {jax.__version__}.\n"
    text += f'device_kind = "{device.device_kind}"\n'
    for rows, (heads, tokens) in ROWS.items():
        parts = device.core_count // -(-heads * tokens // hopper.TILE)
        slack = 0
        for excess in EXCESSES:
            batch = parts * (steps - excess) // (steps + ROW_COST)  # or a step more
            if batch < 1:
                break
            excess = steps - -(-batch * (steps + ROW_COST) // parts)
            shape = (batch, options.slots, heads, tokens)
            whole, cut = time_cuts(shape, (steps, 0), options.last)
            text += (
                f"# {shape}: whole {whole * 1e6:.1f} us, {excess} steps fewer {cut * 1e6:.1f} us\n"
            )
            if whole > cut:
                break
            slack = excess
        text += f"[[latent_attention]]\nrows = {rows}\nslack = {slack}\n"
    print(text)
    if options.write:
        options.write.write_text(text)


if __name__ == "__main__":
    main()
