"""Finds what the Hopper kernels should do on this device; prints a table for configs/tuning.

The rates by which `form="auto"` chooses (`mla_jax.rates`) are those of DeepSeek-V3's widths on a
context of 28,672 tokens: `absorbed` of the decode kernel at 256 tokens, `expanded` of what 1024
tokens more cost the expanded form there, and `products` of what is left of it: to expand the
context, with all that goes around it.

For the decode kernel it tunes `slack`, the number of steps of 128 slots by which the longest part
of a batch may exceed the balanced cut where that keeps rows whole, since it takes time too to write
and merge the parts of a row. For batches of at most one row per part it times both cuts; slack is
the largest excess that was tried before whole rows were slower.
"""

import argparse
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
from decode import SCALE, H, P, R, V, timer

from mla_jax import ops, target
from mla_jax.cache import Dense
from mla_jax.ops import hopper
from mla_jax.ops.hopper.schedule import ROW_COST, STEP
from mla_jax.ops.seen import Seen

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


def seconds_of(run, arrays, last, rounds=5):
    """Device seconds of a program, the median of rounds of calls in a row."""
    program = jax.jit(run).lower(*arrays).compile()
    jax.block_until_ready(program(*arrays))
    taken = []
    for _ in range(rounds):
        started, count = time.perf_counter(), 0
        while count < 3 or time.perf_counter() - started < last:
            results = [program(*arrays) for _ in range(3)]
            count += 3
            jax.block_until_ready(results)
        taken.append((time.perf_counter() - started) / count)
    return statistics.median(taken)


def time_rates(last, heads=128, slots=28672, few=1024, many=2048):
    """TFLOP/s of the two forms' products, as `mla_jax.rates` has them."""
    draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape, jnp.bfloat16)  # noqa: E731
    cache, kv_b = (draw(0, 1, slots, R), draw(1, 1, slots, P)), draw(2, R, heads, H + V) / R**0.5
    store = Dense(dict(zip(("latent", "k_rope"), cache, strict=True)))
    seen = lambda tokens: Seen.of(  # noqa: E731
        jnp.full((1, tokens), slots, jnp.int32), batch=1, queries=tokens, slots=slots
    )

    def expanded(tokens):
        queries = draw(3, 1, tokens, heads, H), draw(4, 1, tokens, heads, P)
        run = lambda queries, store, kv_b: ops.context_attention(  # noqa: E731
            queries, store, seen(tokens), kv_b, scale=SCALE
        )
        return seconds_of(run, (queries, store, kv_b), last)

    tokens = 256
    queries = draw(5, 1, tokens, heads, R), draw(6, 1, tokens, heads, P)
    run = lambda queries, store: ops.attend_latents(  # noqa: E731
        queries, store, Seen.of(None, batch=1, queries=tokens, slots=slots), scale=SCALE
    )
    absorbed = seconds_of(run, (queries, store), last)
    short, long = expanded(few), expanded(many)
    pair = 2 * heads * slots * (H + P + V)
    each = (long - short) / (many - few)
    return {
        "products": 2 * slots * R * heads * (H + V) / (short - few * each) / 1e12,
        "absorbed": 2 * tokens * heads * slots * (2 * R + P) / absorbed / 1e12,
        "expanded": pair / each / 1e12,
    }


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slots", type=int, default=4096)
    parser.add_argument("--last", type=float, default=0.06, help="seconds of a timed loop")
    parser.add_argument("--rates", action="store_true", help="only those")
    parser.add_argument("--write", type=pathlib.Path, help="the table's file")
    options = parser.parse_args()
    device = jax.devices()[0]
    steps = options.slots // STEP
    text = f"# Made by benchmarks/tune.py, jax {jax.__version__}.\n"
    text += f'device_kind = "{device.device_kind}"\n'
    rates = ", ".join(f"{name} = {rate:.0f}" for name, rate in time_rates(options.last).items())
    text += f'rates = {{ {rates}, source = "times of benchmarks/tune.py" }}\n'
    if options.rates:
        print(text)
        return
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
