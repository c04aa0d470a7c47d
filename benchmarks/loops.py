"""Device time of calls in one jitted loop, in rounds that alternate between what is compared."""

import functools
import statistics
import time

import jax
import jax.numpy as jnp
from jax import lax

CALLS = 16  # in a turn of a loop, whose own counter takes microseconds


def looped(step, operands, copies, calls=CALLS):
    """f(turns) and how many calls of step(*fixed, copy) a turn has, which XLA must all make."""

    @functools.partial(jax.jit, static_argnames="turns")
    def loop(fixed, several, turns):
        def turn(_, state):
            fixed, _ = state
            made = []
            for i in range(calls):
                made.append(step(*fixed, several[i % copies]))
                fixed, made = lax.optimization_barrier((fixed, made))
            return fixed, made

        shapes = jax.eval_shape(step, *fixed, several[0])
        start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), [shapes] * calls)
        return lax.fori_loop(0, turns, turn, (fixed, start))[1]

    return functools.partial(loop, *operands), calls


def compare(loops, last, rounds):
    """Median seconds of a call of every loop, in rounds that alternate."""
    turns, seconds = {}, {name: [] for name in loops}
    for name, (loop, _) in loops.items():
        jax.block_until_ready(loop(turns=2))
        started = time.perf_counter()
        jax.block_until_ready(loop(turns=2))
        one = (time.perf_counter() - started) / 2
        turns[name] = max(2, min(2000, int(last / one)))
        jax.block_until_ready(loop(turns=turns[name]))
    for _ in range(rounds):
        for name, (loop, calls) in loops.items():
            started = time.perf_counter()
            jax.block_until_ready(loop(turns=turns[name]))
            seconds[name].append((time.perf_counter() - started) / turns[name] / calls)
    return {name: statistics.median(taken) for name, taken in seconds.items()}
