"""Times attention to chosen slots (sparse attention) on a GPU, and checks it against float64.

    python benchmarks/chosen.py [--shapes 16x65536 1x131072 ...] [--prefill] [--against xla dense]

A decoding step of B rows, each with K = 2048 chosen of S slots, or with `--prefill` a chunk of 4096
tokens on 28,672 slots, for a layer of DeepSeek-V3.2 (128 heads, 512 + 64 channels, bfloat16).
Printed are microseconds of device time, the median of alternating rounds; `dense` attends to all S
slots. Every call finds another choice, so that the L2 cache holds little of it.

`--variants` compares settings of the kernel: pairs NAME=VALUE of constants of its modules, joined
by commas, as in "gathered.COMPUTING=224,gathered.COPYING=56".
"""

import argparse
import functools
import importlib
import time

import jax
import jax.numpy as jnp
import numpy as np
from loops import compare, looped  # beside this file

from mla_jax import ops
from mla_jax.ops.hopper import chosen as hopper_chosen

R, P, SCALE = 512, 64, 192**-0.5
FRESH_BYTES = 2e8  # of chosen latents before one comes again: a few times the L2 cache


def operands(batch, tokens, slots, heads, count, sets):
    """Random queries and cache, and `sets` choices of every query among the slots it sees."""
    keys = jax.random.split(jax.random.key(time.time_ns() % 2**31), 4)
    shapes = ((batch, tokens, heads, R), (batch, tokens, heads, P), (batch, slots, R),
              (batch, slots, P))  # fmt: skip
    draw = jax.jit(functools.partial(jax.random.normal, dtype=jnp.bfloat16), static_argnums=1)
    arrays = [draw(*pair) for pair in zip(keys, shapes, strict=True)]
    first = slots - tokens + 1
    limits = first + jnp.arange(tokens, dtype=jnp.int32)
    limits = jnp.broadcast_to(limits, (batch, tokens))

    @jax.jit
    def choose(seed):
        # Strides apart from a random start: no slot twice, no order, and no sort of all slots.
        key = jax.random.key(seed)
        stride = 2 * jax.random.randint(key, (batch, tokens, 1), 1, 2**14) + 1
        start = jax.random.randint(key, (batch, tokens, 1), 0, 2**14)
        line = start + stride * jnp.arange(count, dtype=jnp.int32)
        return line % 2 ** int(np.log2(first))

    return arrays, limits, [choose(i) for i in range(sets)]


def oracle(arrays, limits, chosen, places, heads):
    """float64 on the host of some (b, t) and heads: (out, lse)."""
    pattern, q_rope, latent, k_rope = arrays
    outs, lses = [], []
    for b, t in places:
        at = np.asarray(chosen[b, t])
        at = at[at < int(limits[b, t])]
        keys, ropes = (np.asarray(x[b][at], np.float64) for x in (latent, k_rope))
        scores = np.asarray(pattern[b, t][heads], np.float64) @ keys.T
        scores += np.asarray(q_rope[b, t][heads], np.float64) @ ropes.T
        top = SCALE * scores.max(1, keepdims=True)
        weights = np.exp(SCALE * scores - top)
        outs.append(weights @ keys / weights.sum(1, keepdims=True))
        lses.append(top[:, 0] + np.log(weights.sum(1)))
    return np.stack(outs), np.stack(lses)


def looping(implementation, arrays, limits, choices):
    """A compiled loop over calls, each of which takes another choice, and how many it makes."""
    attend = functools.partial(ops.latent_attention, scale=SCALE, implementation=implementation)

    def one(pattern, rest, limits, chosen):
        if chosen is None:
            return attend(pattern, *rest, lengths=limits[:, -1])
        return attend(pattern, *rest, lengths=limits, chosen=chosen)

    pattern, *rest = arrays
    return looped(one, ((pattern, rest, limits), choices), len(choices), max(4, len(choices)))


def set_variant(text):
    """Sets the constants of a variant; returns those that were there before."""
    before = []
    for pair in filter(None, text.split(",")):
        name, value = pair.split("=", 1)
        module, name = name.rsplit(".", 1)
        module = importlib.import_module(f"mla_jax.ops.hopper.{module}")
        before.append((module, name, getattr(module, name)))
        setattr(module, name, type(before[-1][2])(value) if not value.isdigit() else int(value))
    hopper_chosen._call.clear_cache()
    return before


def run(shape, options):
    """Prints a line of the table for each contestant of a shape."""
    batch, tokens, slots, heads, count = shape
    numbers = batch * tokens * count * (R + P)
    sets = int(min(16, max(1, -(-FRESH_BYTES // (2 * numbers)))))
    arrays, limits, choices = operands(*shape, sets)
    loops = {}
    for variant in ["", *options.variants]:
        before = set_variant(variant)
        loops[f"chosen {variant}"] = looping("pallas_gpu", arrays, limits, choices)
        for module, name, value in before:
            setattr(module, name, value)
        hopper_chosen._call.clear_cache()
    if "xla" in options.against:
        loops["chosen xla"] = looping("xla", arrays, limits, choices)
    if "dense" in options.against and tokens == 1:
        loops["dense"] = looping("pallas_gpu", arrays, limits, [None])
    taken = compare(loops, options.seconds, options.rounds)
    places = sorted({(0, 0), (batch // 2, tokens // 2), (batch - 1, tokens - 1)})
    some = np.array(sorted({0, heads // 2, heads - 1}))
    want = oracle(arrays, limits, choices[0], places, some)
    for name, seconds in taken.items():
        line = f"{batch}x{tokens} {slots} {heads} {count} | {name} | {1e6 * seconds:.1f} | "
        if name != "dense":
            out, lse = loops[name][0]()[0]
            got = [np.stack([np.asarray(x[b, t][some], np.float64) for b, t in places])
                   for x in (out, lse)]  # fmt: skip
            error = np.linalg.norm(got[0] - want[0]) / np.linalg.norm(want[0])
            finite = bool(jnp.isfinite(out.astype(jnp.float32)).all())
            line += (
                f"{error:.2e} {np.abs(got[1] - want[1]).max():.1e} {'' if finite else 'NOT FINITE'}"
            )
        print(line, flush=True)


def main():
    """Runs every shape that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="*", default=["16x65536", "1x131072"], help="B x S")
    parser.add_argument("--prefill", action="store_true")
    parser.add_argument("--heads", type=int, default=128)
    parser.add_argument("--count", type=int, default=2048)
    parser.add_argument("--against", nargs="*", default=[], choices=["xla", "dense"])
    parser.add_argument("--variants", nargs="*", default=[])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.1, help="of a round")
    options = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    print("B x T, S, N, K | what | us | error, of lse")
    for shape in options.shapes:
        batch, slots = map(int, shape.split("x"))
        run((batch, 1, slots, options.heads, options.count), options)
    if options.prefill:
        run((1, 4096, 28672, options.heads, options.count), options)


if __name__ == "__main__":
    main()
