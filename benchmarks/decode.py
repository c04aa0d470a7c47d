"""Times the latent-attention core on the default device; prints a Markdown table.

Device time is that of many calls inside one jitted loop of static length, less an empty call, the
median of five, so that dispatch does not count; small shapes rotate among copies of the cache, so
that the L2 cache does not count either. Loops of shapes and ceilings last equally long, as a chip
at its power limit lowers its clock within milliseconds. Processes of this script that run side by
side compile beside each other and take turns on the device. The floor is the longer of
2 B S N T (2R+P) operations at the rate of an 8192^3 matmul and the bytes of cache, queries and
outputs at the rate of a copy, both measured in the same run. Every result is compared with float64
on a few rows and heads.

`--implementation` may be several backends of `latent_attention`, and peers: `expanded`, the same
attention with per-head keys and values through cuDNN, where they fit, and `flash_mla`, DeepSeek's
CUDA kernel, where its package and torch are installed (leave them memory:
XLA_PYTHON_CLIENT_MEM_FRACTION=0.6). The cut of the batch that a kernel may
want is made once per step for all layers, so it is timed apart ("cut").

`--cache-dtype` quantises the latents to fp8 or int8 with scales. Floors and rates then count these
bytes, and errors are those of attention to the numbers that are held.

`--pages` compares each implementation with itself on a paged cache: the same rows on pages in
random order, in rounds that alternate between the two, and whether both results are the same.
"""

import argparse
import contextlib
import fcntl
import functools
import json
import pathlib
import re
import statistics
import tempfile
import time
import tomllib

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mla_jax import ops
from mla_jax.cache import PAGE, Dense, Paged, Scaled
from mla_jax.cache.scaled import ENCODINGS, GROUP, dequantise, quantise
from mla_jax.config import configs_dir
from mla_jax.ops import dispatch
from mla_jax.ops.seen import Seen

R, P, H, V, SCALE = 512, 64, 128, 128, 192**-0.5
CACHED_BYTES = 2e8  # rotate among copies up to here: a few times the L2
LOCK = pathlib.Path(tempfile.gettempdir()) / "benchmark_decode.lock"
CALLS = 4  # at least, in a turn of the loop, whose own counter takes microseconds


@contextlib.contextmanager
def alone():
    """Keeps the device from other processes that time here, which compile meanwhile."""
    with LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def timer(step, guess, last):
    """f(state): device seconds of `state = step(state)`, and the last states of two runs.

    `guess` is about what a step takes, `last` what a timed loop should. f.compile(state) makes the
    program that f(state) runs.
    """
    calls = max(5, min(5000, int(last / guess)))

    @jax.jit
    def loop(state):
        # A static count: with a dynamic one XLA asks the device after every turn.
        return lax.fori_loop(0, calls, lambda _, s: lax.optimization_barrier(step(s)), state)

    empty = jax.jit(lambda state: jax.tree.leaves(state)[-1])
    made = {}

    def compiled(state):
        kind = str(jax.tree.map(jax.typeof, state))
        if kind not in made:
            made[kind] = tuple(program.lower(state).compile() for program in (loop, empty))
        return made[kind]

    def run(f, state):
        started = time.perf_counter()
        result = jax.block_until_ready(f(state))
        return time.perf_counter() - started, result

    def measured(state, rounds=5, lock=True):
        loop, empty = compiled(state)
        with alone() if lock else contextlib.nullcontext():
            run(empty, state)
            results = [run(loop, state)[1] for _ in range(2)]
            taken = (run(loop, state)[0] - run(empty, state)[0] for _ in range(rounds))
            return statistics.median(taken) / calls, results

    measured.compile = compiled
    return measured


