"""Times the latent-attention core on the default device; prints a Markdown table.

Device time: many calls inside one jitted loop of known length, less a loop of one, median of five,
so that dispatch does not count. Floor: the longer of 2 B S N T (2R+P) operations at the rate of an
8192^3 matmul and the bytes of cache, queries and outputs at the rate of a copy, both measured in
the same run. Every result is compared with the reference on a few rows first.
"""

import argparse
import functools
import json
import pathlib
import statistics
import time
import tomllib

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mla_jax import MLAConfig, latent_attention
from mla_jax.config import configs_dir

R, P, SCALE = 512, 64, 192**-0.5


def seconds(step, state, calls):
    """Device seconds of `state = step(state)`."""

    @functools.partial(jax.jit, static_argnames="count")
    def loop(state, count):
        return lax.fori_loop(0, count, lambda _, s: lax.optimization_barrier(step(s)), state)

    def run(count):
        jax.block_until_ready(loop(state, count))
        started = time.perf_counter()
        jax.block_until_ready(loop(state, count))
        return time.perf_counter() - started

    run(calls), run(1)
    return statistics.median((run(calls) - run(1)) / (calls - 1) for _ in range(5))


def ceilings(calls):
    """Measured copy bandwidth in bytes/s (read and written) and matmul rate in FLOP/s."""
    size = 8192 if jax.default_backend() != "cpu" else 1024
    a = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    matmul = 2 * size**3 / seconds(lambda s: (s[0], s[0] @ s[1]), (a, a), calls)
    big = jnp.zeros((2**30 if size == 8192 else 2**22,), jnp.float32)
    copy = 2 * big.nbytes / seconds(lambda s: s + 1, big, calls)
    return copy, matmul


def check(implementation, args, lengths):
    """Relative Frobenius error against the reference on the first two rows."""
    few = [a[:2] for a in (*args, lengths)]
    got, _ = latent_attention(*few[:4], lengths=few[4], scale=SCALE, implementation=implementation)
    few = [a.astype(jnp.float32) for a in few[:4]] + [few[4]]
    want, _ = latent_attention(*few[:4], lengths=few[4], scale=SCALE, implementation="reference")
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def main():
    """Runs the grid of configs/shapes/decode.toml."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--implementation", default="xla")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument("--most-bytes", type=float, default=8e9, help="skip larger caches")
    parser.add_argument("--json", type=pathlib.Path, help="write the rows here too")
    options = parser.parse_args()
    dtype = jnp.dtype(options.dtype)
    MLAConfig.from_preset("deepseek_v3")  # the widths here are its
    copy, matmul = ceilings(options.calls)
    kind = jax.devices()[0].device_kind
    print(f"{kind}, jax {jax.__version__}, {dtype.name}, {options.implementation}; measured "
          f"{copy / 1e12:.2f} TB/s copy, {matmul / 1e12:.0f} TFLOP/s matmul\n")  # fmt: skip
    print("| B, S, N, T | us | TFLOP/s | TB/s | of floor | error |\n|---|---|---|---|---|---|")
    rows = []
    grid = tomllib.loads((configs_dir() / "shapes" / "decode.toml").read_text())["shapes"]
    for batch, slots, heads, tokens in grid:
        if batch * slots * (R + P) * dtype.itemsize > options.most_bytes:
            continue
        draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape, dtype)  # noqa: E731
        args = (draw(0, batch, tokens, heads, R), draw(1, batch, tokens, heads, P),
                draw(2, batch, slots, R), draw(3, batch, slots, P))  # fmt: skip
        lengths = jnp.full((batch,), slots - 5, jnp.int32)
        error = check(options.implementation, args, lengths)

        def step(state):
            (pattern, *rest), _ = state
            out, _ = latent_attention(
                pattern, *rest, lengths=lengths, scale=SCALE,  # noqa: B023
                implementation=options.implementation,
            )  # fmt: skip
            return (pattern, *rest), out

        taken = seconds(step, (args, jnp.zeros_like(args[0])), options.calls)
        flops = 2 * batch * slots * heads * tokens * (2 * R + P)
        moved = sum(a.nbytes for a in args) + args[0].nbytes
        floor = max(flops / matmul, moved / copy)
        print(f"| {batch}, {slots}, {heads}, {tokens} | {taken * 1e6:.0f} | "
              f"{flops / taken / 1e12:.0f} | {moved / taken / 1e12:.2f} | {floor / taken:.2f} | "
              f"{error:.1e} |", flush=True)  # fmt: skip
        rows.append({"shape": [batch, slots, heads, tokens], "seconds": taken, "floor": floor,
                     "error": float(error)})  # fmt: skip
    if options.json:
        result = {"device": kind, "jax": jax.__version__, "implementation": options.implementation,
                  "dtype": dtype.name, "copy": copy, "matmul": matmul, "rows": rows}  # fmt: skip
        options.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
