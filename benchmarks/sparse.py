"""Times sparse attention's choice on the default device: an indexer's scores, and the best K slots.

Every shape is checked before it is timed: scores of some rows with float64, with NaN in all slots
past a row's length, and the choice of every row with numpy's stable sort, on scores with many equal
ones, both zeros, NaN and -inf; pages must give the dense cache's scores bit for bit.

Device time is that of many calls inside one jitted loop, in rounds that alternate between what is
compared; keys rotate among copies that no L2 cache holds, scores do not, as they have just been
made where they are chosen from. `top_k` is XLA's, `counting` finds the K-th score by counting with
sixteen reductions of XLA, two bits each. The floor is what the keys' bytes take at the rate of a
copy, which is measured too.

`--whole` times what a decoding step of a sparse layer does between its projections, by whatever
backends are chosen: choice, attention to the chosen slots, and both, beside attention to all slots
of the same cache, whose plan is made beforehand as in a model. `--prefill` times `layer.prefill` of
4096 tokens on 28,672 of DeepSeek-V3.2, sparse and dense.
"""

import argparse
import functools
import json
import pathlib
import time

import decode  # beside this file
import jax
import jax.numpy as jnp
import numpy as np
import sparse_layer
from jax import lax
from loops import compare, looped

from mla_jax.cache import Dense
from mla_jax.ops import choose_slots, dispatch, hopper, xla_choice
from mla_jax.ops.hopper import indexing
from mla_jax.ops.seen import Seen

J, I = 64, 128  # noqa: E741  DeepSeek-V3.2's indexer
SHAPES = ("16,65536", "1,131072", "16,16384", "16,8192", "1,32768,256")


def by_counting(scores, count):
    """The `count` best of the last axis in the order of the slots, by XLA's reductions."""
    bits = lax.bitcast_convert_type(jnp.where(scores == 0, 0, scores), jnp.int32)
    key = jnp.where(bits < 0, ~bits, bits ^ -(2**31)).astype(jnp.uint32)
    known = jnp.zeros(scores.shape[:-1], jnp.uint32)
    for shift in range(30, -2, -2):
        steps = jnp.arange(1, 4, dtype=jnp.uint32) << shift
        enough = (key[..., None, :] >= (known[..., None] | steps)[..., None]).sum(-1) >= count
        known |= enough.sum(-1, dtype=jnp.uint32) << shift
    greater, equal = key > known[..., None], key == known[..., None]
    places = count - greater.sum(-1, keepdims=True)
    chosen = (greater | (equal & (jnp.cumsum(equal, -1) <= places))) & ~jnp.isneginf(scores)
    position = jnp.where(chosen, jnp.cumsum(chosen, -1) - 1, count)
    slots = jnp.broadcast_to(jnp.arange(scores.shape[-1], dtype=jnp.int32), scores.shape)
    none = jnp.full((*scores.shape[:-1], count), scores.shape[-1], jnp.int32)
    put = jax.vmap(lambda none, at, slots: none.at[at].set(slots, mode="drop"))
    rows = lambda x: x.reshape(-1, x.shape[-1])  # noqa: E731
    return put(*map(rows, (none, position, slots))).reshape(none.shape)


def exact(scores, limits, count):
    """By numpy: the best below the limits, ascending, then S."""
    slots = scores.shape[-1]
    chosen = np.full((*limits.shape, count), slots)
    for at in np.ndindex(limits.shape):
        row = scores[at][: limits[at]].astype(np.float64)
        row = np.where(np.isnan(row), 1e300, row)
        best = np.argsort(-row, kind="stable")[:count]
        best = np.sort(best[~np.isneginf(row[best])])
        chosen[at][: len(best)] = best
    return chosen


def ragged(rng, batch, tokens, slots):
    """Odd limits, an empty row and a full one among them."""
    limits = rng.integers(0, slots + 1, (batch, tokens))
    limits[-1, -1] = slots if batch * tokens > 1 else slots - 3
    if batch > 2:
        limits[0], limits[1] = 0, rng.integers(1, 100)
        limits[2] = slots - 1
    return limits


