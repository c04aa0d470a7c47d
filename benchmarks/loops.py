"""Device time of calls in one jitted loop, in rounds that alternate between what is compared."""

import functools
import statistics
import time

import jax
import jax.numpy as jnp
from decode import alone  # beside this file
from jax import lax

CALLS = 16  # in a turn of a loop, whose own counter takes microseconds
TURNS = 16


def looped(step, operands, copies, calls=CALLS):
    """f() and how many calls of step(*fixed, copy) it makes, none of which XLA can leave out."""

    @jax.jit
    def loop(fixed, several):
        def turn(_, state):
            fixed, _ = state
            made = []
            for i in range(calls):
                made.append(step(*fixed, several[i % copies]))
                fixed, made = lax.optimization_barrier((fixed, made))
            return fixed, made

        shapes = jax.eval_shape(step, *fixed, several[0])
        start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), [shapes] * calls)
        # A static count: with a dynamic one XLA asks the device after every turn.
        return lax.fori_loop(0, TURNS, turn, (fixed, start))[1]

    return functools.partial(loop.lower(*operands).compile(), *operands), TURNS * calls


def compare(loops, last, rounds):
    """Median seconds of a call of every loop, in rounds of `last` seconds that alternate.

    Processes side by side compile meanwhile and take turns on the device.
    """
    repeats, seconds = {}, {name: [] for name in loops}
    with alone():
        for name, (loop, _) in loops.items():
            jax.block_until_ready(loop())
            started = time.perf_counter()
            jax.block_until_ready(loop())
            repeats[name] = max(1, int(last / (time.perf_counter() - started)))
        for _ in range(rounds):
            for name, (loop, calls) in loops.items():
                started = time.perf_counter()
                for _ in range(repeats[name]):
                    result = loop()
                jax.block_until_ready(result)
                taken = time.perf_counter() - started
                seconds[name].append(taken / repeats[name] / calls)
    return {name: statistics.median(taken) for name, taken in seconds.items()}