def ceilings(last):
    """Measured copy bandwidth in bytes/s (read and written) and matmul rate in FLOP/s."""
    size = 8192 if jax.default_backend() != "cpu" else 1024
    a = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    narrow = a * size**-0.5  # products keep their size
    guess = 2 * size**3 / (7e14 if size == 8192 else 1e12)
    taken, _ = timer(lambda s: (s[0], s[1] @ s[0]), guess, last)((narrow, a))
    matmul = 2 * size**3 / taken
    # Not in a loop, which may copy its state once more; long enough for dispatch not to count.
    big = jnp.ones((2**30 if size == 8192 else 2**22,), jnp.float32)
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    big = jax.block_until_ready(add(big))
    rates, calls = [], max(3, int(last / 2e-3))
    with alone():
        for _ in range(5):
            started = time.perf_counter()
            for _ in range(calls):
                big = add(big)
            jax.block_until_ready(big)
            rates.append(2 * big.nbytes * calls / (time.perf_counter() - started))
    return statistics.median(rates), matmul


def oracle(arrays, lengths, rows, heads):
    """float64 on the host, some batch rows and heads: (out, lse)."""
    pattern, q_rope, latent, k_rope = arrays
    outs, lses = [], []
    for b in rows:
        keys, ropes = (np.asarray(x[b], np.float64) for x in (latent, k_rope))
        for t in range(pattern.shape[1]):
            n = int(lengths[b]) - (pattern.shape[1] - 1 - t)
            scores = np.asarray(pattern[b, t][heads], np.float64) @ keys[:n].T
            scores += np.asarray(q_rope[b, t][heads], np.float64) @ ropes[:n].T
            top = SCALE * scores.max(1, keepdims=True)
            weights = np.exp(SCALE * scores - top)
            outs.append(weights @ keys[:n] / weights.sum(1, keepdims=True))
            lses.append(top[:, 0] + np.log(weights.sum(1)))
    return np.stack(outs), np.stack(lses)