def check(shape, count, seed, variants):
    """Compares scores with float64 and the choice with numpy; returns the scores' error."""
    batch, slots, tokens = shape
    rng = np.random.default_rng(seed)
    limits = ragged(rng, batch, tokens, slots)
    draw = lambda i, *s: jax.random.normal(jax.random.key(100 * seed + i), s)  # noqa: E731
    query = draw(0, batch, tokens, J, I).astype(jnp.bfloat16)
    weights = draw(1, batch, tokens, J) * (J * I) ** -0.5
    dead = jnp.arange(slots)[None, :, None] >= jnp.asarray(limits.max(1))[:, None, None]
    keys = jnp.where(dead, jnp.nan, draw(2, batch, slots, I)).astype(jnp.bfloat16)
    seen = Seen(limits=jnp.asarray(limits, jnp.int32))
    device = {"sms": hopper.multiprocessors(dispatch.target.current()), "interpret": None}

    worst = 0.0
    order = rng.permutation(batch * slots // 128)
    pool = keys.reshape(-1, 128, I)[np.argsort(order)]
    table = jnp.asarray(order.reshape(batch, -1), jnp.int32)
    for name in variants["scores"]:
        tuning = tuning_of(name)
        run = functools.partial(indexing.run_scores, slots=slots, tuning=tuning, **device)
        got = np.asarray(run(query, weights, keys, seen.limits, None))
        again = np.asarray(run(query, weights, keys, seen.limits, None))
        paged = np.asarray(run(query, weights, pool, seen.limits, table))
        np.testing.assert_array_equal(got, again, f"scores {name}: two runs differ")
        np.testing.assert_array_equal(got, paged, f"scores {name}: pages differ")
        unseen = np.arange(slots) >= limits[..., None]
        np.testing.assert_array_equal(np.isneginf(got), unseen, f"scores {name}: what is seen")
        for b in sorted({0, 1 % batch, 2 % batch, batch - 1}):
            for t in sorted({0, tokens // 2, tokens - 1}):
                n = limits[b, t]
                q, w, k = (
                    np.asarray(x, np.float64) for x in (query[b, t], weights[b, t], keys[b, :n])
                )
                want = np.maximum(k @ q.T, 0) @ w
                if n:
                    worst = max(worst, np.abs(got[b, t, :n] - want).max() / np.abs(want).max())
        # 128 products of 16 bits are exact; sums of 128 and of 64 terms in float32 err by less.
        assert worst < 2e-5, f"scores {name}: relative error {worst}"
    scores = np.array(got)
    for kind in range(4):
        if kind == 1:  # many equal ones, both zeros
            scores = np.round(scores * 2) / 2
        elif kind == 2:
            scores = np.where(
                rng.random(scores.shape) < 0.7, rng.choice([0.0, -0.0], scores.shape), -1
            )
        elif kind == 3:
            scores = rng.choice(
                np.float32([np.nan, -np.inf, 1e-40, -1e-40, 3e38, 1.5]), scores.shape
            )
        scores = scores.astype(np.float32)
        scores[np.arange(slots) >= limits[..., None]] = np.nan
        want = exact(scores, limits, count)
        for name in variants["select"]:
            tuning = tuning_of(name)
            run = functools.partial(indexing.run_select, count=count, tuning=tuning, **device)
            got = np.asarray(run(jnp.asarray(scores), seen.limits))
            np.testing.assert_array_equal(got, want, f"select {name}, kind {kind}")
    return worst


def tuning_of(text):
    """Pairs of a text such as chunk=1024,depth=3."""
    pairs = (pair.split("=") for pair in text.split(",") if pair and pair != "default")
    return tuple((name, int(value)) for name, value in pairs)


def measure(shape, count, variants, last, rounds, others):
    """Seconds of scores, of the choice, and of both, by kernel and XLA."""
    batch, slots, tokens = shape
    device = {"sms": hopper.multiprocessors(dispatch.target.current()), "interpret": None}
    draw = lambda i, *s: jax.random.normal(jax.random.key(i), s)  # noqa: E731
    query = draw(0, batch, tokens, J, I).astype(jnp.bfloat16)
    weights = draw(1, batch, tokens, J) * (J * I) ** -0.5
    copies = decode.copies_of(batch * slots * I * 2)
    keys = [draw(2 + i, batch, slots, I).astype(jnp.bfloat16) for i in range(copies)]
    seen = Seen.of(jnp.full((batch,), slots, jnp.int32), batch=batch, queries=tokens, slots=slots)
    fixed = (query, weights, seen.limits)
    loops = {}
    for name in variants["scores"]:
        run = functools.partial(indexing.run_scores, slots=slots, tuning=tuning_of(name), **device)
        step = lambda q, w, limits, k, run=run: run(q, w, k, limits, None)  # noqa: E731
        loops[f"scores {name}"] = looped(step, (fixed, keys), copies)
    made = [
        indexing.run_scores(query, weights, k, seen.limits, None, slots=slots, **device)
        for k in keys[:4]
    ]
    for name in variants["select"]:
        tuning = tuning_of(name)
        run = functools.partial(indexing.run_select, count=count, tuning=tuning, **device)
        step = lambda limits, scores, run=run: run(scores, limits)  # noqa: E731
        loops[f"select {name}"] = looped(step, (fixed[2:], made), len(made))

    def chosen(q, w, limits, k, name):
        named = (("index_scores", name), ("best_slots", name))
        now = Seen(limits=limits) if tokens > 1 else Seen(limits=limits, ends=limits[:, 0])
        store = Dense({"index_key": k})
        return choose_slots(q, w, store, now, count=count, implementation=named)

    loops["both"] = looped(functools.partial(chosen, name="pallas_gpu"), (fixed, keys), copies)
    if others:
        top = lambda _, scores: lax.top_k(scores, count)  # noqa: E731
        counting = lambda _, scores: by_counting(scores, count)  # noqa: E731
        xla = lambda q, w, _, k: xla_choice.all_scores(q, w, Dense({"index_key": k}))  # noqa: E731
        loops["scores xla"] = looped(xla, (fixed, keys), copies, 2)
        loops["top_k"] = looped(top, (fixed[2:], made), len(made), 2)
        loops["counting"] = looped(counting, (fixed[2:], made), len(made), 2)
        got = np.sort(np.asarray(jax.jit(by_counting, static_argnums=1)(made[0], count)), -1)
        want = np.sort(np.asarray(jax.jit(lax.top_k, static_argnums=1)(made[0], count)[1]), -1)
        np.testing.assert_array_equal(got, want)
    return compare(loops, last, rounds)


def shape_of(text):
    """(B, S, T) of a text such as 16,65536 or 1,32768,256."""
    batch, slots, *tokens = map(int, text.split(","))
    return batch, slots, tokens[0] if tokens else 1


def print_whole(options):
    """The tables of `--whole` and `--prefill`."""
    for shape in map(shape_of, options.shapes) if options.whole else ():
        if shape[2] > 1:
            continue  # a prompt's chunk is `--prefill`'s
        taken, errors = sparse_layer.measure_step(
            shape, options.topk, options.last, options.rounds, not options.no_xla
        )
        print(
            f"\n(B, S, T) = {shape}, {sparse_layer.N} heads: apart from XLA by {errors[0]:.1e} "
            f"(chosen) and {errors[1]:.1e} (dense); sparse / dense = "
            f"{taken['sparse'] / taken['dense']:.3f}"
        )
        for name, seconds in taken.items():
            print(f"| {name} | {seconds * 1e6:.1f} us |", flush=True)
    if options.prefill:
        taken = sparse_layer.measure_prefill(4096, 28672, options.rounds)
        words = ", ".join(f"{name} {seconds * 1e3:.2f} ms" for name, seconds in taken.items())
        print(f"\nprefill of 4096 tokens on 28,672, DeepSeek-V3.2: {words}")


def main():
    """Checks and times every shape, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="B,S or B,S,T")
    parser.add_argument("--topk", type=int, default=2048)
    parser.add_argument("--scores", nargs="+", default=["default"], help="e.g. chunk=1024,depth=3")
    parser.add_argument("--select", nargs="+", default=["default"], help="e.g. blocks=4,apart=1")
    parser.add_argument("--last", type=float, default=0.02, help="seconds of a timed loop")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-check", action="store_true")
    parser.add_argument("--no-xla", action="store_true")
    parser.add_argument("--whole", action="store_true", help="a step beside dense attention's")
    parser.add_argument(
        "--prefill", action="store_true", help="a layer's prefill, sparse and dense"
    )
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args()
    variants = {"scores": options.scores, "select": options.select}
    copy, matmul = decode.ceilings(0.1)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}: copy {copy / 1e12:.2f} TB/s, "
          f"matmul {matmul / 1e12:.0f} TFLOP/s", flush=True)  # fmt: skip
    rows = []
    if options.whole or options.prefill:
        print_whole(options)
        return
    for seed, text in enumerate(options.shapes):
        shape = shape_of(text)
        batch, slots, _ = shape
        started = time.perf_counter()
        error = None if options.no_check else check(shape, options.topk, seed + 1, variants)
        checked = time.perf_counter() - started
        taken = measure(
            shape, options.topk, variants, options.last, options.rounds, not options.no_xla
        )
        floor = max(
            batch * slots * (2 * I + 4 * shape[2]) / copy,
            2 * batch * slots * shape[2] * J * I / matmul,
        )
        rows.append({"shape": shape, "floor": floor, "error": error, "seconds": taken})
        print(f"\n(B, S, T) = {shape}: floor of the scores {floor * 1e6:.1f} us, error {error}, "
              f"checked in {checked:.0f} s, timed in "
              f"{time.perf_counter() - started - checked:.0f} s")  # fmt: skip
        for name, seconds in taken.items():
            print(f"| {name} | {seconds * 1e6:.1f} us |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