def copies_of(one):
    """How many caches of this many bytes are rotated."""
    return int(min(8, max(1, -(-CACHED_BYTES // one))))


def few(batch, heads):
    """The batch rows and the heads that are compared with the oracle."""
    return sorted({0, batch // 2, batch - 1}), np.array(sorted({0, heads // 2, heads - 1}))


def errors(out, lse, want):
    """Relative error of the output and the largest of lse, of arrays cut to `few`."""
    out_error = np.linalg.norm(out.reshape(want[0].shape) - want[0]) / np.linalg.norm(want[0])
    lse_error = np.abs(lse.reshape(want[1].shape) - want[1]).max()
    return {"error": float(out_error), "lse_error": float(lse_error)}


def drawn_store(key, batch, slots, dtype, cache_dtype=None):
    """A cache of random numbers; with a cache dtype its latents have scales."""
    keys = jax.random.split(jax.random.key(key))
    widths = {"latent": R, "k_rope": P}
    arrays = {
        name: jax.random.normal(k, (batch, slots, width), dtype)
        for k, (name, width) in zip(keys, widths.items(), strict=True)
    }
    if cache_dtype is None:
        return Dense(arrays)
    latent, scale = jax.jit(quantise, static_argnums=1)(arrays["latent"], cache_dtype)
    return Scaled(arrays | {"latent": latent, "latent_scale": scale})


def latent_case(implementation, queries, store, lengths):
    """run(queries, store, seen), what makes `seen` of lengths, and whether the backend plans."""
    (batch, tokens), slots = queries[0].shape[:2], store.slots

    def cut(lengths):
        seen = Seen.of(lengths, batch=batch, queries=tokens, slots=slots)
        call = ops.latent_call(queries, store, seen, SCALE)
        return dispatch.plan(seen, call, implementation)

    def run(queries, store, seen):
        return ops.attend_latents(queries, store, seen, scale=SCALE, implementation=implementation)

    return run, cut, jax.eval_shape(cut, lengths).plan is not None


def held_bytes(dtype, cache_dtype=None):
    """Bytes of a slot."""
    if cache_dtype is None:
        return dtype.itemsize * (R + P)
    return R + 4 * (R // GROUP) + dtype.itemsize * P


def measure(implementation, shape, lengths, dtype, guess, last, cache_dtype=None):
    """Seconds of a call and of the cut, and the errors of the result."""
    batch, slots, heads, tokens = shape
    draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape, dtype)  # noqa: E731
    queries = (draw(0, batch, tokens, heads, R), draw(1, batch, tokens, heads, P))
    copies = copies_of(batch * slots * held_bytes(dtype, cache_dtype))
    caches = [drawn_store(2 + i, batch, slots, dtype, cache_dtype) for i in range(copies)]
    limits = jnp.asarray(lengths, jnp.int32)
    run, make, plans = latent_case(implementation, queries, caches[0], limits)
    seen = jax.jit(make)(limits)
    results = tuple(jnp.full(x.shape, jnp.nan, x.dtype) for x in jax.eval_shape(
        run, queries, caches[0], seen))  # fmt: skip

    def step(state):
        # As many results as calls: none is computed in vain, or only copied.
        queries, caches, results = state
        results = []
        for cache in caches * (calls // copies):
            results.append(run(queries, cache, seen))
            queries, results = lax.optimization_barrier((queries, results))
        return queries, caches, results

    calls = copies * -(-CALLS // copies)
    start = (queries, caches, [results] * calls)
    taken, (state, again) = timer(step, guess * calls, last)(start)
    pairs = zip(jax.tree.leaves(state[2]), jax.tree.leaves(again[2]), strict=True)
    same = all(bool((x == y).all()) for x, y in pairs)
    rows, some = few(batch, heads)
    want = oracle((*queries, *whole(caches[0], dtype)), lengths, rows, some)
    out, lse = (np.asarray(x[np.array(rows)], np.float64)[:, :, some] for x in state[2][0])
    cut = None
    if plans:

        def anew(state):
            limits, _ = state
            cuts = []
            for _ in range(CALLS):
                cuts.append(make(limits).plan)
                limits, cuts = lax.optimization_barrier((limits, cuts))
            return limits, cuts

        cut = timer(anew, CALLS * 1e-5, last)((limits, [seen.plan] * CALLS))[0] / CALLS
    compared = errors(out, lse, want)
    return {"seconds": taken / calls, "cut": cut, "repeatable": same, **compared}


def whole(store, dtype):
    """The latents that a store stands for, and its rotary keys."""
    latent, k_rope = store.arrays["latent"], store.arrays["k_rope"]
    if store.encoding is not None:
        latent = dequantise(latent, store.arrays["latent_scale"], dtype)
    return latent, k_rope


def paginated(store, lengths, key):
    """Rows [B S ...] as a pool of pages in random order [B S / 128, 128 ...], with their table.

    Slots past a row's length hold what they did; the table names no page past the row's last.
    """
    batch, slots = store.arrays["latent"].shape[:2]
    count = batch * slots // PAGE
    order = jax.random.permutation(key, count).astype(jnp.int32)
    place = jnp.argsort(order)  # of each page of the pool, which page of the rows it is
    pool = {n: x.reshape(count, PAGE, x.shape[2])[place] for n, x in store.arrays.items()}
    table = order.reshape(batch, slots // PAGE)
    held = jnp.arange(slots // PAGE)[None] * PAGE < jnp.asarray(lengths)[:, None]
    return Paged(type(store)(pool), jnp.where(held, table, count))


def compare_pages(implementation, shape, lengths, dtype, guess, last, cache_dtype=None, rounds=10):
    """Seconds of a call on a dense and on a paged cache, in alternating rounds, and their ratio.

    The ratio is the median of those of the rounds, each of which lasts as long as a clock needs to
    settle.
    """
    batch, slots, heads, tokens = shape
    draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape, dtype)  # noqa: E731
    queries = (draw(0, batch, tokens, heads, R), draw(1, batch, tokens, heads, P))
    copies = copies_of(batch * slots * held_bytes(dtype, cache_dtype))
    dense = [drawn_store(2 + i, batch, slots, dtype, cache_dtype) for i in range(copies)]
    paged = [paginated(x, lengths, jax.random.key(200 + i)) for i, x in enumerate(dense)]
    seen = Seen.of(jnp.asarray(lengths, jnp.int32), batch=batch, queries=tokens, slots=slots)
    call = ops.latent_call(queries, dense[0], seen, SCALE)
    seen = jax.jit(lambda seen: dispatch.plan(seen, call, implementation))(seen)
    calls = copies * -(-CALLS // copies)

    def step(state):
        queries, stores, seen, results = state
        results = []
        for store in stores * (calls // copies):
            results.append(
                ops.attend_latents(queries, store, seen, scale=SCALE, implementation=implementation)
            )
            queries, results = lax.optimization_barrier((queries, results))
        return queries, stores, seen, results

    one = jax.eval_shape(lambda: ops.attend_latents(
        queries, dense[0], seen, scale=SCALE, implementation=implementation))  # fmt: skip
    zeros = [tuple(jnp.zeros(x.shape, x.dtype) for x in one) for _ in range(calls)]
    measured = timer(step, guess * calls, last)
    for stores in (dense, paged):
        measured.compile((queries, stores, seen, zeros))
    taken, results = {"dense": [], "pages": []}, {}
    with alone():
        for _ in range(rounds):
            for name, stores in (("dense", dense), ("pages", paged)):
                seconds, again = measured((queries, stores, seen, zeros), rounds=1, lock=False)
                taken[name].append(seconds / calls)
                results[name] = again[-1][-1]
    pairs = zip(*(jax.tree.leaves(results[name]) for name in taken), strict=True)
    return {
        "dense": statistics.median(taken["dense"]),
        "pages": statistics.median(taken["pages"]),
        "ratio": statistics.median(
            pages / dense for dense, pages in zip(*taken.values(), strict=True)
        ),
        "same": all(bool((x == y).all()) for x, y in pairs),
    }


def print_pages(options, dtype, copy, matmul):
    """The table of `--pages`; returns its rows."""
    print("| B, S, N, T | implementation | dense us | pages us | ratio | same result |\n"
          "|---|---|---|---|---|---|")  # fmt: skip
    rows = []
    for name, shape, lengths in wanted(options, dtype):
        floor = floor_of(shape, lengths, dtype, copy, matmul, options.cache_dtype)[0]
        for implementation in options.implementation:
            row = compare_pages(
                implementation, shape, lengths, dtype, floor, options.last, options.cache_dtype
            )
            rows.append({"name": name, "implementation": implementation, **row})
            print(f"| {name} | {implementation} | {row['dense'] * 1e6:.1f} | "
                  f"{row['pages'] * 1e6:.1f} | {row['ratio']:.3f} | {row['same']} |",
                  flush=True)  # fmt: skip
    return rows


def floor_of(shape, lengths, dtype, copy, matmul, cache_dtype=None):
    """The least seconds that a call can take, its operations and the bytes that it moves."""
    batch, _, heads, tokens = shape
    used = int(lengths.sum())
    flops = 2 * used * heads * tokens * (2 * R + P)
    moved = used * held_bytes(dtype, cache_dtype)
    moved += dtype.itemsize * batch * tokens * heads * (2 * R + P)
    return max(flops / matmul, moved / copy), flops, moved


def measure_expanded(shape, lengths, dtype, guess, last):
    """The same attention on per-head keys and values, already expanded, through cuDNN."""
    batch, slots, heads, tokens = shape
    draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape, dtype)  # noqa: E731
    query, key = draw(0, batch, tokens, heads, H + P), draw(1, batch, slots, heads, H + P)
    value = jnp.pad(draw(2, batch, slots, heads, V), [(0, 0)] * 3 + [(0, H + P - V)])
    limits = jnp.asarray(lengths, jnp.int32)

    def step(state):
        query, key, value, _ = state
        out = jax.nn.dot_product_attention(
            query, key, value, scale=SCALE, key_value_seq_lengths=limits, implementation="cudnn"
        )
        return query, key, value, out

    taken, _ = timer(step, 20 * guess, last)((query, key, value, query))
    return {"seconds": taken, "cut": None, "error": None, "lse_error": None, "repeatable": None}


def measure_flash_mla(shape, lengths, dtype, guess, last):
    """DeepSeek's CUDA kernel, where torch and its package `flash_mla` are installed: Hopper only.

    Its cache is one paged array; the pages of a row are in order here. Calls are replayed from a
    CUDA graph, so that dispatch does not count.
    """
    import torch
    from flash_mla import flash_mla_with_kvcache, get_mla_metadata

    batch, slots, heads, tokens = shape
    page = 64
    pages = -(-slots // page)
    kind = getattr(torch, dtype.name)
    draw = functools.partial(torch.randn, dtype=kind, device="cuda")
    query = draw(batch, tokens, heads, R + P)
    one = batch * pages * page * (R + P) * dtype.itemsize
    copies = copies_of(one)
    caches = [draw(batch * pages, page, 1, R + P) for _ in range(copies)]
    table = torch.arange(batch * pages, dtype=torch.int32, device="cuda").view(batch, pages)
    limits = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    plan = get_mla_metadata(limits, tokens * heads, 1)

    def run(cache):
        return flash_mla_with_kvcache(
            query, cache, table, limits, R, *plan, softmax_scale=SCALE, causal=tokens > 1
        )

    out, lse = run(caches[0])
    calls = max(1, min(500, int(last / guess / copies)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for cache in caches * calls:
            run(cache)
    taken = []
    for _ in range(6):
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        started.record()
        graph.replay()
        ended.record()
        torch.cuda.synchronize()
        taken.append(started.elapsed_time(ended) * 1e-3 / (calls * copies))
    rows, some = few(batch, heads)
    host = lambda x: x.float().cpu().numpy()  # noqa: E731
    cache = host(caches[0].view(batch, pages * page, R + P)[rows])
    queries = host(query[rows])
    arrays = (queries[..., :R], queries[..., R:], cache[..., :R], cache[..., R:])
    want = oracle(arrays, np.asarray(lengths)[rows], range(len(rows)), some)
    out, lse = host(out[rows])[:, :, some], host(lse[rows]).swapaxes(1, 2)[:, :, some]
    compared = errors(out, lse, want)
    return {"seconds": statistics.median(taken[1:]), "cut": None, "repeatable": None, **compared}


PEERS = {"expanded": measure_expanded, "flash_mla": measure_flash_mla}


def draw_plot(result, path):
    """Fraction of the floor by shape, one bar per implementation."""
    import matplotlib.pyplot as plt  # of the extra `notebooks`

    names = list(dict.fromkeys(row["implementation"] for row in result["rows"]))
    shapes = list(dict.fromkeys(row["name"] for row in result["rows"]))
    figure, axes = plt.subplots(figsize=(10, 4.5), layout="constrained")
    for i, name in enumerate(names):
        rows = {row["name"]: row["fraction"] for row in result["rows"]
                if row["implementation"] == name}  # fmt: skip
        at = np.arange(len(shapes)) + i / (len(names) + 1)
        axes.bar(at, [rows.get(s, 0) for s in shapes], 1 / (len(names) + 1), label=name)
    axes.set_xticks(np.arange(len(shapes)) + 0.3, shapes, rotation=30, ha="right")
    axes.set_ylabel("fraction of the floor")
    axes.set_ylim(0, 1)
    axes.set_title(f"Latent attention, {result['device']}, {result['dtype']}, jax {result['jax']}")
    axes.legend()
    figure.savefig(path, dpi=150)


def cases(most_bytes, itemsize):
    """(name, shape, lengths) of configs/shapes/decode.toml."""
    grid = tomllib.loads((configs_dir() / "shapes" / "decode.toml").read_text())
    for shape in grid["shapes"]:
        batch, slots, *_ = shape
        if batch * slots * (R + P) * itemsize <= most_bytes:
            yield ", ".join(map(str, shape)), shape, np.full(batch, slots)
    for batch, low, high, heads, tokens in grid.get("ragged", []):
        if batch * high * (R + P) * itemsize <= most_bytes:
            rng = np.random.default_rng(0)
            lengths = np.exp(rng.uniform(np.log(low), np.log(high), batch)).astype(int)
            name = f"{batch}, {low}..{high}, {heads}, {tokens}"
            yield name, [batch, high, heads, tokens], lengths


def wanted(options, dtype):
    """The `cases` that `--only` leaves."""
    for name, *case in cases(options.most_bytes, dtype.itemsize):
        if not options.only or any(re.search(part, name) for part in options.only):
            yield name, *case


def main():
    """Runs the grid of configs/shapes/decode.toml."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--implementation", nargs="+", default=["xla"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--cache-dtype", choices=ENCODINGS, help="latents in it, with scales")
    parser.add_argument("--last", type=float, default=0.06, help="seconds of a timed loop")
    parser.add_argument("--most-bytes", type=float, default=8e9, help="skip larger caches")
    parser.add_argument(
        "--only", nargs="+", help="shapes in whose name one of these patterns is found"
    )
    parser.add_argument("--pages", action="store_true", help="compare paged with dense caches")
    parser.add_argument("--json", type=pathlib.Path, help="write the rows here too")
    parser.add_argument("--plot", type=pathlib.Path, help="draw the fractions here (matplotlib)")
    options = parser.parse_args()
    dtype = jnp.dtype(options.dtype)
    copy, matmul = ceilings(options.last)
    kind = jax.devices()[0].device_kind
    print(f"{kind}, jax {jax.__version__}, {dtype.name}; measured {copy / 1e12:.2f} TB/s copy, "
          f"{matmul / 1e12:.0f} TFLOP/s matmul\n")  # fmt: skip
    result = {"device": kind, "jax": jax.__version__, "dtype": dtype.name, "copy": copy,
              "matmul": matmul}  # fmt: skip
    if options.pages:
        result["pages"] = print_pages(options, dtype, copy, matmul)
    else:
        result["rows"] = print_implementations(options, dtype, copy, matmul)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2))
    if options.plot and not options.pages:
        draw_plot(result, options.plot)


def print_implementations(options, dtype, copy, matmul):
    """The table of implementations; returns its rows."""
    titles = ("B, S, N, T", "implementation", "us", "TFLOP/s", "TB/s", "of floor", "of xla's time",
              "cut us", "error", "lse error", "repeatable")  # fmt: skip
    print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    rows = []
    for name, shape, lengths in wanted(options, dtype):
        batch, slots, heads, _ = shape
        floor, flops, moved = floor_of(shape, lengths, dtype, copy, matmul, options.cache_dtype)
        times = {}
        for implementation in options.implementation:
            if implementation in PEERS:
                expanded = 2 * batch * slots * heads * (H + P) * dtype.itemsize
                if implementation == "expanded" and expanded > 4 * options.most_bytes:
                    continue
                try:
                    row = PEERS[implementation](shape, lengths, dtype, floor, options.last)
                except Exception as error:  # peers' versions differ in what they take
                    print(f"| {name} | {implementation} | {str(error).splitlines()[0][:80]} |")
                    continue
            else:
                row = measure(
                    implementation, shape, lengths, dtype, floor, options.last, options.cache_dtype
                )
            taken = times[implementation] = row["seconds"]
            row |= {"name": name, "shape": shape, "implementation": implementation, "floor": floor,
                    "fraction": floor / taken}  # fmt: skip
            rows.append(row)
            show = lambda x, form: "" if x is None else format(x, form)  # noqa: E731
            ratio = taken / times["xla"] if "xla" in times else None
            print(f"| {name} | {implementation} | {taken * 1e6:.1f} | {flops / taken / 1e12:.0f} | "
                  f"{moved / taken / 1e12:.2f} | {floor / taken:.3f} | {show(ratio, '.2f')} | "
                  f"{show(row['cut'] and row['cut'] * 1e6, '.1f')} | {show(row['error'], '.1e')} | "
                  f"{show(row['lse_error'], '.0e')} | {show(row['repeatable'], '')} |",
                  flush=True)  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
